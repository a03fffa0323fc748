"""Audits and canaries in a process of their own, beside the run: neither trainer nor engine waits for them.

parent                                              auditor
{"canary": 12, "scores": [[...], ...]}    ->        {"canary": 12, "findings": [...]}       one list an engine
{"audit": {...}, "after": 12, "since": []} ->        {"audit": {...}}, or {"audit": {"batch": 40, "failed": why}}
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trueup.errors import TrueupError
from trueup.pipeline.child import ChildProcess, serve_parent

SEARCH_EVERY = 5
"""Audits that are off one after the other, in a run that goes on all the same, until causes are looked for again."""


class AuditProcess(ChildProcess):
    """The parent's side; `rows` are the canary's, once it is ready."""

    def __init__(self, run: Path) -> None:
        """Start it on a run folder."""
        self.rows: list[dict[str, list[int]]] = []
        super().__init__("trueup.pipeline.audit_process", run, name="auditor")

    def wait_until_ready(self) -> dict[str, Any]:
        """See ChildProcess.wait_until_ready."""
        ready = super().wait_until_ready()
        self.rows = ready["rows"]
        return ready


class _Child:
    def __init__(self, run: Path) -> None:
        import torch

        from trueup.pipeline.audit import Auditor
        from trueup.pipeline.canary import Canary

        self.auditor = Auditor(run)
        torch.set_num_threads(self.auditor.config.audit.threads)
        store = self.auditor.store
        self.canary = Canary(self.auditor.bench, run / "parity" / "canary.json", lambda: (0, *store.versions()))
        self.frozen: dict[str, Any] | None = None
        self.known = 0
        """Audits in a row that were off since causes were looked for; 0: look for them."""

    def rows(self) -> list[dict[str, list[int]]]:
        """The canary's rows as plain data."""
        return [
            {"prompt_ids": list(row.prompt_ids), "completion_ids": list(row.completion_ids)} for row in self.canary.rows
        ]

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        if "canary" in request:
            return {"canary": request["canary"], "findings": self._canary(request["canary"], request["scores"])}
        record = request["audit"]
        try:
            found = self.auditor.audit(record, after=request["after"], since=request["since"], explain=self.known == 0)
        except TrueupError as error:
            return {"audit": {"batch": record["batch"], "failed": str(error)}}
        self.known = (self.known + 1) % SEARCH_EVERY if found.verdict == "mismatch" else 0
        causes = tuple(self._settled(dict(cause)) for cause in found.causes)
        return {"audit": replace(found, causes=causes).as_dict()}

    def _canary(self, version: int, scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        import torch

        found = []
        for engine, own in enumerate(scores):
            finding = self.canary.judge(engine, version, torch.tensor(own, dtype=torch.float64))
            if finding is not None:
                found.append({"engine": engine, "layer": "weights", "confidence": "high"} | asdict(finding))
        self.frozen = next((f for f in found if f["id"] == "W1"), None)
        return found

    def _settled(self, cause: dict[str, Any]) -> dict[str, Any]:
        """A log shows that an engine is behind (W2); that it does not move at all (W1) its canary shows."""
        if cause["id"] == "W2" and self.frozen is not None:
            return cause | {n: self.frozen[n] for n in ("id", "title", "fix")} | {
                "evidence": f"{cause['evidence']}; {self.frozen['evidence']}"
            }  # fmt: skip
        return cause


def main() -> None:
    """Answer the parent until it closes the pipe."""
    run = Path(sys.argv[1])

    def start() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
        child = _Child(run)
        return {"rows": child.rows()}, child.respond

    serve_parent(run, start)


if __name__ == "__main__":
    main()
