"""Does any of a million random plans break an invariant?

    python benchmarks/fuzz.py                                # a million; two minutes on one quiet core
    python benchmarks/fuzz.py --plans 100000 --seed 7        # fewer, others

Each round draws a policy and shapes, and plans thousands of batches in one call (``vmap`` over the library's own plant, grow, select
and pack). Every plan is checked by the masks of ``echo.testing.selection`` and by a second derivation of the packed layout; empty slots
are moved behind the others and the requests reversed, and the plan must be the same; two plans of each round go through ``check_step``,
in plain Python. Scores have ties, NaN, infinities and values above 0. Writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import functionalize, vmap

import echo
from echo.testing import Scenario, check_step
from echo.testing.selection import CLAIMS, INVARIANTS, Selection
from echo.testing.strategies import FAULTS, scores
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
    capacity: Tensor
    log_probs: Tensor
    rows: int | None
    weights: Tensor | None

    @classmethod
    def draw(cls, rng: np.random.Generator, calibration: echo.Calibration) -> Round:
        """Small shapes, so that every corner is met often."""
        batch, depth, k, beam = (
            int(rng.integers(low, high)) for low, high in ((1, 6), (1, 5), (1, 4), (1, 4))
        )
        vocab, spare = (
            5,
            int(rng.integers(0, 1 + batch * min(beam, k) * depth)),
        )  # from nothing to about what all would buy
        reliability = calibration if rng.random() < 0.4 else None
        limit = int(rng.choice([1, 3, 33, 70], p=[0.05, 0.25, 0.35, 0.35]))
        kind = rng.choice(["two-level", "global", "per-request"])
        rule, claims = {
            "two-level": (
                echo.TwoLevel(beam, int(rng.integers(0, 6)), reliability),
                ("ties", "depth_first"),
            ),
            "global": (echo.GlobalRank(beam, reliability), ("ties", "full", "best")),
            "per-request": (
                echo.PerRequest(int(rng.integers(1, min(12, limit + 1))), beam, reliability),
                ("ties", "alone"),
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
        shape = ROUND, depth, vocab, k
        table = scores(
            rng.integers(0, 65536, np.prod(shape)), coarse=bool(rng.random() < 0.5)
        ).view(shape)
        bad = torch.from_numpy(rng.random(shape) < rng.choice([0.0, 0.05, 0.5]))
        table = torch.where(
            bad, torch.tensor(FAULTS)[torch.from_numpy(rng.integers(0, len(FAULTS), shape))], table
        )
        return cls(
            scheduler,
            claims,
            torch.from_numpy(rng.integers(0, vocab, (ROUND, batch))),
            torch.from_numpy(rng.random((ROUND, batch)) < rng.choice([0.7, 1.0])),
            torch.from_numpy(rng.integers(0, 14, (ROUND, batch))),
            table,
            None if budget is None else batch + spare,
            torch.from_numpy(rng.choice(np.float32([1, 0.5, 0.1]), (ROUND, batch)))
            if rng.random() < 0.3
            else None,
        )

    def one(self, n: int) -> Scenario:
        """The n-th step by itself."""
        weights = None if self.weights is None else self.weights[n]
        return Scenario(
            self.roots[n], self.live[n], self.capacity[n], self.log_probs[n], self.rows, weights
        )

    def permuted(self, turn: Tensor) -> Round:
        """Each step's requests in another order, int64 [N, B]."""
        roots, live, capacity = (x.gather(1, turn) for x in (self.roots, self.live, self.capacity))
        weights = None if self.weights is None else self.weights.gather(1, turn)
        return Round(
            self.scheduler, self.claims, roots, live, capacity, self.log_probs, self.rows, weights
        )

    def plan(self) -> dict[str, Tensor]:
        """All N plans in one call."""

        def step(
            roots: Tensor, live: Tensor, capacity: Tensor, log_probs: Tensor, *weights: Tensor
        ) -> dict[str, Tensor]:
            tree = self.scheduler.begin(
                roots,
                live=live,
                verify_limits=capacity,
                num_verify_tokens=self.rows,
                request_weights=weights[0] if weights else None,
            )
            for layer in log_probs:
                tokens = (
                    tree.frontier.token[..., None] + 1 + torch.arange(layer.shape[1])
                ) % layer.shape[0]
                tree = self.scheduler.grow(tree, tokens, layer[tree.frontier.token])
            forest, packed = tree.forest, self.scheduler.pack(tree)
            names = ("tokens", "parent", "depth", "request", "indptr", "mask", "node")
            return {
                **{name: getattr(packed, name) for name in names},
                **{
                    f"of_{name}": getattr(forest, name)
                    for name in ("token", "parent", "score", "committed")
                },
                "of_depth": forest.depth + 0 * roots[0],
                "selected": self.scheduler.select(tree),
                "gain": self.scheduler.rule.acceptance_probability(tree),
                "status": tree.status,
                "limit": tree.verify_limits,
                "num_verify_tokens": torch.full_like(roots[0], tree.num_verify_tokens),
            }

        weights = [] if self.weights is None else [self.weights]
        return vmap(functionalize(step))(
            self.roots, self.live, self.capacity, self.log_probs, *weights
        )

    def check(self) -> None:
        """Raises at the first plan that breaks an invariant, with its table."""
        for n in (
            0,
            ROUND // 2,
        ):  # first, because the rules keep their tables from the first call, which must not be inside vmap
            check_step(self.scheduler, self.one(n), claims=(*self.claims, "order", "slots"))
        plan = self.plan()
        s = Selection(
            plan["selected"],
            plan["of_committed"],
            plan["of_parent"],
            plan["of_score"],
            plan["of_depth"][0],
            self.live,
            plan["limit"],
            plan["status"],
            plan["num_verify_tokens"],
        )
        checks = INVARIANTS | {name: CLAIMS[name] for name in self.claims if name in CLAIMS}
        for name, check in checks.items():
            self._none(name, check(s).flatten(1).any(1))
        self._none("layout", ~faithful(plan))
        order = (~self.live).long().argsort(dim=1, stable=True)
        self._none("slots", ~same(plan, self.permuted(order).plan(), order))
        turn = torch.arange(self.live.shape[1] - 1, -1, -1).expand_as(self.roots)
        if self.weights is None:
            self._none("order", ~same(plan, self.permuted(turn).plan(), turn) & ~tied(plan))

    def _none(self, name: str, broken: Tensor) -> None:
        if broken.any():
            n = int(broken.nonzero()[0])
            check_step(self.scheduler, self.one(n), claims=(*self.claims, "order", "slots"))
            raise AssertionError(
                f"{name}: {int(broken.sum())} of {ROUND} plans, the first {self.one(n)} of {self.scheduler}"
            )


