"""What one update computes: advantages, filters, objective, correction, KL, each with its numbers resolved.

Shapes: T completion tokens, S sequences. A recipe holds no state: the same batch and logprobs give the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trueup.errors import ConfigError
from trueup.knobs import Config
from trueup.policy import advantages, corrections, objectives
from trueup.policy.corrections import Correction
from trueup.policy.objectives import Aggregation, Surrogate
from trueup.policy.packing import TrainingBatch
from trueup.policy.proximal import OldPolicy

PAPERS: dict[str, dict[str, Any]] = {
    "reinforce": {"advantage": "leave_one_out", "aggregation": "token", "max_ratio": 5.0, "old": "bypass", "kl": 0.0},
    "ppo": {"advantage": "std_normalised", "aggregation": "token", "low": 0.2, "high": 0.2, "kl": 0.0},
    "grpo": {"advantage": "std_normalised", "aggregation": "sequence", "low": 0.2, "high": 0.2, "kl": 0.04},
    "dr_grpo": {"advantage": "group_mean", "aggregation": "fixed", "low": 0.2, "high": 0.2, "kl": 0.0},
    "dapo": {
        "advantage": "std_normalised", "aggregation": "token", "low": 0.2, "high": 0.28, "kl": 0.0,
        "drop_zero_variance": True, "drop_overlong": True,
    },
    "gspo": {"advantage": "std_normalised", "aggregation": "sequence", "low": 3e-4, "high": 4e-4, "kl": 0.0},
    "cispo": {
        "advantage": "batch_normalised", "aggregation": "prompt", "max_ratio": 5.0, "old": "bypass", "kl": 0.0,
        "drop_zero_variance": True,
    },
}  # fmt: skip
"""What each objective's paper has (policy/objectives.py names it); cispo as ScaleRL runs it. `old` is otherwise
decoupled, a filter otherwise off."""
OTHERWISE: dict[str, Any] = {
    "old": "decoupled", "drop_zero_variance": False, "drop_overlong": False, "low": None, "high": None,
    "max_ratio": None,
}  # fmt: skip
ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "group_mean": lambda reward_S, group_S, kept_S: advantages.group_mean(reward_S, group_S),
    "leave_one_out": lambda reward_S, group_S, kept_S: advantages.leave_one_out(reward_S, group_S),
    "std_normalised": lambda reward_S, group_S, kept_S: advantages.std_normalised(reward_S, group_S),
    "batch_normalised": lambda reward_S, group_S, kept_S: advantages.batch_normalised(reward_S, group_S, kept_S=kept_S),
    "batch_normalised_rewards": lambda reward_S, group_S, kept_S: advantages.batch_normalised(
        reward_S, group_S, spread_of="rewards", kept_S=kept_S
    ),
}
"""From rewards, groups and the sequences that take part to advantages, each [S]."""
SEQUENCE_WEIGHTS = ("truncate_sequences", "mask_sequences")
"""Corrections whose weight is one number per sequence."""
WEIGHTS = ("truncate_tokens", "truncate_sequences", "mask_tokens", "mask_sequences")
"""Corrections that multiply by the ratio; the others only reject."""
BOUNDS = {"geometric_band": ("lower", "upper"), "k3_rejection": ("upper",)} | dict.fromkeys(WEIGHTS, ("lower", "upper"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """An update with every number named; fields as in ObjectiveConfig and CorrectionConfig."""

    kind: str
    advantage: str
    aggregation: Aggregation
    fixed_length: int | None
    low: float | None
    high: float | None
    max_ratio: float | None
    dual: float | None
    old: OldPolicy
    kl: float
    kl_estimator: str
    kl_unbiased: bool
    entropy: float
    drop_zero_variance: bool
    drop_overlong: bool
    correction: str
    lower: float | None
    upper: float | None
    veto: float | None
    normalise: bool
    vcpo_ess: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def advantages(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Advantages [S] and which sequences take part [S].

        A group's baseline is of all its sequences, so that filters change nobody's. The spread of a whole batch is of
        the sequences that take part: otherwise the step would grow as more groups are filtered out.
        """
        kept_S = torch.ones_like(batch.kept_S)
        if self.drop_zero_variance:
            kept_S &= advantages.varies(batch.reward_S, batch.group_S)
        if self.drop_overlong:
            kept_S &= advantages.not_overlong([f.finish_reason for f in batch.facts])
        return ADVANTAGES[self.advantage](batch.reward_S, batch.group_S, kept_S), kept_S

    def surrogate(self, logprobs_T: Tensor, old_T: Tensor, advantage_T: Tensor, row_T: Tensor) -> Surrogate:
        """The objective's loss a token."""
        arguments = (logprobs_T, old_T, advantage_T)
        band = {"low": self.low, "high": self.high}
        match self.kind:
            case "reinforce" | "cispo":
                return getattr(objectives, self.kind)(*arguments, max_ratio=self.max_ratio)
            case "gspo":
                return objectives.gspo(*arguments, row_T, **band)  # type: ignore[arg-type]
            case "ppo":
                return objectives.ppo(*arguments, **band, dual=self.dual)  # type: ignore[arg-type]
            case kind:
                return getattr(objectives, kind)(*arguments, **band)

    def correct(self, log_ratio_T: Tensor, row_T: Tensor) -> Correction:
        """The correction of pi_prox/mu (r = trainer - behaviour, nats), one weight a token."""
        bounds = {n: v for n, v in (("lower", self.lower), ("upper", self.upper)) if v is not None}
        match self.correction:
            case "none":
                found = corrections.no_correction(log_ratio_T)
            case "truncate_tokens" | "mask_tokens" as kind:
                found = getattr(corrections, kind)(log_ratio_T, **bounds)
            case kind:
                found = getattr(corrections, kind)(log_ratio_T, row_T, **bounds)
        if self.normalise:
            found = found.normalised(row_T if self.correction in SEQUENCE_WEIGHTS else None)
        if self.veto is not None:
            found = found.then(corrections.veto(log_ratio_T, row_T, lower=self.veto))
        return found


