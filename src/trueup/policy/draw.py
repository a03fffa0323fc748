"""Drawing a token: from hidden state and noise to the token and its scores, reproducible by whoever has both.

The noise of a token is one number in [0, 1), a pure function of (seed, position). The token is the first whose
cumulative probability exceeds it (inverse transform sampling; Devroye, Non-Uniform Random Variate Generation, 1986,
section II.2), so the same logits and the same noise draw the same token, in the engine and in the trainer alike.

Shapes: T tokens, D hidden width, V vocabulary, C tokens of a chunk, B vocabulary entries of a block. Logprobs are in
nats and float32; the cumulative sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.errors import NumericsError
from trueup.policy.head import STREAM_BLOCK, Head
from trueup.policy.logprobs import pad_to_tiles, rows_at_once
from trueup.policy.processing import Distribution, SeenTokens, kept_cut, ranked
from trueup.policy.reduction import Reducer, TokenScores, Wanted, concatenate, penalised

_MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Drawn tokens [T] and their scores under the raw distribution and the one they were drawn from.

    A greedy token has no processed logprob (all mass lies on it): `processed` is None.
    Entropies are not computed (NaN).
    """

    token_ids_T: Tensor
    raw: TokenScores
    processed: TokenScores | None


def uniform(seed: int, position: int) -> float:
    """The noise of completion token `position`: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of both, in [0, 1)."""
    return (_mix(_mix(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53


def sample_seed(seed: int, sample: int) -> int:
    """The seed of the n-th completion of a request: the request's own for the first, derived for the others."""
    return seed if sample == 0 else _mix(_mix(seed & _MASK) + sample & _MASK) >> 1


def _mix(value: int) -> int:
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


@torch.no_grad()
def draw(
    hidden_TD: Tensor, head: Head, dist: Distribution, noise_T: Tensor | None, *, seen: SeenTokens | None = None
) -> Draws:
    """Draw one token for each hidden state and score it; every row has the same distribution.

    `noise_T` (float64, in [0, 1)) comes from `uniform`; None draws greedily, the largest logit after penalties. `seen`
    is needed when the distribution penalises. The scores equal `token_scores` of the drawn tokens. Raises
    NumericsError when logits are not finite.
    """
    if dist.penalises and seen is None:
        raise NumericsError("penalties depend on the tokens seen before: pass seen")
    count = len(hidden_TD)
    if head.tiled:
        hidden_TD = pad_to_tiles(hidden_TD)
        noise_T = None if noise_T is None else pad_to_tiles(noise_T)
    total, vocab = len(hidden_TD), head.vocab_size
    size = min(total, rows_at_once(vocab))
    buffer = torch.empty(size, vocab, dtype=head.logits_dtype, device=hidden_TD.device)
    scratch = torch.empty(2, size, min(vocab, STREAM_BLOCK), dtype=head.logits_dtype, device=hidden_TD.device)
    tokens, raws, drawn_from = [], [], []
    greedy = noise_T is None
    shaped = not greedy and (dist.temperature != 1 or dist.truncates or dist.penalises)
    for first in range(0, total, size):
        logits_CV = head.logits_into(hidden_TD[first : first + size], buffer[: min(size, total - first)])
        raw = _reduce(logits_CV, Distribution(), head, None, scratch)
        with penalised(logits_CV, dist, seen, (first, 0)):
            cut_C = kept_cut(logits_CV, ranked(logits_CV), dist) if dist.truncates else None
            own = _reduce(logits_CV, dist, head, cut_C, scratch) if shaped else raw
            if noise_T is None:
                token_C = logits_CV.argmax(1)
            else:
                token_C = _inverse_cdf(logits_CV, own, noise_T[first : first + size])
            if shaped:
                own.choose(token_C, logits_CV)
                drawn_from.append(own.finish(vocab))
        raw.choose(token_C, logits_CV)
        raws.append(raw.finish(vocab))
        tokens.append(token_C)
    scored = concatenate(raws).first(count)
    processed = concatenate(drawn_from).first(count) if shaped else None if greedy else scored
    return Draws(token_ids_T=torch.cat(tokens)[:count], raw=scored, processed=processed)


def _reduce(logits_CV: Tensor, dist: Distribution, head: Head, cut_C: Tensor | None, scratch: Tensor) -> Reducer:
    """Take a chunk's whole vocabulary in, block by block as scoring does; the tokens are chosen afterwards."""
    count, vocab = logits_CV.shape
    unknown_C = torch.zeros(count, dtype=torch.long, device=logits_CV.device)
    reducer = Reducer(unknown_C, dist, head, cut_C, wanted=Wanted(entropy=False), cumulative=True)
    for start in range(0, vocab, STREAM_BLOCK):
        block_CB = logits_CV[:, start : start + STREAM_BLOCK]
        reducer.update(block_CB, start, scratch[:, :count, : block_CB.shape[1]])
    return reducer


def _inverse_cdf(logits_CV: Tensor, own: Reducer, noise_C: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds noise times the total; never one outside the kept set."""
    vocab = logits_CV.shape[1]
    reached_CN = own.reached()
    total_C = reached_CN[:, -1]
    goal_C = torch.minimum(noise_C * total_C, torch.nextafter(total_C, torch.zeros_like(total_C)))  # noise may round up
    block_C = (reached_CN <= goal_C[:, None]).sum(1).clamp_max(reached_CN.shape[1] - 1)
    before_CN = torch.cat([torch.zeros_like(reached_CN[:, :1]), reached_CN[:, :-1]], dim=1)
    before_C = before_CN.gather(1, block_C[:, None])
    column_CB = block_C[:, None] * STREAM_BLOCK + torch.arange(min(STREAM_BLOCK, vocab), device=block_C.device)
    inside_CB = column_CB < vocab
    logits_CB = logits_CV.gather(1, column_CB.clamp_max(vocab - 1))
    if own.cut_C is not None:
        inside_CB &= logits_CB >= own.cut_C[:, None]
    weight_CB = ((logits_CB - own.top_C[:, None]) * own.inverse_temperature).exp().mul_(inside_CB).double()
    passed_C = (weight_CB.cumsum(1) <= goal_C[:, None] - before_C).sum(1)
    last_C = (weight_CB > 0).long().mul_(torch.arange(1, weight_CB.shape[1] + 1, device=block_C.device)).amax(1) - 1
    # Logits that are not finite lead nowhere; their tokens are refused when the scores are joined.
    return (block_C * STREAM_BLOCK + torch.minimum(passed_C, last_C)).clamp(0, vocab - 1)
