"""Parity: does the engine report what the trainer computes, and if not, why not.

Probe -> Evidence -> Hypothesis -> Attribution -> ParityReport. `check_rollouts` is the way in for other frameworks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trueup.parity.rollouts import check_rollouts

__all__ = ["check_rollouts"]


def __getattr__(name: str) -> object:
    """Load the function when it is asked for: it brings torch with it."""
    if name == "check_rollouts":
        from trueup.parity.rollouts import check_rollouts

        return check_rollouts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
