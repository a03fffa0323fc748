"""`trueup.trace/1`: the public JSONL form of rollouts, read without trusting it.

One JSON object per line: engine, sampling, prompt and completion token ids, the engine's logprob of each completion
token; optionally mask, trainer_logprobs, weight_versions, replica, reward, model_digest, finish_reason. A malformed row
is evidence about an engine, so the reader never stops at one: it says what is wrong with it and goes on.

A completion with a mask is a conversation: tokens with mask 0 were written by a tool or a template, carry no logprob,
and are context for what follows. Each stretch of tokens with mask 1 becomes a row whose prompt is all that stands
before it, which is what the engine was asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from trueup.errors import TraceError
from trueup.foreign_logs import looks_like
from trueup.types import is_integer

SCHEMA = "trueup.trace/1"
REQUIRED = ("sampling", "prompt_token_ids", "completion_token_ids", "completion_logprobs")
MASKS = ("mask", "response_mask", "completion_mask", "loss_mask", "action_mask", "assistant_masks")
"""Names under which frameworks log which tokens of a completion the policy wrote; the first is ours."""
MAX_LINE_BYTES = 16 * 2**20
MAX_ROWS = 1_000_000
MAX_TOKEN_ID = 2**31 - 1
MAX_VERSION = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What a trace says about the engine that made it; `flags` are its own launch flags, spelled as recorded."""

    name: str = "unknown"
    version: str = ""
    api: str = ""
    device: str = ""
    flags: Mapping[str, object] = field(default_factory=dict)

    def title(self) -> str:
        """Return e.g. "vllm 0.18.1 (V1)"."""
        api = f" ({self.api})" if self.api else ""
        return f"{self.name} {self.version}".strip() + api


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRow:
    """One completion as logged, unvalidated: arrays may disagree in length and hold NaN.

    `completion_logprobs` are nats; an entry that was null is NaN, and `null_logprobs` holds its position. `line` counts
    from 1 in the file; the turns of one conversation share it, and `prompt_token_ids` of a later turn hold the earlier
    ones.
    """

    line: int
    engine: EngineInfo
    sampling: Mapping[str, object]
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    completion_logprobs: tuple[float, ...]
    trainer_logprobs: tuple[float, ...] | None = None
    weight_versions: tuple[int, ...] | None = None
    replica: str | None = None
    reward: float | None = None
    model_digest: str | None = None
    finish_reason: str | None = None
    null_logprobs: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RowProblem:
    """Something wrong with one line; `dropped` says whether the row could still be used as evidence."""

    line: int
    message: str
    dropped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A trace file as read: usable rows and everything that was wrong."""

    path: Path
    rows: tuple[TraceRow, ...]
    problems: tuple[RowProblem, ...]


class _Unusable(Exception):
    """A row that cannot be used at all; the message says why."""


def _ids(record: Mapping[str, object], name: str) -> tuple[int, ...]:
    values = record.get(name)
    if not isinstance(values, list):
        raise _Unusable(f"{name} is missing or not a list")
    for position, value in enumerate(values):
        if not is_integer(value) or not 0 <= value <= MAX_TOKEN_ID:
            raise _Unusable(f"{name}[{position}] is not a token id: {_shown(value)}{_id_hint(value)}")
    return tuple(values)


def _shown(value: object) -> str:
    """A value and its type, as a person would write them into JSON."""
    kinds = {str: "the string", list: "the list", dict: "the object", bool: "the boolean", float: "the number"}
    return f"{kinds.get(type(value), '')} {json.dumps(value, default=str)[:40]}".strip()


def _id_hint(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return ": write ids as whole numbers"
    if isinstance(value, str) and value.startswith("token_id:"):
        return ": write the number alone"
    return ""


def _number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.nan
    return math.nan


def _numbers(record: Mapping[str, object], name: str, problems: list[str]) -> tuple[float, ...] | None:
    values = record.get(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise _Unusable(f"{name} is not a list")
    for position, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _Unusable(f"{name}[{position}] is {_shown(value)}, not a number: write one logprob in nats per token")
    numbers = tuple(_number(v) for v in values)
    missing = [i for i, v in enumerate(values) if math.isnan(numbers[i]) and not isinstance(v, float)]
    if missing:
        problems.append(f"{name}[{missing[0]}] is null or too large ({len(missing)} such entries), read as NaN")
    return numbers


def _nulls(values: Any) -> tuple[int, ...]:
    return tuple(t for t, value in enumerate(values) if value is None)


def _text(record: Mapping[str, object], name: str) -> str | None:
    value = record.get(name)
    return None if value is None else str(value)[:200]


def _engine(value: object, problems: list[str]) -> EngineInfo:
    if not isinstance(value, Mapping):
        problems.append("engine is missing: name, version and flags are unknown")
        return EngineInfo()
    flags = value.get("flags")
    return EngineInfo(
        name=_text(value, "name") or "unknown",
        version=_text(value, "version") or "",
        api=_text(value, "api") or "",
        device=_text(value, "device") or "",
        flags=flags if isinstance(flags, Mapping) else {},
    )


def _versions(record: Mapping[str, object], problems: list[str]) -> tuple[int, ...] | None:
    values = record.get("weight_versions")
    if values is None:
        return None
    if not isinstance(values, list) or not all(is_integer(v) and abs(v) <= MAX_VERSION for v in values):
        problems.append(f"weight_versions is not a list of integers up to {MAX_VERSION}, ignored")
        return None
    return tuple(values)


def _require_fields(record: Mapping[str, object]) -> None:
    """Name every field that is missing, and the framework that the record looks like."""
    missing = [name for name in REQUIRED if record.get(name) is None]
    if not missing:
        return
    why = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if missing == ["sampling"]:
        why += ': without it nothing says what the logprobs should be; add e.g. "sampling": {"temperature": 1.0}'
    foreign = looks_like(record)
    if foreign is not None:
        why += f". The line looks like {foreign.name}: {foreign.advice}"
    raise _Unusable(why)


def _mask(record: Mapping[str, object], count: int) -> tuple[bool, ...] | None:
    """Which completion tokens the policy wrote: those that every mask of the record keeps; None without a mask."""
    kept: list[bool] | None = None
    for name in (n for n in MASKS if record.get(n) is not None):
        values = record[name]
        if not isinstance(values, list) or any(v not in (0, 1) for v in values):
            raise _Unusable(f"{name} is not a list of 0 and 1")
        if len(values) != count:
            raise _Unusable(f"{name} has {len(values)} entries for {count} completion tokens")
        kept = [bool(v) and (kept is None or kept[t]) for t, v in enumerate(values)]
    return None if kept is None else tuple(kept)


def _turns(row: TraceRow, mask: tuple[bool, ...] | None) -> tuple[TraceRow, ...]:
    """A row per stretch of tokens that the policy wrote, with everything before it as its prompt."""
    if mask is None or all(mask):
        return (row,)
    starts = [t for t, inside in enumerate(mask) if inside and (t == 0 or not mask[t - 1])]
    found = []
    for start in starts:
        stop = next((t for t in range(start, len(mask)) if not mask[t]), len(mask))

        def part(values: tuple[Any, ...] | None, span: slice = slice(start, stop)) -> Any:
            return values if values is None else values[span]

        found.append(
            replace(
                row,
                prompt_token_ids=row.prompt_token_ids + row.completion_token_ids[:start],
                completion_token_ids=part(row.completion_token_ids),
                completion_logprobs=part(row.completion_logprobs),
                trainer_logprobs=part(row.trainer_logprobs),
                weight_versions=part(row.weight_versions),
                finish_reason=row.finish_reason if stop == len(mask) else None,
                null_logprobs=tuple(t - start for t in row.null_logprobs if start <= t < stop),
            )
        )
    return tuple(found)


def parse_row(record: object, line: int) -> tuple[tuple[TraceRow, ...], list[str]]:
    """Build the rows of one decoded record, one per turn of the policy: (rows, remarks).

    Raises TraceError if the record is unusable.
    """
    remarks: list[str] = []
    try:
        if not isinstance(record, Mapping):
            raise _Unusable(f"expected one JSON object per line, got {_shown(record)}")
        _require_fields(record)
        if record.get("schema") != SCHEMA:
            remarks.append(f"schema is {str(record.get('schema'))[:40]!r}, not {SCHEMA!r}; read as {SCHEMA}")
        sampling = record["sampling"]
        if not isinstance(sampling, Mapping):
            raise _Unusable(f"sampling is {_shown(sampling)}, not an object of request fields")
        logprobs = _numbers(record, "completion_logprobs", remarks)
        assert logprobs is not None
        reward = record.get("reward")
        row = TraceRow(
            line=line,
            engine=_engine(record.get("engine"), remarks),
            sampling=sampling,
            prompt_token_ids=_ids(record, "prompt_token_ids"),
            completion_token_ids=_ids(record, "completion_token_ids"),
            completion_logprobs=logprobs,
            trainer_logprobs=_numbers(record, "trainer_logprobs", remarks),
            weight_versions=_versions(record, remarks),
            replica=_text(record, "replica"),
            reward=_number(reward) if reward is not None else None,
            model_digest=_text(record, "model_digest"),
            finish_reason=_text(record, "finish_reason"),
            null_logprobs=_nulls(record["completion_logprobs"]),
        )
        mask = _mask(record, len(row.completion_token_ids))
        if mask is not None and len(row.completion_logprobs) != len(mask):
            raise _Unusable(f"completion_logprobs has {len(row.completion_logprobs)} entries, its mask {len(mask)}")
    except _Unusable as reason:
        raise TraceError(str(reason)) from None
    if not row.prompt_token_ids:
        raise TraceError("prompt_token_ids is empty: the first completion token has no context to score")
    turns = _turns(row, mask)
    if not turns:
        remarks.append("the mask leaves no token that the policy wrote: nothing to compare")
    return turns, remarks


def _decode(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except RecursionError:
        raise TraceError("JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise TraceError(f"not valid JSON ({str(error)[:80]}); a truncated line?") from None


def _read_stream(stream: BinaryIO, path: Path) -> Trace:
    rows: list[TraceRow] = []
    problems: list[RowProblem] = []
    line = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            problems.append(
                RowProblem(line=line, message=f"longer than {MAX_LINE_BYTES} bytes; reading stopped", dropped=True)
            )
            break
        if not raw.strip():
            continue
        try:
            turns, remarks = parse_row(_decode(raw), line)
        except TraceError as error:
            problems.append(RowProblem(line=line, message=str(error), dropped=True))
            continue
        problems.extend(RowProblem(line=line, message=remark, dropped=False) for remark in remarks)
        rows.extend(turns)
        if len(rows) >= MAX_ROWS:
            problems.append(
                RowProblem(line=line, message=f"more than {MAX_ROWS} rows; the rest was not read", dropped=True)
            )
            break
    return Trace(path=path, rows=tuple(rows), problems=tuple(problems))


def read_trace(path: Path) -> Trace:
    """Read a trace file. Raises TraceError when the file cannot be opened or holds no usable row."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is no regular file"
        raise TraceError(f"trace {path} {kind}")
    try:
        with path.open("rb") as stream:
            trace = _read_stream(stream, path)
    except OSError as error:
        raise TraceError(f"trace {path} cannot be read: {error.strerror}") from None
    if not trace.rows:
        first = trace.problems[0] if trace.problems else None
        why = f"line {first.line}: {first.message}" if first else "the file is empty"
        raise TraceError(f"trace {path} holds no usable row ({why})")
    return trace


def write_trace(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write records as a trace, adding the schema; floats keep every digit they need to round-trip."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({"schema": SCHEMA, **row}, separators=(",", ":")) + "\n")
