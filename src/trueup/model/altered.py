"""Engines' configuration, got wrong: a model whose rotary table, attention, cache or embedding is not the checkpoint's.

Each patches a loaded float32 model for the length of a `with` block, with one number as parameter; simulate.py lists
them beside the imitated roundings. Causal batches start at position 0 and are padded on the right.

Shapes: B rows, H heads, K key-value heads, L positions, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from trueup.errors import ModelError
from trueup.model.load import LoadedModel

ATTENTION = "trueup_altered"
FLOAT8 = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}
"""By number of exponent bits."""
Edit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _tables(model: LoadedModel) -> list[tuple[nn.Module, str, Tensor]]:
    """Every rotary frequency table: (module, buffer name, frequencies)."""
    found = [
        (module, name, buffer)
        for module in model.body.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]
    if not found:
        raise ModelError(f"{type(model.lm).__name__} has no rotary table that the simulation knows")
    return found


def _replace_tables(model: LoadedModel, stack: ExitStack, change: Callable[[Tensor], Tensor]) -> None:
    for module, name, buffer in _tables(model):
        stack.callback(setattr, module, name, buffer)
        setattr(module, name, change(buffer))


def rope_theta(model: LoadedModel, stack: ExitStack, theta: float) -> None:
    """Rotary frequencies theta^(-2i/d) of another base (RoFormer, arXiv 2104.09864, equation 15)."""
    _replace_tables(model, stack, lambda t: theta ** -(torch.arange(len(t), dtype=torch.float64) / len(t)).to(t.device))


def rope_linear(model: LoadedModel, stack: ExitStack, factor: float) -> None:
    """Positions divided by a factor (position interpolation, arXiv 2306.15595)."""
    _replace_tables(model, stack, lambda table: table / factor)


def rope_dummy(model: LoadedModel, stack: ExitStack, value: float) -> None:
    """A rotary table that was never computed: one value everywhere."""
    _replace_tables(model, stack, lambda table: torch.full_like(table, value))


def embedding_scale(model: LoadedModel, stack: ExitStack, factor: float) -> None:
    """Input embeddings multiplied by a factor."""
    embedding = model.lm.get_input_embeddings()
    stack.callback(embedding.register_forward_hook(lambda m, a, out: out * factor).remove)


def _attention(edit: Edit, scale: float | None) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
        **kwargs: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        length = query.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        key, value, seen = edit(key, value, causal)
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * (scaling if scale is None else scale)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    return attend


def _attend(model: LoadedModel, stack: ExitStack, edit: Edit, *, scale: float | None = None) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    AttentionInterface.register(ATTENTION, _attention(edit, scale))
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    before = model.lm.config._attn_implementation
    model.lm.set_attn_implementation(ATTENTION)
    stack.callback(model.lm.set_attn_implementation, before)


def _plain(key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return key, value, seen


def kv_float8(model: LoadedModel, stack: ExitStack, exponent_bits: float) -> None:
    """Keys and values kept in 8 bits without a scale: e4m3 (parameter 4) or e5m2 (5)."""
    kind = FLOAT8[int(exponent_bits)]

    def edit(key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        limit = torch.finfo(kind).max
        return key.clamp(-limit, limit).to(kind).to(key), value.clamp(-limit, limit).to(kind).to(value), seen

    _attend(model, stack, edit)


def window(model: LoadedModel, stack: ExitStack, width: float) -> None:
    """Every layer sees the last `width` positions only, itself included."""

    def edit(key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return key, value, seen & seen.new_ones(seen.shape).triu(1 - int(width))

    _attend(model, stack, edit)


def attention_scale(model: LoadedModel, stack: ExitStack, factor: float) -> None:
    """Scores multiplied by `factor` in place of 1/sqrt(head width); 0 stands for the inverse width."""
    width = model.lm.config.hidden_size // model.lm.config.num_attention_heads
    width = getattr(model.lm.config, "head_dim", None) or width
    _attend(model, stack, _plain, scale=factor or 1.0 / width)


def skips_self(model: LoadedModel, stack: ExitStack, unused: float) -> None:
    """A token does not see itself (the first one does)."""

    def edit(key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = seen.tril(-1)
        seen[0, 0] = True
        return key, value, seen

    _attend(model, stack, edit)


def skips_first(model: LoadedModel, stack: ExitStack, unused: float) -> None:
    """Later tokens do not see the first one."""

    def edit(key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = seen.clone()
        seen[1:, 0] = False
        return key, value, seen

    _attend(model, stack, edit)


ALTERATIONS: dict[str, tuple[str, Callable[[LoadedModel, ExitStack, float], None]]] = {
    "rope_theta": ("rotary base {:g}", rope_theta),
    "rope_linear": ("rotary positions divided by {:g}", rope_linear),
    "rope_dummy": ("a rotary table that holds {:g} everywhere: it was never computed", rope_dummy),
    "embedding_scale": ("input embeddings multiplied by {:.4g}", embedding_scale),
    "kv_float8": ("keys and values kept in 8 bits ({:g} exponent bits)", kv_float8),
    "window": ("attention that sees the last {:g} positions only", window),
    "attention_scale": ("attention scores scaled by {:g} (0: 1/width) instead of 1/sqrt(width)", attention_scale),
    "skips_self": ("attention in which a token does not see itself", skips_self),
    "skips_first": ("attention that does not see the first token", skips_first),
}
"""Name to (what it is, with the parameter; how to patch a model)."""
