"""A verl batch as a trace for `trueup check --trace`. Written from verl's documented field names and tried on
a batch of that shape, not in verl itself.

Call it where verl has both numbers, after `old_log_probs` were computed (actor_rollout_ref.rollout.calculate_log_probs
must be on):

    write_trace(Path("verl.jsonl"), rows_of(batch.batch, config.actor_rollout_ref.rollout))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def rows_of(batch: Mapping[str, Any], rollout: Any) -> Iterator[dict[str, Any]]:
    """Yield one record of `trueup.trace/1` per response; left-padded prompts and right-padded responses are cut.

    What tools wrote into a response stays in it, with mask 0: it is context for the policy's later turns. Tokens that
    the loss leaves out for another reason (a response_mask of zeros) are left out here as well.
    """
    width = batch["prompts"].shape[1]
    sampling = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
    for index in range(len(batch["responses"])):
        seen = batch["attention_mask"][index].bool()
        inside = seen[width:]
        yield {
            "engine": {"name": rollout.name, "flags": {"dtype": rollout.dtype}},
            "sampling": sampling,
            "prompt_token_ids": batch["prompts"][index][seen[:width]].tolist(),
            "completion_token_ids": batch["responses"][index][inside].tolist(),
            "completion_logprobs": batch["rollout_log_probs"][index][inside].tolist(),
            "trainer_logprobs": batch["old_log_probs"][index][inside].tolist(),
            "mask": batch["response_mask"][index][inside].long().tolist(),
        }
