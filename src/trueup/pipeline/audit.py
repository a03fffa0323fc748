"""The audit of a batch: is what its engines reported the trainer's arithmetic on the weights they had, and if not, why?

Reads the run folder only. A sample of the batch's rollouts is taken apart (components.py); the backend's part is judged
against the floor that rounding predicts (parity/floor.py), and a gap beyond it is explained from the same tokens: keys
of prompts that outlived their weights (W12), then everything that `trueup check` looks for in a log, with the run's own
older weights as checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueup.config import build_config
from trueup.errors import TrueupError
from trueup.knobs import LimitsConfig
from trueup.model.load import load_model
from trueup.model.packed import open_policy
from trueup.monitor.rundir import config_of
from trueup.parity.draw_origins import origin_of
from trueup.parity.draws import Draws, judge_draws, not_judged
from trueup.parity.evidence import TRAINER, EngineModel
from trueup.parity.floor import Floor, Judgement, judge
from trueup.parity.grouping import Setting, group, halves
from trueup.parity.setting import SettingJudge
from trueup.parity.workbench import Workbench
from trueup.pipeline.components import Bench, Components
from trueup.pipeline.recipe import recipe_of
from trueup.pipeline.rollout_log import reader_of
from trueup.policy.packing import pack
from trueup.trace import EngineInfo, Trace, TraceRow
from trueup.types import LogprobKind, Rollout, RolloutGroup
from trueup.weights.store import WeightStore, load_tensors

CHECKPOINTS = 8
"""Older weights that a search for causes compares with, of those on disk."""
EXPLAINED = 0.5
"""Share of the backend's mean |r| that stale keys must take away to be named."""
W12 = {
    "id": "W12",
    "title": "cached prompts outlive the weights that computed them",
    "fix": "clear or salt the prefix cache at each update (vLLM: --no-enable-prefix-caching, or reset_prefix_cache)",
}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found; `verdict` is agree, mismatch or inconclusive, `reasons` why, `causes` what is behind it."""

    batch: int
    version: int
    rollouts: int
    tokens: int
    components: Mapping[str, object]
    replayed: int
    floor: Mapping[str, object]
    judgement: Mapping[str, object]
    verdict: str
    reasons: tuple[str, ...]
    draws: Mapping[str, object]
    causes: tuple[Mapping[str, object], ...] = ()
    searched: bool = False
    """Whether causes were looked for."""
    first_batch: int | None = None
    """First batch known to be off, of those since the audit before; None unless it is a mismatch."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def sampled(groups: Sequence[RolloutGroup], tokens: int) -> list[RolloutGroup]:
    """Rollouts with so many tokens between them, or all: one of each group in turn, until there are enough."""
    taken = [0] * len(groups)
    for depth in range(max(len(g.rollouts) for g in groups)):
        for at, own in enumerate(groups):
            if tokens > 0 and depth < len(own.rollouts):
                taken[at] = depth + 1
                tokens -= len(own.rollouts[depth].token_ids)
    return [
        RolloutGroup(rollouts=g.rollouts[:n], rewards=g.rewards[:n]) for g, n in zip(groups, taken, strict=True) if n
    ]


