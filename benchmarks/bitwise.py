"""What bitwise mode costs, SmolLM2-135M: generation by the engine, and forward and backward by the trainer.

Plain and bitwise runs alternate in processes of their own; ratios are medians over pairs of neighbouring runs. Prints
one JSON object as its last line: for each dtype generation_time_ratio and training_time_ratio (bitwise over plain).

    python benchmarks/bitwise.py [--pairs 3] [--batch 32]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from trueup.env import limit_spinning

MODEL = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m"
PROMPT_TOKENS, NEW_TOKENS, TRAINED_ROWS = 32, 24, 8


def one(mode: str, dtype: str, batch: int) -> dict[str, float]:
    """Seconds of a warm generation and of a warm training step in this process."""
    import torch

    from trueup.engines.base import GenerationRequest
    from trueup.engines.embedded.engine import EmbeddedEngine
    from trueup.engines.embedded.options import EngineOptions
    from trueup.model.load import load_model
    from trueup.model.packed import open_policy, packed_hidden_states
    from trueup.model.scoring import ScoredRow
    from trueup.policy.head import Head
    from trueup.policy.logprobs import token_scores
    from trueup.types import Prompt, SamplingParams

    kind = getattr(torch, dtype)
    engine = EmbeddedEngine(MODEL, EngineOptions(dtype=kind, bitwise=mode == "bitwise", prefix_cache=False))
    chooser = random.Random(0)
    times = []
    for run in range(2):
        requests = [
            GenerationRequest(
                prompt=Prompt(
                    prompt_id=str(i),
                    task="bench",
                    token_ids=tuple(chooser.randrange(100, 49152) for _ in range(PROMPT_TOKENS)),
                ),
                sampling=SamplingParams(max_tokens=NEW_TOKENS, seed=run),
                ignore_eos=True,
            )
            for i in range(batch)
        ]
        start = time.perf_counter()
        engine.generate(requests)
        times.append(time.perf_counter() - start)
    engine.close()
    model = open_policy(load_model(MODEL, dtype=kind), bitwise=mode == "bitwise")
    for parameter in model.lm.parameters():
        parameter.requires_grad_(True)
    rows = [
        ScoredRow(prompt_ids=r.prompt.token_ids, completion_ids=tuple(range(100, 100 + NEW_TOKENS)))
        for r in requests[:TRAINED_ROWS]
    ]
    targets = torch.tensor([i for row in rows for i in row.completion_ids])
    steps = []
    for _ in range(3):
        start = time.perf_counter()
        hidden = packed_hidden_states(model, rows)
        token_scores(hidden, Head.of(model, torch.float32), targets).logprobs_T.sum().backward()
        steps.append(time.perf_counter() - start)
    return {"generation_s": times[-1], "training_s": min(steps[1:])}


def main() -> None:
    """Run the pairs and print the ratios."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options.batch)))
        return
    result: dict[str, object] = {"model": MODEL.name, "batch": options.batch, "new_tokens": NEW_TOKENS}
    for dtype in ("bfloat16", "float32"):
        pairs = []
        for _ in range(options.pairs):
            pair = {}
            for mode in ("plain", "bitwise"):
                command = [sys.executable, __file__, "--one", mode, dtype, "--batch", str(options.batch)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
                pair[mode] = json.loads(done.stdout.splitlines()[-1])
            pairs.append(pair)
        entry: dict[str, object] = {}
        for what in ("generation", "training"):
            ratios = [p["bitwise"][f"{what}_s"] / p["plain"][f"{what}_s"] for p in pairs]
            entry[f"{what}_time_ratio"] = round(statistics.median(ratios), 2)
            entry[f"{what}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
            entry[f"{what}_s_bitwise"] = round(statistics.median(p["bitwise"][f"{what}_s"] for p in pairs), 2)
        result[dtype] = entry
        print(dtype, entry, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
