"""The trainer's arithmetic: the engine's own, float32 masters under rounded weights, and nothing lost on the way."""

import dataclasses
import math

import pytest
import torch
from tests.engine_kit import request

from trueup.config import build_config
from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.errors import ConfigError, ModelError, NothingToLearn, RecordError, TrainingError, TrueupError
from trueup.model.tiny import make_tiny
from trueup.pipeline.masters import MasterWeights
from trueup.pipeline.recipe import PAPERS
from trueup.pipeline.trainer import Trainer
from trueup.types import LogprobKind, RolloutGroup, SamplingParams
from trueup.weights.store import WeightStore

DTYPES = [torch.float32, torch.bfloat16]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def reward(rollout) -> float:
    """Something that varies inside a group and needs no task."""
    return float(len(set(rollout.token_ids)) % 5)


def sample(path, *, dtype=torch.float32, bitwise=False, groups=4, weights=None, **sampling) -> list[RolloutGroup]:
    """Groups of four completions from the embedded engine, at another length each."""
    engine = EmbeddedEngine(path, EngineOptions(dtype=dtype, bitwise=bitwise, weights_root=weights))
    try:
        found = engine.generate([request(12 + 9 * i, seed=i, n=4, tokens=24, **sampling) for i in range(groups)])
    finally:
        engine.close()
    return [RolloutGroup(rollouts=tuple(some), rewards=tuple(map(reward, some))) for some in found]


def trainer_of(path, *, objective=None, correction=None, optimizer=None, **train) -> Trainer:
    values = {"train": {"model": str(path), "dtype": "float32"} | train, "objective": {"kl": 0.0} | (objective or {})}
    return Trainer(build_config(values | {"correction": correction or {}, "optimizer": optimizer or {}}))


def everything(trainer) -> dict[str, torch.Tensor]:
    """All that an update changes, copied."""
    return {n: t.clone() for n, t in (trainer.weights.state() | trainer.weights.published()).items()}


def assert_unchanged(trainer, before):
    after = everything(trainer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(m.grad is None for m in trainer.weights.masters.values())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("trainer") / "tiny")


@pytest.fixture(scope="module")
def groups(tiny):
    return sample(tiny)


