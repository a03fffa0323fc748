"""From a step's hidden states to tokens: rows of one distribution are drawn together, through policy/draw.py.

Shapes: T sequences that draw in this step, D hidden width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from trueup.engines.embedded.scheduler import Sequence
from trueup.errors import NumericsError
from trueup.policy.draw import draw, uniform
from trueup.policy.head import Head
from trueup.policy.processing import Distribution, SeenTokens
from trueup.types import LogprobKind, SamplingParams


def sample(
    hidden_TD: Tensor, head: Head, sequences: Rows[Sequence], version: int
) -> list[tuple[Sequence, NumericsError]]:
    """Draw the next token of each sequence and append it with its logprobs and weight version.

    Returns the sequences for which that failed, and why; the others have their token.
    """
    failed: list[tuple[Sequence, NumericsError]] = []
    together: dict[tuple[Distribution, bool], list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        assert sequence.sampling is not None
        together[distribution(sequence.sampling)].append(row)
    for (dist, greedy), rows in together.items():
        states = hidden_TD if len(rows) == len(sequences) else hidden_TD[rows]
        chosen = [sequences[row] for row in rows]
        try:
            _draw(states, head, dist, greedy, chosen, version)
        except NumericsError:  # somebody's logits are not finite: draw one by one to see whose
            for row, sequence in enumerate(chosen):
                try:
                    _draw(states[row : row + 1], head, dist, greedy, [sequence], version)
                except NumericsError as error:
                    failed.append((sequence, error))
    return failed


def _draw(
    states_TD: Tensor, head: Head, dist: Distribution, greedy: bool, sequences: Rows[Sequence], version: int
) -> None:
    if not bool(torch.isfinite(states_TD).all()):
        raise NumericsError("hidden states are not finite")
    noise = None if greedy else torch.tensor([_noise(s) for s in sequences], dtype=torch.float64)
    drawn = draw(states_TD, head, dist, noise, seen=seen_tokens(sequences) if dist.penalises else None)
    scores = drawn.processed or drawn.raw
    columns = (drawn.token_ids_T, scores.logprobs_T, drawn.raw.logprobs_T, scores.log_kept_mass_T)
    for sequence, token, logprob, raw, mass in zip(sequences, *(c.tolist() for c in columns), strict=True):
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        sequence.raw_logprobs.append(raw)
        sequence.log_kept_masses.append(mass)
        sequence.versions.append(version)


def distribution(sampling: SamplingParams) -> tuple[Distribution, bool]:
    """Return what a token is drawn from, and whether greedily (then the temperature is 1 and nothing is cut)."""
    if sampling.temperature > 0:
        return Distribution.of(LogprobKind.PROCESSED, sampling), False
    penalties_only = Distribution(
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
    return penalties_only, True


def _noise(sequence: Sequence) -> float:
    assert sequence.sampling is not None and sequence.sampling.seed is not None, "the engine gives every sample a seed"
    return uniform(sequence.sampling.seed, len(sequence.tokens) - sequence.prompt_tokens)


def seen_tokens(sequences: Rows[Sequence]) -> SeenTokens:
    """The penalty table of one drawing step: row i is about sequence i's next token."""
    rows, ids, counts = [], [], []
    for row, sequence in enumerate(sequences):
        unique = np.unique(np.asarray(sequence.tokens))
        drawn, times = np.unique(np.asarray(sequence.completion, dtype=np.int64), return_counts=True)
        count = np.zeros(len(unique), dtype=np.float32)
        count[np.searchsorted(unique, drawn)] = times
        rows.append(np.full(len(unique), row))
        ids.append(unique)
        counts.append(count)
    id_N = np.concatenate(ids)
    order = np.argsort(id_N, kind="stable")
    return SeenTokens(
        token_N=torch.from_numpy(np.concatenate(rows)[order]),
        id_N=torch.from_numpy(id_N[order]),
        count_N=torch.from_numpy(np.concatenate(counts)[order]),
    )
