"""Are end tokens drawn as often as they should be? An engine that suppresses them reports the right numbers.

At each step an end is drawn with the probability P that the model gives it, whatever was drawn before, so that the
number of ends less the sum of P over all steps is 0 on average, wherever completions were cut.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trueup.parity.evidence import EngineModel, Evidence
from trueup.policy.processing import Distribution

UNENDED = ("length", "abort", "error")
"""Finish reasons of completions that did not end by themselves."""


def missing_ends(evidence: Evidence, model: EngineModel, fresh_T: Tensor, *, rate: float, noise_rms: float) -> str:
    """Say that fewer ends were drawn than chance allows at `rate`; "" if not, or if that cannot be said.

    A completion that ended without an end token (it was removed, or a stop string was met) counts as one, so that every
    row needs a finish reason. A kept set may hold no end token: only whole distributions are judged. `fresh_T` marks
    independent tokens; `noise_rms` is by how many nats an engine's rounding moves P.
    """
    tokens, ends = evidence.tokens, evidence.facts.eos_ids
    if not ends or None in tokens.finish_reasons or model.dist != Distribution(temperature=model.dist.temperature):
        return ""
    end_T = torch.isin(tokens.targets_T, torch.tensor(ends))
    last_T = torch.cat([tokens.row_T[1:] != tokens.row_T[:-1], torch.tensor([True])])
    ended = torch.tensor([reason not in UNENDED for reason in tokens.finish_reasons])
    seen = int((fresh_T & (end_T | (last_T & ended[tokens.row_T]))).sum())
    if 2 * seen > int(last_T.sum()):  # most completions ended: ends are not what is missing
        return ""
    mass_T = evidence.mass(model.source, model.dist.temperature, ends).double()[fresh_T]
    expected = float(mass_T.sum())
    least = torch.tensor(expected * math.exp(-noise_rms), dtype=torch.float64)
    # a sum of independent events is below its mean less often than a Poisson number is (Hoeffding 1956)
    chance = float(torch.special.gammaincc(torch.tensor(seen + 1.0, dtype=torch.float64), least))
    if seen + 1 > least or chance >= rate:
        return ""
    return f"{seen} of {int(fresh_T.sum())} tokens end a completion, where {expected:.0f} were expected"
