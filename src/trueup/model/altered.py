"""Engines' configuration, got wrong: a model whose attention, cache or embedding is not the checkpoint's.

Each patches a loaded float32 model for the length of a `with` block, with one number as parameter; simulate.py lists
them beside the imitated roundings. Causal batches start at position 0 and are padded on the right.

Shapes: B rows, H heads, K key-value heads, L positions, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from trueup.model import rotary
from trueup.model.load import LoadedModel

ATTENTION = "trueup_altered"
FLOAT8 = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}
"""By number of exponent bits."""
Edit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def embedding_scale(model: LoadedModel, stack: ExitStack, factor: float) -> None:
    """Input embeddings multiplied by a factor."""
    embedding = model.lm.get_input_embeddings()
    stack.callback(embedding.register_forward_hook(lambda m, a, out: out * factor).remove)


def _attention(edit: Edit, scale: float | None, width: Callable[[int | None], int | None]) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        length, softcap = query.shape[2], kwargs.get("softcap")
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if (window := width(kwargs.get("sliding_window"))) is not None:
            causal = causal.triu(1 - window)
        key, value, seen = edit(key, value, causal)
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * (scaling if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    return attend


def _attend(
    model: LoadedModel, stack: ExitStack, edit: Edit, *, scale: float | None = None,
    width: Callable[[int | None], int | None] = lambda own: own,
) -> None:  # fmt: skip
    """Attend otherwise; `width` gives a layer's window from its own (None: it sees everything)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    AttentionInterface.register(ATTENTION, _attention(edit, scale, width))
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
    _attend(model, stack, _plain, width=lambda own: int(width))


def window_ignored(model: LoadedModel, stack: ExitStack, unused: float) -> None:
    """Layers that have a window see everything."""
    _attend(model, stack, _plain, width=lambda own: None)


def window_resized(model: LoadedModel, stack: ExitStack, width: float) -> None:
    """Layers that have a window have another one."""
    _attend(model, stack, _plain, width=lambda own: None if own is None else int(width))


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


Alteration = Callable[[LoadedModel, ExitStack, float], None]
ALTERATIONS: dict[str, tuple[str, Alteration]] = {
    "embedding_scale": ("input embeddings multiplied by {:.4g}", embedding_scale),
    "kv_float8": ("keys and values kept in 8 bits ({:g} exponent bits)", kv_float8),
    "window": ("attention that sees the last {:g} positions only", window),
    "window_ignored": ("attention that sees everything in the layers that should have a window", window_ignored),
    "window_resized": ("a window of {:g} positions in the layers that have one", window_resized),
    "attention_scale": ("attention scores scaled by {:g} (0: 1/width) instead of 1/sqrt(width)", attention_scale),
    "skips_self": ("attention in which a token does not see itself", skips_self),
    "skips_first": ("attention that does not see the first token", skips_first),
}
"""Name to (what it is, with the parameter; how to patch a model)."""
ROTARY: dict[str, tuple[str, Callable[[LoadedModel, ExitStack, float, str], None]]] = {
    "rope_theta": ("rotary base {:g}", rotary.rope_theta),
    "rope_linear": ("rotary positions divided by {:g}", rotary.rope_linear),
    "rope_dummy": ("a rotary table that holds {:g} everywhere: it was never computed", rotary.rope_dummy),
    "rope_unscaled": ("rotary positions without the scaling of the configuration", rotary.rope_unscaled),
    "rope_yarn": ("rotary positions scaled by YaRN with factor {:g}", rotary.rope_yarn),
    "rope_llama3": ("rotary positions scaled as in Llama 3 with factor {:g}", rotary.rope_llama3),
    "rope_declared": ("the rotary parameters that its own flags declare", rotary.rope_declared),
}
"""The same for rotary tables; after an @ the name says in which type of layer, or which parameters were declared."""


def words_of(name: str, value: float) -> str:
    """Describe an alteration, e.g. words_of("rope_theta@sliding_attention", 1e4)."""
    kind, _, rest = name.partition("@")
    words = {**ALTERATIONS, **ROTARY}[kind][0].format(value)
    return words if not rest or kind == "rope_declared" else f"{words} in {rest} layers"


def alter(model: LoadedModel, stack: ExitStack, name: str, value: float) -> bool:
    """Patch a model by the alteration called `name`; return False if there is none. Raises ModelError if the model
    cannot be patched so."""
    kind, _, rest = name.partition("@")
    if kind in ALTERATIONS:
        ALTERATIONS[kind][1](model, stack, value)
    elif kind in ROTARY:
        ROTARY[kind][1](model, stack, value, rest)
    return kind in ALTERATIONS or kind in ROTARY
