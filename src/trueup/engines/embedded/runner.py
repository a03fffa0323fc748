"""The model inside the engine: one forward pass over a step's tokens, and the swap of its weights.

Shapes: T tokens of a step, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trueup.engines.embedded.cache import KVCache
from trueup.engines.embedded.fused import FusedBody, Weights, fuse
from trueup.engines.embedded.layout import Span, StepLayout, TiledStepLayout
from trueup.model.bitwise import padded_rows
from trueup.model.load import LoadedModel
from trueup.policy.head import Head


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """A version ready to be swapped in: its tensors and everything derived from them."""

    tensors: Mapping[str, Tensor]
    head: Head
    fused: FusedBody | None


class PolicyRunner:
    """A policy opened with layouts (model/packed.py), its cache, its head, and its faster body if it has one."""

    def __init__(self, model: LoadedModel, cache: KVCache, *, head_dtype: torch.dtype) -> None:
        self.model, self.cache, self.head_dtype = model, cache, head_dtype
        self.layout: type[StepLayout] = TiledStepLayout if model.bitwise else StepLayout
        self.fused: FusedBody | None = None
        self.refresh()

    @classmethod
    def of(cls, model: LoadedModel, *, slots: int, capacity: int, head_dtype: torch.dtype) -> PolicyRunner:
        """Return a runner with an empty cache of its own."""
        cache = KVCache(slots=slots, capacity=capacity, dtype=model.dtype)
        return cls(model, cache, head_dtype=head_dtype)

    @torch.no_grad()
    def forward(self, spans: Sequence[Span], token_ids: Sequence[int]) -> Tensor:
        """Run the tokens of the spans (single tokens first) through the body, extending the cache; states [T, D]."""
        layout = self.layout(self.cache, spans)
        ids, positions = list(token_ids), layout.positions()
        if self.fused is not None:
            return self.fused(ids, positions, layout)
        count = len(ids)
        if self.model.bitwise:
            ids += [0] * (padded_rows(count) - count)
            positions += [0] * (padded_rows(count) - count)
        output = self.model.body(
            torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False, layout=layout
        )
        return output.last_hidden_state[0, :count]

    @torch.no_grad()
    def shadow(self, tensors: Mapping[str, Tensor]) -> Shadow:
        """Make a version ready beside the serving one: tensors in the engine's dtype, and what derives from them."""
        owners = self._owners()
        cast = {n: t.to(owners[n].dtype) if owners[n].is_floating_point() else t for n, t in tensors.items()}
        fresh = {id(owners[name]): tensor for name, tensor in cast.items()}

        def weights(parameter: Tensor) -> Tensor:
            return fresh[id(parameter)]

        return Shadow(
            tensors=cast,
            head=self._head(weights),
            fused=None if self.fused is None else FusedBody(self.model, weights),
        )

    @torch.no_grad()
    def swap(self, shadow: Shadow) -> None:
        """Point every parameter at its new values, and at what was derived from them."""
        owners = self._owners()
        for name, tensor in shadow.tensors.items():
            owners[name].data = tensor
        self.head, self.fused = shadow.head, shadow.fused

    def refresh(self) -> None:
        """Derive head and faster body from the weights that the model holds now."""
        self.fused = fuse(self.model)
        self.head = self._head(torch.detach)

    def _owners(self) -> dict[str, Tensor]:
        return dict(self.model.lm.named_parameters()) | dict(self.model.lm.named_buffers())

    def _head(self, weights: Weights) -> Head:
        """The head with its weight stored in the dtype it is multiplied in, so that no step casts it again."""
        head = Head.of(self.model, self.head_dtype)
        bias_V = None if head.bias_V is None else weights(head.bias_V).detach()
        return replace(head, weight_VD=weights(head.weight_VD).detach().to(self.head_dtype), bias_V=bias_V)
