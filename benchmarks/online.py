"""Whole online training, generation included: trueup against TRL 1.13's GRPOTrainer, and ways of updating an engine.

    python benchmarks/online.py [--rounds 2] [--dtype float32]          (or as part of train.py)

SmolLM2-135M, four prompts of some 160 tokens a batch, eight completions of 48 tokens, both cores; a round runs every
side from its start, 3 batches of warm-up and 12 that count, one side after the other. What counts is the samples that
the optimiser has consumed a second. Completions may end early on either side; loss tokens are reported.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trueup.env import limit_spinning

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
PROMPTS, GROUP, NEW_TOKENS, PROMPT_WORDS = 4, 8, 48, 160
WARM_UP, COUNTED = 3, 12
TIMEOUT_S = 1800
NOUNS = ("river", "stone", "window", "garden", "letter", "engine", "market", "winter", "harbour", "candle", "forest")

ON_POLICY, ASYNC, TRL = "trueup, max_lag 0", "trueup, max_lag 2", "TRL"
SIDES: dict[str, list[str]] = {
    ON_POLICY: ["rollout.max_lag=0", "train.threads=2", "rollout.threads=2"],
    ASYNC: ["rollout.max_lag=2", "train.threads=2", "rollout.threads=1", "rollout.clear_cache=false"],
}
KEEP, DRAIN, SYNCHRONOUS = "in flight, keys kept", "drained", "synchronous"
LONG = ["rollout.max_tokens=96", "task.chat=true"]
"""Chat answers end where they end, so that a drained engine waits for the longest."""
UPDATES: dict[str, list[str]] = {
    KEEP: [*SIDES[ASYNC], *LONG],
    DRAIN: [*SIDES[ASYNC], *LONG, "rollout.update=drain"],
    SYNCHRONOUS: [*SIDES[ON_POLICY], *LONG, "rollout.max_lag=2", "rollout.update=synchronous"],
}


def questions(count: int = 64) -> list[dict[str, str]]:
    """Prompts of much the same length, and a word that about half of the completions contain."""
    chooser = random.Random(0)
    return [
        {"prompt": " ".join(chooser.choice(NOUNS) for _ in range(PROMPT_WORDS)), "answer": "and"} for _ in range(count)
    ]


def trueup_side(folder: Path, dtype: str, sets: list[str]) -> dict[str, float]:
    """A run of `trueup train`; figures of its counted batches."""
    data, run = folder / "questions.jsonl", folder / "run"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions()))
    fixed = {
        "train.model": MODEL, "train.run": run, "train.steps": WARM_UP + COUNTED, "train.groups": PROMPTS,
        "train.dtype": dtype, "train.checkpoint_every": 100, "task.name": "jsonl", "task.path": data,
        "task.scorer": "contains", "task.chat": "false", "task.held_out": 1, "rollout.group_size": GROUP,
        "rollout.max_tokens": NEW_TOKENS, "rollout.eval_every": 100, "objective.kl": 0.0,
    }  # fmt: skip
    command = [sys.executable, "-m", "trueup.cli", "train", *(f"--set={n}={v}" for n, v in fixed.items())]
    done = subprocess.run(
        [*command, *(f"--set={s}" for s in sets)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise SystemExit(f"trueup train failed: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted, seconds = lines[WARM_UP:], lines[-1]["time/since_start_s"] - lines[WARM_UP - 1]["time/since_start_s"]

    def total(name: str) -> float:
        return float(sum(line.get(name, 0.0) for line in counted))

    return {
        "samples_per_s": COUNTED * PROMPTS * GROUP / seconds,
        "loss_tokens": total("tokens/trained/count") / COUNTED,
        "generated_tokens_per_s": total("tokens/generated/count") / seconds,
        "wait_share": total("time/wait_s") / seconds,
        "train_share": total("time/train_s") / seconds,
        "update_share": total("time/update_s") / seconds,
        "pause_share": total("time/pause_s") / seconds,
    }


def trl_side(dtype: str) -> dict[str, float]:
    """The same by TRL's GRPOTrainer with transformers' generate, in an environment of its own."""
    done = subprocess.run(
        [str(TRL_PYTHON), __file__, "--trl", dtype], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise SystemExit(f"TRL failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def trl_worker(dtype: str) -> None:
    """Runs under TRL's interpreter; prints figures as JSON."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends, tokens = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **rest: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    micro = 8
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=micro, gradient_accumulation_steps=PROMPTS * GROUP // micro, num_generations=GROUP,
        max_completion_length=NEW_TOKENS, beta=0.0, loss_type="grpo", temperature=1.0, learning_rate=1e-6,
        max_steps=WARM_UP + COUNTED, save_strategy="no", logging_strategy="no", max_grad_norm=0.3,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    GRPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(questions()), processing_class=tokenizer,
        reward_funcs=reward, callbacks=[Clock()],
    ).train()  # fmt: skip
    seconds = ends[-1] - ends[WARM_UP - 1]
    samples = COUNTED * PROMPTS * GROUP
    print(json.dumps({"samples_per_s": samples / seconds, "loss_tokens": sum(tokens[WARM_UP:]) / COUNTED}))


def rounds_of(sides: list[str], rounds: int, dtype: str) -> dict[str, list[dict[str, float]]]:
    """Every side once a round."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(1, rounds + 1):
        for side in sides:
            with tempfile.TemporaryDirectory() as folder:
                sets = SIDES.get(side, UPDATES.get(side, []))
                found = trl_side(dtype) if side == TRL else trueup_side(Path(folder), dtype, sets)
            results[side].append(found)
            numbers = "  ".join(f"{n} {v:.3g}" for n, v in found.items())
            print(f"{dtype} round {number}, {side}: {numbers}", flush=True)
    return results


def ratio(results: dict[str, list[dict[str, float]]], over: str, under: str, what: str) -> dict[str, float]:
    """Of two sides, round by round."""
    values = [a[what] / b[what] for a, b in zip(results[over], results[under], strict=True)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def against_trl(rounds: int, dtype: str) -> dict[str, Any]:
    """`over_trl`: samples a second at max_lag 0 over TRL's; `async_over_trl` with updates in flight."""
    results = rounds_of([ON_POLICY, ASYNC, TRL], rounds, dtype)
    return {
        "over_trl": ratio(results, ON_POLICY, TRL, "samples_per_s"),
        "async_over_trl": ratio(results, ASYNC, TRL, "samples_per_s"),
        "sides": results,
    }


def ways_of_updating(rounds: int, dtype: str) -> dict[str, Any]:
    """In-flight updates with kept keys over drained ones at the same max_lag, and over a synchronous run with it."""
    results = rounds_of(list(UPDATES), rounds, dtype)
    what = "generated_tokens_per_s"
    return {
        "keep_over_drain": ratio(results, KEEP, DRAIN, what),
        "keep_over_synchronous": ratio(results, KEEP, SYNCHRONOUS, what),
        "pause_share": {side: statistics.median(r["pause_share"] for r in rows) for side, rows in results.items()},
        "sides": results,
    }


def main() -> None:
    """Run one dtype and print one JSON object."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", default=["trl", "updates"], choices=["trl", "updates"])
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trl:
        trl_worker(given.trl)
        return
    figures: dict[str, Any] = {"dtype": given.dtype, "rounds": given.rounds}
    if "trl" in given.parts:
        figures |= against_trl(given.rounds, given.dtype)
    if "updates" in given.parts:
        figures["updates"] = ways_of_updating(given.rounds, given.dtype)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
