"""Engines' arithmetic, imitated: a float32 body in which one thing is rounded the way some kernel rounds it.

Each simulation patches a loaded float32 model for the length of a `with` block. They answer one question: would this
rounding, and nothing else, move the logprobs the way the engine's are moved?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trueup.errors import ModelError
from trueup.model.altered import alter
from trueup.model.load import LoadedModel

ATTENTION = "trueup_bf16_softmax"


def round_bf16(x: Tensor) -> Tensor:
    """Round to the nearest bfloat16 (ties to even), kept in the dtype of `x`."""
    return x.bfloat16().to(x.dtype)


def truncate_bf16(x: Tensor) -> Tensor:
    """Drop the low 16 bits of float32: bfloat16 rounded toward zero, as x86 kernels without AVX512-BF16 store it."""
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32)


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and weight is not None and tuple(weight.shape) == (width,)


def _norms(model: LoadedModel) -> list[nn.Module]:
    width = model.weight_VD.shape[1]
    found = [m for m in model.body.modules() if _is_norm(m, width)]
    if not found:
        raise ModelError(f"{type(model.lm).__name__} has no norm layers that the simulation knows")
    return found


def _named(model: LoadedModel, suffix: str) -> list[nn.Module]:
    return [m for n, m in model.body.named_modules() if n.rsplit(".", 1)[-1] == suffix]


def _round_residual(model: LoadedModel, stack: ExitStack) -> None:
    """Truncate the residual stream where it is written back: in place, on its way into each norm."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].copy_(truncate_bf16(args[0]))

    for norm in _norms(model):
        stack.callback(norm.register_forward_pre_hook(before).remove)


def _truncate_kernels(model: LoadedModel, stack: ExitStack) -> None:
    """Truncate the residual stream, the norms' outputs and the activation's output."""
    _round_residual(model, stack)
    for norm in _norms(model):
        stack.callback(norm.register_forward_hook(lambda m, a, out: truncate_bf16(out)).remove)
    for down in _named(model, "down_proj"):
        stack.callback(down.register_forward_pre_hook(lambda m, args: (truncate_bf16(args[0]), *args[1:])).remove)


def _round_rotary(model: LoadedModel, stack: ExitStack) -> None:
    """Hold the cosine and sine tables in bfloat16."""
    tables = _named(model, "rotary_emb")
    if not tables:
        raise ModelError(f"{type(model.lm).__name__} has no rotary tables that the simulation knows")
    for rotary in tables:
        handle = rotary.register_forward_hook(lambda m, a, out: tuple(round_bf16(x) for x in out))
        stack.callback(handle.remove)


def _round_norm(model: LoadedModel, stack: ExitStack) -> None:
    """Round a norm's output to bfloat16 twice, before and after its weight, from a bfloat16 input."""

    def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return round_bf16(round_bf16(out / weight) * weight)

    for norm in _norms(model):
        _require_plain_scale(norm)
        stack.callback(norm.register_forward_hook(after).remove)


def _require_plain_scale(norm: nn.Module) -> None:
    """Refuse norms whose output is not weight times a unit-rms vector (Gemma scales by 1 + weight)."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    probe = torch.linspace(-1, 1, len(weight), device=weight.device)[None]
    expected = weight * probe * probe.square().mean().rsqrt()
    if not bool((weight != 0).all()) or not torch.allclose(norm(probe), expected, rtol=1e-2, atol=1e-4):
        raise ModelError(f"{type(norm).__name__} is no plain RMS norm")


def _bf16_softmax_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, :, : key.shape[-2]]
    weights = round_bf16(round_bf16(scores).softmax(-1))
    return (weights @ value).transpose(1, 2).contiguous(), None


def _round_softmax(model: LoadedModel, stack: ExitStack) -> None:
    """Round attention scores and probabilities to bfloat16."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    AttentionInterface.register(ATTENTION, _bf16_softmax_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    before = model.lm.config._attn_implementation
    model.lm.set_attn_implementation(ATTENTION)
    stack.callback(model.lm.set_attn_implementation, before)


ROUNDINGS: dict[str, tuple[str, Callable[[LoadedModel, ExitStack], None]]] = {
    "residual_truncated": ("residual stream stored in bf16 by truncation, not rounding", _round_residual),
    "kernels_truncated": ("bf16 stores truncate (residual stream, norms, activation), not round", _truncate_kernels),
    "rotary_bf16": ("rotary cosine and sine tables held in bf16", _round_rotary),
    "softmax_bf16": ("attention scores and probabilities rounded to bf16", _round_softmax),
    "norm_bf16": ("norm output rounded to bf16 before and after its weight", _round_norm),
}
"""Name to (what it imitates, how to patch a model)."""


@contextmanager
def simulate(model: LoadedModel, name: str, value: float = 0.0) -> Iterator[None]:
    """Patch a model so that it computes as `name` of ROUNDINGS, ALTERATIONS or ROTARY says; undone on exit.

    Roundings are imitated in float32. Raises ModelError for another dtype then, and for an architecture the patch does
    not know.
    """
    if name in ROUNDINGS and model.dtype != torch.float32:
        raise ModelError("roundings are imitated in a float32 body")
    with ExitStack() as stack:
        if not alter(model, stack, name, value):
            ROUNDINGS[name][1](model, stack)
        yield
