"""What an engine does to logits before it samples: penalties, temperature, then the kept set.

Shapes: T tokens, V vocabulary, C tokens of a chunk, N entries of the sparse penalty table.

The kept set is held as one number a token, `cut`: a token is kept if its tempered logit is at least that. (Engines
split exact ties at the cut by sort order; here ties are kept. Only a bf16 head has exact ties worth the name.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trueup.errors import NumericsError
from trueup.types import LogprobKind, SamplingParams

RANKED = 512
"""Largest logits looked at first for top-p."""
WIDENING = 8
"""Rows whose nucleus is wider are looked at again, this many times as far down."""
LSE_BLOCK = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Which distribution a logprob is of. The default is the raw one: log_softmax of the model's own logits.

    Order, as in vLLM: repetition, frequency and presence penalty; temperature; then min-p before (V1) or after (V0)
    top-k and top-p. `min_p_first` is that one difference; with top-p in force the two keep different sets.
    `temperature_last` is llama.cpp's order: kept sets are those of T=1, and what is kept is tempered.
    """

    temperature: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_p_first: bool = True
    temperature_last: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise NumericsError(
                f"a logprob at temperature {self.temperature:g} is not defined (greedy puts all mass on one token); "
                "score greedy rollouts as raw"
            )
        if not (0 < self.top_p <= 1 and self.top_k >= 0 and 0 <= self.min_p <= 1 and self.repetition_penalty > 0):
            raise NumericsError(f"not a distribution: {self}")

    @classmethod
    def of(cls, kind: LogprobKind, sampling: SamplingParams, *, min_p_first: bool = True) -> Distribution:
        """Return the distribution that `kind` names under `sampling`. Raises NumericsError at temperature 0."""
        if kind == LogprobKind.RAW:
            return cls()
        if kind == LogprobKind.TEMPERED:
            return cls(temperature=sampling.temperature)
        return cls(
            temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            min_p_first=min_p_first or not sampling.min_p,
        )

    @property
    def truncates(self) -> bool:
        """Whether a kept set smaller than the vocabulary is in force."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def penalises(self) -> bool:
        """Whether tokens already seen change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, kw_only=True)
class History:
    """Which tokens had been seen before each scored token: `row_T` numbers the completion a token belongs to
    (tokens of a completion in order), `prompts[row]` holds that completion's prompt ids.

    Engines that count otherwise: with `prompt_counts` presence and frequency see the prompt as well; `lag` is how many
    of the latest tokens are not seen yet.
    """

    row_T: Tensor
    prompts: tuple[Tensor, ...]
    prompt_counts: bool = False
    lag: int = 0


