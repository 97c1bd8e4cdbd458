"""SmolLM2 on the paged engine of examples/engine.py, with its EAGLE head, prompt lookup or both.

The head comes twice: "eagle" computes active nodes only, which is quick on a CPU; "graph" has the
fixed shapes of CUDA graphs.

    python examples/smollm2/serve.py
    python examples/smollm2/serve.py --drafter lookup --policy rank --lanes 8

Prints the answers, tokens a second (prefill included), and the counters.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import RawDescriptionHelpFormatter as RawText
from pathlib import Path

import torch

import echo
from drafters import Eagle, pooled
from graph_eagle import GraphEagle
from model import FEATURE_LAYERS, encode, load
from prompts import EVALUATION

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine import Engine

POLICIES = {
    "plain": echo.ElasticBudgetScheduler.autoregressive(),
    "eagle": echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=8, beam=4, max_depth=4),
    "echo": echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 4), echo.SparseGate({1: 0.3, 3: 0.2}), budget=24, max_depth=4
    ),
    "rank": echo.ElasticBudgetScheduler(echo.GlobalRank(3), budget=24, max_depth=4),
}


def engine(model, tokenizer, policy: str = "echo", drafter: str = "both", lanes: int = 4) -> Engine:
    """The engine that serves the model."""
    drafters = {
        "both": lambda made: pooled(made, lanes),
        "eagle": lambda made: Eagle(made, lanes),
        "graph": lambda made: GraphEagle(
            made.model, lanes, beam=made.scheduler.rule.beam, depth=made.scheduler.max_depth
        ),
        "lookup": lambda made: echo.PromptLookup(lanes, 512, device=made.model.device),
    }
    make, eos_token = drafters[drafter] if policy != "plain" else None, tokenizer.eos_token_id
    options = {"max_num_reqs": lanes, "feature_layers": FEATURE_LAYERS, "eos_token": eos_token}
    return Engine(model, POLICIES[policy], make, **options)


def main() -> None:
    """Answers prompts; prints the answers and the counters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    parser.add_argument("--policy", choices=POLICIES, default="echo")
    drafters = ("both", "eagle", "graph", "lookup")
    parser.add_argument("--drafter", choices=drafters, help="graph on a GPU, both elsewhere")
    parser.add_argument("--lanes", type=int, default=4, help="requests at once")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer at most")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    drafter = args.drafter or ("graph" if args.device.startswith("cuda") else "both")
    model, tokenizer = load(args.device)
    torch.set_default_device(args.device)
    texts = [prompt for prompts in EVALUATION.values() for prompt in prompts[:2]]
    served = engine(model, tokenizer, args.policy, drafter, args.lanes)
    answers: list[list[int]] = [[] for _ in texts]
    begin = time.perf_counter()
    for request, tokens in served.generate(encode(tokenizer, texts), args.new):
        answers[request] += tokens
    seconds, counts = time.perf_counter() - begin, served.stats.read()
    for text, answer in zip(texts, answers, strict=True):
        print(f"> {text}\n{tokenizer.decode(answer, skip_special_tokens=True)}\n")
    rate = sum(map(len, answers)) / seconds
    print(f"{rate:.0f} tokens/s, {counts.tokens_per_step:.2f} tokens a step\n{counts}")


if __name__ == "__main__":
    main()
