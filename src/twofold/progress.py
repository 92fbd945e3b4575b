"""One line of progress for anything long."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TERMINAL = Console(stderr=True)  # stdout belongs to results


class Line:
    """One line of progress: what, how far, how fast, loss beside its chance level, rank, time left.

    Where nobody watches (a pipe, CI) it prints a plain line at each tenth of the way instead. `quiet` prints nothing.
    """

    def __init__(self, what: str, *, unit: str, done: int = 0, quiet: bool = False):
        self._what, self._unit, self._quiet = what, unit, quiet
        self._first, self._start, self._tenth = done, time.monotonic(), 0
        self._bar = Progress(
            TextColumn("  {task.description:<8}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} · {task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=TERMINAL,
            disable=quiet or not TERMINAL.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Line":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def turn(self, what: str, *, unit: str) -> None:
        """Go on with something else, with a rate of its own."""
        if what != self._what:
            self._what, self._unit = what, unit
            self._first, self._start, self._tenth = 0, time.monotonic(), 0
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None

    def update(
        self, done: int, total: int, *, per_unit: float = 1.0, figures: Mapping[str, float] | None = None
    ) -> None:
        """`done` of `total`; `per_unit` turns them into what the rate counts (images a step)."""
        rate = (done - self._first) * per_unit / max(time.monotonic() - self._start, 1e-9)
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        words = f"{shown} {self._unit}/s" + "".join(f" · {k} {v:.3f}" for k, v in (figures or {}).items())
        if self._task is None:
            self._task = self._bar.add_task(self._what, total=total, completed=self._first, figures="")
        self._bar.update(self._task, completed=done, total=total, figures=words)
        tenth = 10 * done // max(total, 1)
        if not (TERMINAL.is_terminal or self._quiet) and tenth > self._tenth:
            left = (total - done) * per_unit / max(rate, 1e-9)
            said = f"  {self._what} {done}/{total} · {words} · {left:.0f} s left"
            TERMINAL.print(said, highlight=False, soft_wrap=True)
        self._tenth = tenth
