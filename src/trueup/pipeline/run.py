"""`trueup train`: engines generate, a trainer takes batches, and each of its versions goes into the engines in flight.

    actor threads   prompt -> engine -> rewards -> rollout log -> buffer
    this thread     buffer -> batches.jsonl -> trainer process -> weights/vNNNNNN -> every engine -> metrics.jsonl

A batch is on disk before the trainer hears of it, a group before it counts: whatever is killed, what was made is
neither lost nor used twice. A trainer that is started again is given the recorded batches from its last checkpoint on,
and arrives at the same weights to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from trueup.config import Config
from trueup.engines.base import Engine
from trueup.errors import ConfigError, EngineError, TrainingError
from trueup.monitor.metric_log import MetricLog, append_line, read_lines
from trueup.monitor.rundir import RunFolder
from trueup.pipeline.actor import Actor
from trueup.pipeline.buffer import Finished, RolloutBuffer
from trueup.pipeline.evaluate import Evaluation, evaluate
from trueup.pipeline.launch import EngineProcess, engine_processes
from trueup.pipeline.preflight import preflight
from trueup.pipeline.recipe import recipe_of
from trueup.pipeline.rollout_log import RolloutLog, read_groups
from trueup.pipeline.trainer_process import ANSWERS, TrainerGone, TrainerProcess
from trueup.pipeline.updater import update_all
from trueup.tasks.base import Task
from trueup.tasks.prompts import PromptSource
from trueup.tasks.registry import make_task
from trueup.tasks.scoring import ScoringPool
from trueup.weights.store import WeightStore

POLL_S = 0.05
STARVED_S = 900.0
"""Without a finished group for this long the run stops: an engine hangs, or every group fails."""
RESTARTS = 3
"""Of the trainer, in a row, without a batch between them."""
NOTICED_S = 2.0
"""From a broken connection until the process is known to have ended."""
ENGINE_RESTARTS = 20
"""Of all engines in one run."""
FOLDERS = ("logs", "weights", "rollouts", "parity")
Announce = Callable[[str], None]
Result = TypeVar("Result")


def train(
    config: Config,
    *,
    resume: bool = False,
    accepted: Sequence[str] = (),
    task: Task | None = None,
    announce: Announce = lambda line: None,
    on_batch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Train online; returns the summary, which is also in summary.json.

    `accepted`: ids of causes that a mismatch may have and the run goes on. `task`: one's own (tasks/base.py) instead of
    the one the configuration names. Raises TrueupError; the run can then be resumed.
    """
    if config.train.run is None or config.train.model is None or config.train.steps is None:
        missing = next(n for n in ("model", "run", "steps") if getattr(config.train, n) is None)
        raise ConfigError(f"train.{missing} is missing")
    recipe = recipe_of(config)
    task = task or make_task(config.task)
    path = config.train.run
    folder = RunFolder.resume(path, config) if resume else RunFolder.create(path, config, recipe.as_dict())
    for name in FOLDERS:
        (path / name).mkdir(exist_ok=True)
    with ExitStack() as stack:
        stack.callback(folder.close)
        return _Run(config, folder, task, stack, announce, on_batch).go(accepted)


