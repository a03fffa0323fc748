"""A policy on paper, for tests of judges: a table of logits in the place of a model, and tokens drawn from it.

Shapes: T completion tokens of all rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trueup.parity.evidence import Case, Evidence, Source, Tokens
from trueup.parity.facts import Facts
from trueup.parity.places import Places
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores_under
from trueup.policy.processing import History
from trueup.trace import EngineInfo, TraceRow
from trueup.types import LogprobKind, SamplingParams


def logits_of(tokens: int, vocab: int = 20, *, scale: float = 1.5, seed: int = 0) -> Tensor:
    """Random logits, [T, V] float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)


def drawn(logits_TV: Tensor, *, temperature: float = 1.0, top_k: int = 0, seed: int = 1) -> Tensor:
    """Tokens drawn from the table at a temperature, of the `top_k` most likely ones alone if given, [T]."""
    scaled_TV = logits_TV / temperature
    if top_k:
        scaled_TV = scaled_TV.masked_fill(scaled_TV < scaled_TV.topk(top_k).values[:, -1:], -torch.inf)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(scaled_TV.softmax(1), 1, generator=generator)[:, 0]


def trace_rows(
    targets_T: Tensor, length: int, *, logprobs_T: Tensor | None = None, prompts: Sequence[int] | None = None
) -> list[TraceRow]:
    """Rows of so many tokens each, on lines 1, 2, ..., each with a prompt of its own unless `prompts` gives its id."""
    values_T = torch.zeros(len(targets_T)) if logprobs_T is None else logprobs_T
    parts = zip(targets_T.split(length), values_T.split(length), strict=True)
    return [
        TraceRow(
            line=at + 1, engine=EngineInfo(), sampling={}, prompt_token_ids=(prompts[at] if prompts else at,),
            completion_token_ids=tuple(ids.tolist()), completion_logprobs=tuple(values.tolist()),
        )
        for at, (ids, values) in enumerate(parts)
    ]  # fmt: skip


def evidence_of(
    logits_TV: Tensor, rows: Sequence[TraceRow], *, sampling: SamplingParams | None = None,
    trainer: LogprobKind = LogprobKind.PROCESSED, omitted: tuple[str, ...] = (), facts: Facts | None = None,
    whole: Evidence | None = None,
) -> Evidence:  # fmt: skip
    """What a check would look at if the table were the trainer's policy."""
    tokens = Tokens.of(rows)
    head = Head(weight_VD=torch.eye(logits_TV.shape[1], dtype=torch.float64), matmul_dtype=torch.float64)

    def ask(source, dists, varentropy=False):
        assert isinstance(source, Source)
        history = History(row_T=tokens.row_T, prompts=tokens.prompts)
        return token_scores_under(
            logits_TV, head, tokens.targets_T, dists=dists, history=history, varentropy=varentropy
        )

    def mass(source, temperature, ids):
        assert isinstance(source, Source)
        return (logits_TV / temperature).softmax(1)[:, list(ids)].sum(1)

    def places(source, temperature):
        assert isinstance(source, Source)
        return Places.of([(logits_TV / temperature).softmax(1)], tokens.targets_T, tokens.row_T)

    return Evidence(
        case=Case(engine=EngineInfo(), sampling=sampling or SamplingParams(), trainer=trainer, omitted=omitted),
        tokens=tokens, ask=ask, ask_spread=lambda source, dist: ask(source, [dist], varentropy=True)[0],
        mass=mass, places=places,
        expected=lambda: logits_TV.softmax(1).sum(0), facts=facts or Facts(vocab=logits_TV.shape[1]), whole=whole,
    )  # fmt: skip
