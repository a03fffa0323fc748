"""TOK: right numbers against the wrong tokens. T1 shift, T7 an end token that nobody sampled."""

from __future__ import annotations

from dataclasses import replace

import torch

from trueup.parity.evidence import EXACT, EngineModel, Evidence, render, skipped
from trueup.parity.hypotheses import Hypothesis, Variant

SHIFTS = (-3, -2, -1, 1, 2, 3)
OFFSETS = (-1, 1)
UNSHIFTED_NATS = 0.5
"""Logits of another position are off by nats on average."""


def _shift(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if model.shift or model.source.offset:
        return []
    found = [
        Variant(
            model=replace(model, shift=k),
            detail=f"the number stored at position t is the logprob of token t{k:+d}",
        )
        for k in SHIFTS
    ]
    off_T = (render(evidence, model) - evidence.tokens.engine_T).abs()
    if not model.source.plain or float(off_T.nan_to_num(posinf=0.0).mean()) < UNSHIFTED_NATS:
        return found
    return found + [
        Variant(
            model=replace(model, source=replace(EXACT, offset=k)),
            detail=f"token t is scored with logits that are {abs(k)} position too {'late' if k > 0 else 'early'}",
            title="logits and tokens are not shifted against each other as they should be",
            fix="score token t with the logits of position t-1: logits[:, :-1] against ids[:, 1:], once",
        )
        for k in OFFSETS
    ]


LAST_SHARE, LAST_ROWS = 0.1, 3
"""Of the rows, at least: only some end by themselves."""
LAST_NATS = 0.3
END_IDS = 2
"""So many different tokens may be appended: an end token, and padding."""


def _synthetic_end(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """Offered only where the last token is far off in some rows, farther than the others are, and of one kind: what is
    appended is an end token, and tokens of many kinds were sampled."""
    if model.skip is not None:
        return []
    whole = evidence.everything
    off_T = (render(whole, model) - whole.tokens.engine_T).abs().nan_to_num(torch.inf)
    last_T = skipped(whole.tokens, "last")
    usual = float(off_T[~last_T].quantile(0.99)) if bool((~last_T).any()) else torch.inf
    far_T = off_T[last_T] > max(usual, LAST_NATS)
    share = float(far_T.double().mean())
    if share < LAST_SHARE or int(far_T.sum()) < min(LAST_ROWS, int(last_T.sum())):
        return []
    if len(torch.unique(whole.tokens.targets_T[last_T][far_T])) > END_IDS:
        return []
    ids = torch.unique(whole.tokens.targets_T[last_T]).tolist()
    what = f"token {ids[0]}" if len(ids) == 1 else f"{len(ids)} different tokens"
    detail = f"only the last token of each completion is off ({share:.0%} of rows, {what}): nobody sampled it"
    return [Variant(model=replace(model, skip="last"), detail=detail)]


HYPOTHESES = (
    Hypothesis(
        id="T1",
        side="log",
        layer="tokenization",
        title="logprobs are shifted against the tokens",
        fix="realign: entry t must describe completion token t",
        variants=_shift,
    ),
    Hypothesis(
        id="T7",
        side="log",
        layer="tokenization",
        title="the last token was appended, not sampled",
        fix="keep the real end token with its logprob, or mask an appended one out of the loss",
        variants=_synthetic_end,
    ),
)
