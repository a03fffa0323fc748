"""What a search for causes comes back with."""

from __future__ import annotations

from dataclasses import dataclass

from trueup.parity.evidence import EngineModel
from trueup.parity.floor import Floor, Judgement
from trueup.parity.hypotheses import Hypothesis


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A supported cause: `explained` is the share of mean |r| on held-back tokens that this edit takes away.

    `title`, `fix` and `side` are those of the case of the cause that was found; `redraws`: it changes what tokens are
    drawn from, too.
    """

    hypothesis: Hypothesis
    detail: str
    explained: float
    confidence: str
    title: str
    fix: str
    side: str
    redraws: bool = False


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The outcome for one setting.

    `model` is the fitted engine, `judgement` its held-back residual against `floor`. `ambiguous` lists groups of ids
    the tokens cannot separate; `ruled_out` ids that fit clearly worse and would have shown at their smallest size;
    `not_seen` those that would not, or were not computed; `unseeable` id to reason, `tried` every id that was looked
    for. `searched`: whether costly causes were tried as well; `unfinished`: those that a budget left untried.
    """

    findings: tuple[Finding, ...]
    model: EngineModel
    floor: Floor
    judgement: Judgement
    ambiguous: tuple[tuple[str, ...], ...]
    ruled_out: tuple[str, ...]
    not_seen: tuple[str, ...]
    unseeable: dict[str, str]
    tried: tuple[str, ...]
    searched: bool = False
    unfinished: tuple[str, ...] = ()
