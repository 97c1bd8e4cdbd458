"""The work list of tree attention: an even split, and what it costs by the law of the sweep."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from common import law

SWEPT = law.sweep()
CASES = list(dict.fromkeys(point.case for point in SWEPT))


@pytest.mark.parametrize("splits", [0, 1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_the_work_list_is_an_even_split(seed, splits):
    """Every block of every row tile once; equal shares, in the order of the batch; parts only of
    row tiles that are cut, which lie apart.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, n: torch.randint(0, high, (n,), generator=generator)
    batch = 9
    group = 3
    tile = 16
    keys = 16
    programs = [1, 6, 40][seed % 3]
    rows = (draw(30, batch) * (draw(4, batch) > 0)).tolist()
    contexts = (draw(400, batch) * (draw(3, batch) > 0)).tolist()
    row_tiles = [-(-r * group // tile) for r in rows]
    blocks = [-(-c // keys) - (-r // keys) for r, c in zip(rows, contexts, strict=True)]
    lists = law.work_list(rows, contexts, group, tile, keys, programs, splits, BLOCK=4)
    line = [tuple(item[:4]) for own in lists for item in own]
    order = [(t, b) for t in range(max(row_tiles)) for b in range(batch) if t < row_tiles[b]]
    assert [(t, b) for b, t, low, _ in line if low == 0] == order
    assert [(b, t, block) for b, t, low, high in line for block in range(low, high)] == [
        (b, t, block) for t, b in order for block in range(blocks[b])
    ]
    shares = [sum(high - low for _, _, low, high, *_ in own) for own in lists]
    busy = max(1, min(programs, sum(shares) // 2))
    if splits == 0:
        assert all(
            share in (0, *divmod(sum(shares), busy)[:1], sum(shares) // busy + 1)
            for share in shares
        )
        assert max(shares) == -(-sum(shares) // busy) and sum(map(bool, shares)) == busy
        assert all(sum(item[4] >= 0 for item in own) <= 2 for own in lists)
    first_rows = [0, *torch.tensor(rows).cumsum(0).tolist()]
    taken = []
    for own in lists:
        for b, t, low, high, slot, begin, number, length, parts in own:
            assert (begin, number, length) == (first_rows[b], rows[b], contexts[b]) and low < high
            assert (slot < 0) == (parts == 1) == (high - low == blocks[b])
            if splits:
                assert parts == min(splits, blocks[b]) and (high - low) * parts < blocks[b] + parts
            if slot >= 0:
                taken.append((slot, slot + min(tile, number * group - t * tile)))
    taken.sort()
    bound = sum(rows) * group * splits if splits else 2 * programs * tile
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(taken))
    assert not taken or taken[-1][1] <= bound


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.model[:12]}-{c.batch}x{c.rows}-{c.context}"
)
def test_the_longest_program_is_hardly_longer_than_the_mean(case):
    """Every case of the sweep, in the tile that was its best."""
    best = min((p for p in SWEPT if p.case == case), key=lambda p: p.us)
    shares = [share for share in law.even(case, best.tile, 0.0)[1] if share]
    mean = sum(shares) / len(shares)
    assert max(shares) <= -(-sum(shares) // len(shares)) <= min(shares) + 1
    assert max(shares) <= 1.05 * mean or mean < 20


def test_the_law_gives_what_the_clock_gave():
    """Within 8% on average and 18% at most, and the same order where times differ by a tenth."""
    fitted = law.laws(SWEPT)
    errors = []
    pairs = []
    for case in CASES:
        points = [p for p in SWEPT if p.case == case]
        times = [(p.us, fitted[p.tile, case.cache](p.split)) for p in points]
        errors += [predicted / us - 1 for us, predicted in times]
        for (one, first), (two, second) in itertools.combinations(times, 2):
            if abs(one - two) > 0.1 * min(one, two):
                pairs.append((one < two) == (first < second))
    assert (sum(e * e for e in errors) / len(errors)) ** 0.5 < 0.08 and max(map(abs, errors)) < 0.18
    assert len(pairs) > 50 and sum(pairs) / len(pairs) > 0.95
