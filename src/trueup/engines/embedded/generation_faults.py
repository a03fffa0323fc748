"""Faults that scoring given tokens does not show: in what is reported of a draw, and in how tokens are drawn.

They are planted like those of faults.py. Most have no name in the catalogue, and a check must not give them one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores_under
from trueup.policy.processing import Distribution
from trueup.types import LogprobKind

if TYPE_CHECKING:
    from trueup.engines.embedded.faults import Site

FORBIDDEN = -1e4


def _rescored(sequence: Any, state_1D: Tensor, head: Head, dist: Distribution) -> float:
    """The drawn token's logprob under `dist`; of the full vocabulary where the kept set does not hold the token."""
    token, whole = torch.tensor([sequence.tokens[-1]]), replace(dist, top_p=1.0, top_k=0, min_p=0.0)
    values = [float(s.logprobs_T[0]) for s in token_scores_under(state_1D, head, token, dists=[dist, whole])]
    return values[0] if math.isfinite(values[0]) else values[1]


def _shifted_logits(head: Head, ids: Sequence[int], nats: float) -> Head:
    bias_V = torch.zeros(head.vocab_size)
    bias_V[torch.tensor(list(ids), dtype=torch.long)] = nats
    return replace(head, bias_V=bias_V if head.bias_V is None else head.bias_V + bias_V)


def mixed_report(site: Site, kind: str) -> None:
    """S14: a statistic of several logprobs is reported: mean, sum or min so far, or the mean with the previous one."""
    true: dict[int, list[float]] = {}

    def change(sequence: Any, state_1D: Tensor, head: Head) -> float:
        values = true.setdefault(id(sequence), [])
        del values[len(sequence.completion) - 1 :]
        values.append(float(sequence.logprobs[-1]))
        recent = values[-2:]
        reported = {
            "mean": sum(values) / len(values), "sum": sum(values), "min": min(values),
            "previous": sum(recent) / len(recent),
        }  # fmt: skip
        return reported[kind]

    site.reported(change)


def clamped_report(site: Site, at: float) -> None:
    """S14: no logprob below a limit is reported."""
    site.reported(lambda sequence, state, head: max(float(sequence.logprobs[-1]), at))


def drifting_temperature(site: Site, slope: float) -> None:
    """The temperature grows with the position in the completion."""
    site.drawn(lambda head, sequence: replace(head, scale=head.scale / (1 + slope * len(sequence.completion))))


def own_penalty(site: Site, nats: float) -> None:
    """S5: the server has a presence penalty of its own, whatever is sent."""
    site.drawn(lambda head, sequence: _shifted_logits(head, sorted(set(sequence.completion)), -nats))


def no_repeats(site: Site, length: float) -> None:
    """No n-gram of this length occurs twice in a completion."""

    def barred(head: Head, sequence: Any) -> Head:
        done, before = list(sequence.completion), int(length) - 1
        tail = done[len(done) - before :]
        ids = {done[i + before] for i in range(len(done) - before) if done[i : i + before] == tail}
        return _shifted_logits(head, sorted(ids), FORBIDDEN) if ids and len(done) >= before else head

    site.drawn(barred)


def colder_draws(site: Site, factor: float, first: float = 0.0) -> None:
    """S3: logits are multiplied by `factor` for the draw alone; only for the `first` tokens if that is given."""

    def cold(head: Head, sequence: Any) -> Head:
        inside = not first or len(sequence.completion) < first
        return replace(head, scale=head.scale * factor) if inside else head

    site.drawn(cold)
    site.reported(lambda sequence, state, head: _rescored(sequence, state, head, _declared(sequence)))


def filtered_draws(site: Site, top_k: float) -> None:
    """S5: tokens are drawn from the k most likely ones and reported of the full vocabulary."""
    submit = site.engine.submit

    def narrowed(request: Any, **rest: Any) -> Any:
        return submit(replace(request, sampling=replace(request.sampling, top_k=int(top_k))), **rest)

    site.put(site.engine, "submit", narrowed)
    site.reported(lambda sequence, state, head: _rescored(sequence, state, head, replace(_declared(sequence), top_k=0)))


def _declared(sequence: Any) -> Distribution:
    return Distribution.of(LogprobKind.PROCESSED, sequence.sampling)


def one_seed(site: Site, seed: float) -> None:
    """S13: every sample is drawn with the same random numbers."""
    submit = site.engine.submit

    def seeded(request: Any, **rest: Any) -> Any:
        return submit(replace(request, sampling=replace(request.sampling, seed=int(seed))), **rest)

    site.put(site.engine, "submit", seeded)


def off_rows(site: Site, every: float, nats: float) -> None:
    """One completion in `every` carries numbers that are off by up to `nats`, as those of a stale replica are."""

    def moved(ids: list[int], values: list[float]) -> tuple[list[int], list[float]]:
        chooser = random.Random(f"{ids[:2]}")  # of how it begins, so that asking again gives the same numbers
        if chooser.random() * every >= 1:
            return ids, values
        return ids, [min(0.0, v + chooser.uniform(-nats, nats)) for v in values]

    site.answers(moved)


def off_tokens(site: Site, every: float, nats: float) -> None:
    """One token in `every` carries a number that is off by `nats` to twice that."""

    def moved(ids: list[int], values: list[float]) -> tuple[list[int], list[float]]:
        hashes = [random.Random(f"{ids[: t + 1]}") for t in range(len(ids))]
        return ids, [
            v - nats * (1 + chooser.random()) if chooser.random() * every < 1 else v
            for v, chooser in zip(values, hashes, strict=True)
        ]

    site.answers(moved)


GENERATION_FAULTS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        mixed_report, clamped_report, drifting_temperature, own_penalty, no_repeats, colder_draws, filtered_draws,
        one_seed, off_rows, off_tokens,
    )
}  # fmt: skip
"""By name; a docstring starts with the id of the cause it plants, if there is one."""
