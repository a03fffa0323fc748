"""Rollout benchmark: the embedded engine against transformers' generate and vLLM 0.18.1 and 0.32, SmolLM2-135M bf16.

Every side is a process that stays up and gets the same token ids: batch 32 and 64, prompts of 32 tokens, 48 new tokens,
temperature 1, end tokens ignored, logprobs of the chosen tokens on, both cores. Rounds are interleaved; a ratio is the
median over rounds of trueup's tokens per second over the other side's in the same round, and of the two batches the
worse one counts. vLLM runs eager and compiled; the better one of the warm-up counts. The main figures have the head in
bf16 on every side (vLLM and transformers have no other here); trueup with its default fp32 head is beside them.

The last line is one JSON object: over_vllm (goal 2), over_transformers (goal 3), roofline_fraction (seconds that the
linear layers and the head alone would take at the measured matrix product rate, over the seconds a step takes).

    trueup vllm install --version 0.32.0; trueup vllm install --version 0.18.1
    python benchmarks/rollout.py [--rounds 5] [--batches 32 64] [--sides trueup transformers]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from side import Side, answer
from trueup.env import limit_spinning

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m"
PROMPT_TOKENS, NEW_TOKENS, VOCAB = 32, 48, 49152
ROUND_TIMEOUT_S = 600
VLLM_VARIABLES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
OURS, OURS_FP32 = "trueup", "trueup fp32 head"


def serve_rounds(generate: Any) -> None:
    """Answer each line of prompts with seconds and the number of tokens and logprobs that came back."""
    answer("ready")
    for line in sys.stdin:
        prompts = json.loads(line)
        start = time.perf_counter()
        tokens, logprobs = generate(prompts)
        seconds = time.perf_counter() - start
        assert tokens == logprobs == len(prompts) * NEW_TOKENS, (tokens, logprobs)
        answer({"seconds": seconds, "tokens": tokens})


def trueup_worker(head: str) -> None:
    """The embedded engine in process."""
    import torch

    from trueup.engines.base import GenerationRequest
    from trueup.engines.embedded.engine import EmbeddedEngine
    from trueup.engines.embedded.options import EngineOptions
    from trueup.types import Prompt, SamplingParams

    engine = EmbeddedEngine(MODEL, EngineOptions(head_dtype=getattr(torch, head), prefix_cache=False))
    sampling = SamplingParams(max_tokens=NEW_TOKENS)

    def generate(prompts: list[list[int]]) -> tuple[int, int]:
        requests = [
            GenerationRequest(
                prompt=Prompt(prompt_id=str(i), task="bench", token_ids=tuple(ids)), sampling=sampling, ignore_eos=True
            )
            for i, ids in enumerate(prompts)
        ]
        rollouts: list[Any] = [r for group in engine.generate(requests) for r in group]
        return sum(len(r.token_ids) for r in rollouts), sum(len(r.behaviour_logprobs) for r in rollouts)

    serve_rounds(generate)


def transformers_worker() -> None:
    """transformers' generate, as a user calls it, with the logprobs of what it sampled."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]]) -> tuple[int, int]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = out.sequences[:, ids.shape[1] :]
        parts = [z.float().log_softmax(-1).gather(1, new[:, t : t + 1]) for t, z in enumerate(out.logits)]
        return new.numel(), torch.cat(parts, 1).numel()

    serve_rounds(generate)


