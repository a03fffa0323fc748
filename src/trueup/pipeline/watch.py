"""What the run does about parity while it trains: canaries after updates, audits of batches, alarms.

The work is done in a process beside the run (audit_process.py); versions that an audit under way may need stay on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trueup.config import Config
from trueup.engines.base import Engine
from trueup.errors import EngineError, MismatchError, UnsupportedByEngine
from trueup.model.scoring import ScoredRow
from trueup.monitor.metric_log import append_line, read_lines
from trueup.pipeline.audit_process import AuditProcess
from trueup.pipeline.child import ChildGone
from trueup.weights.store import WeightStore

UNNAMED = "unnamed"
AUDITS, ALARMS = "audits.jsonl", "alarms.jsonl"
CANARY_TIMEOUT_S = 60.0
LAST_ANSWERS_S = 120.0
"""For what is still under way when the run ends."""
RESTARTS = 3
POLL_S = 0.05


class ParityWatch:
    """Asks the auditor, keeps what it says, and raises its alarms."""

    def __init__(
        self, config: Config, run: Path, store: WeightStore, *, accepted: Sequence[str],
        announce: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`accepted`: ids of causes that do not stop the run."""
        self.config, self.run, self.store, self.accepted, self.announce = config.audit, run, store, accepted, announce
        self.alarms: list[dict[str, Any]] = read_lines(run / ALARMS)
        self.audits: list[dict[str, Any]] = read_lines(run / AUDITS)
        self.batch = 0
        self._raised: set[tuple[str | None, int | None]] = set()
        """Ids of alarms since the run was started, and the batches of those without one."""
        self._since: list[dict[str, Any]] = []
        """Batches after the last audit, that one included."""
        self._pending: list[dict[str, Any]] = []
        self._restarts = 0
        self._process: AuditProcess | None = None

    def start(self) -> None:
        """Begin to start the auditor, unless audits are off."""
        if self.config.every:
            self._process = AuditProcess(self.run)

    def wait_until_ready(self) -> None:
        """Until the auditor can be asked. Raises TrainingError, EngineError when it ends again and again."""
        if self._process is not None:
            try:
                self._process.wait_until_ready()
            except ChildGone as error:
                self._restart(error)

    def close(self) -> None:
        """End the auditor."""
        if self._process is not None:
            self._process.stop()

    @property
    def keep_weights(self) -> int:
        """Versions that must stay on disk for an audit to look back to the one before."""
        return self.config.every + 2 if self.config.every else 0

    def updated(self, engines: Sequence[Engine], version: int) -> None:
        """After an update, and once at the start: have every engine score the canary. Raises EngineError."""
        if self._process is None:
            return
        rows = [ScoredRow(prompt_ids=tuple(r["prompt_ids"]), completion_ids=tuple(r["completion_ids"])) for r in
                self._process.rows]  # fmt: skip
        try:
            scored = [engine.score(rows, timeout_s=CANARY_TIMEOUT_S) for engine in engines]
        except UnsupportedByEngine:
            return
        self._ask({"canary": version, "scores": [[v for row in own for v in row.logprobs] for own in scored]})

    def trained(self, record: dict[str, Any], *, after: int) -> None:
        """After a batch: every so many, audit it. Raises MismatchError for an alarm that stops the run."""
        self.batch = record["batch"]
        self._since.append(record | {"after": after})
        if self._process is not None and self.batch % self.config.every == 0:
            for version in self.store.versions():
                self.store.retain(version, f"audit {self.batch}")
            self._ask({"audit": record, "after": after, "since": self._since[:-1]})
            self._since = []
        self.poll()

    def poll(self) -> None:
        """Take what the auditor has said meanwhile. Raises MismatchError for an alarm that stops the run."""
        while self._process is not None and self._pending:
            try:
                answer = self._process.answer(0.0)
            except ChildGone as error:
                self._restart(error)
                continue
            if answer is None:
                return
            self._pending.pop(0)
            self._take(answer)

    def finish(self) -> None:
        """Wait for what is under way. Raises MismatchError like `poll`."""
        deadline = time.monotonic() + LAST_ANSWERS_S
        while self._pending and time.monotonic() < deadline:
            self.poll()
            time.sleep(POLL_S)
        if self._pending:
            self.announce(f"audit      {len(self._pending)} answers did not come within {LAST_ANSWERS_S:.0f} s")

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        self._pending.append(request)
        with suppress(ChildGone):  # noticed, and asked again, when the answer is looked for
            self._process.send(request)

    def _restart(self, error: ChildGone) -> None:
        """Another auditor, asked what the one that ended had not answered. Raises EngineError."""
        while True:
            self._restarts += 1
            if self._restarts > RESTARTS:
                raise EngineError(f"the auditor ended again after {RESTARTS} restarts: {error}")
            self.announce(f"audit      {error}; starting it again")
            self.close()
            self._process = AuditProcess(self.run)
            try:
                self._process.wait_until_ready()
                for request in self._pending:
                    self._process.send(request)
            except ChildGone as again:
                error = again
            else:
                return

    def _take(self, answer: dict[str, Any]) -> None:
        if "canary" in answer:
            self._alarm([f | {"by": "canary", "version": answer["canary"]} for f in answer["findings"]])
            return
        audit = answer["audit"]
        for version in self.store.versions():
            with suppress(ValueError):
                self.store.release(version, f"audit {audit['batch']}")
        append_line(self.run / AUDITS, audit)
        self.audits.append(audit)
        self.announce(f"audit      batch {audit['batch']}  {line_of(audit)}")
        if audit.get("verdict") == "mismatch" and audit["searched"]:
            causes = audit["causes"] or [{"id": None, "title": "the backend left its floor", "fix": "see audits.jsonl"}]
            where = {"by": "audit", "version": audit["version"], "first_batch": audit["first_batch"]}
            self._alarm([{"evidence": "; ".join(audit["reasons"])} | cause | where for cause in causes])

    def _alarm(self, found: Sequence[dict[str, Any]]) -> None:
        """Write alarms down, each id once since the run was started, and stop the run unless all of them were accepted.

        A gap without a name is an alarm of its own at every batch: the next one may have another reason.
        """
        stopping = [f for f in found if accepted_as(f) not in self.accepted] if self.config.stop else []
        for alarm in found:
            key = (alarm["id"], None if alarm["id"] else self.batch)
            if key in self._raised:
                continue
            self._raised.add(key)
            record = {"batch": self.batch} | alarm | {"stopped": alarm in stopping}
            append_line(self.run / ALARMS, record)
            self.alarms.append(record)
            self.announce(f"ALARM      {describe(record)}")
        if stopping:
            raise MismatchError(
                f"{'; '.join(describe({'batch': self.batch} | f) for f in stopping)}. Fix: {stopping[0]['fix']}. The "
                f"evidence is in {self.run / ALARMS}; {go_on(stopping)}"
            )

    def require_accepted(self) -> None:
        """Raise MismatchError if an alarm stopped the run the last time and is not accepted now."""
        stopped = [a for a in self.alarms if a.get("stopped")]
        last = [a for a in stopped if a["batch"] == stopped[-1]["batch"]]
        refused = [a for a in last if accepted_as(a) not in self.accepted]
        if refused:
            raise MismatchError(
                f"the run was stopped by {'; '.join(describe(a) for a in refused)}. Fix: {refused[0]['fix']}. "
                f"Mended or not, {go_on(refused)}"
            )


