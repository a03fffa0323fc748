"""From probes to causes: which difference is whose doing, and which findings of a setting it makes void."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trueup.engines.probe_http import Answer, EngineFacts, ProbeClient
from trueup.errors import EngineError, TrueupError
from trueup.model.load import checkpoint_digest
from trueup.parity.context import BOS_ADDED, BOS_REMOVED, RETOKENIZED, Contexts
from trueup.parity.probes import Probed
from trueup.parity.report import Cause, SettingReport
from trueup.parity.workbench import Workbench

SAMPLING_ONLY = frozenset({"S1", "S2", "S3", "S4", "S5", "S6", "S7", "T7", "W10", "W11", "O7"})
"""Causes that cannot show in the engine's scores of given tokens: nothing is sampled there."""
ENGINE_IS_RIGHT = frozenset({"W1", "W2", "W3", "W5", "W15", "W16", "I1", "I2", "I8", "I9", "I12", "I14"})
"""Causes that would show in the engine's scores of given tokens: with scores that agree they explain nothing."""
IN_REPORTING = frozenset({"S8", "S9", "S10", "S14", "T1", "T7"})
"""Causes in how numbers are read and sent: answers that draw other tokens then differ in numbers before that too."""
VOIDING = {"I3", "I4", "I15"}
COARSE = frozenset({"I1", "I2", "I6"})
"""Roundings that turn the smallest difference between batches into one step of a grid."""
COARSE_SHARE = 0.75
"""Share of mean |r| that such a rounding must explain: no pass repeats which way values at the edge of a step go."""
NOT_A_NUMBER = re.compile(r"\bnan\b|not finite|infinit|out of range float", re.IGNORECASE)
SELF_LIMIT = 1.5
"""An engine may differ from itself by this many floors: in another batch shape it rounds as independently as a trainer
does, and a few dozen tokens measure an rms to within a third."""
COLD_CACHE = (
    "a cached prompt computes something else than a fresh one",
    "--no-enable-prefix-caching, or disable cascade attention; compare the dtype of cached keys and values",
)
"""Title and fix of I5."""
HALF = 0.5
NEARLY_ALL = 0.9
"""Share of mean |r| beyond which a setting's own causes account for what probes see."""
FACTOR = 2.0
"""A probe that changes one factor must move the numbers this much more than changing nothing does."""
ACCOUNTS_FOR = 1.5
"""Noise that a probe saw accounts for a gap of at most so many times its size: an rms over the sixty tokens of a probe
is known to a quarter, and a model with another fault amplifies its own rounding too."""


def _cause(cause_id: str, layer: str, title: str, fix: str, evidence: str, **rest: object) -> Cause:
    values: dict[str, object] = {"confidence": "high", "explained": None} | rest
    return Cause(id=cause_id, layer=layer, title=title, fix=fix, evidence=evidence, **values)  # type: ignore[arg-type]


def not_finite(errors: Sequence[str], requests: int) -> Cause | None:
    """I11 if requests failed over numbers that are none."""
    found = [e for e in errors if NOT_A_NUMBER.search(e)]
    if not found:
        return None
    return _cause(
        "I11", "inference", "engine reports logprobs that are not finite",
        "find the NaN or infinity in the engine (weights after an update, overflow in fp16); do not fill it in",
        f"{len(found)} of {requests} requests failed over it: {found[0]}",
    )  # fmt: skip


def self_consistency(probes: Sequence[Probed], *, scores_changed: bool = False) -> list[Cause]:
    """I15 if the same request differs from itself, I3 if being in a batch makes more of a difference than that.

    `scores_changed`: scores were right at first and wrong when the same tokens were scored again. Judged by numbers of
    shared tokens only: a server that ignores seeds draws other tokens and is no worse for it.
    """
    repeats = [p for p in probes if p.name.startswith("repeat")]
    noise = max((p.gap.rms for p in repeats if p.gap is not None), default=0.0)
    unsteady = next((p for p in repeats if p.numbers_differ), None)
    if unsteady is not None:
        return [
            _cause(
                "I15", "inference", "the engine answers the same request differently",
                "turn on the engine's deterministic mode; a mismatch cannot be attributed below this noise",
                unsteady.text,
            )
        ]  # fmt: skip
    batches = [p for p in probes if p.name.startswith("batch") and p.numbers_differ and p.gap is not None]
    worst = max(batches, key=lambda p: p.gap.rms if p.gap else 0.0, default=None)
    if worst is None or worst.gap is None or worst.gap.rms <= FACTOR * noise:
        return []
    if scores_changed and worst.name == "batch, scored":
        return [
            _cause(
                "I5", "inference", "scores of a prompt that was seen before are not those of a fresh one",
                "turn prefix caching off for requests with prompt_logprobs; trust no score of a cached prefix",
                f"{worst.text}; scored for the first time these tokens fit the trainer, scored again they do not",
            )
        ]  # fmt: skip
    return [
        _cause(
            "I3", "inference", "a request's numbers depend on what else is in its batch",
            "batch-invariant kernels (VLLM_BATCH_INVARIANT=1), or one batch size",
            f"{worst.text}; repeated alone: {noise:.2g}",
        )
    ]  # fmt: skip


