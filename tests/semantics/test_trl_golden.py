"""One update on recorded rollouts equals TRL 1.13's, in float32: loss to 1e-6, gradient norm to 1e-5 relative.

Weights that are a product over a completion collect the rounding of its tokens: with another instruction set or another
number of threads, the loss of "dapo_sequence_mask" moves by 4e-6, so its limits are wider by the root of the length.

Each case names loss type, scale_rewards, beta, importance level, clip range and aggregation in tests/golden/cases.py,
for both sides; padding there is TRL's (prompts left, completions right), here there is none. The values were made with
TRL's own code by tests/golden/make_trl_golden.py.
"""

import json
import math

import pytest
import torch
from tests.golden.cases import CASES, GOLDEN, MAX_TOKENS, ROLLOUTS, SCALE, TEMPERATURE, disturb

from trueup.config import build_config
from trueup.model.tiny import make_tiny
from trueup.pipeline.rollout_log import read_groups
from trueup.pipeline.trainer import Trainer


def update(kind, name, path, **train):
    """Our update: the report, the advantages and the gradient norm of each tensor."""
    case = CASES[name]
    objective = case["ours"] | {"old": "decoupled" if "correction" in case else "bypass"}
    if objective.get("aggregation") == "fixed":
        objective["fixed_length"] = MAX_TOKENS[kind]
    model = {"model": str(path), "dtype": "float32"}
    config = build_config({"train": model | train, "objective": objective, "correction": case.get("correction", {})})
    trainer = Trainer(config)
    disturb(trainer.model.lm, SCALE[kind])
    norms = {}
    step = trainer.weights.step

    def recording(**arguments):
        norms.update({n: float(m.grad.norm()) for n, m in trainer.weights.masters.items()})
        return step(**arguments)

    trainer.weights.step = recording
    groups = [group for _, group in read_groups(ROLLOUTS[kind])]
    assert {r.sampling.temperature for g in groups for r in g.rollouts} == {TEMPERATURE}
    return trainer.step(groups), norms


def assert_equals_trl(kind, name, path, **train):
    golden = json.loads(GOLDEN.read_text())["cases"][f"{kind}/{name}"]
    report, norms = update(kind, name, path, **train)
    product = CASES[name].get("correction", {}).get("kind") == "mask_sequences"
    rounding = math.sqrt(MAX_TOKENS[kind]) if product else 1.0
    assert report.metrics["loss/total"] == pytest.approx(golden["loss"], abs=1e-6 * rounding)
    assert report.metrics["grad/norm/mean"] == pytest.approx(golden["gradient_norm"], rel=1e-5 * rounding)
    assert norms.keys() == golden["tensor_norms"].keys()
    largest = max(norms.values())
    for tensor, norm in golden["tensor_norms"].items():
        assert norms[tensor] == pytest.approx(norm, rel=2e-4, abs=1e-5 * largest), tensor
    theirs = golden["metrics"]
    if "kl" in theirs:
        assert report.metrics["policy/kl_reference/mean"] == pytest.approx(theirs["kl"], rel=1e-4)
    assert report.metrics["policy/entropy/mean"] == pytest.approx(theirs["entropy"], rel=1e-5)
    clip = theirs.get("clip_ratio/region_mean")
    if name not in ("gspo", "cispo", "cispo_unbounded"):  # theirs counts sequences, or tokens with A > 0 only
        assert report.metrics["policy/clip/fraction"] == pytest.approx(clip, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_one_update_of_the_tiny_policy_equals_trl(tmp_path, name):
    assert_equals_trl("tiny", name, make_tiny(tmp_path / "tiny"))


@pytest.mark.parametrize("train", [{"share_prompts": False}, {"micro_tokens": 60}, {"gradient_checkpointing": True}],
                         ids=str)  # fmt: skip
def test_neither_packing_nor_accumulation_nor_checkpointing_changes_it(tmp_path, train):
    assert_equals_trl("tiny", "grpo", make_tiny(tmp_path / "tiny"), **train)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("name", CASES)
def test_one_update_of_the_real_model_on_rollouts_of_a_real_vllm_equals_trl(smollm2, name):
    assert_equals_trl("smollm2", name, smollm2)


def test_the_cases_are_not_trivial():
    """Clips bind, the reference differs, and no two cases have the same gradient."""
    golden = json.loads(GOLDEN.read_text())["cases"]
    for kind in ROLLOUTS:
        assert golden[f"{kind}/grpo"]["metrics"]["clip_ratio/region_mean"] > 0.02
        assert 0 < golden[f"{kind}/gspo"]["metrics"]["clip_ratio/region_mean"] < 1
        assert golden[f"{kind}/cispo"]["metrics"]["cispo_clip_ratio"] > 0.005
        assert golden[f"{kind}/grpo"]["metrics"]["kl"] > 1e-3
    norms = [round(case["gradient_norm"], 6) for case in golden.values()]
    assert len(set(norms)) == len(norms) and all(math.isfinite(n) for n in norms)
    assert torch.__version__.split("+")[0] == json.loads(GOLDEN.read_text())["versions"]["torch"].split("+")[0], (
        "the policy that is trained is drawn by torch's generator: make the golden values again"
    )
