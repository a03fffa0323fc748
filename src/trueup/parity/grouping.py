"""From a flat log to settings: rows of one engine and one sampling, and the precision of both sides."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from trueup.errors import RecordError, TraceError
from trueup.knobs import CheckConfig
from trueup.parity.evidence import EXACT, Case
from trueup.parity.floor import FLOAT32_NATS
from trueup.parity.invariants import well_formed
from trueup.parity.recipe import as_mapping, flag_of
from trueup.parity.scorer import Arithmetic, Scorer
from trueup.policy.processing import Distribution
from trueup.trace import EngineInfo, Trace, TraceRow
from trueup.types import LogprobKind, SamplingParams, parse_sampling

FIT_TOKENS = 320
"""Enough to tell candidates apart, few enough to scan temperatures quickly."""

SHAPING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
"""Fields that an engine may fill in from generation_config.json where a request is silent."""

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Rows that share engine, flags and sampling."""

    case: Case
    rows: tuple[TraceRow, ...]


def parse_dtype(name: object) -> torch.dtype | None:
    """Read a dtype as engines spell it; None if it names none."""
    return DTYPES.get(str(name).removeprefix("torch."))


def _head_flag(flags: Mapping[str, object]) -> object:
    """head_dtype, given as a flag of its own or inside vLLM's hf_overrides (a mapping or JSON text)."""
    return flag_of(flags, "head_dtype") or as_mapping(flag_of(flags, "hf_overrides")).get("head_dtype")


def _body(flags: Mapping[str, object], checkpoint: torch.dtype) -> torch.dtype:
    declared = flag_of(flags, "dtype")
    if declared in (None, "auto"):
        return checkpoint
    if (body := parse_dtype(declared)) is None:
        raise TraceError(
            f"the engine declares dtype {str(declared)[:40]!r}, which is none of {', '.join(sorted(DTYPES))}"
        )
    return body


def arithmetic(check: CheckConfig, rows: Sequence[TraceRow], checkpoint: torch.dtype) -> tuple[Arithmetic, Arithmetic]:
    """Return (trainer, engine) precision: the engine's as its flags declare, else the checkpoint's.

    The trainer follows the engine's body unless `dtype` names one; its head is `head`. A bf16 engine multiplies its
    head in bf16 unless it declares head_dtype float32. Raises TraceError when rows declare different dtypes.
    """
    bodies = {_body(r.engine.flags, checkpoint) for r in rows}
    heads = {parse_dtype(_head_flag(r.engine.flags)) for r in rows}
    if len(bodies) > 1 or len(heads) > 1:
        raise TraceError("the trace mixes engines of different dtype or head_dtype; check each in a file of its own")
    body = bodies.pop()
    engine_head = torch.bfloat16 if body == torch.bfloat16 and torch.float32 not in heads else torch.float32
    trainer_body = body if check.dtype == "auto" else DTYPES[check.dtype]
    trainer_head = torch.float32 if trainer_body == torch.float32 else DTYPES[check.head]
    return Arithmetic(body=trainer_body, head=trainer_head), Arithmetic(body=body, head=engine_head)


def looks_like_float32(scorer: Scorer, rows: Sequence[TraceRow]) -> bool:
    """Whether an engine that does not say its dtype computes in float32: its raw numbers are that close to ours."""
    usable = [r for r in rows if well_formed(r) and scorer.unfit(r) is None]
    if not usable:
        return False
    evidence = scorer.evidence(Case(engine=EngineInfo(), sampling=SamplingParams(), trainer=LogprobKind.RAW), usable)
    gap_T = evidence.scores(EXACT, Distribution()).logprobs_T.double() - evidence.tokens.engine_T
    gap_T = gap_T[torch.isfinite(gap_T)]
    return len(gap_T) > 0 and float(gap_T.square().mean().sqrt()) < FLOAT32_NATS


def group(trace: Trace, kind: LogprobKind, problems: list[str]) -> list[Setting]:
    """Group rows by engine and sampling; rows whose sampling cannot be read are reported and left out."""
    groups: dict[tuple[object, ...], list[TraceRow]] = {}
    cases: dict[tuple[object, ...], Case] = {}
    for row in trace.rows:
        try:
            sampling, unmodelled = parse_sampling(row.sampling)
        except RecordError as error:
            problems.append(f"line {row.line}: {error}; row left out")
            continue
        shape = replace(sampling, max_tokens=None, seed=None, stop=())
        omitted = tuple(name for name in SHAPING if row.sampling.get(name) is None)
        key = (row.engine.title(), repr(sorted(row.engine.flags.items(), key=str)), shape, unmodelled, omitted)
        groups.setdefault(key, []).append(row)
        cases[key] = Case(
            engine=row.engine, sampling=shape, trainer=kind, unmodelled=unmodelled,
            omitted=omitted,
        )  # fmt: skip
    engines = {(c.engine.title(), str(sorted(c.engine.flags.items(), key=str))) for c in cases.values()}
    if len(engines) > 1:
        tags = {e: f" [{e[0]} #{i}]" for i, e in enumerate(sorted(engines), 1)}
        cases = {
            k: replace(c, tag=tags[c.engine.title(), str(sorted(c.engine.flags.items(), key=str))])
            for k, c in cases.items()
        }
    temperatures = {c.sampling.temperature for c in cases.values()}
    return [
        Setting(case=replace(cases[k], other_temperatures=tuple(sorted(temperatures))), rows=tuple(groups[k]))
        for k in groups
    ]


def halves(rows: Sequence[TraceRow]) -> tuple[list[TraceRow], list[TraceRow]]:
    """Split at random (fixed seed) into a fitting half, capped at FIT_TOKENS, and a held-back half.

    At random, so that nothing that alternates in the log (replicas, prompts) falls into one half. A single row is both.
    """
    order = list(rows)
    random.Random(0).shuffle(order)
    fit: list[TraceRow] = []
    tokens = 0
    for row in order[::2]:
        if tokens < FIT_TOKENS or not fit:
            fit.append(row)
            tokens += len(row.completion_token_ids)
    return fit, order[1::2] or fit
