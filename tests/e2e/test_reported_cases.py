"""Inputs made from public bug reports, in which a check once went wrong: each with the right answer.

tests/data/cases holds a trace per case: a real policy's numbers with the reported bug applied by an engine that shares
no code with this one. SmolLM2-135M in float32 unless a case names another model.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import DATA, ROOT, SMOLLM2

from trueup.errors import TrueupError
from trueup.knobs import CheckConfig
from trueup.model.tiny import make_tiny
from trueup.parity.run import check_trace
from trueup.trace import read_trace, write_trace

CASES = DATA / "cases"
YARN = {"rope_type": "yarn", "rope_theta": 100000.0, "factor": 3.0, "original_max_position_embeddings": 8192}
pytestmark = pytest.mark.smollm2
ROWS = pytest.mark.parametrize("rows", [4, pytest.param(None, marks=pytest.mark.long)], ids=["a few rows", "whole"])


def with_config(folder: Path, change) -> Path:
    """SmolLM2 with another configuration."""
    folder.mkdir()
    for file in SMOLLM2.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((SMOLLM2 / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def yarn_model(folder: Path) -> Path:
    """SmolLM2 as its trainer was given it: with YaRN."""

    def change(config):
        config["rope_parameters"], config["max_position_embeddings"] = dict(YARN), 24576
        config.pop("rope_theta", None)

    return with_config(folder, change)


def windowed_model(folder: Path) -> Path:
    """A tiny Gemma 3: five layers with a window of 12 tokens, one without."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=12, query_pre_attn_scalar=16,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        scale = 0.1 if "norm" in name else 0.3 if "embed" in name else weight.shape[1] ** -0.5
        weight.data = scale * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def resumed_models(folder: Path) -> tuple[Path, Path]:
    """A fine-tuned SmolLM2 and, a small step later, version 41 of it."""
    from transformers import AutoModelForCausalLM

    def moved(model, seed, size):
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                a = torch.randn(8, weight.shape[1], generator=generator)
                b = torch.randn(weight.shape[0], 8, generator=generator)
                delta = b @ a
                weight.data = (weight.data + delta * (size * weight.norm() / delta.norm())).bfloat16().float()

    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).requires_grad_(False)
    found = []
    for name, seed, size in (("full", 0, 0.03), ("v41", 1, 0.002)):
        moved(model, seed, size)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        model.to(torch.float32)
        for file in SMOLLM2.iterdir():
            if file.name.startswith("tokenizer"):
                (folder / name / file.name).symlink_to(file.resolve())
        found.append(folder / name)
    return found[0], found[1]


def checked(name: str, model: Path = SMOLLM2, **knobs):
    return check_trace(CheckConfig(trace=CASES / f"{name}.jsonl", model=model, **knobs))


def ids(report):
    return [c.id for c in report.causes]


@pytest.mark.parametrize(
    ("name", "cause", "side", "said"),
    [
        ("03b-clamped-2", "S9", "log", "2 carry exactly -9999"),
        pytest.param("03d-clamped-bf16-vllm", "S9", "log", "2 carry exactly -9999", marks=pytest.mark.slow),
        pytest.param("04b-stop-trimmed-shifted", "T1", "log", "all those that ended by 'stop'", marks=pytest.mark.slow),
        pytest.param(
            "19a-repetition-outputs-only", "S6", "engine", "the completion only, not the prompt", marks=pytest.mark.slow
        ),
        pytest.param(
            "20a-top-p-before-temperature", "S4", "engine", "applies the temperature last", marks=pytest.mark.slow
        ),
        pytest.param(
            "21b-trainer-not-shifted", "T1", "trainer", "logits that are 1 position too late", marks=pytest.mark.slow
        ),
        pytest.param(
            "27a-trainer-forgets-temperature", "S2", "trainer", "your trainer fits raw logprobs", marks=pytest.mark.slow
        ),
        pytest.param(
            "62a-drawn-greedily", "S3", "engine", "247 of 247 tokens are the most likely one", marks=pytest.mark.slow
        ),
        ("65a-all-zero", "S9", "log", "carry exactly 0"),
        ("66-two-zero-filled", "S9", "log", "2 carry exactly 0"),
    ],
)
def test_the_true_cause_is_named_alone(name, cause, side, said):
    report = checked(name)
    assert ids(report) == [cause] and report.exit_code == 1, [c.as_dict() for c in report.causes]
    (found,) = report.causes
    assert found.side == side and found.confidence == "high" and said in found.evidence
    assert cause not in report.ruled_out


def test_five_wild_tokens_of_2400_are_no_agreement(tmp_path):
    report = checked("63a-five-wild-tokens", make_tiny(tmp_path / "tiny"))
    assert report.exit_code == 1 and set(ids(report)) <= {"S9", "I11"}


@pytest.mark.slow
@ROWS
def test_yarn_that_reaches_the_trainer_only(tmp_path, rows):
    report = checked("07a-yarn-trainer-only", yarn_model(tmp_path / "yarn"), max_rows=rows)
    assert ids(report) == ["I8"] and "leaves out the rotary scaling" in report.causes[0].title


def test_a_window_that_the_engine_ignores(tmp_path):
    report = checked("10a-window-ignored-by-engine", windowed_model(tmp_path / "gemma"))
    assert ids(report) == ["I9"] and "ignores the sliding window" in report.causes[0].title
    assert not report.causes[0].fix.startswith("--disable-sliding-window")


