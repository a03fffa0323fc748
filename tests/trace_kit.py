"""Traces of an engine that shares no code with the checker: transformers' forward pass, numpy's softmax and draws."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from tests.plain_engine import PlainEngine
from trueup.knobs import CheckConfig
from trueup.parity.run import check_trace

Step = Callable[..., tuple[int, float]]
"""step(logits [V] float64, tokens so far, random generator, row) -> (token, logprob that is reported)."""


def log_softmax(logits_V):
    """In float64, as numpy computes it."""
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


def drawn(logprobs_V, generator) -> int:
    """A token."""
    probabilities_V = np.exp(logprobs_V)
    return int(generator.choice(len(probabilities_V), p=probabilities_V / probabilities_V.sum()))


def sampled(temperature: float = 1.0) -> Step:
    """An honest step at a temperature."""

    def step(logits_V, done, generator, row):
        logprobs_V = log_softmax(logits_V / temperature)
        token = drawn(logprobs_V, generator)
        return token, logprobs_V[token]

    return step


def records_of(
    model: Path, *, rows: int = 20, length: int = 40, dtype=torch.float32, step: Step | None = None, seed: int = 0,
    sampling: dict | None = None, prompts: Sequence[Sequence[int]] | None = None,
) -> list[dict]:  # fmt: skip
    """Records of a trace, one prompt a row unless `prompts` are given."""
    engine, step = PlainEngine(model, dtype=dtype), step or sampled((sampling or {}).get("temperature", 1.0))
    generator, torch_generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    vocab = engine.model.config.vocab_size
    prompts = prompts or torch.randint(3, vocab, (rows, 8), generator=torch_generator).tolist()
    ids, done, logprobs = torch.tensor(prompts), [[] for _ in prompts], [[] for _ in prompts]
    with torch.no_grad():
        for _ in range(length):
            logits_RV = engine.model(ids).logits[:, -1].float().numpy().astype(np.float64)
            for row, logits_V in enumerate(logits_RV):
                token, logprob = step(logits_V, done[row], generator, row)
                done[row].append(token)
                logprobs[row].append(float(np.float32(logprob)))
            ids = torch.cat([ids, torch.tensor([tokens[-1:] for tokens in done])], 1)
    name = str(dtype).removeprefix("torch.")
    return [
        {
            "schema": "trueup.trace/1", "engine": {"name": "plain", "version": "1", "flags": {"dtype": name}},
            "sampling": sampling or {"temperature": 1.0}, "prompt_token_ids": list(prompts[row]),
            "completion_token_ids": done[row], "completion_logprobs": logprobs[row],
        }
        for row in range(len(prompts))
    ]  # fmt: skip


def edited(records: Sequence[dict], change: Callable[[int, dict], object]) -> list[dict]:
    """Copies of records, each changed in place by `change(row, record)`."""
    copies = json.loads(json.dumps(records))
    for row, record in enumerate(copies):
        change(row, record)
    return copies


def checked(records: Sequence[dict], model: Path, folder: Path, **knobs):
    """The report of a check of such a trace."""
    path = folder / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return check_trace(CheckConfig(trace=path, model=model, **knobs))
