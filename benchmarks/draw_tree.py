"""Draws one step of the paper's policy on the shipped trace of SmolLM2: docs/images/tree.png, and one tree as text.

    python benchmarks/draw_tree.py [--out docs/images/tree.png]

Six answers are replayed together under one budget. Drawn is the step whose trees differ most in size: chosen for its contrast.
"""

from __future__ import annotations

import sys
from pathlib import Path

from steps import FREE
from transformers import AutoTokenizer

import echo
from echo.testing import Record, Trace, replay
from replay import arguments, calibrate, halves

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples" / "smollm2"))
import carry  # noqa: E402

BATCH, BUDGET = 6, 40


def contrast(record: Record) -> tuple[float, int]:
    """How much the trees differ in size; among equals, the step that emits most."""
    return float(record.packed.indptr.diff().float().std()), int(record.emitted.sum())


def main() -> None:
    """Replays, picks, draws."""
    parser = arguments(__doc__)
    parser.set_defaults(out=HERE.parent / "docs" / "images" / "tree.png")
    args = parser.parse_args()
    tune, test = halves(Trace.load(args.trace))
    gate = echo.SparseGate(calibrate(tune))
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(layer_width=2, max_width=5), gate, BUDGET, test.depth)
    steps: list[Record] = []
    replay(test, scheduler, FREE, batch=BATCH, steps=150, observe=steps.append)
    step = max((s for s in steps if s.packed.batch == BATCH and bool((s.packed.indptr.diff() > 1).all())), key=contrast)

    file = carry.weights()
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    label = lambda token: words.decode([token]).strip(" ").replace("\n", "⏎") or "␣"  # noqa: E731
    titles = []
    for text, position in zip(step.requests, step.position, strict=True):
        begin = test.indptr[text]
        before = words.decode(test.text[begin : begin + position].tolist()).split()
        titles.append(f"{test.kind[text]}: {' '.join(['…', *before[-4:]])}")
    figure = step.packed.plot(accepted=step.accepted, label=label, titles=titles)
    figure.savefig(args.out, dpi=150)
    print(args.out, step.packed.indptr.diff().tolist())
    print(step.packed.render(0, step.accepted, label=label))


if __name__ == "__main__":
    main()
