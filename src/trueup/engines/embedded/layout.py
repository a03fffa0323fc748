"""How the tokens of one engine step attend: each to its own sequence's slot, and what the step adds to it.

Shapes: T tokens of the step, H query heads, K key-value heads, D head width, L longest cached length, S decoding
sequences, N query tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.engines.embedded.cache import KVCache
from trueup.model.attention import KEY_TILE, QUERY_TILE, Shape, grouped_attention, tiled_attention, visible

SPARSE = 1.25
"""Slots up to the last one in use are read in place if there are at most this many times as many as sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tokens of one sequence in a step: positions start .. start + count - 1, into a slot."""

    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """Length of the sequence in the cache after the step."""
        return self.start + self.count


class StepLayout:
    """One step's tokens, single ones (decoding) first; rows after the last span are padding."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.single = [s for s in spans if s.count == 1]
        self.chunks = [s for s in spans if s.count > 1]
        assert list(spans) == [*self.single, *self.chunks], "single tokens come first"
        self.count = sum(s.count for s in spans)
        flat = [s.slot * cache.capacity + p for s in spans for p in range(s.start, s.end)]
        self.rows = torch.tensor(flat)
        self.slots = torch.tensor([s.slot for s in self.single])
        self._masks: dict[object, Tensor] = {}

    @staticmethod
    def visible(query_pos: Tensor, key_pos: Tensor, window: int | None) -> Tensor:
        """Which keys a query sees; see model/attention.py."""
        return visible(query_pos, key_pos, window)

    def positions(self) -> list[int]:
        """Position of each token in its sequence."""
        return [p for s in [*self.single, *self.chunks] for p in range(s.start, s.end)]

    def attend(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, shape: Shape) -> Tensor:
        """Write the step's keys and values, then return [T, H, D]; padding rows are 0."""
        keys, values = self.write(layer, key_KTD, value_KTD)
        out = query_HTD.new_zeros(query_HTD.shape[1], query_HTD.shape[0], query_HTD.shape[2])
        first = len(self.single)
        if self.single:
            out[:first] = self._decode(query_HTD[:, :first], keys, values, shape)
        for span in self.chunks:
            out[first : first + span.count] = self._chunk(
                span, query_HTD[:, first : first + span.count], keys, values, shape
            )
            first += span.count
        return out

    def write(self, layer: int, key_KTD: Tensor, value_KTD: Tensor) -> tuple[Tensor, Tensor]:
        """Put the step's keys and values where they belong and return the layer's [slots, capacity, K, D]."""
        keys, values = self.cache.layer(layer, key_KTD)
        for store, fresh in ((keys, key_KTD), (values, value_KTD)):
            store.view(-1, *store.shape[2:]).index_copy_(0, self.rows, fresh[:, : self.count].transpose(0, 1))
        return keys, values

    def _decode(self, query_HSD: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """One query a sequence, all sequences at once; reads the slots in place unless they lie far apart."""
        length = max(s.end for s in self.single)
        used = int(self.slots.max()) + 1
        query_SHD = query_HSD.transpose(0, 1)
        in_place = used <= SPARSE * len(self.single) + 2
        if in_place:
            keys, values = keys[:used, :length], values[:used, :length]
            dense = used == len(self.single) and bool((self.slots == torch.arange(used)).all())
            if not dense:
                query_SHD = query_SHD.new_zeros(used, *query_SHD.shape[1:]).index_copy_(0, self.slots, query_SHD)
        else:
            dense = True
            keys, values = keys[self.slots, :length], values[self.slots, :length]
        mask = self._decode_mask(shape.window, used if in_place else len(self.single), in_place, length)
        out = grouped_attention(query_SHD[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), mask, shape)[:, 0]
        return out if dense else out[self.slots]

    def _decode_mask(self, window: int | None, rows: int, in_place: bool, length: int) -> Tensor:
        if window not in self._masks:
            query = torch.zeros(rows, dtype=torch.long)
            at = torch.tensor([s.start for s in self.single])
            query[self.slots if in_place else torch.arange(rows)] = at
            self._masks[window] = self.visible(query[:, None], torch.arange(length)[None], window)[:, None]
        return self._masks[window]

    def _chunk(self, span: Span, query_HTD: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Several new tokens of one sequence."""
        key = (span, shape.window)
        if key not in self._masks:
            at = torch.arange(span.end)
            self._masks[key] = self.visible(at[span.start :, None], at[None], shape.window)[None]
        states = (keys[span.slot, : span.end].transpose(0, 1), values[span.slot, : span.end].transpose(0, 1))
        return grouped_attention(query_HTD[None], states[0][None], states[1][None], self._masks[key], shape)[0]


class TiledStepLayout(StepLayout):
    """The same in fixed tiles (bitwise mode): a decoding token sits in its row of a tile that is otherwise empty."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        super().__init__(cache, spans)
        tile_of: dict[tuple[int, int], int] = {}
        tile_T, row_T = [], []
        for span in [*self.single, *self.chunks]:
            for position in range(span.start, span.end):
                tile_T.append(tile_of.setdefault((span.slot, position // QUERY_TILE), len(tile_of)))
                row_T.append(position % QUERY_TILE)
        self.tile_T, self.row_T = torch.tensor(tile_T), torch.tensor(row_T)
        self.slot_N = torch.tensor([slot for slot, _ in tile_of])
        self.first_N = torch.tensor([tile * QUERY_TILE for _, tile in tile_of])
        self.key_tiles = -(-max(s.end for s in spans) // KEY_TILE)

    def attend(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, shape: Shape) -> Tensor:
        """Write the step's keys and values, then return [T, H, D]; padding rows are 0."""
        keys, values = self.write(layer, key_KTD, value_KTD)
        heads, total, width = query_HTD.shape
        query = query_HTD.new_zeros(len(self.slot_N), QUERY_TILE, heads, width)
        query[self.tile_T, self.row_T] = query_HTD[:, : self.count].transpose(0, 1)

        def tile(index: int) -> tuple[Tensor, Tensor]:
            at = slice(index * KEY_TILE, (index + 1) * KEY_TILE)
            return keys[self.slot_N, at].transpose(1, 2), values[self.slot_N, at].transpose(1, 2)

        found = tiled_attention(query.transpose(1, 2), tile, self.first_N, self.key_tiles, shape)
        out = query_HTD.new_zeros(total, heads, width)
        out[: self.count] = found.transpose(1, 2)[self.tile_T, self.row_T].to(out.dtype)
        return out
