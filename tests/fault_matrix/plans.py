"""What is planted for each cause: a fault of the engine with numbers drawn at random, and how the engine is checked.

`INVISIBLE` is the prediction made before any run: effects that lie under the noise floor, or do not exist, for a model
and a dtype. `EXPLAINED` holds what was understood only after one. Both are run and listed apart, never dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class World:
    """What a plan may draw from: the model's name, dtype, and ids that mean something in its vocabulary."""

    model: str
    dtype: str
    vocab: int
    eos: int
    bos: int
    common: tuple[int, ...]
    template: tuple[str, str]
    kinds: tuple[str, ...]
    heads: int
    layers: int
    theta: float


@dataclass(frozen=True)
class Plan:
    """Faults to plant and knobs of the check. `stage` names what happens to the weights before it, or that the trainer
    is on trial (world.py); then `trainer` is its mistake with numbers. `scale`: by how much new weights differ."""

    faults: tuple[tuple[str, dict[str, float | str]], ...] = ()
    knobs: dict[str, object] = field(default_factory=dict)
    stage: str = "none"
    trainer: tuple[str, dict[str, float]] | None = None
    scale: float = 0.08


def _temperature(rng: random.Random) -> float:
    return round(rng.choice([rng.uniform(0.6, 0.85), rng.uniform(1.15, 1.4)]), 2)


def _shaped(rng: random.Random) -> str:
    cut = rng.choice([f"top_p={rng.uniform(0.8, 0.95):.2f}", f"top_k={rng.randrange(5, 40)}"])
    return f"temperature={_temperature(rng)},{cut}"


def s1(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("raw_logprobs", {}),), knobs={"sampling": _shaped(rng)})


def s2(rng: random.Random, w: World) -> Plan:
    return Plan(knobs={"sampling": f"temperature={_temperature(rng)}", "trainer": "raw"})


def s3(rng: random.Random, w: World) -> Plan:
    used = _temperature(rng)
    return Plan(faults=(("other_temperature", {"temperature": used}),), knobs={"sampling": "temperature=1.0"})


def s4(rng: random.Random, w: World) -> Plan:
    if rng.random() < 0.5:
        return Plan(faults=(("full_vocabulary", {}),), knobs={"sampling": _shaped(rng)})
    return Plan(knobs={"sampling": _shaped(rng), "trainer": "trl"})


def s5(rng: random.Random, w: World) -> Plan:
    offered = {
        "top_k": float(rng.randrange(5, 40)),
        "top_p": round(rng.uniform(0.8, 0.95), 2),
        "repetition_penalty": round(rng.uniform(1.08, 1.3), 2),
    }
    names = rng.sample(sorted(offered), rng.choice([1, 1, 2]))
    temperature = _temperature(rng)
    return Plan(
        faults=(("hidden_defaults", {n: offered[n] for n in names}),), knobs={"sampling": f"temperature={temperature}"}
    )


def s6(rng: random.Random, w: World) -> Plan:
    if rng.random() < 0.4:
        penalties = f"repetition_penalty={rng.uniform(1.15, 1.4):.2f},presence_penalty={rng.uniform(0.4, 1):.2f}"
        knobs = {"sampling": f"temperature={_temperature(rng)},{penalties}"}
        return Plan(faults=(("ignored_penalties", {}),), knobs=knobs)
    ids = " ".join(str(i) for i in rng.sample(w.common, rng.choice([1, 2, 3])))
    nats = rng.choice([round(rng.uniform(1.5, 4), 2), -1e4])
    return Plan(faults=(("logit_bias", {"ids": ids, "nats": nats}),), knobs={"sampling": "temperature=1.0"})


def s7(rng: random.Random, w: World) -> Plan:
    ids = rng.sample(range(10, min(w.vocab, 100)), rng.randrange(15, 30))
    values: dict[str, float | str] = {"ids": " ".join(map(str, ids)), "every": float(rng.randrange(4, 8))}
    return Plan(faults=(("grammar", values),), knobs={"sampling": "temperature=1.0"})


