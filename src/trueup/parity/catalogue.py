"""Every known root cause by id: which ones this checker can name, and in which order they are looked for."""

from __future__ import annotations

FAMILIES = "STWIRO"
"""Semantic, tokenization, weights, inference, trainer, objective: the order of a migration study."""
SIZES = {"S": 12, "T": 11, "W": 17, "I": 15, "R": 8, "O": 7}
NOT_IMPLEMENTED = (
    "S11", "S12", "T6", "T11", "W6", "W7", "W8", "W13", "W14", "W17", "I7", "I10", "I13", "R6", "R7", "R8",
    "O1", "O2", "O3", "O4", "O5", "O6",
)  # fmt: skip
IMPLEMENTED = tuple(
    cause_id
    for family in FAMILIES
    for n in range(1, SIZES[family] + 1)
    if (cause_id := f"{family}{n}") not in NOT_IMPLEMENTED
)


def order_of(cause_id: str) -> tuple[int, int]:
    """Sort key: family, then number."""
    return FAMILIES.index(cause_id[0]), int(cause_id[1:])
