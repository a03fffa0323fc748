"""The result of a check as data: `trueup.parity/1`. Rendering is in terminal.py; nothing is computed here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from trueup.errors import TrueupError
from trueup.parity.catalogue import separated_by

SCHEMA = "trueup.parity/1"
TRIED = "tried, and does not account for the gap"
NOT_TRIED = "not tried: the search was cut short (check.search_tokens, check.search_s)"
"""Why an id is not ruled out by a setting in which nothing explains the gap."""
EXIT_CODES = {"agree": 0, "mismatch": 1, "inconclusive": 2}


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A named cause. `explained` is the share of mean |r| it takes away on held-back tokens (None: not measured so).

    `side` says whose fault it is: "engine", "trainer" or "log". `subject` says what shows it: the "numbers" that are
    compared, or the "draws", how tokens were drawn.
    """

    id: str
    layer: str
    title: str
    confidence: str
    explained: float | None
    fix: str
    evidence: str
    settings: tuple[str, ...] = ()
    side: str = "engine"
    subject: str = "numbers"

    def as_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"settings": list(self.settings)}


@dataclass(frozen=True, kw_only=True)
class Points:
    """The compared tokens, for figures: logprobs of both sides in nats, position in the completion, line or row."""

    engine: tuple[float, ...] = ()
    trainer: tuple[float, ...] = ()
    position: tuple[int, ...] = ()
    line: tuple[int, ...] = ()

    def rms_by_line(self) -> dict[int, float]:
        """Rms of r in nats over the tokens of each line."""
        squares: dict[int, list[float]] = {}
        for trainer, engine, line in zip(self.trainer, self.engine, self.line, strict=True):
            squares.setdefault(line, []).append((trainer - engine) ** 2)
        return {line: math.sqrt(sum(values) / len(values)) for line, values in squares.items()}


@dataclass(frozen=True, kw_only=True)
class SettingReport:
    """One sampling setting: verdict, gap now, predicted gap with the causes fixed, floor."""

    label: str
    verdict: str
    why: str
    rows: int
    tokens: int
    edge_tokens: tuple[dict[str, int], ...]
    singleton_tokens: int
    gap: dict[str, object]
    fixed: dict[str, object] | None
    noise_floor: dict[str, object]
    judgement: dict[str, object]
    causes: tuple[Cause, ...]
    unexplained: dict[str, object] | None
    ambiguous: tuple[tuple[str, ...], ...]
    ruled_out: tuple[str, ...]
    untested: dict[str, str]
    kept_mass: float | None
    not_seen: dict[str, float] = field(default_factory=dict)
    """By id of a cause that could hide here: the rms in nats above which it would have shown."""
    visible_rms: float = math.nan
    """The same for any further gap."""
    draws: dict[str, object] = field(default_factory=dict)
    sequence: dict[str, float] = field(default_factory=dict)
    """Of the longest completion: `tokens`, the `bias_nats` that its log ratio may be off by (two standard errors beyond
    the measured bias) and its `noise_nats`, rms."""
    unfinished: tuple[str, ...] = ()
    """Causes that a search cut short did not try, where nothing else explains the gap."""
    points: Points = Points()

    def as_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del record["points"]
        record["sampling"] = record.pop("label")
        record["causes"] = [c.as_dict() for c in self.causes]
        record["untested"] = [{"id": i, "why": w} for i, w in self.untested.items()]
        record["not_seen"] = [{"id": i, "above_rms": size} for i, size in self.not_seen.items()]
        return record


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The whole check. `header` holds what was compared; `notes` what a reader should know besides."""

    header: dict[str, object]
    settings: tuple[SettingReport, ...]
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    untested: dict[str, str]
    ruled_out: tuple[str, ...]
    seconds: float
    not_seen: dict[str, float] = field(default_factory=dict)
    against: dict[str, object] | None = None
    recipe: tuple[dict[str, str], ...] = field(default_factory=tuple)
    probes: tuple[dict[str, object], ...] = field(default_factory=tuple)

    @property
    def verdict(self) -> str:
        """mismatch if any setting (or the comparison asked for) is one, else inconclusive if any is, else agree."""
        verdicts = {s.verdict for s in self.settings}
        if self.against is not None:
            verdicts.add(str(self.against["verdict"]))
        if "mismatch" in verdicts or self.causes:
            return "mismatch"
        return "inconclusive" if "inconclusive" in verdicts or not verdicts else "agree"

    @property
    def exit_code(self) -> int:
        """0 agree, 1 mismatch, 2 could not be tested."""
        return EXIT_CODES[self.verdict]

    @property
    def worst(self) -> SettingReport | None:
        """The setting with the largest gap in units of its floor."""

        def excess(setting: SettingReport) -> float:
            gap, floor = setting.gap.get("rms"), setting.noise_floor.get("rms")
            return gap / floor if isinstance(gap, float) and isinstance(floor, float) and floor > 0 else 0.0

        return max(self.settings, key=excess, default=None)

    def as_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        worst = self.worst
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "causes": [c.as_dict() for c in self.causes],
            "settings": [s.as_dict() for s in self.settings],
            "gap": worst.gap if worst else {},
            "noise_floor": worst.noise_floor if worst else {},
            "unexplained": worst.unexplained if worst else None,
            "ambiguous": [
                {"ids": list(group), "separated_by": separated_by(group)}
                for group in sorted({a for s in self.settings for a in s.ambiguous})
            ],
            "ruled_out": list(self.ruled_out),
            "not_seen": [{"id": i, "above_rms": size} for i, size in self.not_seen.items()],
            "untested": [{"id": i, "why": w} for i, w in self.untested.items()],
            "header": self.header,
            "notes": list(self.notes),
            "problems": list(self.problems),
            "recipe": list(self.recipe),
            "probes": list(self.probes),
            "against": self.against,
            "seconds": round(self.seconds, 1),
        }


def _plain(value: object) -> object:
    """JSON has no NaN or infinity: those become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def write_json(report: ParityReport, path: Path) -> None:
    """Write the report. Raises TrueupError when the file cannot be written."""
    try:
        path.write_text(json.dumps(_plain(report.as_dict()), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrueupError(f"cannot write {path}: {error.strerror}") from None
