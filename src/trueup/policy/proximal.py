"""The old policy of a policy ratio: the behaviour policy itself, the proximal policy, or a guess of it.

Shapes: T completion tokens of a batch. Logprobs in nats, float32 or float64, no gradient. The behaviour logprobs that
the engine reported are never replaced: they stay beside whatever is chosen here, so that a correction can see them.

- bypass: old = mu. The ratio pi/mu holds backend, staleness and policy at once; nothing is left to correct.
- decoupled: old = pi_prox, the trainer's own logprobs at the start of the optimiser step (AReaL, arXiv 2505.24298,
  equation 5). The ratio pi/pi_prox is the policy's alone; pi_prox/mu is left to a correction.
- interpolated: a pi_prox that costs no forward pass, for tokens of known weight versions.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from trueup.errors import NumericsError


class OldPolicy(StrEnum):
    """Which policy is the denominator of the policy ratio."""

    BYPASS = "bypass"
    DECOUPLED = "decoupled"
    INTERPOLATED = "interpolated"


class Component(StrEnum):
    """A share of the log ratio pi/mu; see policy/ratios.py."""

    BACKEND = "backend"
    """pi_v / mu"""
    STALENESS = "staleness"
    """pi_prox / pi_v"""
    POLICY = "policy"
    """pi / pi_prox"""


CLIPPED_BY_OBJECTIVE = {
    OldPolicy.BYPASS: (Component.BACKEND, Component.STALENESS, Component.POLICY),
    OldPolicy.DECOUPLED: (Component.POLICY,),
    OldPolicy.INTERPOLATED: (Component.POLICY,),
}
"""What the objective's ratio pi/old is made of."""
CORRECTED = (Component.BACKEND, Component.STALENESS)
"""What a correction acts on: pi_prox/mu, whatever the old policy is."""


def interpolated(
    current_T: Tensor, behaviour_T: Tensor, version_T: Tensor, *, proximal_version: float, current_version: float
) -> Tensor:
    """log pi_prox ~ log mu + a (log pi - log mu), a = (v_prox - v) / (v_now - v), [T], detached.

    Source: AReaL, docs/algorithms/prox_approx.md. `version_T` are the versions stamped on the tokens; `current_version`
    counts on from `proximal_version` by the optimiser steps taken since. Tokens made by the current version have
    a = 1. Raises NumericsError for versions out of order.
    """
    if current_version < proximal_version or bool((version_T > proximal_version).any()):
        raise NumericsError(
            f"versions out of order: tokens up to {int(version_T.max())}, proximal {proximal_version}, "
            f"current {current_version}"
        )
    behind_T = (current_version - version_T).double()
    share_T = torch.where(behind_T > 0, (proximal_version - version_T) / behind_T.clamp_min(1e-9), 1.0)
    current_T = current_T.detach()
    return behaviour_T + share_T.to(current_T.dtype) * (current_T - behaviour_T)
