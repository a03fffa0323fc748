"""Record the rollouts that the golden updates are made of: the tiny policy by the embedded engine, SmolLM2 by vLLM.

make setup vllm
.venv/bin/python -m tests.golden.record_rollouts
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tests.conftest import SMOLLM2
from tests.engine_kit import request
from tests.golden.cases import GROUP, MAX_TOKENS, ROLLOUTS, TEMPERATURE
from tests.vllm_kit import vllm_server
from trueup.engines.base import GenerationRequest
from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.engines.vllm_v1 import VllmEngine
from trueup.model.tiny import make_tiny
from trueup.pipeline.rollout_log import RolloutLog
from trueup.types import Prompt, RolloutGroup, SamplingParams

QUESTIONS = (
    "What is 17 plus 25?", "Name three fruits.", "Count from 1 to 10.", "Is 91 a prime number? Answer yes or no.",
    "Write a short poem about the sea, in two lines.", "How many legs do two spiders have?",
)  # fmt: skip


def write(folder: Path, results) -> None:
    log = RolloutLog(folder)
    for group in results:
        log.append(RolloutGroup(rollouts=tuple(group), rewards=tuple(reward(r) for r in group)))


def reward(rollout) -> float:
    """A number that differs between completions and needs no task: how many distinct tokens, in tenths."""
    return len(set(rollout.token_ids)) / 10


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = EmbeddedEngine(make_tiny(folder / "tiny"), EngineOptions(dtype=torch.float32))
        kinds = {"n": GROUP, "tokens": MAX_TOKENS["tiny"], "temperature": TEMPERATURE, "eos": True}
        write(ROLLOUTS["tiny"], engine.generate([request(6 + 7 * i, seed=i, **kinds) for i in range(6)]))
        engine.close()
        tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
        requests = []
        for number, question in enumerate(QUESTIONS):
            chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
            ids = tuple(chat["input_ids"] if hasattr(chat, "keys") else chat)
            sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=MAX_TOKENS["smollm2"], seed=number)
            prompt = Prompt(prompt_id=str(number), task="golden", token_ids=ids)
            requests.append(GenerationRequest(prompt=prompt, sampling=sampling, n=GROUP))
        knobs = {"version": "0.32.0", "dtype": "float32", "head": "float32"}
        with vllm_server(SMOLLM2, folder / "run", **knobs) as server:
            engine = VllmEngine.of(server)
            write(ROLLOUTS["smollm2"], engine.generate(requests))
            engine.close()


if __name__ == "__main__":
    main()
