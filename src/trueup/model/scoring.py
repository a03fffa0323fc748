"""Teacher-forced forward pass: token ids in, the hidden state before each completion token out.

Shapes: T completion tokens of one row, D hidden width, B rows of a batch, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.errors import ModelError
from trueup.model.load import LoadedModel

FULLNESS = 0.75
"""Of a batch's width, in 32 bits and more: a long prompt among short ones would otherwise make three positions in four
padding. In 16 bits the shape of a batch moves the numbers, and stays what `batch_rows` makes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRow:
    """A prompt and the completion to score."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def check_fits(model: LoadedModel, rows: Sequence[ScoredRow]) -> None:
    """Raise ModelError when a row holds ids outside the vocabulary or is longer than the model allows."""
    largest = max(max(r.prompt_ids + r.completion_ids) for r in rows)
    if largest >= model.vocab_size:
        raise ModelError(
            f"token id {largest} is outside the model's vocabulary of {model.vocab_size}: "
            "the trace was made with another model or tokenizer"
        )
    longest = max(len(r) for r in rows)
    if model.max_positions is not None and longest > model.max_positions:
        raise ModelError(f"a row has {longest} tokens, the model's limit is {model.max_positions}")


def _batches(lengths: Sequence[int], batch_rows: int, fullness: float) -> list[list[int]]:
    """Indices of rows to run together, longest first: at most `batch_rows`, none below that share of the first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if batches and len(batches[-1]) < batch_rows and lengths[i] >= fullness * lengths[batches[-1][0]]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.no_grad()
def hidden_states(
    model: LoadedModel,
    rows: Sequence[ScoredRow],
    *,
    batch_rows: int,
    progress: Callable[[int], None] = lambda rows_done: None,
) -> list[Tensor]:
    """Return, for each row, the states [T, D] (model dtype) that predict its completion tokens.

    Rows are batched by length and padded on the right, where causal attention cannot see the padding; position ids
    start at 0 in every row.
    """
    device = model.weight_VD.device
    fullness = FULLNESS if torch.finfo(model.dtype).bits >= 32 else 0.0
    states: dict[int, Tensor] = {}
    for chunk in _batches([len(row) for row in rows], batch_rows, fullness):
        width = max(len(rows[i]) for i in chunk) - 1
        ids_BL = torch.zeros(len(chunk), width, dtype=torch.long, device=device)
        for at, i in enumerate(chunk):
            ids = (rows[i].prompt_ids + rows[i].completion_ids)[:-1]
            ids_BL[at, : len(ids)] = torch.tensor(ids)
        hidden_BLD = model.body(ids_BL, use_cache=False).last_hidden_state
        for at, i in enumerate(chunk):
            start = len(rows[i].prompt_ids) - 1
            states[i] = hidden_BLD[at, start : start + len(rows[i].completion_ids)].clone()
        progress(len(chunk))
    return [states[i] for i in range(len(rows))]