def s8(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("top_entry", {}),), knobs={"sampling": _shaped(rng)})


def s9(rng: random.Random, w: World) -> Plan:
    values = {"value": rng.choice([0.0, 1.0, -9999.0]), "share": round(rng.uniform(0.05, 0.3), 2)}
    return Plan(faults=(("placeholder", {**values, "seed": float(rng.randrange(99))}),))


def s10(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("transport_grid", {"grid": rng.choice(["1", "2", "3", "bf16", "fp16"])}),))


def t1(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("shifted", {"by": float(rng.choice([-3, -2, -1, 1, 2, 3]))}),))


def t2(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("extra_entry", {}),))


def t3(rng: random.Random, w: World) -> Plan:
    """Enough prompts that both halves of them hold some which are respelled."""
    return Plan(faults=(("retokenized", {}),), knobs={"prompts": 16})


def t4(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("double_bos", {"bos": float(w.bos)}),))


def t5(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("other_template", {"before": w.template[0], "after": w.template[1]}),))


def t7(rng: random.Random, w: World) -> Plan:
    value = rng.choice([0.0, round(rng.uniform(-0.5, 0), 3)])
    return Plan(faults=(("synthetic_end", {"token": float(w.eos), "value": value}),))


def t9(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("cut_prompts", {"last": float(rng.randrange(5, 40))}),))


def t10(rng: random.Random, w: World) -> Plan:
    """Logits of zero count where the others are low, in a language model at few tokens: more prompts hold some."""
    more: dict[str, object] = {"prompts": 16} if w.model == "smollm2" else {}
    return Plan(faults=(("padded_vocabulary", {"rows": float(rng.randrange(20, 200))}),), knobs=more)


def w1(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("ignored_sync", {}),), stage="one update")


def w2(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("late_sync", {"lag": float(rng.choice([1, 2]))}),), stage="four updates")


def w3(rng: random.Random, w: World) -> Plan:
    kinds = rng.sample(w.kinds, rng.choice([1, 2]))
    pattern = "|".join(rf"\b{k}\b" for k in kinds)
    return Plan(faults=(("partial_sync", {"pattern": pattern}),), stage="one update")


def w4(rng: random.Random, w: World) -> Plan:
    values = {"pattern": rng.choice(w.kinds), "factor": round(rng.choice([0.7, 0.8, 1.25, 1.4]), 3)}
    return Plan(faults=(("repeated_repack", values),), knobs={"allow_updates": True})


def w5(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("dummy_table", {"value": rng.choice([0.0, 1.0])}),))


def w9(rng: random.Random, w: World) -> Plan:
    return Plan(stage="one replica")


def w10(rng: random.Random, w: World) -> Plan:
    return Plan(stage="in flight")


def w11(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("torn_update", {"steps": float(rng.choice([1, 2]))}),), stage="in flight")


def w12(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("stale_prefixes", {}),), knobs={"allow_updates": True})


def w15(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("stale_head", {}),), stage="one update")


def w16(rng: random.Random, w: World) -> Plan:
    return Plan(stage="another model")


def i1(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("bf16_rounding", {}),))


def i2(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("bf16_head", {}),))


def i3(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("crosstalk", {"share": round(rng.uniform(0.05, 0.2), 3)}),))


def i4(rng: random.Random, w: World) -> Plan:
    factor = rng.choice([rng.uniform(1.4, 2.0), rng.uniform(0.4, 0.7)])
    return Plan(faults=(("decode_drift", {"factor": round(factor, 2)}),))


def i5(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("rounded_prefixes", {"kind": rng.choice(["e4m3", "e5m2"])}),))


def i6(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("kv_float8", {"kind": rng.choice(["e4m3", "e5m2"])}),))


def i8(rng: random.Random, w: World) -> Plan:
    if rng.random() < 0.5:
        return Plan(faults=(("rope_theta", {"theta": round(w.theta * 10 ** rng.choice([-1, 1, 1.5]), 0)}),))
    return Plan(faults=(("rope_linear", {"factor": round(rng.uniform(1.5, 8), 1)}),))


