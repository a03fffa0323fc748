"""One workload, several backends: what a migration breaks, and which fix mends what.

    python examples/migration/run.py --seeds 3                      (embedded engine, three quarters of an hour)
    python examples/migration/run.py --study planted --seeds 1      (faults planted in a live run, 5 minutes)
    python examples/migration/run.py --study vllm --seeds 1         (vLLM 0.18.1, about 15 minutes)

Runs every arm of arms.toml that is not finished yet, then draws them all beside the first one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path

from trueup.config import load_config
from trueup.errors import TrueupError
from trueup.parity.catalogue import IMPLEMENTED
from trueup.pipeline.run import train

HERE = Path(__file__).parent
EMBEDDED = HERE / "workload.toml"
WORKLOADS = {"embedded": EMBEDDED, "vllm": HERE / "workload_vllm.toml", "planted": EMBEDDED}


def run_arm(study: str, name: str, changes: dict[str, object], *, seed: int, run: Path) -> None:
    """Train one arm, whatever the gate says: its verdict is in the run's parity/preflight.json."""
    own = changes | {"rollout.seed": seed, "train.run": str(run)}
    config = load_config(WORKLOADS[study], sets=[f"{key}={json.dumps(value)}" for key, value in own.items()])
    begun = (run / "config.json").is_file()
    summary = train(config, resume=begun, accepted=IMPLEMENTED, announce=lambda line: print(f"  {line}", flush=True))
    print(f"{name}, seed {seed}: {json.dumps(summary)}", flush=True)
    if summary["interrupted"]:
        raise SystemExit("stopped; run this again to go on")


def finished(run: Path) -> bool:
    """Whether an arm was trained to its end."""
    summary = run / "summary.json"
    return summary.is_file() and not json.loads(summary.read_text())["interrupted"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(WORKLOADS), default="embedded")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/migration"))
    given = parser.parse_args()
    arms = tomllib.loads((HERE / "arms.toml").read_text())[given.study]
    chosen = given.arms or list(arms)
    for seed in range(given.seeds):
        for name in chosen:
            run = given.out / given.study / f"{name}-{seed}"
            if finished(run):
                continue
            try:
                run_arm(given.study, name, arms[name], seed=seed, run=run)
            except TrueupError as error:
                print(f"{name}, seed {seed} ended: {error}", flush=True)
    runs = [given.out / given.study / f"{name}-{seed}" for name in chosen for seed in range(given.seeds)]
    done = [str(run) for run in runs if (run / "metrics.jsonl").is_file()]
    figure = given.out / f"{given.study}.png"
    subprocess.run([sys.executable, "-m", "trueup.cli", "compare", *done, "-o", str(figure)], check=True)


if __name__ == "__main__":
    main()