class _Run:
    def __init__(
        self, config: Config, folder: RunFolder, task: Task, stack: ExitStack, announce: Announce,
        on_batch: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        assert config.train.model is not None
        self.config, self.folder, self.path, self.announce, self.on_batch = (
            config,
            folder,
            folder.path,
            announce,
            on_batch,
        )
        self.source = PromptSource(task, config.train.model, chat=config.task.chat, system=config.task.system)
        self.evaluation = self.source.held_out(config.task.held_out)
        self.scoring = ScoringPool(task, workers=config.rollout.score_workers, timeout_s=config.task.score_timeout_s)
        stack.callback(self.scoring.close)
        self.processes: list[EngineProcess] = engine_processes(config, self.path)
        for process in self.processes:
            stack.callback(process.stop)
        self.engines: list[Engine | None] = [process.start() for process in self.processes]
        self.revived = 0
        stack.callback(self._close_engines)
        self.served = 0
        """Version that every engine has confirmed."""
        self.done = 0
        """Batches that were taken and whose version, if they made one, is served."""
        self.log = RolloutLog(self.path / "rollouts")
        stack.callback(self.log.close)
        self.batches = read_lines(self.path / "batches.jsonl")
        self.metrics = MetricLog(self.path / "metrics.jsonl", batches=len(self.batches))
        self.buffer = RolloutBuffer(groups_per_batch=config.train.groups, max_lag=config.rollout.max_lag)
        self.store = WeightStore(self.path / "weights")
        self.started = time.perf_counter()
        self.trainer: TrainerProcess | None = None
        self.totals = {"tokens": 0.0, "lag_max": 0.0, "ess": 0.0}
        stack.callback(self._stop_trainer)

    def go(self, accepted: Sequence[str]) -> dict[str, Any]:
        """The run from its beginning, or from where it was."""
        report = preflight(self.config, self.processes, self.path, accepted=accepted, announce=self.announce)
        trainer = self._start_trainer()
        self._serve(trainer.version)
        self.done = len(self.batches)
        first = self._evaluate(0) if not self.batches else None
        actor = self._actor()
        actor.start()
        last = first
        steps = self.config.train.steps
        assert steps is not None
        try:
            while len(self.batches) < steps:
                self._batch(actor)
                if len(self.batches) % self.config.rollout.eval_every == 0 and len(self.batches) < steps:
                    last = self._evaluate(len(self.batches))
        finally:
            actor.stop(self.config.rollout.timeout_s)
        last = self._evaluate(steps)
        evaluations = read_lines(self.path / "evaluations.jsonl")
        summary = {
            "steps": steps,
            "preflight_verdict": report.verdict,
            "heldout_reward_start": evaluations[0]["reward"],
            "heldout_reward_end": last.reward,
            "seconds": time.perf_counter() - self.started,
            "tokens": self.totals["tokens"],
            "lag_max": self.totals["lag_max"],
            "ess": self.totals["ess"],
            "version": self.served,
            "engine_restarts": self.revived,
            "groups_dropped": len(self.buffer.dropped),
            "counts": dict(actor.counts),
        }
        self.folder.write("summary.json", summary)
        return summary

    def _actor(self) -> Actor:
        """The actor, with what an earlier part of the run had made and not trained on."""
        taken = {number for record in self.batches for number in record["groups"]}
        dropped = {number for record in self.batches for number in record["dropped"]}
        logged = set()
        for number, group in read_groups(self.path / "rollouts") if self.log.count else ():
            logged.add(group.rollouts[0].prompt.prompt_id)
            if number not in taken | dropped:
                self.buffer.add(Finished(number=number, oldest_version=group.oldest_version))
        self.buffer.started = self.log.count
        self.buffer.dropped = sorted(dropped)
        prompts = ((i, p) for i, p in self.source.training() if p.prompt_id not in logged)
        return Actor(
            engines=self.engines, source=self.source, scoring=self.scoring, log=self.log, buffer=self.buffer,
            sampling=self.config.sampling, rollout=self.config.rollout, done=lambda: self.done, prompts=prompts,
        )  # fmt: skip

    def _start_trainer(self) -> TrainerProcess:
        """Start the trainer and bring it to the last recorded batch."""
        self.trainer = trainer = TrainerProcess(self.path)
        self._replay(trainer, self.batches[trainer.batches :])
        answers = {answer["batches"]: answer for answer in read_lines(self.path / ANSWERS)}
        for record in self.batches:
            if record["batch"] not in self.metrics.recorded:
                answer = answers[record["batch"]]
                self.metrics.append(record["batch"], {"version": answer["version"]} | answer.get("metrics", {}))
        return trainer

    def _replay(self, trainer: TrainerProcess, records: Sequence[dict[str, Any]]) -> None:
        """Have batches taken again that an earlier process took."""
        for record in records:
            self._ask(trainer, record["groups"])

    def _ask(self, trainer: TrainerProcess, groups: Sequence[int]) -> dict[str, Any]:
        trainer.send(groups)
        while (answer := trainer.answer(POLL_S)) is None:
            self._watch()
        return answer

    def _watch(self) -> None:
        """Start engines again that ended. Raises EngineError when that happens too often."""
        for number, process in enumerate(self.processes):
            if not process.alive():
                self._revive(number)

    def _revive(self, number: int) -> None:
        """A new process in the place of one that ended, serving what the others serve."""
        process, old = self.processes[number], self.engines[number]
        self.revived += 1
        if self.revived > ENGINE_RESTARTS:
            raise EngineError(f"{process.name} ended again after {ENGINE_RESTARTS} restarts; see {self.path / 'logs'}")
        self.announce(f"engine     {process.name} ended; starting it again")
        self.engines[number] = None
        if old is not None:
            old.close()
        process.stop()
        engine = process.start()
        if self.served:
            path = self.store.open(self.served).path
            update_all([engine], path, self.served, clear_cache=True)
        self.engines[number] = engine

    def _with_engines(self, work: Callable[[list[Engine]], Result]) -> Result:
        """Do something with every engine, and again if one ended on the way."""
        while True:
            self._watch()
            try:
                return work([engine for engine in self.engines if engine is not None])
            except EngineError:
                deadline = time.perf_counter() + NOTICED_S
                while all(process.alive() for process in self.processes):
                    if time.perf_counter() > deadline:
                        raise
                    time.sleep(POLL_S)

    def _close_engines(self) -> None:
        for engine in self.engines:
            if engine is not None:
                engine.close()

    def _stop_trainer(self) -> None:
        if self.trainer is not None:
            self.trainer.stop()

    def _next_groups(self, actor: Actor) -> tuple[list[Finished], float]:
        """Wait for a batch; (groups, seconds waited). Raises when the actor failed or nothing comes any more."""
        start = time.perf_counter()
        known, since = -1, start
        assert self.trainer is not None
        while True:
            with actor.lock:
                groups, count = self.buffer.take(self.trainer.version), actor.counts["groups"]
            now = time.perf_counter()
            if groups:
                return groups, now - start
            if actor.failure is not None:
                raise TrainingError(f"rollouts cannot go on: {actor.failure}") from actor.failure
            if count != known:
                known, since = count, now
            if now - since > STARVED_S:
                raise EngineError(f"no group was finished for {STARVED_S:.0f} s; {dict(actor.counts)}")
            self._watch()
            time.sleep(POLL_S)

    def _batch(self, actor: Actor) -> None:
        """One batch: record it, have it trained on, serve the new version, log what was seen."""
        groups, wait_s = self._next_groups(actor)
        assert self.trainer is not None
        before = self.trainer.version
        record: dict[str, Any] = {
            "batch": len(self.batches) + 1, "version": before, "groups": [g.number for g in groups],
            "dropped": [n for n in self.buffer.dropped if not any(n in r["dropped"] for r in self.batches)],
        }  # fmt: skip
        append_line(self.path / "batches.jsonl", record)
        self.batches.append(record)
        start = time.perf_counter()
        answer = self._trained(record["groups"])
        train_s = time.perf_counter() - start
        update = self._serve(answer["version"])
        self.done = len(self.batches)
        lags = [before - g.oldest_version for g in groups]
        metrics = answer.get("metrics", {}) | {
            "lag/oldest_token/max": float(max(lags)),
            "lag/oldest_token/mean": sum(lags) / len(lags),
            "buffer/waiting/count": float(len(self.buffer)),
            "buffer/dropped/count": float(len(self.buffer.dropped)),
            "time/wait_s": wait_s,
            "time/train_s": train_s,
            "time/update_s": update,
            "time/since_start_s": time.perf_counter() - self.started,
        }
        metrics |= {f"time/{phase}_s": seconds for phase, seconds in answer.get("phase_s", {}).items()}
        extra = {"skipped": answer["skipped"]} if "skipped" in answer else {}
        self.metrics.append(record["batch"], {"version": answer["version"]} | metrics | extra)
        self.totals["tokens"] += metrics.get("tokens/trained/count", 0.0)
        self.totals["lag_max"] = max(self.totals["lag_max"], metrics["lag/oldest_token/max"])
        self.totals["ess"] = metrics.get("gap/ess/token", self.totals["ess"])
        self.on_batch(metrics)

    def _trained(self, groups: Sequence[int]) -> dict[str, Any]:
        """Have the trainer take the batch that was just recorded, starting it again if it dies."""
        for attempt in range(RESTARTS + 1):
            assert self.trainer is not None
            try:
                return self._ask(self.trainer, groups)
            except TrainerGone as error:
                if attempt == RESTARTS:
                    raise
                self.announce(f"trainer    {error}; starting it again")
                self.trainer.stop()
                self.trainer = trainer = TrainerProcess(self.path)
                self._replay(trainer, self.batches[trainer.batches : -1])
        raise AssertionError("unreachable")

    def _serve(self, version: int) -> float:
        """Have every engine serve a version; seconds it took. Older weights are deleted, but for the last few."""
        if version == self.served:
            return 0.0
        path, clear_cache = self.store.open(version).path, self.config.rollout.clear_cache
        updated = self._with_engines(lambda engines: update_all(engines, path, version, clear_cache=clear_cache))
        self.served = version
        append_line(self.path / "updates.jsonl", updated.as_dict())
        self.store.keep_newest(self.config.rollout.keep_weights, "run")
        return updated.seconds

    def _evaluate(self, batch: int) -> Evaluation:
        """Evaluate what is served, and write it down."""
        sampling, rollout = self.config.sampling, self.config.rollout
        found = self._with_engines(
            lambda engines: evaluate(engines, self.source, self.evaluation, self.scoring, sampling, rollout)
        )
        record = {
            "batch": batch, "version": self.served, "reward": found.reward, "error": found.error,
            "prompts": found.scored, "failed": found.failed,
        }  # fmt: skip
        append_line(self.path / "evaluations.jsonl", record)
        self.announce(f"held out   batch {batch}  reward {found.reward:.3f} (standard error {found.error:.3f})")
        return found
