"""The attention function that trainer and embedded engine share, behind transformers' attention interface.

A model that was passed to `use_layouts` attends through a `Layout`: an object given to the body's forward call that
knows which tokens belong together. `PackedLayout` (here) is the trainer's: sequences one after another, each causal,
which may share a beginning.
The engine's layout keeps a cache (engines/embedded/cache.py). Without a layout a batch is plain causal.

Shapes: T packed tokens, H query heads, K key-value heads, G = H / K, N query tiles, L cached length, D head width.
Scores and softmax are float32 whatever the dtype of the states.

Fixed tiles (`tiled_attention`) make a token's result independent of its neighbours, of chunking and of where in a batch
it is computed: queries in tiles of 16 counted from position 0, keys in tiles of 64, combined by the online softmax
(Milakov and Gimelshein, arXiv 1805.02867) tile after tile. A tile that a query may not see changes nothing: it scales
by exp(0) and adds 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trueup.errors import ModelError

NAME = "trueup"
QUERY_TILE = 16
KEY_TILE = 64
UNSTABLE_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a layer asks of its attention: scale of the scores, window of positions seen (None: all), soft-cap."""

    scaling: float
    window: int | None
    softcap: float | None


class Layout(Protocol):
    """Which tokens attend to which, for one forward pass."""

    def attend(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, shape: Shape) -> Tensor:
        """Return [T, H, D]."""
        ...


