"""Is decoding to blame where generated numbers are off and scores of the same tokens are not?

That difference alone says nothing of kernels: a sampler that changes with the position, a penalty of the server's own
or a wrong number in the answer look the same. Decoding is named on evidence of its own: the numbers are those of a
distribution that tokens were drawn from, and the very first decoding step after any prompt is off already, while the
token before it, which prefill computes for the same engine, fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trueup.engines.probe_http import Ask, ProbeClient
from trueup.parity.compare import residual
from trueup.parity.evidence import Case, EngineModel
from trueup.parity.report import Cause, SettingReport
from trueup.parity.scorer import Scorer
from trueup.trace import TraceRow

CONTEXTS = 32
PARTS = (0.5, 1.0, 0.25, 0.75)
"""Each completion is cut after these parts of it (before its last token at the latest), until there are CONTEXTS."""
EARLIEST = 4
"""Contexts are cut this many tokens into a completion at the earliest."""
STANDARD_ERRORS = 4.0
HALF = 0.5
FITS = 2.0
"""First tokens fit if their rms is at most so many floors: a few dozen tokens measure it no better."""


@dataclass(frozen=True, kw_only=True)
class FirstSteps:
    """r in nats over the first tokens (prefill) and the second ones (one decoding step) of short completions: rms, and
    mean |r| of the second ones."""

    first_rms: float
    second_rms: float
    second_mean_abs: float


def mean_ratio_is_one(report: SettingReport) -> bool:
    """Whether the policy ratios average to 1, as they do where each number is that of a drawn token.

    E_q[p/q] = 1 for any distribution q that tokens were drawn from and numbers reported of.
    """
    trainer, engine = (torch.tensor(v, dtype=torch.float64) for v in (report.points.trainer, report.points.engine))
    ratio = (trainer - engine).exp()
    if len(ratio) < 2 or not bool(torch.isfinite(ratio).all()):
        return False
    standard_error = float(ratio.std()) / math.sqrt(len(ratio))
    return abs(float(ratio.mean()) - 1) <= STANDARD_ERRORS * standard_error and float(ratio.max()) < math.e**5


def later_gap(report: SettingReport) -> tuple[float, float]:
    """rms and mean |r| in nats over all tokens but the first of each completion."""
    points = report.points
    later = [t - e for t, e, p in zip(points.trainer, points.engine, points.position, strict=True) if p > 0]
    if not later:
        return math.nan, math.nan
    return math.sqrt(sum(r * r for r in later) / len(later)), sum(map(abs, later)) / len(later)


def first_steps(
    client: ProbeClient, scorer: Scorer, case: Case, rows: Sequence[TraceRow], *, salt: str | None
) -> FirstSteps | None:
    """Let the engine continue its own completions from somewhere inside, by two tokens; None if it cannot."""
    lengths = [len(row.completion_token_ids) for row in rows]
    places = [(i, min(int(part * length), length - 1)) for part in PARTS for i, length in enumerate(lengths)]
    cuts = [(rows[i], at) for i, at in dict.fromkeys(places) if at >= EARLIEST][:CONTEXTS]
    asks = [
        Ask(
            prompt=row.prompt_token_ids + row.completion_token_ids[:at], sampling={"temperature": 1.0}, seed=1 + i,
            max_tokens=2, salt=None if salt is None else f"{salt}-decode-{i}",
        )
        for i, (row, at) in enumerate(cuts)
    ]  # fmt: skip
    answers = client.generate(asks, together=False) if asks else []
    found = [
        replace(
            row, prompt_token_ids=ask.prompt, completion_token_ids=answer.ids, completion_logprobs=answer.logprobs,
            weight_versions=None,
        )
        for (row, _), ask, answer in zip(cuts, asks, answers, strict=True)
        if answer.error is None and len(answer.ids) == len(answer.logprobs) > 1
    ]  # fmt: skip
    if not found:
        return None
    evidence = scorer.evidence(case, found)
    now = residual(evidence, EngineModel(dist=case.trainer_distribution))
    usable_T = now.usable_T

    def rms(r: Tensor) -> float:
        return float(r.square().mean().sqrt())

    first_T = evidence.tokens.position_T == 0
    first, second = now.residual_T[usable_T & first_T], now.residual_T[usable_T & ~first_T]
    return FirstSteps(first_rms=rms(first), second_rms=rms(second), second_mean_abs=float(second.abs().mean()))


def decoding_cause(plain: SettingReport, scored: SettingReport, seen: FirstSteps | None) -> tuple[Cause | None, str]:
    """I4 if the evidence is there, and what is known in any case.

    `plain`: what the engine reported as it generated at T=1; `scored`: its scores of the same tokens, which fit.
    """
    far, near = plain.gap.get("mean_abs"), scored.gap.get("mean_abs")
    floor = plain.noise_floor.get("rms")
    assert isinstance(far, float) and isinstance(near, float) and isinstance(floor, float)
    known = (
        f"the engine's numbers are off as it generates (mean |r| {far:.3g}) and fit as it scores the same tokens "
        f"({near:.3g}); that alone does not tell the sampler, the report and the decoding kernels apart"
    )
    if seen is None:
        return None, known
    later_rms, later_mean_abs = later_gap(plain)
    known += (
        f"; continued from inside its completions, the first tokens are off by rms {seen.first_rms:.2g}, those of the "
        f"first decoding step by {seen.second_rms:.2g}, later ones by {later_rms:.2g}"
    )
    as_far = seen.second_mean_abs >= HALF * later_mean_abs  # no rms: what a step got wrong grows with those after it
    decodes = seen.first_rms <= FITS * floor < seen.second_rms and as_far
    if not decodes or not mean_ratio_is_one(plain):
        return None, known
    cause = Cause(
        id="I4", layer="inference", title="decoding computes something else than scoring the same tokens does",
        confidence="high", explained=1 - near / far if far else None,
        fix="compare the decode kernel with prefill: --enforce-eager, no chunked prefill, another attention backend",
        evidence=known.replace("; that alone does not tell the sampler, the report and the decoding kernels apart", "")
        + "; the ratios average to 1, as for numbers of tokens that were drawn from them",
        settings=(plain.label,),
    )  # fmt: skip
    return cause, known
