"""Runs beside one another: the panels of a migration study, and where a run first leaves the reference's band.

Runs whose configurations differ in seeds, names and schedules of saving alone are one group; the first group is the
reference. Curves are smoothed by a centred mean over a twentieth of their length before they are compared, and a run
has left the band once it stays outside for as long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trueup.errors import ConfigError
from trueup.monitor.metric_log import read_lines
from trueup.monitor.rundir import OWN_SECTIONS

PANELS = {
    "reward": "reward (training batches)",
    "clamp_log_ratio_new_old_indicator": "clip rate",
    "kl_new_old": "KL, new to old (K3)",
    "entropy": "entropy, nats",
    "gap/ratio/mean": "mean ratio, trainer / rollout",
    "gap/log_ratio/rms": "log ratio, rms, nats",
    "lag/oldest_token/max": "lag, versions",
    "gap/ess/token": "ESS, token",
}
"""Metric and its title: those of the article, and what they are made of."""
NO_MATTER = (
    "rollout.seed", "task.seed", "train.run", "train.checkpoint_every", "train.keep_checkpoints",
    "rollout.keep_weights", "rollout.eval_every",
)  # fmt: skip
"""Knobs in which runs of one group may differ."""
SIGMAS = 3.0
LEAST_WINDOW = 5
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of one run: steps and values, those that were measured."""

    steps: Array
    values: Array

    @property
    def window(self) -> int:
        """Steps of the moving mean."""
        return max(LEAST_WINDOW, len(self.steps) // 20)

    def _span(self) -> tuple[Array, Array]:
        """First and last (exclusive) value in the mean around each step."""
        at, half = np.arange(len(self.values)), self.window // 2
        return np.maximum(at - half, 0), np.minimum(at + half + 1, len(at))

    def smooth(self) -> Array:
        """Centred moving mean; shorter at both ends."""
        low, high = self._span()
        padded = np.concatenate([[0.0], np.cumsum(self.values)])
        return np.asarray((padded[high] - padded[low]) / (high - low))

    def noise(self) -> Array:
        """Standard deviation of the smoothed curve at each step, from what the smoothing took away."""
        low, high = self._span()
        return np.asarray(np.std(self.values - self.smooth()) / np.sqrt(high - low))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one configuration; `name` is that of the first one's folder."""

    name: str
    runs: tuple[Path, ...]

    def curves(self, metric: str) -> list[Curve]:
        """One of each run that has the metric."""
        found = []
        for run in self.runs:
            records = [r for r in read_lines(run / "metrics.jsonl") if metric in r]
            if records:
                steps, values = ([float(r[n]) for r in records] for n in ("batch", metric))
                found.append(Curve(steps=np.array(steps), values=np.array(values)))
        return found


@dataclass(frozen=True, kw_only=True)
class Departure:
    """The first step at which a run leaves the reference's band in a metric."""

    group: str
    run: str
    metric: str
    step: int
    value: float
    band: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.band
        return f"{self.run}: {self.metric} leaves at step {self.step}: {self.value:.4g}, band {low:.4g} to {high:.4g}"


def grouped(runs: Sequence[Path]) -> list[Group]:
    """Runs by configuration, in the order given. Raises ConfigError for a folder that holds no run."""
    found: dict[str, list[Path]] = {}
    for run in runs:
        if not (run / "config.json").is_file() or not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"{run} holds no run (config.json and metrics.jsonl)")
        content = json.loads((run / "config.json").read_text(encoding="utf-8"))
        same = {
            f"{section}.{name}": value
            for section in (*OWN_SECTIONS, "vllm")
            for name, value in content.get(section, {}).items()
            if f"{section}.{name}" not in NO_MATTER
        }
        found.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    return [Group(name=members[0].name, runs=tuple(members)) for members in found.values()]


def band(reference: Sequence[Curve], steps: Array) -> tuple[Array, Array]:
    """(low, high) at steps: mean of the smoothed reference curves, 3 standard deviations to each side.

    The deviation is that between seeds where there are several, and never less than the noise of a difference of two
    single curves.
    """
    smooth = np.array([np.interp(steps, c.steps, c.smooth()) for c in reference])
    own = np.sqrt(2) * np.mean([np.interp(steps, c.steps, c.noise()) for c in reference], axis=0)
    spread = np.std(smooth, axis=0, ddof=1) if len(reference) > 1 else np.zeros(len(steps))
    width = SIGMAS * np.maximum(spread, own)
    return smooth.mean(axis=0) - width, smooth.mean(axis=0) + width


def departures(groups: Sequence[Group]) -> list[Departure]:
    """Where runs of other groups leave the first group's band, by step."""
    found = []
    for metric in PANELS:
        reference = groups[0].curves(metric)
        if not reference:
            continue
        for group in groups[1:]:
            for run in group.runs:
                for curve in Group(name=group.name, runs=(run,)).curves(metric):
                    left = _leaves(curve, reference)
                    if left is not None:
                        step, value, limits = left
                        found.append(Departure(
                            group=group.name, run=run.name, metric=metric, step=step, value=value, band=limits
                        ))  # fmt: skip
    return sorted(found, key=lambda d: d.step)


def _leaves(curve: Curve, reference: Sequence[Curve]) -> tuple[int, float, tuple[float, float]] | None:
    low, high = band(reference, curve.steps)
    smooth = curve.smooth()
    within = curve.steps <= max(c.steps[-1] for c in reference)
    outside = ((smooth < low) | (smooth > high)) & within
    in_a_row = 0
    for at, out in enumerate(outside):
        in_a_row = in_a_row + 1 if out else 0
        if in_a_row == curve.window:
            first = at - curve.window + 1
            return int(curve.steps[first]), float(smooth[first]), (float(low[first]), float(high[first]))
    return None
