"""Run the fault matrix and write it down: every cause planted with random numbers, and clean runs between them.

    python -m tests.fault_matrix.run --model tiny --dtype float32 --draws 3 --clean 50 --out matrix.jsonl

Rows are appended as they come; a row that is in the file already is not run again. The table is made by table.py.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT, SMOLLM2
from tests.fault_matrix.plans import OUTSIDE, PAIRS, PLANS, Plan, invisible
from tests.fault_matrix.severity import LADDERS, MISSES
from tests.fault_matrix.world import Stand, dump, outcome, stand
from trueup.env import limit_spinning
from trueup.errors import TrueupError
from trueup.model.tiny import make_tiny

OUT = ROOT / "docs" / "fault-matrix.jsonl"
KNOBS: dict[str, dict[str, object]] = {"tiny": {}, "smollm2": {"prompts": 8, "tokens": 16}}
"""Half of the default size for the larger model, a quarter of its tokens: a row takes a minute on one core."""
CLEAN_SEEDS = tuple(range(5, 10))
"""Of the tiny policies that clean runs are made with; all else is planted in the one of seed 0."""
CLEAN_CHECKS = 1000
"""Added to the seed of the prompts and draws of a clean run: no limit was ever looked at with those."""
Wanted = tuple[str, str, int]


def rng_of(model: str, dtype: str, group: str, name: str, draw: int) -> random.Random:
    """The random numbers of one row, a function of what it is."""
    return random.Random(f"{model} {dtype} {group} {name} {draw}")


def clean_plan(rng: random.Random, depth: str) -> Plan:
    """Any settings; the checker's own ones now and then."""
    if rng.random() < 0.1:
        return Plan(knobs={"depth": depth})
    shapes = [
        "", f",top_p={rng.uniform(0.7, 0.99):.2f}", f",top_k={rng.randrange(3, 60)}",
        f",min_p={rng.uniform(0.01, 0.1):.2f}", f",repetition_penalty={rng.uniform(1.02, 1.4):.2f}",
        f",presence_penalty={rng.uniform(0.1, 1.0):.1f},frequency_penalty={rng.uniform(0.1, 0.6):.1f}",
        f",top_p={rng.uniform(0.7, 0.99):.2f},top_k={rng.randrange(3, 60)}",
    ]  # fmt: skip
    sampling = f"temperature={rng.uniform(0.5, 1.5):.2f}{rng.choice(shapes)}"
    return Plan(knobs={"depth": depth, "sampling": sampling})


def plan_of(made: Stand, group: str, name: str, draw: int) -> Plan:
    """The plan of one row."""
    rng = rng_of(made.world.model, made.dtype, group, name, draw)
    if group == "clean":
        return clean_plan(rng, ("full", "quick")[draw % 2])
    if group == "severity":
        ladder = LADDERS[name]
        return ladder.plan(ladder.levels[draw], made.world)
    return {"cause": PLANS, "outside": OUTSIDE, "pair": PAIRS}[group][name](rng, made.world)


def row_of(made: Stand, group: str, name: str, draw: int) -> dict[str, object]:
    """Carry out one row."""
    plan = plan_of(made, group, name, draw)
    row: dict[str, object] = {
        "model": made.world.model, "dtype": made.dtype, "group": group, "name": name, "draw": draw,
        "planted": [[n, v] for n, v in plan.faults], "stage": plan.stage,
        "knobs": KNOBS[made.world.model] | plan.knobs,
    }  # fmt: skip
    if plan.trainer is not None:
        row["trainer"] = list(plan.trainer)
    if group == "severity":
        row["level"] = LADDERS[name].levels[draw]
    else:
        row["invisible"] = invisible(made.world, name)
    started = time.monotonic()
    try:
        return row | outcome(made.carry_out(plan, seed=draw + CLEAN_CHECKS * (group == "clean")), name)
    except TrueupError as error:
        found = {"verdict": "error", "named": [], "first": False, "error": str(error)[:200]}
        return row | found | {"seconds": round(time.monotonic() - started, 1)}


def model_of(name: str, folder: Path, seed: int = 0) -> Path:
    """The checkpoint of a row."""
    return SMOLLM2 if name == "smollm2" else make_tiny(folder / f"tiny{seed}", seed=seed)


def wanted_rows(args: argparse.Namespace) -> list[Wanted]:
    """(group, name, draw) of all rows that were asked for; a severity's draw is its level."""
    wanted = [("cause", n, d) for n in PLANS for d in range(args.draws)]
    wanted += [("outside", n, d) for n in OUTSIDE for d in range(min(args.draws, 2))]
    wanted += [("pair", n, d) for n in PAIRS for d in range(args.pairs)]
    wanted += [("clean", f"seed{CLEAN_SEEDS[d % len(CLEAN_SEEDS)]}", d) for d in range(args.clean)]
    if args.severity:
        wanted += [("severity", n, level) for n, ladder in LADDERS.items() for level in range(len(ladder.levels))]
    return [w for w in wanted if not args.only or w[1] in args.only]


def carry_out(made: Stand, wanted: list[Wanted], known: dict[Wanted, bool], out: Path) -> None:
    """Run rows that are not known, append and print them; a ladder is left after MISSES misses in a row."""
    misses: dict[str, int] = {}
    for group, name, draw in wanted:
        if group == "severity" and misses.get(name, 0) >= MISSES:
            continue
        if (group, name, draw) not in known:
            row = row_of(made, group, name, draw)
            with out.open("a") as file:
                file.write(dump(row) + "\n")
            print(row["model"], row["dtype"], group, name, row.get("level", row["planted"]), row["verdict"],
                  row["named"], row.get("error", ""), f"{row['seconds']} s", flush=True)  # fmt: skip
            known[group, name, draw] = bool(row["first"])
        misses[name] = 0 if known[group, name, draw] else misses.get(name, 0) + 1


def main() -> None:
    """Parse, run what is missing, append."""
    limit_spinning()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("tiny", "smollm2"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--clean", type=int, default=0)
    parser.add_argument("--severity", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    known: dict[Wanted, bool] = {}
    if args.out.is_file():
        for row in map(json.loads, args.out.read_text().splitlines()):
            if (row["model"], row["dtype"]) == (args.model, args.dtype):
                known[row["group"], row["name"], row["draw"]] = row["first"]
    by_seed: dict[int, list[Wanted]] = {}
    for wanted in wanted_rows(args):
        seed = int(wanted[1].removeprefix("seed")) if wanted[0] == "clean" and args.model == "tiny" else 0
        by_seed.setdefault(seed, []).append(wanted)
    with tempfile.TemporaryDirectory(prefix="fault-matrix-") as place:
        for seed, wanted_here in by_seed.items():
            if all(w in known for w in wanted_here):
                continue
            folder = Path(place) / f"seed{seed}"
            folder.mkdir()
            model = model_of(args.model, folder, seed)
            with stand(args.model, model, args.dtype, folder, **KNOBS[args.model]) as made:
                carry_out(made, wanted_here, known, args.out)


if __name__ == "__main__":
    main()