SAMPLINGS = {
    "plain": {}, "nucleus": {"temperature": 0.7, "top_p": 0.9}, "penalised": {"repetition_penalty": 1.2, "top_k": 30},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_bitwise_mode_gives_the_engines_logprobs_exactly(tmp_path, dtype, share, sampling):
    path = make_tiny(tmp_path / "tiny", dtype=dtype)
    made = sample(path, dtype=dtype, bitwise=True, **sampling)
    trainer = trainer_of(path, dtype=NAMES[dtype], bitwise=True, share_prompts=share)
    reported = torch.tensor([v for g in made for r in g.rollouts for v in r.behaviour_logprobs])
    scored = trainer.score(made)
    assert torch.equal(scored.logprobs_T, reported) and scored.inside_T.all()
    metrics = trainer.step(made).metrics
    assert metrics["gap/log_ratio/max_abs"] == 0.0 and metrics["policy/ratio/max"] == 1.0
    assert metrics["gap/ess/sequence"] == 1.0


def test_bitwise_mode_goes_on_agreeing_after_an_update(tmp_path):
    """Published weights go into the running engine; what it then reports is again the trainer's to the last bit."""
    path = make_tiny(tmp_path / "tiny", dtype=torch.bfloat16)
    trainer = trainer_of(path, dtype="bfloat16", bitwise=True, optimizer={"lr": 1e-2})
    store = WeightStore(tmp_path / "weights")
    engine = EmbeddedEngine(path, EngineOptions(dtype=torch.bfloat16, bitwise=True, weights_root=store.root))
    seen = []
    try:
        for turn in range(3):
            made = engine.generate([request(15 + i, seed=10 * turn + i, n=4, tokens=20) for i in range(3)])
            batch = [RolloutGroup(rollouts=tuple(g), rewards=tuple(map(reward, g))) for g in made]
            report = trainer.step(batch)
            assert report.metrics["gap/log_ratio/max_abs"] == 0.0
            assert {v for g in made for r in g for v in r.weight_versions} == {turn}
            seen.append(report.metrics["grad/norm/mean"])
            engine.update_weights(store.publish(report.version, trainer.weights.published()).path, clear_cache=True)
    finally:
        engine.close()
    assert len(set(seen)) == 3


@pytest.mark.parametrize("kind", PAPERS)
@pytest.mark.parametrize("correction", [{}, {"kind": "mask_tokens"}], ids=["plain", "icepop"])
def test_every_objective_in_several_steps_of_a_batch(tiny, groups, kind, correction):
    old = {"old": "decoupled"}
    objective = {"kind": kind, "fixed_length": 24, "drop_overlong": False, "entropy": 0.01} | old
    trainer = trainer_of(
        tiny, objective=objective, correction=correction, optimizer={"lr": 1e-3}, epochs=2, minibatches=2
    )
    metrics = trainer.step(groups).metrics
    assert trainer.weights.steps == 4 and trainer.version == 1
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["policy/kl_old/k3"] > 0  # the second minibatch saw a policy that had moved
    assert metrics["gap/log_ratio/max_abs"] < 1e-4  # the gap is measured before the first step


def test_pi_prox_is_pi_at_the_first_step_only(tiny, groups):
    """With one step a batch the ratio pi/pi_prox is exactly 1; bypass keeps the engine's numbers instead."""
    assert trainer_of(tiny).step(groups).metrics["policy/ratio/max"] == 1.0
    bypass = trainer_of(tiny, objective={"old": "bypass"}).step(groups).metrics
    assert bypass["policy/kl_old/k3"] == pytest.approx(bypass["gap/kl/k3"], rel=0.01) and bypass["gap/kl/k3"] > 0


def test_interpolation_needs_no_pass_and_equals_decoupled_at_the_first_step(tiny, groups):
    first = trainer_of(tiny).step(groups).metrics
    second = trainer_of(tiny, objective={"old": "interpolated"}).step(groups)
    assert second.metrics["grad/norm/mean"] == first["grad/norm/mean"]
    rate = {"lr": 1e-4}
    several = trainer_of(tiny, objective={"old": "interpolated"}, minibatches=4, optimizer=rate).step(groups)
    exact = trainer_of(tiny, minibatches=4, optimizer=rate).step(groups)
    assert "proximal" not in several.phase_s and "proximal" in exact.phase_s
    assert "proximal" in trainer_of(tiny, minibatches=2).step(groups).phase_s, "two steps are several"
    # On-policy tokens: a = 0 after the first step, so that the guess is mu, which is pi_prox but for rounding.
    assert several.metrics["policy/kl_old/k3"] == pytest.approx(exact.metrics["policy/kl_old/k3"], rel=0.05)


def test_micro_batches_and_sharing_do_not_change_the_update(tiny, groups):
    found = []
    for train in ({}, {"micro_tokens": 50}, {"share_prompts": False}, {"gradient_checkpointing": True}):
        trainer = trainer_of(tiny, objective={"kind": "dapo", "drop_overlong": False}, **train)
        metrics = trainer.step(groups).metrics
        found.append((metrics["loss/total"], metrics["grad/norm/mean"]))
    for loss, norm in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6) and norm == pytest.approx(found[0][1], rel=1e-5)


def test_gradient_checkpointing_recomputes_layers_to_the_same_bits(tiny, groups):
    counts, norms = [], []
    for on in (False, True):
        trainer = trainer_of(tiny, gradient_checkpointing=on)
        calls = []
        # Inside the layer, not on it: the recomputation does not go through the layer's own hooks.
        trainer.model.body.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        norms.append(trainer.step(groups).metrics["grad/norm/mean"])
        counts.append(len(calls))
    assert counts == [1, 2] and norms[0] == norms[1]


def test_mixed_sampling_in_one_batch_is_scored_row_by_row(tiny, groups):
    hot = sample(tiny, groups=2, temperature=1.3, top_p=0.9)
    both = [groups[0], hot[0], groups[1], hot[1]]
    scored = trainer_of(tiny, micro_tokens=10_000).score(both)
    reported = torch.tensor([v for g in both for r in g.rollouts for v in r.behaviour_logprobs])
    assert float((scored.logprobs_T - reported).abs().max()) < 1e-4


def test_tokens_outside_the_trainers_kept_set_are_counted_and_left_out(tiny, groups):
    """Rows that claim a narrower nucleus than they were drawn from."""
    narrow = [
        dataclasses.replace(
            g, rollouts=tuple(dataclasses.replace(r, sampling=SamplingParams(top_p=0.5, seed=1)) for r in g.rollouts)
        )
        for g in groups
    ]
    trainer = trainer_of(tiny)
    scored = trainer.score(narrow)
    metrics = trainer.step(narrow).metrics
    outside = int((~scored.inside_T).sum())
    assert metrics["tokens/outside_kept_set/count"] == outside > 0
    assert math.isfinite(metrics["loss/total"]) and math.isfinite(metrics["grad/norm/mean"])


# Precision.


