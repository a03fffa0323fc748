"""The precision contract: float32 masters and optimiser state, rounded values in the forward pass and in the engine.

The forward pass of a bfloat16 trainer runs on the masters rounded to nearest, which are what is published: trainer and
engine hold the same numbers. Gradients of micro-batches are added in float32. A float32 trainer has no second copy.

A pure-bfloat16 optimiser would lose most updates: at a learning rate of 1e-6 a step is smaller than half the distance
between neighbouring bfloat16 numbers wherever |w| >= 4.9e-4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trueup.errors import TrainingError
from trueup.knobs import OptimizerConfig
from trueup.model.load import LoadedModel

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What one optimiser step did: norm of the gradient before clipping, the factor clipping applied, the rate."""

    grad_norm: float
    clip_factor: float
    lr: float


class MasterWeights:
    """Masters of a model's parameters with AdamW; the model's own parameters are the rounded values."""

    def __init__(self, model: LoadedModel, settings: OptimizerConfig) -> None:
        """Take the model's values as masters and switch its gradients on."""
        self.model, self.settings = model, settings
        self.steps = 0
        self._own = dict(model.lm.named_parameters())
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in self._own.items():
            parameter.requires_grad_(True)
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(self._collect(self.masters[name]))
        decay = [m for m in self.masters.values() if m.ndim >= 2]
        rest = [m for m in self.masters.values() if m.ndim < 2]
        groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )

    @staticmethod
    def _collect(master: nn.Parameter):  # type: ignore[no-untyped-def]  # noqa: ANN205
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return add

    def forget_gradients(self) -> None:
        """Drop what was accumulated."""
        for master in self.masters.values():
            master.grad = None

    def step(self, *, lr_scale: float = 1.0) -> StepNumbers | None:
        """Clip, update the masters, round them into the model, and drop the gradients.

        A gradient of exactly zero takes no step (None): momentum and decay would move the policy without a reason.
        Raises TrainingError, with nothing changed, when the gradient is not finite or there is none.
        """
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        if not gradients:
            raise TrainingError("no gradient: backward was not called")
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            bad = [n for n, m in self.masters.items() if m.grad is not None and not bool(torch.isfinite(m.grad).all())]
            self.forget_gradients()
            raise TrainingError(
                f"the gradient is not finite, first in {bad[0] if bad else 'its norm'} ({len(bad)} tensors); the step "
                "was not taken, weights and optimiser are as before it"
            )
        if norm == 0:
            self.forget_gradients()
            return None
        factor = min(1.0, self.settings.clip_norm / (norm + 1e-6))
        if factor < 1:
            torch._foreach_mul_(gradients, factor)
        lr = self.settings.lr * lr_scale * min(1.0, (self.steps + 1) / max(1, self.settings.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.steps += 1
        self.forget_gradients()
        self._round()
        return StepNumbers(grad_norm=norm, clip_factor=factor, lr=lr)

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self._own.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def published(self) -> dict[str, Tensor]:
        """The tensors of a weight version: the values that the forward pass uses."""
        return {name: tensor.detach() for name, tensor in self.model.stored_tensors().items()}

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint: "master.NAME", "exp_avg.NAME", "exp_avg_sq.NAME"."""
        found = {f"master.{name}": m.detach() for name, m in self.masters.items()}
        for name, master in self.masters.items():
            own = self._optimizer.state.get(master, {})
            found |= {f"{moment}.{name}": own.get(moment, torch.zeros_like(master)).detach() for moment in MOMENTS}
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], *, steps: int) -> None:
        """Take up what `state` gave after `steps` optimiser steps.

        Raises TrainingError, with nothing changed, when it is of another model.
        """
        expected = {name: tuple(t.shape) for name, t in self.state().items()}
        odd = sorted(expected.keys() ^ state.keys())
        if odd:
            raise TrainingError(f"the checkpoint is of another model: {odd[0]} is in one of the two only ({len(odd)})")
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape:
                raise TrainingError(
                    f"the checkpoint is of another model: {name} is {tuple(state[name].shape)}, this one's {shape}"
                )
        for name, master in self.masters.items():
            master.copy_(state[f"master.{name}"])
            self._optimizer.state[master] = {"step": torch.tensor(float(steps))} | {
                moment: state[f"{moment}.{name}"].clone() for moment in MOMENTS
            }
        self.steps = steps
        self._round()
