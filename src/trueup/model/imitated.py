"""16 bits on a CPU that has no instructions for them: a float32 body whose results are rounded as a 16-bit body's are.

Without such instructions a product in bfloat16 takes ten times as long as in float32. Rounded here are what linear
layers, norms and activations take and give, rotary tables, and the residual stream. What attention kernels round
internally is not imitated.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trueup.model.load import LoadedModel


def imitated(model: LoadedModel) -> LoadedModel:
    """A float32 copy of a 16-bit model, whose hidden states are float32 tensors that hold values of the model's dtype.

    For machines where `policy.head.multiplies` says no.
    """
    lm = copy.deepcopy(model.lm).float()
    _round_results(lm.base_model, model.dtype)
    return replace(model, lm=lm, body=lm.base_model, weight_VD=lm.get_output_embeddings().weight)


def _round_results(body: nn.Module, dtype: torch.dtype) -> None:
    """Hooks for good: the copy is used for nothing else."""

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(rounded, value))
        return value.to(dtype).to(value.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def on_the_way_in(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(rounded, args))

    def in_place(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0].is_contiguous():  # the residual stream goes on from the same tensor
            args[0].copy_(rounded(args[0]))

    def on_the_way_out(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return rounded(out)

    for name, module in body.named_modules():
        kind, linear = type(module).__name__, isinstance(module, nn.Linear)
        if isinstance(scale := getattr(module, "embed_scale", None), Tensor):
            scale.copy_(rounded(scale))
        if linear or "Norm" in kind:
            module.register_forward_pre_hook(on_the_way_in if linear else in_place)
        rounds = linear or any(word in kind for word in ("Norm", "Rotary", "Experts"))
        if rounds or name.rsplit(".", 1)[-1] in ("act_fn", "act"):
            module.register_forward_hook(on_the_way_out)
