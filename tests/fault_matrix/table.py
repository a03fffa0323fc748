"""The fault matrix as a page: docs/fault-matrix.md from docs/fault-matrix.jsonl.

python -m tests.fault_matrix.table
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

from tests.conftest import ROOT
from tests.fault_matrix.plans import INVISIBLE, PLANS
from tests.fault_matrix.severity import LADDERS

SOURCE = ROOT / "docs" / "fault-matrix.jsonl"
PAGE = ROOT / "docs" / "fault-matrix.md"
HIDDEN_FLOORS = 1.25
"""A prediction that an effect lies under the floor holds for a run that agrees at so many floors, or the run counts."""


def read(path: Path = SOURCE) -> list[dict]:
    """Every row that was run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def found(row: dict) -> bool:
    """Whether the planted cause was named first (for a pair: whether both were named)."""
    if row["group"] == "pair":
        return set(row["name"].split("+")) <= set(row["named"])
    return bool(row["first"])


def floors(row: dict) -> float:
    """The rms of the worst setting in predicted floors; 0 where nothing could be compared."""
    return row["rms"] / row["floor"] if row["rms"] and row["floor"] else 0.0


def hidden(row: dict) -> bool:
    """Whether the effect was predicted to be invisible, and was."""
    return bool(row["invisible"]) and row["verdict"] == "agree" and floors(row) <= HIDDEN_FLOORS


def visible(rows: list[dict]) -> list[dict]:
    """Planted causes whose effect was not predicted to be invisible, or not rightly."""
    return [r for r in rows if r["group"] == "cause" and not hidden(r)]


def planted(rows: list[dict]) -> list[dict]:
    """Runs in which something was wrong."""
    return [r for r in rows if r["group"] != "clean"]


def silent(rows: list[dict]) -> list[str]:
    """What was planted and not seen although it was above its floor, and what was ruled out although it was planted."""
    above = [r for r in planted(rows) if r["verdict"] == "agree" and floors(r) > 1]
    denied = [r for r in planted(rows) if r.get("denied")]

    def lines(found: list[dict]) -> list[str]:
        return [
            f"- {r['name']} ({r['model']} {r['dtype']}, {r.get('level', r['planted'] or r['stage'])}): "
            f"{r['verdict']} at {floors(r):.2f} floors" for r in sorted(found, key=floors, reverse=True)
        ] or ["- none"]  # fmt: skip

    return [
        "", "## What was not seen", "",
        "Every run with something planted that agreed although its rms was above the predicted floor (the limit is",
        "1.25 floors and what chance adds at so few tokens):", "", *lines(above), "",
        "Every run in which the planted cause was ruled out:", "", *lines(denied),
    ]  # fmt: skip


def _columns(rows: list[dict]) -> list[tuple[str, str]]:
    return sorted({(r["model"], r["dtype"]) for r in rows}, key=lambda c: (c[0] != "tiny", c[1] != "float32"))


def _share(rows: list[dict]) -> str:
    return f"{sum(map(found, rows))} of {len(rows)}" if rows else "-"


def smallest(rows: list[dict]) -> dict | None:
    """The weakest level of a ladder at which, as at all stronger ones, the cause was named first."""
    last = None
    for row in sorted(rows, key=lambda r: r["draw"]):
        if not found(row):
            break
        last = row
    return last


def _level(row: dict | None) -> str:
    if row is None:
        return "none"
    size = f" (rms {row['rms']:.2g}, {row['rms'] / row['floor']:.1f} floors)" if row["rms"] and row["floor"] else ""
    return f"{row['level']:g}{size}"


