"""`trueup check --engine URL`: ask a running engine, one factor at a time, and judge its answers.

The order is that of a migration study: invariants, what the number means, which tokens, which weights, which
arithmetic, then the trainer itself. Scoring given tokens comes before generation: if the engine's own scores fit the
trainer, weights and arithmetic are right, and whatever is wrong with its rollouts is in how they are made or reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from trueup import env
from trueup.engines.probe_http import Answer, EngineFacts, ProbeClient, read_token
from trueup.errors import ConfigError
from trueup.knobs import CheckConfig
from trueup.parity import verdicts
from trueup.parity.against import URLS, against_baseline, against_engine
from trueup.parity.asking import FEW, PLAIN, Asking
from trueup.parity.assemble import merge, not_seen, reach, ruled_out, untested
from trueup.parity.compare import residual
from trueup.parity.decoding import decoding_cause, first_steps
from trueup.parity.evidence import EngineModel
from trueup.parity.findings import Attribution
from trueup.parity.grouping import Setting, group, looks_like_float32
from trueup.parity.hypotheses import ENGINE_WIDE
from trueup.parity.probes import (
    EXPLICIT,
    PAIRS_AGAIN,
    Probed,
    against_itself,
    cached_against_fresh,
    drawn_apart,
    outcome,
    paired,
    twice,
)
from trueup.parity.prompts import Prompts
from trueup.parity.recipe import TRAINERS
from trueup.parity.report import Cause, ParityReport, SettingReport
from trueup.parity.run import advice
from trueup.parity.setting import usable_rows
from trueup.parity.trainer_check import probe_trainer
from trueup.parity.update_probe import NEEDS, UpdateProbe
from trueup.parity.workbench import Workbench
from trueup.trace import Trace, TraceRow
from trueup.types import LogprobKind, SamplingParams

SCORED = " [engine's scores]"
QUICK = "left out of a quick check (--full)"
NOTHING = "too few tokens could be compared"


@dataclass(kw_only=True)
class LiveCheck:
    """One check of one or several replicas."""

    check: CheckConfig
    bench: Workbench
    clients: list[ProbeClient]
    progress: Callable[[str, float], None]
    probes: list[Probed] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    not_there: dict[str, float] = field(default_factory=dict)
    """By id of what a probe looked for and did not see: the rms in nats above which it would have."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why an id was not tested, if no setting says anything of it."""
    open: dict[str, str] = field(default_factory=dict)
    """Why an id is not ruled out, whatever settings say of it."""
    doubts: list[tuple[str, ...]] = field(default_factory=list)
    generation_off: bool = False
    """Whether generated numbers are off where scores of the same tokens fit."""
    drawn_apart: int = 0
    """Requests that draw other tokens whenever their sampling fields are spelled out."""
    touched: str = "read-only: nothing on the server changed"

    @property
    def facts(self) -> EngineFacts:
        """What the first engine says of itself."""
        return self.clients[0].facts

    def run(self) -> ParityReport:
        """Ask, judge, name. Raises EngineError when the engine cannot be tested."""
        started = time.monotonic()
        self.progress("asking the engine", 0.0)
        verdicts.require_alike(self.clients)
        self.ask = Asking(check=self.check, bench=self.bench, clients=self.clients, causes=self.causes)
        self.quick = self.ask.quick
        prompts, settings = self.ask.prompts(), self.ask.sampling()
        answers = {str(s): self.ask.generate(prompts, s) for s in settings}
        rows = {key: self.ask.rows(prompts, s, answers[key]) for key, s in zip(answers, settings, strict=True)}
        self.ask.require_answers(answers)
        self.base, first = settings[0], str(settings[0])
        echo = verdicts.prompt_echo(prompts.ordinary, answers[first], self.bench.scorer.contexts)
        self.causes += [echo] if echo is not None else []
        scores = self.ask.score(rows[first])
        self.progress("comparing with the trainer", 0.35)
        self._set_precision(scores or rows[first])
        groups = self._settings([r for group_rows in rows.values() for r in group_rows])
        scoring = self._scoring_setting(scores) if scores else None
        ground = next((s for s in (scoring, *groups) if s is not None and usable_rows(s)), None)
        if ground is None:  # no number stands beside a token: the rows themselves say why
            reports = [self.bench.judge(setting).report for setting in groups]
            return self._report(reports, groups, started)
        self.bench.prefetch([*([scoring] if scoring else []), *groups])
        floor = self.bench.floor_rms(ground)
        alone = self.ask.alone(prompts, self.base)
        self._self_consistency(prompts, alone, answers[first][0], scores, floor)
        self._explicit_against_omitted(prompts, alone, floor)
        self.progress("comparing with the trainer", 0.6)
        reports = self._judge(scoring, groups)
        limit = self.bench.limits.rms_factor * floor
        against = against_engine(self.check, scores, limit)
        self._cache(prompts, floor, reports)
        self._own_trainer(ground, floor)
        self.ask.require_alive()
        self._updates(prompts, floor, fits=bool(reports) and reports[0].verdict == "agree")
        self.progress("done", 1.0)
        report = self._report(reports, groups, started)
        if self.check.against and against is None:
            against = against_baseline(report, Path(self.check.against))
        return replace(report, against=against)

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
        case = replace(case, sampling=SamplingParams(), trainer=LogprobKind.RAW, tag=SCORED, omitted=(), drawn=False)
        return Setting(case=case, rows=tuple(rows))

    def _self_consistency(
        self, prompts: Prompts, alone: Sequence[Answer], together: Sequence[Answer], scores: Sequence[TraceRow],
        floor: float,
    ) -> None:  # fmt: skip
        """The engine against itself: the same request twice, and alone against in a batch."""
        client, limit = self.clients[0], verdicts.SELF_LIMIT * floor
        again = self.ask.alone(prompts, self.base)
        changed = False
        if self.quick:
            probes = [twice(alone, again, limit_rms=limit)]
        else:
            rows = [r for r in scores if r.replica in (None, client.url)][:FEW]
            probes, scored_alone = against_itself(client, alone, again, together[:FEW], rows, limit_rms=limit)
            changed = self._scores_changed(rows, scored_alone, limit)
        self.probes += probes
        self.causes += (found := verdicts.self_consistency(probes, scores_changed=changed))
        self.missing |= {"I3": QUICK if self.quick else NOTHING, "I15": NOTHING}
        repeats, batches = ([p for p in probes if p.name.startswith(n)] for n in ("repeat", "batch"))
        if any(c.id == "I15" for c in found):
            self.open["I3"] = "the engine differs from itself without a batch (I15)"
        elif any(p.compared for p in repeats):
            self.not_there["I15"] = limit
        if any(p.numbers_differ for p in batches) and not found:
            self.open["I3"] = "batches move the numbers, but hardly more than asking twice does"
        elif any(p.compared for p in batches) and not found:
            self.not_there["I3"] = limit

    def _scores_changed(self, rows: Sequence[TraceRow], alone: Sequence[Answer], limit: float) -> bool:
        """Whether scores that fit the trainer when they were made first, with others, do not when made again, alone.

        Being alone cannot put a number wrong that is right among others: what was computed before is used again.
        """
        again = [replace(r, completion_logprobs=a.logprobs) for r, a in zip(rows, alone, strict=True) if not a.error]
        if not again:
            return False
        sides = []
        for made in (rows, again):
            setting = self._scoring_setting(made)
            evidence = self.bench.scorer.evidence(setting.case, made)
            left = residual(evidence, EngineModel(dist=setting.case.trainer_distribution))
            sides.append(float(left.residual_T[left.usable_T].square().mean().sqrt()))
        return sides[0] <= limit < sides[1]

    def _explicit_against_omitted(self, prompts: Prompts, alone: Sequence[Answer], floor: float) -> None:
        """The same requests with every field spelled out: a difference is the engine's own defaults."""
        fields = EXPLICIT | PLAIN | self.base
        spelled_out = self.ask.alone(prompts, fields)
        gap = paired(alone, spelled_out)
        words = "fields left out against the same fields spelled out"
        probe = outcome("defaults", gap, verdicts.SELF_LIMIT * floor, words)
        if gap.parted:
            pairs = list(zip(self.ask.few(prompts, self.base), self.ask.few(prompts, fields), strict=True))
            self.drawn_apart = drawn_apart(self.clients[0], pairs, (alone, spelled_out))
            again = f"; {gap.parted} parted, and each time again {self.drawn_apart} of the first {PAIRS_AGAIN}"
            probe = replace(probe, text=probe.text + again)
        self.probes.append(probe)
        if not gap.tokens and gap.failed:
            self.missing["S5"] = "the engine refused requests with every field spelled out"
        elif probe.differs or gap.parted:
            self.open["S5"] = f"not decided: {probe.text}"
        elif probe.compared:
            self.not_there["S5"] = verdicts.SELF_LIMIT * floor

    def _judge(self, scoring: Setting | None, groups: Sequence[Setting]) -> list[SettingReport]:
        """Scoring first; what it shows of weights and arithmetic holds for generation too."""
        reports: list[SettingReport] = []
        given: Attribution | None = None
        excluded = frozenset({"S5"} & self.not_there.keys())
        if (
            "S5" in excluded
        ):  # leaving fields out makes no difference: whatever the engine adds, it adds to every request
            groups = [replace(s, case=replace(s.case, omitted=())) for s in groups]
        if scoring is not None:
            judged = self.bench.judge(scoring, excluded=frozenset(verdicts.SAMPLING_ONLY))
            ruled = tuple(i for i in judged.report.ruled_out if i not in verdicts.IN_REPORTING)
            unseen = {i: x for i, x in judged.report.not_seen.items() if i not in verdicts.IN_REPORTING}
            reports.append(replace(judged.report, ruled_out=ruled, not_seen=unseen))
            if judged.report.verdict == "agree":
                excluded |= verdicts.ENGINE_IS_RIGHT
                self.not_there |= dict.fromkeys(verdicts.ENGINE_IS_RIGHT, judged.report.visible_rms)
            elif judged.found is not None and not judged.found.model.source.plain:
                given = judged.found
            elif judged.found is not None and judged.found.searched:
                excluded |= ENGINE_WIDE
        for setting in groups:
            judged = self.bench.judge(setting, given=given, excluded=excluded)
            reports.append(judged.report)
            if given is None and judged.found is not None and not judged.found.model.source.plain:
                given = judged.found
        before = self.causes
        kept = verdicts.not_explained_by(reports, before, self.probes)
        kept = verdicts.hidden_defaults(self.probes, reports, kept, drawn_apart=self.drawn_apart)
        if any(c.id == "S5" for c in kept):  # what the engine adds to requests is why tokens are drawn otherwise
            reports = [replace(r, causes=tuple(c for c in r.causes if c.subject != "draws")) for r in reports]
        gone = {c.id for c in before} - {c.id for c in kept}
        self.open |= dict.fromkeys(gone, "what its probe saw is accounted for by the causes named")
        reports, generation = self._decoding(reports, groups, kept)
        self.causes = kept if generation is None else [*kept, generation]
        plain = next((r for r in reports if r.label == "temperature=1"), None)
        if scoring is None:
            self.missing["I4"] = self.ask.cannot_score or QUICK
        elif plain is not None and generation is None and {reports[0].verdict, plain.verdict} == {"agree"}:
            self.not_there["I4"] = plain.visible_rms
        else:
            self.missing["I4"] = QUICK if self.quick else "generation and scoring do not both fit the trainer"
        reports = verdicts.settle(reports, self.causes, self.probes)
        self.causes = verdicts.beside_what_is_left(self.causes, reports)
        return reports

    def _decoding(
        self, reports: list[SettingReport], groups: Sequence[Setting], causes: Sequence[Cause]
    ) -> tuple[list[SettingReport], Cause | None]:
        """Where scores fit and generated numbers do not: I4 on evidence of its own, else what is known of it."""
        pair = verdicts.only_generation_is_off(reports, causes)
        if pair is None:
            return reports, None
        plain, scoring = pair
        self.generation_off = True
        seen = None
        if not self.quick:
            setting = next(s for s in groups if s.case.label() == plain.label)
            client = self.clients[0]
            rows = [r for r in setting.rows if r.replica in (None, client.url)]
            seen = first_steps(client, self.bench.scorer, setting.case, rows, salt=self.ask.salt())
        cause, known = decoding_cause(plain, scoring, seen)
        left = None if cause is not None else {**(plain.unexplained or {}), "text": known, "layer": "unknown"}
        named = plain.causes if cause is None else ()
        return [replace(r, causes=named, unexplained=left) if r is plain else r for r in reports], cause

    def _cache(self, prompts: Prompts, floor: float, reports: Sequence[SettingReport]) -> None:
        if self.quick:
            self.missing |= dict.fromkeys(("I5", "W12"), QUICK)
            return
        if self.facts.kind == "openai":
            self.missing |= dict.fromkeys(("I5", "W12"), "the server is not known to keep cached prompts apart by salt")
            return
        probe = cached_against_fresh(
            self.clients[0], prompts.long, limit_rms=verdicts.SELF_LIMIT * floor, salt=str(self.ask.salt())
        )
        self.probes.append(probe)
        known = {c.id for r in reports for c in r.causes}
        blurred = self.generation_off or bool(known & (verdicts.IN_REPORTING | verdicts.COARSE))
        found = verdicts.cached(probe, self.causes, self.probes, updated=bool(self.facts.version), blurred=blurred)
        self.causes += found
        self.doubts += [("I5", "W12")] if any(c.confidence == "low" for c in found) else []
        if probe.differs and not found:
            self.open["I5"] = f"another cause may be behind this: {probe.text}"
        elif probe.compared and not found:
            self.not_there["I5"] = verdicts.SELF_LIMIT * floor
        self.missing["I5"] = probe.text
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

    def _updates(self, prompts: Prompts, floor: float, *, fits: bool) -> None:
        why = "needs an update of the weights (--allow-updates)"
        self.missing |= dict.fromkeys(("W1", "W2", "W3", "W15"), f"{why}, or --checkpoints DIR...")
        self.missing["W4"] = why
        if not self.check.allow_updates:
            return
        limit = verdicts.SELF_LIMIT * floor
        probe = UpdateProbe(self.bench, self.clients[0], prompts, floor=floor, limit_rms=limit, fits=fits)
        outcome_ = probe.run(self.progress)
        self.probes += outcome_.probes
        self.causes += [c for c in outcome_.causes if c.id not in {k.id for k in self.causes}]
        self.not_there |= dict.fromkeys(outcome_.not_there, limit)
        undecided = dict.fromkeys(NEEDS, "the updates did not decide it (see the probes)")
        self.missing |= undecided | outcome_.missing
        if outcome_.cache is not None:
            self.causes = [c for c in self.causes if c.id not in ("I5", "W12")] + [outcome_.cache]
            self.doubts = []
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
            "touched": self.touched, "search": bench.search_title(), "version_scan": bench.version_scan(groups[0]),
        }  # fmt: skip
        if len(self.clients) > 1 and all(r.verdict == "agree" for r in reports):
            self.not_there["W9"] = max(r.visible_rms for r in reports)
        one = "one engine was given; repeat --engine for each replica"
        self.missing["W9"] = one if len(self.clients) == 1 else "no replica fits, so that none is the odd one"
        named = {c.id for c in causes}
        self.open = {i: why for i, why in self.open.items() if i not in named}
        excluded = [i for i in ruled_out(reports, causes) if i not in self.open]
        unseen = {i: x for i, x in not_seen(reports, causes, self.not_there).items() if i not in self.open}
        return ParityReport(
            header=header, settings=tuple(reports), causes=tuple(causes),
            notes=(*bench.notes, *reach([*excluded, *unseen], [r for g in groups for r in g.rows], by_ids=True)),
            problems=tuple(bench.problems), ruled_out=tuple(excluded), not_seen=unseen,
            untested=untested(reports, [*excluded, *unseen, *named], self.missing, self.open),
            seconds=time.monotonic() - started, recipe=advice(groups), probes=tuple(p.as_dict() for p in self.probes),
        )  # fmt: skip


def check_engine(
    check: CheckConfig,
    *,
    announce: Callable[[str], None] = lambda message: None,
    say: Callable[[str], None] = lambda line: None,
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
            client = ProbeClient(url, token=token, timeout_s=check.request_timeout_s, parallel=check.parallel)
            clients.append(client)
            stack.callback(clients[-1].close)
        bench = Workbench.of(check, announce, say)
        return LiveCheck(check=check, bench=bench, clients=clients, progress=progress).run()
