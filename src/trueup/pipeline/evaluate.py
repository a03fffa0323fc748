"""Mean reward on held-out prompts, sampled as rollouts are; these completions are never trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from trueup.engines.base import Engine, GenerationRequest, RolloutFailure
from trueup.errors import EngineError, TrainingError
from trueup.knobs import RolloutConfig, SamplingConfig
from trueup.pipeline.actor import sampling_params
from trueup.tasks.prompts import PromptSource
from trueup.tasks.scoring import NotScored, ScoringPool
from trueup.types import Prompt

EVALUATION = "evaluation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Mean reward over `scored` completions, and its standard error over prompts.

    A completion that the engine did not finish (a time-out, for instance) earns 0: left out, it would raise the mean as
    completions grow too long. Completions that could not be scored are left out; `failed` counts both kinds. Two
    evaluations use the same prompts and the same random numbers, so that their errors are not independent.
    """

    reward: float
    error: float
    scored: int
    failed: int


def evaluate(
    engines: Sequence[Engine],
    source: PromptSource,
    prompts: Sequence[Prompt],
    scoring: ScoringPool,
    sampling: SamplingConfig,
    rollout: RolloutConfig,
) -> Evaluation:
    """One completion of each prompt, with the same random numbers every time.

    Raises EngineError if none came back, TrainingError if none could be scored.
    """
    requests = []
    for prompt in prompts:
        params = sampling_params(sampling, rollout, f"{EVALUATION} {prompt.prompt_id}")
        requests.append(GenerationRequest(prompt=prompt, sampling=replace(params, max_tokens=rollout.max_tokens)))
    shares = [requests[i :: len(engines)] for i in range(len(engines))]
    with ThreadPoolExecutor(len(engines), thread_name_prefix="evaluate") as pool:
        pairs = zip(engines, shares, strict=True)
        futures = [pool.submit(e.generate, share, timeout_s=rollout.timeout_s) for e, share in pairs if share]
        results = [result for future in futures for group in future.result() for result in group]
    answers = {prompt.prompt_id: prompt.answer for prompt in prompts}
    made = [r for r in results if not isinstance(r, RolloutFailure)]
    found = scoring.score([(answers[r.prompt.prompt_id], source.decode(r.token_ids)) for r in made])
    scored = [reward for reward in found if not isinstance(reward, NotScored)]
    unfinished = len(results) - len(made)
    rewards = [*scored, *[0.0] * unfinished]
    if not scored:
        reasons = [r.reason for r in (*results, *found) if isinstance(r, RolloutFailure | NotScored)]
        error = TrainingError if made else EngineError
        raise error(f"none of {len(prompts)} held-out completions has a reward; the first: {reasons[0]}")
    mean = math.fsum(rewards) / len(rewards)
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1))
    return Evaluation(
        reward=mean, error=spread / math.sqrt(len(rewards)), scored=len(rewards),
        failed=len(prompts) - len(scored),
    )  # fmt: skip
