"""The training forward pass: sequences packed one after another, gradients on, no padding between them.

Shapes: T packed tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trueup.errors import ModelError
from trueup.model.attention import PackedLayout, use_layouts
from trueup.model.bitwise import make_bitwise, padded_rows
from trueup.model.load import LoadedModel
from trueup.model.scoring import ScoredRow, hidden_states

TRIAL_LENGTHS = (9, 45)
TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3, torch.float64: 1e-6}
"""Rms of the difference over rms of the states; bfloat16 rounding alone gives 0.02 to 0.11."""


def packed_hidden_states(model: LoadedModel, rows: Sequence[ScoredRow], *, share_prompts: bool = False) -> Tensor:
    """Return the states [T, D] that predict the completion tokens of all rows, in order, differentiable.

    `share_prompts`: neighbouring rows with the same prompt run it once, forward and backward; the states are the same
    numbers up to the order of sums (in bitwise mode, the same bits). The model must have been opened with layouts
    (`open_policy`). In bitwise mode the pack is filled up to a multiple of 16 tokens by a sequence of its own, which
    nobody attends to.
    """
    pack = _Pack()
    for row in rows:
        pack.add(row, share=share_prompts)
    if model.bitwise and len(pack.ids) % 16:
        pack.segment([0] * (padded_rows(len(pack.ids)) - len(pack.ids)))
    layout = PackedLayout(lengths=tuple(pack.lengths), parents=tuple(pack.parents), tiled=model.bitwise)
    device = model.weight_VD.device
    hidden_TD = model.body(
        torch.tensor([pack.ids], device=device),
        position_ids=torch.tensor([layout.positions()], device=device),
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    return hidden_TD.index_select(0, torch.tensor(pack.wanted, device=device))  # its backward adds in a fixed order


@dataclass
class _Pack:
    """Segments as they are laid out: their tokens, and where the wanted states lie."""

    ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    prompt_segment: int = -1
    prompt_end: int = -1

    def segment(self, ids: Sequence[int], parent: int | None = None) -> int:
        """Append tokens; returns the position of the first."""
        start = len(self.ids)
        self.ids += ids
        self.lengths.append(len(ids))
        self.parents.append(parent)
        return start

    def add(self, row: ScoredRow, *, share: bool) -> None:
        """Append a row, behind the last prompt if it is shared; its last token predicts nothing and is left out."""
        if not share:
            start = self.segment((row.prompt_ids + row.completion_ids)[:-1]) + len(row.prompt_ids) - 1
            self.wanted += range(start, start + len(row.completion_ids))
            return
        if row.prompt_ids != self.prompt_ids:
            self.prompt_ids, self.prompt_segment = row.prompt_ids, len(self.lengths)
            self.prompt_end = self.segment(row.prompt_ids) + len(row.prompt_ids) - 1
        self.wanted.append(self.prompt_end)
        if len(row.completion_ids) > 1:
            start = self.segment(row.completion_ids[:-1], self.prompt_segment)
            self.wanted += range(start, start + len(row.completion_ids) - 1)


@torch.no_grad()
def open_policy(model: LoadedModel, *, bitwise: bool) -> LoadedModel:
    """Return the model with its attention routed through layouts and, if asked, its linear layers tiled.

    Raises ModelError when packing two sequences gives other states than transformers gives each of them alone: state
    that flows past attention (convolutions, recurrences) would leak from one request into the next.
    """
    rows = [
        ScoredRow(prompt_ids=(1,), completion_ids=tuple(7919 * (i + 1) % model.vocab_size for i in range(length)))
        for length in TRIAL_LENGTHS
    ]
    alone = torch.cat(hidden_states(model, rows, batch_rows=1)).float()
    use_layouts(model.lm)
    if bitwise:
        make_bitwise(model.lm)
    opened = replace(model, bitwise=bitwise)
    gap = float((packed_hidden_states(opened, rows).float() - alone).norm() / alone.norm())
    if not gap < TRIAL_TOLERANCE[model.dtype]:
        raise ModelError(
            f"{type(model.lm).__name__} computes other states when sequences are packed (relative difference "
            f"{gap:.1e}): something besides attention carries state between tokens"
        )
    return opened
