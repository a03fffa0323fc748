"""metrics.py: merging is associative and commutative, and equals computing over everything at once."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.errors import NumericsError
from trueup.metrics import Ess, Histogram, Max, Mean, Min, Std, Sum, merge_all

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=0, max_size=12)
EDGES = (-100.0, 0.0, 1.0, 100.0)
KINDS = {
    "mean": Mean.of,
    "std": Std.of,
    "ess": lambda v: Ess.of([abs(x) for x in v]),
    "max": lambda v: Max(max(v, default=-math.inf)),
    "min": lambda v: Min(min(v, default=math.inf)),
    "sum": lambda v: Sum(math.fsum(v)),
    "histogram": lambda v: Histogram.of(v, EDGES),
}


def close(a, b):
    return (math.isnan(a.value()) and math.isnan(b.value())) or a.value() == pytest.approx(
        b.value(), rel=1e-9, abs=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@given(a=VALUES, b=VALUES, c=VALUES)
def test_merging_is_associative_commutative_and_equals_the_whole(kind, a, b, c):
    make = KINDS[kind]
    x, y, z = make(a), make(b), make(c)
    assert close(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert close(x.merge(y), y.merge(x))
    assert close(x.merge(y).merge(z), make(a + b + c))


def test_values_by_hand_and_by_numpy():
    data = [1.0, 2.0, 4.0, 9.0]
    assert Mean.of(data).value() == 4.0
    assert Std.of(data).value() == pytest.approx(np.std(data))
    assert Ess.of([1, 1, 2]).value() == pytest.approx(16 / (3 * 6))
    assert Histogram.of([-5, 0, 0.5, 3, 1e9], EDGES).counts == (1, 2, 2)
    assert math.isnan(Mean.of([]).value()) and math.isnan(Max().value()) and Ess.of([0.0]).value() == 0.0


def test_a_mean_of_means_would_be_wrong():
    assert Mean.of([1.0]).merge(Mean.of([2.0, 2.0, 2.0])).value() == 1.75


def test_merge_all_joins_by_name_and_refuses_two_kinds():
    merged = merge_all([{"a": Sum(1), "b": Max(2)}, {"a": Sum(3)}])
    assert merged["a"].value() == 4 and merged["b"].value() == 2
    with pytest.raises(NumericsError, match="Sum here and a Mean"):
        merge_all([{"a": Sum(1)}, {"a": Mean(1, 1)}])
    with pytest.raises(NumericsError, match="edges"):
        Histogram.of([1], EDGES).merge(Histogram.of([1], (0.0, 1.0)))