def vllm_worker(eager: bool) -> None:
    """vLLM's own offline engine, in its own environment (nothing of trueup is imported)."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(MODEL), dtype="bfloat16", enforce_eager=eager, gpu_memory_utilization=0.3, max_model_len=1024,
        max_num_seqs=64, disable_log_stats=True,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False)

    def generate(prompts: list[list[int]]) -> tuple[int, int]:
        given = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = [o.outputs[0] for o in llm.generate(given, sampling, use_tqdm=False)]
        return sum(len(o.token_ids) for o in outputs), sum(len(o.logprobs) for o in outputs)

    serve_rounds(generate)


def tokens_per_second(side: Side, prompts: list[list[int]]) -> float:
    """Run one round."""
    content = side.ask(prompts, ROUND_TIMEOUT_S)
    return content["tokens"] / content["seconds"]


def commands(wanted: list[str]) -> dict[str, tuple[list[str], dict[str, str]]]:
    """How each side is started; vLLM versions that are not installed are left out, with a line that says so."""
    from trueup.engines.vllm_install import VERSIONS, find_environment, launch_prefix

    own = [sys.executable, __file__, "--worker"]
    found = {
        OURS: ([*own, "trueup", "bfloat16"], {}),
        OURS_FP32: ([*own, "trueup", "float32"], {}),
        "transformers": ([*own, "transformers"], {}),
    }
    for version in VERSIONS:
        environment = find_environment(version, ROOT)
        if environment is None:
            print(f"vLLM {version} is not installed: trueup vllm install --version {version}", flush=True)
            continue
        for mode in ("eager", "compiled"):
            command = [*launch_prefix(environment), __file__, "--worker", "vllm", mode]
            found[f"vllm {version} {mode}"] = (command, VLLM_VARIABLES)
    return {name: value for name, value in found.items() if not wanted or any(name.startswith(w) for w in wanted)}


def prompts_of(batch: int, seed: int) -> list[list[int]]:
    """Random ids, different in every round, the same for every side."""
    chooser = random.Random(seed)
    return [[chooser.randrange(100, VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


def roofline_s(batch: int) -> float:
    """Seconds that a decoding step's matrix products alone would take at this machine's best bf16 rate."""
    import torch

    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    flops = 2 * 2048**3 / min(times)
    weights = sum(n * k for n, k in ((960, 576), (576, 576), (3072, 576), (576, 1536))) * 30 + VOCAB * 576
    copy = torch.empty(2**26, dtype=torch.uint8)
    start = time.perf_counter()
    copy.clone()
    bytes_per_s = 2 * copy.numel() / (time.perf_counter() - start)
    return max(2 * weights * batch / flops, 2 * weights / bytes_per_s)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def pick_vllm(warm: dict[str, dict[int, float]]) -> list[str]:
    """Of each version's eager and compiled form the one that was faster when warm."""
    chosen = []
    for version in sorted({name.rsplit(" ", 1)[0] for name in warm if name.startswith("vllm")}):
        forms = [name for name in warm if name.startswith(version)]
        chosen.append(max(forms, key=lambda name: min(warm[name].values())))
    return chosen


def main() -> None:
    """Warm every side, run the rounds and print the ratios."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--sides", nargs="*", default=[], help="names or beginnings of names; default all")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *rest = options.worker
        if kind == "trueup":
            trueup_worker(rest[0])
        elif kind == "transformers":
            transformers_worker()
        else:
            vllm_worker(rest[0] == "eager")
        return
    sides: dict[str, Side] = {}
    try:
        for name, (command, variables) in commands(options.sides).items():
            sides[name] = Side(name, command, variables)
            print(f"started {name}", flush=True)
        print(json.dumps(run(sides, options.rounds, options.batches)))
    finally:
        for side in sides.values():
            side.stop()


def run(sides: dict[str, Side], rounds: int, batches: list[int]) -> dict[str, object]:
    """Warm up, choose vLLM's better form, run the interleaved rounds and return the result."""
    warm: dict[str, dict[int, float]] = {}
    for name, side in sides.items():
        warm[name] = {}
        for batch in batches:
            tries = [tokens_per_second(side, prompts_of(batch, -k)) for k in range(3)]
            warm[name][batch] = max(tries)
        print("warm", name, {b: round(v) for b, v in warm[name].items()}, flush=True)
    vllm = pick_vllm(warm)
    kept = [name for name in sides if not name.startswith("vllm") or name in vllm]
    speed: dict[str, dict[int, list[float]]] = {name: {b: [] for b in batches} for name in kept}
    for index in range(rounds):
        for batch in batches:
            for name in kept if index % 2 == 0 else reversed(kept):
                speed[name][batch].append(tokens_per_second(sides[name], prompts_of(batch, 1000 * batch + index)))
        print(f"round {index + 1}", {n: {b: round(v[-1]) for b, v in speed[n].items()} for n in kept}, flush=True)
    result: dict[str, object] = {
        "model": MODEL.name, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rounds": rounds,
        "tokens_per_s": {n: {str(b): spread(v) for b, v in speed[n].items()} for n in kept},
        "warm_up": {n: {str(b): round(v, 1) for b, v in values.items()} for n, values in warm.items()},
    }  # fmt: skip
    for label, others in (("over_vllm", vllm), ("over_transformers", [n for n in kept if n == "transformers"])):
        for ours, suffix in ((OURS, ""), (OURS_FP32, "_fp32_head")):
            if ours in speed and others:
                result |= ratios(label + suffix, speed, ours, others, batches)
    if OURS in speed:
        fractions = [roofline_s(b) * statistics.median(speed[OURS][b]) / b for b in batches]
        result["roofline_fraction"] = round(min(fractions), 3)
    return result


def ratios(
    label: str, speed: dict[str, dict[int, list[float]]], ours: str, others: list[str], batches: list[int]
) -> dict[str, object]:
    """Ours over the fastest of the others, round by round; of the batches the worse median counts."""
    by_batch = {}
    for batch in batches:
        fastest = [max(values) for values in zip(*(speed[o][batch] for o in others), strict=True)]
        by_batch[batch] = [a / b for a, b in zip(speed[ours][batch], fastest, strict=True)]
    return {
        label: round(min(statistics.median(v) for v in by_batch.values()), 3),
        f"{label}_by_batch": {str(b): spread(v) for b, v in by_batch.items()},
    }


if __name__ == "__main__":
    main()
