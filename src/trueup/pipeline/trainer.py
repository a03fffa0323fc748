"""The trainer: a batch of rollout groups in, one or more optimiser steps done, numbers out.

Shapes: T completion tokens of a batch, S sequences. Logprobs in nats. The four policies of a token: mu is what the
engine reported, pi_prox the trainer at the start of the batch, pi the trainer now; pi_v, the stamped versions, needs
older weights and is left to a replay.

An exception leaves weights and optimiser as they were before the optimiser step that failed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trueup.errors import ConfigError, NothingToLearn, TrainingError
from trueup.knobs import Config
from trueup.model.load import LoadedModel, load_model
from trueup.model.packed import open_policy
from trueup.pipeline.forward import Phases, Scored, check_batch, score, score_all
from trueup.pipeline.masters import MasterWeights, StepNumbers
from trueup.pipeline.recipe import Recipe, recipe_of
from trueup.pipeline.step_metrics import Observed, step_metrics
from trueup.policy.corrections import Correction, vcpo_scale
from trueup.policy.objectives import kl_term, token_weights
from trueup.policy.packing import TrainingBatch, micro_batches, pack, with_advantages
from trueup.policy.proximal import OldPolicy, interpolated
from trueup.types import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a batch did: `version` of the weights after it, metrics by name (`area/what/stat`), seconds by phase."""

    version: int
    metrics: dict[str, float]
    phase_s: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Sequences of a batch that run together: their numbers there, and themselves as a batch."""

    rows: list[int]
    batch: TrainingBatch
    token_T: Tensor
    """Where their tokens lie in the whole batch."""


def _part(batch: TrainingBatch, rows: list[int]) -> _Part:
    return _Part(rows=rows, batch=batch.rows(rows), token_T=batch.tokens_of(rows))


@dataclass
class _Known:
    """Logprobs of the whole batch that were computed before its first step, [T] each, where they are needed."""

    proximal_T: Tensor | None = None
    inside_T: Tensor | None = None
    """False where pi_prox is 0: those tokens take no part, wherever pi moves."""
    steps_planned: int = 1
    correction: Correction | None = None
    steps: list[StepNumbers] = field(default_factory=list)


class Trainer:
    """A policy being optimised. `version` counts the optimiser batches taken: the number its weights publish under."""

    def __init__(self, config: Config) -> None:
        """Load the policy, and the reference policy if the recipe has a KL term.

        Raises ConfigError for a recipe that contradicts itself, ModelError for a checkpoint that cannot be used.
        """
        train = config.train
        if train.model is None:
            raise ConfigError("train.model is missing: name a local Hugging Face folder")
        self.recipe: Recipe = recipe_of(config)
        self.config = config
        self.head_dtype = getattr(torch, train.head)
        self.model = self._open(train.model)
        self.reference = self._open(train.reference or train.model) if self.recipe.kl else None
        self.weights = MasterWeights(self.model, config.optimizer)
        if train.gradient_checkpointing:
            _checkpoint_layers(self.model)
        self.version = 0

    def _open(self, path: Path) -> LoadedModel:
        train = self.config.train
        return open_policy(load_model(path, dtype=getattr(torch, train.dtype)), bitwise=train.bitwise)

    def score(self, groups: Sequence[RolloutGroup]) -> Scored:
        """Logprobs and entropies [T] of all tokens under the present weights, without gradient."""
        batch = pack(groups)
        check_batch(self.model, batch)
        return self._score_all(self.model, batch, Phases())

    def step(self, groups: Sequence[RolloutGroup]) -> StepReport:
        """Take the optimiser steps of one batch.

        Raises RecordError for no groups, NothingToLearn when no sequence has a gradient, ModelError and TrainingError
        for rollouts of another vocabulary or another policy, and TrainingError when loss or gradient is not finite.
        """
        phases = Phases()
        with phases.measure("pack"):
            batch = pack(groups)
            check_batch(self.model, batch)
            batch = with_advantages(batch, *self.recipe.advantages(batch))
            self._refuse_nothing(batch)
        reference = None
        if self.reference is not None:
            with phases.measure("reference"):
                reference = self._score_all(self.reference, batch, phases)
        known = _Known()
        if self._needs_proximal_pass():
            with phases.measure("proximal"):
                proximal = self._score_all(self.model, batch, phases)
                known.proximal_T, known.inside_T = proximal.logprobs_T, proximal.inside_T
            if self.recipe.normalise:
                known.correction = self._correction(batch, known.proximal_T)
        observed = Observed.of(batch)
        if reference is not None:
            observed.outside_reference = int((~reference.inside_T).sum())
        count = len(self._minibatches(batch, 0))
        observed.minibatches, known.steps_planned = count, self.config.train.epochs * count
        for epoch in range(self.config.train.epochs):
            for rows in self._minibatches(batch, epoch):
                self._minibatch(batch, rows, reference, known, observed if epoch == 0 else None, phases)
        if not known.steps:
            dropped, clipped = (
                float(t[observed.seen_T].double().mean()) for t in (observed.dropped_T, observed.clipped_T)
            )
            raise NothingToLearn(
                f"the gradient is exactly zero: the correction drops {dropped:.0%} of the tokens, the objective clips "
                f"{clipped:.0%}"
            )
        self.version += 1
        return StepReport(
            version=self.version,
            metrics=step_metrics(batch, observed, known.steps, self.recipe),
            phase_s=dict(phases.seconds),
        )

    def _refuse_nothing(self, batch: TrainingBatch) -> None:
        dropped = int((~batch.kept_S).sum())
        groups = len(batch.prompts)
        if not bool(batch.kept_S.any()):
            raise NothingToLearn(f"the filters left none of {dropped} sequences of {groups} prompts")
        if not bool((batch.advantage_S[batch.kept_S] != 0).any()) and not self.recipe.kl and not self.recipe.entropy:
            raise NothingToLearn(
                f"every advantage is zero: the rewards of each of {groups} prompts are all equal; the step was not "
                "taken, since momentum and weight decay would move the policy without a reason"
            )

    def _needs_proximal_pass(self) -> bool:
        """Whether pi_prox must be known before the first step, and is not just pi at the first and only one."""
        several = self.config.train.epochs * self.config.train.minibatches > 1
        return self.recipe.normalise or (several and self.recipe.old != OldPolicy.INTERPOLATED)

    def _score_all(self, model: LoadedModel, batch: TrainingBatch, phases: Phases) -> Scored:
        train = self.config.train
        return score_all(
            model, self.head_dtype, batch, share_prompts=train.share_prompts, micro_tokens=train.micro_tokens,
            phases=phases,
        )  # fmt: skip

    def _score(self, model: LoadedModel, batch: TrainingBatch, phases: Phases) -> Scored:
        share = self.config.train.share_prompts
        return score(model, self.head_dtype, batch, share_prompts=share, phases=phases)

    def _micro_batches(self, batch: TrainingBatch, rows: Sequence[int] | None = None) -> list[_Part]:
        train = self.config.train
        chunks = micro_batches(batch, rows=rows, max_tokens=train.micro_tokens, shared_prompts=train.share_prompts)
        return [_part(batch, chunk) for chunk in chunks]

    def _minibatches(self, batch: TrainingBatch, epoch: int) -> list[list[int]]:
        """Kept sequences in equal shares of the prompts that have any, in an order of each epoch's own.

        Groups come in the order in which they were finished, long completions last: unshuffled, the last optimiser step
        of every batch would always be theirs. The order depends on seed, version and epoch alone, so that a run that is
        resumed has the same.
        """
        rows = batch.kept_S.nonzero()[:, 0].tolist()
        groups = list(dict.fromkeys(int(batch.group_S[row]) for row in rows))
        if self.config.train.minibatches > 1:
            random.Random(f"{self.config.train.seed} {self.version} {epoch}").shuffle(groups)
        count = min(self.config.train.minibatches, len(groups))
        share = {group: at * count // len(groups) for at, group in enumerate(groups)}
        return [[row for row in rows if share[int(batch.group_S[row])] == part] for part in range(count)]

    def _minibatch(
        self,
        batch: TrainingBatch,
        rows: list[int],
        reference: Scored | None,
        known: _Known,
        observed: Observed | None,
        phases: Phases,
    ) -> None:
        """One optimiser step over some sequences of the batch."""
        mask_T = torch.isin(batch.row_T, torch.tensor(rows))
        weight_T = token_weights(
            self.recipe.aggregation, mask_T, batch.row_T, batch.group_S, fixed_length=self.recipe.fixed_length
        )
        log_ratios: list[tuple[Tensor, Tensor]] = []
        self.weights.forget_gradients()
        try:
            for part in self._micro_batches(batch, rows):
                loss = self._loss(part, weight_T[part.token_T], reference, known, observed, log_ratios, phases)
                if not math.isfinite(float(loss.detach())):
                    raise TrainingError(
                        f"the loss is {float(loss.detach())} over sequences {part.rows[0]} to {part.rows[-1]} of the "
                        "batch; the step was not taken, weights and optimiser are as before it"
                    )
                with phases.measure("backward"):
                    loss.backward()
            scale = 1.0
            if self.recipe.vcpo_ess is not None:
                ratios = [torch.cat(parts) for parts in zip(*log_ratios, strict=True)]
                scale = vcpo_scale(ratios[0], ratios[1], on_policy_ess=self.recipe.vcpo_ess)
            with phases.measure("optimizer"):
                taken = self.weights.step(lr_scale=scale)
            known.steps += [taken] if taken is not None else []
        finally:
            self.weights.forget_gradients()

    def _loss(
        self,
        part: _Part,
        weight_T: Tensor,
        reference: Scored | None,
        known: _Known,
        observed: Observed | None,
        log_ratios: list[tuple[Tensor, Tensor]],
        phases: Phases,
    ) -> Tensor:
        """The share of the batch's loss that some sequences have, differentiable."""
        scored, batch = self._score(self.model, part.batch, phases), part.batch
        behaviour_T = batch.behaviour_logprobs_T.to(scored.logprobs_T)
        if known.proximal_T is not None:
            proximal_T = known.proximal_T[part.token_T]
        else:  # pi itself before the first step, a guess from it afterwards
            proximal_T = self._interpolated(scored.logprobs_T, behaviour_T, batch.version_T, known)
        log_ratio_T = proximal_T.double() - batch.behaviour_logprobs_T
        log_ratios.append((log_ratio_T, torch.tensor(part.rows)[batch.row_T]))
        if known.correction is None:
            correction = self.recipe.correct(log_ratio_T, batch.row_T)
        else:
            correction = known.correction.of(part.token_T)
        old_T = behaviour_T if self.recipe.old == OldPolicy.BYPASS else proximal_T
        if known.inside_T is not None:
            scored = replace(scored, inside_T=scored.inside_T & known.inside_T[part.token_T])
        # A token outside the kept set counts as ratio 1 in its sequence and has no gradient: both logprobs are mu's.
        scored = replace(scored, logprobs_T=torch.where(scored.inside_T, scored.logprobs_T, behaviour_T))
        old_T = torch.where(scored.inside_T, old_T, behaviour_T)
        advantage_T = batch.advantage_T.to(scored.logprobs_T)
        surrogate = self.recipe.surrogate(scored.logprobs_T, old_T, advantage_T, batch.row_T)
        loss_T = surrogate.loss_T * correction.weight_T.to(scored.logprobs_T)
        kl_T = self._kl(scored.logprobs_T, old_T, reference, part.token_T)
        total_T = loss_T + self.recipe.kl * kl_T - self.recipe.entropy * scored.entropy_T
        total_T = torch.where(scored.inside_T, total_T, 0.0)
        loss = (weight_T.to(total_T) * total_T).sum()
        if observed is not None:
            guessed = known.proximal_T is None and bool(known.steps)
            observed.add(
                part.token_T, scored, proximal_T, old_T, surrogate, correction, kl_T.detach(), float(loss.detach()),
                guessed=guessed,
            )  # fmt: skip
        return loss

    def _interpolated(self, logprobs_T: Tensor, behaviour_T: Tensor, version_T: Tensor, known: _Known) -> Tensor:
        """pi_prox from pi after some optimiser steps of this batch; before the first one it is pi."""
        steps = len(known.steps)
        if steps == 0:
            return logprobs_T.detach()
        return interpolated(
            logprobs_T,
            behaviour_T,
            version_T,
            proximal_version=self.version,
            current_version=self.version + steps / known.steps_planned,
        )

    def _kl(self, logprobs_T: Tensor, old_T: Tensor, reference: Scored | None, token_T: Tensor) -> Tensor:
        """The KL term; 0 where the reference keeps no such token, and the divergence is infinite: counted apart."""
        if reference is None:
            return torch.zeros_like(logprobs_T)
        reference_T = reference.logprobs_T[token_T]
        weight_T = (logprobs_T - old_T).exp() if self.recipe.kl_unbiased else None
        value_T = kl_term(logprobs_T, reference_T, estimator=self.recipe.kl_estimator, weight_T=weight_T)
        return torch.where(reference.inside_T[token_T], value_T, 0.0)

    def _correction(self, batch: TrainingBatch, proximal_T: Tensor) -> Correction:
        """The correction of the whole batch; sequences that take no part are dropped, and in no mean."""
        at_T = batch.kept_T.nonzero()[:, 0]
        log_ratio_T = proximal_T.double() - batch.behaviour_logprobs_T
        return self.recipe.correct(log_ratio_T[at_T], batch.row_T[at_T]).spread(at_T, len(log_ratio_T))


def _checkpoint_layers(model: LoadedModel) -> None:
    """Recompute each layer's activations in the backward pass. The layers alone are told that they train, so that
    nothing inside them (dropout) does."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(model.lm).__name__} offers no gradient checkpointing: leave it off")
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
