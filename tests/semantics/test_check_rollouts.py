"""`check_rollouts` on lists and arrays, with trainers that really go wrong: dropout, padding, packs, end tokens."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from tests.plain_engine import VOCAB, draw_completions, make_tiny_checkpoint
from tests.plain_trainer import PlainTrainer, make_tiny_gpt2

from trueup.errors import ConfigError, RecordError
from trueup.model.load import load_model
from trueup.parity import check_rollouts
from trueup.weights.store import WeightStore


@pytest.fixture(scope="module")
def rows(tiny_model):
    chooser = np.random.default_rng(0)
    prompts = [chooser.integers(0, VOCAB, 4 + i % 5).tolist() for i in range(12)]
    return [
        {"prompt_token_ids": prompt, "completion_token_ids": ids, "sampling": {"temperature": 1.0}}
        for prompt, ids in zip(prompts, draw_completions(tiny_model, prompts, length=24), strict=True)
    ]


@pytest.fixture(scope="module")
def engine_rows(tiny_model, rows):
    """The same rows, prompts of different lengths, with numbers an engine without fault would report."""
    from types import SimpleNamespace

    trainer = PlainTrainer(tiny_model, batch=1)
    values = trainer([SimpleNamespace(**r) for r in rows])
    return [r | {"completion_logprobs": v} for r, v in zip(rows, values, strict=True)]


def ids(report):
    return [c.id for c in report.causes]


@pytest.mark.parametrize(
    "kind", [list, np.array, lambda v: torch.tensor(v, dtype=torch.float64)], ids=["list", "numpy", "torch"]
)
def test_a_clean_trainer_agrees_whatever_the_arrays_are(tiny_model, engine_rows, kind):
    ours = [kind(r["completion_logprobs"]) for r in engine_rows]
    arrays = [r | {"completion_logprobs": kind(r["completion_logprobs"])} for r in engine_rows]
    report = check_rollouts(arrays, model=tiny_model, trainer_logprobs=ours)
    assert report.verdict == "agree" and not report.causes, report.as_dict()
    assert any("your trainer's numbers are ours" in note for note in report.notes)


@pytest.mark.parametrize(("mistake", "cause"), [("pack", "R3"), ("attended", "R4")])
def test_logged_numbers_of_a_wrong_trainer_are_explained(tiny_model, engine_rows, mistake, cause):
    from types import SimpleNamespace

    logged = PlainTrainer(tiny_model, mistake, batch=4)([SimpleNamespace(**r) for r in engine_rows])
    report = check_rollouts(engine_rows, model=tiny_model, trainer_logprobs=logged)
    assert ids(report) == [cause], [c.as_dict() for c in report.causes]
    assert "4 rows a batch" in report.causes[0].evidence


def test_positions_that_count_padding_are_found_where_positions_are_absolute(tmp_path):
    """Rotary positions are relative and hide this mistake; GPT-2's are not."""
    from types import SimpleNamespace

    make_tiny_gpt2(tmp_path / "gpt2")
    chooser = np.random.default_rng(0)
    prompts = [chooser.integers(3, 90, 4 + 3 * i).tolist() for i in range(12)]
    drawn = draw_completions(tmp_path / "gpt2", prompts, length=16)
    plain = [
        {"prompt_token_ids": prompt, "completion_token_ids": ids} for prompt, ids in zip(prompts, drawn, strict=True)
    ]
    spaces = [SimpleNamespace(**r) for r in plain]
    right = PlainTrainer(tmp_path / "gpt2", batch=1)(spaces)
    rows = [r | {"completion_logprobs": v} for r, v in zip(plain, right, strict=True)]
    wrong = PlainTrainer(tmp_path / "gpt2", "positions", batch=4)(spaces)
    report = check_rollouts(rows, model=tmp_path / "gpt2", trainer_logprobs=wrong)
    assert ids(report) == ["R2"], [c.as_dict() for c in report.causes]


@pytest.mark.parametrize(
    ("mistake", "cause"), [("", None), ("dropout", "R1"), ("pack", "R3"), ("attended", "R4"), ("shape", "R5")]
)
def test_a_trainer_that_can_be_asked_again_is_probed(tiny_model, engine_rows, mistake, cause):
    report = check_rollouts(engine_rows, model=tiny_model, trainer=PlainTrainer(tiny_model, mistake))
    assert ids(report) == ([cause] if cause else []), ([c.as_dict() for c in report.causes], report.probes)
    assert cause is None or (cause not in report.ruled_out and cause not in report.untested)
    if cause is None:
        assert {"R1", "R2", "R3", "R4", "R5"} <= report.not_seen.keys(), "asked, and not seen"


