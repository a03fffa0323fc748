"""`trueup check --engine URL`: ask a running engine, one factor at a time, and judge its answers.

The order is that of a migration study: invariants, what the number means, which tokens, which weights, which
arithmetic, then the trainer itself. Scoring given tokens comes before generation: if the engine's own scores fit the
trainer, weights and arithmetic are right, and whatever is wrong with its rollouts is in how they are made or reported.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from trueup import env
from trueup.config import CheckConfig
from trueup.engines.probe_http import Answer, EngineFacts, ProbeClient, read_token
from trueup.errors import ConfigError, EngineError
from trueup.parity import verdicts
from trueup.parity.against import URLS, against_baseline, against_engine
from trueup.parity.assemble import merge, reach, ruled_out, untested
from trueup.parity.attribution import Attribution
from trueup.parity.grouping import Setting, group, looks_like_float32
from trueup.parity.hypotheses import ENGINE_WIDE
from trueup.parity.probes import (
    EXPLICIT,
    Probed,
    against_itself,
    asks_of,
    cached_against_fresh,
    outcome,
    paired,
    scored,
)
from trueup.parity.prompts import Prompts, make_prompts
from trueup.parity.recipe import TRAINERS
from trueup.parity.report import Cause, ParityReport, SettingReport
from trueup.parity.run import advice
from trueup.parity.trainer_check import probe_trainer
from trueup.parity.update_probe import UpdateProbe
from trueup.parity.workbench import Workbench
from trueup.trace import Trace, TraceRow
from trueup.types import LogprobKind, SamplingParams

PLAIN: dict[str, object] = {"temperature": 1.0}
SHAPED: dict[str, object] = {"temperature": 0.7, "top_p": 0.9}
SCORED = " [engine's scores]"
LONG_TOKENS = 300
"""Longer than two of vLLM's blocks on a CPU (128 tokens), so that a prefix cache has something to reuse."""
FEW, QUICK_FEW = 4, 2
MIN_OK = 0.5
"""With fewer answers than this share nothing can be judged."""


