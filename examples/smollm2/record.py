"""Records a trace: what head and prompt lookup draft at every position of the target's answers.

python record.py --out smollm2.npz                                  # the shipped traces
python record.py --out smollm2-head.npz --head                      # without prompt lookup
python record.py --out smollm2-sampled.npz --temperature 0.8 --texts 32 --new 64
python record.py --out larger.npz --new 400 --beam 8 --depth 10

With a temperature the target's tokens are sampled, one a position: a replay is then the live decode
that samples the same tokens.
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
    """Records the warm-up and evaluation prompts, on which the head was not trained."""
    text = argparse.RawDescriptionHelpFormatter
    add = (
        parser := argparse.ArgumentParser(description=__doc__, formatter_class=text)
    ).add_argument
    add("--out", type=Path, required=True)
    add("--new", type=int, default=120, help="tokens of an answer")
    add("--depth", type=int, default=8)
    add("--beam", type=int, default=6)
    add("--k", type=int, default=4, help="candidates of each node")
    add("--batch", type=int, default=32)
    add("--texts", type=int, help="answers; all prompts by default")
    add("--head", action="store_true", help="the head alone, without prompt lookup")
    add("--temperature", type=float, default=0.0, help="of the target's sampling; 0 is greedy")
    args = parser.parse_args()
    model, tokenizer = load()
    groups = zip(*(WARMUP[kind] + EVALUATION[kind] for kind in KINDS), strict=True)
    rows = [pair for group in groups for pair in zip(KINDS, group, strict=True)][: args.texts]
    kinds, prompts = zip(*rows, strict=True)
    torch.manual_seed(0)
    sample = (lambda logits: sampled(logits / args.temperature)) if args.temperature else None
    target = SmolLM2(model, args.batch, LENGTH, sample)
    drafter = (Eagle if args.head else pooled)(target, args.batch, LENGTH, k=args.k)
    steps = record(
        target, drafter, encode(tokenizer, prompts), list(kinds), max_num_reqs=args.batch,
        depth=args.depth, beam=args.beam, floor=FLOOR, max_new_tokens=args.new,
        eos_token=tokenizer.eos_token_id, max_verify_tokens_per_req=64,
    )  # fmt: skip
    trace = None
    for step in track(steps, description="recording", total=len(rows) * args.new // args.batch):
        trace = step
    assert isinstance(trace, Trace)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    trace.save(args.out)
    size = args.out.stat().st_size / 1e6
    print(f"{len(rows)} texts, {trace.positions} positions, {size:.2f} MB")


if __name__ == "__main__":
    main()
