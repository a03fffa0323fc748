"""What a rollout's cache held: from the versions of its tokens and the updates that passed, to its cache lives.

The keys and values of token t are written when token t + 1 is drawn, so they are of the next token's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trueup.types import CacheLife, KVState


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedUpdate:
    """An update that an engine took: to which version, and whether it cleared the cache."""

    version: int
    cleared: bool


def lives_of(
    prompt_tokens: int,
    versions: Sequence[int],
    passed: Sequence[PassedUpdate],
    *,
    sent_under: int,
    whole_prefill: bool,
) -> tuple[CacheLife, ...]:
    """The lives of a completion's cache, or () when they cannot be known.

    `versions` [T] made its tokens; `passed` are the updates since the request was sent under version `sent_under`, in
    order; a version that was served twice meanwhile says nothing. `whole_prefill`: prompts are computed in one step;
    else a prompt that an update met before its first token may have been computed under two versions.
    """
    assert versions, "a rollout has tokens"
    served = [sent_under, *(update.version for update in passed)]
    if len(set(served)) < len(served) or not set(versions) <= set(served):
        return ()
    life_of_version: dict[int, int] = {}
    cleared = 0
    for update in passed:
        cleared += update.cleared
        life_of_version[update.version] = cleared
    lives: list[tuple[int, list[list[int]]]] = []
    for token, version in enumerate(versions):
        life = life_of_version.get(version, 0)
        if token and life == life_of_version.get(versions[token - 1], 0):
            _append(lives[-1][1], version, 1)
            continue
        if not whole_prefill and _moved_before(version, life, life_of_version):
            return ()
        lives.append((token, [[version, prompt_tokens + token]]))
    return tuple(CacheLife(first_token=first, runs=tuple((v, n) for v, n in runs)) for first, runs in lives)


def kv_state(versions: Sequence[int], lives: Sequence[CacheLife]) -> KVState:
    """KEPT if some token attended to state from other weights than its own; then only a replay reproduces it.

    UNKNOWN without lives.
    """
    if not lives:
        return KVState.UNKNOWN
    ends = [life.first_token for life in lives[1:]] + [len(versions)]
    for life, end in zip(lives, ends, strict=True):
        if len({v for v, _ in life.runs} | set(versions[life.first_token : end])) > 1:
            return KVState.KEPT
    return KVState.CLEARED


def _append(runs: list[list[int]], version: int, positions: int) -> None:
    if runs[-1][0] == version:
        runs[-1][1] += positions
    else:
        runs.append([version, positions])


def _moved_before(version: int, life: int, life_of_version: dict[int, int]) -> bool:
    """Whether an update that kept the cache came between the start of a life and the version of its first token."""
    of_life = [v for v, number in life_of_version.items() if number == life]
    started_by_clearing = life > 0
    return version in of_life and (of_life.index(version) > 0 or not started_by_clearing)
