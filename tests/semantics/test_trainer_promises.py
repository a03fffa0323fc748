"""What docs/training.md promises of an update, term by term: kept sets, entropy, KL, VCPO, clipping, epochs, order."""

import dataclasses
import math

import pytest
import torch
from tests.semantics.test_trainer import sample, trainer_of

from trueup.errors import ConfigError
from trueup.model.tiny import make_tiny
from trueup.pipeline import trainer as trainer_module
from trueup.pipeline.recipe import Recipe
from trueup.policy.corrections import vcpo_scale
from trueup.policy.packing import pack
from trueup.types import SamplingParams


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("promises") / "tiny")


@pytest.fixture(scope="module")
def groups(tiny):
    return sample(tiny)


def narrowed(groups):
    """Rows that claim a narrower nucleus than they were drawn from: some tokens are outside the trainer's kept set."""
    return [
        dataclasses.replace(
            g,
            rollouts=tuple(
                dataclasses.replace(
                    r, sampling=SamplingParams(top_p=0.6, seed=1),
                    behaviour_logprobs=tuple(v / 3 for v in r.behaviour_logprobs),
                )
                for r in g.rollouts
            ),
        )
        for g in groups
    ]  # fmt: skip


def shifted(groups, nats):
    """The same with behaviour logprobs that lie `nats` lower: a gap between engine and trainer."""
    return [
        dataclasses.replace(
            g,
            rollouts=tuple(
                dataclasses.replace(r, behaviour_logprobs=tuple(min(0.0, v - nats) for v in r.behaviour_logprobs))
                for r in g.rollouts
            ),
        )
        for g in groups
    ]


def even(groups):
    """The same with equal rewards: no advantage anywhere."""
    return [dataclasses.replace(g, rewards=(1.0,) * len(g.rewards)) for g in groups]


def test_a_token_outside_the_kept_set_has_ratio_1_and_no_gradient(tiny, groups, monkeypatch):
    """GSPO over several minibatches: pi keeps tokens that pi_prox does not, and the reverse."""
    calls = []

    def spy(self, logprobs_T, old_T, advantage_T, row_T, made=Recipe.surrogate):
        calls.append((logprobs_T, old_T))
        return made(self, logprobs_T, old_T, advantage_T, row_T)

    monkeypatch.setattr(Recipe, "surrogate", spy)
    made = narrowed(groups)
    trainer = trainer_of(
        tiny, objective={"kind": "gspo", "old": "decoupled", "low": 0.9, "high": 9.0}, minibatches=4,
        optimizer={"lr": 1e-2, "clip_norm": 10},
    )  # fmt: skip
    mu = {round(v, 6) for g in made for r in g.rollouts for v in r.behaviour_logprobs}
    outside = 0
    before = trainer.score(made)
    trainer.step(made)
    for logprobs_T, old_T in calls:
        stands_in = torch.tensor([round(v, 6) in mu for v in old_T.double().tolist()])
        same_T = logprobs_T.detach() == old_T
        assert bool(same_T[stands_in].all())
        outside += int(stands_in.sum())
    assert outside >= int((~before.inside_T).sum()) > 0


def test_tokens_outside_the_kept_set_have_no_loss_and_stay_in_the_denominator(tiny, groups):
    made = narrowed(groups)
    trainer = trainer_of(tiny, objective={"kind": "reinforce", "aggregation": "token", "old": "decoupled"})
    scored, batch = trainer.score(made), pack(made)
    stand_in = batch.behaviour_logprobs_T[~scored.inside_T]
    assert torch.allclose(scored.logprobs_T[~scored.inside_T].double(), stand_in, atol=1e-6)
    advantage_S = trainer.recipe.advantages(batch)[0]
    advantage_T = advantage_S[batch.row_T]
    # REINFORCE's surrogate at the first step: -A log pi, with weight 1.
    expected = -(advantage_T * scored.logprobs_T.double())[scored.inside_T].sum() / len(batch.tokens_T)
    assert trainer.step(made).metrics["loss/total"] == pytest.approx(float(expected), rel=1e-4)


def test_an_entropy_bonus_raises_the_entropy(tiny, groups):
    trainer = trainer_of(tiny, objective={"entropy": 1.0}, optimizer={"lr": 1e-3})
    before = float(trainer.score(groups).entropy_T.mean())
    trainer.step(even(groups))
    assert float(trainer.score(groups).entropy_T.mean()) > before + 1e-3


