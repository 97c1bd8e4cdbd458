"""Evaluates the drafters on the held-out prompts, greedily: tokens per step of a chain of 5 and of trees, by kind of prompt.

python examples/smollm2/evaluate.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import echo
from drafters import WEIGHTS, Eagle
from model import SmolLM2, encode, load
from prompts import EVALUATION, KINDS, WARMUP

SHAPES = {
    "chain of 5": echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=6, beam=1, max_depth=5
    ),
    "tree of 8 rows": echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=8, beam=4, max_depth=4
    ),
    "tree of 32 rows": echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=32, beam=6, max_depth=8
    ),
}


def main() -> None:
    """Prints a table and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new", type=int, default=112, help="tokens an answer")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--warmup",
        action="store_true",
        help="on the prompts for warming up: what trust they would teach",
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    model, tokenizer = load()
    texts = WARMUP if args.warmup else EVALUATION
    kinds = [kind for kind in KINDS for _ in texts[kind]]
    prompts = encode(tokenizer, [prompt for kind in KINDS for prompt in texts[kind]])
    result: dict[str, dict[str, float]] = {}

    def measure(name: str, scheduler: echo.ElasticBudgetScheduler, make) -> None:
        target = SmolLM2(model, args.slots, 512)
        drafter = make(target)
        tokens, steps = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for step in echo.decode(
            scheduler,
            target,
            drafter,
            prompts,
            max_num_reqs=args.slots,
            max_new_tokens=args.new,
            eos_token=tokenizer.eos_token_id,
            max_verify_tokens_per_req=64,
        ):
            for request, length in zip(
                step.requests, step.accepted.num_emitted.tolist(), strict=True
            ):
                tokens[kinds[request]] += length
                steps[kinds[request]] += 1
        result[name] = {
            "all": sum(tokens.values()) / sum(steps.values()),
            **{kind: tokens[kind] / steps[kind] for kind in KINDS},
        }
        print(
            f"{name:<40}"
            + "  ".join(f"{kind} {value:.2f}" for kind, value in result[name].items()),
            flush=True,
        )
        if isinstance(drafter, echo.PromptLookup):
            print(
                "    trust learnt: " + ", ".join(f"{share:.2f}" for share in drafter.fit_weights())
            )

    def head(target: SmolLM2) -> Eagle:
        return Eagle(target, args.slots, 512, k=6, weights=args.weights)

    measure(
        "prompt lookup, chain of 5",
        SHAPES["chain of 5"],
        lambda _: echo.PromptLookup(args.slots, 512),
    )
    for name, scheduler in SHAPES.items():
        measure(f"head, {name}", scheduler, head)
        measure(
            f"head and prompt lookup, {name}",
            scheduler,
            lambda target: echo.PromptLookup(args.slots, 512, head(target)),
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