@dataclass(frozen=True, kw_only=True)
class SeenTokens:
    """Sparse table of (scored token, vocabulary id seen before it), sorted by id.

    `token_N` indexes the scored tokens, `id_N` the vocabulary, `count_N` counts earlier completion tokens of that id
    (0 if it stands in the prompt only).
    """

    token_N: Tensor
    id_N: Tensor
    count_N: Tensor

    @classmethod
    def of(cls, history: History, targets_T: Tensor) -> SeenTokens:
        """Build the table; `targets_T` are the completion tokens themselves."""
        tokens, ids, counts = [], [], []
        for row, prompt in enumerate(history.prompts):
            index = (history.row_T == row).nonzero()[:, 0]
            if not len(index):
                continue
            completion = targets_T[index]
            vocabulary, inverse = torch.unique(torch.cat([prompt.to(completion), completion]), return_inverse=True)
            one_hot = torch.zeros(len(index), len(vocabulary), device=targets_T.device)
            one_hot[torch.arange(len(index), device=index.device), inverse[len(prompt) :]] = 1
            count = one_hot.cumsum(0) - one_hot
            if history.lag:
                count = torch.cat([torch.zeros_like(count[: history.lag]), count[: -history.lag]])[: len(count)]
            if history.prompt_counts:
                count += torch.bincount(inverse[: len(prompt)], minlength=len(vocabulary)).to(count)
            seen = count > 0
            seen[:, inverse[: len(prompt)]] = True
            at, which = seen.nonzero(as_tuple=True)
            tokens.append(index[at])
            ids.append(vocabulary[which])
            counts.append(count[at, which])
        token_N, id_N, count_N = torch.cat(tokens), torch.cat(ids), torch.cat(counts)
        order = id_N.argsort(stable=True)
        return cls(token_N=token_N[order], id_N=id_N[order], count_N=count_N[order])

    def block(self, tokens: tuple[int, int], vocab: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (row, column, count) of the entries inside a block, relative to its corner."""
        low, high = torch.searchsorted(self.id_N, torch.tensor(vocab, device=self.id_N.device)).tolist()
        token_N = self.token_N[low:high]
        inside = (token_N >= tokens[0]) & (token_N < tokens[1])
        return token_N[inside] - tokens[0], self.id_N[low:high][inside] - vocab[0], self.count_N[low:high][inside]


def penalise(logits_N: Tensor, count_N: Tensor, dist: Distribution) -> tuple[Tensor, Tensor]:
    """Apply the penalties to the logits of seen tokens: (new logits, their derivative by the old ones).

    Repetition divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858, section 4.1, in the
    sign-aware form every engine uses); frequency subtracts per occurrence, presence once.
    """
    slope_N = torch.where(logits_N > 0, 1 / dist.repetition_penalty, dist.repetition_penalty).to(logits_N)
    shift_N = dist.frequency_penalty * count_N + dist.presence_penalty * (count_N > 0)
    return logits_N * slope_N - shift_N, slope_N


def ranked(logits_CV: Tensor) -> Tensor:
    """The largest logits of each row, descending [C, RANKED]: enough for most kept sets, and shared between them."""
    return logits_CV.topk(min(RANKED, logits_CV.shape[1]), dim=1).values


def _tempered_lse(logits_CV: Tensor, floor_C: Tensor, inverse_temperature: float) -> Tensor:
    """logsumexp of logits / T over logits >= floor, in cache-sized blocks."""
    top_C = logits_CV.amax(1, keepdim=True)
    total_C = torch.zeros_like(floor_C)
    for block_CB in logits_CV.split(LSE_BLOCK, dim=1):
        weight_CB = (block_CB - top_C).mul_(inverse_temperature).exp_()
        total_C += weight_CB.mul_(block_CB >= floor_C[:, None]).sum(1)
    return top_C[:, 0] * inverse_temperature + total_C.log()


def _nucleus_cut(logits_CV: Tensor, ranked_CK: Tensor, floor_C: Tensor, dist: Distribution) -> Tensor:
    """Smallest logit inside the nucleus of the distribution restricted to logits >= floor."""
    inverse_temperature = 1 / dist.temperature
    lse_C = _tempered_lse(logits_CV, floor_C, inverse_temperature)

    def cut(values_CK: Tensor, floor_C: Tensor, lse_C: Tensor) -> tuple[Tensor, Tensor]:
        probability_CK = (values_CK.double() * inverse_temperature - lse_C.double()[:, None]).exp()
        probability_CK.masked_fill_(values_CK < floor_C[:, None], 0.0)
        mass_CK = probability_CK.cumsum(1)
        inside_CK = (mass_CK - probability_CK < dist.top_p) & (values_CK >= floor_C[:, None])
        last_C = inside_CK.sum(1).clamp_min(1) - 1
        complete_C = (mass_CK[:, -1] >= dist.top_p) | (values_CK[:, -1] < floor_C)
        return values_CK.gather(1, last_C[:, None])[:, 0], complete_C

    cut_C, complete_C = cut(ranked_CK, floor_C, lse_C)
    looked_at = ranked_CK.shape[1]
    wide = (~complete_C).nonzero()[:, 0]
    while len(wide) and looked_at < logits_CV.shape[1]:
        looked_at = min(WIDENING * looked_at, logits_CV.shape[1])
        values = logits_CV[wide].topk(looked_at, dim=1).values
        cut_C[wide], complete_C = cut(values, floor_C[wide], lse_C[wide])
        wide = wide[~complete_C]
    return cut_C


def kept_cut(logits_CV: Tensor, ranked_CK: Tensor, dist: Distribution) -> Tensor:
    """Return `cut_C`: the smallest kept logit of each row, in units of the logits given (before the temperature).

    `logits_CV` are penalised, not yet divided by the temperature; `ranked_CK` is `ranked` of them. Follows vLLM: top-k
    keeps ties with the k-th; top-p keeps a token while the mass ranked above it is below p, so at least one; min-p
    keeps p_i >= min_p p_max.
    """
    if dist.temperature_last:
        dist = replace(dist, temperature=1.0)
    max_C = ranked_CK[:, 0]
    cut_C = torch.full_like(max_C, -math.inf)
    min_p_cut_C = max_C + dist.temperature * math.log(dist.min_p) if dist.min_p else cut_C
    if dist.min_p_first:
        cut_C = torch.maximum(cut_C, min_p_cut_C)
    if 0 < dist.top_k < logits_CV.shape[1]:
        pool = ranked_CK if dist.top_k <= ranked_CK.shape[1] else logits_CV.topk(dist.top_k, dim=1).values
        cut_C = torch.maximum(cut_C, pool[:, dist.top_k - 1])
    if dist.top_p < 1:
        cut_C = torch.maximum(cut_C, _nucleus_cut(logits_CV, ranked_CK, cut_C, dist))
    if not dist.min_p_first:
        cut_C = torch.maximum(cut_C, min_p_cut_C)
    return cut_C
