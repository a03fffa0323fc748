"""`trueup check --trace`: from a log and a checkpoint to a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trueup import env
from trueup.errors import ConfigError, RecordError, TraceError
from trueup.knobs import CheckConfig
from trueup.parity.against import compare_against
from trueup.parity.assemble import merge, not_seen, reach, ruled_out, untested
from trueup.parity.findings import Attribution
from trueup.parity.grouping import Setting, group
from trueup.parity.hypotheses import ENGINE_WIDE
from trueup.parity.invariants import require_logprobs
from trueup.parity.recipe import TRAINERS, lint, recipe_of_engine
from trueup.parity.report import Cause, ParityReport, SettingReport
from trueup.parity.trainer_check import judge_logged
from trueup.parity.workbench import Workbench
from trueup.trace import Trace, read_trace

LOG_CANNOT_SHOW = dict.fromkeys(
    ("W4", "W12", "I3", "I4", "I5", "I15"), "a log cannot show it; check the running engine (--engine URL)"
) | {
    "I2": "needs an engine that declares fp32, or its own A/B of head precision",
    "R1": "needs a second pass of your trainer over the same tokens",
    "R5": "needs a pass of your trainer in another batch shape",
    "W9": "the log does not say which replica made a row",
    "W16": "the log declares no weight digest",
    "O7": "the log carries no weight versions",
}
FAR_FLOORS = 4.0
"""A row of another checkpoint is off by at least so many floors."""


def silent(message: str) -> None:
    """Announce nothing."""


def advice(settings: Sequence[Setting]) -> tuple[dict[str, str], ...]:
    """What the declared flags and sampling give away, each once."""
    found = {
        (a.id, a.message): a.as_dict()
        for s in settings
        for a in lint(recipe_of_engine(s.case.engine, s.case.sampling, s.case.trainer))
    }
    return tuple(found.values())


def check_trace(
    check: CheckConfig, *, announce: Callable[[str], None] = silent, say: Callable[[str], None] = silent
) -> ParityReport:
    """Check a recorded trace against a checkpoint, and against another trace or a report if `check.against` names one.

    `announce` receives a line whenever something that takes seconds starts, `say` what should stay to be read. Raises
    TrueupError when nothing can be tested at all.
    """
    if check.trace is None:
        raise ConfigError("check needs --engine URL (a running server) or --trace FILE (a recorded trueup.trace/1 log)")
    bench = Workbench.of(check, announce, say)
    against = Path(check.against) if check.against else None
    if against is not None and not against.is_file():
        raise TraceError(f"--against {against} does not exist")
    announce(f"reading {check.trace}")
    report = check_rows(bench, read_trace(check.trace))
    if against is not None:
        report = replace(report, against=compare_against(report, check, against))
    return report


def check_rows(bench: Workbench, trace: Trace) -> ParityReport:
    """Judge the rows of a trace. Raises TrueupError when nothing can be tested."""
    started = time.monotonic()
    check = bench.check
    require_logprobs(trace.rows)
    bench.problems += [f"line {p.line}: {p.message}" + ("; row left out" if p.dropped else "") for p in trace.problems]
    settings = group(trace, TRAINERS[check.trainer], bench.problems)
    if not settings:
        raise RecordError(f"no row of {trace.path} has readable sampling parameters: {bench.problems[0]}")
    if check.max_rows:
        settings = [replace(s, rows=s.rows[: check.max_rows]) for s in settings]
    bench.set_precision(trace.rows)
    digest = bench.scorer.digest()
    settings = bench.fit_for_model(settings)
    bench.prefetch(settings)
    reports = judge_all(bench, settings)
    other = of_other_weights(settings, reports, digest)
    trainers = [report for s in settings if (report := judge_logged(bench, s)) is not None]
    for mine in (r for r in trainers if r.verdict == "agree"):
        bench.notes.append(f"{mine.label}: your trainer's numbers are ours, within the floor")
    reports += [r for r in trainers if r.verdict != "agree"]
    causes = merge(reports)
    if other is not None:
        causes = [wrong_weights(f"the trace declares weights {other:.12}", digest), *causes]
    elif any(r.model_digest not in (None, digest) for s in settings for r in s.rows):
        bench.notes.append(
            "the trace declares another weight digest than the checkpoint's, yet most of the numbers fit (re-saved?)"
        )
    if any(r.sampling.get("temperature") == 0 for r in trace.rows):
        bench.notes.append(
            "greedy rows are compared at T=1, before the argmax: a processed logprob at T=0 is not defined"
        )
    header = {
        "trace": str(trace.path), "model": str(check.model), "digest": digest,
        "engine": sorted({r.engine.title() for r in trace.rows}), "engine_arithmetic": bench.scorer.engine.title(),
        "flags": dict(trace.rows[0].engine.flags), "trainer": check.trainer,
        "trainer_arithmetic": bench.scorer.trainer.title(), "rows": len(trace.rows),
        "tokens": sum(r.tokens for r in reports), "environment": env.describe(),
        "search": bench.search_title(), "version_scan": bench.version_scan(settings[0]),
    }  # fmt: skip
    excluded, unseen = ruled_out(reports, causes), not_seen(reports, causes)
    return ParityReport(
        header=header, settings=tuple(reports), causes=tuple(causes),
        notes=(*bench.notes, *reach([*excluded, *unseen], trace.rows, by_ids=False)),
        problems=tuple(bench.problems),
        untested=untested(reports, [*excluded, *unseen, *(c.id for c in causes)], LOG_CANNOT_SHOW, {}),
        ruled_out=tuple(excluded), not_seen=unseen, seconds=time.monotonic() - started, recipe=advice(settings),
    )  # fmt: skip


def judge_all(bench: Workbench, settings: Sequence[Setting]) -> list[SettingReport]:
    """Judge settings in turn: an engine's weights and arithmetic are looked for once and carried over to its others."""
    reports: list[SettingReport] = []
    given: dict[str, Attribution] = {}
    excluded: dict[str, frozenset[str]] = {}
    for setting in settings:
        engine = repr(setting.case.engine)
        judged = bench.judge(setting, given=given.get(engine), excluded=excluded.get(engine, frozenset()))
        reports.append(judged.report)
        if judged.found is not None and judged.report.verdict == "mismatch":
            if not judged.found.model.source.plain:
                given[engine] = judged.found
            elif judged.found.searched:
                excluded[engine] = ENGINE_WIDE
    return reports


def of_other_weights(settings: Sequence[Setting], reports: Sequence[SettingReport], digest: str) -> str | None:
    """The digest of another checkpoint that rows declare, if most of these rows are off for no known reason."""
    declared = {r.line: r.model_digest for s in settings for r in s.rows if r.model_digest not in (None, digest)}
    off: dict[int, bool] = {}
    for report in reports:
        floor = report.noise_floor.get("rms")
        for line, rms in report.points.rms_by_line().items():
            if line in declared:
                far = isinstance(floor, float) and rms > FAR_FLOORS * floor
                off[line] = off.get(line, False) or (far and report.unexplained is not None)
    return declared[min(declared)] if sum(off.values()) > len(declared) / 2 else None


def wrong_weights(evidence: str, digest: str) -> Cause:
    """W16, which needs a declaration to be named: numbers alone cannot tell another model from a broken one."""
    return Cause(
        id="W16", layer="weights", title="the engine served another checkpoint than the trainer's", confidence="high",
        explained=None, fix="serve the checkpoint the trainer starts from (path, revision, dtype)",
        evidence=f"{evidence}, the checkpoint has {digest[:12]}",
    )  # fmt: skip
