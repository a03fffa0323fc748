"""The one code path for a logprob: trainer, engine and parity checker all call this file.

From hidden states, head and targets to logprob, entropy and kept mass of the chosen tokens, without ever holding
`[T, V]`: the forward pass keeps one chunk of rows, the backward pass recomputes one block of the vocabulary at a time.

Shapes: T tokens, D hidden width, V vocabulary, C tokens of a chunk, B vocabulary entries of a block. All logprobs,
entropies and masses are float32 (float64 for a float64 head), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trueup.errors import NumericsError
from trueup.policy.head import STREAM_BLOCK, Head
from trueup.policy.processing import Distribution, History, SeenTokens, kept_cut, penalise, ranked
from trueup.policy.reduction import FAR_BELOW, Reducer, ScoredRows, TokenScores, Wanted, concatenate, penalised
from trueup.types import ROW_TILE

ROW_CHUNK_ELEMENTS = 3 * 2**21
"""Logits held at once when whole rows are needed (24 MiB in float32)."""
STREAM_TOKENS = 256
"""Times STREAM_BLOCK: logits exponentiated at a time (2 MiB in float32), few enough to stay in cache."""
GRAD_BLOCK = 1536
GRAD_TOKENS = 2048
"""The backward pass holds GRAD_TOKENS x GRAD_BLOCK logits (12 MiB in float32)."""


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


def rows_at_once(vocab: int) -> int:
    """How many whole rows of logits are held at a time: a multiple of 16, about 24 MiB in float32."""
    return max(ROW_TILE, ROW_CHUNK_ELEMENTS // vocab // ROW_TILE * ROW_TILE)


def pad_to_tiles(rows_T: Tensor) -> Tensor:
    """Append zeros to the first dimension up to a multiple of 16."""
    missing = -len(rows_T) % ROW_TILE
    return torch.cat([rows_T, rows_T.new_zeros(missing, *rows_T.shape[1:])]) if missing else rows_T


def _stream(
    hidden_TD: Tensor, head: Head, targets_T: Tensor, dists: Sequence[Distribution], seen: SeenTokens | None,
    wanted: Wanted,
) -> list[ScoredRows]:  # fmt: skip
    """Score under distributions without a kept set: vocabulary blocks outside, token chunks inside."""
    total = len(targets_T)
    hidden_TD = hidden_TD.to(head.matmul_dtype)
    firsts = range(0, total, STREAM_TOKENS)
    reducers = [
        [Reducer(targets_T[f : f + STREAM_TOKENS], dist, head, None, wanted=wanted) for f in firsts] for dist in dists
    ]
    shape = (min(total, STREAM_TOKENS), min(head.vocab_size, STREAM_BLOCK))
    logits = torch.empty(shape, dtype=head.logits_dtype, device=hidden_TD.device)
    scratch = torch.empty((2, *shape), dtype=head.logits_dtype, device=hidden_TD.device)
    for start, stop, weight_BD in head.weight_blocks(STREAM_BLOCK):
        for index, first in enumerate(firsts):
            hidden_CD = hidden_TD[first : first + STREAM_TOKENS]
            size = (len(hidden_CD), stop - start)
            logits_CB = head.product(hidden_CD, weight_BD, out=logits[: size[0], : size[1]])
            head.finish(logits_CB, start, stop)
            for chunk, dist in zip(reducers, dists, strict=True):
                with penalised(logits_CB, dist, seen, (first, start)):
                    chunk[index].update(logits_CB, start, scratch[:, : size[0], : size[1]])
    return [concatenate([r.finish(head.vocab_size) for r in chunk]) for chunk in reducers]


def _rows(
    hidden_TD: Tensor, head: Head, targets_T: Tensor, dists: Sequence[Distribution], seen: SeenTokens | None,
    wanted: Wanted,
) -> list[ScoredRows]:  # fmt: skip
    """Score under distributions with a kept set, which need a token's whole row of logits at once."""
    parts: list[list[ScoredRows]] = [[] for _ in dists]
    total, vocab = len(targets_T), head.vocab_size
    size = min(total, rows_at_once(vocab))
    buffer = torch.empty(size, vocab, dtype=head.logits_dtype, device=hidden_TD.device)
    scratch = torch.empty(2, size, min(vocab, STREAM_BLOCK), dtype=head.logits_dtype, device=hidden_TD.device)
    for first in range(0, total, size):
        targets_C = targets_T[first : first + size]
        logits_CV = head.logits_into(hidden_TD[first : first + size], buffer[: len(targets_C)])
        plain_CK = None if all(d.penalises for d in dists) else ranked(logits_CV)
        for part, dist in zip(parts, dists, strict=True):
            with penalised(logits_CV, dist, seen, (first, 0)):
                ranked_CK = ranked(logits_CV) if dist.penalises or plain_CK is None else plain_CK
                cut_C = kept_cut(logits_CV, ranked_CK, dist)
                reducer = Reducer(targets_C, dist, head, cut_C, wanted=wanted)
                for start in range(0, vocab, STREAM_BLOCK):
                    block_CB = logits_CV[:, start : start + STREAM_BLOCK]
                    reducer.update(block_CB, start, scratch[:, : len(targets_C), : block_CB.shape[1]])
            part.append(reducer.finish(vocab))
    return [concatenate(p) for p in parts]


def _score_all(
    hidden_TD: Tensor, head: Head, targets_T: Tensor, dists: Sequence[Distribution], seen: SeenTokens | None,
    wanted: Wanted,
) -> list[ScoredRows]:  # fmt: skip
    count = len(targets_T)
    if head.tiled:
        hidden_TD, targets_T = pad_to_tiles(hidden_TD), pad_to_tiles(targets_T)
    scored: dict[Distribution, ScoredRows] = {}
    for truncates, score in ((False, _stream), (True, _rows)):
        kind = [d for d in dict.fromkeys(dists) if d.truncates == truncates]
        if kind:
            scored.update(zip(kind, score(hidden_TD, head, targets_T, kind, seen, wanted), strict=True))
    return [scored[d].first(count) for d in dists]


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
        rows = _score_all(hidden_TD, head, targets_T, [dist], seen, Wanted(gradient=True))[0]
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
        head: Head = replace(ctx.head, tiled=False)
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
    entropy: bool = True,
    varentropy: bool = False,
) -> list[TokenScores]:
    """Score the same tokens under many distributions from one pass over the logits, without gradient.

    Each result equals `token_scores` under that distribution bit for bit; arguments and errors are the same.
    `entropy=False` saves two passes over the logits and leaves `entropy_T` NaN; `varentropy` asks for the variance of
    -log p as well, and brings the entropy with it.
    """
    _check(hidden_TD, head, targets_T)
    wanted = Wanted(entropy=entropy or varentropy, varentropy=varentropy)
    return list(_score_all(hidden_TD, head, targets_T, dists, _seen(history, targets_T, dists), wanted))
