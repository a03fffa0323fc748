"""A check with a bar that says what runs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trueup.errors import ConfigError, EngineError
from trueup.knobs import CheckConfig
from trueup.parity.interrupts import terminated_like_interrupted
from trueup.parity.report import ParityReport
from trueup.parity.terminal import clean


def run_with_progress(check: CheckConfig, console: Console) -> ParityReport:
    """Check an engine or a trace, whichever the configuration names.

    Raises ConfigError for both, EngineError when interrupted, and whatever TrueupError the check raises.
    """
    if check.engine and check.trace is not None:
        raise ConfigError("name either --engine or --trace, not both (--against compares two)")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with terminated_like_interrupted(), Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def announce(message: str) -> None:
            bar.update(task, description=clean(message))

        def progress(what: str, share: float) -> None:
            bar.update(task, description=clean(what), completed=share)

        def say(line: str) -> None:
            bar.console.print(clean(line), markup=False, highlight=False)

        try:
            if check.engine:
                from trueup.parity.live import check_engine

                return check_engine(check, announce=announce, say=say, progress=progress)
            from trueup.parity.run import check_trace

            return check_trace(check, announce=announce, say=say)
        except KeyboardInterrupt:
            raise EngineError("interrupted; nothing was concluded") from None
