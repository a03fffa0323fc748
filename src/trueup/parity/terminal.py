"""The report for a person: verdict, cause, fix, evidence, numbers before and after, what was not tested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trueup.parity.catalogue import order_of, separated_by
from trueup.parity.report import Cause, ParityReport, SettingReport

LABEL_WIDTH = 11
STYLES = {"agree": "bold green", "mismatch": "bold red", "inconclusive": "bold yellow"}
ROWS = (
    ("mean |r|, nats", "mean_abs", ".3g"),
    ("rms r", "rms", ".3g"),
    ("mean r", "mean", "+.2g"),
    ("max |r|", "max_abs", ".3g"),
    ("mean w", "mean_w", ".4f"),
    ("ESS, token, raw", "ess_token", ".4f"),
    ("GSPO clip fraction", "gspo_clip_fraction", ".3f"),
    ("  from noise alone", "gspo_clip_fraction_expected", ".3f"),
)
SIDES = {"engine": "the engine's side", "trainer": "the trainer's side", "log": "in what was reported or logged"}
MAX_LISTED = 5


def clean(text: object) -> str:
    """Strip control characters: names and messages may come from a file somebody else made."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _line(console: Console, label: str, text: str, *, style: str = "") -> None:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=LABEL_WIDTH)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label, style="bold"), Text(clean(text), style=style))
    console.print(grid)


def _header(report: ParityReport) -> Iterator[tuple[str, str]]:
    header = report.header
    engines = header["engine"]
    flags = header["flags"]
    assert isinstance(engines, list) and isinstance(flags, Mapping)
    nothing = "none recorded" if header.get("url") is None else "unreadable, so behaviour was tested"
    declared = ", ".join(f"{k}={v}" for k, v in flags.items()) or nothing
    yield "engine", f"{', '.join(map(str, engines))}, {header['engine_arithmetic']}; flags: {declared}"
    yield (
        "trainer",
        f"transformers, {header['trainer_arithmetic']}, compared as {header['trainer']!r}"
        + (f"     {header['touched']}" if header.get("touched") else ""),
    )
    settings = report.settings
    edges = sum(len(s.edge_tokens) for s in settings)
    singles = sum(s.singleton_tokens for s in settings)
    yield (
        "sample",
        f"{header['rows']} completions, {header['tokens']} tokens, {len(settings)} sampling settings; {singles} tokens "
        f"with a one-token kept set, {edges} on its edge (counted, not scored)",
    )


def _cause(console: Console, cause: Cause, report: ParityReport) -> None:
    console.print()
    console.print(
        Text.assemble(
            (cause.id, "bold red"), "  ", clean(cause.title), f"   confidence {cause.confidence}, {SIDES[cause.side]}"
        )
    )
    _line(console, "  fix", cause.fix, style="bold")
    _line(console, "  evidence", cause.evidence)
    places = [s for s in report.settings if s.label in cause.settings]
    if places and cause.explained is not None:
        shown = max((s for s in places), key=lambda s: _explained(s, cause.id))
        left = shown.fixed or {}
        _line(
            console,
            "  explains",
            f"{_explained(shown, cause.id):.0%} of mean |r| on held-back tokens ({shown.label}); "
            f"mean |r| left {_number(left.get('mean_abs'), '.3g')}, rms {_number(left.get('rms'), '.3g')} "
            f"against a floor of {_number(left.get('floor_rms'), '.3g')}",
        )
    if cause.settings:
        _line(
            console,
            "  seen in",
            f"{len(cause.settings)} of {len(report.settings)} settings: {'; '.join(cause.settings)}",
        )


def _explained(setting: SettingReport, cause_id: str) -> float:
    return next((c.explained or 0.0 for c in setting.causes if c.id == cause_id), 0.0)


def _gap_table(setting: SettingReport) -> Table:
    """Numbers now and, where a cause was found, with it fixed (predicted)."""
    table = Table(box=None, padding=(0, 3, 0, 0), show_edge=False, header_style="bold")
    table.add_column("r = log p_trainer - log p_engine")
    table.add_column("now", justify="right")
    if setting.fixed is not None:
        ids = "+".join(c.id for c in setting.causes)
        table.add_column(f"{ids} fixed (predicted)", justify="right")
    for name, key, form in ROWS:
        cells = [name, _number(setting.gap.get(key), form)]
        if setting.fixed is not None:
            cells.append(_number(setting.fixed.get(key), form))
        table.add_row(*cells)
    return table


