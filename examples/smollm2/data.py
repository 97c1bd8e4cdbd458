"""Writes training text for the drafter: the target's greedy answers, and its features.

    python examples/smollm2/data.py --out data/ --prompts 6000

A shard is a list of sequences: ``tokens`` int32 [T], ``prompt`` (its length), ``features`` float16
[T, 1728] of every token but the last, ``top_ids`` int32 and ``top_log_probs`` float16
[T - prompt, 16] of the answer's tokens.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model import SmolLM2, encode, load
from prompts import EVALUATION, WARMUP, passage_prompts, training_prompts

TOP = 16


def greedy(logits: Tensor) -> Tensor:
    """int64 [n]: the likeliest tokens."""
    return logits.argmax(dim=-1)


def sampled(logits: Tensor, among: int | None = None) -> Tensor:
    """int64 [n]: samples of the model's distribution, or of its ``among`` likeliest tokens.

    To sample from all takes as long as the model.
    """
    if among is None:
        return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]
    top = logits.topk(among, dim=-1)
    return top.indices.gather(1, torch.multinomial(top.values.softmax(dim=-1), 1))[:, 0]


def questions(engine: SmolLM2, tokenizer, count: int) -> list[Tensor]:
    """Chat prompts of the model: it samples the user's turn (Magpie, arXiv 2406.08464).

    They are far more varied than templates. Those of the warm-up and evaluation sets are left out.
    """
    chat, options = [{"role": "user", "content": "\0"}], {"add_generation_prompt": True}
    template = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    before, after = template.split("\0")
    ids = lambda text: torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    choose, eos = partial(sampled, among=256), tokenizer.eos_token_id
    asked = answers(engine, [ids(before)] * count, 64, eos, choose=choose)
    texts = written(tokenizer, (sequence for _, sequence in asked))
    sets = [*WARMUP.values(), *EVALUATION.values()]
    held_out = {prompt for prompts in sets for prompt in prompts}
    return [ids(before + t + after) for t in texts if len(t) > 8 and t not in held_out]


def written(tokenizer, sequences) -> list[str]:
    """The answers of sequences as text."""
    rows = (sequence["tokens"][sequence["prompt"] :] for sequence in sequences)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def answers(engine: SmolLM2, prompts: list[Tensor], max_new: int, eos: int, choose=greedy):
    """Yields ``(prompt, sequence)`` as requests finish; new ones are admitted at once."""
    waiting = list(range(len(prompts)))[::-1]
    running: dict[int, dict] = {}  # by index in the cache
    while waiting or running:
        free = [i for i in range(len(engine.cache.used)) if i not in running][: len(waiting)]
        if free:
            _prefill(
                engine, free, [(n := waiting.pop(), prompts[n]) for _ in free], running, choose
            )
        live = torch.tensor(sorted(running))
        tokens = torch.tensor([running[int(i)]["tokens"][-1] for i in live])
        logits = engine.forward(engine.token_rows(live, tokens))
        engine.cache.used[live] += 1
        features = engine.hidden.half()
        for row, index in enumerate(live.tolist()):
            running[index]["features"].append(features[row : row + 1])
        _append(logits, live.tolist(), running, choose)
        for index in live.tolist():
            tokens, size = running[index]["tokens"], running[index]["prompt"]
            if tokens[-1] == eos or len(tokens) - size >= max_new:
                request = running.pop(index)
                sequence = {"tokens": torch.tensor(tokens, dtype=torch.int32), "prompt": size}
                sequence["features"] = torch.cat(request["features"])
                for name in ("top_ids", "top_log_probs"):
                    sequence[name] = torch.stack(request[name])
                yield request["number"], sequence


def _prefill(engine, req_indices: list[int], prompts, running: dict[int, dict], choose) -> None:
    numbers, texts = zip(*prompts, strict=True)
    lengths, where = torch.tensor([len(text) for text in texts]), torch.tensor(req_indices)
    logits = engine.forward(engine.prompt_rows(where, texts), lengths.cumsum(0) - 1)
    engine.cache.used[where] = lengths
    rows = engine.hidden.half().split(lengths.tolist())
    for index, number, text, features in zip(req_indices, numbers, texts, rows, strict=True):
        request = {"number": number, "tokens": text.tolist(), "prompt": len(text)}
        fresh = {"features": [features.clone()], "top_ids": [], "top_log_probs": []}
        running[index] = request | fresh
    _append(logits, req_indices, running, choose)


def _append(logits: Tensor, req_indices: list[int], running: dict[int, dict], choose) -> None:
    tokens, top = choose(logits), logits.topk(TOP, dim=-1)
    log_probs = (top.values - logits.logsumexp(-1, keepdim=True)).half()
    for row, index in enumerate(req_indices):
        running[index]["tokens"].append(int(tokens[row]))
        running[index]["top_ids"].append(top.indices[row].int())
        running[index]["top_log_probs"].append(log_probs[row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=6000, help="from templates and topics")
    asked = "instead, prompts that the model asks itself"
    parser.add_argument("--questions", type=int, default=0, help=asked)
    parser.add_argument("--first", type=int, default=0, help="number of the first shard")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--max-new", type=int, default=176)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model, tokenizer = load(multiply=torch.bfloat16)
    engine = SmolLM2(model, args.batch, 512)
    start = time.perf_counter()
    if args.questions:
        encoded = questions(engine, tokenizer, args.questions)
        kinds = ["asked"] * len(encoded)
    else:
        passages = encode(tokenizer, passage_prompts(192, args.seed))
        found = dict(answers(engine, passages, 100, tokenizer.eos_token_id))
        texts = written(tokenizer, found.values())
        kinds, prompts = zip(*training_prompts(args.prompts, texts, args.seed), strict=True)
        encoded = encode(tokenizer, prompts)
    shard, count, total = [], args.first, 0
    for index, sequence in answers(engine, encoded, args.max_new, tokenizer.eos_token_id):
        shard.append(sequence | {"kind": kinds[index]})
        total += len(sequence["tokens"]) - sequence["prompt"]
        late = time.perf_counter() - start > 60 * args.minutes
        if len(shard) == 256 or late:
            torch.save(shard, args.out / f"{count:04d}.pt")
            count, shard = count + 1, []
            rate = total / (time.perf_counter() - start)
            print(f"{count} shards, {total} tokens, {rate:.0f} tokens/s", flush=True)
        if late:
            return
    if shard:
        torch.save(shard, args.out / f"{count:04d}.pt")
    print(f"done: {total} tokens")


if __name__ == "__main__":
    main()
