"""What a check looks at: one sampling setting's tokens, and what the trainer's logits say of them.

Shapes: T completion tokens of all usable rows of a setting, in row order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trueup.parity.facts import Facts
from trueup.parity.places import Places
from trueup.policy.logprobs import TokenScores
from trueup.policy.processing import Distribution
from trueup.trace import EngineInfo, TraceRow
from trueup.types import LogprobKind, SamplingParams


@dataclass(frozen=True, kw_only=True)
class HeadEdit:
    """A head that is not the checkpoint's: extra rows of zeros in the softmax, another soft-cap, a factor on the
    logits, or products rounded to bfloat16."""

    padded_rows: int = 0
    softcap: float | None = None
    scale: float = 1.0
    bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class Source:
    """Whose logits: a precision of the trainer's checkpoint, or that checkpoint with one thing changed.

    `precision`: "trainer", "engine" (as it declares), "reference" (the next higher one) or "exact" (float32, for
    most of what is changed). `simulation`: (name, parameter) of model/simulate.py. `context`: what was done to the
    prompt. `weights`: (label, pattern), other weights for the tensors whose name the pattern matches. `by_version`:
    (stamped version, label) pairs, other weights for the tokens that carry the stamp; all other tokens take the
    trainer's. `offset`: logits so many positions later than those before the token. `seen`: which tokens penalties
    count, if not those that they should (a key of SEEN). `head`: another head. `batching`: (wrong way to batch, rows
    per batch) of model/misbatched.py.
    """

    precision: str = "trainer"
    simulation: tuple[str, float] | None = None
    context: str | None = None
    weights: tuple[str, str] | None = None
    by_version: tuple[tuple[int, str], ...] = ()
    offset: int = 0
    seen: str = ""
    head: HeadEdit = HeadEdit()
    batching: tuple[str, int] | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing was changed."""
        return replace(self, precision="trainer") == TRAINER

    @property
    def one_model(self) -> bool:
        """Whether all tokens come from one changed model, run as the trainer's is."""
        return not (self.plain or self.by_version or self.batching)


SEEN = {
    "completion only": "the completion only, not the prompt",
    "prompt counted": "the prompt as well as the completion",
    "lagging": "all tokens but the latest",
}
"""Which tokens an engine's penalties may count, in words."""
TRAINER = Source(precision="trainer")
REFERENCE = Source(precision="reference")
ENGINE = Source(precision="engine")
EXACT = Source(precision="exact")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is known of a setting before looking at numbers."""

    engine: EngineInfo
    sampling: SamplingParams
    trainer: LogprobKind
    unmodelled: tuple[str, ...] = ()
    other_temperatures: tuple[float, ...] = ()
    tag: str = ""
    omitted: tuple[str, ...] = ()
    """Sampling fields that the requests left to the engine."""
    side: str = "engine"
    """Whose numbers these are, the engine's or the trainer's."""
    drawn: bool = True
    """Whether the tokens are judged as draws: not where another setting holds the same tokens."""

    @property
    def min_p_first(self) -> bool:
        """V0 engines apply min-p after top-k and top-p, V1 before."""
        return self.engine.api != "V0"

    @property
    def processed(self) -> Distribution:
        """The distribution the tokens were drawn from; at temperature 0 the one before the argmax."""
        if self.sampling.temperature == 0:
            untruncated = replace(self.sampling, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
            return Distribution.of(LogprobKind.PROCESSED, untruncated)
        return Distribution.of(LogprobKind.PROCESSED, self.sampling, min_p_first=self.min_p_first)

    @property
    def trainer_distribution(self) -> Distribution:
        """The distribution whose logprob the user's trainer computes."""
        if self.trainer == LogprobKind.PROCESSED:
            return self.processed
        if self.trainer == LogprobKind.TEMPERED:
            return Distribution(temperature=self.processed.temperature)
        return Distribution()

    def label(self) -> str:
        """Return e.g. "temperature=0.7 top_p=0.9"."""
        return self.sampling.label() + self.tag


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """A complete guess of how the engine's numbers came about; a hypothesis is one edit of it.

    `dist`: which distribution; `source`: whose logits; `entry`: the sampled token's logprob ("sampled"), the most
    likely token's ("top"), or a statistic of those so far (a key of MIXED); `factor`: the logprob is multiplied by it;
    `shift`: the number at position t describes
    token t + shift; `grid`: rounding in transport ("bf16", "fp16" or decimals such as "3 decimals"); `constant`:
    placeholder that stands where a number is missing; `bias`: (ids, nats added to their logits; -inf forbids them);
    `allowed`: ids of a grammar, all others forbidden; `skip`: tokens about which nothing is predicted (see `skipped`).
    """

    dist: Distribution
    source: Source = TRAINER
    entry: str = "sampled"
    factor: float = 1.0
    shift: int = 0
    grid: str | None = None
    constant: float | None = None
    bias: tuple[tuple[int, ...], float] | None = None
    allowed: tuple[int, ...] = ()
    skip: str | None = None