@dataclass
class Auditor:
    """Audits batches of one run; holds one model and the tensors it used last."""

    run: Path
    _held: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = config_of(self.run)
        train = self.config.train
        assert train.model is not None
        self.recipe = recipe_of(self.config)
        self.store = WeightStore(self.run / "weights")
        self.log = reader_of(self.run)
        model = open_policy(load_model(train.model, dtype=getattr(torch, train.dtype)), bitwise=train.bitwise)
        self._start = {n: t.detach().clone() for n, t in model.stored_tensors().items()}
        self.bench = Bench(
            model, self.tensors_of, head_dtype=getattr(torch, train.head), share_prompts=train.share_prompts,
            micro_tokens=train.micro_tokens,
        )  # fmt: skip

    def tensors_of(self, version: int) -> Mapping[str, Tensor]:
        """A version's tensors; 0 is the model the run began with. Raises WeightError for one that is gone."""
        if version == 0:
            return self._start
        if version not in self._held:
            while len(self._held) >= CHECKPOINTS:
                self._held.pop(next(iter(self._held)))
            self._held[version] = load_tensors(self.store.open(version))
        return self._held[version]

    def audit(
        self, record: Mapping[str, Any], *, after: int, since: Sequence[Mapping[str, Any]] = (), explain: bool = True
    ) -> Audit:
        """Audit a batch of batches.jsonl; `after` is the version it led to, `since` batches that were not audited.

        Raises TrueupError.
        """
        started = time.perf_counter()
        groups = self.log.read(record["groups"])
        sample = sampled(groups, self.config.audit.tokens)
        _, parts = self.bench.take_apart(sample, proximal=record["version"], current=after, recipe=self.recipe)
        rollouts = [r for g in sample for r in g.rollouts]
        check = _LogCheck(self, rollouts)
        floor = check.floor()
        judgement = _judged(parts, parts.backend_T, floor, check)
        verdict = "inconclusive" if not judgement.enough else "mismatch" if judgement.reasons else "agree"
        causes: list[dict[str, object]] = []
        drawn, origin = check.draws(floor, judgement)
        if verdict == "agree" and origin is not None:
            verdict, causes = "mismatch", [origin]
            judgement = replace(judgement, reasons=(drawn.why,))
        elif verdict == "mismatch" and explain:
            stale = self._stale_prompts(rollouts, groups, parts, floor, check)
            causes = [stale] if stale is not None and stale["confidence"] == "high" else self._causes(stale, sample)
        first = self._first(record, since) if verdict == "mismatch" and explain else None
        return Audit(
            batch=record["batch"], version=record["version"], rollouts=len(rollouts), tokens=judgement.tokens,
            components=parts.as_dict(), replayed=parts.replayed, floor=floor.as_dict(),
            judgement={n: getattr(judgement, n) for n in judgement.__dataclass_fields__}, verdict=verdict,
            reasons=judgement.reasons, draws=drawn.as_dict(), causes=tuple(causes), searched=explain, first_batch=first,
            seconds=time.perf_counter() - started,
        )  # fmt: skip

    def _first(self, record: Mapping[str, Any], since: Sequence[Mapping[str, Any]]) -> int:
        """The first batch that is off, by halving; batches whose weights are gone count as not known to be."""
        low, high = 0, len(since)
        while low < high:
            middle = (low + high) // 2
            try:
                off = self.audit(since[middle], after=since[middle]["after"], explain=False).verdict == "mismatch"
            except TrueupError:
                off = False
            low, high = (low, middle) if off else (middle + 1, high)
        return int(since[low]["batch"] if low < len(since) else record["batch"])

    def _causes(self, stale: dict[str, object] | None, sample: Sequence[RolloutGroup]) -> list[dict[str, object]]:
        """What a search finds; W12 instead if it explains more than each of these."""
        rollouts = [r for g in sample for r in g.rollouts]
        older = self._nearest(sample, below=_commonest_version(rollouts))
        found = _LogCheck(self, rollouts, older=older).causes()
        return [stale] if stale is not None and all(_share(stale) > _share(cause) for cause in found) else found

    def _nearest(self, sample: Sequence[RolloutGroup], *, below: int) -> list[Path]:
        """Folders of older weights, oldest first: the first, the newest, and those that fit what was reported best."""
        batch = pack(sample)
        gaps = {
            version: float((self.bench.score(version, batch).logprobs_T - batch.behaviour_logprobs_T).abs().median())
            for version in (0, *self.store.versions())
            if version < below
        }
        ends = {min(gaps), max(gaps)} if gaps else set()
        best = sorted(gaps.keys() - ends, key=gaps.__getitem__)[: CHECKPOINTS - len(ends)]
        return [self.folder(v) for v in sorted({*ends, *best})]

    def folder(self, version: int) -> Path:
        """Where a version's weights lie. Raises WeightError for one that is gone."""
        model = self.config.train.model
        assert model is not None
        return model if version == 0 else self.store.open(version).path

    def _stale_prompts(
        self, rollouts: Sequence[Rollout], groups: Sequence[RolloutGroup], parts: Components, floor: Floor,
        check: _LogCheck,
    ) -> dict[str, object] | None:  # fmt: skip
        """W12, if the reported numbers are those of prompts whose shared beginning older weights computed."""
        prompts = [g.rollouts[0].prompt.token_ids for g in groups]
        left_T, fitted = parts.backend_T.clone(), []
        at = 0
        for rollout in rollouts:
            span = slice(at, at + len(rollout.token_ids))
            at = span.stop
            best = self._oldest_keys(rollout, shared_beginning(rollout.prompt.token_ids, prompts), left_T[span])
            if best is not None:
                left_T[span], version = best
                fitted.append(version)
        before, after = (float(x[parts.usable_T].abs().mean()) for x in (parts.backend_T, left_T))
        explained = 1 - after / before if before > 0 else 0.0
        judgement = _judged(parts, left_T, floor, check)
        if not fitted or explained < EXPLAINED:
            return None
        return W12 | {
            "layer": "weights", "confidence": "low" if judgement.reasons else "high", "explained": explained,
            "evidence": f"{len(fitted)} of {len(rollouts)} completions fit keys of version {min(fitted)} to "
            f"{max(fitted)} under the prompt's beginning, where {rollouts[0].weight_versions[0]} is stamped; rms left "
            f"{judgement.rms:.2g} nats, floor {floor.rms:.2g}",
        }  # fmt: skip

    def _oldest_keys(self, rollout: Rollout, shared: int, now_T: Tensor) -> tuple[Tensor, int] | None:
        """(backend's part, version) if some older version's keys under the first tokens fit better than its own."""
        if not shared or not rollout.cache_lives:
            return None
        own = rollout.cache_lives[0].runs[0][0]
        best: tuple[Tensor, int] | None = None
        mu_T = torch.tensor(rollout.behaviour_logprobs, dtype=torch.float64)
        for version in [v for v in (0, *self.store.versions()) if v < own]:
            mixed = replace(rollout, cache_lives=tuple(with_old_keys(rollout, shared, version)))
            gap_T = self.bench.replayer.replay(mixed).logprobs_T.double() - mu_T
            if float(gap_T.abs().mean()) < float((now_T if best is None else best[0]).abs().mean()):
                best = gap_T, version
        return best


