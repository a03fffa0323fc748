"""The numbers of a run in other people's tools, besides metrics.jsonl: TensorBoard, Weights & Biases (offline)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trueup.errors import ConfigError

Log = Callable[[int, Mapping[str, float]], None]


class Sinks:
    """Hands every batch's numbers on; each sink writes under the run's folder and speaks to nobody."""

    def __init__(self, names: Sequence[str], run: Path) -> None:
        """Open them. Raises ConfigError for one whose package is not installed, naming the extra."""
        opened = [OPENERS[name](run) for name in names]
        self._sinks: list[tuple[Log, Callable[[], None]]] = opened

    def log(self, batch: int, metrics: Mapping[str, Any]) -> None:
        """Write the numbers of a batch."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for log, _ in self._sinks:
            log(batch, numbers)

    def close(self) -> None:
        """Have everything written."""
        for _, close in self._sinks:
            close()


def _missing(extra: str) -> ConfigError:
    return ConfigError(f"monitor.sinks has {extra!r}, which is not installed: pip install 'trueup[{extra}]'")


def _tensorboard(run: Path) -> tuple[Log, Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    writer = SummaryWriter(str(run / "tensorboard"))

    def log(batch: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, batch)

    return log, writer.close


def _wandb(run: Path) -> tuple[Log, Callable[[], None]]:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    (run / "wandb").mkdir(exist_ok=True)
    quiet = wandb.Settings(silent=True)  # the terminal is the run's own
    session = wandb.init(project="trueup", name=run.name, dir=str(run), mode="offline", settings=quiet)
    return lambda batch, numbers: session.log(dict(numbers), step=batch), session.finish


OPENERS: dict[str, Callable[[Path], tuple[Log, Callable[[], None]]]] = {"tensorboard": _tensorboard, "wandb": _wandb}
