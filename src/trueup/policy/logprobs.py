"""The one code path for a logprob: trainer, engine and parity checker all call this file.

From hidden states, head and targets to logprob, entropy and kept mass of the chosen tokens, without ever holding
`[T, V]`: the forward pass keeps one chunk of rows, the backward pass recomputes one block of the vocabulary at a time.

Shapes: T tokens, D hidden width, V vocabulary, C tokens of a chunk, B vocabulary entries of a block. All logprobs,
entropies and masses are float32 (float64 for a float64 head), in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trueup.errors import NumericsError
from trueup.policy.head import Head
from trueup.policy.processing import Distribution, History, SeenTokens, kept_cut, penalise, ranked
from trueup.types import LOGPROB_SLACK

ROW_CHUNK_ELEMENTS = 3 * 2**21
"""Logits held at once when whole rows are needed (24 MiB in float32)."""
STREAM_BLOCK = 2048
STREAM_TOKENS = 256
"""Logits exponentiated at a time (2 MiB in float32): small enough to stay in cache."""
FAR_BELOW = -1e4
"""Nats below which a probability is 0 in any precision; stands in for -inf where -inf times 0 would be NaN."""
GRAD_BLOCK = 1536
GRAD_TOKENS = 2048
"""The backward pass holds GRAD_TOKENS x GRAD_BLOCK logits (12 MiB in float32)."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What one distribution says of the chosen tokens, each [T] and in nats.

    `logprobs_T` is -inf where the token is outside the kept set: count those, never fill them in. `entropy_T` is of
    the same (kept, renormalised) distribution; `log_kept_mass_T` is log S <= 0, S the tempered mass of the kept set;
    `kept_T` counts kept tokens; `top_logprobs_T` is the most likely token's logprob.
    """

    logprobs_T: Tensor
    entropy_T: Tensor
    log_kept_mass_T: Tensor
    kept_T: Tensor
    top_logprobs_T: Tensor


@dataclass(frozen=True, kw_only=True)
class _Rows(TokenScores):
    lse_T: Tensor
    cut_T: Tensor


class _Reducer:
    """Running log-sum-exp, entropy and mass of one chunk of tokens under one distribution.

    Fed the finished, penalised logits of the vocabulary block by block, in order. The maximum is updated as blocks
    come (Milakov and Gimelshein, arXiv 1805.02867), so that a row is never needed whole.
    """

    def __init__(self, targets_C: Tensor, dist: Distribution, head: Head, cut_C: Tensor | None) -> None:
        dtype = head.logits_dtype
        self.masked = head.bias_V is not None  # a bias may mask padded vocabulary with -inf

        def zeros() -> Tensor:
            return torch.zeros(targets_C.shape, dtype=dtype, device=targets_C.device)

        self.targets_C, self.dist, self.cut_C = targets_C, dist, cut_C
        self.inverse_temperature = 1 / dist.temperature
        self.top_C = torch.full_like(zeros(), torch.finfo(dtype).min)
        self.dropped_C = torch.full_like(zeros(), -torch.inf)
        self.sum_C, self.moment_C, self.chosen_C, self.full_C, self.kept_C = (zeros() for _ in range(5))

    def update(self, logits_CB: Tensor, start: int, scratch_CB: Tensor) -> None:
        """Add vocabulary entries start.. ; `scratch_CB` is overwritten."""
        top_C = torch.maximum(self.top_C, logits_CB.amax(1))
        drop_C = ((self.top_C - top_C) * self.inverse_temperature).clamp_min(FAR_BELOW)
        rescale_C = drop_C.exp()
        self.moment_C = (self.moment_C + self.sum_C * drop_C) * rescale_C
        shifted_CB = torch.sub(logits_CB, top_C[:, None], out=scratch_CB)
        if self.inverse_temperature != 1:
            shifted_CB.mul_(self.inverse_temperature)
        if self.masked:
            shifted_CB.clamp_min_(FAR_BELOW)
        weight_CB = shifted_CB.exp()
        if self.cut_C is not None:
            self.full_C = self.full_C * rescale_C + weight_CB.sum(1)
            inside_CB = logits_CB >= self.cut_C[:, None]
            weight_CB *= inside_CB
            self.kept_C += inside_CB.sum(1)
            dropped_C = logits_CB.masked_fill(inside_CB, -torch.inf).amax(1)
            self.dropped_C = torch.maximum(self.dropped_C, dropped_C)
        self.sum_C = self.sum_C * rescale_C + weight_CB.sum(1)
        self.moment_C += shifted_CB.mul_(weight_CB).sum(1)
        self.top_C = top_C
        local_C = self.targets_C - start
        here_C = (local_C >= 0) & (local_C < logits_CB.shape[1])
        found_C = logits_CB.gather(1, local_C.clamp(0, logits_CB.shape[1] - 1)[:, None])[:, 0]
        self.chosen_C = torch.where(here_C, found_C, self.chosen_C)

    def finish(self, vocab_size: int) -> _Rows:
        """Return the scores once the whole vocabulary has been seen."""
        log_sum_C = self.sum_C.log()
        logprobs_C = (self.chosen_C - self.top_C) * self.inverse_temperature - log_sum_C
        cut_C = torch.full_like(log_sum_C, -torch.inf) if self.cut_C is None else self.cut_C
        return _Rows(
            logprobs_T=logprobs_C.masked_fill(self.chosen_C < cut_C, -torch.inf),
            entropy_T=log_sum_C - self.moment_C / self.sum_C,
            log_kept_mass_T=torch.zeros_like(log_sum_C) if self.cut_C is None else log_sum_C - self.full_C.log(),
            kept_T=(self.kept_C if self.cut_C is not None else torch.full_like(self.kept_C, vocab_size)).long(),
            top_logprobs_T=-log_sum_C,
            lse_T=self.top_C * self.inverse_temperature + log_sum_C,
            # Halfway to the best dropped token: the backward pass's logits may differ in their last bits.
            cut_T=(cut_C + self.dropped_C) / 2,
        )


def _check(hidden_TD: Tensor, head: Head, targets_T: Tensor) -> None:
    if hidden_TD.ndim != 2 or hidden_TD.shape[1] != head.weight_VD.shape[1]:
        raise NumericsError(
            f"hidden states {tuple(hidden_TD.shape)} do not fit a head of {tuple(head.weight_VD.shape)}"
        )
    if targets_T.shape != hidden_TD.shape[:1]:
        raise NumericsError(f"{tuple(targets_T.shape)} targets for {hidden_TD.shape[0]} hidden states")
    if not len(targets_T):
        raise NumericsError("no tokens to score")
    if int(targets_T.min()) < 0 or int(targets_T.max()) >= head.vocab_size:
        raise NumericsError(f"target ids reach {int(targets_T.max())}, the vocabulary has {head.vocab_size} entries")
    if not bool(torch.isfinite(hidden_TD).all()):
        bad = (~torch.isfinite(hidden_TD)).any(1).nonzero()[:, 0]
        raise NumericsError(
            f"hidden states are not finite at {len(bad)} of {len(targets_T)} tokens, first at {int(bad[0])}"
        )


def _concatenate(parts: Sequence[_Rows]) -> _Rows:
    names = ("logprobs_T", "entropy_T", "log_kept_mass_T", "kept_T", "top_logprobs_T", "lse_T", "cut_T")
    rows = _Rows(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})
    if bool(torch.isnan(rows.lse_T).any()) or bool(torch.isinf(rows.lse_T).any()):
        raise NumericsError("logits are not finite: the head weight or bias holds NaN or infinity")
    assert float(rows.logprobs_T.max()) <= LOGPROB_SLACK, "a logprob came out above 0"
    return rows


def _stream(
    hidden_TD: Tensor, head: Head, targets_T: Tensor, dists: Sequence[Distribution], seen: SeenTokens | None
) -> list[_Rows]:
    """Score under distributions without a kept set: vocabulary blocks outside, token chunks inside."""
    total = len(targets_T)
    hidden_TD = hidden_TD.to(head.matmul_dtype)
    firsts = range(0, total, STREAM_TOKENS)
    reducers = [[_Reducer(targets_T[f : f + STREAM_TOKENS], dist, head, None) for f in firsts] for dist in dists]
    shape = (min(total, STREAM_TOKENS), min(head.vocab_size, STREAM_BLOCK))
    logits = torch.empty(shape, dtype=head.logits_dtype, device=hidden_TD.device)
    scratch = torch.empty_like(logits)
    for start, stop, weight_BD in head.weight_blocks(STREAM_BLOCK):
        for index, first in enumerate(firsts):
            hidden_CD = hidden_TD[first : first + STREAM_TOKENS]
            size = (len(hidden_CD), stop - start)
            logits_CB = head.product(hidden_CD, weight_BD, out=logits[: size[0], : size[1]])
            head.finish(logits_CB, start, stop)
            for chunk, dist in zip(reducers, dists, strict=True):
                with _penalised(logits_CB, dist, seen, (first, start)):
                    chunk[index].update(logits_CB, start, scratch[: size[0], : size[1]])
    return [_concatenate([r.finish(head.vocab_size) for r in chunk]) for chunk in reducers]


def _rows(
    hidden_TD: Tensor, head: Head, targets_T: Tensor, dists: Sequence[Distribution], seen: SeenTokens | None
) -> list[_Rows]:
    """Score under distributions with a kept set, which need a token's whole row of logits at once."""
    parts: list[list[_Rows]] = [[] for _ in dists]
    total, vocab = len(targets_T), head.vocab_size
    size = min(total, max(1, ROW_CHUNK_ELEMENTS // vocab))
    buffer = torch.empty(size, vocab, dtype=head.logits_dtype, device=hidden_TD.device)
    scratch = torch.empty(size, min(vocab, STREAM_BLOCK), dtype=head.logits_dtype, device=hidden_TD.device)
    for first in range(0, total, size):
        targets_C = targets_T[first : first + size]
        logits_CV = head.logits_into(hidden_TD[first : first + size], buffer[: len(targets_C)])
        plain_CK = None if all(d.penalises for d in dists) else ranked(logits_CV)
        for part, dist in zip(parts, dists, strict=True):
            with _penalised(logits_CV, dist, seen, (first, 0)):
                ranked_CK = ranked(logits_CV) if dist.penalises or plain_CK is None else plain_CK
                reducer = _Reducer(targets_C, dist, head, kept_cut(logits_CV, ranked_CK, dist))
                for start in range(0, vocab, STREAM_BLOCK):
                    block_CB = logits_CV[:, start : start + STREAM_BLOCK]
                    reducer.update(block_CB, start, scratch[: len(targets_C), : block_CB.shape[1]])
            part.append(reducer.finish(vocab))
    return [_concatenate(p) for p in parts]


@contextmanager
def _penalised(logits: Tensor, dist: Distribution, seen: SeenTokens | None, corner: tuple[int, int]) -> Iterator[None]:
    """Apply a distribution's penalties to a block in place for as long as the context lasts."""
    if not dist.penalises:
        yield
        return
    assert seen is not None
    row, column, count = seen.block((corner[0], corner[0] + logits.shape[0]), (corner[1], corner[1] + logits.shape[1]))
    plain_N = logits[row, column]
    logits[row, column] = penalise(plain_N, count, dist)[0]
    yield
    logits[row, column] = plain_N


def _score_all(
    hidden_TD: Tensor, head: Head, targets_T: Tensor, dists: Sequence[Distribution], seen: SeenTokens | None
) -> list[_Rows]:
    scored: dict[Distribution, _Rows] = {}
    for truncates, score in ((False, _stream), (True, _rows)):
        kind = [d for d in dict.fromkeys(dists) if d.truncates == truncates]
        if kind:
            scored.update(zip(kind, score(hidden_TD, head, targets_T, kind, seen), strict=True))
    return [scored[d] for d in dists]


def _seen(history: History | None, targets_T: Tensor, dists: Sequence[Distribution]) -> SeenTokens | None:
    if not any(d.penalises for d in dists):
        return None
    if history is None:
        raise NumericsError("penalties depend on the tokens seen before: pass history")
    return SeenTokens.of(history, targets_T)


class _ChosenLogprob(torch.autograd.Function):
    """Logprob and entropy with a backward pass that recomputes logits one vocabulary block at a time."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor,
        head: Head, dist: Distribution, seen: SeenTokens | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rows = _score_all(hidden_TD, head, targets_T, [dist], seen)[0]
        ctx.head, ctx.dist, ctx.seen = head, dist, seen
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, rows.lse_T, rows.cut_T, rows.entropy_T)
        ctx.mark_non_differentiable(rows.log_kept_mass_T, rows.kept_T, rows.top_logprobs_T)
        ctx.set_materialize_grads(False)
        return rows.logprobs_T, rows.entropy_T, rows.log_kept_mass_T, rows.kept_T, rows.top_logprobs_T

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprob_T, grad_entropy_T = grads[:2]
        hidden_TD, weight_VD, bias_V, targets_T, lse_T, cut_T, entropy_T = ctx.saved_tensors
        if grad_logprob_T is None and grad_entropy_T is None:
            return (None,) * 7
        if grad_logprob_T is None:
            grad_logprob_T = torch.zeros_like(lse_T)
        head: Head = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        working = hidden_TD.to(head.matmul_dtype)
        grad_hidden = torch.zeros_like(hidden_TD, dtype=head.logits_dtype) if wants_hidden else None
        grad_weight = torch.empty_like(weight_VD) if wants_weight else None
        grad_bias = torch.empty_like(bias_V) if wants_bias else None
        for start, stop, weight_BD in head.weight_blocks(GRAD_BLOCK):
            block_weight = torch.zeros_like(weight_BD, dtype=head.logits_dtype) if wants_weight else None
            block_bias = weight_BD.new_zeros(stop - start, dtype=head.logits_dtype) if wants_bias else None
            for first in range(0, len(targets_T), GRAD_TOKENS):
                tokens = slice(first, first + GRAD_TOKENS)
                logits_CB = head.finish(head.product(working[tokens], weight_BD), start, stop)
                grad_CB = _grad_block(
                    logits_CB, (first, start), ctx.dist, ctx.seen, targets_T[tokens], lse_T[tokens], cut_T[tokens],
                    grad_logprob_T[tokens],
                    None if grad_entropy_T is None else (grad_entropy_T[tokens], entropy_T[tokens]),
                    keep_logits=head.softcap is not None, masked=head.bias_V is not None,
                )  # fmt: skip
                grad_CB = head.finish_grad(grad_CB, logits_CB)
                if block_bias is not None:
                    block_bias += grad_CB.sum(0)
                grad_CB = grad_CB.to(head.matmul_dtype)
                if grad_hidden is not None:
                    _add_product(grad_hidden[tokens], grad_CB, weight_BD)
                if block_weight is not None:
                    _add_product(block_weight, grad_CB.T, working[tokens])
            if grad_weight is not None and block_weight is not None:
                grad_weight[start:stop] = block_weight
            if grad_bias is not None and block_bias is not None:
                grad_bias[start:stop] = block_bias
        return (None if grad_hidden is None else grad_hidden.to(hidden_TD.dtype)), grad_weight, grad_bias, *(None,) * 4


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulating in the dtype of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _grad_block(
    logits_CB: Tensor, corner: tuple[int, int], dist: Distribution, seen: SeenTokens | None, targets_C: Tensor,
    lse_C: Tensor, cut_C: Tensor, grad_logprob_C: Tensor, entropy: tuple[Tensor, Tensor] | None, *, keep_logits: bool,
    masked: bool,
) -> Tensor:  # fmt: skip
    """Gradient by the finished logits of one block: g (1[v = chosen] - p_v) - g_H p_v (log p_v + H), over T."""
    inverse_temperature = 1 / dist.temperature
    penalised_CB = logits_CB.clone() if keep_logits else logits_CB
    where, slope_N = None, None
    if seen is not None and dist.penalises:
        first, start = corner
        row, column, count = seen.block((first, first + logits_CB.shape[0]), (start, start + logits_CB.shape[1]))
        where = (row, column)
        penalised_CB[where], slope_N = penalise(penalised_CB[where], count, dist)
    outside_CB = penalised_CB < cut_C[:, None] if dist.truncates else None
    logprob_CB = penalised_CB.mul_(inverse_temperature).sub_(lse_C[:, None])
    if masked:
        logprob_CB.clamp_min_(FAR_BELOW)
    if entropy is None:
        grad_CB = logprob_CB.exp_().mul_(-grad_logprob_C[:, None])
    else:
        grad_entropy_C, entropy_C = entropy
        weight_CB = (logprob_CB + entropy_C[:, None]).mul_(grad_entropy_C[:, None]).add_(grad_logprob_C[:, None])
        grad_CB = logprob_CB.exp_().mul_(weight_CB).neg_()
    if outside_CB is not None:
        grad_CB.masked_fill_(outside_CB, 0.0)
    local_C = targets_C - corner[1]
    chosen = ((local_C >= 0) & (local_C < logits_CB.shape[1])).nonzero()[:, 0]
    grad_CB[chosen, local_C[chosen]] += grad_logprob_C[chosen]
    grad_CB *= inverse_temperature
    if where is not None and slope_N is not None:
        grad_CB[where] *= slope_N
    return grad_CB


def token_scores(
    hidden_TD: Tensor,
    head: Head,
    targets_T: Tensor,
    *,
    dist: Distribution | None = None,
    history: History | None = None,
) -> TokenScores:
    """Score the chosen tokens under one distribution (raw by default), differentiable in hidden states and head.

    `hidden_TD` (any float dtype) predicts `targets_T` (long): row t is the state *before* token t. Gradients reach
    `hidden_TD`, `head.weight_VD` and `head.bias_V` through logprob and entropy; the kept set is a constant. `history`
    is needed when the distribution penalises. Raises NumericsError for non-finite states or logits, ids outside the
    vocabulary, or an empty batch.
    """
    dist = dist or Distribution()
    _check(hidden_TD, head, targets_T)
    seen = _seen(history, targets_T, [dist])
    values = _ChosenLogprob.apply(hidden_TD, head.weight_VD, head.bias_V, targets_T, head, dist, seen)
    names = ("logprobs_T", "entropy_T", "log_kept_mass_T", "kept_T", "top_logprobs_T")
    return TokenScores(**dict(zip(names, values, strict=True)))


@torch.no_grad()
def token_scores_under(
    hidden_TD: Tensor,
    head: Head,
    targets_T: Tensor,
    *,
    dists: Sequence[Distribution],
    history: History | None = None,
) -> list[TokenScores]:
    """Score the same tokens under many distributions from one pass over the logits, without gradient.

    Each result equals `token_scores` under that distribution bit for bit; arguments and errors are the same.
    """
    _check(hidden_TD, head, targets_T)
    return list(_score_all(hidden_TD, head, targets_T, dists, _seen(history, targets_T, dists)))
