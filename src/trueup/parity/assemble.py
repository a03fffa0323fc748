"""From judged settings and probes to one report: causes merged and ranked, what was ruled out, what was not tested."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from trueup.parity.catalogue import IMPLEMENTED, NOT_IMPLEMENTED, order_of
from trueup.parity.report import NOT_TRIED, TRIED, Cause, SettingReport
from trueup.trace import TraceRow

NOT_BUILT = "not implemented: never named"


def merge(reports: Sequence[SettingReport], probed: Sequence[Cause] = ()) -> list[Cause]:
    """One entry a cause id: what probes saw first, then by the number of settings and by how much is explained."""
    merged: dict[str, Cause] = {}
    for report in reports:
        for cause in report.causes:
            known = merged.get(cause.id)
            best = cause if known is None or (cause.explained or 0) > (known.explained or 0) else known
            places = (known.settings if known else ()) + cause.settings
            merged[cause.id] = replace(best, settings=places)
    first = {c.id: c for c in probed}
    for cause_id in first:
        if cause_id in merged:
            other = merged.pop(cause_id)
            first[cause_id] = replace(first[cause_id], settings=other.settings, explained=other.explained)
    rest = sorted(merged.values(), key=lambda c: (-len(c.settings), -(c.explained or 1.0)))
    return [*first.values(), *rest]


def ruled_out(reports: Sequence[SettingReport], named: Sequence[Cause]) -> list[str]:
    """Ids that a setting ruled out, and that no other setting leaves possible, in catalogue order."""
    gone = _possible(reports, named) | _left_open(reports)
    return sorted({i for r in reports for i in r.ruled_out} - gone, key=order_of)


def not_seen(
    reports: Sequence[SettingReport], named: Sequence[Cause], probed: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Ids that are neither named nor ruled out nor possible, with the smallest rms in nats above which a setting or a
    probe (`probed`) would have shown them, in catalogue order."""
    sizes = dict(probed or {})
    for cause_id, size in (item for r in reports for item in r.not_seen.items()):
        sizes[cause_id] = min(size, sizes.get(cause_id, size))
    gone = _possible(reports, named) | (_left_open(reports) - set(probed or {})) | set(ruled_out(reports, named))
    return {i: sizes[i] for i in sorted(sizes.keys() - gone, key=order_of)}


def _possible(reports: Sequence[SettingReport], named: Sequence[Cause]) -> set[str]:
    """Ids that are named, or that a setting could not tell from those."""
    return {i for r in reports for group in r.ambiguous for i in group} | {c.id for c in named}


def _left_open(reports: Sequence[SettingReport]) -> set[str]:
    """Ids that may be behind a gap that a setting leaves unexplained."""
    return {i for r in reports for i, why in r.untested.items() if why in (TRIED, NOT_TRIED)}


def reach(absent: Collection[str], rows: Sequence[TraceRow], *, by_ids: bool) -> list[str]:
    """How far causes that were not there were looked for, where only longer sequences, or prompts sent as text (not
    `by_ids`), could show them."""
    notes = []
    long = [i for i in ("T9", "I8", "I9") if i in absent]
    if long and rows:
        longest = max(len(r.prompt_token_ids) + len(r.completion_token_ids) for r in rows)
        notes.append(f"{' '.join(long)}: looked for up to {longest} tokens, the longest sequence here")
    worded = [i for i in ("T3", "T5") if i in absent]
    if worded and by_ids:
        notes.append(f"{' '.join(worded)}: looked for with prompts sent as token ids, as here; not with text or chat")
    return notes


def untested(
    reports: Sequence[SettingReport], tested: Sequence[str], missing: Mapping[str, str], undecided: Mapping[str, str]
) -> dict[str, str]:
    """Why each other id was not tested, in catalogue order: as the settings say, else as `missing` does; `undecided`
    ids stay so whatever the settings say."""
    done = set(tested) - set(undecided)
    reasons: dict[str, dict[str, None]] = {}
    for cause_id, why in (item for r in reports for item in r.untested.items() if item[0] not in done):
        reasons.setdefault(cause_id, {})[why] = None
    found = {i: ", or ".join(why) for i, why in reasons.items()}
    found |= {i: why for i, why in missing.items() if i not in done and i in IMPLEMENTED}
    found |= dict(undecided) | dict.fromkeys(NOT_IMPLEMENTED, NOT_BUILT)
    return dict(sorted(found.items(), key=lambda item: order_of(item[0])))
