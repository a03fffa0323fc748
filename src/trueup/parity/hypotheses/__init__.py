"""One family of causes a file. A hypothesis declares its id, what it predicts and when it cannot be seen.

Adding a hypothesis touches one file: every module of this folder is imported, and its `HYPOTHESES` tuple collected.
Ids are stable and public: they appear in reports, exit messages and tests.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trueup.parity.evidence import EngineModel, Evidence

ENGINE_WIDE = frozenset({"T10", "W1", "W2", "W3", "W5", "W15", "I1", "I2", "I6", "I8", "I12", "I14"})
"""Causes that do not depend on how tokens are sampled: one search in one setting is enough."""
LAYERS = ("semantic", "tokenization", "weights", "inference", "trainer", "objective")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One edit of an engine model; `detail` says in words what this engine did, with the fitted value in it.

    `title`, `fix` and `side` stand for the hypothesis' own where a variant is another case of it, for instance the
    other way round. `only_reported`: tokens are drawn as declared, whatever the hypothesis says of the others.
    """

    model: EngineModel
    detail: str
    title: str = ""
    fix: str = ""
    side: str = ""
    only_reported: bool = False


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A possible cause.

    `variants(evidence, model)` edits an engine model in every way this cause could (empty: its mark is not there, so it
    is ruled out). `refine(evidence, variant, step)` gives neighbours of a variant that has a number in it, closer ones
    for a smaller step (1 at first, then halved). `unseeable` gives the reason this setting cannot show the cause, or
    None. `simulates` marks causes that need further forward passes and are tried only when nothing cheaper explains the
    gap, on a few tokens first unless `screened` is off (every row must be run anyway); `numeric` those that could only
    leave a small gap; `redraws` those under which the tokens too are drawn from what is reported, not from what was
    declared, `may_redraw` those under which they may be drawn from either. `smallest(evidence, model)` gives the cause
    at its smallest size, where that is not one of its variants; `marked`: it leaves an exact mark, so that without
    variants it is not there. `side`: whose fault it is, "engine", "trainer" or "log" (what was reported or written
    down).
    """

    id: str
    layer: str
    title: str
    fix: str
    variants: Callable[[Evidence, EngineModel], Sequence[Variant]]
    unseeable: Callable[[Evidence], str | None] = lambda evidence: None
    refine: Callable[[Evidence, Variant, float], Sequence[Variant]] | None = None
    simulates: bool = False
    screened: bool = True
    numeric: bool = False
    redraws: bool = False
    may_redraw: bool = False
    smallest: Callable[[Evidence, EngineModel], Sequence[Variant]] | None = None
    marked: bool = False
    side: str = "engine"

    def __post_init__(self) -> None:
        assert self.layer in LAYERS, self.layer

    @property
    def rank(self) -> tuple[int, str]:
        """Its place in the order of a migration study: layer, then id."""
        return LAYERS.index(self.layer), self.id


def all_hypotheses() -> tuple[Hypothesis, ...]:
    """Return every hypothesis of every module in this folder, in order of layer, then id."""
    found: list[Hypothesis] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found.extend(importlib.import_module(f"{__name__}.{module.name}").HYPOTHESES)
    return tuple(sorted(found, key=lambda h: h.rank))
