"""The report as one HTML file: no script, no font, no picture from anywhere else. Text from engines is escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment

from trueup.errors import TrueupError
from trueup.parity import figures
from trueup.parity.catalogue import separated_by
from trueup.parity.report import ParityReport, SettingReport
from trueup.parity.terminal import ROWS, clean, correction

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>trueup check: {{ report.verdict }}</title><style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 68em; color: #1d1d1f; }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em }
table { border-collapse: collapse; margin: .6em 0 } td, th { padding: .15em .9em .15em 0; text-align: left;
vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
.agree { color: #1a7f37 } .mismatch { color: #b3261e } .inconclusive { color: #9a6700 }
.figures { display: flex; flex-wrap: wrap } .figures figure { margin: 0 1em 1em 0 } figcaption { color: #666 }
code { background: #f3f3f5; padding: .1em .3em } dt { font-weight: 600 } dd { margin: 0 0 .6em 0 }
</style></head><body>
<h1 class="{{ report.verdict }}">{{ report.verdict | upper }}</h1>
<table>
<tr><th>engine</th><td>{{ engine }}, {{ header.engine_arithmetic }}</td></tr>
<tr><th>flags</th><td>{{ flags }}</td></tr>
<tr><th>trainer</th><td>transformers, {{ header.trainer_arithmetic }}, compared as “{{ header.trainer }}”</td></tr>
<tr><th>sample</th><td>{{ header.rows }} completions, {{ header.tokens }} tokens, {{ report.settings | length }}
settings, {{ "%.0f" | format(report.seconds) }} s</td></tr>
<tr><th>correction</th><td>{{ correction }}</td></tr>
</table>
{% for cause in report.causes %}
<h2>{{ cause.id }} {{ cause.title }}</h2><dl>
<dt>fix</dt><dd><code>{{ cause.fix }}</code></dd>
<dt>evidence</dt><dd>{{ cause.evidence | clean }}</dd>
<dt>confidence</dt><dd>{{ cause.confidence }}{% if cause.explained is not none %}; explains
{{ "%.0f %%" | format(100 * cause.explained) }} of mean |r| on held-back tokens{% endif %}</dd>
{% if cause.settings %}<dt>seen in</dt><dd>{{ cause.settings | join("; ") }}</dd>{% endif %}</dl>
{% endfor %}
{% if report.probes %}<h2>Probes</h2><table>{% for probe in report.probes %}
<tr><td class="{{ 'mismatch' if probe.differs else 'agree' }}">{{ "differs" if probe.differs else "alike" }}</td>
<td>{{ probe.name }}</td><td>{{ probe.text | clean }}</td></tr>{% endfor %}</table>{% endif %}
{% for setting, drawn in settings %}
<h2>{{ setting.label }}: <span class="{{ setting.verdict }}">{{ setting.verdict }}</span></h2>
<p>{{ setting.why }}.{% if setting.unexplained %} Unexplained: {{ setting.unexplained.text }}.{% endif %}</p>
<table><tr><th>r = log p<sub>trainer</sub> − log p<sub>engine</sub></th><th>now</th>
{% if setting.fixed %}<th>{{ setting.causes | map(attribute="id") | join("+") }} fixed (predicted)</th>{% endif %}</tr>
{% for name, key, form in rows %}<tr><td>{{ name }}</td><td class="n">{{ setting.gap.get(key) | number(form) }}</td>
{% if setting.fixed %}<td class="n">{{ setting.fixed.get(key) | number(form) }}</td>{% endif %}</tr>{% endfor %}
<tr><td>predicted floor, rms</td><td class="n">{{ setting.noise_floor.get("rms") | number(".3g") }}</td></tr></table>
<div class="figures">{% for caption, svg in drawn %}<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption>
</figure>{% endfor %}</div>
{% endfor %}
{% if scan %}<h2>Version scan</h2><div class="figures"><figure>{{ scan | safe }}<figcaption>mean |r| of the engine's
numbers under each weight version given</figcaption></figure></div>{% endif %}
<h2>Not named</h2><dl>
<dt>not seen</dt><dd>{% for id, size in report.not_seen.items() %}{{ id }} (above {{ "%.2g" | format(size) }} nats
rms){{ ", " if not loop.last }}{% else %}nothing{% endfor %}</dd>
<dt>ruled out</dt><dd>{{ report.ruled_out | join(" ") or "nothing" }}</dd>
<dt>untested</dt><dd>{% for id, why in report.untested.items() %}{{ id }}: {{ why }}<br>{% endfor %}</dd>
{% if ambiguous %}<dt>ambiguous</dt><dd>{% for ids, how in ambiguous %}{{ ids | join(" ") }}: separated by
{{ how }}<br>{% endfor %}</dd>{% endif %}
{% if report.notes %}<dt>notes</dt><dd>{% for note in report.notes %}{{ note | clean }}<br>{% endfor %}</dd>{% endif %}
{% if report.problems %}<dt>bad input</dt><dd>{% for p in report.problems %}{{ p | clean }}<br>{% endfor %}</dd>
{% endif %}
{% if report.against %}<dt>against</dt><dd>{{ report.against.text | clean }}</dd>{% endif %}</dl>
</body></html>
"""


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _figures(setting: SettingReport) -> list[tuple[str, str]]:
    if len(setting.points.engine) < 2:
        return []
    return [
        ("trainer against engine, each token", figures.scatter(setting)),
        ("r over the predicted floor", figures.histogram(setting)),
        ("r by position", figures.by_position(setting)),
        ("r by probability", figures.by_probability(setting)),
    ]


def render_html(report: ParityReport) -> str:
    """Return the whole page."""
    environment = Environment(autoescape=True)
    environment.filters |= {"number": _number, "clean": clean}
    header = report.header
    flags, engines, scan = header["flags"], header["engine"], header.get("version_scan")
    assert isinstance(flags, dict) and isinstance(engines, list)
    floor = report.settings[0].noise_floor.get("rms") if report.settings else None
    return environment.from_string(TEMPLATE).render(
        report=report,
        header=header,
        engine=clean(", ".join(map(str, engines))),
        flags=clean(", ".join(f"{k}={v}" for k, v in flags.items()) or "none recorded"),
        correction=correction(report),
        settings=[(s, _figures(s)) for s in report.settings],
        rows=ROWS,
        ambiguous=[(g, separated_by(g)) for g in dict.fromkeys(g for s in report.settings for g in s.ambiguous)],
        scan=figures.version_scan(scan, floor if isinstance(floor, float) else 0.0) if isinstance(scan, list) else None,
    )


def write_html(report: ParityReport, path: Path) -> None:
    """Write the page. Raises TrueupError when the file cannot be written."""
    try:
        path.write_text(render_html(report), encoding="utf-8")
    except OSError as error:
        raise TrueupError(f"cannot write {path}: {error.strerror}") from None
