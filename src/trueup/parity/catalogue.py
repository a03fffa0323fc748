"""Every known root cause by id: which ones this checker can name, and in which order they are looked for."""

from __future__ import annotations

FAMILIES = "STWIRO"
"""Semantic, tokenization, weights, inference, trainer, objective: the order of a migration study."""
SIZES = {"S": 14, "T": 11, "W": 17, "I": 15, "R": 8, "O": 7}
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


SEPARATED_BY = {
    frozenset({"S1", "S4"}): "a temperature other than 1 (--sampling)",
    frozenset({"S1", "S6"}): "a temperature other than 1 (--sampling)",
    frozenset({"S1", "S3"}): "another temperature, or top-p (--sampling)",
    frozenset({"S3", "I14"}): "the engine's scores of given tokens at T=1 (prompt_logprobs, --engine)",
    frozenset({"I5", "W12"}): "a control before an update (--allow-updates)",
    frozenset({"W1", "W2"}): "more older weights (--checkpoints)",
    frozenset({"I8", "I9"}): "longer prompts: a window has a knee, a rotary base a slope",
    frozenset({"S9", "T7"}): "completions that end by themselves, not by length",
}
STEPS = "more tokens (--set check.tokens=128), or float32 on both sides for a lower floor"


def separated_by(ids: tuple[str, ...]) -> str:
    """The probe that would tell a group of causes apart."""
    pairs = (frozenset({a, b}) for a in ids for b in ids if a != b)
    return next((SEPARATED_BY[pair] for pair in pairs if pair in SEPARATED_BY), STEPS)


def order_of(cause_id: str) -> tuple[int, int]:
    """Sort key: family, then number."""
    return FAMILIES.index(cause_id[0]), int(cause_id[1:])
