"""Training benchmark: a trainer step of trueup against transformers with TRL 1.13's GRPO loss, SmolLM2-135M.

Every side is a process that stays up and takes optimiser steps on the same batch: 4 prompts of 160 tokens, 8
completions of 96 tokens each, both cores, the same tokens a forward pass, no KL term, AdamW, one step a batch. TRL's
side calls GRPOTrainer's own loss on its padded micro-batches of 8 sequences, then backward, clipping and torch's fused
AdamW, on a model in the dtype given (bfloat16: TRL's usual set-up has the optimiser in bfloat16 too; trueup keeps
float32 masters, and its head multiplies in float32). trueup runs with prompts shared and apart. Rounds are interleaved;
a ratio is the median over rounds of trueup's loss tokens per second over TRL's in the same round. Peak memory is each
process's own (VmHWM), the model included.

Then whole online runs, generation included (online.py): over_trl at max_lag 0, async_over_trl, and ways of updating an
engine. The last line is one JSON object: for each dtype tokens_per_second, peak_mib and phase shares of every side,
over_trl_step (shared prompts), over_trl_step_apart, memory_ratio (TRL / trueup), shared_over_apart; under `online` the
rest.

    python -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt trl==1.13.0 requests -e .
    python benchmarks/train.py [--rounds 5] [--dtypes float32 bfloat16] [--online-rounds 2]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from online import against_trl, ways_of_updating
from side import Side, answer
from trueup.env import limit_spinning

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 160, 96
MICRO_SEQUENCES = 8
VOCAB = 49152
LOSS_TOKENS = PROMPTS * GROUP * NEW_TOKENS
ROUND_TIMEOUT_S = 600
SHARED, APART, TRL = "trueup", "trueup, prompts apart", "TRL"


def batch_of(seed: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Prompts, one for each sequence; completions; rewards. Random, the same on every side."""
    chooser = random.Random(seed)
    prompts, completions, rewards = [], [], []
    for _ in range(PROMPTS):
        prompt = [chooser.randrange(100, VOCAB) for _ in range(PROMPT_TOKENS)]
        for _ in range(GROUP):
            prompts.append(prompt)
            completions.append([chooser.randrange(100, VOCAB) for _ in range(NEW_TOKENS)])
            rewards.append(chooser.random())
    return prompts, completions, rewards


