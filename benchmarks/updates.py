"""How long an update holds generation up: SmolLM2-135M bf16 and the tiny policy, updates while 32 requests run.

One update every STEP_S seconds of generation stands for one at each optimiser step (a small step of a trainer on these
cores takes longer). Prints one JSON object as its last line: for each policy pause_ms (median and largest time between
two steps that the swap took), pause_share (all pauses over the wall time), load_s (loading and verifying beside the
steps), and slowdown (tokens per second without updates over those with them: the loading shares the cores).

    python benchmarks/updates.py [--updates 10]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from trueup.engines.base import GenerationRequest, UpdateReceipt
from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.env import limit_spinning
from trueup.model.load import load_model
from trueup.model.tiny import make_tiny
from trueup.types import Prompt, SamplingParams
from trueup.weights.snapshot import WeightSnapshot
from trueup.weights.store import WeightStore

SMOLLM2 = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m"
STEP_S = 2.0
BATCH, PROMPT_TOKENS = 32, 32


def requests_of(seed: int, tokens: int) -> list[GenerationRequest]:
    """Requests that keep the engine full."""
    chooser = random.Random(seed)
    return [
        GenerationRequest(
            prompt=Prompt(
                prompt_id=str(i), task="bench", token_ids=tuple(chooser.randrange(4, 100) for _ in range(PROMPT_TOKENS))
            ),
            sampling=SamplingParams(max_tokens=tokens, seed=i),
            ignore_eos=True,
        )
        for i in range(BATCH)
    ]


def publish(path: Path, store: WeightStore, updates: int) -> list[WeightSnapshot]:
    """Publish a checkpoint under several version numbers."""
    tensors = load_model(path, dtype=torch.bfloat16).stored_tensors()
    return [store.publish(version, tensors) for version in range(1, updates + 1)]


def measure(path: Path, root: Path, updates: int, tokens: int, step_s: float) -> dict[str, object]:
    """Run with and without updates and return the figures."""
    with ThreadPoolExecutor(1) as publisher:  # its OpenMP workers end with it; in training it is another process
        versions = publisher.submit(publish, path, WeightStore(root), updates).result()
    engine = EmbeddedEngine(path, EngineOptions())
    receipts: list[UpdateReceipt] = []

    def run(seed: int) -> float:
        start = time.perf_counter()
        engine.generate(requests_of(seed, tokens))
        return BATCH * tokens / (time.perf_counter() - start)

    try:
        run(0)
        quiet = [run(1), run(2)]
        stop = threading.Event()
        speeds: list[float] = []

        def keep_generating() -> None:
            while not stop.is_set():
                speeds.append(run(len(speeds) + 3))

        worker = threading.Thread(target=keep_generating)
        start = time.perf_counter()
        worker.start()
        for snapshot in versions:
            time.sleep(step_s)
            receipts.append(engine.update_weights(snapshot.path, clear_cache=False))
        wall_s = time.perf_counter() - start
        stop.set()
        worker.join(timeout=600)
    finally:
        engine.close()
    pauses = [r.paused_s for r in receipts]
    return {
        "updates": updates,
        "pause_ms": {"median": round(1e3 * statistics.median(pauses), 2), "max": round(1e3 * max(pauses), 2)},
        "pause_share": round(sum(pauses) / wall_s, 6),
        "load_s": round(statistics.median(r.load_s for r in receipts), 3),
        "wall_s": round(wall_s, 2),
        "tokens_per_s": {"quiet": round(statistics.median(quiet)), "updating": round(statistics.median(speeds))},
        "slowdown": round(statistics.median(quiet) / statistics.median(speeds), 3),
    }


def main() -> None:
    """Measure both policies and print the result."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    options = parser.parse_args()
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny(Path(folder) / "tiny", tied=True, dtype=torch.bfloat16)
        result["tiny"] = measure(tiny, Path(folder) / "tiny-weights", options.updates, 200, STEP_S / 10)
        print("tiny", result["tiny"], flush=True)
        result["smollm2"] = measure(SMOLLM2, Path(folder) / "smollm2-weights", options.updates, 48, STEP_S)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
