"""The user's own trainer on the bench: its logprobs against ours, and against themselves with one thing changed.

A trainer given as a function is asked twice (R1), row by row (nothing padded, nothing packed), and in batches of rows
of equal length (packed or batched, nothing padded). What it logged once can only be compared with ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from trueup.parity.grouping import Setting
from trueup.parity.hypotheses import all_hypotheses
from trueup.parity.probes import Probed, outcome, paired_values
from trueup.parity.report import Cause, SettingReport
from trueup.parity.sides import TRAINER
from trueup.parity.workbench import Workbench
from trueup.trace import TraceRow

Trainer = Callable[[Sequence[TraceRow]], Sequence[Sequence[float]]]
"""From rows to the logprobs, in nats, that the trainer gives their completion tokens."""
TAG = " [your trainer]"
ALONE_ROWS = 6
EQUAL_ROWS = 4
SEMANTIC_ENGINE = frozenset({"S5", "S7", "S8", "S9", "S10", "S14", "T7", "W10", "W11", "O7", "I1", "I2", "I6"})
"""Causes that are an engine's alone: not tried on a trainer's numbers."""


def logged(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Rows that carry a trainer's logprobs, with those in the engine's place; their number may be wrong."""
    return [
        replace(r, completion_logprobs=r.trainer_logprobs, null_logprobs=(), replica=None)
        for r in rows
        if r.trainer_logprobs is not None
    ]


def judge_logged(
    bench: Workbench, setting: Setting, *, excluded: frozenset[str] = SEMANTIC_ENGINE
) -> SettingReport | None:
    """Compare the trainer's logged numbers with ours and explain a gap by how trainers go wrong; None without any."""
    rows = logged(setting.rows)
    if not rows:
        return None
    bench.scorer.batched = rows
    try:
        own = replace(
            setting, rows=tuple(rows), case=replace(setting.case, tag=setting.case.tag + TAG, side=TRAINER, drawn=False)
        )
        return bench.judge(own, excluded=excluded).report
    finally:
        bench.scorer.batched = ()


def _asked(trainer: Trainer, rows: Sequence[TraceRow]) -> list[tuple[float, ...]]:
    return [tuple(float(v) for v in values) for values in trainer(rows)]


def _cause(cause_id: str, title: str, fix: str, probe: Probed) -> Cause:
    return Cause(
        id=cause_id, layer="trainer", title=title, confidence="high", explained=None, fix=fix, evidence=probe.text,
        side=TRAINER,
    )  # fmt: skip


def probe_trainer(trainer: Trainer, rows: Sequence[TraceRow], limit_rms: float) -> tuple[list[Probed], list[Cause]]:
    """Ask the trainer several times. Its numbers may differ from themselves by `limit_rms`, nats."""
    together = _asked(trainer, rows)
    twice = outcome("trainer twice", paired_values(together, _asked(trainer, rows)), limit_rms, "the same batch twice")
    if twice.differs:
        fix = "model.eval(); no dropout, no random kernel, between rollout and loss"
        return [twice], [_cause("R1", "two passes of the trainer over the same batch disagree", fix, twice)]
    longest = sorted(range(len(rows)), key=lambda i: -len(rows[i].completion_token_ids))
    some = longest[:ALONE_ROWS] + longest[-1:]
    alone = [_asked(trainer, [rows[i]])[0] for i in some]
    shape = outcome(
        "trainer alone", paired_values([together[i] for i in some], alone), limit_rms, "rows in the batch against alone"
    )
    probes = [twice, shape]
    if not shape.differs:
        return probes, []
    equal = _cut_to_equal(rows[:EQUAL_ROWS])
    whole, apart = _asked(trainer, equal), [_asked(trainer, [row])[0] for row in equal]
    unpadded = outcome(
        "trainer unpadded", paired_values(whole, apart), limit_rms, "rows of equal length together against alone"
    )
    first = paired_values(whole[:1], apart[:1])
    probes.append(unpadded)
    if not unpadded.differs:
        fix = "pass the attention mask and position_ids that start at 0 in each row, or pad on the right"
        return probes, [_cause("R4", "the trainer's numbers depend on how much padding a row gets", fix, shape)]
    if first.rms <= limit_rms and math.isfinite(first.rms):
        fix = "pass cu_seqlens or a block-diagonal mask, and position ids that restart"
        return probes, [_cause("R3", "later sequences of a batch see earlier ones", fix, unpadded)]
    fix = "one micro-batch shape for old and new logprobs, or batch-invariant kernels"
    return probes, [_cause("R5", "the trainer's numbers depend on the shape of its micro-batch", fix, unpadded)]


def which_padding(bench: Workbench, setting: Setting, trainer: Trainer, causes: list[Cause]) -> list[Cause]:
    """R2 in place of R4 where padding that only shifts positions explains the trainer's numbers."""
    rows = [
        replace(r, trainer_logprobs=v)
        for r, v in zip(setting.rows, _asked(trainer, setting.rows), strict=True)
    ]  # fmt: skip
    others = frozenset(h.id for h in all_hypotheses()) - {"R2", "R4"}
    report = judge_logged(bench, replace(setting, rows=tuple(rows)), excluded=others)
    found = [replace(c, settings=()) for c in report.causes if c.id == "R2"] if report is not None else []
    return found or causes


def not_there(probes: Sequence[Probed], named: Collection[str]) -> set[str]:
    """Causes that a function asked this way would have shown, and did not."""
    seen = {p.name: p for p in probes if p.compared}
    absent = {"R1"} if "trainer twice" in seen and "R1" not in named else set()
    if "trainer alone" in seen and not seen["trainer alone"].differs:
        absent |= {"R2", "R3", "R4", "R5"}
    return absent


def _cut_to_equal(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Rows cut to one length: prompts from the left, completions from the right."""
    prompt = min(len(r.prompt_token_ids) for r in rows)
    count = min(len(r.completion_token_ids) for r in rows)
    return [
        replace(
            r,
            prompt_token_ids=r.prompt_token_ids[-prompt:],
            completion_token_ids=r.completion_token_ids[:count],
            completion_logprobs=r.completion_logprobs[:count],
        )
        for r in rows
    ]
