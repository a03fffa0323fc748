"""The rollout log: every group that was made, append-only, checksummed, safe against a crash at any moment.

A folder of segments `NNNNNN.jsonl`. Each line is one JSON object `{"crc32":"xxxxxxxx","group":{...}}`, the checksum
being that of the bytes of the group. Groups are numbered from 0 without gaps. A line is on disk before `append`
returns; a line that a crash cut off is removed when the log is opened again, anything else that is wrong is an error.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from trueup.errors import RecordError, TraceError
from trueup.types import CacheLife, KVState, LogprobKind, Prompt, Rollout, RolloutGroup, SamplingParams

SCHEMA = "trueup.rollouts/1"
SEGMENT_BYTES = 64 * 2**20
_PREFIX = b'{"crc32":"%08x","group":'
_SUFFIX = b"}\n"
_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","group":(.*)\}\n', re.DOTALL)


def group_to_json(number: int, group: RolloutGroup) -> dict[str, object]:
    """A group as plain data; numbers keep every digit."""
    prompt = group.rollouts[0].prompt
    rollouts = []
    for rollout in group.rollouts:
        fields = asdict(rollout)
        del fields["prompt"]
        rollouts.append(fields)
    return {
        "schema": SCHEMA,
        "number": number,
        "prompt": asdict(prompt),
        "rollouts": rollouts,
        "rewards": list(group.rewards),
    }


def group_from_json(content: Any) -> tuple[int, RolloutGroup]:
    """Read back what `group_to_json` made. Raises RecordError for anything else."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise RecordError(f"no {SCHEMA} group")
    try:
        prompt = Prompt(**content["prompt"] | {"token_ids": tuple(content["prompt"]["token_ids"])})
        rollouts = tuple(_rollout(prompt, fields) for fields in content["rollouts"])
        return int(content["number"]), RolloutGroup(rollouts=rollouts, rewards=tuple(content["rewards"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"a {SCHEMA} group with a wrong field: {error}") from None


def _rollout(prompt: Prompt, fields: dict[str, Any]) -> Rollout:
    def numbers(name: str) -> Any:
        return None if fields[name] is None else tuple(fields[name])

    sampling = fields["sampling"]
    return Rollout(
        prompt=prompt,
        **{name: numbers(name) for name in ("token_ids", "behaviour_logprobs", "weight_versions", "raw_logprobs")},
        log_kept_masses=numbers("log_kept_masses"),
        logprob_kind=LogprobKind(fields["logprob_kind"]),
        sampling=SamplingParams(**sampling | {"stop": tuple(sampling["stop"])}),
        finish_reason=fields["finish_reason"],
        engine=fields["engine"],
        kv=KVState(fields["kv"]),
        cache_lives=tuple(
            CacheLife(first_token=life["first_token"], runs=tuple((v, n) for v, n in life["runs"]))
            for life in fields["cache_lives"]
        ),
    )


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.jsonl"))


def _parse(line: bytes, where: str) -> tuple[int, RolloutGroup]:
    match = _LINE.fullmatch(line)
    if not match or zlib.crc32(match[2]) != int(match[1], 16):
        raise TraceError(f"{where} is damaged: its checksum does not fit its text")
    try:
        return group_from_json(json.loads(match[2]))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where} cannot be read: {error}") from None


def read_groups(folder: Path, *, start: int = 0) -> Iterator[tuple[int, RolloutGroup]]:
    """Yield (number, group) from number `start` on, in order; what comes before is counted, not looked at.

    A last line without its end, which a writer may be at, is not yielded. Raises TraceError for a folder without
    segments, a damaged line, or a gap or repetition in the numbers.
    """
    return _read(folder, lambda number: number >= start)


def read_some(folder: Path, numbers: Sequence[int]) -> list[RolloutGroup]:
    """Return the groups of these numbers, in this order. Raises TraceError when one is not in the log, or damaged."""
    wanted = set(numbers)
    found: dict[int, RolloutGroup] = {}
    for number, group in _read(folder, wanted.__contains__):
        found[number] = group
        if len(found) == len(wanted):
            break
    if len(found) != len(wanted):
        raise TraceError(f"{folder} lacks group {min(wanted - found.keys())}")
    return [found[number] for number in numbers]


def _read(folder: Path, wanted: Callable[[int], bool]) -> Iterator[tuple[int, RolloutGroup]]:
    if not folder.is_dir():
        raise TraceError(f"rollout log {folder} is no folder: expected segments named 000000.jsonl")
    segments = _segments(folder)
    if not segments:
        raise TraceError(f"rollout log {folder} holds no segments named 000000.jsonl")
    expected = 0
    for segment in segments:
        last = segment == segments[-1]
        with segment.open("rb") as stream:
            for at, line in enumerate(stream, 1):
                if last and not line.endswith(b"\n"):
                    return
                if wanted(expected):
                    number, group = _parse(line, f"{segment}, line {at}")
                    if number != expected:
                        raise TraceError(
                            f"{segment}, line {at} is group {number}, expected {expected}: the log has a gap"
                        )
                    yield number, group
                expected += 1


class RolloutLog:
    """Appends groups. One process writes; `torn` says how many bytes a crash had left unfinished."""

    def __init__(self, folder: Path) -> None:
        """Open or make the log. Raises TraceError when what is there is damaged beyond its last line."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.torn = self._repair()
        self.count = sum(1 for _ in read_groups(folder)) if _segments(folder) else 0
        self._stream: BinaryIO | None = None

    def _repair(self) -> int:
        segments = _segments(self.folder)
        if not segments:
            return 0
        content = segments[-1].read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return 0
        with segments[-1].open("r+b") as stream:
            stream.truncate(whole)
            os.fsync(stream.fileno())
        return len(content) - whole

    def append(self, group: RolloutGroup) -> int:
        """Write a group to disk and return its number. OSError (disk full) leaves the log as it was."""
        body = json.dumps(group_to_json(self.count, group), separators=(",", ":")).encode()
        stream = self._segment()
        before = stream.tell()
        try:
            stream.write(_PREFIX % zlib.crc32(body) + body + _SUFFIX)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            self.close()
            os.truncate(stream.name, before)
            raise
        self.count += 1
        return self.count - 1

    def _segment(self) -> BinaryIO:
        if self._stream is not None and self._stream.tell() >= SEGMENT_BYTES:
            self.close()
        if self._stream is None:
            segments = _segments(self.folder)
            full = not segments or segments[-1].stat().st_size >= SEGMENT_BYTES
            path = self.folder / f"{len(segments):06d}.jsonl" if full else segments[-1]
            self._stream = path.open("ab", buffering=0)
        return self._stream

    def close(self) -> None:
        """Close the file; the log can be appended to again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
