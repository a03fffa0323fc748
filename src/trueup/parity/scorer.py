"""Logits on demand: the trainer's model in every precision, and with every change, that a check asks for."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from trueup.errors import ModelError
from trueup.model.imitated import imitated
from trueup.model.load import LoadedModel, checkpoint_digest, checkpoint_dtype, load_model
from trueup.model.misbatched import misbatched_states
from trueup.model.scoring import ScoredRow, check_fits, hidden_states
from trueup.model.simulate import simulate
from trueup.model.substitute import EVERYTHING, check_same_shapes, head_weight, read_tensors, substituted
from trueup.parity.context import Contexts
from trueup.parity.evidence import EXACT, TRAINER, Case, Evidence, Source, Tokens
from trueup.parity.facts import Facts, facts_of
from trueup.parity.places import Places
from trueup.policy.head import Head, multiplies
from trueup.policy.logprobs import TokenScores, rows_at_once, token_scores_under
from trueup.policy.processing import Distribution, History
from trueup.trace import TraceRow

MODELS_HELD = 2
HELD_PROBABILITIES = 2**26
"""Probabilities that are kept for the next question (256 MiB); of more tokens they are computed again each time."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Precision of one side: dtype of the body and of the head's matmul."""

    body: torch.dtype
    head: torch.dtype

    def title(self) -> str:
        """Return e.g. "bf16 body, fp32 head"."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
        return f"{names[self.body]} body, {names[self.head]} head"


FP32 = Arithmetic(body=torch.float32, head=torch.float32)
Key = tuple[tuple[int, ...], tuple[int, ...]]


def _key(row: TraceRow) -> Key:
    return row.prompt_token_ids, row.completion_token_ids


@dataclass(kw_only=True)
class Scorer:
    """Scores trace rows with one checkpoint as trainer, as engine of a declared precision, as reference, and changed.

    Forward passes are run when first asked for and remembered by row, so that equal rows cost one. `checkpoints` are
    other weights of the same model by label, oldest first; `versions` says which label a stamped version is. `batched`:
    all rows in the order in which a trainer batched them, if its numbers are to be explained.
    """

    path: Path
    trainer: Arithmetic
    engine: Arithmetic
    batch_rows: int = 16
    device: str = "cpu"
    announce: Callable[[str], None] = lambda message: None
    batched: Sequence[TraceRow] = ()
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    versions: Mapping[int, str] = field(default_factory=dict)
    searched_tokens: int = 0
    """Tokens that were run through changed models: what a search has cost."""
    _models: OrderedDict[torch.dtype, LoadedModel] = field(default_factory=OrderedDict)
    _heads: dict[torch.dtype, Head] = field(default_factory=dict)
    _states: dict[object, dict[Key, Tensor]] = field(default_factory=dict)
    _tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _contexts: Contexts | None = None
    _imitated: LoadedModel | None = None

    @property
    def reference(self) -> Arithmetic:
        """The next precision above both sides; float32 is exact enough as soon as one side is coarser."""
        both_fp32 = self.trainer.body == self.engine.body == torch.float32
        highest = torch.float64 if both_fp32 else torch.float32
        return Arithmetic(body=highest, head=highest)

    @property
    def contexts(self) -> Contexts:
        """What can be done to a prompt on its way into an engine."""
        if self._contexts is None:
            self._contexts = Contexts(self.path)
        return self._contexts

    def model(self, dtype: torch.dtype) -> LoadedModel:
        """Return the checkpoint in a dtype; the MODELS_HELD last used stay in memory."""
        if dtype not in self._models:
            while len(self._models) >= MODELS_HELD:
                self._models.popitem(last=False)
            self._models[dtype] = load_model(self.path, dtype=dtype, device=self.device)
        self._models.move_to_end(dtype)
        return self._models[dtype]

    def running(self, dtype: torch.dtype) -> LoadedModel:
        """The same for forward passes: a float32 imitation where this machine has no instructions for the dtype."""
        model = self.model(dtype)
        if multiplies(dtype, model.weight_VD.device):
            return model
        if self._imitated is None or self._imitated.dtype != dtype:
            self._imitated = imitated(model)
        return self._imitated

    def tensors(self, label: str) -> dict[str, Tensor]:
        """The other weights that a label names. Raises ModelError when they are not this model's."""
        if label not in self._tensors:
            found = read_tensors(self.checkpoints[label])
            check_same_shapes(self.model(torch.float32), found, self.checkpoints[label])
            self._tensors[label] = found
        return self._tensors[label]

    def facts(self, rows: Sequence[TraceRow]) -> Facts:
        """What hypotheses may start from for these rows."""
        stamps = {v for r in rows for v in r.weight_versions or ()}
        return facts_of(
            self.model(self.trainer.body),
            checkpoints=tuple(self.checkpoints),
            versions=tuple(sorted(self.versions.items())),
            stamps=tuple(sorted(stamps)),
            contexts=self.contexts.offered([r.prompt_token_ids for r in rows]),
            bf16_head=torch.bfloat16 in (self.trainer.head, self.engine.head),
            batch_rows=len(self.batched),
        )

    def digest(self) -> str:
        """Digest of the checkpoint's stored tensors."""
        return checkpoint_digest(self.path)

    def dtype(self) -> torch.dtype:
        """Dtype the checkpoint declares."""
        return checkpoint_dtype(self.path)

    def _arithmetic(self, source: Source) -> Arithmetic:
        return {"trainer": self.trainer, "engine": self.engine, "reference": self.reference, "exact": FP32}[
            source.precision
        ]

    def states(self, source: Source, rows: Sequence[TraceRow], *, batch_rows: int | None = None) -> list[Tensor]:
        """Hidden states of each row under a source, from memory where possible."""
        body = self._arithmetic(source).body
        memory = self._states.setdefault(
            (body, source.simulation, source.context, source.weights, source.batching, batch_rows), {}
        )  # fmt: skip
        missing = list({_key(r): r for r in rows if _key(r) not in memory}.values())
        if missing:
            self.announce(f"{_title(source)}: forward pass, {self._arithmetic(source).title()}, {len(missing)} rows")
            model = self.running(body)
            if not source.plain:
                self.searched_tokens += sum(len(p) + len(c) for p, c in map(_key, missing))
            if source.batching is not None:
                return self._misbatched(model, source.batching, memory, rows)
            scored = [
                ScoredRow(
                    prompt_ids=self.contexts.applied(source.context, r.prompt_token_ids),
                    completion_ids=r.completion_token_ids,
                )
                for r in missing
            ]
            with ExitStack() as stack:
                if source.weights is not None:
                    label, pattern = source.weights
                    stack.enter_context(substituted(model, self.tensors(label), pattern))
                if source.simulation is not None:
                    stack.enter_context(simulate(model, *source.simulation))
                states = hidden_states(model, scored, batch_rows=batch_rows or self.batch_rows)
            memory.update(zip((_key(r) for r in missing), states, strict=True))
        return [memory[_key(r)] for r in rows]

    def _misbatched(
        self, model: LoadedModel, batching: tuple[str, int], memory: dict[Key, Tensor], rows: Sequence[TraceRow]
    ) -> list[Tensor]:
        """A wrong batch depends on all of its rows: run every row, in order."""
        scored = [ScoredRow(prompt_ids=r.prompt_token_ids, completion_ids=r.completion_token_ids) for r in self.batched]
        states = misbatched_states(model, scored, *batching)
        memory.update(zip((_key(r) for r in self.batched), states, strict=True))
        return [memory[_key(r)] for r in rows]

    def head(self, source: Source) -> Head:
        """The checkpoint's head at a source's matmul precision, changed as the source says."""
        arithmetic = self._arithmetic(source)
        if arithmetic.body not in self._heads:
            self._heads[arithmetic.body] = Head.of(self.model(arithmetic.body), torch.float32)
        head = self._heads[arithmetic.body].at(arithmetic.head)
        if source.weights is not None:
            label, pattern = source.weights
            weight_VD = head_weight(self.model(arithmetic.body), self.tensors(label), pattern)
            head = head if weight_VD is None else replace(head, weight_VD=weight_VD.to(self.device))
        edit = source.head
        if edit.padded_rows:
            rows = head.weight_VD.new_zeros(edit.padded_rows, head.weight_VD.shape[1])
            bias_V = head.bias_V if head.bias_V is None else torch.cat([head.bias_V, rows[:, 0]])
            head = replace(head, weight_VD=torch.cat([head.weight_VD, rows]), bias_V=bias_V)
        if edit.bf16:
            head = head.at(torch.bfloat16)
        return replace(head, softcap=edit.softcap or head.softcap, scale=head.scale * edit.scale)

    def _score(
        self, source: Source, hidden_TD: Tensor, tokens: Tokens, dists: Sequence[Distribution], *,
        varentropy: bool = False,
    ) -> list[TokenScores]:  # fmt: skip
        """Score on the model's device, answer on the CPU."""
        device = hidden_TD.device
        prompts = tuple(p[:0] if source.seen == "completion only" else p for p in tokens.prompts)
        history = History(
            row_T=tokens.row_T.to(device), prompts=tuple(p.to(device) for p in prompts),
            prompt_counts=source.seen == "prompt counted", lag=1 if source.seen == "lagging" else 0,
        )  # fmt: skip
        if source.offset:
            hidden_TD, missing_T = moved(hidden_TD, tokens.row_T.to(device), source.offset)
        found = token_scores_under(
            hidden_TD, self.head(source), tokens.targets_T.to(device), dists=dists, history=history,
            entropy=False, varentropy=varentropy,
        )  # fmt: skip
        scores = [TokenScores(**{name: value.cpu() for name, value in columns(s).items()}) for s in found]
        if source.offset:
            hidden = missing_T.cpu()
            scores = [replace(s, logprobs_T=s.logprobs_T.masked_fill(hidden, torch.nan)) for s in scores]
        return scores

    def unfit(self, row: TraceRow) -> str | None:
        """Say why the model cannot score a row, None if it can."""
        scored = ScoredRow(prompt_ids=row.prompt_token_ids, completion_ids=row.completion_token_ids)
        model = self.model(self.trainer.body)
        try:
            check_fits(model, [scored])
        except ModelError as error:
            return str(error)
        return None

    def evidence(self, case: Case, rows: Sequence[TraceRow]) -> Evidence:
        """Wrap rows as evidence whose logits come from this scorer."""
        tokens = Tokens.of(rows)

        def ask(source: Source, dists: Sequence[Distribution]) -> list[TokenScores]:
            if source.by_version:
                return self._ask_by_version(source, rows, tokens, dists)
            return self._score(source, torch.cat(self.states(source, rows)), tokens, dists)

        held: dict[tuple[Source, float], list[Tensor]] = {}

        def probabilities(source: Source, temperature: float) -> Iterable[Tensor]:
            if len(tokens) * self.head(source).vocab_size > HELD_PROBABILITIES:
                return self._probabilities(source, rows, temperature)
            if (source, temperature) not in held:
                held.clear()
                held[source, temperature] = list(self._probabilities(source, rows, temperature))
            return held[source, temperature]

        def mass(source: Source, temperature: float, ids: tuple[int, ...]) -> Tensor:
            wanted = torch.tensor(ids)
            return torch.cat([p[:, wanted].sum(1) for p in probabilities(source, temperature)]).cpu()

        def expected() -> Tensor:
            return sum_of(p.sum(0) for p in probabilities(TRAINER, case.processed.temperature)).cpu()

        def spread(source: Source, dist: Distribution) -> TokenScores:
            if source.by_version:
                return self._ask_by_version(source, rows, tokens, [dist], varentropy=True)[0]
            return self._score(source, torch.cat(self.states(source, rows)), tokens, [dist], varentropy=True)[0]

        def places(source: Source, temperature: float) -> Places:
            return Places.of(probabilities(source, temperature), tokens.targets_T, tokens.row_T)

        return Evidence(
            case=case, tokens=tokens, ask=ask, mass=mass, expected=expected, ask_spread=spread, places=places,
            facts=self.facts(rows),
        )  # fmt: skip

    def _probabilities(self, source: Source, rows: Sequence[TraceRow], temperature: float) -> Iterator[Tensor]:
        """Probabilities [C, V] at a temperature, a chunk of tokens at a time."""
        hidden_TD, head = torch.cat(self.states(source, rows)), self.head(source)
        for hidden_CD in hidden_TD.split(rows_at_once(head.vocab_size)):
            logits = torch.empty(len(hidden_CD), head.vocab_size, dtype=head.logits_dtype, device=hidden_CD.device)
            yield (head.logits_into(hidden_CD, logits) / temperature).softmax(1)

    def _ask_by_version(
        self, source: Source, rows: Sequence[TraceRow], tokens: Tokens, dists: Sequence[Distribution], *,
        varentropy: bool = False,
    ) -> list[TokenScores]:  # fmt: skip
        """Each token under the weights that its stamp names; tokens of other stamps under the trainer's weights."""
        parts: dict[str | None, list[TokenScores]] = {}
        named = dict(source.by_version)
        labels = [named.get(int(v)) for v in tokens.version_T.tolist()]
        for label in dict.fromkeys(labels):
            own = EXACT if label is None else replace(EXACT, weights=(label, EVERYTHING))
            parts[label] = self._score(own, torch.cat(self.states(own, rows)), tokens, dists, varentropy=varentropy)
        chosen = []
        for index in range(len(dists)):
            found = {label: columns(scores[index]) for label, scores in parts.items()}
            values = {
                name: torch.stack([found[label][name][t] for t, label in enumerate(labels)])
                for name in found[labels[0]]
            }
            chosen.append(TokenScores(**values))
        return chosen

    def afresh(self, rows: Sequence[TraceRow]) -> list[list[float]]:
        """Raw logprobs of rows by the trainer, in one batch and without memory: what a trainer's own pass gives."""
        scored = [ScoredRow(prompt_ids=r.prompt_token_ids, completion_ids=r.completion_token_ids) for r in rows]
        hidden_TD = torch.cat(hidden_states(self.running(self.trainer.body), scored, batch_rows=len(rows)))
        values = self._score(TRAINER, hidden_TD, Tokens.of(rows), [Distribution()])[0].logprobs_T.split(
            [len(r.completion_token_ids) for r in rows]
        )
        return [v.tolist() for v in values]

    def batch_shape_noise(self, rows: Sequence[TraceRow], case: Case) -> float:
        """Rms difference in nats between the trainer's batched pass and the same rows one at a time."""
        tokens = Tokens.of(rows)
        sides = []
        for batch_rows in (None, 1):
            hidden_TD = torch.cat(self.states(TRAINER, rows, batch_rows=batch_rows))
            scores = self._score(TRAINER, hidden_TD, tokens, [case.trainer_distribution])
            sides.append(scores[0].logprobs_T.double())
        difference = sides[0] - sides[1]
        difference = difference[torch.isfinite(difference)]
        return float(difference.square().mean().sqrt()) if len(difference) else float("nan")


def moved(hidden_TD: Tensor, row_T: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """States `offset` tokens later in the same row, and where there are none (those keep their own)."""
    index_T = torch.arange(len(row_T), device=row_T.device)
    other_T = (index_T + offset).clamp(0, len(row_T) - 1)
    missing_T = (row_T[other_T] != row_T) | (other_T != index_T + offset)
    return hidden_TD[torch.where(missing_T, index_T, other_T)], missing_T


def columns(scores: TokenScores) -> dict[str, Tensor]:
    """The tensors of some scores by name, those that were not asked for left out."""
    return {f.name: value for f in fields(TokenScores) if (value := getattr(scores, f.name)) is not None}


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, one held at a time."""
    return functools.reduce(operator.add, parts)


def _title(source: Source) -> str:
    """What is run, for the progress line."""
    if source.plain:
        return source.precision
    parts = [
        f"{source.simulation[0]} {source.simulation[1]:g}" if source.simulation else "",
        source.context or "",
        " ".join(source.weights) if source.weights else "",
        source.batching[0] if source.batching else "",
    ]
    return ", ".join(p for p in parts if p) or "another head"
