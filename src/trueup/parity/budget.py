"""How much a search for causes may do: counted in tokens that are run through a changed model, not in seconds.

A verdict must not depend on how busy the machine is. A ceiling in wall time is the user's choice, and a search that
either limit cut short says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Budget:
    """What a search may spend; `spent` counts the tokens so far, and `seconds` is a ceiling, None without one.

    Example: `Budget(tokens=1_000_000, spent=lambda: scorer.searched_tokens)`.
    """

    tokens: float
    spent: Callable[[], int]
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether nothing more may be tried."""
        late = self.seconds is not None and time.monotonic() - self.started > self.seconds
        return late or self.spent() > self.tokens


def unlimited() -> Budget:
    """A budget that is never over."""
    return Budget(tokens=float("inf"), spent=lambda: 0)
