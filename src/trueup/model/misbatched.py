"""A trainer's forward pass with its batches got wrong: padding on the left, padding attended, packs that leak.

Each returns, for every row of a batch, the states [T, D] that a trainer with that mistake would compute; right batching
is model/scoring.py and model/packed.py.

Shapes: T completion tokens of a row, D hidden width, B rows of a batch, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trueup.errors import ModelError
from trueup.model.load import LoadedModel
from trueup.model.scoring import ScoredRow


def _left_padded(model: LoadedModel, rows: Sequence[ScoredRow], *, masked: bool) -> list[Tensor]:
    width = max(len(row) for row in rows) - 1
    device = model.weight_VD.device
    ids_BL = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    seen_BL = torch.ones(len(rows), width, dtype=torch.long, device=device)
    for at, row in enumerate(rows):
        ids = (row.prompt_ids + row.completion_ids)[:-1]
        ids_BL[at, width - len(ids) :] = torch.tensor(ids)
        if masked:
            seen_BL[at, : width - len(ids)] = 0
    positions_BL = torch.arange(width, device=device).expand(len(rows), -1)
    hidden_BLD = model.body(
        ids_BL, attention_mask=seen_BL, position_ids=positions_BL, use_cache=False
    ).last_hidden_state  # fmt: skip
    return [hidden_BLD[at, -len(row.completion_ids) :].clone() for at, row in enumerate(rows)]


def left_padded(model: LoadedModel, rows: Sequence[ScoredRow]) -> list[Tensor]:
    """Padding on the left is masked, but positions count it."""
    return _left_padded(model, rows, masked=True)


def padding_attended(model: LoadedModel, rows: Sequence[ScoredRow]) -> list[Tensor]:
    """Padding on the left is attended to as if it were text."""
    return _left_padded(model, rows, masked=False)


def leaking_pack(model: LoadedModel, rows: Sequence[ScoredRow]) -> list[Tensor]:
    """Rows packed one after another under one causal mask: each sees all before it.

    Raises ModelError when the pack is longer than the model's positions.
    """
    ids: list[int] = []
    starts = []
    for row in rows:
        starts.append(len(ids) + len(row.prompt_ids) - 1)
        ids += row.prompt_ids + row.completion_ids
    if model.max_positions is not None and len(ids) > model.max_positions:
        raise ModelError(f"a pack of {len(ids)} tokens exceeds the model's {model.max_positions} positions")
    hidden_LD = model.body(torch.tensor([ids], device=model.weight_VD.device), use_cache=False).last_hidden_state[0]
    return [hidden_LD[s : s + len(row.completion_ids)].clone() for s, row in zip(starts, rows, strict=True)]


BATCHINGS: dict[str, Callable[[LoadedModel, Sequence[ScoredRow]], list[Tensor]]] = {
    "left padded": left_padded,
    "padding attended": padding_attended,
    "leaking pack": leaking_pack,
}
"""By name, as hypotheses ask for them."""


@torch.no_grad()
def misbatched_states(model: LoadedModel, rows: Sequence[ScoredRow], batching: str, batch_rows: int) -> list[Tensor]:
    """States of all rows when they are batched in order, `batch_rows` at a time, the wrong way that is named."""
    run = BATCHINGS[batching]
    return [state for at in range(0, len(rows), batch_rows) for state in run(model, rows[at : at + batch_rows])]
