"""The engines' own published code as the oracle, run on the CPU.

    ECHO_PEERS=install pytest -m peers tests/test_peers.py     # fetches the wheels without their dependencies (100 MB)
    ECHO_PEERS=<folder> pytest -m peers tests/test_peers.py    # a folder that they were installed to, with --no-deps --target

SGLang's tree builder, greedy verify, mask reader, attention and beam: its kernels run in Triton's
interpreter, and the engine around them is replaced by stand-ins. FlashInfer's planning code in
Python, and its kernel's line that reads a mask bit. None of their code is in this repository. The
bit formula of TensorRT-LLM is applied in test_layouts.py.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import echo
from echo.kernels import tree_attention
from echo.testing import TabularDrafter, importers, table
from echo.tree import layouts
from forests import forest, paths

VERSIONS = {"sglang": "0.5.23", "flashinfer": "0.7.2.post1"}
WHEELS = {"sglang": "sglang", "flashinfer": "flashinfer-python"}
pytestmark = pytest.mark.peers


def installed(name, tmp_path_factory) -> Path:
    """The folder that holds a package; skips with a clear word where it cannot be had."""
    asked, wheel = os.environ.get("ECHO_PEERS"), f"{WHEELS[name]}=={VERSIONS[name]}"
    if not asked:
        pytest.skip(
            f"set ECHO_PEERS=install, or to a folder that holds {wheel}, to compare with the peers' own code"
        )
    folder = tmp_path_factory.mktemp(name) if asked == "install" else Path(asked)
    if asked == "install":
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(folder),
            wheel,
            "msgspec",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{wheel} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    if not (folder / name).is_dir():
        pytest.skip(f"no {name} in the folder that ECHO_PEERS names ({folder.name})")
    return folder


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Imports a module of sglang by its path, without the engine around it."""
    folder = installed("sglang", tmp_path_factory)
    triton = sys.modules.get("triton")
    if triton is not None and not triton.knobs.runtime.interpret:
        pytest.skip(
            "triton is imported already: run this file in a process of its own (pytest -m peers tests/test_peers.py)"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.syspath_prepend(folder)
        for name in (
            "",
            ".kernels",
            ".kernels.ops",
            ".kernels.ops.attention",
            ".kernels.ops.speculative",
            ".srt",
        ):
            package = types.ModuleType(f"sglang{name}")
            package.__path__ = [str(folder / f"sglang{name}".replace(".", "/"))]
            patch.setitem(sys.modules, package.__name__, package)
        import triton

        no = dict.fromkeys(
            (
                "is_cpu",
                "is_cuda",
                "is_hip",
                "is_musa",
                "is_npu",
                "is_gfx95_supported",
                "is_gfx1250_supported",
            ),
            lambda: False,
        )
        stand_ins = {
            "srt.utils": no
            | {
                "is_xpu": lambda: True,
                "next_power_of_2": triton.next_power_of_2,
                "get_device_core_count": lambda *_: 1,
            },
            "srt.environ": {"envs": mock.MagicMock()},
            "srt.platforms": {"current_platform": None, "__path__": []},
            "srt.platforms.interface": {"reject_out_of_tree_path": None},
        }
        for name, parts in stand_ins.items():
            module = types.ModuleType(f"sglang.{name}")
            vars(module).update(parts)
            patch.setitem(sys.modules, module.__name__, module)
        yield lambda name: import_module(f"sglang.{name}")
        for name in [n for n in sys.modules if n.startswith("sglang.kernels.ops.")]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def flashinfer(tmp_path_factory):
    """FlashInfer's package folder."""
    return installed("flashinfer", tmp_path_factory) / "flashinfer"


def functions(file, names, scope):
    """Functions of a module that cannot be imported without the engine, by name from its source."""
    nodes = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    for node in nodes:
        node.decorator_list = []  # torch.compile
    exec(compile(ast.Module(nodes, []), str(file), "exec"), scope)
    return [scope[name] for name in names]


def build(peer, packed, n, context, mode):
    """Its builder's outputs for our trees of exactly n rows: block r of its candidates holds the
    children of our row r.
    """
    tree = peer("kernels.ops.speculative.spec_tree")
    batch = packed.batch
    parent = packed.parent.view(batch, n).long()
    siblings = torch.zeros_like(parent)
    siblings[:, 1:] = torch.tensor(
        [[own[:i].count(own[i]) for i in range(1, n)] for own in parent.tolist()]
    ).view(batch, n - 1)
    topk = int(siblings.max()) + 1
    flat = parent * topk + siblings
    parent_list = torch.cat([torch.full((batch, 1), -1), flat[:, 1:]], dim=1)
    size = int((n * (context + n)).sum()) if mode == 0 else batch * n * n
    mask, positions = torch.ones(size, dtype=torch.bool), torch.empty(batch * n, dtype=torch.int64)
    links = [torch.full((batch, n), -1) for _ in range(3)]
    tree.build_tree_kernel_efficient_func(
        parent_list,
        flat[:, 1:].contiguous(),
        context,
        mask,
        positions,
        *links,
        topk,
        packed.max_depth + 1,
        n,
        tree.TreeMaskMode(mode),
    )
    return mask, positions, links


@pytest.mark.parametrize(("seed", "n"), [(0, 1), (1, 2), (2, 7), (3, 12), (4, 34)])
def test_its_builder_makes_our_links_positions_and_masks(peer, seed, n):
    case = forest(seed, 3, n, empty=False, exact=True)
    context = torch.tensor([4, 0, 9])
    ours = layouts.sglang(case.packed, n, context)
    for mode in (0, 1):
        mask, positions, (index, token, sibling) = build(peer, case.packed, n, context, mode)
        assert torch.equal(ours.positions, positions)
        assert torch.equal(ours.retrive_index, index)
        assert torch.equal(ours.retrive_next_token, token)
        assert torch.equal(ours.retrive_next_sibling, sibling)
        name = ("FULL_MASK", "QLEN_ONLY")[mode]
        assert torch.equal(
            layouts.sglang_mask(
                case.packed, n, name, prefix_lens=context, size=len(mask)
            ).flatten(),
            mask,
        )


@pytest.mark.parametrize("seed", range(6))
def test_its_mask_reader_finds_our_links_in_our_mask(peer, seed):
    """The path of its n-gram drafter: ragged trees on uniform padding, pads included."""
    case, context = forest(seed, 4, 20), torch.tensor([4, 0, 9, 2])
    n = case.largest + seed % 2
    ours = layouts.sglang(case.packed, n, context)
    positions, *links = [torch.empty(4 * n, dtype=torch.int64) for _ in range(4)]
    read = peer("kernels.ops.speculative.reconstruct_tree").reconstruct_indices_from_tree_mask_func
    read(layouts.sglang_mask(case.packed, n, "QLEN_ONLY"), context, positions, *links, 4, n)
    for own, its in zip(
        (ours.positions, ours.retrive_index, ours.retrive_next_token, ours.retrive_next_sibling),
        (positions, *links),
        strict=True,
    ):
        assert torch.equal(own.flatten(), its)


@pytest.mark.parametrize("seed", range(6))
def test_its_greedy_verify_accepts_what_ours_accepts(peer, seed):
    case, n = forest(seed, 4, 16, empty=False), 17
    packed = case.packed
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (packed.num_rows,), generator=generator)
    for row in range(packed.num_rows):  # often a child's token
        below = [
            c
            for c in range(packed.num_rows)
            if packed.request[c] == packed.request[row]
            and packed.parent[c] == packed.local_row[row]
        ]
        if below and torch.rand(1, generator=generator) < 0.8:
            target[row] = packed.tokens[
                below[int(torch.randint(0, len(below), (1,), generator=generator))]
            ]
    accepted = echo.accept(packed, target)
    steps = packed.max_depth + 1
    links = layouts.sglang(packed, n, torch.zeros(4, dtype=torch.int64))
    grid = (packed.indptr[:-1, None] + torch.arange(n)).clamp(max=packed.num_rows - 1)
    predicts, index, count = (
        torch.full((4 * n,), -1).int(),
        torch.full((4, steps), -1).int(),
        torch.empty(4).int(),
    )
    peer("kernels.ops.speculative.spec_tree").verify_tree_greedy_func(
        predicts, index, count, links.draft_tokens.view(4, n), links.retrive_index, links.retrive_next_token,
        links.retrive_next_sibling, target[grid],
    )  # fmt: skip
    assert torch.equal(count + 1, accepted.num_emitted.int()) and int(count.max()) > 0
    rows = index % n + packed.indptr[:-1, None]
    assert torch.equal(torch.where(index >= 0, rows, -1).long(), accepted.rows)
    assert torch.equal(
        torch.where(index >= 0, predicts[index.clamp(min=0)], -1).long(), accepted.tokens
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_its_attention_with_our_mask_on_ragged_trees_is_our_reference(peer, seed):
    case, context = forest(seed, 3, 20, empty=False), torch.tensor([5, 0, 33])
    packed, dim = case.packed, 16
    rows = packed.num_rows
    q, k, v = torch.randn(rows, 4, dim), torch.randn(rows, 2, dim), torch.randn(rows, 2, dim)
    cache = torch.randn(2, 120, 1, 2, dim)
    table = torch.randperm(120)[:99].view(3, 33).int()
    indices = torch.cat([own[:length] for own, length in zip(table, context.tolist(), strict=True)])
    kv_indptr = torch.cat([torch.zeros(1), context.cumsum(0)]).int()
    mask = layouts.flashinfer(
        packed,
        context,
        int((packed.indptr.diff() * (context + packed.indptr.diff())).sum()),
        bits=False,
    )
    out = torch.full_like(q, torch.nan)
    peer("kernels.ops.attention.extend_attention").extend_attention_fwd(
        q, k, v, out, cache[0, :, 0], cache[1, :, 0], packed.indptr, kv_indptr, indices, mask.mask, True, mask.indptr,
        int(packed.indptr.diff().max()), 1.0, 1.0,
    )  # fmt: skip
    expected, _ = tree_attention(
        q,
        cache[0],
        cache[1],
        table,
        context.int(),
        k,
        v,
        packed.request,
        packed.indptr,
        packed.mask,
    )
    assert float((out - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    "shape", [(3, 4, 37, False, 16), (3, 5, 20, True, 16), (2, 16, 50, False, 1)]
)
def test_the_benchmark_sets_its_attention_up_right(peer, shape, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import gpu
    from common import peers

    batch, rows, context, elastic, page = shape
    args = gpu.inputs(gpu.Case("tiny", batch, rows, context, elastic, page), torch.device("cpu"), 0)
    assert gpu.wrong(args, peers.sglang(args)()) < 1e-6


@pytest.mark.parametrize("n", [2, 5, 9, 20])
def test_its_beam_draws_our_eagle_trees(peer, n):
    """Its draft loop, selection and builder against ``ElasticBudgetScheduler.eagle`` with the
    same draft model.
    """
    spec = peer("kernels.ops.speculative.spec_tree")
    topk, steps, context = 3, 4, torch.tensor([3, 8])
    drafter, roots = TabularDrafter(table(40, seed=n), k=topk), torch.tensor([5, 11])
    scope = {
        "torch": torch,
        "Optional": object | None,
        "List": list,
        "maybe_detect_oob": lambda *_: None,
    }
    scope |= {
        "Optional": __import__("typing").Optional,
        "fast_topk": lambda x, k, dim: x.topk(k, dim=dim),
    }
    names = ("_select_top_k_tokens_first", "_select_top_k_tokens_later", "select_top_k_tokens")
    speculative = Path(import_module("sglang").__path__[0]) / "srt" / "speculative"
    *_, select = functions(speculative / "spec_utils.py", names, scope)
    (organize,) = functions(speculative / "eagle_utils.py", ("organize_draft_results",), scope)
    text, scores, collected = roots[:, None], None, []
    for step in range(steps):
        top = drafter.probabilities[text].topk(topk, dim=-1)
        p, index = top.values.float().view(-1, topk), top.indices.view(-1, topk)
        ids, _, scores, info = select(step, p, index, None, scores, topk)
        collected.append(info)
        text = ids.view(2, topk)
    parents, selected, drafts = organize(*zip(*collected, strict=True), n)
    mask, positions = torch.ones(2 * n * n, dtype=torch.bool), torch.empty(2 * n, dtype=torch.int64)
    links = [torch.full((2, n), -1) for _ in range(3)]
    spec.build_tree_kernel_efficient_func(
        parents,
        selected,
        context,
        mask,
        positions,
        *links,
        topk,
        steps,
        n,
        spec.TreeMaskMode.QLEN_ONLY,
    )
    its = importers.from_sglang(
        layouts.SGLangLinks(torch.cat([roots[:, None], drafts], 1).flatten(), positions, *links)
    )

    scheduler = echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=n, beam=topk, max_depth=steps
    )
    tree = scheduler.begin(roots)
    for _ in range(steps):
        tree = scheduler.grow(tree, *drafter.draft(torch.arange(2), tree.frontier))
    ours = scheduler.pack(tree)

    assert [paths(its, b) for b in range(2)] == [paths(ours, b) for b in range(2)]


class NumpyBits:
    """Stands in for FlashInfer's CUDA module: each segment by numpy's packbits, as its
    documentation defines it.
    """

    @staticmethod
    def segment_packbits(x, indptr, new_indptr, bitorder, y):
        for first, end, begin in zip(
            indptr[:-1].tolist(), indptr[1:].tolist(), new_indptr[:-1].tolist(), strict=True
        ):
            bits = np.packbits(x[first:end].numpy(), bitorder=bitorder)
            y[begin : begin + len(bits)] = torch.from_numpy(bits)


@pytest.mark.parametrize("seed", range(4))
def test_its_plan_packs_our_flat_mask_to_our_packed_one(flashinfer, seed):
    """``plan``'s own steps on ragged trees: where each request's mask begins, then one bit an
    entry, bytes by request.
    """
    case, context, page = forest(seed, 4, 20, empty=False), torch.tensor([5, 0, 33, 8]), 4
    scope = {"torch": torch, "Tuple": tuple, "get_quantization_module": lambda: NumpyBits}
    (begins,) = functions(flashinfer / "prefill.py", ("_compute_page_mask_indptr",), scope)
    (pack,) = functions(flashinfer / "quantization" / "packbits.py", ("segment_packbits",), scope)
    kv = context + case.packed.indptr.diff()
    pages = torch.cat([torch.zeros(1), (-(-kv // page)).cumsum(0)]).int()
    indptr = begins(case.packed.indptr, pages, ((kv - 1) % page + 1).int(), page)
    flat = layouts.flashinfer(case.packed, context, int(indptr[-1]), bits=False)
    assert torch.equal(flat.indptr, indptr)
    its, its_indptr = pack(flat.mask, indptr, bitorder="little")
    ours = layouts.flashinfer(case.packed, context, len(its))
    assert torch.equal(ours.mask, its) and torch.equal(ours.indptr, its_indptr)


def test_its_kernel_reads_our_bits(flashinfer):
    """The two lines by which its kernel finds a bit, in its own words, applied to our packed
    mask.
    """
    header = (
        flashinfer / "data" / "include" / "flashinfer" / "attention" / "variants.cuh"
    ).read_text()
    assert (
        "custom_mask_ptr = params.maybe_custom_mask + params.maybe_mask_indptr[batch_idx];"
        in header
    )
    assert "offset = static_cast<uint64_t>(qo_idx) * kv_len + kv_idx;" in header
    assert "mask &= ((custom_mask_ptr[offset / 8] >> (offset % 8)) & 1);" in header
    case, context = forest(5, 4, 40, empty=False), torch.tensor([5, 0, 33, 8])
    mask = layouts.flashinfer(case.packed, context, 4 * 40 * 80)
    for b in range(4):
        sees, past = case.sees(b), int(context[b])
        kv_len = past + len(sees)
        own = mask.mask[int(mask.indptr[b]) :].tolist()
        for qo_idx, row in enumerate(sees):
            bits = [
                own[(qo_idx * kv_len + kv_idx) // 8] >> (qo_idx * kv_len + kv_idx) % 8 & 1
                for kv_idx in range(kv_len)
            ]
            assert bits == [True] * past + row


@pytest.mark.parametrize("n", [7, 12, 30])
def test_its_kernel_writes_our_packed_bits(tmp_path_factory, n):
    """Bit-packing has no builder but SGLang's CUDA kernel: its lines that place a bit, in its
    own words, against our bytes.
    """
    folder = (
        installed("sglang", tmp_path_factory)
        / "sglang"
        / "kernels"
        / "jit"
        / "include"
        / "sgl_kernel"
    )
    header = (folder / "speculative" / "eagle.cuh").read_text()
    for line in (
        "token_tree_idx = (bid * draft_token_num + tid) * num_bytes_per_item;",
        "tree_mask[token_tree_idx] = 1;  // little endian",
        "byte_idx = (cur_position + 1) / 8;",
        "bit_idx = (cur_position + 1) % 8;",
        "tree_mask[token_tree_idx + byte_idx] |= (1 << bit_idx);",
    ):
        assert line in header
    case, width = forest(n, 3, n, empty=False, exact=True), 4 if n > 16 else 2 if n > 8 else 1
    expected = [0] * (3 * n * width)
    for bid in range(3):
        for tid, row in enumerate(case.sees(bid)):
            for seen in np.flatnonzero(row).tolist():
                expected[(bid * n + tid) * width + seen // 8] |= 1 << seen % 8
    assert (
        layouts.sglang_mask(case.packed, n, "QLEN_ONLY_BITPACKING").view(torch.uint8).tolist()
        == expected
    )


@pytest.mark.parametrize("tiers", [(), (16, 48, 100)])
def test_its_loader_reads_our_cost_table_and_its_planner_picks_our_rows(peer, tiers, tmp_path):
    pytest.importorskip("msgspec")
    module = import_module_from("srt/speculative/dspark_components/dspark_sps.py")
    model = echo.CostModel(
        (1, 8, 32, 100),
        (1.0, 1.1, 1.9, 4.0),
        tiers=tiers,
        num_reqs=(1, 8, 16),
        request_seconds=(0.0, 0.2, 0.3),
    )
    path = tmp_path / "cost.json"
    path.write_text(model.to_sglang())
    table = module.load_sps_table_from_path(str(path))
    assert echo.CostModel.from_sglang(table.to_json()) == echo.CostModel.from_sglang(
        model.to_sglang()
    )
    scope = {
        "torch": torch,
        "Union": __import__("typing").Union,
        "DSparkScheduleConfig": object,
    } | vars(module)
    scope["VerifyBudgetDecision"] = types.SimpleNamespace
    planner = Path(module.__file__).with_name("dspark_planner.py")
    names = ("_additive_step_time_tensor", "_lookup_sps_tensor", "compute_verify_token_budget")
    *_, decide = functions(planner, names, scope)
    config = types.SimpleNamespace(resolved_max_verify_len=lambda: 7, survival_eps=0.0)
    for seed in range(20):
        requests = (1, 4, 12)[seed % 3]
        survival = torch.rand(requests, 7, generator=torch.Generator().manual_seed(seed)).cumprod(1)
        gain = torch.cat(
            [torch.zeros(1), survival.flatten().sort(descending=True).values.cumsum(0)]
        ).double()
        rows = requests + torch.arange(len(gain))
        rate = (requests + gain) / torch.from_numpy(model(rows.numpy(), num_reqs=requests))
        theirs = decide(history_survival_probs=survival, sps_table=table, cfg=config)
        assert theirs.budget == int(rate.argmax())
        assert theirs.predicted_theta == pytest.approx(float(rate.max()))


def import_module_from(path):
    """A module of sglang that needs nothing of the engine, from its file."""
    import sglang

    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(sglang.__path__[0]) / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