def peak_mib() -> float:
    """Largest resident memory this process ever had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def serve_steps(step: Callable[[int], dict[str, float]]) -> None:
    """Warm up, then answer each line (a seed) with the seconds of a step, its phases and the peak memory."""
    step(0)
    answer("ready")
    for line in sys.stdin:
        start = time.perf_counter()
        phases = step(int(json.loads(line)))
        answer({"seconds": time.perf_counter() - start, "phases": phases, "peak_mib": peak_mib()})


def trueup_worker(dtype: str, share: bool) -> None:
    """The trainer, as `trueup train` runs it."""
    from trueup.config import build_config
    from trueup.pipeline.trainer import Trainer
    from trueup.types import LogprobKind, Prompt, Rollout, RolloutGroup, SamplingParams

    tokens = MICRO_SEQUENCES * (PROMPT_TOKENS + NEW_TOKENS)
    train = {"model": str(MODEL), "dtype": dtype, "share_prompts": share, "micro_tokens": tokens}
    trainer = Trainer(build_config({"train": train, "objective": {"kl": 0.0}}))

    def step(seed: int) -> dict[str, float]:
        prompts, completions, rewards = batch_of(seed)
        groups = []
        for first in range(0, len(prompts), GROUP):
            prompt = Prompt(prompt_id=str(first), task="bench", token_ids=tuple(prompts[first]))
            rollouts = tuple(
                Rollout(
                    prompt=prompt, token_ids=tuple(ids), behaviour_logprobs=(-10.0,) * len(ids),
                    logprob_kind=LogprobKind.PROCESSED, weight_versions=(0,) * len(ids), sampling=SamplingParams(),
                    finish_reason="length", engine="bench",
                )
                for ids in completions[first : first + GROUP]
            )  # fmt: skip
            groups.append(RolloutGroup(rollouts=rollouts, rewards=tuple(rewards[first : first + GROUP])))
        return trainer.step(groups).phase_s

    serve_steps(step)


def trl_worker(dtype: str) -> None:
    """transformers' model, TRL's advantages and loss, torch's optimiser; in an environment with TRL."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    class Recorded(GRPOTrainer):
        """GRPOTrainer whose completions are given."""

        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
            return self.given[0], self.given[1], None, [""] * len(prompts), None, {}, None, []

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, dtype))
    parts = PROMPTS * GROUP // MICRO_SEQUENCES
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=MICRO_SEQUENCES, gradient_accumulation_steps=parts, num_generations=GROUP,
        max_completion_length=NEW_TOKENS, beta=0.0, loss_type="grpo",
    )  # fmt: skip
    trainer = Recorded(
        model=model, args=args, train_dataset=Dataset.from_list([{"prompt": "", "reward": 0.0}]),
        processing_class=AutoTokenizer.from_pretrained(MODEL), reward_funcs=lambda completions, reward, **_: reward,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = parts
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def step(seed: int) -> dict[str, float]:
        trainer.given = batch_of(seed)
        phases = dict.fromkeys(("prepare", "forward and loss", "backward", "optimizer"), 0.0)

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = work()
            phases[name] += time.perf_counter() - start
            return result

        rows = [{"prompt": "", "reward": r} for r in trainer.given[2]]
        inputs = timed("prepare", lambda: trainer._generate_and_score_completions(rows))
        for first in range(0, len(rows), MICRO_SEQUENCES):
            at = slice(first, first + MICRO_SEQUENCES)
            part = {k: v[at] if getattr(v, "ndim", 0) else v for k, v in inputs.items()}
            loss = timed("forward and loss", lambda part=part: trainer._compute_loss(model, part))
            timed("backward", loss.backward)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()

        timed("optimizer", update)
        return phases

    serve_steps(step)


def sides_of(dtype: str) -> dict[str, list[str]]:
    """How each side is started."""
    own = [sys.executable, __file__, "--worker"]
    return {
        SHARED: [*own, "trueup", dtype, "shared"],
        APART: [*own, "trueup", dtype, "apart"],
        TRL: [str(TRL_PYTHON), __file__, "--worker", "trl", dtype],
    }


def compare(dtype: str, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of one dtype; figures by side and their ratios."""
    sides = {name: Side(name, command, {}) for name, command in sides_of(dtype).items()}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    try:
        for number in range(1, rounds + 1):
            for name, side in sides.items():
                results[name].append(side.ask(number, ROUND_TIMEOUT_S))
            line = "  ".join(f"{n}: {LOSS_TOKENS / r[-1]['seconds']:.0f}" for n, r in results.items())
            print(f"{dtype} round {number}, loss tokens/s  {line}", flush=True)
    finally:
        for side in sides.values():
            side.stop()

    def ratio(fast: str, slow: str) -> dict[str, float]:
        values = [s["seconds"] / f["seconds"] for f, s in zip(results[fast], results[slow], strict=True)]
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}

    figures: dict[str, Any] = {
        "over_trl_step": ratio(SHARED, TRL), "over_trl_step_apart": ratio(APART, TRL),
        "shared_over_apart": ratio(SHARED, APART),
    }  # fmt: skip
    peaks = {name: max(r["peak_mib"] for r in rows) for name, rows in results.items()}
    figures["memory_ratio"] = peaks[TRL] / peaks[SHARED]
    for name, rows in results.items():
        total = statistics.median(r["seconds"] for r in rows)
        phases = {p: statistics.median(r["phases"][p] for r in rows) for p in rows[0]["phases"]}
        figures[name] = {
            "tokens_per_second": LOSS_TOKENS / total, "peak_mib": peaks[name],
            "phase_share": {p: s / total for p, s in phases.items()},
        }  # fmt: skip
    return figures


def main() -> None:
    """Run every dtype and print one JSON object."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--online-rounds", type=int, default=2, help="0: single steps only")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, dtype, *rest = arguments.worker
        if kind == "trl":
            trl_worker(dtype)
        else:
            trueup_worker(dtype, rest == ["shared"])
        return
    if not TRL_PYTHON.is_file():
        raise SystemExit(f"{TRL_PYTHON} is missing: see --help for how to make it")
    figures = {dtype: compare(dtype, arguments.rounds) for dtype in arguments.dtypes if arguments.rounds}
    if arguments.online_rounds:
        online = {dtype: against_trl(arguments.online_rounds, dtype) for dtype in arguments.dtypes}
        figures["online"] = online | {"updates": ways_of_updating(arguments.online_rounds, arguments.dtypes[-1])}
    print(json.dumps({"loss_tokens": LOSS_TOKENS, "rounds": arguments.rounds} | figures))


if __name__ == "__main__":
    main()
