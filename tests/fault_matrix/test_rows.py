"""The committed fault matrix: complete, up to its bars, and random rows of it come out the same when run again."""

import random
import time

import pytest

from tests.fault_matrix.plans import OUTSIDE, PAIRS, PLANS
from tests.fault_matrix.run import model_of, row_of
from tests.fault_matrix.severity import LADDERS
from tests.fault_matrix.table import PAGE, floors, found, hidden, page, planted, read, smallest, visible
from tests.fault_matrix.world import stand

AGAIN = 5
AGREE_FLOORS = 1.7
"""1.25 floors, and what chance adds to an rms of a hundred tokens."""
FIRST_SHARE, FIRST_SHARE_EACH = 0.95, 0.8


@pytest.fixture(scope="module")
def rows():
    return read()


def test_the_page_is_what_the_rows_say(rows):
    assert PAGE.read_text(encoding="utf-8") == page(rows)


def test_the_true_cause_is_named_first(rows):
    counted = visible(rows)
    assert sum(map(found, counted)) >= FIRST_SHARE * len(counted)
    for name in PLANS:
        here = [r for r in counted if r["name"] == name]
        assert not here or sum(map(found, here)) >= FIRST_SHARE_EACH * len(here), name


def test_no_clean_run_was_called_a_mismatch(rows):
    clean = [r for r in rows if r["group"] == "clean"]
    assert clean and all(r["verdict"] == "agree" for r in clean)


def test_a_cause_that_was_there_is_never_ruled_out(rows):
    assert not [r for r in planted(rows) if r.get("denied") and not r.get("invisible")]


def test_no_run_agrees_above_the_limits_that_the_page_states(rows):
    assert not [r for r in rows if r["verdict"] == "agree" and floors(r) > AGREE_FLOORS]


def test_what_was_predicted_to_be_invisible_was(rows):
    assert all(map(hidden, (r for r in rows if r["group"] == "cause" and r["invisible"])))


def test_what_has_no_name_gets_none(rows):
    assert all(not r["named"] for r in rows if r["group"] == "outside")


def test_each_pair_of_faults_is_named_whole(rows):
    pairs = [r for r in rows if r["group"] == "pair" and not r["invisible"]]
    assert {r["name"] for r in pairs} == set(PAIRS) and all(map(found, pairs)), [r for r in pairs if not found(r)]


def test_every_ladder_was_climbed_down(rows):
    swept = [r for r in rows if r["group"] == "severity"]
    for dtype in ("float32", "bfloat16"):
        for name in LADDERS:
            here = [r for r in swept if (r["name"], r["dtype"]) == (name, dtype)]
            assert dtype == "bfloat16" or smallest(here) is not None, f"{name}: not even the strongest is named"


@pytest.mark.parametrize(("model", "clean"), [("tiny", 200), ("smollm2", 40)])
def test_each_model_was_run_whole(rows, model, clean):
    of_model = [r for r in rows if r["model"] == model]
    assert sum(r["group"] == "clean" for r in of_model) >= clean
    for dtype in ("float32", "bfloat16"):
        here = [r for r in of_model if r["dtype"] == dtype]
        assert {r["name"] for r in here if r["group"] == "cause"} == set(PLANS), dtype
        assert {r["name"] for r in here if r["group"] == "outside"} == set(OUTSIDE) and len(OUTSIDE) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_rows_come_out_the_same(rows, dtype, tmp_path):
    seed = int(time.time())
    pool = [r for r in rows if r["model"] == "tiny" and r["dtype"] == dtype and r["group"] in ("cause", "outside")]
    with stand("tiny", model_of("tiny", tmp_path), dtype, tmp_path) as made:
        for row in random.Random(seed).sample(pool, min(AGAIN, len(pool))):
            again = row_of(made, row["group"], row["name"], row["draw"])
            assert (again["verdict"], again["first"]) == (row["verdict"], row["first"]), (seed, row, again)
