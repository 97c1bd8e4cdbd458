"""Does any of a million random plans break an invariant?

    python benchmarks/fuzz.py                            # a million; two minutes on one quiet core
    python benchmarks/fuzz.py --plans 100000 --seed 7    # fewer, others

Each round draws a policy and shapes, and plans thousands of batches in one call (``vmap`` over the
library's own begin, grow, select and pack). Every plan is checked by the masks of
``echo.testing.invariants`` and by a second derivation of the packed layout; empty lanes are moved
behind the others and the requests reversed, and the plan must be the same; two plans of each round
go through ``check_step``, in plain Python. Scores have ties, NaN, infinities and values above 0.
Writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import functionalize, vmap

import echo
from echo.testing import Scenario, check_step
from echo.testing.invariants import CLAIMED, INVARIANTS, Selection
from echo.testing.scenarios import FAULTS, scores
from echo.tree.packed import WORD

ROUND = 2048
"""Plans of one call."""


@dataclass(frozen=True)
class Round:
    """A policy, shapes, and N steps: :class:`~echo.testing.Scenario` with a leading dimension."""

    scheduler: echo.ElasticBudgetScheduler
    claims: tuple[str, ...]
    roots: Tensor
    live: Tensor
    limits: Tensor
    log_probs: Tensor
    budget: int | None
    weights: Tensor | None

    @classmethod
    def draw(cls, rng: np.random.Generator, calibration: echo.Calibration) -> Round:
        """Small shapes, so that every corner is met often."""
        sizes = (int(rng.integers(low, high)) for low, high in ((1, 6), (1, 5), (1, 4), (1, 4)))
        batch, depth, k, beam = sizes
        vocab, spare = 5, int(rng.integers(0, 1 + batch * min(beam, k) * depth))
        reliability = calibration if rng.random() < 0.4 else None
        limit = int(rng.choice([1, 3, 33, 70], p=[0.05, 0.25, 0.35, 0.35]))
        kind = rng.choice(["two-level", "global", "per-request"])
        extra, each = int(rng.integers(0, 6)), int(rng.integers(1, min(12, limit + 1)))
        rule, claims = {
            "two-level": (echo.TwoLevel(beam, extra, reliability), ("ties", "depth_first")),
            "global": (echo.GlobalRank(beam, reliability), ("ties", "work_conserving", "optimal")),
            "per-request": (
                echo.PerRequest(each, beam, reliability),
                ("ties", "batch_invariant"),
            ),
        }[kind]
        gates = [
            None,
            echo.SparseGate({int(rng.integers(1, depth + 1)): float(rng.random() / 2)}),
            echo.BeamMassGate((1, 3), -1.0, 2),
        ]
        budget = None if kind == "per-request" else batch + spare
        scheduler = echo.ElasticBudgetScheduler(
            rule, gates[rng.integers(3)], budget, depth, max_verify_tokens_per_req=limit
        )
        shape, coarse = (ROUND, depth, vocab, k), bool(rng.random() < 0.5)
        table = scores(rng.integers(0, 65536, np.prod(shape)), coarse=coarse).view(shape)
        bad = torch.from_numpy(rng.random(shape) < rng.choice([0.0, 0.05, 0.5]))
        faults = torch.tensor(FAULTS)[torch.from_numpy(rng.integers(0, len(FAULTS), shape))]
        each = ROUND, batch
        roots, live = rng.integers(0, vocab, each), rng.random(each) < rng.choice([0.7, 1.0])
        limits, weights = rng.integers(0, 14, each), rng.choice(np.float32([1, 0.5, 0.1]), each)
        return cls(
            scheduler,
            claims,
            *(torch.from_numpy(column) for column in (roots, live, limits)),
            torch.where(bad, faults, table),
            budget,
            torch.from_numpy(weights) if rng.random() < 0.3 else None,
        )

    def one(self, n: int) -> Scenario:
        """The n-th step alone."""
        weights = None if self.weights is None else self.weights[n]
        columns = (x[n] for x in (self.roots, self.live, self.limits, self.log_probs))
        return Scenario(*columns, self.budget, weights)

    def permuted(self, turn: Tensor) -> Round:
        """Each step's requests in another order, int64 [N, B]."""
        names = ("roots", "live", "limits", *(() if self.weights is None else ("weights",)))
        return replace(self, **{name: getattr(self, name).gather(1, turn) for name in names})

    def plan(self) -> dict[str, Tensor]:
        """All N plans in one call."""

        def step(
            roots: Tensor, live: Tensor, limits: Tensor, log_probs: Tensor, *weights: Tensor
        ) -> dict[str, Tensor]:
            tree = self.scheduler.begin(
                roots,
                live=live,
                verify_limits=limits,
                num_verify_tokens=self.budget,
                request_weights=weights[0] if weights else None,
            )
            for layer in log_probs:
                vocab, k = layer.shape
                tokens = (tree.frontier.token[..., None] + 1 + torch.arange(k)) % vocab
                tree = self.scheduler.grow(tree, tokens, layer[tree.frontier.token])
            forest, packed = tree.forest, self.scheduler.pack(tree)
            names = ("tokens", "parent", "depth", "request", "indptr", "mask", "node")
            own = ("token", "parent", "score", "committed")
            return {
                **{name: getattr(packed, name) for name in names},
                **{f"of_{name}": getattr(forest, name) for name in own},
                "of_depth": forest.depth + 0 * roots[0],
                "selected": self.scheduler.select(tree),
                "probability": self.scheduler.rule.acceptance_probability(tree),
                "status": tree.status,
                "verify_limits": tree.verify_limits,
                "num_verify_tokens": torch.full_like(roots[0], tree.num_verify_tokens),
            }

        weights = [] if self.weights is None else [self.weights]
        columns = self.roots, self.live, self.limits, self.log_probs, *weights
        return vmap(functionalize(step))(*columns)

    def check(self) -> None:
        """Raises at the first plan that breaks an invariant, with its table."""
        self._check_step(0)  # first: rules keep tables from their first call, not to be inside vmap
        self._check_step(ROUND // 2)
        plan = self.plan()
        shared = ("selected", "verify_limits", "status", "num_verify_tokens")
        s = Selection(
            **{name: plan[name] for name in shared},
            **{name: plan[f"of_{name}"] for name in ("committed", "parent", "score")},
            depth=plan["of_depth"][0],
            live=self.live,
        )
        for name, invariant in (INVARIANTS | CLAIMED).items():
            if name in INVARIANTS or name in self.claims:
                self._none(name, invariant.broken(s).flatten(1).any(1))
        self._none("layout", ~faithful(plan))
        turn = (~self.live).long().argsort(dim=1, stable=True)
        self._none("padding", ~same(plan, self.permuted(turn).plan(), turn))
        turn = torch.arange(self.live.shape[1] - 1, -1, -1).expand_as(self.roots)
        if self.weights is None:
            self._none("permutation", ~same(plan, self.permuted(turn).plan(), turn) & ~tied(plan))

    def _check_step(self, n: int) -> None:
        check_step(self.scheduler, self.one(n), claims=(*self.claims, "permutation", "padding"))

    def _none(self, name: str, broken: Tensor) -> None:
        if broken.any():
            n = int(broken.nonzero()[0])
            self._check_step(n)
            count = f"{int(broken.sum())} of {ROUND} plans"
            raise AssertionError(f"{name}: {count}, the first {self.one(n)} of {self.scheduler}")


def faithful(plan: dict[str, Tensor]) -> Tensor:
    """bool [N]: the packed rows are the selected nodes in order, their parents, masks and pads."""
    selected, node = plan["selected"].flatten(1), plan["node"]
    batch, nodes, rows = *plan["selected"].shape[1:], node.shape[1]
    count = selected.sum(1, keepdim=True)
    expected = (~selected).long().argsort(dim=1, stable=True)
    expected = torch.nn.functional.pad(expected, (0, rows))[:, :rows]
    real = torch.arange(rows) < count
    at = torch.where(real, expected, 0)
    owner = torch.where(real, at // nodes, batch)
    first = plan["indptr"].long().gather(1, owner.clamp(max=batch))
    depth = torch.where(real, plan["of_depth"].gather(1, at % nodes), 0)
    above = torch.where(depth > 0, first + plan["parent"], 0)
    local = torch.where(real, torch.arange(rows) - first, 0)
    words = plan["mask"].shape[2]
    mine = torch.arange(words) == (local // WORD)[..., None]
    own = torch.where(mine, 1 << (local % WORD)[..., None], 0).int()
    upper = plan["mask"].gather(1, above[..., None].expand(-1, -1, words))
    mask = torch.where((depth > 0)[..., None], upper | own, own)
    parent = (at // nodes) * nodes + plan["of_parent"].flatten(1).gather(1, at)
    tokens = torch.where(real, plan["of_token"].flatten(1).gather(1, at), 0)
    agree = [
        node == torch.where(real, expected, -1),
        plan["tokens"] == tokens,
        plan["request"] == owner,
        plan["depth"] == depth,
        torch.where(depth > 0, node.gather(1, above) == parent, plan["parent"] == -1),
        (plan["mask"] == mask).flatten(1),
        plan["indptr"].diff(dim=1) == plan["selected"].sum(2),
    ]
    return torch.stack([column.all(1) for column in agree]).all(0)


def same(plan: dict[str, Tensor], other: dict[str, Tensor], turn: Tensor) -> Tensor:
    """bool [N]: request i of ``other`` was given what request turn[i] of ``plan`` was."""
    index = turn[..., None].expand(-1, -1, plan["selected"].shape[2])
    equal = lambda name: plan[name].gather(1, index) == other[name]
    unused = ~(plan["selected"].gather(1, index) | other["selected"])
    alike = equal("selected") & (equal("of_token") & equal("of_parent") | unused)
    return alike.flatten(1).all(1)


def tied(plan: dict[str, Tensor]) -> Tensor:
    """bool [N]: two drafts tie, by score or probability; then the order of requests may decide."""
    ties = []
    for value in (plan["of_score"], plan["probability"]):
        drafted = (plan["of_depth"][:, None] > 0) & torch.isfinite(plan["of_score"])
        apart = 10.0 + torch.arange(value[0].numel()).view(value[0].shape)
        spread = torch.where(drafted, value.double(), apart).flatten(1)
        ties.append((spread.sort(dim=1).values.diff(dim=1) == 0).any(1))
    return ties[0] | ties[1]


def calibration(rng: np.random.Generator) -> echo.Calibration:
    """From a log of a drafter that is surer than it should be."""
    depth, confidence = rng.integers(1, 5, 4000), rng.random(4000)
    accepted = rng.random(4000) < confidence**1.5
    return echo.calibrate(echo.WarmupLog.from_arrays(depth, confidence, accepted))


def main() -> None:
    """Plans and checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fuzz.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="echo")
    rng, start, done = np.random.default_rng(args.seed), time.perf_counter(), Counter[str]()
    maps = calibration(rng)
    while done.total() < args.plans:
        drawn = Round.draw(rng, maps)
        drawn.check()
        capped = ", a cap each" if drawn.budget is None else ""
        done[type(drawn.scheduler.rule).__name__ + capped] += ROUND
        if done.total() % (50 * ROUND) == 0:
            print(f"{done.total():,} plans, {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    result = {"plans": done.total(), "broken": 0, "by_rule": dict(done), "seed": args.seed}
    result |= {"seconds": round(seconds, 1), "torch": torch.__version__}
    result |= {"python": platform.python_version()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{done.total():,} plans, none broken; {seconds:.0f} s")


if __name__ == "__main__":
    main()
