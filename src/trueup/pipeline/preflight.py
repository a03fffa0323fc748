"""The gate: before the first step the real engine, with the run's own sampling, is checked against the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trueup.errors import EngineError, MismatchError
from trueup.knobs import CheckConfig, Config
from trueup.parity.live import check_engine
from trueup.parity.report import ParityReport, write_json
from trueup.pipeline.launch import EngineProcess


def preflight(
    config: Config,
    engines: Sequence[EngineProcess],
    run: Path,
    *,
    accepted: Sequence[str],
    announce: Callable[[str], None],
) -> ParityReport:
    """Check the engines and write parity/preflight.json.

    Raises MismatchError, naming causes and fixes, when it is mismatch and not every cause was accepted by its id;
    EngineError when it could not be told.
    """
    sampling = ",".join(f"{name}={value}" for name, value in config.sampling.model_dump().items())
    check = CheckConfig(
        engine=tuple(e.url for e in engines), model=config.train.model, token_file=engines[0].token_file,
        dtype=config.train.dtype, head=config.train.head, sampling=sampling, depth="quick",
    )  # fmt: skip
    report = check_engine(check)
    (run / "parity").mkdir(exist_ok=True)
    write_json(report, run / "parity" / "preflight.json")
    worst = report.worst
    numbers = f"  rms r {worst.gap['rms']:.2g}, floor {worst.noise_floor['rms']:.2g} nats" if worst is not None else ""
    announce(f"preflight  {report.verdict}{numbers}  {report.seconds:.0f} s")
    if report.verdict == "agree":
        return report
    open_causes = [c for c in report.causes if c.id not in accepted]
    if report.causes and not open_causes:
        announce(f"preflight  going on with accepted {', '.join(c.id for c in report.causes)}")
        return report
    where = f"the report is in {run / 'parity' / 'preflight.json'}"
    if report.verdict != "mismatch":
        raise EngineError(f"whether the engine agrees with the trainer could not be told ({report.verdict}); {where}")
    named = "; ".join(f"{c.id} {c.title}: {c.fix}" for c in open_causes) or "no cause could be named"
    raise MismatchError(
        f"the engine does not agree with the trainer: {named}; {where}; --accept-mismatch ID goes on knowingly"
    )
