"""Output of the commands: rich where it is installed, plain text otherwise."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

try:
    import rich.console
    import rich.progress
    import rich.table
    import rich.text
except ImportError:
    rich = None


class Console:
    """Where a command's words go: stdout, or stderr while stdout carries JSON."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.stream = sys.stderr if as_json else sys.stdout
        # a log file is wider than the 80 columns that rich assumes of it
        width = None if self.stream.isatty() else 200
        self._rich = rich.console.Console(file=self.stream, highlight=False, width=width) if rich else None

    def say(self, text: str = "") -> None:
        if self._rich:
            self._rich.print(rich.text.Text(text), soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Cells that start with ``ok`` turn green, with ``failed`` red."""
        cells = [[str(cell) for cell in row] for row in rows]
        if self._rich:
            self.say(title)
            table = rich.table.Table(header_style="bold")
            for name in header:
                table.add_column(name, overflow="fold")
            for row in cells:
                table.add_row(*(rich.text.Text(cell, style=_style(cell)) for cell in row))
            self._rich.print(table)
            return
        widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
        self.say(title)
        for row in [list(header), ["-" * width for width in widths], *cells]:
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

    def result(self, value: Any) -> None:
        """The command's JSON object; nothing without ``--json``."""
        if self.as_json:
            print(json.dumps(value, indent=1, default=str))

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Progress]:
        if self._rich and self._rich.is_terminal:
            columns = (
                rich.progress.SpinnerColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
            )
            with rich.progress.Progress(*columns, console=self._rich, transient=True) as bar:
                task = bar.add_task(what, total=total)
                yield Progress(total, lambda text: bar.update(task, description=text), lambda: bar.advance(task))
        else:
            yield Progress(total, None, None, self)


def _style(cell: str) -> str:
    return "green" if cell.startswith("ok") else "red" if cell.startswith("failed") else ""


class Progress:
    """``start(text)`` before each step, ``done()`` after it. Without a terminal: one line per step."""

    def __init__(self, total: int, describe: Any, advance: Any, console: Console | None = None):
        self.total = total
        self._describe = describe
        self._advance = advance
        self._console = console
        self._count = 0
        self._began = time.monotonic()

    def start(self, text: str) -> None:
        if self._describe:
            self._describe(text if len(text) <= 60 else text[:59] + "…")
        elif self._console:
            elapsed = time.monotonic() - self._began
            self._console.say(f"[{self._count + 1}/{self.total}] {elapsed:5.0f} s  {text}")

    def done(self) -> None:
        self._count += 1
        if self._advance:
            self._advance()
