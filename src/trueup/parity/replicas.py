"""Are all replicas of an engine alike? W9: some are within the floor while others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trueup.knobs import LimitsConfig
from trueup.parity.compare import Residual
from trueup.parity.floor import Floor, Judgement, judge
from trueup.parity.report import Cause
from trueup.trace import TraceRow


@dataclass(frozen=True, kw_only=True)
class Divided:
    """Replicas within the floor and beyond it."""

    good: tuple[str, ...]
    bad: tuple[str, ...]
    rms: dict[str, float]
    reasons: tuple[str, ...]

    def cause(self) -> Cause:
        """W9, with the numbers."""
        numbers = ", ".join(f"{name} rms {self.rms[name]:.3g}" for name in (*self.bad, *self.good))
        return Cause(
            id="W9", layer="weights", title="a replica serves something else than the others do", confidence="high",
            explained=None, fix="wait for every replica's confirmed version before rollouts go on; restart the odd one",
            evidence=f"{', '.join(self.bad)} off, {', '.join(self.good)} within the floor ({numbers} nats)",
        )  # fmt: skip


def divide(rows: Sequence[TraceRow], now: Residual, floor: Floor, limits: LimitsConfig) -> Divided | None:
    """Judge each replica apart; None unless some are good and some are not.

    Replicas with too few tokens to judge are left out. A replica is bad only if it is farther off than the worst good
    one.
    """
    names = [r.replica or "" for r in rows]
    if len(set(names)) < 2:
        return None
    lines = [r.line for r in rows]
    rate = limits.false_alarm_rate / len(set(names))
    share = limits.model_copy(update={"min_tokens": max(1, limits.min_tokens // 4), "false_alarm_rate": rate})

    def judged(name: str, against: Floor) -> Judgement:
        own = torch.tensor([i for i, n in enumerate(names) if n == name])
        inside_T = torch.isin(now.row_T, own) & now.usable_T
        return judge(now.residual_T.masked_fill(~inside_T, torch.nan), now.row_T, against, share, lines=lines)

    verdicts = {name: verdict for name in dict.fromkeys(names) if (verdict := judged(name, floor)).enough}
    good = tuple(name for name, verdict in verdicts.items() if verdict.within)
    if not good:
        return None
    widest = replace(floor, rms=max(floor.rms, *(verdicts[name].rms for name in good)), rows={})
    bad = tuple(name for name in verdicts if name not in good and not judged(name, widest).within)
    rms = {name: verdict.rms for name, verdict in verdicts.items()}
    reasons = tuple(f"replica {name}: {verdicts[name].reasons[0]}" for name in bad)
    return Divided(good=good, bad=bad, rms=rms, reasons=reasons) if bad else None