def i9(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("window", {"width": float(rng.randrange(6, 40))}),))


def i11(rng: random.Random, w: World) -> Plan:
    return Plan(faults=(("not_finite", {"share": 0.008, "seed": float(rng.randrange(99))}),))


def i12(rng: random.Random, w: World) -> Plan:
    fault: tuple[str, dict[str, float | str]] = rng.choice(
        [("skips_first", {}), ("skips_self", {}), ("attention_scale", {"factor": 1.0})]
    )
    return Plan(faults=(fault,))


def i14(rng: random.Random, w: World) -> Plan:
    fault: tuple[str, dict[str, float | str]] = rng.choice(
        [
            ("softcap", {"cap": round(rng.uniform(4, 15), 1)}),
            ("logit_scale", {"factor": round(rng.choice([rng.uniform(0.6, 0.85), rng.uniform(1.2, 1.6)]), 2)}),
            ("embedding_scale", {"factor": round(rng.choice([rng.uniform(0.4, 0.7), rng.uniform(1.5, 3)]), 2)}),
        ]
    )
    return Plan(faults=(fault,))


def i15(rng: random.Random, w: World) -> Plan:
    values = {"share": round(rng.uniform(0.05, 0.2), 3), "seed": float(rng.randrange(99))}
    return Plan(faults=(("noise", values),))


def _mistaken(rng: random.Random, mistake: str, stage: str, **numbers: float) -> Plan:
    """A trainer that goes wrong, asked as a function ("asked") or known by what it logged ("logged")."""
    return Plan(stage=stage, trainer=(mistake, {"batch": float(rng.choice([2, 4, 6])), **numbers}))


def t8(rng: random.Random, w: World) -> Plan:
    return _mistaken(rng, "end", "logged", end=float(w.eos))


def r1(rng: random.Random, w: World) -> Plan:
    return _mistaken(rng, "dropout", "asked", strength=round(rng.uniform(0.03, 0.1), 3))


def r2(rng: random.Random, w: World) -> Plan:
    return _mistaken(rng, "positions", "absolute positions" if w.model == "tiny" else "logged")


def r3(rng: random.Random, w: World) -> Plan:
    return _mistaken(rng, "pack", rng.choice(["asked", "logged"]))


def r4(rng: random.Random, w: World) -> Plan:
    return _mistaken(rng, "attended", rng.choice(["asked", "logged"]))


def r5(rng: random.Random, w: World) -> Plan:
    return _mistaken(rng, "shape", "asked", strength=round(rng.uniform(0.03, 0.06), 3))


def o7(rng: random.Random, w: World) -> Plan:
    return Plan(stage="stale rows")


def s13(rng: random.Random, w: World) -> Plan:
    """The first tokens of completions are drawn greedily, and their logprobs are those that were declared.

    A language model's first tokens are half greedy anyway: it takes more completions to show.
    """
    values = {"factor": 1000.0, "first": float(rng.choice([1, 2]))}
    more: dict[str, object] = {"prompts": 32} if w.model == "smollm2" else {}
    return Plan(faults=(("colder_draws", values),), knobs={"sampling": "temperature=1.0"} | more)


def s14(rng: random.Random, w: World) -> Plan:
    if rng.random() < 0.25:
        fault: tuple[str, dict[str, float | str]] = ("clamped_report", {"at": round(rng.uniform(-6, -4), 2)})
    else:
        fault = ("mixed_report", {"kind": rng.choice(["mean", "min", "previous"])})
    return Plan(faults=(fault,), knobs={"sampling": "temperature=1.0"})


PLANS: dict[str, Callable[[random.Random, World], Plan]] = {
    f.__name__.upper(): f
    for f in (
        s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s13, s14, t1, t2, t3, t4, t5, t7, t9, t10, w1, w2, w3, w4, w5, w9, w10,
        w11, w12, w15, w16, i1, i2, i3, i4, i5, i6, i8, i9, i11, i12, i14, i15, t8, r1, r2, r3, r4, r5, o7,
    )
}  # fmt: skip