@dataclass(kw_only=True)
class LiveCheck:
    """One check of one or several replicas."""

    check: CheckConfig
    bench: Workbench
    clients: list[ProbeClient]
    progress: Callable[[str, float], None]
    probes: list[Probed] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    not_there: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    doubts: list[tuple[str, ...]] = field(default_factory=list)
    base: dict[str, object] = field(default_factory=dict)
    lines: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    touched: str = "read-only: nothing on the server changed"

    @property
    def facts(self) -> EngineFacts:
        """What the first engine says of itself."""
        return self.clients[0].facts

    @property
    def quick(self) -> bool:
        """Fewer prompts and settings, no probe that needs more than one request a prompt."""
        return self.check.depth == "quick"

    def run(self) -> ParityReport:
        """Ask, judge, name. Raises EngineError when the engine cannot be tested."""
        started = time.monotonic()
        self.progress("asking the engine", 0.0)
        prompts = self._prompts()
        settings = self._sampling()
        answers = {str(s): self._generate(prompts, s) for s in settings}
        rows = {key: self._rows(prompts, s, answers[key]) for key, s in zip(answers, settings, strict=True)}
        self._require_answers(answers)
        echo = verdicts.prompt_echo(prompts.ordinary, answers[str(settings[0])][0])
        self.causes += [echo] if echo is not None else []
        first = str(settings[0])
        scores = self._score(rows[first])
        self.progress("comparing with the trainer", 0.35)
        self._set_precision(scores or rows[first])
        groups = self._settings([r for group_rows in rows.values() for r in group_rows])
        scoring = self._scoring_setting(scores) if scores else None
        self.bench.prefetch([*([scoring] if scoring else []), *groups])
        floor = self.bench.floor_rms(scoring or groups[0])
        self.base = settings[0]
        alone = self._alone(prompts, self.base)
        self._self_consistency(prompts, alone, answers[first], scores, floor)
        self._explicit_against_omitted(prompts, alone, floor)
        self.progress("comparing with the trainer", 0.6)
        reports = self._judge(scoring, groups)
        limit = self.bench.limits.rms_factor * floor
        against = against_engine(self.check, scores, limit)
        self._cache(prompts, floor, reports)
        self._own_trainer(scoring or groups[0], floor)
        self._updates(prompts, floor)
        self.progress("done", 1.0)
        report = self._report(reports, groups, started)
        if self.check.against and against is None:
            against = against_baseline(report, Path(self.check.against))
        return replace(report, against=against)

    def _prompts(self) -> Prompts:
        scorer = self.bench.scorer
        vocab = scorer.model(scorer.dtype()).vocab_size
        room = (self.facts.max_length or 2048) - self.check.tokens
        return make_prompts(
            scorer.contexts,
            count=self.check.prompts // (2 if self.quick else 1),
            long_tokens=min(LONG_TOKENS, room - 8),
            vocab=vocab,
        )

    def _sampling(self) -> list[dict[str, object]]:
        """The settings to try: plain, and the run's own or one that shapes the distribution; in a quick check only
        the latter."""
        own: dict[str, object] = dict(self.check.sampling_fields) or dict(SHAPED)
        if self.quick:
            self.missing["I4"] = "left out of a quick check (--full)"
            return [own]
        return [own] if own == PLAIN else [dict(PLAIN), own]

    def _salt(self) -> str | None:
        """A fresh one, where the server knows salts: whether a prompt is cached is a factor of its own."""
        return None if self.facts.kind == "openai" else f"trueup-{time.time_ns()}"

    def _generate(self, prompts: Prompts, sampling: dict[str, object]) -> list[list[Answer]]:
        asks = asks_of(
            prompts.ordinary, sampling, max_tokens=self.check.tokens, seed=self.check.seed, salt=self._salt()
        )
        return [client.generate(asks, together=True) for client in self.clients]

    def _rows(
        self, prompts: Prompts, sampling: dict[str, object], answers: Sequence[Sequence[Answer]]
    ) -> list[TraceRow]:
        return [
            TraceRow(
                line=next(self.lines), engine=self.facts.info, sampling=sampling, prompt_token_ids=prompt,
                completion_token_ids=answer.ids, completion_logprobs=answer.logprobs, weight_versions=answer.versions,
                replica=client.url if len(self.clients) > 1 else None,
            )
            for client, group_answers in zip(self.clients, answers, strict=True)
            for prompt, answer in zip(prompts.ordinary, group_answers, strict=True)
            if answer.error is None
        ]  # fmt: skip

    def _require_answers(self, answers: dict[str, list[list[Answer]]]) -> None:
        """Raise EngineError when too few requests came back; name what the errors say."""
        flat = [a for per_client in answers.values() for group_answers in per_client for a in group_answers]
        failed = [a.error for a in flat if a.error]
        if not failed:
            return
        cause = verdicts.not_finite(failed, len(flat))
        if cause is not None:
            self.causes.append(cause)
        dead = [c.url for c, own in zip(self.clients, zip(*answers.values(), strict=True), strict=True)
                if all(a.error for group in own for a in group)]  # fmt: skip
        empty = [key for key, own in answers.items() if all(a.error for group in own for a in group)]
        if dead or empty or (cause is None and len(failed) > (1 - MIN_OK) * len(flat)):
            raise EngineError(f"{len(failed)} of {len(flat)} requests failed: {failed[0]}")
        self.bench.problems.append(f"{len(failed)} of {len(flat)} requests failed, first: {failed[0]}")

    def _score(self, rows: Sequence[TraceRow]) -> list[TraceRow]:
        """The engine's own raw scores of what it generated at T=1, as rows; none if it cannot score."""
        kept = []
        for client in self.clients:
            own = [r for r in rows if r.replica in (None, client.url)]
            answers = scored(client, own, together=True)
            if answers and all(a.error for a in answers):
                self.bench.notes.append(f"the engine does not score given tokens: {answers[0].error}")
                self.missing |= dict.fromkeys(("I4",), "the engine does not score given tokens (prompt_logprobs)")
                return []
            kept += [
                replace(row, completion_logprobs=a.logprobs, line=row.line)
                for row, a in zip(own, answers, strict=True)
                if a.error is None
            ]
        return kept

    def _set_precision(self, rows: Sequence[TraceRow]) -> None:
        """Take the engine's precision from what it declares, else from how close its numbers are to float32."""
        if self.facts.info.flags.get("dtype") is None:
            fp32 = looks_like_float32(self.bench.scorer, rows)
            flags = dict(self.facts.info.flags) | ({"dtype": "float32"} if fp32 else {})
            if fp32:
                self.bench.notes.append("the engine does not say its dtype; it computes in float32 by its numbers")
            self.info = replace(self.facts.info, flags=flags)
        else:
            self.info = self.facts.info
        self.bench.set_precision([replace(r, engine=self.info) for r in rows])

    def _settings(self, rows: Sequence[TraceRow]) -> list[Setting]:
        trace = Trace(
            path=Path(self.clients[0].url), rows=tuple(replace(r, engine=self.info) for r in rows), problems=()
        )
        settings = group(trace, TRAINERS[self.check.trainer], self.bench.problems)
        return self.bench.fit_for_model(settings)

    def _scoring_setting(self, rows: Sequence[TraceRow]) -> Setting:
        case = group(
            Trace(path=Path(self.clients[0].url), rows=tuple(replace(r, engine=self.info) for r in rows), problems=()),
            LogprobKind.RAW, [],
        )[0].case  # fmt: skip
        case = replace(case, sampling=SamplingParams(), trainer=LogprobKind.RAW, tag=SCORED, omitted=())
        return Setting(case=case, rows=tuple(rows))

    def _alone(self, prompts: Prompts, sampling: dict[str, object]) -> list[Answer]:
        """A few prompts one after another; a quick check asks for less."""
        few, tokens = (QUICK_FEW, self.check.tokens // 2) if self.quick else (FEW, self.check.tokens)
        asks = asks_of(prompts.ordinary[:few], sampling, max_tokens=tokens, seed=self.check.seed, salt=self._salt())
        return self.clients[0].generate(asks, together=False)

    def _self_consistency(
        self, prompts: Prompts, alone: Sequence[Answer], together: Sequence[Sequence[Answer]],
        scores: Sequence[TraceRow], floor: float,
    ) -> None:  # fmt: skip
        """The engine against itself: the same request twice, and alone against in a batch."""
        if self.quick:
            self.missing |= dict.fromkeys(("I3", "I15"), "left out of a quick check (--full)")
            return
        client = self.clients[0]
        again = self._alone(prompts, self.base)
        rows = [r for r in scores if r.replica in (None, client.url)][:FEW]
        limit = verdicts.SELF_LIMIT * floor
        probes = against_itself(client, alone, again, together[0][:FEW], rows, limit_rms=limit)
        self.probes += probes
        found = verdicts.self_consistency(probes)
        self.causes += found
        if any(p.compared for p in probes if p.name.startswith("repeat")):
            self.not_there |= {"I15"} - {c.id for c in found}
        if not found and any(p.compared for p in probes if p.name.startswith("batch")):
            self.not_there.add("I3")
        for cause_id in {"I3", "I15"} - self.not_there - {c.id for c in found}:
            self.missing[cause_id] = "too few tokens could be compared"

    def _explicit_against_omitted(self, prompts: Prompts, alone: Sequence[Answer], floor: float) -> None:
        """The same requests with every field spelled out: a difference is the engine's own defaults."""
        gap = paired(alone, self._alone(prompts, EXPLICIT | PLAIN | self.base))
        words = "fields left out against the same fields spelled out"
        probe = outcome("defaults", gap, verdicts.SELF_LIMIT * floor, words)
        self.probes.append(probe)
        if not gap.tokens and gap.failed:
            self.missing["S5"] = "the engine refused requests with every field spelled out"
        elif probe.compared and not probe.differs and not gap.parted:
            self.not_there.add("S5")

    def _judge(self, scoring: Setting | None, groups: Sequence[Setting]) -> list[SettingReport]:
        """Scoring first; what it shows of weights and arithmetic holds for generation too."""
        reports: list[SettingReport] = []
        given: Attribution | None = None
        excluded = frozenset(self.not_there & {"S5"})
        if scoring is not None:
            judged = self.bench.judge(scoring, excluded=frozenset(verdicts.SAMPLING_ONLY))
            reports.append(judged.report)
            if judged.report.verdict == "agree":
                excluded |= verdicts.ENGINE_IS_RIGHT
                self.not_there |= verdicts.ENGINE_IS_RIGHT - {"I4"}
            elif judged.found is not None and not judged.found.model.source.plain:
                given = judged.found
            elif judged.found is not None and judged.found.searched:
                excluded |= ENGINE_WIDE
        for setting in groups:
            judged = self.bench.judge(setting, given=given, excluded=excluded)
            reports.append(judged.report)
            if given is None and judged.found is not None and not judged.found.model.source.plain:
                given = judged.found
        self.causes = verdicts.not_explained_by(reports, self.causes)
        self.causes = verdicts.hidden_defaults(self.probes, reports, self.causes)
        generation = verdicts.generation_against_scoring(reports, self.causes)
        if generation is not None:
            self.causes.append(generation)
        elif scoring is not None and not self.quick:
            self.not_there.add("I4")
        return verdicts.settle(reports, self.causes)

    def _cache(self, prompts: Prompts, floor: float, reports: Sequence[SettingReport]) -> None:
        if self.quick:
            self.missing |= dict.fromkeys(("I5", "W12"), "left out of a quick check (--full)")
            return
        if self.facts.kind == "openai":
            self.missing |= dict.fromkeys(("I5", "W12"), "the server is not known to keep cached prompts apart by salt")
            return
        probe = cached_against_fresh(
            self.clients[0], prompts.long, limit_rms=verdicts.SELF_LIMIT * floor, salt=str(self._salt())
        )
        self.probes.append(probe)
        lost = any(c.id in verdicts.IN_REPORTING for r in reports for c in r.causes)
        found = verdicts.cached(probe, self.causes, updated=bool(self.facts.version), lost=lost)
        self.causes += found
        self.doubts += [("I5", "W12")] if any(c.confidence == "low" for c in found) else []
        if not found and probe.compared:
            self.not_there.add("I5")
        self.missing["W12"] = "needs an update of the weights (--allow-updates)"

    def _own_trainer(self, setting: Setting, floor: float) -> None:
        """The trainer of this check against itself; a trainer of yours is asked by `check_rollouts`."""
        why = "this check runs a trainer of its own; yours is asked by trueup.parity.check_rollouts"
        self.missing |= dict.fromkeys(("R1", "R2", "R3", "R4", "R5"), why)
        if self.quick:
            return
        rows = setting.rows[:FEW]
        probes, causes = probe_trainer(self.bench.scorer.afresh, rows, verdicts.SELF_LIMIT * floor)
        self.probes += probes
        self.causes += causes

    def _updates(self, prompts: Prompts, floor: float) -> None:
        why = "needs an update of the weights (--allow-updates)"
        self.missing |= dict.fromkeys(("W1", "W2", "W3", "W15"), f"{why}, or --checkpoints DIR...")
        self.missing["W4"] = why
        if not self.check.allow_updates:
            return
        probe = UpdateProbe(self.bench, self.clients[0], prompts, floor=floor, limit_rms=verdicts.SELF_LIMIT * floor)
        outcome_ = probe.run(self.progress)
        self.probes += outcome_.probes
        self.causes += [c for c in outcome_.causes if c.id not in {k.id for k in self.causes}]
        self.not_there |= outcome_.not_there
        self.missing |= outcome_.missing
        self.touched = f"updates allowed: {outcome_.restored or 'none was made'}"
        self.bench.notes += outcome_.notes

    def _report(self, reports: list[SettingReport], groups: Sequence[Setting], started: float) -> ParityReport:
        bench, facts = self.bench, self.facts
        digest = bench.scorer.digest()
        weights = verdicts.served_weights(facts, bench, reports)
        if weights is not None:
            self.causes.insert(0, weights)
        if self.doubts:
            reports = [replace(reports[0], ambiguous=(*reports[0].ambiguous, *self.doubts)), *reports[1:]]
        causes = merge(reports, self.causes)
        header: dict[str, object] = {
            "trace": None, "url": [c.url for c in self.clients], "model": str(self.check.model), "digest": digest,
            "engine": [facts.info.title()], "engine_arithmetic": bench.scorer.engine.title(),
            "flags": dict(facts.info.flags), "flags_readable": facts.readable, "trainer": self.check.trainer,
            "trainer_arithmetic": bench.scorer.trainer.title(), "rows": sum(r.rows for r in reports),
            "tokens": sum(r.tokens for r in reports), "environment": env.describe(),
            "touched": self.touched, "version_scan": bench.version_scan(groups[0]),
        }  # fmt: skip
        if len(self.clients) > 1 and len({r.replica for g in groups for r in g.rows}) == len(self.clients):
            self.not_there.add("W9")
        self.missing["W9"] = "one engine was given; repeat --engine for each replica"
        absent = sorted(self.not_there - {c.id for c in causes})
        named = [c.id for c in causes]
        excluded = ruled_out(reports, causes, absent)
        return ParityReport(
            header=header, settings=tuple(reports), causes=tuple(causes),
            notes=(*bench.notes, *reach(excluded, [r for g in groups for r in g.rows], by_ids=True)),
            problems=tuple(bench.problems), untested=untested(reports, [*absent, *named], self.missing),
            ruled_out=tuple(excluded), seconds=time.monotonic() - started,
            recipe=advice(groups), probes=tuple(p.as_dict() for p in self.probes),
        )  # fmt: skip


def check_engine(
    check: CheckConfig,
    *,
    announce: Callable[[str], None] = lambda message: None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> ParityReport:
    """Check running engines, given as replicas of one another. Raises TrueupError when nothing can be tested.

    `progress` gets what is under way and the share of the check that is done.
    """
    token = None if check.token_file is None else read_token(check.token_file)
    baseline = check.against
    if baseline and not baseline.startswith(URLS) and not (baseline.endswith(".json") and Path(baseline).is_file()):
        raise ConfigError(
            f"--against {baseline}: with --engine, name another engine's URL or a report.json that exists"
        )
    with ExitStack() as stack:
        clients = []
        for url in check.engine:
            clients.append(ProbeClient(url, token=token, timeout_s=check.request_timeout_s))
            stack.callback(clients[-1].close)
        bench = Workbench.of(check, announce)
        return LiveCheck(check=check, bench=bench, clients=clients, progress=progress).run()