def severity(rows: list[dict], columns: list[tuple[str, str]]) -> list[str]:
    """The smallest effect of each id that was named, and what became of the next weaker one."""
    swept = [r for r in rows if r["group"] == "severity"]
    columns = [c for c in columns if any((r["model"], r["dtype"]) == c for r in swept)]
    lines = [
        "", "## How small an effect is named", "",
        "Planted weaker and weaker; the weakest level at which, as at all stronger ones, the cause was named first,",
        "with the rms of r in the worst setting, in nats and in predicted floors; then what was said of the next",
        "weaker level. Ids that are not here are there or not there.", "",
        "| id | level | " + " | ".join(f"{m} {d} | next" for m, d in columns) + " |",
        "|---|---|" + "---|---|" * len(columns),
    ]  # fmt: skip
    for name, ladder in LADDERS.items():
        cells = []
        for column in columns:
            here = [r for r in swept if r["name"] == name and (r["model"], r["dtype"]) == column]
            best = smallest(here)
            after = next((r for r in here if r["draw"] == (best["draw"] + 1 if best else 0)), None)
            said = "-" if after is None else f"{after['level']:g}: {'+'.join(after['named']) or after['verdict']}"
            cells += [_level(best), said]
        lines.append(f"| {name} | {ladder.unit} | " + " | ".join(cells) + " |")
    return lines


def page(rows: list[dict]) -> str:
    """The whole page."""
    columns = _columns(rows)
    lines = [
        "# Fault matrix",
        "",
        "Every cause planted in the embedded engine with numbers drawn at random, checked over HTTP by `trueup check",
        "--engine`; a cell says how often the planted cause was named first. `make fault-matrix` runs it,",
        "`docs/fault-matrix.jsonl` holds every run with what was planted, `tests/fault_matrix` the plans; a test runs",
        "random rows again. In brackets: predicted before the run to lie under the noise floor, or not to exist.",
        "",
        "| id | " + " | ".join(f"{m} {d}" for m, d in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    cells: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for row in rows:
        if row["group"] == "cause":
            cells[row["name"], row["model"], row["dtype"]].append(row)
    for name in PLANS:
        texts = []
        for column in columns:
            here = cells[name, *column]
            text = _share(here)
            texts.append(f"({text})" if here and all(map(hidden, here)) else text)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    counted = visible(rows)
    lines += ["", f"Visible effects: the cause was named first in {_share(counted)} runs."]
    wrong = [r for r in counted if not found(r)]
    if wrong:
        lines += ["", "Not named first:", ""]
        lines += [
            f"- {r['name']} ({r['model']} {r['dtype']}, {r['planted'] or r['stage']}): "
            f"{r['verdict']}, {'+'.join(r['named']) or 'unexplained'}" for r in wrong
        ]  # fmt: skip
    lines += ["", "Predicted invisible, and why:", ""]
    lines += [f"- {i} ({m} {d}): {why}" for (m, d, i), why in INVISIBLE.items()]
    outside = [r for r in rows if r["group"] == "outside"]
    named = Counter(r["name"] for r in outside if r["named"])
    lines += ["", "## Outside the catalogue", "", "Faults without a name must stay without one:", ""]
    for name in dict.fromkeys(r["name"] for r in outside):
        here = [r for r in outside if r["name"] == name]
        seen = sum(r["verdict"] == "mismatch" for r in here)
        lines.append(f"- {name}: {seen} of {len(here)} called a mismatch, {named[name]} given a name")
    lines += severity(rows, columns) + silent(rows)
    pairs = [r for r in rows if r["group"] == "pair"]
    lines += ["", "## Two at once", ""]
    for name in dict.fromkeys(r["name"] for r in pairs):
        here = [r for r in pairs if r["name"] == name]
        apart = sum(bool(r["invisible"]) for r in here)
        words = f" ({apart} more with a part that was predicted invisible)" if apart else ""
        lines.append(f"- {name}: both named in {_share([r for r in here if not r['invisible']])}{words}")
    lines += ["", "## Clean runs", ""]
    for column in columns:
        here = [r for r in rows if r["group"] == "clean" and (r["model"], r["dtype"]) == column]
        alarms = [r for r in here if r["verdict"] != "agree"]
        lines.append(f"- {' '.join(column)}: {len(alarms)} false alarms in {len(here)} runs")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(read()), encoding="utf-8")
    print(PAGE)
