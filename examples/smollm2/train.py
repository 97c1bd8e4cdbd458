"""Trains the EAGLE head on the target's own text, unrolled several steps as it will be used.

    python examples/smollm2/train.py --data data/ --out eagle.safetensors --minutes 60

Step k at position t reads the head's own state of step k-1 and the embedding of token t+k, attends
to the true keys up to t and its own of the steps before, and predicts token t+k+1. Loss:
cross-entropy with the target's distribution (its 16 likeliest tokens) and with its choice, weighted
``0.85 ** (k - 1)``. Muon on the matrices inside, AdamW on the rest.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from head import WIDTH, EagleHead
from model import load

DECAY = 0.85


def batches(data: list[dict], tokens: int, generator: torch.Generator):
    """Endless batches of similar length, each of about ``tokens`` tokens with padding."""
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        order.sort(key=lambda i: len(data[i]["tokens"]) // 16)
        groups, group, longest = [], [], 0
        for i in order:
            longest = max(longest, len(data[i]["tokens"]))
            if group and longest * (len(group) + 1) > tokens:
                groups.append(group)
                group, longest = [], len(data[i]["tokens"])
            group.append(i)
        groups.append(group)
        for index in torch.randperm(len(groups), generator=generator).tolist():
            yield [data[i] for i in groups[index]]


def collate(rows: list[dict], lookup: Tensor) -> dict[str, Tensor]:
    """Padded tensors; ``top`` holds ids of the draft vocabulary, -1 for tokens outside it."""
    size, longest = len(rows), max(len(r["tokens"]) for r in rows)
    tokens = torch.zeros(size, longest, dtype=torch.int64)
    features = torch.zeros(size, longest, rows[0]["features"].shape[1])
    answer = torch.zeros(size, longest, dtype=torch.bool)
    top = torch.full((size, longest, rows[0]["top_ids"].shape[1]), -1)
    weight = torch.zeros(top.shape)
    for i, row in enumerate(rows):
        n, p = len(row["tokens"]), row["prompt"]
        tokens[i, :n] = row["tokens"]
        features[i, : n - 1] = row["features"].float()
        answer[i, p:n] = True
        top[i, p:n] = lookup[row["top_ids"].long()]
        weight[i, p:n] = row["top_log_probs"].float().exp()
    weight = weight * (top >= 0)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-9)
    return {"tokens": tokens, "features": features, "answer": answer, "top": top, "weight": weight}


def loss(
    head: EagleHead, embedding: Tensor, batch: dict[str, Tensor], steps: int
) -> tuple[Tensor, list[float]]:
    """The weighted loss, and by step how often the target's token is the head's first choice."""
    tokens, length = batch["tokens"], batch["tokens"].shape[1]
    position = torch.arange(length)[None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    state = head.fuse(batch["features"])
    keys, values, total, right = [], [], tokens.new_zeros((), dtype=torch.float32), []
    for k in range(1, steps + 1):
        shifted = torch.roll(tokens, -k, dims=1)
        q, key, value = head.inputs(state, embedding[shifted], position + k - 1)
        keys.append(key)
        values.append(value)
        q = q / math.sqrt(q.shape[-1])
        scores = torch.einsum("bthd,bshd->bhts", q, keys[0]).masked_fill(~causal, -torch.inf)
        own = [torch.einsum("bthd,bthd->bht", q, extra)[..., None] for extra in keys[1:]]
        share = torch.cat([scores, *own], dim=-1).float().softmax(-1).to(value.dtype)
        attended = torch.einsum("bhts,bshd->bthd", share[..., :length], values[0])
        for j, extra in enumerate(values[1:]):
            attended = attended + share[..., length + j].transpose(1, 2)[..., None] * extra
        state = head.outputs(state, attended)
        answer, top, weight = (
            torch.roll(batch[name], -k - 1, dims=1) for name in ("answer", "top", "weight")
        )
        valid = answer & (position < length - k - 1) & (top[..., 0] >= 0)
        log_probs = F.log_softmax(head.logits(state[valid]), dim=-1, dtype=torch.float32)
        chosen = log_probs.gather(-1, top[valid].clamp_min(0))
        soft = -(chosen * weight[valid]).sum(-1)
        total = total + DECAY ** (k - 1) * (0.5 * soft - 0.5 * chosen[:, 0]).mean()
        possible = (answer & (position < length - k - 1)).sum()
        right.append(float((chosen[:, 0] == log_probs.amax(-1)).sum() / possible))
    return total, right


def fresh(vocab: Tensor, embedding: Tensor) -> EagleHead:
    """A head that starts from the 256 widest directions of the target's embeddings."""
    head = EagleHead(vocab)
    with torch.no_grad():
        _, _, basis = torch.linalg.svd(embedding[vocab], full_matrices=False)
        head.embed.weight.copy_(basis[:WIDTH])
        head.head.weight.copy_(embedding[vocab] @ basis[:WIDTH].T)
        head.out.weight.mul_(0.1)
        head.down.weight.mul_(0.1)
    return head


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    noise = "of the features, in their root mean squares: few texts, many epochs"
    parser.add_argument("--noise", type=float, default=0.2, help=noise)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def frequent(data: list[dict], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each token was written, and the ``size`` most frequent ones."""
    counts = torch.zeros(49152, dtype=torch.int64)
    for row in data:
        counts += torch.bincount(row["tokens"][row["prompt"] :].long(), minlength=len(counts))
    # Earlier merges of the tokenizer are the more frequent tokens.
    prior = 0.5 * torch.arange(len(counts), 0, -1) / len(counts)
    return counts, (counts + prior).topk(size).indices.sort().values


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    data = [row for path in sorted(args.data.glob("*.pt")) for row in torch.load(path)]
    data = [row for row in data if len(row["tokens"]) - row["prompt"] > 4]
    held_out, data = data[::32], [row for number, row in enumerate(data) if number % 32]
    counts, vocab = frequent(data, args.vocab)
    lookup = torch.full_like(counts, -1)
    lookup[vocab] = torch.arange(len(vocab))
    covered = f"vocabulary covers {float(counts[vocab].sum() / counts.sum()):.4f}"
    print(f"{len(data)} sequences, {int(counts.sum())} tokens, {covered}", flush=True)

    model, _ = load(packed=False)
    embedding = model.model.embed_tokens.weight.detach().clone()
    embedding = embedding / embedding.norm(dim=-1).mean()
    del model
    head = fresh(vocab, embedding)
    layers = head.fuse, head.embed, head.qkv, head.out, head.gate_up, head.down
    inner = [layer.weight for layer in layers]
    rest = [p for p in head.parameters() if not any(p is q for q in inner)]
    muon = torch.optim.Muon(inner, lr=args.muon_lr, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    source = batches(data, args.tokens, torch.Generator().manual_seed(args.seed))
    start, step, smooth = time.perf_counter(), 0, None
    while (spent := (time.perf_counter() - start) / 60 / args.minutes) < 1:
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent)))
        for optimizer, lr in ((muon, args.muon_lr), (adam, args.lr)):
            optimizer.param_groups[0]["lr"] = lr * rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            batch = collate(next(source), lookup)
            features = batch["features"]
            scale = args.noise * features.square().mean((0, 1)).sqrt()
            batch["features"] = features + scale * torch.randn(features.shape)
            value, right = loss(head, embedding, batch, args.steps)
        value.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step()
        adam.step()
        muon.zero_grad()
        adam.zero_grad()
        step += 1
        now = torch.tensor(right)
        smooth = now if smooth is None else 0.98 * smooth + 0.02 * now
        if step % 200 == 0:
            shares = f"first choice right {[round(float(x), 3) for x in smooth]}"
            figures = f"step {step}, {100 * spent:.0f}%, loss {float(value):.3f}"
            print(f"{figures}, {shares}", flush=True)
            head.save(args.out)
    head.save(args.out)
    with torch.no_grad():
        for kind in sorted({row["kind"] for row in held_out}):
            rows = [row for row in held_out if row["kind"] == kind][:48]
            right = loss(head, embedding, collate(rows, lookup), args.steps)[1]
            shares = [round(x, 3) for x in right]
            print(f"{step} steps; {kind}: held-out first choice right by depth {shares}")


if __name__ == "__main__":
    main()