BOUNDARY = 2


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one setting: ids, which row each belongs to, position in its completion, the engine's logprob, and
    the weight version stamped on it (-1: none). Of each row: prompt, line, replica ("": not named), finish reason."""

    targets_T: Tensor
    row_T: Tensor
    position_T: Tensor
    engine_T: Tensor
    version_T: Tensor
    prompts: tuple[Tensor, ...]
    lines: tuple[int, ...]
    replicas: tuple[str, ...] = ()
    finish_reasons: tuple[str | None, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[TraceRow]) -> Tokens:
        """Pack well-formed rows (equal lengths, finite or not)."""
        counts = [len(r.completion_token_ids) for r in rows]
        return cls(
            targets_T=torch.tensor([i for r in rows for i in r.completion_token_ids], dtype=torch.long),
            row_T=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts, dtype=torch.long)),
            position_T=torch.cat([torch.arange(0), *(torch.arange(c) for c in counts)]),
            engine_T=torch.tensor([v for r in rows for v in r.completion_logprobs], dtype=torch.float64),
            version_T=torch.tensor([v for r in rows for v in _versions(r)], dtype=torch.long),
            prompts=tuple(torch.tensor(r.prompt_token_ids, dtype=torch.long) for r in rows),
            lines=tuple(r.line for r in rows),
            replicas=tuple(r.replica or "" for r in rows),
            finish_reasons=tuple(r.finish_reason for r in rows),
        )

    def __len__(self) -> int:
        return len(self.targets_T)


def _versions(row: TraceRow) -> Sequence[int]:
    count = len(row.completion_token_ids)
    stamps = row.weight_versions
    return stamps if stamps is not None and len(stamps) == count else [-1] * count


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Tokens of a setting and a way to ask what any source says of them under any distribution.

    `ask(source, dists)` returns TokenScores [T]; `mass(source, temperature, ids)` the probability [T] of a set of ids;
    `expected()` how often the trainer expects each id among these tokens, [V]; `places(source, temperature)` where each
    token stands among all ids; `ask_spread(source, dist)` what `ask` does, with entropies and varentropies. What
    `scores` returns is remembered, so asking twice costs nothing. `screen` is a small part of the evidence, on which
    costly candidates are compared first. `suspects_T` marks tokens that are off by more than rounding can explain,
    where that was looked at.
    """

    case: Case
    tokens: Tokens
    ask: Callable[[Source, Sequence[Distribution]], list[TokenScores]]
    mass: Callable[[Source, float, tuple[int, ...]], Tensor]
    expected: Callable[[], Tensor]
    ask_spread: Callable[[Source, Distribution], TokenScores]
    places: Callable[[Source, float], Places]
    facts: Facts = field(default_factory=Facts)
    whole: Evidence | None = None
    screen: Evidence | None = None
    suspects_T: Tensor | None = None
    _memory: dict[tuple[Source, Distribution], TokenScores] = field(default_factory=dict)

    @property
    def everything(self) -> Evidence:
        """All rows of the setting: a half looks for marks such as constants and grids there, not in itself."""
        return self.whole or self

    def prefetch(self, source: Source, dists: Sequence[Distribution]) -> None:
        """Fetch several distributions from one pass over the logits."""
        missing = [d for d in dict.fromkeys(dists) if (source, d) not in self._memory]
        if missing:
            for dist, scores in zip(missing, self.ask(source, missing), strict=True):
                self._memory[source, dist] = scores

    def scores(self, source: Source, dist: Distribution) -> TokenScores:
        """Return what `source` says under `dist`."""
        self.prefetch(source, [dist])
        return self._memory[source, dist]

    def spread(self, source: Source, dist: Distribution) -> TokenScores:
        """What `scores` returns, with entropies and varentropies."""
        known = self._memory.get((source, dist))
        if known is None or known.varentropy_T is None:
            known = self._memory[source, dist] = self.ask_spread(source, dist)
        return known

    def trainer_T(self) -> Tensor:
        """The trainer's logprobs of its own distribution, float64; -inf outside its kept set."""
        return self.scores(TRAINER, self.case.trainer_distribution).logprobs_T.double()


