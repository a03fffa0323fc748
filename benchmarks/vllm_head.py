"""Does an fp32 head help? Engine head x trainer head, both bf16 or fp32, over bf16 bodies, on a real vLLM.

One set of tokens, generated at T=1 by the bf16-head engine, is scored by vLLM with each head and by the trainer with
each head, so that all four cells are about the same tokens and differences are paired (bootstrap over completions). The
engine's own generation logprobs are compared beside it, on the tokens that each made. Prints one JSON object as its
last line: for each version and cell mean_abs, rms, ess, and the paired differences with 95 % intervals.

    trueup vllm install --version 0.32.0; trueup vllm install --version 0.18.1
    python benchmarks/vllm_head.py [--versions 0.32.0 0.18.1] [--completions 96] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trueup.engines.base import GenerationRequest
from trueup.engines.vllm_server import VllmServer
from trueup.engines.vllm_v1 import VllmEngine
from trueup.env import limit_spinning
from trueup.knobs import VllmConfig
from trueup.model.load import load_model
from trueup.model.scoring import ScoredRow, hidden_states
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores
from trueup.types import Prompt, Rollout, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "smollm2-135m"
HEADS = ("bfloat16", "float32")
QUESTIONS = (
    "What is {a} times {b}?", "Tell me a story about {a} cats and {b} dogs.", "Write a list of {a} fruits.",
    "Explain why {a} is larger than {b}.", "Count from {a} to {b}.", "What happened in the year {a}{b}?",
)  # fmt: skip
RESAMPLES = 2000


def prompts(count: int) -> list[Prompt]:
    """Chat prompts, no two alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    made = []
    for i in range(count):
        text = QUESTIONS[i % len(QUESTIONS)].format(a=3 + i, b=17 + 2 * i)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        made.append(Prompt(prompt_id=str(i), task="head", token_ids=tuple(ids)))
    return made


def generate(engine: VllmEngine, asked: Sequence[Prompt], tokens: int) -> list[Rollout]:
    """One completion of each prompt at T=1."""
    requests = [
        GenerationRequest(prompt=p, sampling=SamplingParams(max_tokens=tokens, seed=i), ignore_eos=True)
        for i, p in enumerate(asked)
    ]
    rollouts = [r for group in engine.generate(requests) for r in group]
    assert all(isinstance(r, Rollout) for r in rollouts), rollouts
    return [r for r in rollouts if isinstance(r, Rollout)]


def engine_side(
    version: str, head: str, asked: Sequence[Prompt], tokens: int, rows: list[ScoredRow]
) -> dict[str, object]:
    """Generated rollouts and the scores of `rows` (of its own completions if empty) by vLLM with this head."""
    with tempfile.TemporaryDirectory() as run:
        config = VllmConfig(
            model=SMOLLM2, version=version, environments=ROOT, run=Path(run), port=0, head=head, max_length=1024
        )
        server = VllmServer(config)
        server.start()
        try:
            print(f"{version} {head} head:", {r.flag: r.state for r in server.report()}, flush=True)
            engine = VllmEngine.of(server)
            print(f"canary at the start: {engine.start_distance:.3g} nats", flush=True)
            rollouts = generate(engine, asked, tokens)
            rows = rows or [ScoredRow(prompt_ids=r.prompt.token_ids, completion_ids=r.token_ids) for r in rollouts]
            scores = [list(s.logprobs) for s in engine.score(rows)]
            engine.close()
        finally:
            server.stop()
    return {"rollouts": rollouts, "rows": rows, "scores": torch.tensor(scores, dtype=torch.float64)}


def trainer_side(rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
    """Logprobs [rows, T] by the bf16 trainer with each head."""
    model = load_model(SMOLLM2, dtype=torch.bfloat16)
    hidden_TD = torch.cat(hidden_states(model, rows, batch_rows=16))
    targets_T = torch.tensor([i for row in rows for i in row.completion_ids])
    return {
        head: token_scores(hidden_TD, Head.of(model, getattr(torch, head)), targets_T)
        .logprobs_T.double()
        .view(len(rows), -1)
        for head in HEADS
    }


def cell(r_BT: Tensor) -> dict[str, float]:
    """Gap figures of log ratios trainer - engine."""
    ratio = r_BT.exp().flatten()
    return {
        "mean_abs": float(r_BT.abs().mean()),
        "rms": float(r_BT.square().mean().sqrt()),
        "max": float(r_BT.abs().max()),
        "ess": float(ratio.mean() ** 2 / ratio.square().mean()),
    }


def interval(gain_B: Tensor) -> list[float]:
    """Mean over completions and its 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(gain_B), (RESAMPLES, len(gain_B)), generator=generator)
    means = gain_B[picks].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return [float(gain_B.mean()), low, high]


def measure(version: str, completions: int, tokens: int) -> dict[str, object]:
    """The table of one version."""
    asked = prompts(completions)
    sides: dict[str, dict[str, object]] = {}
    rows: list[ScoredRow] = []
    for head in HEADS:
        sides[head] = engine_side(version, head, asked, tokens, rows)
        rows = sides[head]["rows"]  # type: ignore[assignment]
    trainer = trainer_side(rows)
    gaps = {(e, t): trainer[t] - sides[e]["scores"] for e in HEADS for t in HEADS}
    table: dict[str, object] = {f"engine {e}, trainer {t}": cell(gap) for (e, t), gap in gaps.items()}
    abs_gain = {pair: gap.abs().mean(dim=1) for pair, gap in gaps.items()}
    table["both fp32 less both bf16, mean |r|"] = interval(
        abs_gain["float32", "float32"] - abs_gain["bfloat16", "bfloat16"]
    )
    table["both fp32 less engine bf16 trainer fp32, mean |r|"] = interval(
        abs_gain["float32", "float32"] - abs_gain["bfloat16", "float32"]
    )
    for head in HEADS:
        made: list[Rollout] = sides[head]["rollouts"]  # type: ignore[assignment]
        own = trainer_side([ScoredRow(prompt_ids=r.prompt.token_ids, completion_ids=r.token_ids) for r in made])
        reported = torch.tensor([r.behaviour_logprobs for r in made], dtype=torch.float64)
        table[f"generated, both {head}"] = cell(own[head] - reported)
    table["tokens"] = completions * tokens
    print(json.dumps({version: table}, indent=1), flush=True)
    return table


def main() -> None:
    """Run and print."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=["0.32.0", "0.18.1"])
    parser.add_argument("--completions", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    print(json.dumps({v: measure(v, given.completions, given.tokens) for v in given.versions}))


if __name__ == "__main__":
    main()
