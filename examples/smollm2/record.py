"""Records a trace of the real pair: what head and prompt lookup draft at every position of the target's greedy answers.

python examples/smollm2/record.py --out benchmarks/traces/smollm2.npz                                                # the shipped traces:
python examples/smollm2/record.py --out benchmarks/traces/smollm2-head.npz --head                                    # the head alone
python examples/smollm2/record.py --out benchmarks/traces/smollm2-sampled.npz --temperature 0.8 --texts 32 --new 64  # sampled
python examples/smollm2/record.py --out larger.npz --new 400 --beam 8 --depth 10

With a temperature the target's tokens are sampled, one a position: a replay is then the live decode that draws the same tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track

from data import sampled
from drafters import FLOOR, Eagle, pooled
from echo.testing import Trace, record
from model import SmolLM2, encode, load
from prompts import EVALUATION, KINDS, WARMUP

LENGTH = 768


def main() -> None:
    """Records the held-out prompts: warm-up and evaluation sets, which the head was not trained on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--new", type=int, default=120, help="tokens an answer")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--beam", type=int, default=6)
    parser.add_argument("--k", type=int, default=4, help="candidates at each node")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument(
        "--texts", type=int, default=None, help="answers; all prompts where not given"
    )
    parser.add_argument("--head", action="store_true", help="the head alone, without prompt lookup")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the target's sampling; 0 is greedy"
    )
    args = parser.parse_args()
    model, tokenizer = load()
    rows = [
        (kind, prompt)
        for sets in zip(*(WARMUP[k] + EVALUATION[k] for k in KINDS), strict=True)
        for kind, prompt in zip(KINDS, sets, strict=True)
    ][: args.texts]
    torch.manual_seed(0)
    target = SmolLM2(
        model,
        args.slots,
        LENGTH,
        (lambda logits: sampled(logits / args.temperature)) if args.temperature else None,
    )
    drafter = (Eagle if args.head else pooled)(target, args.slots, LENGTH, k=args.k)
    steps = record(
        target,
        drafter,
        encode(tokenizer, [prompt for _, prompt in rows]),
        [kind for kind, _ in rows],
        max_num_reqs=args.slots,
        depth=args.depth,
        beam=args.beam,
        floor=FLOOR,
        max_new_tokens=args.new,
        eos_token=tokenizer.eos_token_id,
        max_verify_tokens_per_req=64,
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