def accepted_as(alarm: dict[str, Any]) -> str:
    """The word with which --accept-mismatch accepts an alarm: its id, or "unnamed"."""
    return str(alarm["id"] or UNNAMED)


def go_on(alarms: Sequence[dict[str, Any]]) -> str:
    """How to go on after alarms."""
    words = " ".join(f"--accept-mismatch {word}" for word in dict.fromkeys(map(accepted_as, alarms)))
    return f"{words} --resume goes on knowingly"


def describe(alarm: dict[str, Any]) -> str:
    """An alarm in a line."""
    name = f"{alarm['id']} {alarm['title']}" if alarm["id"] else alarm["title"]
    began = f", since batch {alarm['first_batch']}" if alarm.get("first_batch") else ""
    return f"batch {alarm['batch']}, by {alarm['by']}: {name}{began} ({alarm['evidence']})"


def line_of(audit: dict[str, Any]) -> str:
    """An audit in a line: nats rms of each part."""
    if "failed" in audit:
        return f"could not be made: {audit['failed']}"
    parts = audit["components"]
    shown = ("backend", "stale_kv", "staleness")
    numbers = [f"{n.replace('_', ' ')} {parts[n].get('rms', 0.0):.2g}" for n in shown]
    return f"{audit['verdict']}  {'  '.join(numbers)}  floor {audit['floor']['rms']:.2g} nats rms"
