"""TRN: the user's own trainer, got wrong in how it batches. R2 positions, R3 leaking packs, R4 padding attended; T8.

These explain a trainer's numbers, not an engine's: they are tried on logged trainer logprobs only (trainer_check.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trueup.parity.evidence import EXACT, EngineModel, Evidence
from trueup.parity.hypotheses import Hypothesis, Variant

SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
MIN_ZEROS = 3
NOT_LOGGED = "needs your trainer's own logprobs (trainer_logprobs in the trace, or check_rollouts)"


def _batched(evidence: Evidence, model: EngineModel, name: str) -> list[Variant]:
    rows = evidence.facts.batch_rows
    if not model.source.plain or not rows:
        return []
    sizes = sorted({size for size in SIZES if size < rows} | {rows})
    return [
        Variant(
            model=replace(model, source=replace(EXACT, batching=(name, size))),
            detail=f"the trainer computes as with {size} rows a batch, {name}",
        )
        for size in sizes
    ]


def _zeros(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """An end token whose logprob is exactly 0 is one that a mask for padding took away."""
    if model.constant is not None or not evidence.facts.batch_rows:
        return []
    tokens = evidence.everything.tokens
    at_T = (tokens.engine_T == 0.0) & torch.isin(tokens.targets_T, torch.tensor(evidence.facts.eos_ids or (-1,)))
    if int(at_T.sum()) < MIN_ZEROS:
        return []
    detail = f"{int(at_T.sum())} end tokens have a trainer logprob of exactly 0"
    return [Variant(model=replace(model, constant=0.0), detail=detail)]


def _needs_trainer(evidence: Evidence) -> str | None:
    return None if evidence.facts.batch_rows else NOT_LOGGED


HYPOTHESES = (
    Hypothesis(
        id="T8",
        side="trainer",
        layer="tokenization",
        title="the trainer takes end tokens for padding",
        fix="use a padding token of its own, or mask by length instead of by id",
        variants=_zeros,
        unseeable=_needs_trainer,
    ),
    Hypothesis(
        id="R2",
        side="trainer",
        layer="trainer",
        title="the trainer pads on the left without position ids",
        fix="pass position_ids that start at 0 in each row, or pad on the right",
        variants=lambda e, m: _batched(e, m, "left padded"),
        unseeable=_needs_trainer,
        simulates=True,
        screened=False,
    ),
    Hypothesis(
        id="R3",
        side="trainer",
        layer="trainer",
        title="sequences of a pack see the ones before them",
        fix="pass cu_seqlens or a block-diagonal mask, and position ids that restart",
        variants=lambda e, m: _batched(e, m, "leaking pack"),
        unseeable=_needs_trainer,
        simulates=True,
        screened=False,
    ),
    Hypothesis(
        id="R4",
        side="trainer",
        layer="trainer",
        title="the trainer attends to padding",
        fix="pass the attention mask, or pad on the right",
        variants=lambda e, m: _batched(e, m, "padding attended"),
        unseeable=_needs_trainer,
        simulates=True,
        screened=False,
    ),
)
