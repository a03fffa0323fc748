"""Logs that are wrong by themselves: whose fault is named, and what is said of columns that do not fit."""

import pytest
from tests.plain_engine import make_tiny_checkpoint
from tests.trace_kit import checked, edited, records_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("sides") / "tiny")


@pytest.fixture(scope="module")
def records(model):
    return records_of(model, rows=20, length=24)


def test_null_is_missing_from_the_log_and_no_nan_of_the_engine(model, records, tmp_path):
    """The first entry of prompt_logprobs is null in every server."""
    report = checked(edited(records, lambda _, r: r["completion_logprobs"].__setitem__(0, None)), model, tmp_path)
    (cause,) = report.causes
    assert (cause.id, cause.side) == ("I11", "log") and "null" in cause.title and "prompt_logprobs" in cause.fix
    report = checked(
        edited(records, lambda _, r: r["completion_logprobs"].__setitem__(0, float("nan"))), model, tmp_path
    )
    assert (report.causes[0].id, report.causes[0].side) == ("I11", "engine")


def test_nan_in_the_trainers_column_is_the_trainers(model, records, tmp_path):
    def change(row, record):
        record["trainer_logprobs"] = list(record["completion_logprobs"])
        if row == 3:
            record["trainer_logprobs"][5] = float("nan")

    (cause,) = checked(edited(records, change), model, tmp_path).causes
    assert (cause.id, cause.side) == ("I11", "trainer") and "line 4, token 5" in cause.evidence


@pytest.mark.parametrize("rows", [1, 2])
def test_a_trainers_column_of_another_length_is_no_agreement(model, records, tmp_path, rows):
    """In every row or in every second one."""

    def change(row, record):
        cut = 1 if row % rows == 0 else 0
        record["trainer_logprobs"] = record["completion_logprobs"][cut:]

    report = checked(edited(records, change), model, tmp_path)
    (cause,) = report.causes
    assert report.exit_code == 1 and (cause.id, cause.side) == ("T2", "trainer") and "difference -1" in cause.evidence


def test_a_length_that_differs_is_the_logs(model, records, tmp_path):
    report = checked(edited(records, lambda _, r: r["completion_logprobs"].pop()), model, tmp_path)
    assert [(c.id, c.side) for c in report.causes] == [("T2", "log")]


def test_of_several_masks_every_one_counts(model, tmp_path):
    """A response mask of ones beside a loss mask that leaves out what tools wrote."""
    turns = []
    for row, first in enumerate(records_of(model, rows=24, length=10, seed=2)):
        tool = list(range(10 + row, 15 + row))
        prompt = first["prompt_token_ids"] + first["completion_token_ids"] + tool
        second = records_of(model, prompts=[prompt], length=8, seed=100 + row)[0]
        joined = {
            name: first[name] + filler + second[name]
            for name, filler in (("completion_token_ids", tool), ("completion_logprobs", [0.0] * 5))
        }
        masks = {"response_mask": [1] * 23, "loss_mask": [1] * 10 + [0] * 5 + [1] * 8}
        turns.append(first | joined | masks)
    report = checked(turns, model, tmp_path)
    assert report.verdict == "agree" and report.header["rows"] == 48
    wrong = edited(turns, lambda _, r: r.__setitem__("response_mask", [1] * 22))
    with pytest.raises(Exception, match="response_mask has 22 entries for 23"):
        checked(wrong, model, tmp_path)


def test_versions_beyond_64_bits_are_ignored_with_a_word(model, records, tmp_path):
    report = checked(edited(records, lambda _, r: r.__setitem__("weight_versions", [2**70] * 24)), model, tmp_path)
    assert report.verdict == "agree" and "weight_versions" in str(report.problems)
