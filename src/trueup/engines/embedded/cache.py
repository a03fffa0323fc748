"""Keys and values of the running sequences, and the prefixes that later sequences may start from.

Each sequence owns a slot: a row of `capacity` positions in every layer, written in place and never concatenated. Pages
of a slot that were never written take no memory. A prefix is a copy of a finished prompt's slot, kept under the weight
version that computed it: a hit never reuses state from other weights.

Shapes: K key-value heads, D head width, T tokens of a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trueup.model.attention import KEY_TILE

MIN_PREFIX = 16
"""Prompts are only looked up by a common beginning of at least this many tokens (members of a group by any)."""
ALIGNMENT = 64


class KVCache:
    """Slots of keys and values, layer by layer; layers are allocated when they are first written."""

    def __init__(self, *, slots: int, capacity: int, dtype: torch.dtype) -> None:
        self.slots, self.dtype = slots, dtype
        self.capacity = -(-capacity // KEY_TILE) * KEY_TILE
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like_KTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [slots, capacity, K, D] of a layer, made to fit `like_KTD`."""
        if index not in self._layers:
            shape = (self.slots, self.capacity, like_KTD.shape[0], like_KTD.shape[2])
            self._layers[index] = (_zeros(shape, self.dtype), _zeros(shape, self.dtype))
        return self._layers[index]

    @torch.inference_mode()
    def wipe(self, slot: int) -> None:
        """Zero a slot, all of it."""
        for keys, values in self._layers.values():
            keys[slot].zero_()
            values[slot].zero_()

    def save(self, slot: int, count: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Copy the first `count` positions of a slot."""
        return {i: (k[slot, :count].clone(), v[slot, :count].clone()) for i, (k, v) in self._layers.items()}

    def restore(self, slot: int, count: int, saved: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Write the first `count` positions of a copy into a slot."""
        for index, (keys, values) in saved.items():
            own_keys, own_values = self._layers[index]
            own_keys[slot, :count] = keys[:count]
            own_values[slot, :count] = values[:count]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the system gives out when they are written (torch.zeros would touch them all)."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


@dataclass(frozen=True, kw_only=True)
class _Prefix:
    tokens: np.ndarray
    owner: Hashable
    salt: str | None
    saved: dict[int, tuple[Tensor, Tensor]]


class PrefixStore:
    """Prompts computed under the current weight version, least recently used first out."""

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.hit_tokens = 0
        self._entries: OrderedDict[int, _Prefix] = OrderedDict()
        self._tokens = 0
        self._next = 0
        self._version = 0

    def put(
        self,
        version: int,
        tokens: Sequence[int],
        owner: Hashable,
        saved: dict[int, tuple[Tensor, Tensor]],
        *,
        salt: str | None = None,
    ) -> None:
        """Keep a prompt's state; it replaces nothing and may push out the least recently used."""
        self._enter(version)
        self._entries[self._next] = _Prefix(tokens=np.asarray(tokens), owner=owner, salt=salt, saved=saved)
        self._next += 1
        self._tokens += len(tokens)
        while self._tokens > self.max_tokens and len(self._entries) > 1:
            self._tokens -= len(self._entries.popitem(last=False)[1].tokens)

    def holds(self, version: int, tokens: Sequence[int], salt: str | None = None) -> bool:
        """Whether just this prompt is kept already, long enough for whoever asks for it."""
        self._enter(version)
        return len(tokens) > MIN_PREFIX and any(
            entry.salt == salt and np.array_equal(entry.tokens, tokens) for entry in self._entries.values()
        )

    def find(
        self, version: int, tokens: Sequence[int], owner: Hashable, *, shared: bool, salt: str | None = None
    ) -> tuple[int, dict[int, tuple[Tensor, Tensor]]]:
        """Return (positions, state) of the longest known beginning of a prompt, at most all of it but one token.

        `shared` allows prefixes of other owners, with the same salt. (0, {}) if there is none.
        """
        self._enter(version)
        best, chosen = 0, -1
        wanted = np.asarray(tokens[:-1])
        for key, entry in self._entries.items():
            own = entry.owner == owner
            if entry.salt != salt or not (own or shared):
                continue
            count = min(len(wanted), len(entry.tokens))
            differ = np.nonzero(wanted[:count] != entry.tokens[:count])[0]
            common = int(differ[0]) if len(differ) else count
            if common > best and (own or common >= MIN_PREFIX):
                best, chosen = common, key
        if chosen < 0:
            return 0, {}
        self._entries.move_to_end(chosen)
        self.hit_tokens += best
        return best, self._entries[chosen].saved

    def drop(self, owner: Hashable) -> None:
        """Forget an owner's prompts."""
        for key in [k for k, e in self._entries.items() if e.owner == owner]:
            self._tokens -= len(self._entries.pop(key).tokens)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._tokens = 0

    def _enter(self, version: int) -> None:
        if version != self._version:
            self.clear()
            self._version = version
