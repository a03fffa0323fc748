"""The figures of a report, as SVG text: what people plot when they suspect a mismatch, each against the floor."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trueup.parity.report import SettingReport

INK, FLOOR, GRID = "#2b4c7e", "#c8553d", "#dddddd"
SIZE = (4.2, 3.2)
MAX_POINTS = 4000
POSITION_BINS, PROBABILITY_BINS = 8, 10


def _svg(draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": "trueup"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.grid(color=GRID, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub(r"<\?xml.*?<svg", "<svg", out.getvalue(), flags=re.DOTALL)


def _arrays(setting: SettingReport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points = setting.points
    step = max(1, len(points.engine) // MAX_POINTS)
    return (
        np.array(points.engine[::step]),
        np.array(points.trainer[::step]),
        np.array(points.position[::step]),
    )


def _floor(setting: SettingReport) -> float:
    value = setting.noise_floor.get("rms")
    return float(value) if isinstance(value, float) and math.isfinite(value) else 0.0


def scatter(setting: SettingReport) -> str:
    """Trainer's against engine's logprob of each token; the dashed line is equality."""
    engine, trainer, _ = _arrays(setting)

    def draw(axes: Axes) -> None:
        low = float(min(engine.min(), trainer.min()))
        axes.plot([low, 0], [low, 0], "--", color=FLOOR, linewidth=0.8)
        axes.plot(engine, trainer, ".", color=INK, markersize=2, alpha=0.5)
        axes.set(xlabel="engine logprob, nats", ylabel="trainer logprob, nats")

    return _svg(draw)


def _binned(axes: Axes, keys: np.ndarray, r: np.ndarray, edges: Sequence[float], floor: float) -> None:
    centres, rms, mean = [], [], []
    for low, high in itertools.pairwise(edges):
        inside = (keys >= low) & (keys < high)
        if inside.sum() > 2:
            centres.append((low + high) / 2)
            rms.append(float(np.sqrt(np.mean(r[inside] ** 2))))
            mean.append(float(r[inside].mean()))
    axes.axhline(floor, color=FLOOR, linestyle="--", linewidth=0.8, label="predicted floor, rms")
    axes.plot(centres, rms, "o-", color=INK, markersize=3, linewidth=1, label="rms r")
    axes.plot(centres, mean, "s:", color="#7a7a7a", markersize=2, linewidth=0.8, label="mean r")
    axes.legend(frameon=False, fontsize=7)
    axes.set_ylabel("nats")


def by_position(setting: SettingReport) -> str:
    """Rms and mean of r over the position in the completion: decode errors grow, prompt errors decay."""
    engine, trainer, position = _arrays(setting)

    def draw(axes: Axes) -> None:
        edges = np.linspace(0, float(position.max()) + 1, POSITION_BINS + 1)
        _binned(axes, position, trainer - engine, edges.tolist(), _floor(setting))
        axes.set_xlabel("position in the completion")

    return _svg(draw)


def by_probability(setting: SettingReport) -> str:
    """Rms and mean of r over the trainer's probability: rounding is largest where tokens are unlikely."""
    engine, trainer, _ = _arrays(setting)

    def draw(axes: Axes) -> None:
        edges = np.linspace(0, 1.0 + 1e-9, PROBABILITY_BINS + 1)
        _binned(axes, np.exp(trainer), trainer - engine, edges.tolist(), _floor(setting))
        axes.set_xlabel("trainer's probability of the token")

    return _svg(draw)


def histogram(setting: SettingReport) -> str:
    """Distribution of r over the normal curve that the predicted floor would give."""
    engine, trainer, _ = _arrays(setting)
    r, floor = trainer - engine, _floor(setting)

    def draw(axes: Axes) -> None:
        width = max(float(np.abs(r).max()), 3 * floor, 1e-9)
        axes.hist(r, bins=60, range=(-width, width), density=True, color=INK, alpha=0.7, label="r")
        if floor:
            at = np.linspace(-width, width, 400)
            curve = np.exp(-0.5 * (at / floor) ** 2) / (floor * math.sqrt(2 * math.pi))
            axes.plot(at, curve, color=FLOOR, linewidth=1, label="floor alone")
        axes.set(xlabel="r = trainer - engine, nats", yscale="log", ylim=(1e-3, None))
        axes.legend(frameon=False, fontsize=7)

    return _svg(draw)


def version_scan(scan: Sequence[tuple[str, float]], floor: float) -> str:
    """Mean |r| under each weight version given: the engine serves the one at the minimum."""

    def draw(axes: Axes) -> None:
        labels, values = [label for label, _ in scan], [value for _, value in scan]
        axes.plot(range(len(scan)), values, "o-", color=INK, markersize=4)
        axes.axhline(floor, color=FLOOR, linestyle="--", linewidth=0.8)
        axes.set_xticks(range(len(scan)), labels, rotation=30, ha="right")
        axes.set(ylabel="mean |r|, nats", yscale="log")

    return _svg(draw)
