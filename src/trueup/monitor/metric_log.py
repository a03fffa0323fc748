"""JSON lines of a run. metrics.jsonl: one object a batch, appended as it is done, cut back to where the run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none if it is not there; one that a crash cut off is removed from it."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
    return [json.loads(line) for line in content[:whole].splitlines()]


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Write a record and have it on disk."""
    with path.open("ab") as stream:
        stream.write(json.dumps(record).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


class MetricLog:
    """Appends records; each has a "batch"."""

    def __init__(self, path: Path, *, batches: int) -> None:
        """Open, keeping the first `batches` batches only: what came later will be done again."""
        kept = [r for r in read_lines(path) if isinstance(r["batch"], int) and r["batch"] <= batches]
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(part, path)
        self.path = path
        self.recorded = {r["batch"] for r in kept}
        """Numbers of the batches in the file."""

    def append(self, batch: int, record: Mapping[str, object]) -> None:
        """Write a batch's record (batches count from 1)."""
        append_line(self.path, {"batch": batch} | dict(record))
        self.recorded.add(batch)
