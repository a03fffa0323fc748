"""The committed fault matrix: complete, up to its bars, and random rows of it come out the same when run again."""

import random
import time

import pytest

from tests.fault_matrix.plans import PLANS
from tests.fault_matrix.run import model_of, row_of
from tests.fault_matrix.table import PAGE, SOURCE, found, page, read, visible
from tests.fault_matrix.world import stand

pytestmark = pytest.mark.skipif(not SOURCE.is_file(), reason="run `make fault-matrix` first")
AGAIN = 5
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


def test_what_has_no_name_gets_none(rows):
    assert all(not r["named"] for r in rows if r["group"] == "outside")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_rows_come_out_the_same(rows, dtype, tmp_path):
    seed = int(time.time())
    pool = [r for r in rows if r["model"] == "tiny" and r["dtype"] == dtype and r["group"] in ("cause", "outside")]
    with stand("tiny", model_of("tiny", tmp_path), dtype, tmp_path) as made:
        for row in random.Random(seed).sample(pool, min(AGAIN, len(pool))):
            again = row_of(made, row["group"], row["name"], row["draw"])
            assert (again["verdict"], again["first"]) == (row["verdict"], row["first"]), (seed, row, again)
