"""Does the quickstart learn, and only from its rewards? Three seeds as they are, with shuffled rewards, and with lr 0.

    python benchmarks/demo.py [--seeds 3]          (15 minutes)

Shuffled: the rewards of a group's completions change places among them, so that their distribution is the same and says
nothing. Held-out reward is always the true one. Exit code 1 unless every run keeps to what is asked of it:
preflight agrees, start <= 0.3; as they are: a rise of 0.3 and an end 0.2 above the best answer that ignores the prompt
(1/8); otherwise a rise below 0.05. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueup.config import load_config
from trueup.env import limit_spinning
from trueup.pipeline import run as run_module
from trueup.pipeline.actor import Actor, NoGroup
from trueup.tasks.repeat import Repeat
from trueup.types import Prompt, Rollout

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "examples" / "quickstart.toml"
START, RISE, ABOVE_BLIND, STILL = 0.3, 0.3, 0.2, 0.05
KINDS: dict[str, list[str]] = {"as it is": [], "shuffled rewards": [], "lr 0": ["optimizer.lr=0"]}


class Shuffled(Actor):
    """Gives the rewards of a group to its completions in another order."""

    def _rewards(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[float] | NoGroup:
        found = super()._rewards(prompt, rollouts)
        if isinstance(found, list):
            random.Random(prompt.prompt_id).shuffle(found)
        return found


def run_one(kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train; what is asked of it, with whether it holds."""
    sets = [f"train.run={folder}", f"train.model={ROOT / 'models' / 'tiny'}", f"rollout.seed={seed}", *KINDS[kind]]
    run_module.Actor = Shuffled if kind == "shuffled rewards" else Actor  # type: ignore[attr-defined]
    summary = run_module.train(load_config(FILE, sets=sets))
    start, end = summary["heldout_reward_start"], summary["heldout_reward_end"]
    learned = end - start >= RISE and end >= Repeat.blind + ABOVE_BLIND
    holds = learned if kind == "as it is" else end - start < STILL
    return {
        "kind": kind, "seed": seed, "start": start, "end": end, "seconds": summary["seconds"],
        "preflight": summary["preflight_verdict"], "ess": summary["ess"], "lag_max": summary["lag_max"],
        "holds": holds and start <= START and summary["preflight_verdict"] == "agree",
    }  # fmt: skip


def main() -> None:
    """Run every kind and seed, one after the other."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()
    found = []
    for kind in given.kinds:
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(run_one(kind, seed, Path(folder) / "run"))
            print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    seconds = [f["seconds"] for f in found if f["kind"] == "as it is"]
    print(json.dumps({"median_seconds": statistics.median(seconds) if seconds else None, "runs": found}))
    raise SystemExit(0 if all(f["holds"] for f in found) else 1)


if __name__ == "__main__":
    main()
