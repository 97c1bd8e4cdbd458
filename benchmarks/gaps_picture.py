"""The plots of gaps.py: each section by itself, and all as small multiples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from echo import style
from replay import by_batch

POLICIES = ("EAGLE", "ECHO (paper)", "global top-K", "goodput")


def budget(axis, r) -> None:
    """Throughput by K_max."""
    for name, ratio in r["curves"].items():
        policy, law = name.split(", ")
        axis.plot(r["rows"], ratio, "o-" if law == "knee at 256" else ".--", ms=3, color=style.of(policy), label=f"{policy}, {law}")
    axis.axvline(256, color=style.QUIET, lw=0.8)
    _ratio(axis, "K_max, rows of 64 requests")
    axis.set_xscale("log", base=2)
    axis.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])


def warmup(axis, r) -> None:
    """Throughput by warm-up size."""
    for name, draws in r["curves"].items():
        mean = [np.mean(d) for d in draws]
        axis.plot(r["positions"], mean, "o-", ms=3, color=style.of(name), label=name)
        axis.fill_between(r["positions"], [min(d) for d in draws], [max(d) for d in draws], color=style.of(name), alpha=0.15, lw=0)
    axis.set_xscale("log")
    axis.set_ylim(1)
    _ratio(axis, "positions warmed up on")


def gate_errors(axis, r) -> None:
    """False stops and false extensions by depth."""
    depth = np.array(r["depth"])
    axis.bar(depth - 0.2, r["false_stops"], 0.38, color=style.BAD, label="stopped, though accepted")
    axis.bar(depth + 0.2, r["false_extensions"], 0.38, color=style.QUIET, label="let pass, though rejected")
    axis.set_xticks(depth, [f"{d}*" if gate else str(d) for d, gate in zip(depth, r["gate"], strict=True)])
    axis.set_xlabel("depth (* gate)")
    axis.set_ylabel("share of such paths")
    _room_for_legend(axis)


def fairness(axis, r) -> None:
    """Shares of the doubtful quarter."""
    names = [name for name in POLICIES if name in r]
    parts = (
        ("steps", "of request-steps", style.QUIET),
        ("rows", "of drafted rows", style.of("goodput")),
        ("accepted", "of accepted drafts", style.GOOD),
    )
    for i, (key, label, colour) in enumerate(parts):
        axis.bar(np.arange(len(names)) + 0.26 * (i - 1), [r[n][f"doubtful_{key}"] for n in names], 0.25, color=colour, label=label)
    axis.set_xticks(range(len(names)), [f"{n}\nJain {r[n]['jain']:.3f}" for n in names], fontsize=6)
    _room_for_legend(axis)
    axis.set_ylabel("share of the doubtful quarter")


def over_time(axis, r) -> None:
    """Drafted rows of a doubtful and of another request, step by step."""
    for name in ("ECHO (paper)", "goodput"):
        for who, line in (("others", "-"), ("doubtful", "--")):
            rows = np.array(r[name]["over_time"][who])
            smooth = [np.nanmean(rows[max(0, i - 9) : i + 1]) for i in range(len(rows))]
            axis.plot(smooth, line, lw=1.2, color=style.of(name), label=f"{name}, {who}")
    axis.set_ylim(0)
    axis.set_xlabel("step")
    axis.set_ylabel("drafted rows a request, mean of 10 steps")


def tail(axis, r) -> None:
    """How often a request emits at least n tokens in a step."""
    for name, found in r.items():
        share = [s if s else np.nan for s in found["share"]]
        axis.plot(range(1, len(share) + 1), share, "o-", ms=3, color=style.of(name), label=name)
    axis.set_yscale("log")
    axis.set_ylim(5e-4, 1.2)
    axis.set_xlabel("tokens in a step, at least")
    axis.set_ylabel("share of request-steps")


def wrong_cost(axis, r) -> None:
    """Goodput under wrong beliefs."""
    looks = ((style.of("goodput"), "o-"), *((colour, line) for colour in (style.BAD, style.QUIET, style.INK) for line in ("o-", "o--")))
    for (name, ratio), (colour, line) in zip(r["curves"].items(), looks, strict=False):
        axis.plot(r["batch"], ratio, line, ms=3, color=colour, label=name)
    _batches(axis, r["batch"])


def lag(axis, r) -> None:
    """Goodput by lag."""
    for (late, ratio), line in zip(r["curves"].items(), ("o-", "o--", "o:"), strict=True):
        axis.plot(r["batch"], ratio, line, ms=3, color=style.of("goodput"), label=f"lag {late}")
    _batches(axis, r["batch"])


def churn(axis, r) -> None:
    """Throughput by how long requests stay."""
    for name, ratio in r["curves"].items():
        axis.plot(r["tokens"], ratio, "o-", ms=3, color=style.of(name), label=name)
    axis.axhline(1, color=style.INK, lw=0.8)
    axis.set_ylim(0.9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(r["tokens"], [f"{t}\n{j:.0%}" for t, j in zip(r["tokens"], r["joined"], strict=True)])
    _ratio(axis, "tokens of a request; new ones in a step")


def temperature(axis, r) -> None:
    """Tokens a step at temperature 0 and 0.8."""
    cases = [name for name in r if name != "positions"]
    for i, (policy, colour) in enumerate((p, style.of(p)) for p in ("EAGLE", "ECHO (paper)", "goodput")):
        axis.bar(np.arange(len(cases)) + 0.26 * (i - 1), [r[c][policy]["ratio"] for c in cases], 0.25, color=colour, label=policy)
    axis.axhline(1, color=style.INK, lw=0.8)
    _room_for_legend(axis)
    axis.set_xticks(range(len(cases)), [c.replace(", ", ",\n") for c in cases], fontsize=7)
    axis.set_ylabel("throughput / plain decoding")


PANELS = {
    "budget": (budget, "K_max"),
    "warmup": (warmup, "warm-up"),
    "gate_errors": (gate_errors, "gate errors"),
    "fairness": (fairness, "who gets the rows"),
    "over_time": (over_time, "doubtful requests over time"),
    "tail": (tail, "tail of a step"),
    "wrong_cost": (wrong_cost, "cost model wrong by 2x"),
    "lag": (lag, "lag of the forecast"),
    "churn": (churn, "churn"),
    "temperature": (temperature, "temperature 0.8"),
}


def draw(results: dict, folder: Path) -> None:
    """Writes gaps-<section>.png."""
    if "fairness" in results:
        results = {**results, "over_time": results["fairness"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name in PANELS.keys() & results.keys():
        with style.figure(4.4, 3.2) as single:
            _panel(single.subplots(), name, results)
            single.savefig(folder / f"gaps-{name.replace('_', '-')}.png", dpi=110)


def _panel(axis, name: str, results: dict) -> None:
    draw_panel, title = PANELS[name]
    draw_panel(axis, results[name])
    axis.set_title(title)
    axis.legend(fontsize=6.5)


def _room_for_legend(axis) -> None:
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])


def _ratio(axis, label: str) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel("throughput / plain decoding")


def _batches(axis, batches) -> None:
    by_batch(axis, batches)
    _ratio(axis, "batch")