class PureBfloat16(MasterWeights):
    """A planted fault: AdamW on the rounded weights themselves, moments in bfloat16 too."""

    def __init__(self, model, settings):
        self.model, self.settings, self.steps = model, settings, 0
        self._own = self.masters = dict(model.lm.named_parameters())
        for parameter in self.masters.values():
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self.masters.values(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
        )


def fifty_updates(trainer, made):
    """The weights before fifty updates at a learning rate of 1e-6."""
    before = {n: t.clone() for n, t in trainer.weights.published().items()}
    for _ in range(50):
        trainer.step(made)
    return before


def flat(tensors, like):
    return torch.cat([tensors[name].detach().float().flatten() for name in like])


def assert_the_contract_moves_what_pure_bfloat16_does_not(trainer, planted, made):
    """Both take the same fifty updates; returns the share of the published weights that moved under the contract.

    A step of 1e-6 is less than half a bfloat16 ulp of any |w| >= 4.9e-4, so only sums of steps can show there.
    """
    before = fifty_updates(trainer, made)
    masters, published, start = (
        flat(trainer.weights.masters, before), flat(trainer.weights.published(), before), flat(before, before)
    )  # fmt: skip
    assert torch.equal(published, masters.bfloat16().float())
    moved = (published != start) & (start.abs() >= 4.9e-4)
    assert bool(((published - start).sign() == (masters - start).sign())[moved].all())
    assert float((masters != start).float().mean()) > 0.9
    fifty_updates(planted, made)
    lost = flat(planted.weights.published(), before)[moved] == start[moved]
    assert float(lost.float().mean()) > 0.999
    return float(moved.float().mean())


def test_published_bf16_weights_move_as_the_fp32_masters_do(tmp_path, monkeypatch):
    path = make_tiny(tmp_path / "tiny", dtype=torch.bfloat16)
    made = sample(path, dtype=torch.bfloat16, groups=2)
    trainer = trainer_of(path, dtype="bfloat16")
    monkeypatch.setattr("trueup.pipeline.trainer.MasterWeights", PureBfloat16)
    planted = trainer_of(path, dtype="bfloat16")
    assert assert_the_contract_moves_what_pure_bfloat16_does_not(trainer, planted, made) > 0.02


def test_gradients_of_micro_batches_add_up_in_float32(tmp_path):
    """Sixteen micro-batches of a bf16 trainer: adding in bfloat16 would lose what is 2^-8 of the sum."""
    path = make_tiny(tmp_path / "tiny", dtype=torch.bfloat16)
    made = sample(path, dtype=torch.bfloat16)
    norms = []
    for tokens in (10_000, 1):
        trainer = trainer_of(path, dtype="bfloat16", micro_tokens=tokens)
        norms.append(trainer.step(made).metrics["grad/norm/mean"])
        assert all(m.dtype == torch.float32 for m in trainer.weights.masters.values())
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


# What is refused.


def test_an_empty_batch_and_one_without_a_gradient(tiny, groups):
    trainer = trainer_of(tiny)
    before = everything(trainer)
    with pytest.raises(RecordError, match="empty batch"):
        trainer.step([])
    flat = [dataclasses.replace(g, rewards=(1.0,) * 4) for g in groups]
    with pytest.raises(NothingToLearn, match="every advantage is zero"):
        trainer.step(flat)
    with pytest.raises(NothingToLearn, match="filters left none of 16"):
        trainer_of(tiny, objective={"drop_zero_variance": True}).step(flat)
    assert_unchanged(trainer, before)
    assert trainer.version == 0 and trainer.weights.steps == 0


def test_a_gradient_of_exactly_zero_takes_no_step(tiny, groups):
    """Everything rejected by the correction, or everything clipped: not even decay moves the policy."""
    trainer = trainer_of(tiny, correction={"kind": "geometric_band", "lower": 2.0, "upper": 3.0})
    before = everything(trainer)
    with pytest.raises(NothingToLearn, match="the correction drops 100% of the tokens"):
        trainer.step(groups)
    assert_unchanged(trainer, before)
    assert trainer.version == 0 and trainer.weights.steps == 0