OUTSIDE: dict[str, Callable[[random.Random, World], Plan]] = {
    "skipped_layer": lambda r, w: Plan(faults=(("skipped_layer", {"index": float(r.randrange(w.layers))}),)),
    "other_activation": lambda r, w: Plan(faults=(("other_activation", {}),)),
    "silent_head": lambda r, w: Plan(faults=(("silent_head", {"index": float(r.randrange(w.heads))}),)),
    "blended_report": lambda r, w: Plan(faults=(("blended_report", {"share": round(r.uniform(0.2, 0.5), 2)}),)),
    "drifting_temperature": lambda r, w: Plan(
        faults=(("drifting_temperature", {"slope": round(r.uniform(0.02, 0.05), 3)}),)
    ),
    "no_repeats": lambda r, w: Plan(faults=(("no_repeats", {"length": 2.0}),)),
    "off_rows": lambda r, w: Plan(faults=(("off_rows", {"every": 4.0, "nats": round(r.uniform(1.0, 2.0), 2)}),)),
    "off_tokens": lambda r, w: Plan(faults=(("off_tokens", {"every": 60.0, "nats": round(r.uniform(3, 6), 2)}),)),
    "stale_unproven": lambda r, w: Plan(stage="stale rows, older weights gone"),
    "mirrored_state": lambda r, w: Plan(faults=(("mirrored_state", {"first": float(r.randrange(16, 60))}),)),
}
"""Faults that the catalogue has no name for: "unexplained" is the right answer."""

PAIRS: dict[str, Callable[[random.Random, World], Plan]] = {
    "S1+S10": lambda r, w: _both(s1(r, w), ("transport_grid", {"grid": "2"})),
    "S4+T1": lambda r, w: _both(
        Plan(faults=(("full_vocabulary", {}),), knobs={"sampling": _shaped(r)}), ("shifted", {"by": 1.0})
    ),
    "S1+T1": lambda r, w: _both(s1(r, w), ("shifted", {"by": -1.0})),
    "S1+I8": lambda r, w: _both(s1(r, w), ("rope_linear", {"factor": round(r.uniform(2, 6), 1)})),
    "S3+I6": lambda r, w: _both(s3(r, w), ("kv_float8", {"kind": "e4m3"})),
    "S1+I14": lambda r, w: _both(s1(r, w), ("softcap", {"cap": round(r.uniform(4, 12), 1)})),
    "S4+I12": lambda r, w: _both(
        Plan(faults=(("full_vocabulary", {}),), knobs={"sampling": _shaped(r)}), ("skips_first", {})
    ),
}


def _both(plan: Plan, fault: tuple[str, dict[str, float | str]]) -> Plan:
    return replace(plan, faults=(*plan.faults, fault))


BF16 = "under the bf16 floor"
INVISIBLE: dict[tuple[str, str, str], str] = {
    ("tiny", "*", "T3"): "one token a character: decoding and encoding again changes nothing",
    ("smollm2", "*", "R2"): "rotary positions are relative: padding moves all of a row alike",
    ("*", "bfloat16", "S10"): f"{BF16}: a tenth of a nat rounds by 0.03",
    ("*", "bfloat16", "I1"): f"{BF16}: the residual stream is bf16 already",
    ("*", "bfloat16", "I2"): f"{BF16}: a bf16 head rounds as much as the body does",
}
"""(model, dtype, id) to why nothing can be seen, as it was predicted before any run; "*" is any."""
EXPLAINED: dict[tuple[str, str, str], str] = {
    ("smollm2", "bfloat16", "I5"): f"{BF16}: cached prompts in 8 bits move numbers by 0.028 nats rms in float32",
}
"""The same, but found only after a run. These explain a result and did not predict it, so they are kept apart."""


def invisible(w: World, cause: str) -> str | None:
    """Why one row cannot be seen, or None; of a pair, why that part cannot."""
    for (model, dtype, cause_id), why in (INVISIBLE | EXPLAINED).items():
        if cause_id in cause.split("+") and model in ("*", w.model) and dtype in ("*", w.dtype):
            return why
    return None
