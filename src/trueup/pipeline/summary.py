"""What a run came to, from the files in its folder: the same whether it ran at a stretch or was resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trueup.monitor.metric_log import read_lines


def summarise(run: Path) -> dict[str, Any]:
    """Numbers of a whole run; NaN-free: what was not measured is None."""
    metrics = read_lines(run / "metrics.jsonl")
    evaluations = read_lines(run / "evaluations.jsonl")
    audits = [a for a in read_lines(run / "audits.jsonl") if "failed" not in a]
    alarms = read_lines(run / "alarms.jsonl")
    tokens = _column(metrics, "tokens/trained/count")
    over = [float(a["components"]["backend"].get("rms", 0.0)) / float(a["floor"]["rms"]) for a in audits]
    ess, lags = _column(metrics, "gap/ess/token"), _column(metrics, "lag/oldest_token/max")
    seconds = _seconds(metrics)
    pauses = _column(metrics, "time/pause_s")
    return {
        "steps": len(metrics),
        "heldout_reward_start": evaluations[0]["reward"] if evaluations else None,
        "heldout_reward_end": evaluations[-1]["reward"] if evaluations else None,
        "seconds": seconds,
        "tokens": sum(tokens),
        "tokens_generated": sum(_column(metrics, "tokens/generated/count")),
        "ess": math.fsum(ess) / len(ess) if ess else None,
        "ess_min": min(ess, default=None),
        "lag_max": max(lags, default=None),
        "groups_dropped": max(_column(metrics, "buffer/dropped/count"), default=0.0),
        "batches_skipped": sum("skipped" in record for record in metrics),
        "pause_share": sum(pauses) / seconds if seconds else None,
        "audits": len(audits),
        "audit_backend_over_floor_max": max(over, default=None),
        "alarms": [f"{a['id'] or 'unnamed'} at batch {a['batch']}" for a in alarms],
    }


def _column(records: list[dict[str, Any]], name: str) -> list[float]:
    return [float(r[name]) for r in records if name in r]


def _seconds(records: list[dict[str, Any]]) -> float:
    """Time in all parts of a run: the clock of each part begins at 0."""
    total, last = 0.0, 0.0
    for value in _column(records, "time/since_start_s"):
        if value < last:
            total += last
        last = value
    return total + last
