"""What was seen while a batch was trained on, as named numbers: raw values first, then what the correction left.

Shapes: T completion tokens of the batch; only tokens of sequences that took part are counted. r = log pi_prox - log mu
in nats: backend and staleness together (docs/numerics.md). Everything float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.pipeline.forward import Scored
from trueup.pipeline.masters import StepNumbers
from trueup.pipeline.recipe import Recipe
from trueup.policy.advantages import varies
from trueup.policy.corrections import Correction
from trueup.policy.diagnostics import diagnose, kl_k3
from trueup.policy.objectives import Surrogate, sequence_mean
from trueup.policy.packing import TrainingBatch


@dataclass
class Observed:
    """Per token of the whole batch, in its first epoch; tokens that were never run stay unseen."""

    proximal_T: Tensor
    entropy_T: Tensor
    inside_T: Tensor
    seen_T: Tensor
    clipped_T: Tensor
    beyond_T: Tensor
    policy_log_ratio_T: Tensor
    """Per token, log pi - log old, whatever level the objective clips at."""
    kl_T: Tensor
    weight_T: Tensor
    dropped_T: Tensor
    truncated_T: Tensor
    guessed_T: Tensor
    """True where pi_prox is a guess made from mu: such tokens say nothing of the gap between the two."""
    loss: float = 0.0
    minibatches: int = 0
    outside_reference: int = 0
    """Tokens that the reference policy cannot draw; they have no KL term."""

    @classmethod
    def of(cls, batch: TrainingBatch) -> Observed:
        """Nothing seen yet."""
        size = len(batch.tokens_T)
        numbers = torch.zeros(5, size, dtype=torch.float64).unbind()
        flags = torch.zeros(7, size, dtype=torch.bool).unbind()
        return cls(
            proximal_T=numbers[0],
            entropy_T=numbers[1],
            policy_log_ratio_T=numbers[2],
            kl_T=numbers[3],
            weight_T=numbers[4],
            inside_T=flags[0],
            seen_T=flags[1],
            clipped_T=flags[2],
            dropped_T=flags[3],
            truncated_T=flags[4],
            beyond_T=flags[5],
            guessed_T=flags[6],
        )

    def add(
        self, token_T: Tensor, scored: Scored, proximal_T: Tensor, old_T: Tensor, surrogate: Surrogate,
        correction: Correction, kl_T: Tensor, loss: float, *, guessed: bool = False,
    ) -> None:  # fmt: skip
        """Record the tokens at `token_T` of the batch and the share of the loss they had."""
        self.proximal_T[token_T] = proximal_T.double()
        self.entropy_T[token_T] = scored.entropy_T.detach().double()
        self.inside_T[token_T], self.seen_T[token_T] = scored.inside_T, True
        self.clipped_T[token_T], self.beyond_T[token_T] = surrogate.clipped_T, surrogate.beyond_T
        self.policy_log_ratio_T[token_T] = (scored.logprobs_T.detach() - old_T).double()
        self.kl_T[token_T] = kl_T.double()
        self.weight_T[token_T] = correction.weight_T
        self.dropped_T[token_T], self.truncated_T[token_T] = ~correction.kept_T, correction.truncated_T
        self.guessed_T[token_T] = guessed
        self.loss += loss


def step_metrics(
    batch: TrainingBatch, observed: Observed, steps: Sequence[StepNumbers], recipe: Recipe
) -> dict[str, float]:
    """Numbers of one batch by name, with PipelineRL's four names beside ours."""
    at_T = observed.seen_T & observed.inside_T
    found = _rewards(batch) | {
        "tokens/trained/count": float(at_T.sum()),
        "tokens/outside_kept_set/count": float((observed.seen_T & ~observed.inside_T).sum()),
        "sequences/trained/count": float(batch.kept_S.sum()),
        "sequences/filtered/count": float((~batch.kept_S).sum()),
        "loss/total": observed.loss / observed.minibatches,
        "grad/norm/mean": _mean([s.grad_norm for s in steps]),
        "grad/clip_factor/mean": _mean([s.clip_factor for s in steps]),
        "optimizer/lr": steps[-1].lr,
    }
    if not bool(at_T.any()):
        return found
    found |= {
        "policy/entropy/mean": float(observed.entropy_T[at_T].mean()),
        "policy/clip/fraction": float(observed.clipped_T[at_T].double().mean()),
        "policy/kl_old/k3": kl_k3(observed.policy_log_ratio_T[at_T]),
        "policy/ratio/max": float(observed.policy_log_ratio_T[at_T].max().exp()),
    }
    if recipe.kl:
        found["policy/kl_reference/mean"] = float(observed.kl_T[at_T].mean())
        found["tokens/outside_reference_set/count"] = float(observed.outside_reference)
    measured_T = at_T & ~observed.guessed_T
    found |= _gap(batch, observed, measured_T) if bool(measured_T.any()) else {}
    return found | _as_pipelinerl(batch, observed, at_T, found)