@pytest.mark.slow
@ROWS
def test_wrong_older_weights_are_no_staleness(tmp_path, rows):
    full, resumed = resumed_models(tmp_path)
    report = checked("15-resume-first-batch-base", resumed, max_rows=rows)
    assert ids(report) == [] and report.exit_code == 1 and "O7" not in report.ruled_out
    if rows is None:
        assert "staleness, or other weights" in report.settings[0].unexplained["text"]
    report = checked("15-resume-first-batch-base", resumed, checkpoints=(SMOLLM2, full), max_rows=rows)
    assert ids(report) == ["W1"]
    assert rows is not None or "tokens stamped 40 fit" in report.causes[0].evidence


@pytest.mark.slow
def test_tokens_of_tools_are_context_and_no_evidence():
    report = checked("01a-tool-tokens-zero")
    assert report.verdict == "agree" and not report.causes
    rows = read_trace(CASES / "01a-tool-tokens-zero.jsonl").rows
    assert report.header["rows"] == len(rows) == 20, "two turns in each of ten conversations"


@pytest.mark.slow
def test_the_verl_exporter_keeps_what_tools_wrote(tmp_path):
    """A batch as verl holds it, padded on both sides, of the conversations of the case above."""
    spec = importlib.util.spec_from_file_location("verl_export", ROOT / "examples" / "integrate" / "verl_export.py")
    export = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export)
    records = [json.loads(line) for line in (CASES / "01a-tool-tokens-zero.jsonl").read_text().splitlines()]
    before = max(len(r["prompt_token_ids"]) for r in records) + 3
    behind = max(len(r["completion_token_ids"]) for r in records) + 2
    columns = {n: [] for n in ("prompts", "responses", "attention_mask", "response_mask", "rollout_log_probs")}
    for record in records:
        left = before - len(record["prompt_token_ids"])
        right = behind - len(record["completion_token_ids"])
        columns["prompts"].append([0] * left + record["prompt_token_ids"])
        columns["responses"].append(record["completion_token_ids"] + [0] * right)
        columns["attention_mask"].append([0] * left + [1] * (before - left + behind - right) + [0] * right)
        columns["response_mask"].append(record["response_mask"] + [0] * right)
        columns["rollout_log_probs"].append(record["completion_logprobs"] + [0.0] * right)
    batch = {name: torch.tensor(values) for name, values in columns.items()}
    batch["old_log_probs"] = batch["rollout_log_probs"]
    rollout = SimpleNamespace(name="vllm", dtype="float32", temperature=1.0, top_p=1.0, top_k=-1)
    write_trace(tmp_path / "verl.jsonl", list(export.rows_of(batch, rollout)))
    report = check_trace(CheckConfig(trace=tmp_path / "verl.jsonl", model=SMOLLM2))
    assert report.verdict == "agree" and not report.causes
    assert report.header["tokens"] == sum(sum(r["response_mask"]) for r in records)


READABLE = ("near-no-dtype.jsonl", "near-vllm-sampling-params.jsonl")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "openrlhf.jsonl",
            "sampling, prompt_token_ids, completion_token_ids, completion_logprobs are missing.*OpenRLHF",
        ),
        ("prime-rl.jsonl", "sampling, prompt_token_ids, completion_token_ids are missing.*prime-rl"),
        ("sglang-generate.jsonl", "are missing.*SGLang"),
        ("trl-batch.jsonl", "are missing.*TRL"),
        ("verl-rollout-dump.jsonl", "are missing.*verl.*text without token ids"),
        ("vllm-chat.jsonl", "are missing.*chat completion"),
        ("vllm-completions.jsonl", "are missing.*v1/completions"),
        ("near-array.json", "one JSON object per line"),
        ("near-float-ids.jsonl", "write ids as whole numbers"),
        ("near-foreign-ids.jsonl", "outside the model's vocabulary"),
        ("near-nested.jsonl", r"completion_logprobs\[0\] is the list .*not a number"),
        ("near-no-sampling.jsonl", "sampling is missing"),
        ("near-string-temperature.jsonl", "temperature must be a finite number"),
        ("near-strings.jsonl", r"completion_logprobs\[0\] is the string .*not a number"),
        ("near-token-id-strings.jsonl", "write the number alone"),
    ],
)
def test_other_shapes_of_a_log_are_told_apart(name, said):
    with pytest.raises(TrueupError, match=f"(?s){said}"):
        check_trace(CheckConfig(trace=CASES / "shapes" / name, model=SMOLLM2))


@pytest.mark.parametrize("name", READABLE)
def test_a_log_that_leaves_out_what_is_not_needed_is_read(name):
    assert check_trace(CheckConfig(trace=CASES / "shapes" / name, model=SMOLLM2)).verdict == "agree"


def test_probabilities_and_turned_signs_are_no_logprobs(tmp_path):
    records = [json.loads(line) for line in (CASES / "66-two-zero-filled.jsonl").read_text().splitlines()]
    for name, change, said in (
        ("p", lambda v: 2.718281828**v, "look like probabilities"),
        ("n", lambda v: -v, "negative log-likelihoods"),
    ):
        path = tmp_path / f"{name}.jsonl"
        write_trace(path, [r | {"completion_logprobs": [change(v) for v in r["completion_logprobs"]]} for r in records])
        with pytest.raises(TrueupError, match=f"{said}.*|line 1"):
            check_trace(CheckConfig(trace=path, model=SMOLLM2))
