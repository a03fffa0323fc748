"""Probes that change the engine's weights and put them back: only with --allow-updates, on a server of one's own.

The same weights again must move nothing (W4). Weights that differ in every tensor must be found again in the engine's
scores, in all of them: what was left behind is found as it is from older checkpoints (W1, W3, W15). A prompt cached
before must not be answered from the cache after (W12), given that cached and fresh agreed before.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from trueup.engines.probe_http import Answer, ProbeClient
from trueup.engines.vllm_checkpoint import read_checkpoint
from trueup.errors import EngineError, WeightError
from trueup.knobs import CheckConfig
from trueup.parity.grouping import group
from trueup.parity.interrupts import uninterrupted
from trueup.parity.probes import Probed, asks_of, cached_against_fresh, outcome, paired, scored
from trueup.parity.prompts import Prompts
from trueup.parity.report import Cause
from trueup.parity.update_target import TrueupTarget, UpdateTarget, VllmTarget, refused
from trueup.parity.verdicts import COLD_CACHE, SAMPLING_ONLY
from trueup.parity.workbench import Workbench
from trueup.trace import Trace, TraceRow
from trueup.types import LogprobKind
from trueup.weights.store import WeightStore

CANARY_PROMPTS = 8
CANARY_TOKENS = 24
NOISE = 0.05
"""Of a tensor's own spread: visible in every group, far from breaking the model."""
PROBE_VERSIONS = 900_000_000
"""Numbers from here to twice this are the probe's: a number once served names one set of weights for good."""
RESTORE_TRIES, RESTORE_PAUSE_S = 4, 1.0
STALE = (
    "W12", "weights", "cached prompts outlive the weights that computed them",
    "--no-enable-prefix-caching, clear the cache at each update, or salt requests with the version",
)  # fmt: skip
COLD = ("I5", "inference", *COLD_CACHE)
NEEDS = ("W1", "W2", "W3", "W4", "W12", "W15")


@dataclass(kw_only=True)
class UpdateOutcome:
    """What the updates showed. `restored`: what became of the weights ("": they were never touched). `cache`: I5 or W12
    if the cache was off before any update, told apart by clearing it."""

    probes: list[Probed] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    not_there: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    restored: str = ""
    cache: Cause | None = None


