"""The training forward pass: sequences packed one after another, gradients on, no padding between them.

Shapes: T packed tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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


def packed_hidden_states(model: LoadedModel, rows: Sequence[ScoredRow]) -> Tensor:
    """Return the states [T, D] that predict the completion tokens of all rows, in order, differentiable.

    The model must have been opened with layouts (`open_policy`). In bitwise mode the pack is filled up to a multiple
    of 16 tokens by a sequence of its own, which nobody attends to.
    """
    lengths = [len(row) - 1 for row in rows]
    ids = [i for row in rows for i in (row.prompt_ids + row.completion_ids)[:-1]]
    positions = [p for length in lengths for p in range(length)]
    if model.bitwise and len(ids) % 16:
        filler = padded_rows(len(ids)) - len(ids)
        lengths.append(filler)
        ids += [0] * filler
        positions += range(filler)
    device = model.weight_VD.device
    hidden = model.body(
        torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
        layout=PackedLayout(lengths=tuple(lengths), tiled=model.bitwise),
    ).last_hidden_state[0]
    wanted, start = [], 0
    for row in rows:
        wanted.append(hidden[start + len(row.prompt_ids) - 1 : start + len(row) - 1])
        start += len(row) - 1
    return torch.cat(wanted)


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