def test_a_knob_that_is_none_is_refused_by_name(tiny_model, engine_rows):
    with pytest.raises(ConfigError, match=r"check_rollouts: unknown key 'check\.dtyp'.*check\.dtype"):
        check_rollouts(engine_rows, model=tiny_model, dtyp="float32")
    with pytest.raises(ConfigError, match="batch_rows"):
        check_rollouts(engine_rows, model=tiny_model, batch_rows=0)


def cut_after(ids, last):
    """A completion that ends with the last `last` in it; whole without one."""
    return ids[: len(ids) - ids[::-1].index(last)] if last in ids else ids


def test_end_tokens_taken_for_padding_are_t8(tiny_model, engine_rows, tmp_path):
    from types import SimpleNamespace

    common = Counter(i for r in engine_rows for i in set(r["completion_token_ids"])).most_common(1)[0][0]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": common}))
    ended = [r | {"completion_token_ids": cut_after(r["completion_token_ids"], common)} for r in engine_rows]
    assert sum(r["completion_token_ids"][-1] == common for r in ended) >= 3
    spaces = [SimpleNamespace(**r) for r in ended]
    right, wrong = PlainTrainer(model, batch=1)(spaces), PlainTrainer(model, "end", end=common)(spaces)
    rows = [r | {"completion_logprobs": v} for r, v in zip(ended, right, strict=True)]
    report = check_rollouts(rows, model=model, trainer_logprobs=wrong)
    assert ids(report) == ["T8"], [c.as_dict() for c in report.causes]


def published(folder, checkpoint, *, version):
    """A checkpoint's weights as a published version."""
    folder.mkdir()
    store = WeightStore(folder)
    store.publish(version, load_model(checkpoint, dtype=torch.float32).stored_tensors())
    return store.folder(version)


def test_staleness_needs_the_older_weights_as_proof(tiny_model, rows, engine_rows, tmp_path):
    """Rows of an older version are off: with its weights that is staleness, with other weights it is not."""
    from types import SimpleNamespace

    older = make_tiny_checkpoint(tmp_path / "older", seed=9)
    ids_of_older = draw_completions(older, [r["prompt_token_ids"] for r in rows], length=24)
    engine_rows = [
        r | {"completion_token_ids": ids_of_older[i]} if i % 2 == 0 else r for i, r in enumerate(engine_rows)
    ]
    old = PlainTrainer(older, batch=1)([SimpleNamespace(**r) for r in engine_rows])
    mixed = []
    for i, row in enumerate(engine_rows):
        lagged = i % 2 == 0
        count = len(row["completion_token_ids"])
        mixed.append(
            row
            | {
                "completion_logprobs": old[i] if lagged else row["completion_logprobs"],
                "weight_versions": [3 if lagged else 5] * count,
            }
        )
    report = check_rollouts(mixed, model=tiny_model)
    assert ids(report) == [] and report.verdict == "mismatch", [c.as_dict() for c in report.causes]
    assert "O7" not in report.ruled_out and "--checkpoints" in report.settings[0].unexplained["text"]
    stamped = published(tmp_path / "three", older, version=3)
    report = check_rollouts(mixed, model=tiny_model, checkpoints=[str(stamped)])
    assert ids(report) == ["O7"], [c.as_dict() for c in report.causes]
    other = published(tmp_path / "two", older, version=2)
    report = check_rollouts(mixed, model=tiny_model, checkpoints=[str(other)])
    assert ids(report) == ["W1"] and "tokens stamped 3 fit" in report.causes[0].evidence


def test_bad_rows_are_refused_by_number(tiny_model, engine_rows):
    with pytest.raises(RecordError, match="row 1: prompt_token_ids"):
        check_rollouts([engine_rows[0], {"completion_token_ids": [1], "completion_logprobs": [-1.0]}], model=tiny_model)
    with pytest.raises(RecordError, match="1 trainer_logprobs for 12 rows"):
        check_rollouts(engine_rows, model=tiny_model, trainer_logprobs=[[-1.0]])
    with pytest.raises(RecordError, match="no rows"):
        check_rollouts([], model=tiny_model)
