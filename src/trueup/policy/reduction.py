"""Running log-sum-exp, entropy and kept mass over a vocabulary that comes block by block.

Shapes: T tokens, C tokens of a chunk, B vocabulary entries of a block. Everything is in nats and in the logits' dtype
(float32, or float64 for a float64 head).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trueup.errors import NumericsError
from trueup.policy.head import Head
from trueup.policy.processing import Distribution, SeenTokens, penalise
from trueup.types import LOGPROB_SLACK

FAR_BELOW = -1e4
"""Nats below which a probability is 0 in any precision; stands in for -inf where -inf times 0 would be NaN."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What one distribution says of the chosen tokens, each [T] and in nats.

    `logprobs_T` is -inf where the token is outside the kept set: count those, never fill them in. `entropy_T` is of
    the same (kept, renormalised) distribution, NaN if it was not asked for; `log_kept_mass_T` is log S <= 0, S the
    tempered mass of the kept set; `kept_T` counts kept tokens; `top_logprobs_T` is the most likely token's logprob.
    `varentropy_T` is the variance of -log p under the same distribution, in nats squared; None unless it was asked for.
    `below_cut_T` says how far a token outside the kept set lies below the least likely one inside, 0 for those inside.
    """

    logprobs_T: Tensor
    entropy_T: Tensor
    log_kept_mass_T: Tensor
    kept_T: Tensor
    top_logprobs_T: Tensor
    varentropy_T: Tensor | None = None
    below_cut_T: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredRows(TokenScores):
    """Scores with what the backward pass needs: logsumexp and the cut between kept and dropped logits."""

    lse_T: Tensor
    cut_T: Tensor

    def first(self, count: int) -> ScoredRows:
        """Return the scores of the first `count` tokens (the rest fills up a tile)."""
        if count == len(self.logprobs_T):
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return ScoredRows(**{name: value[:count] for name, value in values.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is worked out beside logprobs and kept mass; each costs a pass over the block of logits or two."""

    entropy: bool = True
    varentropy: bool = False
    """Needs the entropy."""
    gradient: bool = False
    """Whether a backward pass follows, which needs the cut."""


