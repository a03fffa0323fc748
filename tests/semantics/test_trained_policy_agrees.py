"""Fifty bf16 updates, published into a running engine: trainer and engine are equal to the last bit, and `agree`.

A trainer that runs its forward pass in float32 on unrounded masters is not: planted here, it differs from the engine by
as much as bfloat16 rounds. (`check` compares an engine with a trainer of its dtype; that gap is inside the floor of any
bf16 engine, which is why the contract is held exactly here and not judged by the floor.)
"""

import pytest
import torch
from tests.engine_kit import request
from tests.golden.cases import ROLLOUTS
from tests.live_kit import served
from tests.semantics.test_trainer import reward, sample, trainer_of

from trueup.model.load import companion_files
from trueup.model.tiny import make_tiny
from trueup.parity import check_rollouts
from trueup.pipeline.rollout_log import read_groups
from trueup.types import RolloutGroup
from trueup.weights.store import WeightStore


def published(trainer, base, store):
    """Publish the trainer's weights as a checkpoint that can be loaded and checked against."""
    files = companion_files(base, trainer.model.dtype)
    return store.publish(trainer.version, trainer.weights.published(), files=files).path


def rows_of(groups):
    """Rollouts as plain records, as a trainer of any framework would hand them over."""
    return [
        {
            "prompt_token_ids": r.prompt.token_ids, "completion_token_ids": r.token_ids,
            "completion_logprobs": r.behaviour_logprobs, "sampling": {"temperature": r.sampling.temperature},
            "engine": {"name": "trueup", "flags": {"dtype": "bfloat16"}},
        }
        for g in groups for r in g.rollouts
    ]  # fmt: skip


def agree_and_differ(base, made, tmp_path, *, slots):
    """Fifty bf16 updates at a learning rate of 1e-6, then what engine, trainer and check say of fresh rollouts."""
    trainer = trainer_of(base, dtype="bfloat16", bitwise=True)
    for step in range(50):
        trainer.step([made[step % len(made)]])
    store = WeightStore(tmp_path / "served" / "weights")
    folder = published(trainer, base, store)
    for name, value in trainer.weights.published().items():
        assert torch.equal(value, trainer.weights.masters[name].detach().bfloat16()), name
    with served(base, tmp_path / "served", dtype=torch.bfloat16, bitwise=True, slots=slots) as live:
        live.engine.update_weights(folder, clear_cache=True)
        report = live.check(model=folder, depth="quick")
        assert report.verdict == "agree" and not report.causes, report.as_dict()
        requests = [request(20 + i, seed=i, n=2, tokens=32) for i in range(12)]
        fresh = [RolloutGroup(rollouts=tuple(g), rewards=tuple(map(reward, g))) for g in live.engine.generate(requests)]
    engine_T = torch.tensor([v for g in fresh for r in g.rollouts for v in r.behaviour_logprobs])
    assert torch.equal(trainer.score(fresh).logprobs_T, engine_T)
    own = trainer.score(fresh).logprobs_T.split([len(r.token_ids) for g in fresh for r in g.rollouts])
    report = check_rollouts(rows_of(fresh), model=folder, trainer_logprobs=[v.tolist() for v in own])
    assert report.verdict == "agree" and not report.causes, report.as_dict()
    # Planted: the forward pass runs in float32 on the masters, not on the values that were published.
    planted = trainer_of(base, dtype="float32", bitwise=True)
    with torch.no_grad():
        for name, parameter in planted.model.lm.named_parameters():
            parameter.copy_(trainer.weights.masters[name])
    gap_T = planted.score(fresh).logprobs_T - engine_T
    ratios = planted.step(fresh).metrics
    assert float(gap_T.square().mean().sqrt()) > 0.01 and ratios["gap/log_ratio/rms"] > 0.01
    assert trainer.step(fresh).metrics["gap/log_ratio/max_abs"] == 0.0


def test_the_tiny_policy(tmp_path):
    base = make_tiny(tmp_path / "tiny", dtype=torch.bfloat16)
    agree_and_differ(base, sample(base, dtype=torch.bfloat16), tmp_path, slots=16)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.smollm2
def test_the_real_model(smollm2, tmp_path):
    made = [group for _, group in read_groups(ROLLOUTS["smollm2"])]
    agree_and_differ(smollm2, made, tmp_path, slots=24)
