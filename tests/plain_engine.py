"""An engine written the plain way, sharing no code with trueup: full logits, one token at a time, numpy sampling.

It makes traces with a known fault in its mechanics. What it reports is what its (broken) sampler or reader holds, never
the output of a checker.
"""

import json
from pathlib import Path

import numpy as np
import torch

VOCAB = 320


def make_tiny_checkpoint(
    folder: Path, *, seed: int = 0, vocab: int = VOCAB, dtype: torch.dtype = torch.float32
) -> Path:
    """Random Llama, two layers; the head is scaled so that entropies look like a language model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def draw_completions(
    folder: Path, prompts: list[list[int]], *, length: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[list[int]]:
    """Completions drawn at T=1 from any causal model, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rng = np.random.default_rng(seed)
    found = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(length):
            p = model(torch.tensor([ids])).logits[0, -1].double().softmax(0).numpy()
            ids.append(int(rng.choice(len(p), p=p / p.sum())))
        found.append(ids[len(prompt) :])
    return found


class PlainEngine:
    """Generates with a transformers model and reports logprobs; `fault` says what is broken."""

    def __init__(self, folder: Path, *, fault: str = "", dtype: torch.dtype = torch.float32, **settings: float):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.fault, self.settings, self.dtype = fault, settings, dtype

    def _penalised(self, z: np.ndarray, prompt: list[int], done: list[int], s: dict) -> np.ndarray:
        z = z.copy()
        repetition = s.get("repetition_penalty", 1.0)
        for v in set(prompt) | set(done):
            z[v] = z[v] / repetition if z[v] > 0 else z[v] * repetition
        for v in set(done):
            z[v] -= s.get("frequency_penalty", 0) * done.count(v) + s.get("presence_penalty", 0)
        return z

    @staticmethod
    def _log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max()
        return z - np.log(np.exp(z).sum())

    def _truncated(self, z: np.ndarray, s: dict) -> np.ndarray:
        keep = np.ones(len(z), dtype=bool)
        if s.get("min_p"):
            keep &= z >= z.max() + np.log(s["min_p"])
        if s.get("top_k"):
            keep &= z >= np.sort(np.where(keep, z, -np.inf))[-s["top_k"]]
        if s.get("top_p", 1) < 1:
            order = np.argsort(-np.where(keep, z, -np.inf), kind="stable")
            p = np.exp(self._log_softmax(np.where(keep, z, -np.inf)))[order]
            inside = np.cumsum(p) - p < s["top_p"]
            allowed = np.zeros(len(z), dtype=bool)
            allowed[order[inside]] = True
            keep &= allowed
        return np.where(keep, z, -np.inf)

    def step(
        self, z: np.ndarray, prompt: list[int], done: list[int], s: dict, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Sample one token and report its logprob."""
        temperature = s["temperature"]
        if self.fault == "temperature twice":
            temperature = temperature**2
        if self.fault == "other temperature":
            temperature = self.settings["used"]
        penalised = self._penalised(z, prompt, done, s)
        processed = self._log_softmax(self._truncated(penalised / temperature, s))
        token = int(rng.choice(len(z), p=np.exp(processed) / np.exp(processed).sum()))
        if self.fault == "raw":
            return token, float(self._log_softmax(z)[token])
        if self.fault == "ignores penalties":
            return token, float(self._log_softmax(self._truncated(z / temperature, s))[token])
        if self.fault == "first entry":
            return token, float(processed.max())
        return token, float(processed[token])

    @torch.no_grad()
    def trace(self, path: Path, sampling: dict, *, rows: int = 10, length: int = 24, seed: int = 0, **extra) -> Path:
        """Write a trace file."""
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        vocab = self.model.config.vocab_size
        prompts = torch.randint(0, vocab, (rows, 8), generator=generator)
        ids = prompts.clone()
        done: list[list[int]] = [[] for _ in range(rows)]
        logprobs: list[list[float]] = [[] for _ in range(rows)]
        for _ in range(length):
            z = self.model(ids).logits[:, -1].float().numpy().astype(np.float64)
            for r in range(rows):
                token, value = self.step(z[r], prompts[r].tolist(), done[r], sampling, rng)
                done[r].append(token)
                logprobs[r].append(float(np.float32(value)))
            ids = torch.cat([ids, torch.tensor([[d[-1]] for d in done])], dim=1)
        with path.open("w") as out:
            for r in range(rows):
                out.write(json.dumps(self.record(prompts[r].tolist(), done[r], logprobs[r], sampling, extra)) + "\n")
        return path

    def record(self, prompt: list[int], ids: list[int], logprobs: list[float], sampling: dict, extra: dict) -> dict:
        """One row as the engine's client stores it; client-side faults happen here."""
        if self.fault == "shift":
            k = int(self.settings["by"])
            logprobs = logprobs[k:] + logprobs[:k]
        if self.fault == "placeholder":
            rng = np.random.default_rng(len(ids) + ids[0])
            logprobs = [self.settings["value"] if rng.random() < 0.2 else v for v in logprobs]
        if self.fault == "decimals":
            logprobs = [round(v, int(self.settings["digits"])) for v in logprobs]
        if self.fault == "bf16 transport":
            logprobs = torch.tensor(logprobs).bfloat16().float().tolist()
        if self.fault == "extra entry":
            logprobs = [-0.5, *logprobs]
        if self.fault == "nan":
            logprobs = [float("nan") if i == 3 else v for i, v in enumerate(logprobs)]
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[self.dtype]
        return {
            "schema": "trueup.trace/1", "engine": {"name": "plain", "version": "1", "flags": {"dtype": name}},
            "sampling": sampling, "prompt_token_ids": prompt, "completion_token_ids": ids,
            "completion_logprobs": logprobs, **extra,
        }  # fmt: skip
