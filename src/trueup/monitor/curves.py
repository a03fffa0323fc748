"""Pictures of runs: one run's curves with its audits and alarms, and several runs beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trueup.monitor.compare import PANELS, Group
from trueup.monitor.metric_log import read_lines

COLOURS = ("#2b4c7e", "#c8553d", "#3f7d4f", "#8a5a9e", "#b08b2e", "#4a4a4a", "#2a9d9d", "#c45c8f")
PANEL = (3.6, 2.5)
COLUMNS = 4


def draw_run(run: Path, out: Path) -> None:
    """Held-out reward, the article's panels, and every audit's parts against the floor; alarms as dashed lines."""
    group = Group(name=run.name, runs=(run,))
    figure, axes = _figure(len(PANELS) + 2)
    _heldout(axes[0], group, COLOURS[0])
    _parts(axes[1], run)
    for axis, (metric, title) in zip(axes[2:], PANELS.items(), strict=False):
        _panel(axis, title, [group], metric)
    for axis in axes:
        for alarm in read_lines(run / "alarms.jsonl"):
            axis.axvline(alarm["batch"], color=COLOURS[1], linestyle="--", linewidth=0.8)
    figure.suptitle(run.name, fontsize=10)
    figure.savefig(out, dpi=120)


def draw_comparison(groups: Sequence[Group], out: Path) -> None:
    """The article's panels with a band over seeds for each group, held-out reward, and the audits' backend part."""
    figure, axes = _figure(len(PANELS) + 2)
    for colour, group in zip(_colours(groups), groups, strict=True):
        _heldout(axes[0], group, colour)
        _backend(axes[1], group, colour)
    for axis, (metric, title) in zip(axes[2:], PANELS.items(), strict=False):
        _panel(axis, title, groups, metric)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(out, dpi=120)


def _colours(groups: Sequence[Group]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(groups))]


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, COLUMNS)).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    for axis in axes[:panels]:
        axis.grid(color="#dddddd", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=7)
    return figure, axes[:panels]


def _heldout(axis: Axes, group: Group, colour: str) -> None:
    axis.set_title("held-out reward", fontsize=8)
    for number, run in enumerate(group.runs):
        records = read_lines(run / "evaluations.jsonl")
        steps, values = [r["batch"] for r in records], [r["reward"] for r in records]
        axis.plot(steps, values, "o-", color=colour, markersize=2.5, linewidth=1, label=None if number else group.name)


def _panel(axis: Axes, title: str, groups: Sequence[Group], metric: str) -> None:
    axis.set_title(title, fontsize=8)
    for colour, group in zip(_colours(groups), groups, strict=True):
        curves = group.curves(metric)
        if not curves:
            continue
        if len(groups) == 1:
            axis.plot(curves[0].steps, curves[0].values, color=colour, linewidth=0.4, alpha=0.4)
        longest = max(curves, key=lambda c: len(c.steps))
        smooth = np.array([np.interp(longest.steps, c.steps, c.smooth()) for c in curves])
        axis.plot(longest.steps, smooth.mean(axis=0), color=colour, linewidth=1)
        if len(curves) > 1:
            axis.fill_between(longest.steps, smooth.min(axis=0), smooth.max(axis=0), color=colour, alpha=0.2)


def _audits(run: Path) -> list[dict[str, Any]]:
    return [a for a in read_lines(run / "audits.jsonl") if "failed" not in a]


def _rms(audits: Sequence[dict[str, Any]], part: str) -> list[float]:
    return [a["components"][part].get("rms") or np.nan for a in audits]  # a logarithm has no place for exactly 0


def _backend(axis: Axes, group: Group, colour: str) -> None:
    axis.set_title("audits: backend, rms, nats (dotted: floor, x: off from here)", fontsize=8)
    for run in group.runs:
        audits = _audits(run)
        if not audits:
            continue
        steps = [a["batch"] for a in audits]
        axis.plot(steps, _rms(audits, "backend"), "o-", color=colour, markersize=2.5, linewidth=1)
        axis.plot(steps, [a["floor"]["rms"] for a in audits], ":", color="#222222", linewidth=1)
        for alarm in read_lines(run / "alarms.jsonl"):
            at = alarm.get("first_batch") or alarm["batch"]
            axis.plot(at, audits[0]["floor"]["rms"], "x", color=colour, markersize=7)
        axis.set_yscale("log")


def _parts(axis: Axes, run: Path) -> None:
    axis.set_title("audits: rms of each part, nats", fontsize=8)
    audits = _audits(run)
    if not audits:
        return
    steps = [a["batch"] for a in audits]
    for colour, part in zip(COLOURS, ("backend", "stale_kv", "staleness", "self_noise"), strict=False):
        label = part.replace("_", " ")
        axis.plot(steps, _rms(audits, part), "o-", color=colour, markersize=2.5, linewidth=1, label=label)
    axis.plot(steps, [a["floor"]["rms"] for a in audits], ":", color="#222222", linewidth=1, label="floor")
    axis.set_yscale("log")
    axis.legend(fontsize=6, frameon=False)