def hidden_defaults(
    probes: Sequence[Probed], reports: Sequence[SettingReport], causes: Sequence[Cause], *, drawn_apart: int
) -> list[Cause]:
    """Add S5 if spelling fields out moves numbers by more than asking twice does, or draws other tokens whenever it is
    tried (`drawn_apart` requests), unless a setting's numbers have named it already, with its fields. A smaller effect
    of batches goes then: rounding moves a kept set's edge."""
    gaps = {p.name: p.gap for p in probes if p.gap is not None}
    repeat, defaults = gaps.get("repeat"), gaps.get("defaults")
    lost = any(c.id in IN_REPORTING for r in reports for c in r.causes)
    if repeat is None or defaults is None or lost or any(c.id == "I15" for c in causes):
        return list(causes)
    numbers = any(p.name == "defaults" and p.numbers_differ for p in probes) and defaults.rms > FACTOR * repeat.rms
    if not numbers and not drawn_apart:
        return list(causes)
    of_edges = "batch" in gaps and FACTOR * gaps["batch"].rms < defaults.rms
    rest = [c for c in causes if c.id != "I3" or not of_edges]
    if any(c.id == "S5" for r in reports for c in r.causes):
        return rest
    draws = "" if numbers else " (raw logprobs do not show it)"
    evidence = next(p.text for p in probes if p.name == "defaults") + draws
    fix = "--generation-config vllm, and send every sampling field explicitly"
    return [*rest, _cause("S5", "semantic", "the engine applies sampling defaults that no request set", fix, evidence)]


def only_generation_is_off(
    reports: Sequence[SettingReport], causes: Sequence[Cause]
) -> tuple[SettingReport, SettingReport] | None:
    """(what was reported at T=1, the engine's scores of the same tokens) if the scores fit the trainer, the reported
    numbers do not, and nothing explains that yet."""
    scoring = next((r for r in reports if "scores]" in r.label), None)
    plain = next((r for r in reports if r.label == "temperature=1"), None)
    if scoring is None or plain is None or scoring.verdict != "agree" or plain.verdict != "mismatch":
        return None
    known = [c for c in plain.causes if c.confidence == "high"]
    if known or plain.unexplained is None or {c.id for c in causes} & {*VOIDING, "S5"} or in_few_rows(plain):
        return None
    far, near = plain.gap.get("mean_abs"), scoring.gap.get("mean_abs")
    share = 1 - near / far if isinstance(far, float) and isinstance(near, float) and far else 0.0
    return (plain, scoring) if share >= HALF else None


def in_few_rows(report: SettingReport) -> bool:
    """Whether most rows fit: decoding spares none, so that something about the others' prompts is to blame."""
    rows, floor = report.points.rms_by_line().values(), report.noise_floor.get("rms")
    return isinstance(floor, float) and bool(rows) and statistics.median(rows) <= floor


def not_explained_by(
    reports: Sequence[SettingReport], causes: Sequence[Cause], probes: Sequence[Probed]
) -> list[Cause]:
    """Leave out what a probe saw of the engine's noise where it comes with a cause that was found: numbers lost at
    random on their way differ each time, coarse rounding turns the noise of a batch into steps, and a model that a
    cause makes may amplify it (what is left of the gap is held against that model's own rounding)."""
    plain = next((r for r in reports if r.label == "temperature=1"), None)
    if plain is None or not plain.causes:
        return list(causes)
    ids = {c.id for c in plain.causes}
    needed = COARSE_SHARE if ids & COARSE else NEARLY_ALL
    whole = plain.unexplained is None or sum(c.explained or 0.0 for c in plain.causes) >= needed
    own_floor = (plain.fixed or {}).get("floor_rms")
    batch_rms = max((p.gap.rms for p in probes if p.name.startswith("batch") and p.gap is not None), default=0.0)
    amplified = isinstance(own_floor, float) and batch_rms <= SELF_LIMIT * own_floor
    void = VOIDING if ids & IN_REPORTING else {"I3"} if ids & COARSE or amplified else set()
    return [c for c in causes if not whole or c.id not in void]


