"""Logits on demand: the trainer's model in every precision a check asks for, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trueup.errors import ModelError
from trueup.model.load import LoadedModel, checkpoint_digest, checkpoint_dtype, load_model
from trueup.model.scoring import ScoredRow, check_fits, hidden_states
from trueup.model.simulate import simulate
from trueup.parity.evidence import ENGINE, REFERENCE, TRAINER, Case, Evidence, Tokens
from trueup.policy.head import Head
from trueup.policy.logprobs import TokenScores, token_scores_under
from trueup.policy.processing import Distribution, History
from trueup.trace import TraceRow


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Precision of one side: dtype of the body and of the head's matmul."""

    body: torch.dtype
    head: torch.dtype

    def title(self) -> str:
        """Return e.g. "bf16 body, fp32 head"."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
        return f"{names[self.body]} body, {names[self.head]} head"


Key = tuple[tuple[int, ...], tuple[int, ...]]


def _key(row: TraceRow) -> Key:
    return row.prompt_token_ids, row.completion_token_ids


@dataclass(kw_only=True)
class Scorer:
    """Scores trace rows with one checkpoint as trainer, as engine of a declared precision and as reference.

    Forward passes are run when first asked for and remembered by row, so that equal rows cost one.
    """

    path: Path
    trainer: Arithmetic
    engine: Arithmetic
    batch_rows: int = 16
    device: str = "cpu"
    announce: Callable[[str], None] = lambda message: None
    _loaded: LoadedModel | None = None
    _heads: dict[torch.dtype, Head] = field(default_factory=dict)
    _states: dict[str, dict[Key, Tensor]] = field(default_factory=dict)

    @property
    def reference(self) -> Arithmetic:
        """The next precision above both sides; float32 is exact enough as soon as one side is coarser."""
        both_fp32 = self.trainer.body == self.engine.body == torch.float32
        highest = torch.float64 if both_fp32 else torch.float32
        return Arithmetic(body=highest, head=highest)

    def model(self, dtype: torch.dtype) -> LoadedModel:
        """Return the checkpoint in a dtype, replacing the one held."""
        if self._loaded is None or self._loaded.dtype != dtype:
            self._loaded = None
            self._loaded = load_model(self.path, dtype=dtype, device=self.device)
        return self._loaded

    def digest(self) -> str:
        """Digest of the checkpoint's stored tensors."""
        return checkpoint_digest(self.path)

    def dtype(self) -> torch.dtype:
        """Dtype the checkpoint declares."""
        return checkpoint_dtype(self.path)

    def _arithmetic(self, source: str) -> Arithmetic:
        if source.startswith("simulation:"):
            return Arithmetic(body=torch.float32, head=torch.float32)
        return {TRAINER: self.trainer, ENGINE: self.engine, REFERENCE: self.reference}[source]

    def states(self, source: str, rows: Sequence[TraceRow], *, batch_rows: int | None = None) -> list[Tensor]:
        """Hidden states of each row under a source, from memory where possible."""
        arithmetic = self._arithmetic(source)
        name = source if source.startswith("simulation:") else str(arithmetic.body)
        name += "" if batch_rows is None else f" batch {batch_rows}"
        memory = self._states.setdefault(name, {})
        missing = list({_key(r): r for r in rows if _key(r) not in memory}.values())
        if missing:
            self.announce(f"{source}: forward pass, {arithmetic.title()}, {len(missing)} rows")
            model = self.model(arithmetic.body)
            scored = [ScoredRow(prompt_ids=r.prompt_token_ids, completion_ids=r.completion_token_ids) for r in missing]
            size = batch_rows or self.batch_rows
            if source.startswith("simulation:"):
                with simulate(model, source.removeprefix("simulation:")):
                    states = hidden_states(model, scored, batch_rows=size)
            else:
                states = hidden_states(model, scored, batch_rows=size)
            memory.update(zip((_key(r) for r in missing), states, strict=True))
        return [memory[_key(r)] for r in rows]

    def head(self, source: str) -> Head:
        """The checkpoint's head at a source's matmul precision."""
        arithmetic = self._arithmetic(source)
        if arithmetic.body not in self._heads:
            self._heads[arithmetic.body] = Head.of(self.model(arithmetic.body), torch.float32)
        return self._heads[arithmetic.body].at(arithmetic.head)

    def _score(
        self, source: str, hidden_TD: Tensor, tokens: Tokens, dists: Sequence[Distribution]
    ) -> list[TokenScores]:
        """Score on the model's device, answer on the CPU."""
        device = hidden_TD.device
        prompts = tuple(p.to(device) for p in tokens.prompts)
        history = History(row_T=tokens.row_T.to(device), prompts=prompts)
        found = token_scores_under(
            hidden_TD, self.head(source), tokens.targets_T.to(device), dists=dists, history=history
        )
        return [TokenScores(**{n: getattr(s, n).cpu() for n in TokenScores.__dataclass_fields__}) for s in found]

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

        def ask(source: str, dists: Sequence[Distribution]) -> list[TokenScores]:
            return self._score(source, torch.cat(self.states(source, rows)), tokens, dists)

        return Evidence(case=case, tokens=tokens, ask=ask)

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