def _as_pipelinerl(batch: TrainingBatch, observed: Observed, at_T: Tensor, found: dict[str, float]) -> dict[str, float]:
    """PipelineRL's four names with its averages, so that its figures can be drawn again (finetune/rl/__init__.py).

    Both of the ratio are means over sequences of means over their tokens; the indicator counts every ratio outside the
    band, where `policy/clip/fraction` counts those whose gradient is cut.
    """
    ratio_T, row_T = observed.policy_log_ratio_T[at_T], batch.row_T[at_T]
    return {
        "clamp_log_ratio_new_old_indicator": _mean_of_means(observed.beyond_T[at_T].double(), row_T),
        "kl_new_old": _mean_of_means(ratio_T.expm1() - ratio_T, row_T),
        "entropy": found["policy/entropy/mean"],
        "reward": found["reward/all/mean"],
    }


def _mean_of_means(values_T: Tensor, row_T: Tensor) -> float:
    rows = torch.unique(row_T)
    return float(sequence_mean(values_T, row_T)[torch.searchsorted(row_T, rows)].mean())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _rewards(batch: TrainingBatch) -> dict[str, float]:
    groups = len(batch.prompts)
    varied = batch.group_S[varies(batch.reward_S, batch.group_S)]
    spread = [float(batch.reward_S[batch.group_S == g].std(correction=0)) for g in range(groups)]
    return {
        "reward/all/mean": float(batch.reward_S.mean()),
        "reward/group/std": _mean(spread),
        "reward/group/varied_fraction": len(torch.unique(varied)) / groups,
        "completion/length/mean": float(batch.length_S.double().mean()),
        "completion/truncated/fraction": _mean([float(f.finish_reason == "length") for f in batch.facts]),
    }


def _gap(batch: TrainingBatch, observed: Observed, at_T: Tensor) -> dict[str, float]:
    """r = log pi_prox - log mu, raw; then its weights after the correction under `_applied`."""
    raw = diagnose(observed.proximal_T[at_T], batch.behaviour_logprobs_T[at_T], batch.row_T[at_T])
    weight_T = observed.weight_T[at_T]
    total, squares = float(weight_T.sum()), float(weight_T.square().sum())
    return {
        "gap/log_ratio/mean": raw.mean,
        "gap/log_ratio/mean_abs": raw.mean_abs,
        "gap/log_ratio/rms": raw.rms,
        "gap/log_ratio/max_abs": raw.max_abs,
        "gap/ratio/mean": raw.mean_w,
        "gap/kl/k3": raw.k3,
        "gap/ess/token": raw.ess_token,
        "gap/ess/sequence": raw.ess_sequence,
        "gap/ess/geometric": raw.ess_geometric,
        "gap/ess/token_applied": total**2 / (len(weight_T) * squares) if squares else 0.0,
        "gap/ratio/mean_applied": total / len(weight_T),
        "gap/truncated/fraction": float(observed.truncated_T[at_T].double().mean()),
        "gap/dropped/fraction": float(observed.dropped_T[at_T].double().mean()),
    }