def test_a_loss_or_gradient_that_is_not_finite_takes_no_step(tiny, groups):
    trainer = trainer_of(tiny, objective={"kind": "dr_grpo", "fixed_length": 24})
    trainer.step(groups)
    before = everything(trainer)
    huge = [dataclasses.replace(g, rewards=(1e30, 0.0, 0.0, -1e30)) for g in groups]
    with pytest.raises(TrainingError, match=r"the gradient is not finite.*as before"):
        trainer.step(huge)
    assert_unchanged(trainer, before)
    tilted = [dataclasses.replace(g, rewards=(1e30, -1e30, 1e30, -1e30)) for g in groups]
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf|-inf).*as before"):
        trainer_of(tiny, objective={"kind": "reinforce", "max_ratio": 1e30}).step(
            [dataclasses.replace(g, rollouts=tuple(_unlikely(r) for r in g.rollouts)) for g in tilted]
        )
    with torch.no_grad():
        trainer.model.weight_VD[5, 5] = math.nan
    with pytest.raises(TrueupError, match="not finite"):
        trainer.step(groups)


def _unlikely(rollout):
    """The engine claims that it drew a token of probability e^-60: the ratio is e^58, the loss overflows float32."""
    return dataclasses.replace(rollout, behaviour_logprobs=(-60.0,) * len(rollout.token_ids))


def test_rollouts_of_another_policy_or_vocabulary_are_refused(tiny, groups):
    trainer = trainer_of(tiny)
    before = everything(trainer)

    def changed(**fields):
        return [
            dataclasses.replace(g, rollouts=tuple(dataclasses.replace(r, **fields) for r in g.rollouts)) for g in groups
        ]

    long = tuple(5 for _ in range(2000))
    for bad, error, text in (
        (changed(token_ids=(3,) * 23 + (5000,)), ModelError, "outside the model's vocabulary of 128"),
        (changed(sampling=SamplingParams(temperature=0.0)), TrainingError, "greedily"),
        (
            changed(sampling=SamplingParams(temperature=0.7), logprob_kind=LogprobKind.RAW),
            TrainingError, "raw logprobs.*--logprobs-mode processed_logprobs",
        ),
        (
            changed(token_ids=long, behaviour_logprobs=(-1.0,) * 2000, weight_versions=(0,) * 2000,
                    raw_logprobs=None, log_kept_masses=None),
            ModelError, "the model's limit is 1024",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            trainer.step(bad)
    assert_unchanged(trainer, before)
    trainer.step(changed(logprob_kind=LogprobKind.RAW))  # at temperature 1 raw is processed


def test_a_checkpoint_of_another_model_changes_nothing(tiny, tmp_path):
    trainer = trainer_of(tiny)
    before = everything(trainer)
    for shape in ({"hidden_size": 32}, {"num_hidden_layers": 1}):
        other = trainer_of(make_tiny(tmp_path / str(shape), **shape))
        with pytest.raises(TrainingError, match="checkpoint is of another model"):
            trainer.weights.restore(other.weights.state(), steps=3)
        assert_unchanged(trainer, before)


def test_recipes_that_contradict_themselves_are_refused(tiny):
    for objective, correction, text in (
        ({"old": "bypass"}, {"kind": "truncate_tokens"}, "a second time"),
        ({"kind": "dr_grpo"}, {}, "fixed_length"),
        ({"kind": "grpo", "max_ratio": 3.0}, {}, "max_ratio has no meaning for grpo"),
        ({"kind": "gspo", "dual": 3.0}, {}, "dual has no meaning for gspo"),
        ({}, {"lower": 0.5}, "lower has no meaning for none"),
        ({}, {"kind": "k3_rejection", "lower": 0.5}, "lower has no meaning for k3_rejection"),
    ):
        with pytest.raises(ConfigError, match=text):
            trainer_of(tiny, objective=objective, correction=correction)
    trainer_of(tiny, objective={"old": "bypass"}, correction={"kind": "geometric_band", "veto": 1e-4})


def test_normalised_weights_have_mean_one_over_the_sequences_that_take_part(tiny, groups):
    """With rewards of one prompt all equal, that prompt is dropped and in no mean."""
    some = [dataclasses.replace(groups[0], rewards=(1.0,) * 4), *groups[1:]]
    shifted = [
        dataclasses.replace(
            g,
            rollouts=tuple(
                dataclasses.replace(r, behaviour_logprobs=tuple(v - 0.2 for v in r.behaviour_logprobs))
                for r in g.rollouts
            ),
        )
        for g in some
    ]
    metrics = []
    for normalise in (False, True):
        trainer = trainer_of(
            tiny, objective={"drop_zero_variance": True},
            correction={"kind": "truncate_tokens", "normalise": normalise},
        )  # fmt: skip
        metrics.append(trainer.step(shifted).metrics)
    assert metrics[0]["gap/ratio/mean_applied"] == pytest.approx(math.exp(0.2), rel=1e-4)
    assert metrics[1]["gap/ratio/mean_applied"] == pytest.approx(1.0, rel=1e-6)
    assert metrics[1]["sequences/filtered/count"] == 4
