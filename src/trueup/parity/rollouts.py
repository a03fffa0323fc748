"""`trueup.parity.check_rollouts`: the check as a function, for a trainer of any framework, on lists or numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trueup.config import build_config
from trueup.errors import RecordError, TraceError
from trueup.parity.assemble import merge
from trueup.parity.catalogue import order_of
from trueup.parity.grouping import group
from trueup.parity.recipe import TRAINERS
from trueup.parity.report import ParityReport
from trueup.parity.run import check_rows
from trueup.parity.trainer_check import Trainer, not_there, probe_trainer, which_padding
from trueup.parity.verdicts import SELF_LIMIT
from trueup.parity.workbench import Workbench
from trueup.trace import MASKS, SCHEMA, Trace, TraceRow, parse_row

ARRAYS = ("prompt_token_ids", "completion_token_ids", "completion_logprobs", "weight_versions", *MASKS)


def _plain(values: Any) -> list[Any]:
    """A list of Python numbers from a list, a tuple, a numpy array or a tensor."""
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    assert isinstance(listed, list)
    return listed


def rows_of(rows: Sequence[Mapping[str, Any]], trainer_logprobs: Sequence[Any] | None) -> tuple[TraceRow, ...]:
    """Turn plain records into trace rows. Raises RecordError, naming the row, for one that cannot be used."""
    if trainer_logprobs is not None and len(trainer_logprobs) != len(rows):
        raise RecordError(f"{len(trainer_logprobs)} trainer_logprobs for {len(rows)} rows: pass one array a row")
    found: list[TraceRow] = []
    for index, row in enumerate(rows):
        record: dict[str, Any] = {"schema": SCHEMA, "sampling": {"temperature": 1.0}, "engine": {"name": "unknown"}}
        record |= dict(row) | {name: _plain(row[name]) for name in ARRAYS if row.get(name) is not None}
        if trainer_logprobs is not None:
            record["trainer_logprobs"] = _plain(trainer_logprobs[index])
        try:
            found += parse_row(record, index + 1)[0]
        except TraceError as error:
            raise RecordError(f"row {index}: {error}") from None
    if not found:
        raise RecordError("no rows to check")
    return tuple(found)


def check_rollouts(
    rows: Sequence[Mapping[str, Any]],
    *,
    model: Path | str,
    trainer_logprobs: Sequence[Any] | None = None,
    trainer: Trainer | None = None,
    **knobs: Any,
) -> ParityReport:
    """Check rollouts that are in memory.

    `rows`: records with the fields of `trueup.trace/1` (prompt_token_ids, completion_token_ids, completion_logprobs in
    nats; sampling, weight_versions, replica, engine as far as known), lists or arrays alike. `trainer_logprobs`: one
    array [T] a row, in nats, what your trainer computed for the same tokens: it is compared with what this trainer
    computes from `model` (a checkpoint folder), and a gap on its side is explained too (R2, R3, R4, T8). `trainer`:
    your trainer as a function of rows, which is asked again with one thing changed (R1, R3, R4, R5). `knobs` are those
    of CheckConfig, e.g. trainer="trl" under the name `kind`, dtype, checkpoints. Raises ConfigError for a knob that is
    none, TrueupError when nothing can be tested.
    """
    if "kind" in knobs:
        knobs["trainer"] = knobs.pop("kind")
    check = build_config({"check": {"model": str(model), **knobs}}, where="check_rollouts").check
    bench = Workbench.of(check, lambda message: None)
    parsed = rows_of(rows, trainer_logprobs)
    report = check_rows(bench, Trace(path=Path("rollouts"), rows=parsed, problems=()))
    if trainer is None:
        return report
    trace = Trace(path=Path("rollouts"), rows=parsed, problems=())
    settings = bench.fit_for_model(group(trace, TRAINERS[check.trainer], []))
    limit = SELF_LIMIT * bench.floor_rms(settings[0])
    probes, causes = probe_trainer(trainer, settings[0].rows, limit)
    if [c.id for c in causes] == ["R4"]:
        causes = which_padding(bench, settings[0], trainer, causes)
    named = {c.id for c in causes}
    absent = not_there(probes, named)
    sizes = report.not_seen | dict.fromkeys(absent - {*report.ruled_out}, limit)
    return replace(
        report,
        causes=tuple(merge(report.settings, [*causes, *report.causes])),
        ruled_out=tuple(i for i in report.ruled_out if i not in named),
        not_seen={i: sizes[i] for i in sorted(sizes.keys() - named, key=order_of)},
        untested={i: why for i, why in report.untested.items() if i not in absent | named},
        probes=(*report.probes, *(p.as_dict() for p in probes)),
    )