def _left(report: SettingReport) -> float:
    """Rms in nats that a setting's causes leave; infinite without any."""
    rms = (report.fixed or {}).get("rms")
    return rms if isinstance(rms, float) else math.inf


def _unexplained(report: SettingReport) -> float:
    """Rms in nats for which no cause was found; 0 if there is none."""
    rms = (report.unexplained or {}).get("rms")
    return rms if isinstance(rms, float) else 0.0


def _without(report: SettingReport, ids: frozenset[str], scoring: SettingReport) -> SettingReport:
    """A setting without some causes; what they explained is as unexplained then as the engine's scores are."""
    kept = tuple(c for c in report.causes if c.id not in ids)
    open_now = scoring.unexplained if report.causes and not kept else None
    return replace(report, causes=kept, unexplained=report.unexplained or open_now)


def _if_it_leaves(off: float, report: SettingReport, ids: frozenset[str], other: SettingReport) -> SettingReport:
    """Return the report if its causes leave about `off` nats rms, as the other one has; else without those in `ids`."""
    return report if off / FACTOR <= _left(report) <= FACTOR * off else _without(report, ids, other)


def settle(reports: Sequence[SettingReport], causes: Sequence[Cause], probes: Sequence[Probed]) -> list[SettingReport]:
    """Drop guesses that other evidence speaks against.

    Where the engine's own scores, in which nothing is sampled, are off for no known reason, a cause in how tokens are
    sampled or reported can be right only if it leaves what the scores are off by. Where a probe has shown why numbers
    move, an incomplete explanation can be right only if it leaves what the probe saw. Where plain sampling is off for
    no known reason, an incomplete one elsewhere can be right only if it leaves as much.
    """
    plain = next((r for r in reports if r.label == "temperature=1"), None)
    scoring = next((r for r in reports if "scores]" in r.label), None)
    if scoring is not None and scoring.unexplained is not None and not scoring.causes:
        off = scoring.gap.get("rms")
        assert isinstance(off, float)
        reports = [_if_it_leaves(off, r, SAMPLING_ONLY | IN_REPORTING, scoring) for r in reports]
    if plain is not None and plain.unexplained is not None and not plain.causes:
        off = _unexplained(plain)
        reports = [r if r.unexplained is None else _if_it_leaves(off, r, SAMPLING_ONLY, plain) for r in reports]
    found = {c.id for c in causes} & VOIDING
    if not found:
        return list(reports)
    noise = max((p.gap.rms for p in probes if p.gap is not None and p.numbers_differ), default=0.0)
    settled = []
    for report in reports:
        sure = _left(report) <= FACTOR * noise
        kept = tuple(c for c in report.causes if c.confidence == "high" or sure)
        accounted = "I4" in found or _unexplained(report) <= ACCOUNTS_FOR * noise
        unexplained = None if accounted else report.unexplained
        settled.append(replace(report, causes=kept, unexplained=unexplained, ambiguous=()))
    return settled


def beside_what_is_left(causes: Sequence[Cause], settled: Sequence[SettingReport]) -> list[Cause]:
    """Say of noise that a probe saw that it is not the reason, where far more stays unexplained.

    An engine that computes something else altogether may also amplify its own rounding.
    """
    left = max(map(_unexplained, settled), default=0.0)
    text = f"; numbers are off by {left:.2g} nats for another reason, which is not known"
    return [
        replace(c, confidence="low", evidence=c.evidence + text) if left and c.id in ("I3", "I15") else c
        for c in causes
    ]


