"""Records of other frameworks, told by their keys: which framework wrote a line, and where our fields are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ForeignRecord:
    """A framework's own record: the keys that give it away, and what to do to make a `trueup.trace/1` line of it."""

    name: str
    keys: tuple[str, ...]
    advice: str


FOREIGN = (
    ForeignRecord(
        name="an OpenAI chat completion",
        keys=("choices", "object", "prompt_token_ids"),
        advice="completion_token_ids and completion_logprobs are in choices[0].logprobs.content (token, logprob; ask "
        "vLLM for return_token_ids=true); add the request's sampling fields",
    ),
    ForeignRecord(
        name="an OpenAI completion (vLLM's /v1/completions)",
        keys=("choices", "object"),
        advice="completion_logprobs are choices[0].logprobs.token_logprobs, the ids are choices[0].token_ids and "
        "prompt_token_ids (ask for return_token_ids=true); add the request's sampling fields",
    ),
    ForeignRecord(
        name="SGLang's answer to /generate",
        keys=("output_ids", "meta_info"),
        advice="completion_token_ids are output_ids, completion_logprobs the first entries of "
        "meta_info.output_token_logprobs, prompt_token_ids the second entries of meta_info.input_token_logprobs; add "
        "the request's sampling_params",
    ),
    ForeignRecord(
        name="a batch of TRL",
        keys=("prompt_ids", "completion_ids", "sampling_per_token_logps"),
        advice="prompt_token_ids are prompt_ids, completion_token_ids completion_ids, completion_logprobs "
        "sampling_per_token_logps and trainer_logprobs old_per_token_logps, each without its padding "
        "(completion_mask); add the sampling of GRPOConfig",
    ),
    ForeignRecord(
        name="a training sample of prime-rl",
        keys=("prompt_ids", "completion_ids", "completion_logprobs"),
        advice="prompt_token_ids are prompt_ids, completion_token_ids completion_ids and mask completion_mask; add "
        "sampling (examples/integrate/prime_rl_export.py)",
    ),
    ForeignRecord(
        name="an experience of OpenRLHF",
        keys=("sequences", "action_mask"),
        advice="cut sequences where action_mask begins into prompt_token_ids and completion_token_ids; "
        "completion_logprobs are rollout_log_probs, trainer_logprobs action_log_probs; add sampling",
    ),
    ForeignRecord(
        name="a rollout dump of verl (trainer.rollout_data_dir)",
        keys=("input", "output", "score"),
        advice="it holds text without token ids or logprobs, so that nothing can be compared: export the batch instead "
        "(examples/integrate/verl_export.py)",
    ),
    ForeignRecord(
        name="a batch of verl",
        keys=("responses", "rollout_log_probs"),
        advice="examples/integrate/verl_export.py makes a trace of it",
    ),
)  # fmt: skip


def looks_like(record: Mapping[str, object]) -> ForeignRecord | None:
    """Return the framework whose keys a record has, or None.

    Example: `looks_like({"output_ids": [1], "meta_info": {}}).name` is "SGLang's answer to /generate".
    """
    return next((f for f in FOREIGN if all(key in record for key in f.keys)), None)
