"""Tokens per step of the drafters on held-out prompts, greedily: a chain of 5 and trees, by kind.

python examples/smollm2/evaluate.py
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import echo
from drafters import WEIGHTS, Eagle
from model import SmolLM2, encode, load
from prompts import EVALUATION, KINDS, WARMUP

LENGTH = 512
SHAPES = {
    name: echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=rows, beam=beam, max_depth=depth
    )
    for name, rows, beam, depth in (
        ("chain of 5", 6, 1, 5),
        ("tree of 8 rows", 8, 4, 4),
        ("tree of 32 rows", 32, 6, 8),
    )
}


def main() -> None:
    """Prints a table; writes it as JSON if asked."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--new", type=int, default=112, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    warmup = "on the warm-up prompts: the mixing weights that they would fit"
    parser.add_argument("--warmup", action="store_true", help=warmup)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    model, tokenizer = load()
    texts = WARMUP if args.warmup else EVALUATION
    kinds = [kind for kind in KINDS for _ in texts[kind]]
    prompts = encode(tokenizer, [prompt for kind in KINDS for prompt in texts[kind]])
    result: dict[str, dict[str, float]] = {}

    def measure(name: str, scheduler: echo.ElasticBudgetScheduler, make) -> None:
        target = SmolLM2(model, args.batch, LENGTH)
        drafter = make(target)
        tokens, steps = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for step in echo.decode(
            scheduler, target, drafter, prompts, max_num_reqs=args.batch, max_new_tokens=args.new,
            eos_token=tokenizer.eos_token_id, max_verify_tokens_per_req=64,
        ):  # fmt: skip
            counts = step.accepted.num_emitted.tolist()
            for request, count in zip(step.requests, counts, strict=True):
                tokens[kinds[request]] += count
                steps[kinds[request]] += 1
        mean = sum(tokens.values()) / sum(steps.values())
        result[name] = {"all": mean, **{kind: tokens[kind] / steps[kind] for kind in KINDS}}
        figures = "  ".join(f"{kind} {value:.2f}" for kind, value in result[name].items())
        print(f"{name:<40}{figures}", flush=True)
        if isinstance(drafter, echo.PromptLookup):
            weights = ", ".join(f"{weight:.2f}" for weight in drafter.fit_weights())
            print(f"    fitted mixing weights: {weights}")

    lookup = partial(echo.PromptLookup, args.batch, LENGTH)
    head = lambda target: Eagle(target, args.batch, LENGTH, k=6, weights=args.weights)
    measure("prompt lookup, chain of 5", SHAPES["chain of 5"], lambda _: lookup())
    for name, scheduler in SHAPES.items():
        measure(f"head, {name}", scheduler, head)
        both = lambda target: lookup(head(target))
        measure(f"head and prompt lookup, {name}", scheduler, both)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
