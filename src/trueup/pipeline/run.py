"""`trueup train`: engines generate, a trainer takes batches, and each of its versions goes into the engines in flight.

    actor threads   prompt -> engine -> rewards -> rollout log -> buffer
    this thread     buffer -> batches.jsonl -> trainer process -> weights/vNNNNNN -> every engine -> metrics.jsonl
    auditor         a process that computes samples again: do the engines still agree?

A batch is on disk before the trainer hears of it, a group before it counts: whatever is killed, what was made is
neither lost nor used twice. A trainer that is started again is given the recorded batches from its last checkpoint on,
and arrives at the same weights to the last bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from trueup.config import Config
from trueup.errors import ConfigError, EngineError, NothingToLearn, TrainingError
from trueup.monitor.curves import draw_run
from trueup.monitor.metric_log import MetricLog, append_line, read_lines
from trueup.monitor.rundir import RunFolder, accept
from trueup.monitor.sinks import Sinks
from trueup.pipeline.actor import Actor
from trueup.pipeline.buffer import Finished, RolloutBuffer, finished
from trueup.pipeline.child import ChildGone
from trueup.pipeline.evaluate import evaluate
from trueup.pipeline.fleet import POLL_S, Fleet
from trueup.pipeline.interrupt import stop_on_signals
from trueup.pipeline.preflight import preflight
from trueup.pipeline.recipe import recipe_of
from trueup.pipeline.rollout_log import RolloutLog, read_groups
from trueup.pipeline.summary import summarise
from trueup.pipeline.trainer_process import ANSWERS, TrainerProcess
from trueup.pipeline.watch import ParityWatch
from trueup.tasks.base import Task
from trueup.tasks.prompts import PromptSource
from trueup.tasks.registry import make_task
from trueup.tasks.scoring import ScoringPool
from trueup.weights.store import WeightStore

STARVED_S = 900.0
"""Without a finished group for this long the run stops: every group fails."""
BATCH_TIMEOUT_S = 3600.0
"""A trainer that takes longer for a batch hangs, and is started again."""
RESTARTS = 5
"""Of the trainer, in a row, without a batch between them."""
FOLDERS = ("logs", "weights", "rollouts", "parity")
Announce = Callable[[str], None]
Result = TypeVar("Result")


def must_drop(config: Config) -> str | None:
    """Say so where a configuration leads to dropped groups whatever the lengths are; None where it does not."""
    rollout, groups = config.rollout, config.train.groups
    flying, room = rollout.engines * rollout.concurrency, groups * rollout.max_lag
    if rollout.late == "train" or rollout.update != "in_flight" or not rollout.max_lag or flying <= room:
        return None
    return (
        f"{flying} groups are under way at once and {room} can be trained on within max_lag = {rollout.max_lag}: slow "
        "groups, those with long completions, will be dropped. Lower rollout.concurrency, raise rollout.max_lag, or "
        "set rollout.late = train with a correction"
    )


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
    the one the configuration names. The first interrupt or SIGTERM ends the run after the batch under way: saved, to be
    resumed. Raises TrueupError; the run can then be resumed.
    """
    if config.train.run is None or config.train.model is None or config.train.steps is None:
        missing = next(n for n in ("model", "run", "steps") if getattr(config.train, n) is None)
        raise ConfigError(f"train.{missing} is missing")
    if config.engine.faults and config.engine.kind != "embedded":
        raise ConfigError("engine.faults breaks the embedded engine only")
    recipe = recipe_of(config)
    task = task or make_task(config.task)
    path = config.train.run
    folder = RunFolder.resume(path, config) if resume else RunFolder.create(path, config, recipe.as_dict())
    folder.require_same_task(getattr(task, "digest", None))
    for name in FOLDERS:
        (path / name).mkdir(exist_ok=True)
    with ExitStack() as stack:
        stack.callback(folder.close)
        stop = stack.enter_context(stop_on_signals(announce))
        return _Run(config, folder, task, stack, stop, accepted, announce, on_batch).go()


