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
from tests.fault_matrix.world import Stand, dump, outcome, stand
from trueup.errors import TrueupError
from trueup.model.tiny import make_tiny

OUT = ROOT / "docs" / "fault-matrix.jsonl"
KNOBS: dict[str, dict[str, object]] = {"tiny": {}, "smollm2": {"prompts": 12, "tokens": 24}}
CLEAN = (
    "", "temperature=1.0", "temperature=0.6", "temperature=1.3", "temperature=0.8,top_p=0.9",
    "temperature=1.2,top_k=20", "temperature=0.9,min_p=0.05", "temperature=0.8,repetition_penalty=1.2",
    "temperature=1.0,presence_penalty=0.7",
)  # fmt: skip
MODEL_SEEDS = 5


def rng_of(model: str, dtype: str, group: str, name: str, draw: int) -> random.Random:
    """The random numbers of one row, a function of what it is."""
    return random.Random(f"{model} {dtype} {group} {name} {draw}")


def plan_of(made: Stand, group: str, name: str, draw: int) -> Plan:
    """The plan of one row."""
    rng = rng_of(made.world.model, made.dtype, group, name, draw)
    if group == "clean":
        sampling = rng.choice(CLEAN)
        return Plan(knobs={"sampling": sampling} if sampling else {})
    return {"cause": PLANS, "outside": OUTSIDE, "pair": PAIRS}[group][name](rng, made.world)


def row_of(made: Stand, group: str, name: str, draw: int) -> dict[str, object]:
    """Carry out one row."""
    plan = plan_of(made, group, name, draw)
    row: dict[str, object] = {
        "model": made.world.model, "dtype": made.dtype, "group": group, "name": name, "draw": draw,
        "planted": [[n, v] for n, v in plan.faults], "stage": plan.stage,
        "knobs": {k: v for k, v in plan.knobs.items()}, "invisible": invisible(made.world, name),
    }  # fmt: skip
    started = time.monotonic()
    try:
        return row | outcome(made.carry_out(plan, seed=draw), name)
    except TrueupError as error:
        found = {"verdict": "error", "named": [], "first": False, "error": str(error)[:200]}
        return row | found | {"seconds": round(time.monotonic() - started, 1)}


def model_of(name: str, folder: Path, seed: int = 0) -> Path:
    """The checkpoint of a row."""
    return SMOLLM2 if name == "smollm2" else make_tiny(folder / f"tiny{seed}", seed=seed)


def main() -> None:
    """Parse, run what is missing, append."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("tiny", "smollm2"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--clean", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    done = set()
    if args.out.is_file():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(r["model"], r["dtype"], r["group"], r["name"], r["draw"]) for r in rows}
    wanted = [("cause", n, d) for n in PLANS for d in range(args.draws)]
    wanted += [("outside", n, d) for n in OUTSIDE for d in range(min(args.draws, 2))]
    wanted += [("pair", n, d) for n in PAIRS for d in range(args.pairs)]
    wanted += [("clean", f"seed{d % MODEL_SEEDS}", d) for d in range(args.clean)]
    todo = [w for w in wanted if (args.model, args.dtype, *w) not in done and (not args.only or w[1] in args.only)]
    by_seed: dict[int, list[tuple[str, str, int]]] = {}
    for group, name, draw in todo:
        seed = draw % MODEL_SEEDS if group == "clean" and args.model == "tiny" else 0
        by_seed.setdefault(seed, []).append((group, name, draw))
    with tempfile.TemporaryDirectory(prefix="fault-matrix-") as place:
        for seed, rows_wanted in by_seed.items():
            folder = Path(place) / f"seed{seed}"
            folder.mkdir()
            model = model_of(args.model, folder, seed)
            with stand(args.model, model, args.dtype, folder, **KNOBS[args.model]) as made:
                for wanted_row in rows_wanted:
                    row = row_of(made, *wanted_row)
                    with args.out.open("a") as out:
                        out.write(dump(row) + "\n")
                    print(row["model"], row["dtype"], row["group"], row["name"], row["planted"], row["verdict"],
                          row["named"], row.get("error", ""), f"{row['seconds']} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