def test_a_correction_does_not_weigh_the_kl_term(tiny, groups, tmp_path):
    """Without advantages the whole gradient is the KL term's."""
    other = make_tiny(tmp_path / "other", seed=5)
    norms = [
        trainer_of(
            tiny, objective={"kl": 0.5}, correction=correction, reference=str(other), optimizer={"lr": 0.0}
        ).step(even(shifted(groups, 0.5))).metrics["grad/norm/mean"]
        for correction in ({}, {"kind": "truncate_tokens", "upper": 1.2})
    ]  # fmt: skip
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_vcpo_scales_the_learning_rate_by_the_ess_of_whole_sequences(tiny, groups):
    made = [g if i % 2 else shifted([g], 0.05)[0] for i, g in enumerate(groups)]
    rates = []
    for micro_tokens in (64, 100_000):
        trainer = trainer_of(
            tiny, correction={"vcpo_ess": 1.0}, optimizer={"lr": 1e-3}, micro_tokens=micro_tokens
        )  # fmt: skip
        batch = pack(made)
        log_ratio_T = trainer.score(made).logprobs_T.double() - batch.behaviour_logprobs_T
        rates.append(trainer.step(made).metrics["optimizer/lr"])
        assert rates[-1] == pytest.approx(1e-3 * vcpo_scale(log_ratio_T, batch.row_T), rel=1e-4)
    assert rates[0] < 0.9e-3


def test_gradients_are_clipped_before_the_moments_see_them(tiny, groups):
    trainer = trainer_of(tiny, optimizer={"clip_norm": 1e-3, "beta1": 0.9})
    metrics = trainer.step(groups).metrics
    assert metrics["grad/norm/mean"] > 1e-2 and metrics["grad/clip_factor/mean"] < 0.1
    moments = [t for name, t in trainer.weights.state().items() if name.startswith("exp_avg.")]
    norm = math.sqrt(sum(float(m.double().square().sum()) for m in moments)) / (1 - 0.9)
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_warms_up_and_weights_decay_by_it(tiny, groups):
    trainer = trainer_of(tiny, optimizer={"lr": 1e-3, "warmup_steps": 4})
    assert [trainer.step(groups).metrics["optimizer/lr"] for _ in range(5)] == pytest.approx(
        [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3]
    )
    start = trainer_of(tiny).weights.state()
    decayed, plain = (trainer_of(tiny, optimizer={"lr": 1e-3, "weight_decay": decay}) for decay in (0.5, 0.0))
    for made in (decayed, plain):
        made.step(groups)
    after, without = decayed.weights.state(), plain.weights.state()
    name = next(n for n in start if n.startswith("master.") and "q_proj" in n)
    assert torch.allclose(without[name] - after[name], 1e-3 * 0.5 * start[name], atol=1e-7)


def test_numbers_of_a_batch_are_those_of_its_first_epoch(tiny, groups):
    one, two = (
        trainer_of(tiny, epochs=n, optimizer={"lr": 1e-2}).step(groups).metrics for n in (1, 2)
    )  # fmt: skip
    for name in ("policy/kl_old/k3", "policy/clip/fraction", "policy/entropy/mean", "gap/log_ratio/rms"):
        assert two[name] == pytest.approx(one[name], abs=1e-9), name


@pytest.mark.parametrize("kind", ["truncate_tokens", "truncate_sequences"])
def test_normalising_divides_by_the_mean_of_the_weights_that_the_gap_gives(tiny, groups, kind):
    """Each completion is off by another amount, so that only the right gaps have the right mean."""
    made = [shifted([g], 0.02 * (i + 1))[0] for i, g in enumerate(groups)]
    plain, normalised = (
        trainer_of(tiny, correction={"kind": kind, "normalise": flag}, optimizer={"lr": 0.0}).step(made).metrics
        for flag in (False, True)
    )
    by_row = [(0.02 * (i + 1), len(r.token_ids)) for i, g in enumerate(groups) for r in g.rollouts]
    if kind == "truncate_tokens":
        mean = sum(math.exp(off) * length for off, length in by_row) / sum(length for _, length in by_row)
    else:
        mean = sum(min(2.0, math.exp(off * length)) for off, length in by_row) / len(by_row)
    name = "grad/norm/mean"
    assert normalised[name] == pytest.approx(plain[name] / mean, rel=1e-3) and mean > 1.03


def test_an_interpolated_pi_prox_neither_corrects_nor_hides_a_gap(tiny, groups):
    """After the first step the guess of pi_prox is mu for fresh tokens: they say nothing of the gap."""
    made = shifted(groups, 0.5)
    rms = [
        trainer_of(tiny, objective={"old": "interpolated"}, minibatches=n, optimizer={"lr": 0.0})
        .step(made)
        .metrics["gap/log_ratio/rms"]
        for n in (1, 4)
    ]
    assert rms[0] == pytest.approx(0.5, rel=0.05) and rms[1] == pytest.approx(0.5, rel=0.05)
    with pytest.raises(ConfigError, match="interpolated guesses"):
        trainer_of(tiny, objective={"old": "interpolated"}, correction={"kind": "truncate_tokens"}, minibatches=2)
    trainer_of(tiny, objective={"old": "interpolated"}, correction={"kind": "truncate_tokens"})


def test_the_scale_of_an_advantage_does_not_depend_on_groups_that_are_filtered_out(tiny, groups):
    trainer = trainer_of(tiny, objective={"kind": "cispo"})
    assert trainer.recipe.drop_zero_variance
    alone = trainer.recipe.advantages(pack(groups[:1]))[0]
    beside = trainer.recipe.advantages(pack([groups[0], *even(groups[1:])]))
    assert torch.allclose(beside[0][:4], alone) and not beside[1][4:].any()