def cached(
    probe: Probed, causes: Sequence[Cause], probes: Sequence[Probed], *, updated: bool, blurred: bool
) -> list[Cause]:
    """I5 if a cached prompt and a fresh one differ; on a server that was updated before it may as well be W12.

    Not when decoding itself is off (a cached prompt ends in a decoding step), when numbers are `blurred` (lost on the
    way, or rounded coarsely), or when being in a batch, which is another shape too, moves them as far.
    """
    if not probe.differs or {c.id for c in causes} & {"I15", "I4"} or blurred:
        return []
    shapes = max((p.gap.rms for p in probes if p.name.startswith("batch") and p.gap is not None), default=0.0)
    if probe.gap is not None and probe.gap.tokens and probe.gap.rms <= FACTOR * shapes:
        return []
    doubt = "; the server was updated before, so stale weights (W12) are possible: --allow-updates separates them"
    return [
        _cause(
            "I5", "inference", *COLD_CACHE,
            probe.text + (doubt if updated else ", without any update"), confidence="low" if updated else "high",
        )
    ]  # fmt: skip


def prompt_echo(
    sent: Sequence[tuple[int, ...]], answers: Sequence[Sequence[Answer]], contexts: Contexts
) -> Cause | None:
    """T3, T4, T5 or T9 if an engine itself says that it saw other prompt ids than were sent."""
    pairs = [
        (s, a.prompt_ids) for own in answers for s, a in zip(sent, own, strict=True) if a.prompt_ids is not None
    ]  # fmt: skip
    odd = [(s, seen) for s, seen in pairs if s != seen]
    if not odd:
        return None
    mine, seen = odd[0]
    evidence = (
        f"{len(odd)} of {len(pairs)} prompts came back as other ids: {list(mine[:4])}... ({len(mine)}) became "
        f"{list(seen[:4])}... ({len(seen)})"
    )
    if seen in (contexts.applied(BOS_ADDED, mine), contexts.applied(BOS_REMOVED, mine)):
        fix = "send token ids, or set add_special_tokens=false where the template writes BOS itself"
        return _cause("T4", "tokenization", "a BOS token is doubled or missing", fix, evidence)
    if seen and len(seen) < len(mine) and seen in (mine[-len(seen) :], mine[: len(seen)]):
        fix = "raise --max-model-len, unset truncate_prompt_tokens, and refuse prompts that do not fit"
        return _cause("T9", "tokenization", "long prompts are cut before the model sees them", fix, evidence)
    if seen == contexts.applied(RETOKENIZED, mine):
        fix = "send token ids and keep them: never decode a prompt and encode it again"
        return _cause("T3", "tokenization", "the prompt was decoded to text and tokenized again", fix, evidence)
    fix = "render the template once, in the trainer, and send token ids"
    return _cause("T5", "tokenization", "the engine renders another prompt than was sent", fix, evidence)


def require_alike(clients: Sequence[ProbeClient]) -> None:
    """Raise EngineError when replicas declare different precisions: each then has a floor of its own."""
    declared = {(str(c.facts.info.flags.get("dtype")), str(c.facts.info.flags.get("head_dtype"))) for c in clients}
    if len(declared) > 1:
        raise EngineError(f"the replicas declare different precisions {sorted(declared)}: check each by itself")


def served_weights(facts: EngineFacts, bench: Workbench, reports: Sequence[SettingReport]) -> Cause | None:
    """W16 if the server names other weights than the trainer's and the numbers do not fit either."""
    if not any(r.unexplained for r in reports) or any(c.layer == "weights" for r in reports for c in r.causes):
        return None
    declared = None
    if facts.digest is not None and facts.digest != bench.manifest_digest():
        declared = (
            f"the server says it serves weights {facts.digest[:12]}, the trainer's are {bench.manifest_digest()[:12]}"
        )
    elif (other := _digest_of(facts)) not in (None, bench.scorer.digest()):
        ours = bench.scorer.digest()[:12]
        declared = f"the server says it serves {facts.root} (weights {other!s:.12}), the trainer has {ours}"
    if declared is None:
        return None
    return _cause(
        "W16", "weights", "the engine served another checkpoint than the trainer's",
        "serve the checkpoint the trainer starts from (path, revision, dtype)",
        f"{declared}, and the numbers do not fit",
    )  # fmt: skip


def _digest_of(facts: EngineFacts) -> str | None:
    """Digest of the folder that a server on this machine says it serves; elsewhere its paths mean nothing here."""
    if not isinstance(facts.root, str) or not facts.on_this_machine:
        return None
    try:
        return checkpoint_digest(Path(facts.root))
    except (TrueupError, OSError, ValueError):
        return None
