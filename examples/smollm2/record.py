"""Records a trace of the real pair: what the head drafts at every position of the target's greedy answers.

python examples/smollm2/record.py --out benchmarks/traces/smollm2.npz             # the shipped trace
python examples/smollm2/record.py --out larger.npz --new 400 --beam 8 --depth 10  # a larger one
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import track

from drafters import Eagle
from echo.testing import Trace, record
from model import SmolLM2, encode, load
from prompts import EVALUATION, KINDS, WARMUP

LENGTH = 768


def main() -> None:
    """Records the held-out prompts: warm-up and evaluation sets, which the head was not trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--new", type=int, default=128, help="tokens an answer")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--beam", type=int, default=6)
    parser.add_argument("--count", type=int, default=4, help="candidates at each node")
    parser.add_argument("--slots", type=int, default=32)
    args = parser.parse_args()
    model, tokenizer = load()
    rows = [
        (kind, prompt)
        for sets in zip(*(WARMUP[k] + EVALUATION[k] for k in KINDS), strict=True)
        for kind, prompt in zip(KINDS, sets, strict=True)
    ]
    target = SmolLM2(model, args.slots, LENGTH)
    drafter = Eagle(target, args.slots, LENGTH, count=args.count)
    steps = record(
        target,
        drafter,
        encode(tokenizer, [prompt for _, prompt in rows]),
        [kind for kind, _ in rows],
        slots=args.slots,
        depth=args.depth,
        beam=args.beam,
        floor=drafter.floor,
        max_new_tokens=args.new,
        eos_token=tokenizer.eos_token_id,
        capacity=64,
    )
    trace = None
    for step in track(steps, description="recording", total=len(rows) * args.new // args.slots):
        trace = step
    assert isinstance(trace, Trace)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    trace.save(args.out)
    print(f"{len(rows)} texts, {trace.positions} positions, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