def test_normalised_sequence_weights_count_each_sequence_once(tiny, groups):
    """Long sequences have no more say than short ones; a veto that follows changes no mean."""
    made = [g if i % 2 else shifted([g], 0.02)[0] for i, g in enumerate(groups)]
    trainer = trainer_of(
        tiny, correction={"kind": "truncate_sequences", "upper": 10.0, "normalise": True, "veto": 1e-3}
    )
    batch = pack(made)
    log_ratio_T = trainer.score(made).logprobs_T.double() - batch.behaviour_logprobs_T
    weight_T = trainer.recipe.correct(log_ratio_T, batch.row_T).weight_T
    first_T = torch.cat([torch.tensor([True]), batch.row_T[1:] != batch.row_T[:-1]])
    assert float(weight_T[first_T].mean()) == pytest.approx(1.0)


def test_minibatches_are_shuffled_by_seed_and_the_same_again(tiny, groups):
    batch = pack(groups)
    orders = [
        [trainer_of(tiny, minibatches=4, seed=seed)._minibatches(batch, epoch) for epoch in (0, 1)]
        for seed in (0, 0, 7)
    ]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0][0] != orders[0][1]
    assert sorted(row for part in orders[0][0] for row in part) == list(range(16))
    assert trainer_of(tiny)._minibatches(batch, 0) == [list(range(16))]
    halves = {str(trainer_of(tiny, minibatches=2, seed=seed)._minibatches(batch, 0)) for seed in range(5)}
    assert len(halves) > 1, "two are shuffled as well"


def test_late_groups_need_a_correction(tiny):
    values = {"rollout": {"late": "train"}}
    from trueup.config import build_config
    from trueup.pipeline.recipe import recipe_of

    with pytest.raises(ConfigError, match=r"rollout\.late = train"):
        recipe_of(build_config(values | {"objective": {"old": "decoupled"}}))
    recipe_of(build_config(values | {"correction": {"kind": "truncate_tokens"}, "objective": {"old": "decoupled"}}))


def test_versions_count_batches(tiny, groups):
    trainer = trainer_of(tiny, optimizer={"lr": 1e-4})
    assert [trainer.step(groups).version for _ in range(3)] == [1, 2, 3] and trainer.version == 3


def test_vcpo_takes_the_ess_that_an_on_policy_batch_would_have(tiny, groups):
    """Half of it is expected: the rate is that of a batch with twice the ESS, as long as it is not above 1."""
    made, rates = [shifted(groups[:1], 0.4)[0], *groups[1:]], []
    for expected in (1.0, 0.5):
        trainer = trainer_of(tiny, correction={"vcpo_ess": expected}, optimizer={"lr": 1e-3})
        rates.append(trainer.step(made).metrics["optimizer/lr"])
    scored, batch = trainer_of(tiny).score(made), pack(made)
    log_ratio_T = scored.logprobs_T.double() - batch.behaviour_logprobs_T
    assert rates == pytest.approx([1e-3 * vcpo_scale(log_ratio_T, batch.row_T, on_policy_ess=e) for e in (1.0, 0.5)])
    assert rates[0] < 0.99 * rates[1]


def test_weights_are_normalised_over_the_batch_and_not_over_its_parts(tiny, groups):
    made = [shifted(groups[:1], 0.4)[0], *groups[1:]]
    found = [
        trainer_of(tiny, correction={"kind": "truncate_tokens", "normalise": True}, micro_tokens=size)
        .step(made)
        .metrics
        for size in (40, 4096)
    ]
    assert found[0]["grad/norm/mean"] == pytest.approx(found[1]["grad/norm/mean"], rel=1e-4)


def test_interpolation_counts_the_steps_that_were_taken_of_those_planned(tiny, groups, monkeypatch):
    """Two epochs of two minibatches: before the second, third and fourth step pi is 1/4, 2/4, 3/4 of a version on."""
    asked = []
    guess = trainer_module.interpolated

    def spy(*args, proximal_version, current_version):
        asked.append(current_version - proximal_version)
        return guess(*args, proximal_version=proximal_version, current_version=current_version)

    monkeypatch.setattr(trainer_module, "interpolated", spy)
    trainer = trainer_of(tiny, objective={"old": "interpolated"}, minibatches=2, epochs=2, optimizer={"lr": 1e-4})
    trainer.step(groups)
    assert list(dict.fromkeys(asked)) == [0.25, 0.5, 0.75]


def test_the_kl_term_is_the_estimator_that_was_asked_for(tiny, groups):
    """K2 and K3 of one gap differ, and so do their gradients (at the start the reference is the policy: lag it)."""
    found = []
    for estimator in ("k2", "k3"):
        trainer = trainer_of(tiny, objective={"kl": 1.0, "kl_estimator": estimator}, optimizer={"lr": 1e-2})
        trainer.step(groups)
        found.append(trainer.step(groups).metrics["grad/norm/mean"])
    assert found[0] != pytest.approx(found[1], rel=1e-6)