class _Run:
    def __init__(
        self, config: Config, folder: RunFolder, task: Task, stack: ExitStack, stop: threading.Event,
        accepted: Sequence[str], announce: Announce, on_batch: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        assert config.train.model is not None
        self.started = time.perf_counter()
        self.config, self.folder, self.path, self.stop, self.accepted = config, folder, folder.path, stop, accepted
        self.announce, self.on_batch = announce, on_batch
        self.source = PromptSource(task, config.train.model, chat=config.task.chat, system=config.task.system)
        self.evaluation = self.source.held_out(config.task.held_out)
        self.store = WeightStore(self.path / "weights")
        accept(self.path, accepted)
        # Trainer, auditor, scorers and engines start beside one another.
        self.trainer = TrainerProcess(self.path)
        stack.callback(lambda: self.trainer.stop())  # the one that runs then
        self.watch = ParityWatch(config, self.path, self.store, accepted=accepted, announce=announce)
        stack.callback(self.watch.close)
        self.watch.start()
        self.scoring = ScoringPool(task, workers=config.rollout.score_workers, timeout_s=config.task.score_timeout_s)
        stack.callback(self.scoring.close)
        self.fleet = Fleet(config, self.path, self.store, announce)
        stack.callback(self.fleet.close)
        self.fleet.start()
        self.done = 0
        """Batches that were taken and whose version, if they made one, is served."""
        self.log = RolloutLog(self.path / "rollouts")
        stack.callback(self.log.close)
        self.batches = read_lines(self.path / "batches.jsonl")
        self.metrics = MetricLog(self.path / "metrics.jsonl", batches=len(self.batches))
        self.buffer = RolloutBuffer(
            groups_per_batch=config.train.groups, max_lag=config.rollout.max_lag, taken=len(self.batches),
            synchronous=config.rollout.update == "synchronous", late=config.rollout.late == "train",
        )  # fmt: skip
        self.sinks = Sinks(config.monitor.sinks, self.path)
        stack.callback(self.sinks.close)
        self.updated = {r["version"] for r in read_lines(self.path / "updates.jsonl")}
        self.evaluated = {r["batch"] for r in read_lines(self.path / "evaluations.jsonl")}
        self.generated_tokens = 0
        self.late_groups: list[Finished] = []
        """Groups that were dropped since the last batch."""
        self.on_policy = False
        """Whether the next batch takes groups of the served version only (rollout.min_ess)."""

    def go(self) -> dict[str, Any]:
        """The run from its beginning, or from where it was."""
        config, steps = self.config, self.config.train.steps
        assert steps is not None
        self.watch.require_accepted()
        report = preflight(config, self.fleet.processes, self.path, accepted=self.accepted, announce=self.announce)
        self.watch.wait_until_ready()
        self._start_trainer()
        if config.train.bitwise:
            self._require_same_arithmetic()
        self._serve(self.trainer.version)
        self.done = len(self.batches)
        self.fleet.after(self.done)
        if self.done % config.rollout.eval_every == 0 and self.done < steps:
            self._evaluate(self.done)
        if (warning := must_drop(config)) is not None:
            self.announce(f"rollouts   {warning}")
        actor = self._actor()
        actor.start()
        try:
            while len(self.batches) < steps and not self.stop.is_set():
                if self._batch(actor) and self.done % config.rollout.eval_every == 0 and self.done < steps:
                    self._evaluate(self.done)
        finally:
            actor.stop()
            self.fleet.abort()
        self.watch.finish()
        if not self.stop.is_set():
            self._evaluate(steps)
        summary = summarise(self.path) | {
            "preflight_verdict": report.verdict,
            "version": self.fleet.served,
            "engine_restarts": self.fleet.restarts,
            "counts": dict(actor.counts),
            "interrupted": self.stop.is_set(),
        }
        draw_run(self.path, self.path / "curves.png")
        self.folder.write("summary.json", summary)
        if self.trainer.version == 0 and not self.stop.is_set():
            skipped = self._answers()[len(self.batches)].get("skipped", "no batch had a gradient")
            raise NothingToLearn(
                f"no optimiser step was taken in {len(self.batches)} batches: {skipped}. The policy is what it was. "
                "Look at reward/group/std in metrics.jsonl: a task that is too hard or too easy gives every completion "
                "the same reward"
            )
        return summary

    def _require_same_arithmetic(self) -> None:
        """Raise ModelError where an engine cannot have the trainer's bits: another thread count, for instance."""
        from trueup.model.bitwise import require_same_arithmetic

        assert self.trainer.arithmetic is not None
        for engine in filter(None, self.fleet.engines):
            require_same_arithmetic(self.trainer.arithmetic, engine.status().arithmetic)

    def _actor(self) -> Actor:
        """The actor, with what an earlier part of the run had made and not trained on."""
        taken = {number for record in self.batches for number in record["groups"]}
        dropped = {number for record in self.batches for number in record["dropped"]}
        logged = set()
        for number, group in read_groups(self.path / "rollouts") if self.log.count else ():
            logged.add(group.rollouts[0].prompt.prompt_id)
            if number not in taken | dropped:
                self.buffer.add(finished(number, group))
        self.buffer.started = self.log.count
        self.buffer.dropped = sorted(dropped)
        prompts = ((i, p) for i, p in self.source.training() if p.prompt_id not in logged)
        return Actor(
            engines=self.fleet.engines, source=self.source, scoring=self.scoring, log=self.log, buffer=self.buffer,
            sampling=self.config.sampling, rollout=self.config.rollout, done=lambda: self.done, prompts=prompts,
        )  # fmt: skip

    def _start_trainer(self) -> None:
        """Wait for the trainer and bring it to the last recorded batch."""
        self._surviving(lambda: self._catch_up(self.batches), known=self.batches)
        answers = self._answers()
        for record in self.batches:
            if record["batch"] not in self.metrics.recorded:
                answer = answers[record["batch"]]
                self.metrics.append(record["batch"], _outcome(answer) | answer.get("metrics", {}))

    def _answers(self) -> dict[int, dict[str, Any]]:
        """What the trainer, or one before it, said of each batch."""
        return {answer["batches"]: answer for answer in read_lines(self.path / ANSWERS)}

    def _ask(self, record: dict[str, Any]) -> dict[str, Any]:
        """What the trainer makes of a batch; or made, if one before it died after its checkpoint, before its answer."""
        if record["batch"] <= self.trainer.batches:
            return self._answers()[record["batch"]]
        self.trainer.train(record["groups"])
        deadline = time.monotonic() + BATCH_TIMEOUT_S
        while (answer := self.trainer.answer(POLL_S)) is None:
            self.fleet.watch()
            self.watch.poll()
            if time.monotonic() > deadline:
                self.trainer.kill()
        return answer

    def _next_groups(self, actor: Actor) -> tuple[list[Finished], float]:
        """Wait for a batch: (groups, seconds waited); none when the run is to stop. Raises when nothing comes."""
        start = time.perf_counter()
        known, since = -1, start
        while not self.stop.is_set():
            with actor.lock:
                groups = self.buffer.take(self.trainer.version, max_lag=0 if self.on_policy else None)
                self.late_groups += self.buffer.last_dropped
                count = actor.counts["groups"]
            now = time.perf_counter()
            if groups:
                return groups, now - start
            if actor.failure is not None:
                raise TrainingError(f"rollouts cannot go on: {actor.failure}") from actor.failure
            if count != known:
                known, since = count, now
            if now - since > STARVED_S:
                raise EngineError(f"no group was finished for {STARVED_S:.0f} s; {dict(actor.counts)}")
            self.fleet.watch()
            self.watch.poll()
            time.sleep(POLL_S)
        return [], time.perf_counter() - start

    def _batch(self, actor: Actor) -> bool:
        """One batch: record it, have it trained on, serve the new version, log what was seen. False: none was begun."""
        groups, wait_s = self._next_groups(actor)
        if not groups:
            return False
        before = self.trainer.version
        record: dict[str, Any] = {
            "batch": len(self.batches) + 1, "version": before, "groups": [g.number for g in groups],
            "dropped": [n for n in self.buffer.dropped if not any(n in r["dropped"] for r in self.batches)],
        }  # fmt: skip
        append_line(self.path / "batches.jsonl", record)
        self.batches.append(record)
        start = time.perf_counter()
        answer = self._surviving(lambda: self._ask(record), known=self.batches[:-1])
        train_s = time.perf_counter() - start
        served = self._serve(answer["version"])
        self.done = len(self.batches)
        self.fleet.after(self.done)
        lags = [before - g.oldest_version for g in groups]
        with actor.lock:
            made = actor.counts["generated_tokens"] - self.generated_tokens
            self.generated_tokens += made
        seconds = time.perf_counter() - start + wait_s
        metrics = answer.get("metrics", {}) | served | {
            "lag/oldest_token/max": float(max(lags)),
            "lag/oldest_token/mean": sum(lags) / len(lags),
            "buffer/waiting/count": float(len(self.buffer)),
            "buffer/dropped/count": float(len(self.buffer.dropped)),
            **self._newly_dropped(),
            "tokens/generated/count": float(made),
            "tokens/generated/per_s": made / seconds,
            "time/wait_s": wait_s,
            "time/train_s": train_s,
            "time/batch_s": seconds,
            "time/since_start_s": time.perf_counter() - self.started,
        }  # fmt: skip
        metrics |= {f"time/{phase}_s": phase_s for phase, phase_s in answer.get("phase_s", {}).items()}
        self.metrics.append(record["batch"], _outcome(answer) | metrics)
        self.sinks.log(record["batch"], metrics)
        self.on_batch(metrics)
        self._guard(metrics)
        self.watch.trained(record, after=answer["version"])
        return True

    def _newly_dropped(self) -> dict[str, float]:
        """Length and reward of the groups that were too old for this batch: beside those trained on, they show what is
        selected."""
        self.late_groups, lost = [], self.late_groups
        if not lost:
            return {}
        return {
            "buffer/dropped/length_mean": sum(g.mean_tokens for g in lost) / len(lost),
            "buffer/dropped/reward_mean": sum(g.mean_reward for g in lost) / len(lost),
        }

    def _guard(self, metrics: dict[str, float]) -> None:
        """PipelineRL's guard (arXiv 2509.19128, in an earlier form of Algorithm 2): low ESS, on-policy data next."""
        least = self.config.rollout.min_ess
        low = least is not None and metrics.get("gap/ess/token", 1.0) < least
        if low and not self.on_policy:
            self.announce(f"ESS guard  {metrics['gap/ess/token']:.3f} is below {least}: the next batch is on-policy")
        self.on_policy = low and not self.on_policy

    def _surviving(self, work: Callable[[], Result], *, known: Sequence[dict[str, Any]]) -> Result:
        """Something with the trainer, and again with another if it dies; `known` are the batches it must have had."""
        for attempt in range(RESTARTS + 1):
            try:
                if attempt:
                    self.trainer = TrainerProcess(self.path)
                    self._catch_up(known)
                return work()
            except ChildGone as error:
                self.trainer.stop()
                if attempt == RESTARTS:
                    raise
                self.announce(f"trainer    {error}; starting it again")
        raise AssertionError("unreachable")

    def _catch_up(self, batches: Sequence[dict[str, Any]]) -> None:
        """Give a trainer that starts the recorded batches that came after its checkpoint. Raises ChildGone."""
        self.trainer.wait_until_ready()
        for record in batches[self.trainer.batches :]:
            self._ask(record)

    def _serve(self, version: int) -> dict[str, float]:
        """Have every engine serve a version and score the canary. Older weights are deleted, but for the last few."""
        updated = self.fleet.serve(version)
        if updated is None and version:
            return {}
        start = time.perf_counter()
        self.fleet.with_engines(lambda engines: self.watch.updated(engines, version))
        canary_s = time.perf_counter() - start
        if updated is None:
            return {}
        if version not in self.updated:  # a resumed run gives its engines a version that was recorded before
            append_line(self.path / "updates.jsonl", updated.as_dict())
            self.updated.add(version)
        self.store.keep_newest(max(self.config.rollout.keep_weights, self.watch.keep_weights), "run")
        pauses = [receipt.paused_s for receipt in updated.receipts]
        return {"time/update_s": updated.seconds, "time/pause_s": max(pauses), "time/canary_s": canary_s}

    def _evaluate(self, batch: int) -> None:
        """Evaluate what is served, and write it down, once for each batch."""
        if batch in self.evaluated:
            return
        self.evaluated.add(batch)
        sampling, rollout = self.config.sampling, self.config.rollout
        found = self.fleet.with_engines(
            lambda engines: evaluate(engines, self.source, self.evaluation, self.scoring, sampling, rollout)
        )
        record = {
            "batch": batch, "version": self.fleet.served, "reward": found.reward, "error": found.error,
            "prompts": found.scored, "failed": found.failed,
        }  # fmt: skip
        append_line(self.path / "evaluations.jsonl", record)
        self.sinks.log(batch, {"heldout/reward/mean": found.reward})
        self.announce(f"held out   batch {batch}  reward {found.reward:.3f} (standard error {found.error:.3f})")


def _outcome(answer: dict[str, Any]) -> dict[str, Any]:
    """The version after a batch, and why it is the one before."""
    return {name: answer[name] for name in ("version", "skipped") if name in answer}
