"""metrics.jsonl: one JSON object a batch, appended as it is done; after a crash, cut back to the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Return the records of a file; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class MetricLog:
    """Appends records; each has a "batch"."""

    def __init__(self, path: Path, *, batches: int) -> None:
        """Open, keeping the first `batches` batches only: what came later will be done again."""
        kept = [r for r in read_metrics(path) if isinstance(r["batch"], int) and r["batch"] <= batches]
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(part, path)
        self.path = path

    def append(self, batch: int, record: Mapping[str, object]) -> None:
        """Write a batch's record (batches count from 1)."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"batch": batch} | dict(record)) + "\n")