def _settings_table(settings: Sequence[SettingReport]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    for name in ("sampling", "verdict"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "mean |r|", "rms", "floor", "mean w", "draws z"):
        table.add_column(name, justify="right", no_wrap=True)
    for setting in settings:
        causes = "+".join(c.id for c in setting.causes)
        table.add_row(
            escape(clean(setting.label)),
            Text(f"{setting.verdict} {causes}".strip(), style=STYLES[setting.verdict]),
            str(setting.tokens),
            _number(setting.gap.get("mean_abs"), ".2g"),
            _number(setting.gap.get("rms"), ".2g"),
            _number(setting.noise_floor.get("rms"), ".2g"),
            _number(setting.gap.get("mean_w"), ".4f"),
            _number(setting.draws.get("surprise_z"), "+.1f"),
        )
    return table


def _limits_table(setting: SettingReport) -> Table:
    """What the setting was judged by: each number beside what rounding allows it."""
    judged, draws = setting.judgement, setting.draws
    table = Table(box=None, padding=(0, 3, 0, 0), show_edge=False, header_style="bold")
    for name in ("judged by", "nats", "limit"):
        table.add_column(name, justify="left" if name == "judged by" else "right")
    for name, value, limit in (
        ("rms of all tokens", "rms", "rms_limit"),
        (f"rms of the worst row (line {judged.get('worst_row')})", "worst_row_rms", "worst_row_limit"),
        ("largest |r| of a token", "max_abs", "token_limit"),
        ("bias per token", "bias", "bias_limit"),
    ):
        table.add_row(name, _number(judged.get(value), ".3g"), _number(judged.get(limit), ".3g"))
    if draws.get("tokens"):
        table.add_row(
            f"draws: {draws['verdict']}, most likely tokens {draws['top_tokens']} of {draws['tokens']}, expected "
            f"{_number(draws['top_expected'], '.0f')}",
            "", "",
        )  # fmt: skip
    return table


def correction(report: ParityReport) -> str:
    """What to do about the gap in the objective: nothing before the backend is clean."""
    if report.causes and {c.id for c in report.causes} <= {"W10", "O7"}:
        return "the backend is clean; what is left is staleness: correct per token against the stamped version"
    if report.verdict == "mismatch":
        names = ", ".join(c.id for c in report.causes) or "the unexplained part"
        return f"none: truncated importance sampling or masking here would hide {names}"
    if report.verdict == "agree":
        return "none needed for the backend: the gap is numeric noise"
    return "none advised: nothing was verified"


def _truncation_note(report: ParityReport) -> str | None:
    """What a trainer that ignores truncation will still see once the engine is right."""
    masses = [s for s in report.settings if s.kept_mass is not None]
    if report.header["trainer"] != "processed" or not masses:
        return None
    lowest = min(masses, key=lambda s: s.kept_mass or 1.0)
    return (
        f"TRL and verl ignore top-p and top-k: for them S4 remains (mean w = kept mass = {lowest.kept_mass:.3f} at "
        f"{lowest.label}); --trainer trl checks exactly this"
    )


def _sequences(report: ParityReport) -> str | None:
    """What the agreement of single tokens leaves open for whole sequences, at this run's own lengths."""
    found = [s.sequence for s in report.settings if s.sequence]
    if report.verdict != "agree" or not found:
        return None
    worst = max(found, key=lambda s: s["bias_nats"] + s["noise_nats"])
    return (
        f"tokens agree; the log ratio of a whole completion of {worst['tokens']:.0f} tokens may be off by up to "
        f"{worst['bias_nats']:.2g} nats of bias and {worst['noise_nats']:.2g} of noise (rms): mind that for GSPO and "
        "sequence-level corrections"
    )


def _lists(report: ParityReport) -> Iterator[tuple[str, str]]:
    for group in dict.fromkeys(g for s in report.settings for g in s.ambiguous):
        yield "ambiguous", f"{' '.join(group)}: separated by {separated_by(group)}"
    for probe in report.probes:
        yield "probe", f"{'DIFFERS' if probe['differs'] else 'alike'}  {probe['text']}"
    yield "correction", correction(report)
    if (note := _truncation_note(report)) is not None:
        yield "trainers", note
    if (sequences := _sequences(report)) is not None:
        yield "sequences", sequences
    if report.ruled_out:
        yield "ruled out", " ".join(report.ruled_out)
    if report.not_seen:
        above: dict[str, list[str]] = {}
        for cause, size in report.not_seen.items():
            above.setdefault(f"{size:.2g}", []).append(cause)
        said = (f"{' '.join(ids)} (would show above {size} nats rms)" for size, ids in above.items())
        yield "not seen", "; ".join(said)
    if report.untested:
        groups: dict[str, list[str]] = {}
        for cause, why in report.untested.items():
            groups.setdefault(why, []).append(cause)
        yield "untested", "; ".join(f"{' '.join(ids)} ({why})" for why, ids in groups.items())
    named = {c.id for c in report.causes}
    for advice in report.recipe:
        if advice["id"] not in named:
            yield "recipe", f"{advice['id']}: {advice['message']}; {advice['fix']}"
    for note in report.notes:
        yield "note", note
    for problem in report.problems[:MAX_LISTED]:
        yield "bad input", problem
    if len(report.problems) > MAX_LISTED:
        yield "bad input", f"and {len(report.problems) - MAX_LISTED} more (all in --json)"
    edges = [(s.label, e) for s in report.settings for e in s.edge_tokens]
    if edges:
        shown = ", ".join(f"line {e['line']} token {e['token']}" for _, e in edges[:MAX_LISTED])
        yield (
            "edge",
            f"{len(edges)} tokens outside the trainer's kept set: {shown}{', ...' if len(edges) > MAX_LISTED else ''}",
        )


def _verdict(report: ParityReport) -> str:
    if report.verdict == "agree":
        return "AGREE      every setting is within the noise floor that rounding predicts, drawn as declared"
    if report.verdict == "inconclusive":
        reasons = {s.why for s in report.settings if s.verdict == "inconclusive"}
        return f"INCONCLUSIVE  {'; '.join(sorted(reasons))}"
    unfinished = sorted({i for s in report.settings for i in s.unfinished}, key=order_of)
    if not report.causes and unfinished:
        return (
            f"MISMATCH   not finished: the search for a cause was cut short before {' '.join(unfinished)}; go on with "
            f"--set check.search_tokens=N (now {report.header['search']}) or without check.search_s"
        )
    if not report.causes:
        return "MISMATCH   no known cause fits"
    return f"MISMATCH   {len(report.causes)} cause{'s' if len(report.causes) > 1 else ''} named"


def render(report: ParityReport, console: Console) -> None:
    """Print the report."""
    for label, text in _header(report):
        _line(console, label, text)
    console.print()
    console.print(Text(clean(_verdict(report)), style=STYLES[report.verdict]))
    for cause in report.causes:
        _cause(console, cause, report)
    for setting in report.settings:
        if setting.unexplained:
            console.print()
            left = setting.unexplained
            _line(
                console,
                "unexplained",
                f"{setting.label}: {left['text']} (layer {left['layer']}): rms {_number(left['rms'], '.3g')} left, "
                f"floor {_number(left['floor_rms'], '.3g')}",
            )
    if (worst := report.worst) is not None and worst.gap:
        console.print()
        _line(console, "largest gap", worst.label)
        console.print(Padding(_gap_table(worst), (0, 0, 0, 2)))
        console.print(Padding(_limits_table(worst), (1, 0, 0, 2)))
        console.print(Padding(Text(f"floor: {clean(worst.noise_floor.get('basis', ''))}", style="dim"), (0, 0, 0, 2)))
    console.print()
    console.print(_settings_table(report.settings))
    if report.against is not None:
        console.print()
        _line(console, "against", str(report.against["text"]))
    console.print()
    for label, text in _lists(report):
        _line(console, label, text)
    _line(console, "time", f"{report.seconds:.0f} s      exit {report.exit_code} ({report.verdict})")