def use_layouts(lm: Any) -> None:
    """Route every layer of a transformers model through layouts.

    Raises ModelError for a model whose attention or positions are not a function of a token's own context.
    """
    from transformers import AttentionInterface

    rope = getattr(lm.config, "rope_parameters", None) or {}
    kinds = {str(v.get("rope_type")) for v in [rope, *rope.values()] if isinstance(v, dict)}
    if kinds & set(UNSTABLE_ROPE):
        raise ModelError(
            f"rope type {sorted(kinds & set(UNSTABLE_ROPE))[0]} depends on the longest sequence of the batch: a "
            "token's logprob would depend on its neighbours"
        )
    if getattr(lm.config, "attention_chunk_size", None):
        raise ModelError(f"{type(lm).__name__} attends in chunks of its own, which is not supported")
    if not getattr(lm, "_supports_attention_backend", False):
        raise ModelError(f"{type(lm).__name__} does not let its attention function be chosen; use another engine")
    AttentionInterface.register(NAME, _attention)
    lm.set_attn_implementation(NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: states [B, heads, T, D] in, [B, T, H, D] out."""
    if others.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} uses attention sinks, which are not supported")
    if dropout:
        raise ModelError("attention dropout must be off: logprobs would be random")
    shape = Shape(scaling=scaling, window=sliding_window, softcap=softcap)
    if layout is None:
        count = query.shape[2]
        rows = [
            PackedLayout(lengths=(count,)).attend(0, *states, shape) for states in zip(query, key, value, strict=True)
        ]
        return torch.stack(rows), None
    assert query.shape[0] == 1, "a layout describes one packed row of tokens"
    layer: int = module.layer_idx  # type: ignore[assignment]
    return layout.attend(layer, query[0], key[0], value[0], shape)[None], None


def visible(query_pos: Tensor, key_pos: Tensor, window: int | None) -> Tensor:
    """True where a query may see a key: not later than itself, and within the window; shapes broadcast."""
    seen = key_pos <= query_pos
    return seen if window is None else seen & (key_pos > query_pos - window)


def grouped_attention(
    query_BHQD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, mask_BQL: Tensor, shape: Shape
) -> Tensor:
    """Attention of B independent rows with grouped queries and a boolean mask; returns [B, Q, H, D].

    The G query heads that share a key head become extra queries of that head: keys are never copied.
    """
    batch, heads, queries, width = query_BHQD.shape
    groups = heads // key_BKLD.shape[1]
    folded = query_BHQD.reshape(batch, -1, groups * queries, width)
    mask = mask_BQL[:, None] if groups == 1 or queries == 1 else mask_BQL.repeat(1, groups, 1)[:, None]
    if shape.softcap is None:
        bias = torch.zeros(mask.shape, dtype=folded.dtype, device=folded.device).masked_fill_(~mask, -math.inf)
        out = F.scaled_dot_product_attention(folded, key_BKLD, value_BKLD, attn_mask=bias, scale=shape.scaling)
    else:
        scores = (folded.float() @ key_BKLD.float().transpose(2, 3)) * shape.scaling
        scores = (torch.tanh(scores / shape.softcap) * shape.softcap).masked_fill(~mask, -math.inf)
        out = (scores.softmax(-1) @ value_BKLD.float()).to(folded.dtype)
    return out.reshape(batch, heads, queries, width).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """Segments one after another, each causal. `tiled` fixes the arithmetic (bitwise mode).

    A segment is a sequence from position 0 or, where `parents` names an earlier segment for it, a continuation of that
    one, which several may share: a group's prompt followed by its completions. Without `parents` none has one.
    """

    lengths: tuple[int, ...]
    parents: tuple[int | None, ...] = ()
    tiled: bool = False

    def __post_init__(self) -> None:
        for index, parent in enumerate(self.parents):
            assert parent is None or (parent < index and self.parents[parent] is None), "a parent is a first segment"

    def offsets(self) -> list[int]:
        """Position of each segment's first token in its sequence."""
        return [0 if parent is None else self.lengths[parent] for parent in self.parents or [None] * len(self.lengths)]

    def positions(self) -> list[int]:
        """Position of every token in its sequence, [T]."""
        pairs = zip(self.offsets(), self.lengths, strict=True)
        return [offset + at for offset, length in pairs for at in range(length)]

    def attend(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, shape: Shape) -> Tensor:
        """Return [T, H, D], differentiable in all three."""
        if self.tiled:
            return _TiledPacked.apply(query_HTD, key_KTD, value_KTD, self, shape)
        return _packed(query_HTD, key_KTD, value_KTD, self, shape)


def _segments(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: PackedLayout
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each segment's offset, its queries, and the keys and values of its whole sequence so far."""
    queries, keys, values = (t.split(list(layout.lengths), dim=1) for t in (query_HTD, key_KTD, value_KTD))
    for index, offset in enumerate(layout.offsets()):
        parent = layout.parents[index] if layout.parents else None
        if parent is None:
            yield offset, queries[index], keys[index], values[index]
        else:
            both = [torch.cat([t[parent], t[index]], dim=1) for t in (keys, values)]
            yield offset, queries[index], both[0], both[1]


def _packed(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: PackedLayout, shape: Shape) -> Tensor:
    parts = []
    for offset, query, key, value in _segments(query_HTD, key_KTD, value_KTD, layout):
        at = torch.arange(key.shape[1], device=query.device)
        mask = visible(at[offset:, None], at[None], shape.window)
        parts.append(grouped_attention(query[None], key[None], value[None], mask[None], shape)[0])
    return torch.cat(parts)


def tiled_attention(
    query_NHQD: Tensor, keys: Callable[[int], tuple[Tensor, Tensor]], first_N: Tensor, tiles: int, shape: Shape
) -> Tensor:
    """Attention of N query tiles of 16 positions each; `first_N`, multiples of 16, are their first queries' positions.

    `keys(j)` gives keys and values [N, K, 64, D] of positions 64 j to 64 j + 63, in any dtype but finite even where no
    token lies. Rows of a tile that are not wanted may hold anything finite. Returns float32 [N, H, 16, D].
    """
    count, heads, _, width = query_NHQD.shape
    query_pos = (first_N[:, None] + torch.arange(QUERY_TILE, device=first_N.device))[:, :, None]
    folded: Tensor | None = None
    for tile in range(tiles):
        key, value = (t.float() for t in keys(tile))
        groups = heads // key.shape[1]
        if folded is None:
            folded = query_NHQD.float().reshape(-1, groups * QUERY_TILE, width)
            total = folded.new_zeros(folded.shape[:2])
            top = torch.full_like(total, -1e30)
            out = torch.zeros_like(folded)
        scores = torch.bmm(folded, key.reshape(-1, KEY_TILE, width).transpose(1, 2)) * shape.scaling
        if shape.softcap is not None:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        key_pos = torch.arange(tile * KEY_TILE, (tile + 1) * KEY_TILE, device=first_N.device)
        hidden = ~visible(query_pos, key_pos, shape.window)
        scores = scores.view(count, -1, groups, QUERY_TILE, KEY_TILE).masked_fill(hidden[:, None, None], -math.inf)
        scores = scores.view(-1, groups * QUERY_TILE, KEY_TILE)
        new_top = torch.maximum(top, scores.amax(2))
        rescale = (top - new_top).exp()
        weight = (scores - new_top[:, :, None]).exp()
        total = total * rescale + weight.sum(2)
        out = out * rescale[:, :, None] + torch.bmm(weight, value.reshape(-1, KEY_TILE, width))
        top = new_top
    assert folded is not None, "a query tile sees at least one key tile"
    return (out / total.clamp_min(1e-30)[:, :, None]).view(count, heads, QUERY_TILE, width)


class _TiledPacked(torch.autograd.Function):
    """Packed attention whose forward is tile by tile, and whose backward is that of plain attention."""

    @staticmethod
    def forward(
        ctx: Any, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: PackedLayout, shape: Shape
    ) -> Tensor:
        ctx.save_for_backward(query_HTD, key_KTD, value_KTD)
        ctx.layout, ctx.shape = layout, shape
        parts = []
        for offset, query, key, value in _segments(query_HTD, key_KTD, value_KTD, layout):
            first_tile, before = divmod(offset, QUERY_TILE)
            rows = before + query.shape[1]
            tiles = math.ceil(rows / QUERY_TILE)
            padded = F.pad(query, (0, 0, before, tiles * QUERY_TILE - rows))
            query_NHQD = padded.unflatten(1, (tiles, QUERY_TILE)).transpose(0, 1)
            key_tiles = math.ceil(key.shape[1] / KEY_TILE)
            cache = [_pad(t, key_tiles * KEY_TILE) for t in (key, value)]

            def keys(tile: int, cache: list[Tensor] = cache, tiles: int = tiles) -> tuple[Tensor, Tensor]:
                at = slice(tile * KEY_TILE, (tile + 1) * KEY_TILE)
                first, second = (t[None, :, at].expand(tiles, -1, -1, -1) for t in cache)
                return first, second

            first_N = (first_tile + torch.arange(tiles, device=query.device)) * QUERY_TILE
            out = tiled_attention(query_NHQD, keys, first_N, key_tiles, shape)
            parts.append(out.transpose(1, 2).reshape(-1, *out.shape[1::2])[before:rows].to(query.dtype))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = _packed(states[0], states[1], states[2], ctx.layout, ctx.shape)
        return (*torch.autograd.grad(out, states, grads[0]), None, None)


def _pad(states: Tensor, length: int) -> Tensor:
    """Append zeros to dimension 1."""
    return F.pad(states, (0, 0, 0, length - states.shape[1]))