class Reducer:
    """Running log-sum-exp, entropy and mass of one chunk of tokens under one distribution.

    Fed the finished, penalised logits of the vocabulary block by block, in order. The maximum is updated as blocks
    come (Milakov and Gimelshein, arXiv 1805.02867), so that a row is never needed whole.
    """

    def __init__(
        self, targets_C: Tensor, dist: Distribution, head: Head, cut_C: Tensor | None, *, wanted: Wanted = Wanted(),
        cumulative: bool = False,
    ) -> None:  # fmt: skip
        """`cumulative` keeps what `reached` needs."""
        self.wanted = wanted
        self.passed: list[tuple[Tensor, Tensor]] | None = [] if cumulative else None
        dtype = head.logits_dtype
        self.masked = head.bias_V is not None  # a bias may mask padded vocabulary with -inf

        def zeros() -> Tensor:
            return torch.zeros(targets_C.shape, dtype=dtype, device=targets_C.device)

        self.targets_C, self.dist, self.cut_C = targets_C, dist, cut_C
        self.inverse_temperature = 1 / dist.temperature
        self.top_C = torch.full_like(zeros(), torch.finfo(dtype).min)
        self.dropped_C = torch.full_like(zeros(), -torch.inf)
        self.sum_C, self.moment_C, self.square_C, self.chosen_C, self.full_C, self.kept_C = (zeros() for _ in range(6))

    def update(self, logits_CB: Tensor, start: int, scratch_2CB: Tensor) -> None:
        """Add vocabulary entries start.. ; `scratch_2CB` is overwritten.

        Nothing of a block's size is allocated: small tensors that outlive a block would lie in the holes it leaves, and
        the process would grow by a block each time.
        """
        shifted_CB, weight_CB = scratch_2CB
        top_C = torch.maximum(self.top_C, logits_CB.amax(1))
        drop_C = ((self.top_C - top_C) * self.inverse_temperature).clamp_min(FAR_BELOW)
        rescale_C = drop_C.exp()
        if self.wanted.varentropy:
            self.square_C = (self.square_C + drop_C * (2 * self.moment_C + drop_C * self.sum_C)) * rescale_C
        if self.wanted.entropy:
            self.moment_C = (self.moment_C + self.sum_C * drop_C) * rescale_C
        torch.sub(logits_CB, top_C[:, None], out=shifted_CB)
        if self.inverse_temperature != 1:
            shifted_CB.mul_(self.inverse_temperature)
        if self.masked:
            shifted_CB.clamp_min_(FAR_BELOW)
        if self.cut_C is not None:
            inside_CB = logits_CB >= self.cut_C[:, None]
            self.kept_C += inside_CB.sum(1)
            if self.wanted.gradient:
                dropped_C = weight_CB.copy_(logits_CB).masked_fill_(inside_CB, -torch.inf).amax(1)
                self.dropped_C = torch.maximum(self.dropped_C, dropped_C)
        torch.exp(shifted_CB, out=weight_CB)
        if self.cut_C is not None:
            self.full_C = self.full_C * rescale_C + weight_CB.sum(1)
            weight_CB *= inside_CB
        self.sum_C = self.sum_C * rescale_C + weight_CB.sum(1)
        if self.wanted.entropy:
            self.moment_C += weight_CB.mul_(shifted_CB).sum(1)
        if self.wanted.varentropy:
            self.square_C += weight_CB.mul_(shifted_CB).sum(1)
        self.top_C = top_C
        if self.passed is not None:
            self.passed.append((top_C, self.sum_C))
        local_C = self.targets_C - start
        here_C = (local_C >= 0) & (local_C < logits_CB.shape[1])
        found_C = logits_CB.gather(1, local_C.clamp(0, logits_CB.shape[1] - 1)[:, None])[:, 0]
        self.chosen_C = torch.where(here_C, found_C, self.chosen_C)

    def reached(self) -> Tensor:
        """Mass up to the end of each block [C, blocks], float64, in units of the largest weight."""
        assert self.passed is not None
        scales = [((top_C - self.top_C) * self.inverse_temperature).double().exp() for top_C, _ in self.passed]
        return torch.stack([s * sum_C.double() for s, (_, sum_C) in zip(scales, self.passed, strict=True)], dim=1)

    def choose(self, targets_C: Tensor, logits_CV: Tensor) -> None:
        """Name the tokens to score after the whole vocabulary has been seen."""
        self.targets_C, self.chosen_C = targets_C, logits_CV.gather(1, targets_C[:, None])[:, 0]

    def finish(self, vocab_size: int) -> ScoredRows:
        """Return the scores once the whole vocabulary has been seen."""
        log_sum_C = self.sum_C.log()
        nothing_C = torch.full_like(log_sum_C, torch.nan)
        logprobs_C = (self.chosen_C - self.top_C) * self.inverse_temperature - log_sum_C
        cut_C = torch.full_like(log_sum_C, -torch.inf) if self.cut_C is None else self.cut_C
        return ScoredRows(
            logprobs_T=logprobs_C.masked_fill(self.chosen_C < cut_C, -torch.inf),
            entropy_T=log_sum_C - self.moment_C / self.sum_C if self.wanted.entropy else nothing_C,
            log_kept_mass_T=torch.zeros_like(log_sum_C) if self.cut_C is None else log_sum_C - self.full_C.log(),
            kept_T=(self.kept_C if self.cut_C is not None else torch.full_like(self.kept_C, vocab_size)).long(),
            top_logprobs_T=-log_sum_C,
            lse_T=self.top_C * self.inverse_temperature + log_sum_C,
            varentropy_T=(self.square_C / self.sum_C - (self.moment_C / self.sum_C).square()).clamp_min(0)
            if self.wanted.varentropy
            else None,
            below_cut_T=((cut_C - self.chosen_C) * self.inverse_temperature).clamp_min(0),
            # Halfway to the best dropped token: the backward pass's logits may differ in their last bits.
            cut_T=(cut_C + self.dropped_C) / 2,
        )


def concatenate(parts: Sequence[ScoredRows]) -> ScoredRows:
    """Join chunks of tokens. Raises NumericsError when a row of logits was not finite."""
    names = [f.name for f in fields(ScoredRows) if getattr(parts[0], f.name) is not None]
    rows = ScoredRows(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})
    if bool(torch.isnan(rows.lse_T).any()) or bool(torch.isinf(rows.lse_T).any()):
        raise NumericsError("logits are not finite: the head weight or bias holds NaN or infinity")
    assert float(rows.logprobs_T.max()) <= LOGPROB_SLACK, "a logprob came out above 0"
    return rows


@contextmanager
def penalised(logits: Tensor, dist: Distribution, seen: SeenTokens | None, corner: tuple[int, int]) -> Iterator[None]:
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