def shared_beginning(prompt: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """Tokens at the start of a prompt that another one has too: what a prefix cache would reuse, never all of it."""
    longest = 0
    for other in others:
        if tuple(other) != tuple(prompt):
            same = next((i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), len(other))
            longest = max(longest, same)
    return min(longest, len(prompt) - 1)


def with_old_keys(rollout: Rollout, shared: int, version: int) -> Iterator[Any]:
    """The rollout's cache lives as they would be with the first `shared` positions computed by another version."""
    for life in rollout.cache_lives:
        runs, left = [(version, shared)], shared
        for own, positions in life.runs:
            taken = min(left, positions)
            left -= taken
            if positions > taken:
                runs.append((own, positions - taken))
        yield replace(life, runs=tuple(runs))


def _share(cause: Mapping[str, object]) -> float:
    share = cause["explained"]
    return share if isinstance(share, float) else 0.0


def _judged(parts: Components, backend_T: Tensor, floor: Floor, check: _LogCheck) -> Judgement:
    rows = range(int(parts.row_T.max()) + 1)
    return judge(backend_T.masked_fill(~parts.usable_T, math.nan), parts.row_T, floor, check.bench.limits, lines=rows)


class _LogCheck:
    """`trueup check` on the sample's tokens of its commonest version, whose weights are the trainer's there."""

    def __init__(self, auditor: Auditor, rollouts: Sequence[Rollout], *, older: Sequence[Path] = ()) -> None:
        train = auditor.config.train
        pure = _pure(rollouts)
        self.comparable = bool(pure)
        version = _commonest_version(rollouts)
        check = build_config({"check": {
            "model": str(auditor.folder(version)), "dtype": train.dtype, "head": train.head, "trainer": "processed",
            "checkpoints": [str(folder) for folder in older],
        }}, where="audit").check  # fmt: skip
        self.bench = Workbench.of(check, lambda message: None)
        info = EngineInfo(name=rollouts[0].engine, flags={"dtype": train.dtype, "head_dtype": train.head})
        rows = tuple(
            _row(at, r, version, info)
            for at, r in enumerate(rollouts)
            if (r in pure or not pure) and r.weight_versions[0] == version
        )
        self.bench.set_precision(rows)
        trace = Trace(path=auditor.run, rows=rows, problems=())
        self.setting: Setting = self.bench.fit_for_model(group(trace, LogprobKind.PROCESSED, []))[0]

    def floor(self) -> Floor:
        """What rounding predicts for these tokens."""
        model = EngineModel(dist=self.setting.case.trainer_distribution)
        return SettingJudge(self.bench.scorer, self.bench.limits).floor(self.setting, model)

    def draws(self, floor: Floor, judgement: Judgement) -> tuple[Draws, dict[str, object] | None]:
        """Whether these tokens were drawn as declared, and what is behind it if not.

        A run is audited many times, so only what shows in both halves of the completions counts. A batch holds the
        groups that finished first, so the places where completions end prove nothing.
        """
        case, scorer, limits = self.setting.case, self.bench.scorer, self.bench.limits
        model = EngineModel(dist=case.processed, source=TRAINER)
        of_half = limits.model_copy(update={"min_tokens": limits.min_tokens // 2})

        def judged(rows: Sequence[TraceRow], limits: LimitsConfig, by: EngineModel = model) -> Draws:
            return judge_draws(
                scorer.evidence(case, rows), by, limits, noise_rms=floor.rms,
                token_limit=judgement.token_limit, whatever_length=True,
            )  # fmt: skip

        if not self.comparable:
            return not_judged("no token attended to keys of its own version alone"), None
        parts = [judged(rows, of_half) for rows in halves(self.setting.rows)]
        whole = judged(self.setting.rows, limits)
        if any(part.verdict != "mismatch" for part in parts) or whole.verdict != "mismatch":
            return (replace(whole, verdict="agree") if whole.verdict == "mismatch" else whole), None
        again = partial(judged, self.setting.rows, limits)
        return whole, origin_of(scorer.evidence(case, self.setting.rows), whole, model, again).as_dict()

    def causes(self) -> list[dict[str, object]]:
        """What explains the gap of these tokens; nothing if no token attended to keys of its own version alone."""
        return [c.as_dict() for c in self.bench.judge(self.setting).report.causes] if self.comparable else []


def _pure(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those whose first token's version wrote the keys it attended to."""
    return [r for r in rollouts if not r.cache_lives or r.cache_lives[0].runs[0][0] == r.weight_versions[0]]


def _commonest_version(rollouts: Sequence[Rollout]) -> int:
    """Of first tokens, of the rollouts that begin pure if any do."""
    stamped = [r.weight_versions[0] for r in _pure(rollouts) or rollouts]
    return max(set(stamped), key=lambda v: (stamped.count(v), v))


def _row(line: int, rollout: Rollout, version: int, info: EngineInfo) -> TraceRow:
    """The first tokens of a rollout as a trace row: as far as one version made them."""
    count = next((t for t, v in enumerate(rollout.weight_versions) if v != version), len(rollout.token_ids))
    sampling = {n: v for n, v in asdict(rollout.sampling).items() if v is not None and n not in ("stop", "seed")}
    return TraceRow(
        line=line, engine=info, sampling=sampling, prompt_token_ids=rollout.prompt.token_ids,
        completion_token_ids=rollout.token_ids[:count], completion_logprobs=rollout.behaviour_logprobs[:count],
    )  # fmt: skip
