"""Metric values that know how to merge: partial results from any number of batches, in any order, give the same total.

A mean of means is wrong as soon as batches differ in size, so a `Mean` carries sum and count, an `Ess` its two weight
sums, and only `value()` divides. Names are `area/what/stat`; units are in the name. All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from trueup.errors import NumericsError


class Metric(Protocol):
    """A mergeable value: `merge` is associative and commutative, `value()` is the number to log."""

    def merge(self, other: Self) -> Self:
        """Combine two partial results."""
        ...

    def value(self) -> float:
        """Return the number to log; NaN when nothing was counted."""
        ...


@dataclass(frozen=True, slots=True)
class Sum:
    """Plain total."""

    total: float

    def merge(self, other: Sum) -> Sum:
        """Add the totals."""
        return Sum(self.total + other.total)

    def value(self) -> float:
        """Return the total."""
        return self.total


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean as sum and count; a fraction is a Mean of zeros and ones."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Collect values."""
        items = list(values)
        return cls(math.fsum(items), len(items))

    def merge(self, other: Mean) -> Mean:
        """Add sums and counts."""
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """Return sum / count, NaN if empty."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Max:
    """Largest value seen."""

    largest: float = -math.inf

    def merge(self, other: Max) -> Max:
        """Keep the larger."""
        return Max(max(self.largest, other.largest))

    def value(self) -> float:
        """Return the maximum, NaN if empty."""
        return self.largest if self.largest > -math.inf else math.nan


@dataclass(frozen=True, slots=True)
class Min:
    """Smallest value seen."""

    smallest: float = math.inf

    def merge(self, other: Min) -> Min:
        """Keep the smaller."""
        return Min(min(self.smallest, other.smallest))

    def value(self) -> float:
        """Return the minimum, NaN if empty."""
        return self.smallest if self.smallest < math.inf else math.nan


@dataclass(frozen=True, slots=True)
class Std:
    """Population standard deviation, merged by the parallel form of Welford's update (Chan, Golub, LeVeque 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Std:
        """Collect values in two passes."""
        items = list(values)
        if not items:
            return cls()
        mean = math.fsum(items) / len(items)
        return cls(len(items), mean, math.fsum((x - mean) ** 2 for x in items))

    def merge(self, other: Std) -> Std:
        """Combine counts, means and centred squares."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = (self.count * self.mean + other.count * other.mean) / count
        return Std(count, mean, self.squares + other.squares + delta * delta * self.count * other.count / count)

    def value(self) -> float:
        """Return the standard deviation, NaN if empty."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Ess:
    """Effective sample size as a fraction in (0, 1]: (sum w)^2 / (n sum w^2) (PipelineRL, arXiv 2509.19128)."""

    count: float = 0.0
    weight: float = 0.0
    weight_squared: float = 0.0

    @classmethod
    def of(cls, weights: Iterable[float]) -> Ess:
        """Collect importance weights w = pi_train / pi_rollout (>= 0)."""
        items = list(weights)
        return cls(len(items), math.fsum(items), math.fsum(w * w for w in items))

    def merge(self, other: Ess) -> Ess:
        """Add counts and sums."""
        return Ess(self.count + other.count, self.weight + other.weight, self.weight_squared + other.weight_squared)

    def value(self) -> float:
        """Return the fraction; NaN if empty, 0 if every weight is 0."""
        if not self.count:
            return math.nan
        return self.weight**2 / (self.count * self.weight_squared) if self.weight_squared else 0.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between fixed edges: bin i holds edges[i] <= x < edges[i+1]; values outside go to the end bins."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float], edges: tuple[float, ...]) -> Histogram:
        """Count values into bins."""
        counts = [0.0] * (len(edges) - 1)
        for value in values:
            index = sum(value >= edge for edge in edges[1:-1])
            counts[index] += 1
        return cls(edges, tuple(counts))

    def merge(self, other: Histogram) -> Histogram:
        """Add counts; NumericsError when the edges differ."""
        if self.edges != other.edges:
            raise NumericsError("histograms with different edges cannot be merged")
        return Histogram(self.edges, tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def value(self) -> float:
        """Return how many values were counted."""
        return sum(self.counts)


def merge_all(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge metric dictionaries key by key; a key missing in some parts is merged over the others.

    Raises NumericsError when one name carries two kinds of value.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            if name not in merged:
                merged[name] = metric
            elif type(merged[name]) is not type(metric):
                raise NumericsError(
                    f"metric {name!r} is a {type(merged[name]).__name__} here and a {type(metric).__name__} there"
                )
            else:
                merged[name] = merged[name].merge(metric)
    return merged
