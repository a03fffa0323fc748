"""What a check of any kind works with: the scorer, limits scaled to the model, rows that the model can score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from trueup.errors import ConfigError, ModelError
from trueup.knobs import CheckConfig, LimitsConfig
from trueup.model.substitute import EVERYTHING
from trueup.parity.attribution import EDGE_ALLOWANCE
from trueup.parity.budget import Budget
from trueup.parity.compare import loss, residual
from trueup.parity.evidence import ENGINE, EXACT, REFERENCE, TRAINER, EngineModel
from trueup.parity.grouping import Setting, arithmetic
from trueup.parity.scorer import FP32, Scorer
from trueup.parity.setting import NOISE_ROWS, Judged, SettingJudge, reference_rows, usable_rows
from trueup.policy.head import multiplies
from trueup.trace import TraceRow
from trueup.weights.snapshot import MANIFEST_FILE, Manifest, manifest_of

SCAN_ROWS = 6
PASSES = 3
"""Forward passes that are made of every row before anything is judged: trainer, engine and reference."""
REST = 2.0
"""What follows takes this many times as long as they do, on two cores (1 in float32, 4 with a cause to fit)."""
LIMITS_VOCABULARY = 49_152
"""Vocabulary the smallest floor and bias were measured with; a plain log_softmax errs in proportion to its length."""


@dataclass(kw_only=True)
class Workbench:
    """A scorer set up for the rows of one check, and what was wrong with them."""

    check: CheckConfig
    announce: Callable[[str], None]
    scorer: Scorer
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    budget: Budget | None = None
    """For the search of all settings together; made when the first is judged."""
    say: Callable[[str], None] = lambda line: None
    """Gets lines that stay on the terminal."""

    @classmethod
    def of(
        cls, check: CheckConfig, announce: Callable[[str], None], say: Callable[[str], None] = lambda line: None
    ) -> Workbench:
        """Open the checkpoint. Raises ConfigError without one, ModelError when it or an older one cannot be read."""
        if check.model is None:
            raise ConfigError(
                "check needs --model PATH (the trainer's checkpoint; `trueup model smollm2 DIR` makes one)"
            )
        checkpoints, versions = older_weights(check.checkpoints)
        scorer = Scorer(
            path=check.model, trainer=FP32, engine=FP32, batch_rows=check.batch_rows, device=check.device,
            announce=announce, checkpoints=checkpoints, versions=versions,
        )  # fmt: skip
        return cls(check=check, announce=announce, say=say, scorer=scorer)

    def set_precision(self, rows: Sequence[TraceRow]) -> None:
        """Choose both sides' arithmetic from what the rows' engine declares. Raises TraceError when rows disagree."""
        self.scorer.trainer, self.scorer.engine = arithmetic(self.check, rows, self.scorer.dtype())
        for label in self.scorer.checkpoints:
            self.scorer.tensors(label)
        device = torch.device(self.check.device)
        if not all(multiplies(side.body, device) for side in (self.scorer.trainer, self.scorer.engine)):
            self.notes.append("this CPU has no instructions for 16 bits: they are imitated by rounding float32")

    @property
    def limits(self) -> LimitsConfig:
        """The configured limits; the smallest floor and bias grow with the vocabulary."""
        limits = self.check.limits
        scale = max(1.0, self.scorer.model(self.scorer.trainer.body).vocab_size / LIMITS_VOCABULARY)
        return limits.model_copy(update={n: scale * getattr(limits, n) for n in ("min_floor", "min_bias")})

    def fit_for_model(self, settings: Sequence[Setting]) -> list[Setting]:
        """Leave out, and report, rows the model cannot score. Raises ModelError when none is left."""
        kept = []
        for setting in settings:
            reasons = {r.line: why for r in usable_rows(setting) if (why := self.scorer.unfit(r))}
            self.problems += [f"line {line}: {why}; row left out" for line, why in reasons.items()]
            rows = tuple(r for r in setting.rows if r.line not in reasons)
            if rows:
                kept.append(replace(setting, rows=rows))
        if not kept:
            raise ModelError(self.problems[-1].removesuffix("; row left out"))
        return kept

    def prefetch(self, settings: Sequence[Setting]) -> None:
        """Run the forward passes of all settings precision by precision, so that each model is loaded once."""
        rows = [r for s in settings for r in usable_rows(s)]
        if not rows:
            return
        started = time.monotonic()
        for source in (TRAINER, ENGINE):
            self.scorer.states(source, rows)
            self.scorer.head(source)
        self.scorer.states(TRAINER, [r for s in settings for r in usable_rows(s)[:NOISE_ROWS]], batch_rows=1)
        self.scorer.states(REFERENCE, [r for s in settings for r in reference_rows(self.scorer, usable_rows(s))])
        self.scorer.head(REFERENCE)
        self._expect(rows, time.monotonic() - started)

    def _expect(self, rows: Sequence[TraceRow], passes_s: float) -> None:
        """Say how long the check may take, from how long its first forward passes took."""
        tokens = sum(len(r.prompt_token_ids) + len(r.completion_token_ids) for r in rows)
        search_s = self.check.search_tokens * passes_s / (PASSES * tokens)
        search_s = min(search_s, self.check.search_s or search_s)
        self.say(
            f"expected    about {duration(REST * passes_s)} more, and up to {duration(search_s)} if a cause has to be "
            f"simulated (check.search_tokens = {self.check.search_tokens:,})"
        )

    def manifest_digest(self) -> str:
        """Digest that an engine which serves the trainer's weights reports, in the engine's precision."""
        return manifest_of(0, self.scorer.model(self.scorer.engine.body).stored_tensors()).digest

    def floor_rms(self, setting: Setting) -> float:
        """The floor predicted for a setting, nats rms."""
        base = EngineModel(dist=setting.case.trainer_distribution)
        return SettingJudge(self.scorer, self.limits).floor(setting, base).rms

    def search_title(self) -> str:
        """What a search could spend, and what it has."""
        ceiling = f", at most {self.check.search_s:g} s" if self.check.search_s is not None else ""
        return f"{self.check.search_tokens:,} tokens{ceiling}, {self.scorer.searched_tokens:,} spent"

    def version_scan(self, setting: Setting) -> list[tuple[str, float]] | None:
        """Mean |r| in nats of a setting's first rows under each older checkpoint and under the trainer's weights."""
        rows = usable_rows(setting)[:SCAN_ROWS]
        if not self.scorer.checkpoints or not rows:
            return None
        evidence, dist = self.scorer.evidence(setting.case, rows), setting.case.trainer_distribution
        sources = {label: replace(EXACT, weights=(label, EVERYTHING)) for label in self.scorer.checkpoints}
        return [
            (label, loss(residual(evidence, EngineModel(dist=dist, source=source)), EDGE_ALLOWANCE))
            for label, source in {**sources, "trainer": EXACT}.items()
        ]

    def judge(self, setting: Setting, **knowledge: object) -> Judged:
        """Judge one setting; see SettingJudge.judge."""
        self.announce(f"judging {setting.case.label()}")
        if self.budget is None:
            spent, check = self.scorer, self.check
            self.budget = Budget(
                tokens=check.search_tokens, spent=lambda: spent.searched_tokens, seconds=check.search_s
            )
        judged = SettingJudge(self.scorer, self.limits, budget=self.budget).judge(setting, **knowledge)  # type: ignore[arg-type]
        if judged.note:
            self.notes.append(judged.note)
        return judged


def duration(seconds: float) -> str:
    """Seconds in words, to the precision of a guess."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def older_weights(folders: Sequence[Path]) -> tuple[dict[str, Path], dict[int, str]]:
    """Label older checkpoints, oldest first as given: ({label: folder}, {published version: label}).

    Raises ConfigError for a folder that is not there or given twice.
    """
    labels: dict[str, Path] = {}
    versions: dict[int, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--checkpoints: {folder} does not exist")
        label = folder.name if folder.name not in labels else str(folder)
        if label in labels:
            raise ConfigError(f"--checkpoints: {folder} is given twice")
        labels[label] = folder
        manifest = folder / MANIFEST_FILE
        if manifest.is_file():
            versions[Manifest.from_json(manifest.read_text(encoding="utf-8")).version] = label
    return labels, versions
