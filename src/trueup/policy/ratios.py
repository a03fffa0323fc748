"""Log ratios between policies: token, segment, sequence and geometric level; backend, staleness and policy share.

Shapes: T tokens (packed), S sequences, G segments (runs of equal weight version inside a sequence). All float64, nats.
Sign, everywhere: log_ratio = trainer - behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.errors import NumericsError


def token_log_ratio(trainer_logprobs_T: Tensor, behaviour_logprobs_T: Tensor) -> Tensor:
    """r_t = log pi_trainer(a_t) - log pi_behaviour(a_t), [T] float64. Raises NumericsError on unequal lengths."""
    if trainer_logprobs_T.shape != behaviour_logprobs_T.shape:
        raise NumericsError(
            f"{tuple(trainer_logprobs_T.shape)} trainer logprobs for {tuple(behaviour_logprobs_T.shape)} behaviour ones"
        )
    return trainer_logprobs_T.double() - behaviour_logprobs_T.double()


def _group_sum(values_T: Tensor, group_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum, count) per distinct group, ordered by group number."""
    _, inverse, counts = torch.unique(group_T, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, values_T.double())
    return sums, counts


def sequence_log_ratio(log_ratio_T: Tensor, row_T: Tensor) -> Tensor:
    """Sum of r over each sequence, [S]: the log importance weight of the whole completion."""
    return _group_sum(log_ratio_T, row_T)[0]


def geometric_log_ratio(log_ratio_T: Tensor, row_T: Tensor) -> Tensor:
    """Mean of r over each sequence, [S]: log of GSPO's length-normalised ratio (arXiv 2507.18071, equation 7)."""
    sums, counts = _group_sum(log_ratio_T, row_T)
    return sums / counts


def segment_of(row_T: Tensor, version_T: Tensor) -> Tensor:
    """Number the segments, [T] long: a new one starts where the sequence or the weight version changes."""
    starts = torch.ones(len(row_T), dtype=torch.long)
    starts[1:] = ((row_T[1:] != row_T[:-1]) | (version_T[1:] != version_T[:-1])).long()
    return starts.cumsum(0) - 1


def segment_log_ratio(log_ratio_T: Tensor, row_T: Tensor, version_T: Tensor) -> Tensor:
    """Sum of r over each run of equal weight version, [G], in order of appearance."""
    return _group_sum(log_ratio_T, segment_of(row_T, version_T))[0]


@dataclass(frozen=True, kw_only=True)
class PolicyLogRatios:
    """The ratio pi/mu taken apart, each [T] float64 in nats; they telescope: backend + staleness + policy = total.

    backend = pi_v / mu: the trainer's arithmetic at the versions stamped on the tokens against what the engine
    reported. staleness = pi_prox / pi_v: those versions against the trainer at the start of the optimiser step.
    policy = pi / pi_prox: the trainer now. Signed nats add; magnitudes do not.
    """

    backend_T: Tensor
    staleness_T: Tensor
    policy_T: Tensor

    @classmethod
    def of(cls, *, behaviour_T: Tensor, stamped_T: Tensor, proximal_T: Tensor, current_T: Tensor) -> PolicyLogRatios:
        """Build from the logprobs of mu, pi_v, pi_prox and pi."""
        return cls(
            backend_T=token_log_ratio(stamped_T, behaviour_T),
            staleness_T=token_log_ratio(proximal_T, stamped_T),
            policy_T=token_log_ratio(current_T, proximal_T),
        )

    @property
    def total_T(self) -> Tensor:
        """log pi - log mu, [T]."""
        return self.backend_T + self.staleness_T + self.policy_T
