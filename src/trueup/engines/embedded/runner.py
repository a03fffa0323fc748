"""The model inside the engine: one forward pass over a step's tokens, and the swap of its weights.

Shapes: T tokens of a step, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trueup.engines.embedded.cache import KVCache
from trueup.engines.embedded.layout import Span, StepLayout, TiledStepLayout
from trueup.model.bitwise import padded_rows
from trueup.model.load import LoadedModel
from trueup.policy.head import Head


class PolicyRunner:
    """A policy opened with layouts (model/packed.py), its cache and its head."""

    def __init__(self, model: LoadedModel, cache: KVCache, *, head_dtype: torch.dtype) -> None:
        self.model, self.cache, self.head_dtype = model, cache, head_dtype
        self.head = self._derive_head()

    @classmethod
    def of(cls, model: LoadedModel, *, slots: int, capacity: int, head_dtype: torch.dtype) -> PolicyRunner:
        """Return a runner with an empty cache of its own."""
        cache = KVCache(slots=slots, capacity=capacity, dtype=model.dtype)
        return cls(model, cache, head_dtype=head_dtype)

    @torch.no_grad()
    def forward(self, spans: Sequence[Span], token_ids: Sequence[int]) -> Tensor:
        """Run the tokens of the spans (single tokens first) through the body, extending the cache; states [T, D]."""
        layout = (TiledStepLayout if self.model.bitwise else StepLayout)(self.cache, spans)
        ids, positions = list(token_ids), layout.positions()
        count = len(ids)
        if self.model.bitwise:
            ids += [0] * (padded_rows(count) - count)
            positions += [0] * (padded_rows(count) - count)
        output = self.model.body(
            torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False, layout=layout
        )
        return output.last_hidden_state[0, :count]

    @torch.no_grad()
    def shadow(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors in the engine's dtype, in memory of their own, ready to be swapped in."""
        own = self.model.stored_tensors()
        return {n: t.to(own[n].dtype) if own[n].is_floating_point() else t for n, t in tensors.items()}

    @torch.no_grad()
    def swap(self, tensors: Mapping[str, Tensor]) -> None:
        """Point every parameter at new values; the tied head and the head's copy in another dtype follow."""
        owners = dict(self.model.lm.named_parameters()) | dict(self.model.lm.named_buffers())
        for name, tensor in tensors.items():
            owners[name].data = tensor
        self.head = self._derive_head()

    def _derive_head(self) -> Head:
        """The head with its weight stored in the dtype it is multiplied in, so that no step casts it again."""
        head = Head.of(self.model, self.head_dtype)
        return replace(head, weight_VD=self.model.weight_VD.detach().to(self.head_dtype))
