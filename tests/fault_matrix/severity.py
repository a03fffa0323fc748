"""How small an effect is still named: each cause that comes in degrees, planted weaker and weaker.

A ladder runs from strong to weak and is left after MISSES levels in a row at which the cause was not named first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fault_matrix.plans import Plan, World

MISSES = 2
SCALES = (0.08, 0.04, 0.02, 0.01, 0.005, 0.002, 0.001)
SHARES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
EXCESSES = (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


@dataclass(frozen=True)
class Ladder:
    """Levels from strong to weak, what their number is, and the plan at a level."""

    unit: str
    levels: tuple[float, ...]
    plan: Callable[[float, World], Plan]


def _fault(name: str, number: str, **knobs: object) -> Callable[[float, World], Plan]:
    return lambda level, w: Plan(faults=((name, {number: level}),), knobs=knobs)


def _synced(name: str, stage: str, **values: float | str) -> Ladder:
    """A fault of updates between weights that differ by a share of their spread."""
    faults = ((name, dict(values)),) if name else ()
    unit = "noise on the new weights, share of their spread"
    return Ladder(unit, SCALES, lambda level, w: Plan(faults=faults, stage=stage, scale=level))


def _mistake(name: str, levels: tuple[float, ...], unit: str) -> Ladder:
    return Ladder(unit, levels, lambda level, w: Plan(stage="asked", trainer=(name, {"strength": level, "batch": 4.0})))


LADDERS: dict[str, Ladder] = {
    "S1": Ladder(
        "T - 1", EXCESSES,
        lambda level, w: Plan(faults=(("raw_logprobs", {}),), knobs={"sampling": f"temperature={1 + level}"}),
    ),
    "S2": Ladder(
        "T - 1", EXCESSES, lambda level, w: Plan(knobs={"sampling": f"temperature={1 + level}", "trainer": "raw"})
    ),
    "S3": Ladder(
        "T - 1, declared 1", EXCESSES,
        lambda level, w: Plan(
            faults=(("other_temperature", {"temperature": 1 + level}),), knobs={"sampling": "temperature=1.0"}
        ),
    ),
    "S4": Ladder(
        "1 - top-p, T=0.8", SHARES,
        lambda level, w: Plan(
            faults=(("full_vocabulary", {}),), knobs={"sampling": f"temperature=0.8,top_p={1 - level}"}
        ),
    ),
    "S5": Ladder(
        "1 - top-p, never sent", SHARES,
        lambda level, w: Plan(
            faults=(("hidden_defaults", {"top_p": 1 - level}),), knobs={"sampling": "temperature=1.0"}
        ),
    ),
    "S6": Ladder(
        "nats on one id", (3.0, 1.0, 0.5, 0.2, 0.1, 0.05),
        lambda level, w: Plan(
            faults=(("logit_bias", {"ids": str(w.common[0]), "nats": level}),), knobs={"sampling": "temperature=1.0"}
        ),
    ),
    "S7": Ladder(
        "ids forbidden of 128", (112.0, 104.0, 96.0, 88.0, 72.0),
        lambda level, w: Plan(
            faults=(("grammar", {"ids": " ".join(str(i) for i in range(int(level), 128)), "every": 6.0}),),
            knobs={"sampling": "temperature=1.0"},
        ),
    ),
    "S9": Ladder(
        "share of numbers lost", SHARES,
        lambda level, w: Plan(faults=(("placeholder", {"value": 0.0, "share": level}),)),
    ),
    "S10": Ladder(
        "decimals", (1.0, 2.0, 3.0, 4.0, 5.0),
        lambda level, w: Plan(faults=(("transport_grid", {"grid": str(int(level))}),)),
    ),
    "T9": Ladder("tokens kept of each prompt", (10.0, 20.0, 40.0, 80.0, 120.0), _fault("cut_prompts", "last")),
    "T10": Ladder("rows", (200.0, 100.0, 50.0, 20.0, 10.0, 5.0, 2.0), _fault("padded_vocabulary", "rows")),
    "W1": _synced("ignored_sync", "one update"),
    "W2": _synced("late_sync", "four updates", lag=1.0),
    "W3": _synced("partial_sync", "one update", pattern="v_proj"),
    "W4": Ladder(
        "factor - 1 a load, one kind of tensor", EXCESSES,
        lambda level, w: Plan(
            faults=(("repeated_repack", {"pattern": "q_proj", "factor": 1 + level}),), knobs={"allow_updates": True}
        ),
    ),
    "W9": _synced("", "one replica"),
    "W10": _synced("", "in flight"),
    "W11": _synced("torn_update", "in flight", steps=2.0),
    "W15": _synced("stale_head", "one update"),
    "W16": _synced("", "another model"),
    "I3": Ladder("share of another row's state", SHARES, _fault("crosstalk", "share")),
    "I4": Ladder(
        "factor - 1 on decoding's scores", (1.0, 0.5, 0.2, 0.1, 0.05, 0.02),
        lambda level, w: Plan(faults=(("decode_drift", {"factor": 1 + level}),)),
    ),
    "I8": Ladder(
        "rotary base, factor - 1", (9.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05),
        lambda level, w: Plan(faults=(("rope_theta", {"theta": w.theta * (1 + level)}),)),
    ),
    "I9": Ladder("tokens seen", (8.0, 16.0, 32.0, 64.0, 128.0), _fault("window", "width")),
    "I11": Ladder("share of numbers", (0.02, 0.01, 0.005, 0.002, 0.001), _fault("not_finite", "share")),
    "I14": Ladder(
        "factor - 1 on logits", EXCESSES, lambda level, w: Plan(faults=(("logit_scale", {"factor": 1 + level}),))
    ),
    "I15": Ladder("noise, share of the state", SHARES, _fault("noise", "share")),
    "R1": _mistake("dropout", SHARES, "noise, share of each logit"),
    "R5": _mistake("shape", (0.05, 0.02, 0.01, 0.005, 0.002, 0.001), "factor - 1 on logits, a row of the batch"),
    "O7": _synced("", "stale rows"),
}  # fmt: skip
"""Ids that are not here are there or not there: S8 T1 T2 T3 T4 T5 T7 T8 W5 W12 I1 I2 I5 I6 I12 R2 R3 R4."""