def _with_previous(values_T: Tensor) -> Tensor:
    before_T = torch.cat([values_T[:1], values_T[:-1]])
    return (values_T + before_T) / 2


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "running mean": lambda values_T: values_T.cumsum(0) / torch.arange(1, len(values_T) + 1),
    "running sum": lambda values_T: values_T.cumsum(0),
    "mean": lambda values_T: values_T.mean().expand(len(values_T)),
    "sum": lambda values_T: values_T.sum().expand(len(values_T)),
    "distance from the mean": lambda values_T: values_T - values_T.mean(),
    "share in the mean": lambda values_T: values_T / len(values_T),
    "running minimum": lambda values_T: values_T.cummin(0).values if len(values_T) else values_T,
    "mean with the previous one": _with_previous,
}
"""Statistics of the logprobs of a completion, [T] to [T], that have been reported in the place of each."""


def snap(values_T: Tensor, grid: str) -> Tensor:
    """Round float64 values to a transport grid."""
    if grid == "bf16":
        return values_T.bfloat16().double()
    if grid == "fp16":
        return values_T.half().double()
    return torch.round(values_T, decimals=int(grid.split()[0]))


def render(evidence: Evidence, model: EngineModel) -> Tensor:
    """Return what an engine built like `model` would have reported, [T] float64.

    NaN where the model says nothing (a shift beyond the end of a row), -inf outside its kept set.
    """
    scores = evidence.scores(model.source, model.dist)
    values_T = (scores.top_logprobs_T if model.entry == "top" else scores.logprobs_T).double()
    if model.entry in MIXED:
        counts = torch.bincount(evidence.tokens.row_T, minlength=len(evidence.tokens.lines)).tolist()
        values_T = torch.cat([MIXED[model.entry](row_T) for row_T in values_T.split(counts)])
    if model.factor != 1:
        values_T = model.factor * values_T
    if model.bias is not None:
        values_T = _biased(evidence, model, values_T)
    if model.allowed:
        values_T = _constrained(evidence, model, values_T)
    if model.shift:
        rolled_T = torch.roll(values_T, -model.shift)
        same_row_T = torch.roll(evidence.tokens.row_T, -model.shift) == evidence.tokens.row_T
        index_T = torch.arange(len(values_T)) + model.shift
        values_T = rolled_T.masked_fill(~same_row_T | (index_T < 0) | (index_T >= len(values_T)), torch.nan)
    if model.grid:
        values_T = snap(values_T, model.grid)
    if model.constant is not None:
        values_T = torch.where(evidence.tokens.engine_T == model.constant, model.constant, values_T)
    if model.skip is not None:
        values_T = values_T.masked_fill(skipped(evidence.tokens, model.skip), torch.nan)
    return values_T


def of_other_rows(whole: Evidence, part: Evidence) -> Tensor:
    """True for the tokens of `whole` whose rows are not in `part`, [T]."""
    lines = set(part.tokens.lines)
    return torch.tensor([whole.tokens.lines[int(row)] not in lines for row in whole.tokens.row_T])


def _biased(evidence: Evidence, model: EngineModel, values_T: Tensor) -> Tensor:
    """Logprobs after a bias b on the logits of some ids: p e^b / (1 + P (e^b - 1)), P the mass of those ids."""
    assert model.bias is not None
    ids, bias = model.bias
    mass_T = evidence.mass(model.source, model.dist.temperature, ids).double()
    inside_T = torch.isin(evidence.tokens.targets_T, torch.tensor(ids))
    return values_T + torch.where(inside_T, bias, 0.0) - torch.log1p(mass_T * math.expm1(bias))


def _constrained(evidence: Evidence, model: EngineModel, values_T: Tensor) -> Tensor:
    """Logprobs among the allowed ids; 0 where the engine says exactly 0.0: nothing else was allowed there."""
    mass_T = evidence.mass(model.source, model.dist.temperature, model.allowed).double()
    return torch.where(evidence.tokens.engine_T == 0.0, 0.0, values_T - mass_T.log())


def skipped(tokens: Tokens, which: str) -> Tensor:
    """True for the last token of each row, for tokens without a number ("unreported"), for tokens within BOUNDARY of a
    change of the stamped version ("boundary"), or for tokens of another version than the newest ("lagged")."""
    row_T = tokens.row_T
    if which == "lagged":
        return tokens.version_T < tokens.version_T.max()
    if which == "unreported":
        return ~torch.isfinite(tokens.engine_T)
    if which == "last":
        return torch.cat([row_T[1:] != row_T[:-1], torch.tensor([True])])
    changed_T = torch.zeros_like(row_T, dtype=torch.bool)
    at = ((tokens.version_T[1:] != tokens.version_T[:-1]) & (row_T[1:] == row_T[:-1])).nonzero()[:, 0] + 1
    for offset in range(-BOUNDARY, BOUNDARY + 1):
        near = (at + offset).clamp(0, len(row_T) - 1)
        changed_T[near] |= row_T[near] == row_T[at]
    return changed_T
