"""What the trainer reports of a batch is what it did, with several steps, a reference, and tokens nobody can draw."""

import dataclasses

import pytest
import torch
from tests.semantics.test_trainer import sample, trainer_of

from trueup.errors import ConfigError
from trueup.model.tiny import make_tiny
from trueup.pipeline import trainer as trainer_module
from trueup.types import SamplingParams


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("numbers") / "tiny")


@pytest.fixture(scope="module")
def groups(tiny):
    return sample(tiny)


def claimed(groups, **sampling):
    """The same rollouts as if they had been drawn from another distribution."""
    params = SamplingParams(seed=1, **sampling)
    return [
        dataclasses.replace(g, rollouts=tuple(dataclasses.replace(r, sampling=params) for r in g.rollouts))
        for g in groups
    ]


def test_a_token_that_pi_prox_cannot_draw_stays_out_wherever_pi_moves(tiny, groups, monkeypatch):
    narrow, seen = claimed(groups, top_p=0.6), []

    def keep(batch, observed, steps, recipe, made=trainer_module.step_metrics):
        seen.append(observed)
        return made(batch, observed, steps, recipe)

    monkeypatch.setattr(trainer_module, "step_metrics", keep)
    trainer = trainer_of(tiny, objective={"old": "decoupled"}, minibatches=4, optimizer={"lr": 1e-2, "clip_norm": 10})
    start_T = trainer.score(narrow).inside_T
    trainer.step(narrow)
    end_T = trainer.score(narrow).inside_T
    assert bool((end_T & ~start_T).any())  # the policy moved so far that it can draw some of them now
    assert not bool((seen[0].inside_T & ~start_T).any())


def test_the_loss_of_several_minibatches_is_their_mean(tiny, groups):
    objective = {"kind": "dr_grpo", "fixed_length": 24, "entropy": 0.1}
    one, four = (
        trainer_of(tiny, objective=objective, minibatches=n, optimizer={"lr": 0.0}).step(groups).metrics for n in (1, 4)
    )
    assert four["loss/total"] == pytest.approx(one["loss/total"], rel=1e-5) and one["loss/total"] != 0


def test_more_minibatches_than_prompts_are_as_many_as_prompts(tiny, groups):
    """Interpolation counts the steps that are made, not those that were asked for."""
    made = [
        trainer_of(tiny, objective={"old": "interpolated"}, minibatches=n, optimizer={"lr": 1e-3}).step(groups).metrics
        for n in (4, 9)
    ]
    assert made[0] == made[1]


def test_the_kl_term_counts_apart_what_the_reference_cannot_draw(tmp_path, tiny):
    made, other = sample(tiny, top_p=0.5), make_tiny(tmp_path / "other", seed=3)
    plain, with_kl = (
        trainer_of(tiny, objective={"kind": "dapo", "drop_overlong": False, "kl": kl}, reference=str(other))
        .step(made)
        .metrics
        for kl in (0.0, 0.5)
    )
    outside = int((~trainer_of(other).score(made).inside_T).sum())
    assert with_kl["tokens/outside_reference_set/count"] == outside
    assert 0 < outside < with_kl["tokens/trained/count"] and 2 * outside != with_kl["tokens/trained/count"]
    assert trainer_of(tiny).reference is None, "without a KL term nothing is held for it"
    reference, own_T = trainer_of(other).score(made), trainer_of(tiny).score(made).logprobs_T.double()
    gap_T = (reference.logprobs_T.double() - own_T)[reference.inside_T]
    k3 = float((gap_T.exp() - gap_T - 1).sum()) / len(own_T)
    assert with_kl["policy/kl_reference/mean"] == pytest.approx(k3, rel=1e-4), "nothing stands where it is infinite"
    kl = with_kl["loss/total"] - plain["loss/total"]
    assert kl == pytest.approx(0.5 * with_kl["policy/kl_reference/mean"], rel=1e-4) and kl > 0


def test_pipelinerls_names_have_pipelinerls_averages(tiny, groups):
    """Ratios outside the band count whatever the sign of the advantage; both are means over sequences."""
    trainer = trainer_of(
        tiny, objective={"kind": "gspo", "old": "bypass", "low": 1e-3, "high": 1e-3}, optimizer={"lr": 0.0}
    )
    moved = claimed(groups, temperature=0.9)
    gap_T = trainer.score(moved).logprobs_T.double() - torch.tensor(
        [v for g in moved for r in g.rollouts for v in r.behaviour_logprobs], dtype=torch.float64
    )
    rows = gap_T.split([len(r.token_ids) for g in moved for r in g.rollouts])
    metrics = trainer.step(moved).metrics
    k3 = [float((row.exp() - row - 1).mean()) for row in rows]
    beyond = [abs(float(row.mean().exp()) - 1) > 1e-3 for row in rows]
    assert metrics["kl_new_old"] == pytest.approx(sum(k3) / len(k3), rel=1e-4)
    assert metrics["clamp_log_ratio_new_old_indicator"] == pytest.approx(sum(beyond) / len(beyond))
    assert metrics["policy/clip/fraction"] < metrics["clamp_log_ratio_new_old_indicator"]


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", False), ("k2", True)])
def test_kl_losses_with_no_gradient_of_a_divergence_are_refused(tiny, estimator, unbiased):
    with pytest.raises(ConfigError, match=f"kl_estimator = {estimator}"):
        trainer_of(tiny, objective={"kl": 0.1, "kl_estimator": estimator, "kl_unbiased": unbiased})