def faithful(plan: dict[str, Tensor]) -> Tensor:
    """bool [N]: the packed rows are the selected nodes, in order, with their parents, depths, masks and pads."""
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
    own = torch.where(
        torch.arange(words) == (local // WORD)[..., None], 1 << (local % WORD)[..., None], 0
    )
    upper = plan["mask"].gather(1, above[..., None].expand(-1, -1, words))
    mask = torch.where((depth > 0)[..., None], upper | own.int(), own.int())
    hangs = node.gather(1, above) == (at // nodes) * nodes + plan["of_parent"].flatten(1).gather(
        1, at
    )
    agree = [
        (node == torch.where(real, expected, -1)).all(1),
        (plan["tokens"] == torch.where(real, plan["of_token"].flatten(1).gather(1, at), 0)).all(1),
        (plan["request"] == owner).all(1),
        (plan["depth"] == depth).all(1),
        torch.where(depth > 0, hangs, plan["parent"] == -1).all(1),
        (plan["mask"] == mask).flatten(1).all(1),
        (plan["indptr"].diff(dim=1) == plan["selected"].sum(2)).all(1),
    ]
    return torch.stack(agree).all(0)


def same(plan: dict[str, Tensor], other: dict[str, Tensor], turn: Tensor) -> Tensor:
    """bool [N]: request i of ``other`` was given what request turn[i] of ``plan`` was."""
    places = turn[..., None].expand(-1, -1, plan["selected"].shape[2])
    alike = [
        plan[name].gather(1, places) == other[name]
        for name in ("selected", "of_token", "of_parent")
    ]
    drafted = plan["selected"].gather(1, places) | other["selected"]
    return (alike[0] & (alike[1] & alike[2] | ~drafted)).flatten(1).all(1)


def tied(plan: dict[str, Tensor]) -> Tensor:
    """bool [N]: two drafted nodes have equal scores or gains; then the order of the requests may decide."""
    ties = []
    for value in (plan["of_score"], plan["gain"]):
        drafted = (plan["of_depth"][:, None] > 0) & torch.isfinite(plan["of_score"])
        spread = torch.where(
            drafted, value.double(), 10.0 + torch.arange(value[0].numel()).view(value[0].shape)
        ).flatten(1)
        ties.append((spread.sort(dim=1).values.diff(dim=1) == 0).any(1))
    return ties[0] | ties[1]


def calibration(rng: np.random.Generator) -> echo.Calibration:
    """From a log of a drafter that is surer than it should be."""
    depth, confidence = rng.integers(1, 5, 4000), rng.random(4000)
    return echo.calibrate(
        echo.WarmupLog.from_arrays(depth, confidence, rng.random(4000) < confidence**1.5)
    )


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
        done[
            type(drawn.scheduler.rule).__name__ + (", a cap each" if drawn.rows is None else "")
        ] += ROUND
        if done.total() % (50 * ROUND) == 0:
            print(f"{done.total():,} plans, {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    result = {
        "plans": done.total(),
        "broken": 0,
        "by_rule": dict(done),
        "seed": args.seed,
        "seconds": round(seconds, 1),
    }
    args.out.write_text(
        json.dumps(
            result | {"torch": torch.__version__, "python": platform.python_version()}, indent=1
        )
        + "\n"
    )
    print(f"{done.total():,} plans, none broken; {seconds:.0f} s")


if __name__ == "__main__":
    main()
