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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from trueup.errors import RecordError, TraceError
from trueup.monitor.rundir import accepted_of
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
    for number, (place, line) in enumerate(_lines(folder, _START)):
        if number >= start:
            yield number, place.parse(number, line)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a line begins: its segment's place in the folder, its number there from 1, and its first byte."""

    path: Path
    segment: int
    line: int
    offset: int

    def parse(self, number: int, line: bytes) -> RolloutGroup:
        where = f"{self.path}, line {self.line}"
        found, group = _parse(line, where)
        if found != number:
            raise TraceError(f"{where} is group {found}, expected {number}: the log has a gap")
        return group


_START = _Place(Path(), 0, 1, 0)


def _lines(folder: Path, start: _Place) -> Iterator[tuple[_Place, bytes]]:
    """Yield whole lines and where they are, from a place on."""
    if not folder.is_dir():
        raise TraceError(f"rollout log {folder} is no folder: expected segments named 000000.jsonl")
    segments = _segments(folder)
    if not segments:
        raise TraceError(f"rollout log {folder} holds no segments named 000000.jsonl")
    for at in range(start.segment, len(segments)):
        number, offset = (start.line, start.offset) if at == start.segment else (1, 0)
        with segments[at].open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if at == len(segments) - 1 and not line.endswith(b"\n"):
                    return
                yield _Place(segments[at], at, number, offset), line
                number, offset = number + 1, offset + len(line)


class LogReader:
    """Reads groups by their numbers from a log that grows, and goes through each line once to find them."""

    def __init__(self, folder: Path, *, trusted: bool = False) -> None:
        """`trusted`: take what was reported for the behaviour policy's logprobs, whatever it is of."""
        self.folder, self.trusted = folder, trusted
        self._places: list[_Place] = []

    def read(self, numbers: Sequence[int]) -> list[RolloutGroup]:
        """Return these groups, in this order. Raises TraceError when one is not in the log, or damaged."""
        if numbers and max(numbers) >= len(self._places):
            last = self._places.pop() if self._places else _START
            self._places += [place for place, _ in _lines(self.folder, last)]
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> RolloutGroup:
        if not 0 <= number < len(self._places):
            raise TraceError(f"{self.folder} lacks group {number}")
        place = self._places[number]
        with place.path.open("rb") as stream:
            stream.seek(place.offset)
            group = place.parse(number, stream.readline())
        if not self.trusted:
            return group
        taken = tuple(replace(r, logprob_kind=LogprobKind.PROCESSED) for r in group.rollouts)
        return RolloutGroup(rollouts=taken, rewards=group.rewards)


def reader_of(run: Path) -> LogReader:
    """A reader of a run's log; trusting if the run goes on knowingly with logprobs of another distribution (S1)."""
    return LogReader(run / "rollouts", trusted="S1" in accepted_of(run))


class RolloutLog:
    """Appends groups. One process writes; `torn` says how many bytes a crash had left unfinished."""

    def __init__(self, folder: Path) -> None:
        """Open or make the log. Raises TraceError when what is there is damaged beyond its last line."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.torn = self._repair()
        self.count = sum(1 for _ in read_groups(folder)) if _segments(folder) else 0
        self._stream: FileIO | None = None

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
            line = memoryview(_PREFIX % zlib.crc32(body) + body + _SUFFIX)
            while line:  # a disk that fills up takes a part first
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())
        except OSError:
            self.close()
            os.truncate(stream.name, before)
            raise
        self.count += 1
        return self.count - 1

    def _segment(self) -> FileIO:
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
