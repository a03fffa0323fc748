"""Whose fault is it? A gap between two numbers has two sides, and a trace a third: the code that wrote it.

Hypotheses are worded for an engine. Where the numbers that they explain are a trainer's, the same edits mean something
else, with another fix and sometimes another id: an engine that reports raw logprobs is S1, a trainer that computes them
forgets the temperature (S2), the kept set (S4) or the penalties (S6).
"""

from __future__ import annotations

import re
from dataclasses import replace

from trueup.parity.report import Cause
from trueup.types import SamplingParams

ENGINE, TRAINER, LOG = "engine", "trainer", "log"
ANOTHER_PROMPT = (
    "the trainer scores completions behind another prompt than the engine was sent",
    "score the prompt ids that were sent: no second rendering, re-tokenizing, BOS or truncation in the trainer",
)
ANOTHER_MODEL = (
    "the trainer computes with another configuration of the model than the checkpoint's",
    "load the checkpoint's config.json in the trainer: rotary parameters, window, attention, soft-cap and scales",
)
OTHER_WEIGHTS = (
    "the trainer's logprobs are those of other weights than the checkpoint's",
    "score with the weights that --model names: log which version the trainer scored with",
)
WORDING: dict[str, tuple[str, str]] = {
    "S2": (
        "the trainer does not apply the temperature that the engine samples with",
        "divide the trainer's logits by the rollout's temperature before log_softmax",
    ),
    "S3": (
        "the trainer's temperature is not the rollout's",
        "divide the trainer's logits by the temperature stored with each rollout, exactly once",
    ),
    "S4": (
        "the trainer's logprobs are of another kept set than the rollout's top-p, top-k or min-p keep",
        "replay the sampling mask in the trainer, or set top_p=1, top_k=0 and min_p=0 for rollouts",
    ),
    "S6": (
        "the trainer does not apply the penalties that the engine samples with",
        "replay penalties in the trainer, or turn them off for rollouts",
    ),
    "T1": (
        "the trainer's logprobs are shifted against its tokens",
        "score token t with the logits of position t-1: logits[:, :-1] against ids[:, 1:], once",
    ),
    "T2": (
        "the trainer's logprobs are not one for each token of the completion",
        "log one number a completion token: shift logits once, and neither pad nor drop the first or the last",
    ),
    "I11": (
        "the trainer's logprobs are not finite",
        "find the NaN or infinity in the trainer (overflow in 16 bits, a fully masked row, log of 0)",
    ),
    **dict.fromkeys(("T3", "T4", "T5", "T9"), ANOTHER_PROMPT),
    **dict.fromkeys(("T10", "I8", "I9", "I12", "I14"), ANOTHER_MODEL),
    **dict.fromkeys(("W1", "W2", "W3", "W5", "W15"), OTHER_WEIGHTS),
}
"""Title and fix of a cause that is found in a trainer's numbers."""


def of_trainer(cause: Cause, sampling: SamplingParams) -> Cause:
    """Word a cause that explains a trainer's numbers as the trainer's own.

    Example: S1 found in a trainer's numbers at temperature 0.7 becomes S2.
    """
    cause_id = _forgotten(sampling) if cause.id == "S1" else cause.id
    title, fix = WORDING.get(cause_id, (cause.title, cause.fix))
    evidence = re.sub(r"\b(the )?engine's\b", "your trainer's", cause.evidence)
    evidence = re.sub(r"\b(the )?engine\b", "your trainer", evidence)
    evidence = evidence.replace("the trainer's raw logprobs", "raw logprobs")
    return replace(cause, id=cause_id, title=title, fix=fix, evidence=evidence, side=TRAINER)


def _forgotten(sampling: SamplingParams) -> str:
    """What a trainer that computes raw logprobs leaves out first."""
    if sampling.temperature not in (0, 1):
        return "S2"
    return "S4" if sampling.truncates else "S6"
