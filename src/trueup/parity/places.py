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
    equal ranges of ids, `earlier_T` of ids that the completion holds already. `repeats_T`: the token is one of those.
    `expected_V` [V]: how often each id is expected among all tokens.
    """

    vocab: int
    expected_V: Tensor
    above_T: Tensor
    tied_T: Tensor
    own_T: Tensor
    below_T: Tensor
    even_T: Tensor
    blocks_TB: Tensor
    earlier_T: Tensor
    repeats_T: Tensor

    @classmethod
    def of(cls, probability_CV: Iterable[Tensor], targets_T: Tensor, row_T: Tensor) -> Places:
        """Read the places off the probabilities of all tokens, which come a chunk of tokens at a time."""
        columns: list[tuple[Tensor, ...]] = []
        first = vocab = 0
        expected_V = torch.zeros(())
        earlier = Earlier(targets_T, row_T)
        for p_CV in probability_CV:
            vocab = p_CV.shape[1]
            expected_V = expected_V + p_CV.sum(0)
            ids_C1 = targets_T[first : first + len(p_CV), None].to(p_CV.device)
            own_C1 = p_CV.gather(1, ids_C1)
            above_C = (p_CV * (p_CV > own_C1)).sum(1)
            ranges_CBR = torch.nn.functional.pad(p_CV, (0, -vocab % ID_BLOCKS)).view(len(p_CV), ID_BLOCKS, -1)
            blocks_CB, size = ranges_CBR.sum(2), ranges_CBR.shape[2]
            at_C1, block_C1 = torch.arange(len(p_CV), device=p_CV.device)[:, None], ids_C1 // size
            within_CR = torch.arange(size, device=p_CV.device)[None] < ids_C1 - block_C1 * size
            lower_CB = torch.arange(ID_BLOCKS, device=p_CV.device)[None] < block_C1
            below_C = (blocks_CB * lower_CB).sum(1) + (ranges_CBR[at_C1, block_C1][:, 0] * within_CR).sum(1)
            columns.append((
                above_C, (p_CV * (p_CV == own_C1)).sum(1), own_C1[:, 0], below_C, p_CV[:, ::2].sum(1), blocks_CB,
                *earlier.read(p_CV, first),
            ))  # fmt: skip
            first += len(p_CV)
        joined = [torch.cat(parts).double().cpu() for parts in zip(*columns, strict=True)]
        return cls(vocab=vocab, expected_V=expected_V.cpu(), **dict(zip(cls.of_tokens(), joined, strict=True)))

    @classmethod
    def of_tokens(cls) -> list[str]:
        """Names of the fields that have a number for each token."""
        return [name for name in cls.__dataclass_fields__ if name not in ("vocab", "expected_V")]

    def at(self, where_T: Tensor) -> Places:
        """The same of some tokens (a mask)."""
        parts = {name: getattr(self, name)[where_T] for name in self.of_tokens()}
        return Places(vocab=self.vocab, expected_V=self.expected_V, **parts)


class Earlier:
    """The ids that each completion holds already, token by token."""

    def __init__(self, targets_T: Tensor, row_T: Tensor) -> None:
        self.targets, self.rows = targets_T.tolist(), row_T.tolist()
        self.row, self.seen_V = -1, torch.zeros(0)

    def read(self, p_CV: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(probability of those ids, whether the token is one of them) of the next tokens, [C] each."""
        mass_C, repeats_C = torch.zeros(len(p_CV)), torch.zeros(len(p_CV))
        for at, p_V in enumerate(p_CV):
            if self.rows[first + at] != self.row:
                self.row, self.seen_V = self.rows[first + at], torch.zeros_like(p_V)
            mass_C[at] = torch.dot(p_V, self.seen_V)
            repeats_C[at] = self.seen_V[self.targets[first + at]]
            self.seen_V[self.targets[first + at]] = 1.0
        return mass_C, repeats_C
