"""The plain-torch SmolLM2 holds the weights of transformers' one, read without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "smollm2"))
import carry
import llama

gguf = pytest.importorskip("gguf")
WIDTH, HIDDEN, HEADS, KV_HEADS, SIZE, VOCAB, LAYERS = 64, 96, 4, 2, 16, 96, 2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small file of random weights, and these by name, as the reference package decodes them."""
    np = pytest.importorskip("numpy")
    folder, draw = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)
    writer, decoded = gguf.GGUFWriter(folder / carry.GGUF, "llama"), {}
    for name, value in {
        "embedding_length": WIDTH, "feed_forward_length": HIDDEN, "block_count": LAYERS,
        "head_count": HEADS, "head_count_kv": KV_HEADS, "rope_dimension_count": SIZE,
        "vocab_size": VOCAB, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e5,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(["é" * (i % 3) for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_eos_token_id(2)
    types = gguf.GGMLQuantizationType
    shapes = {"token_embd": (VOCAB, WIDTH, types.Q8_0), "output_norm": (1, WIDTH, types.F32)}
    for layer in range(LAYERS):
        rows = {"attn_q": HEADS * SIZE, "attn_k": KV_HEADS * SIZE, "attn_v": KV_HEADS * SIZE}
        block = {name: (size, WIDTH) for name, size in rows.items()}
        block |= {"attn_output": (WIDTH, HEADS * SIZE), "ffn_down": (WIDTH, HIDDEN)}
        block |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH)}
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), (1, WIDTH, types.F32))
        shapes |= {f"blk.{layer}.{name}": (*shape, types.Q4_1) for name, shape in block.items()}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in norms.items()}
    for name, (rows, columns, kind) in shapes.items():
        weight = draw.standard_normal((rows, columns)).astype(np.float32)
        weight = weight[0] if rows == 1 else weight
        packed = weight if kind == types.F32 else gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        whole = weight if kind == types.F32 else gguf.quants.dequantize(packed, kind)
        decoded[name] = torch.from_numpy(whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, decoded


def test_weights_are_what_the_reference_package_decodes(small):
    folder, decoded = small
    model = llama.load(folder=folder)
    assert torch.equal(model.model.embed_tokens.weight, decoded["token_embd"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.norm.weight, decoded["output_norm"])
    for index, layer in enumerate(model.model.layers):
        begin = f"blk.{index}."
        own = {name.split(".")[2]: decoded[name] for name in decoded if name.startswith(begin)}
        attention, mlp = layer.self_attn, layer.mlp
        rest = {"attn_v": attention.v_proj, "attn_output": attention.o_proj}
        rest |= {"ffn_gate": mlp.gate_proj, "ffn_up": mlp.up_proj, "ffn_down": mlp.down_proj}
        rest |= {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
        assert all(torch.equal(part.weight, own[name]) for name, part in rest.items())
        rotary = ("attn_q", attention.q_proj, HEADS), ("attn_k", attention.k_proj, KV_HEADS)
        for name, part, heads in rotary:
            pairs = own[name].view(heads, SIZE // 2, 2, WIDTH)
            assert torch.equal(part.weight.view(heads, 2, SIZE // 2, WIDTH), pairs.transpose(1, 2))
    assert model.config.eos_token_id == 2 and model.dtype == torch.float32


def test_cast_changes_the_weights_alone(small):
    model = llama.load(folder=small[0])
    other = llama.cast(model, torch.bfloat16)
    loaded = llama.load(dtype=torch.bfloat16, folder=small[0])
    for one, two in zip(other.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, two)
    assert other.lm_head.weight is other.model.embed_tokens.weight and model.dtype == torch.float32
    x = torch.zeros(1), torch.arange(9)
    for made in (other, loaded):
        pairs = zip(made.model.rotary_emb(*x), model.model.rotary_emb(*x), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_other_files_are_refused(small, tmp_path):
    data = bytearray((small[0] / carry.GGUF).read_bytes())
    (tmp_path / "other").write_bytes(b"GGML" + data[4:])
    with pytest.raises(ValueError, match="expected a GGUF file of version 3, got b'GGML'"):
        llama.read(tmp_path / "other")
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    data[at] = 2
    (tmp_path / "other").write_bytes(data)
    with pytest.raises(ValueError, match=r"expected tensors of types \[0, 3, 8\], got \[2\]"):
        llama.read(tmp_path / "other")


def test_the_real_one_is_transformers(smollm2):
    theirs, mine = smollm2[0].model, llama.load().model
    x = torch.randn(5, 576)
    assert torch.equal(theirs.embed_tokens.weight, mine.embed_tokens.weight)
    assert len(theirs.layers) == len(mine.layers)
    for one, two in zip(theirs.layers[::10], mine.layers[::10], strict=True):
        assert torch.equal(one.input_layernorm.weight, two.input_layernorm.weight)
        norms = (layer.post_attention_layernorm(x) for layer in (one, two))
        assert torch.allclose(*norms, atol=1e-6)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            pair = (getattr(layer.self_attn, name)(x) for layer in (one, two))
            assert torch.allclose(*pair, atol=1e-4)
        assert torch.allclose(one.mlp(x), two.mlp(x), atol=1e-3, rtol=1e-4)
        assert one.self_attn.head_dim == two.self_attn.head_dim
    place = torch.arange(700)[None]
    pairs = zip(theirs.rotary_emb(x, place), mine.rotary_emb(x, place), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_committed_tokens_are_the_tokenizers(smollm2):
    from model import encode
    from prompts import EVALUATION, TOKENS, WARMUP

    for name, sets in json.loads(TOKENS.read_text()).items():
        for kind, rows in sets.items():
            texts = (WARMUP if name == "warmup" else EVALUATION)[kind]
            assert rows == [ids.tolist() for ids in encode(smollm2[1], texts)]