class UpdateProbe:
    """One round of updates on one engine."""

    def __init__(
        self, bench: Workbench, client: ProbeClient, prompts: Prompts, *, floor: float, limit_rms: float, fits: bool
    ) -> None:
        """`fits`: the engine's scores are the trainer's within the floor."""
        self.bench, self.client, self.prompts = bench, client, prompts
        self.floor, self.limit_rms, self.fits = floor, limit_rms, fits
        self.found = UpdateOutcome()
        self.published: list[int] = []
        self.applied = False

    def run(self, progress: Callable[[str, float], None]) -> UpdateOutcome:
        """Update, compare, restore: the engine's weights are put back on every way out, and the outcome says so.

        Raises EngineError when it was interrupted, after putting them back.
        """
        if (why := refused(self.client, digest=self.bench.manifest_digest(), fits=self.fits)) is not None:
            self.found.missing |= dict.fromkeys(NEEDS, why)
            return self.found
        self.served = self.client.facts.version or 0
        model = self.bench.scorer.model(self.bench.scorer.engine.body)
        self.original = {n: t.detach().clone() for n, t in model.stored_tensors().items()}
        rows = self._canary_rows()
        before = scored(self.client, rows, together=True)
        if not rows or any(a.error for a in before):
            why = "the engine does not score given tokens: nothing could be verified"
            self.found.missing |= dict.fromkeys(NEEDS, why)
            return self.found
        unsteady = paired(before, scored(self.client, rows, together=True))
        if unsteady.rms > self.limit_rms:
            why = (
                f"the engine's scores differ from themselves (rms {unsteady.rms:.2g} nats): no update could be verified"
            )
            self.found.missing |= dict.fromkeys(NEEDS, why)
            return self.found
        control = self._cached("before", warm=True)
        self.target = self._target()
        self.store = WeightStore(self.target.place)
        interrupted = False
        try:
            progress("updating with the same weights", 0.75)
            version = self._publish(self.served, self.original)
            self.target.require_unchanged()
            self._update(self.store.folder(version))
            again = scored(self.client, rows, together=True)
            words = "scores before and after the same weights"
            same = outcome("no-op update", paired(before, again), self.limit_rms, words)
            self.found.probes.append(same)
            progress("updating with other weights", 0.8)
            number = PROBE_VERSIONS + time.time_ns() % PROBE_VERSIONS
            self._update(self.store.folder(self._publish(number, _perturbed(self.original))))
            if not self._named_after_no_op(same):
                self._judge_perturbed(rows, self.published[-1])
            self._stale_cache(control)
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:
            raise EngineError(f"weights could not be written to {self.store.root}: {error}") from None
        finally:
            with uninterrupted():
                progress("restoring the weights", 0.95)
                note = self._restore(rows, before)
        if interrupted:
            raise EngineError(f"interrupted; {note}")
        self.found.restored = note
        if control.differs:
            self._cache_cleared(control)
        return self.found

    def _target(self) -> UpdateTarget:
        assert self.bench.check.model is not None
        if self.client.facts.kind == "vllm":
            return VllmTarget(self.client, read_checkpoint(self.bench.check.model))
        return TrueupTarget(self.client)

    def _canary_rows(self) -> list[TraceRow]:
        asks = asks_of(self.prompts.ordinary[:CANARY_PROMPTS], {"temperature": 1.0}, max_tokens=CANARY_TOKENS)
        answers = self.client.generate(asks, together=True)
        return [
            TraceRow(
                line=i, engine=self.client.facts.info, sampling={"temperature": 1.0}, prompt_token_ids=a.prompt,
                completion_token_ids=b.ids, completion_logprobs=b.logprobs,
            )
            for i, (a, b) in enumerate(zip(asks, answers, strict=True), 1) if b.error is None
        ]  # fmt: skip

    def _publish(self, version: int, tensors: Mapping[str, Tensor]) -> int:
        """Write a version into a folder of the probe's own and return its number."""
        self.store.publish(version, tensors)
        self.published.append(version)
        return version

    def _update(self, folder: Path, *, clear_cache: bool = False) -> None:
        """Have the engine load a published version. Raises EngineError."""
        try:
            self.target.load(folder, clear_cache=clear_cache)
        except WeightError as error:  # the server's own word that it went on with the old weights
            raise EngineError(f"the engine refused an update: {error}") from None
        except (EngineError, KeyboardInterrupt):
            self.applied = True
            raise
        self.applied = True

    def _named_after_no_op(self, same: Probed) -> bool:
        if not same.differs:
            self.found.not_there |= {"W4"} if same.compared else set()
            return False
        self.found.causes.append(
            Cause(
                id="W4", layer="weights", title="loading the same weights again changes the engine", confidence="high",
                explained=None, fix="reload from the checkpoint's own layout, never from what an earlier load repacked",
                evidence=same.text,
            )
        )  # fmt: skip
        return True

    def _judge_perturbed(self, rows: list[TraceRow], version: int) -> None:
        """Score the canary under the new weights; whatever does not fit is searched for among old and new."""
        answers = scored(self.client, rows, together=True)
        now = [
            replace(r, completion_logprobs=a.logprobs) for r, a in zip(rows, answers, strict=True) if a.error is None
        ]
        if not now:
            self.found.notes.append(f"after an update of every tensor the engine scores nothing: {answers[0].error}")
            return
        assert self.bench.check.model is not None
        with tempfile.TemporaryDirectory(prefix="trueup-check-") as place:
            model = checkpoint_of(Path(place) / "new", self.bench.check.model, self.store.folder(version))
            check: CheckConfig = self.bench.check.model_copy(
                update={"model": model, "checkpoints": (self.bench.check.model,), "dtype": "auto"}
            )
            bench = Workbench.of(check, self.bench.announce)
            bench.set_precision(now)
            trace = Trace(path=model, rows=tuple(now), problems=())
            setting = group(trace, LogprobKind.RAW, [])[0]
            setting = replace(setting, case=replace(setting.case, tag=" [after an update of every tensor]"))
            judged = bench.judge(setting, excluded=SAMPLING_ONLY)
        report = judged.report
        weights = [replace(c, settings=()) for c in report.causes if c.layer == "weights"]
        self.found.causes += weights
        if report.verdict == "mismatch" and not weights:
            self.found.notes.append(f"after an update of every tensor the engine fits neither weights: {report.why}")
        if report.verdict == "agree":
            self.found.not_there |= {"W1", "W2", "W3", "W15"}
        text = f"scores after an update of every tensor against the trainer's: {report.why}"
        self.found.probes.append(Probed(name="other weights", gap=None, limit_rms=self.floor, text=text))

    def _cached(self, when: str, *, warm: bool) -> Probed:
        probe = cached_against_fresh(
            self.client, self.prompts.long, limit_rms=self.limit_rms, salt=f"{when}-{time.time_ns()}", warm=warm
        )
        return replace(probe, name=f"cache {when} the update")

    def _stale_cache(self, control: Probed) -> None:
        after = self._cached("after", warm=False)
        self.found.probes += [control, after]
        if control.differs or not after.differs:
            if not control.differs and control.compared and after.compared:
                self.found.not_there.add("W12")
            return
        self.found.causes.append(
            Cause(
                id=STALE[0], layer=STALE[1], title=STALE[2], confidence="high", explained=None, fix=STALE[3],
                evidence=f"after an update: {after.text}; before it: {control.text}",
            )
        )  # fmt: skip

    def _cache_cleared(self, before: Probed) -> None:
        """The cache was off before any update, and was cleared since: what still differs is arithmetic (I5), what does
        not was stale (W12)."""
        again = self._cached("cleared since", warm=True)
        self.found.probes.append(replace(again, name="cache after clearing"))
        if not again.differs and not again.compared:
            return
        evidence = f"{before.text}; after clearing the cache: {again.text}"
        cause_id, layer, title, fix = COLD if again.differs else STALE
        self.found.cache = Cause(
            id=cause_id, layer=layer, title=title, confidence="high", explained=None, fix=fix, evidence=evidence
        )

    def _restore(self, rows: list[TraceRow], before: Sequence[Answer]) -> str:
        """Have the engine load the original weights, which lie published already, until its scores are what they were.

        Raises EngineError when they are not after RESTORE_TRIES.
        """
        self.client.try_again()
        if not self.applied:
            shutil.rmtree(self.store.root, ignore_errors=True)
            return "the engine's weights were not touched"
        why = ""
        originals = self.target.originals(self.store.folder(self.published[0]))
        for attempt in range(RESTORE_TRIES):
            self.client.try_again()
            try:
                self._update(originals[attempt % len(originals)], clear_cache=True)
                gap = paired(before, scored(self.client, rows, together=True))
            except Exception as error:  # noqa: BLE001  (whatever failed, the weights must go back: try again)
                why = str(error)
                time.sleep(RESTORE_PAUSE_S)
                continue
            if gap.tokens and gap.rms <= self.limit_rms and not gap.failed:
                shutil.rmtree(self.store.root, ignore_errors=True)
                return f"the engine's weights were restored and verified; it serves version {self.served} as before"
            why = f"scores differ from before by rms {gap.rms:.2g} nats over {gap.tokens} tokens"
        damaged = {c.id for c in self.found.causes} & {"W4"}
        if damaged:
            shutil.rmtree(self.store.root, ignore_errors=True)
            return f"the engine's weights were sent back, but loading changes them (W4): {why}; restart the engine"
        raise EngineError(f"THE ENGINE'S WEIGHTS WERE NOT RESTORED: {why}; restart the engine")


def _perturbed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor a little different, the same way each time."""
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            changed[name] = tensor
            continue
        spread = float(tensor.float().std().nan_to_num(0.0)) or float(tensor.float().abs().mean()) or 1.0
        noise = torch.randn(tensor.shape, generator=generator) * max(spread, 0.02) * NOISE
        changed[name] = (tensor.float() + noise).to(tensor.dtype)
    return changed


def checkpoint_of(target: Path, model: Path, version: Path) -> Path:
    """A Hugging Face folder with the configuration of one and the weights of another."""
    target.mkdir()
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, target / file.name)
    (target / "model.safetensors").symlink_to((version / "model.safetensors").absolute())
    return target
