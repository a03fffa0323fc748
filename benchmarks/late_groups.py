"""Which completions are trained on once engines hold more groups than max_lag has room for?

Event simulation around the real RolloutBuffer: 8 groups of 8 completions per batch, lognormal lengths, one token per
tick, a group takes as long as its longest completion, and a batch takes the trainer a fixed time. Late groups are
dropped, or trained on (rollout.late). Prints one JSON object as its last line: per configuration the share dropped, how
much shorter the trained completions are than the finished ones on average, and the largest lag that was trained on.

    python benchmarks/late_groups.py [--batches 200]
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics

from trueup.pipeline.buffer import Finished, RolloutBuffer

GROUPS, COMPLETIONS = 8, 8
CONFIGURATIONS = ((4, 0.8, 4, 50), (1, 0.8, 16, 200), (4, 0.8, 32, 200), (4, 1.2, 64, 200), (8, 1.2, 128, 100))
"""max_lag, spread of log lengths, groups under way, ticks per batch."""


def simulate(
    max_lag: int, spread: float, flying: int, train: int, *, late: bool, seed: int, batches: int
) -> dict[str, float]:
    """One run: what was dropped, and what was trained on."""
    chooser = random.Random(seed)
    buffer = RolloutBuffer(groups_per_batch=GROUPS, max_lag=max_lag, late=late)
    now, version, number = 0.0, 0, 0
    under_way: list[tuple[float, int, int]] = []
    lengths: dict[int, float] = {}
    trained: list[Finished] = []
    lags: list[int] = []
    busy_until: float | None = None
    while version < batches:
        while len(under_way) < flying and buffer.may_start(version):
            buffer.start()
            tokens = [min(4096, max(1, int(chooser.lognormvariate(5.0, spread)))) for _ in range(COMPLETIONS)]
            lengths[number] = statistics.fmean(tokens)
            heapq.heappush(under_way, (now + max(tokens), number, version))
            number += 1
        if busy_until is None and (taken := buffer.take(version)):
            trained += taken
            lags += [version - group.oldest_version for group in taken]
            busy_until = now + train
            continue
        now = min([end for end, _, _ in under_way[:1]] + ([busy_until] if busy_until is not None else []))
        if busy_until is not None and busy_until <= now:
            busy_until, version = None, version + 1
        while under_way and under_way[0][0] <= now:
            _, finished, born = heapq.heappop(under_way)
            buffer.add(Finished(number=finished, oldest_version=born, mean_tokens=lengths[finished]))
    ended = [g.number for g in trained] + buffer.dropped
    mean = statistics.fmean(lengths[n] for n in ended)
    return {
        "dropped": len(buffer.dropped) / len(ended),
        "length_bias": statistics.fmean(g.mean_tokens for g in trained) / mean - 1,
        "largest_lag": max(lags),
    }


def main() -> None:
    """Simulate every configuration both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args()
    result = {}
    print("max_lag  spread  under way  ticks | late    dropped  length of trained vs finished  largest lag")
    for max_lag, spread, flying, train in CONFIGURATIONS:
        for late in (False, True):
            runs = [
                simulate(max_lag, spread, flying, train, late=late, seed=seed, batches=options.batches)
                for seed in range(3)
            ]
            found = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
            name = f"{max_lag} {spread} {flying} {train} {'train' if late else 'drop'}"
            result[name] = {key: round(value, 4) for key, value in found.items()}
            print(
                f"{max_lag:7d} {spread:7.1f} {flying:10d} {train:6d} | {'train' if late else 'drop':6s} "
                f"{found['dropped']:7.1%} {found['length_bias']:+24.1%} {found['largest_lag']:16.1f}"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
