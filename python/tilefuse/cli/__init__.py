"""The command line. Every module here that does not start with an underscore is a command.

``cli/<command>.py`` has a docstring (its first line is the help), ``add_arguments(parser)`` and
``run(args) -> int``. Exit codes: 0 ok, 1 a check failed, 2 wrong usage. ``--json`` is added to every command:
the result then goes to stdout as one JSON object and everything else to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence

OK, FAILED, USAGE = 0, 1, 2


class UsageError(Exception):
    """Raised by a command's ``run``: the message goes to stderr and the exit code is 2."""


def commands() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tilefuse", description="Checks and measures tilefuse here.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands():
        module = importlib.import_module(f"{__name__}.{name}")
        title = module.__doc__.strip().splitlines()[0]
        command = subparsers.add_parser(
            name,
            help=title,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",
        )
        command.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return args.run(args)
    except UsageError as error:
        try:
            args.parser.error(str(error))
        except SystemExit as stop:
            return int(stop.code or 0)
    raise AssertionError("unreachable")
