"""What is shown while batches are trained on: one line that changes, on the terminal only."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHOWN = (
    ("reward", "reward/all/mean", "{:.3f}"),
    ("lag", "lag/oldest_token/max", "{:.0f}"),
    ("tokens/s", "tokens/generated/per_s", "{:.0f}"),
    ("ESS", "gap/ess/token", "{:.3f}"),
    ("gap", "gap/log_ratio/rms", "{:.2g}"),
    ("clip", "policy/clip/fraction", "{:.1%}"),
    ("wait", "time/wait_s", "{:.1f}s"),
    ("train", "time/train_s", "{:.1f}s"),
    ("pause", "time/pause_s", "{:.2f}s"),
)


class TrainProgress:
    """A progress bar over batches with the last batch's numbers."""

    def __init__(self, console: Console, *, total: int | None, done: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console)
        self._task = self._progress.add_task("batch", total=total, completed=done, numbers="")

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def batch(self, metrics: Mapping[str, float]) -> None:
        """Show that a batch is done, with its numbers."""
        self._progress.update(self._task, advance=1, numbers=line_of(metrics))


def line_of(metrics: Mapping[str, float]) -> str:
    """The numbers of a batch in one line, for those that were measured."""
    return "  ".join(f"{title} {form.format(metrics[name])}" for title, name, form in SHOWN if name in metrics)
