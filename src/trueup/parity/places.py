"""Where a token stands among all ids: how much probability is likelier than it, and how much lies at lower ids.

Shapes: T tokens of a setting, C of them at a time, V vocabulary, B equal ranges of ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ID_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Places:
    """Probabilities [T] float64 under a tempered distribution: `above_T` of likelier ids, `tied_T` of those exactly as
    likely with the token among them, `own_T` of the token, `below_T` of lower ids, `even_T` of even ids, `blocks_TB` of
    equal ranges of ids."""

    vocab: int
    above_T: Tensor
    tied_T: Tensor
    own_T: Tensor
    below_T: Tensor
    even_T: Tensor
    blocks_TB: Tensor

    @classmethod
    def of(cls, probability_CV: Iterable[Tensor], targets_T: Tensor) -> Places:
        """Read the places off the probabilities of all tokens, which come a chunk of tokens at a time."""
        columns: list[tuple[Tensor, ...]] = []
        first = vocab = 0
        for p_CV in probability_CV:
            vocab = p_CV.shape[1]
            ids_C1 = targets_T[first : first + len(p_CV), None].to(p_CV.device)
            first += len(p_CV)
            own_C1 = p_CV.gather(1, ids_C1)
            lower_CV = torch.arange(vocab, device=p_CV.device)[None] < ids_C1
            ranges_CV = torch.nn.functional.pad(p_CV, (0, -vocab % ID_BLOCKS))
            columns.append(
                (
                    (p_CV * (p_CV > own_C1)).sum(1),
                    (p_CV * (p_CV == own_C1)).sum(1),
                    own_C1[:, 0],
                    (p_CV * lower_CV).sum(1),
                    p_CV[:, ::2].sum(1),
                    ranges_CV.view(len(p_CV), ID_BLOCKS, -1).sum(2),
                )
            )
        above_T, tied_T, own_T, below_T, even_T, blocks_TB = (
            torch.cat(parts).double().cpu() for parts in zip(*columns, strict=True)
        )
        return cls(
            vocab=vocab, above_T=above_T, tied_T=tied_T, own_T=own_T, below_T=below_T, even_T=even_T,
            blocks_TB=blocks_TB,
        )  # fmt: skip

    def at(self, where_T: Tensor) -> Places:
        """The same of some tokens (a mask)."""
        names = [name for name in self.__dataclass_fields__ if name != "vocab"]
        return Places(vocab=self.vocab, **{name: getattr(self, name)[where_T] for name in names})
