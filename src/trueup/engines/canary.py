"""A canary: fixed tokens that an engine scores after an update, against what the trainer's model makes of the weights.

A checksum says what was read, not what the engine computes with. The canary does: it fits the new weights as well as
it fitted those that were served at the start, and the old ones no more.

Shapes: T tokens scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trueup.errors import EngineError
from trueup.model.load import load_model
from trueup.model.scoring import ScoredRow, hidden_states
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores

ROWS, PROMPT_TOKENS, COMPLETION_TOKENS = 3, 8, 16
TOLERANCE_FACTOR = 4.0
SMALLEST_TOLERANCE = 5e-4
"""Nats, rms. A float32 engine is 1e-5 off; no update that matters moves 48 tokens by less."""
START_LIMIT = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Nats, rms, by the engine's dtype: further off than any rounding of it, and another checkpoint is nats away."""


@dataclass(frozen=True, kw_only=True)
class CanaryVerdict:
    """Distances in nats, rms over the canary's tokens: engine to new weights, engine to old ones, new to old.

    `tells`: the weights differ enough for the canary to know them apart.
    """

    to_new: float
    to_old: float
    moved: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"its canary is {self.to_new:.3g} nats from these weights and {self.to_old:.3g} from those before, "
            f"{self.tolerance:.3g} were allowed"
        )

    @property
    def fits(self) -> bool:
        """Whether the engine computes with the new weights, as far as the canary can tell."""
        return self.to_new <= self.tolerance

    @property
    def tells(self) -> bool:
        """Whether an engine that kept the old weights would have been found out."""
        return self.moved > 2 * self.tolerance


class Canary:
    """Holds the trainer's model at the weights that the engine should have now."""

    def __init__(self, path: Path, *, dtype: torch.dtype, head_dtype: torch.dtype, max_length: int) -> None:
        self._model = load_model(path, dtype=dtype)
        self._head_dtype = head_dtype
        self.rows = canary_rows(self._model.vocab_size, max_length)
        self.expected_T = self._scores()
        self.tolerance = SMALLEST_TOLERANCE

    def calibrate(self, engine_T: Tensor) -> float:
        """Take the engine's scores of the weights it serves now as the measure of agreement; returns their rms.

        Raises EngineError when they are too far off to be of these weights.
        """
        distance = rms(engine_T - self.expected_T)
        limit = START_LIMIT[self._model.dtype]
        if not distance <= limit:
            raise EngineError(
                f"the engine's scores of the canary are {distance:.3g} nats from the checkpoint's ({limit:g} at most): "
                "it serves other weights or is configured otherwise: `trueup check --engine URL --model PATH` names it"
            )
        self.tolerance = max(SMALLEST_TOLERANCE, TOLERANCE_FACTOR * distance)
        return distance

    def expect(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Put in new weights and return what the engine should score under them [T]."""
        with torch.no_grad():
            own = self._model.stored_tensors()
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        return self._scores()

    def judge(self, engine_T: Tensor, new_T: Tensor) -> CanaryVerdict:
        """Compare an engine's scores with those expected now and before; if they fit, the new are the old next time."""
        verdict = CanaryVerdict(
            to_new=rms(engine_T - new_T),
            to_old=rms(engine_T - self.expected_T),
            moved=rms(new_T - self.expected_T),
            tolerance=self.tolerance,
        )
        if verdict.fits:
            self.expected_T = new_T
        return verdict

    @torch.no_grad()
    def _scores(self) -> Tensor:
        hidden = hidden_states(self._model, self.rows, batch_rows=ROWS)
        head = Head.of(self._model, self._head_dtype)
        targets_T = torch.tensor([i for row in self.rows for i in row.completion_ids])
        return token_scores(torch.cat(hidden), head, targets_T).logprobs_T.double()


def rms(values_T: Tensor) -> float:
    """Root mean square in float64; infinite when a value is not finite."""
    value = float(values_T.double().square().mean().sqrt())
    return value if value == value else float("inf")


def canary_rows(vocab: int, max_length: int) -> list[ScoredRow]:
    """The fixed tokens that are scored, for a vocabulary and a longest sequence."""
    generator = torch.Generator().manual_seed(0)
    count = min(PROMPT_TOKENS + COMPLETION_TOKENS, max_length - 1)
    ids = torch.randint(vocab, (ROWS, count), generator=generator).tolist()
    split = min(PROMPT_TOKENS, count - 1)
    return [ScoredRow(prompt_ids=tuple(row[:split]), completion_ids=tuple(row[split:])) for row in ids]