def recipe_of(config: Config) -> Recipe:
    """Resolve a configuration. Raises ConfigError for settings that contradict each other."""
    objective, correction = config.objective, config.correction
    paper = OTHERWISE | PAPERS[objective.kind]
    given = {name: value for name, value in objective.model_dump().items() if value is not None}
    for name in ("low", "high", "max_ratio", "dual"):
        if name in given and paper.get(name) is None and (objective.kind, name) != ("ppo", "dual"):
            raise ConfigError(f"objective.{name} has no meaning for {objective.kind}; leave it out")
    chosen = paper | given
    if chosen["aggregation"] == Aggregation.FIXED and objective.fixed_length is None:
        raise ConfigError(
            "aggregation by a fixed length needs objective.fixed_length, in tokens: take the rollouts' max_tokens"
        )
    if chosen["old"] == OldPolicy.BYPASS and correction.kind in WEIGHTS:
        raise ConfigError(
            f"objective.old = bypass puts pi/mu into the objective already; correction.kind = {correction.kind} would "
            "weigh the same gap a second time. Use old = decoupled, or a correction that only rejects"
        )
    several = config.train.epochs * config.train.minibatches > 1
    if chosen["old"] == OldPolicy.INTERPOLATED and several and (correction.kind != "none" or correction.vcpo_ess):
        raise ConfigError(
            "objective.old = interpolated guesses pi_prox from mu after the first of several optimiser steps: a "
            "correction would see no gap at all in fresh tokens. Use old = decoupled, one minibatch and epoch, or no "
            "correction"
        )
    if config.rollout.late == "train" and correction.kind == "none" and chosen["old"] != OldPolicy.BYPASS:
        raise ConfigError(
            "rollout.late = train takes groups beyond max_lag, whose ratio pi_prox/mu nothing bounds: name a "
            "correction.kind (truncate_tokens, mask_tokens, ...), or objective.old = bypass"
        )
    if chosen["kl"] and objective.kl_estimator == ("k2" if objective.kl_unbiased else "k1"):
        raise ConfigError(
            "objective.kl_estimator = k2 is already right as a loss and wrong once weighted: leave kl_unbiased off"
            if objective.kl_unbiased
            else "objective.kl_estimator = k1 has no gradient in expectation: take k2 or k3, or set kl_unbiased"
        )
    for name in ("lower", "upper"):
        if getattr(correction, name) is not None and name not in BOUNDS.get(correction.kind, ()):
            raise ConfigError(f"correction.{name} has no meaning for {correction.kind}; leave it out")
    return Recipe(
        kind=objective.kind,
        advantage=chosen["advantage"],
        aggregation=Aggregation(chosen["aggregation"]),
        fixed_length=objective.fixed_length,
        low=chosen["low"],
        high=chosen["high"],
        max_ratio=chosen["max_ratio"],
        dual=objective.dual,
        old=OldPolicy(chosen["old"]),
        kl=chosen["kl"],
        kl_estimator=objective.kl_estimator,
        kl_unbiased=objective.kl_unbiased,
        entropy=objective.entropy,
        drop_zero_variance=chosen["drop_zero_variance"],
        drop_overlong=chosen["drop_overlong"],
        correction=correction.kind,
        lower=correction.lower,
        upper=correction.upper,
        veto=correction.veto,
        normalise=correction.normalise,
        vcpo_ess=correction.vcpo_ess,
    )
