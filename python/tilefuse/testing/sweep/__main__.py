"""``python -m tilefuse.testing.sweep run [NAME ...]`` runs rows, ``... merge`` writes the verified list."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from . import record
from .architectures import architectures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilefuse.testing.sweep", description=__doc__)
    parser.add_argument("--folder", type=Path, default=record.FOLDER, help="where the records are (%(default)s)")
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run rows that have no record of this code yet")
    run.add_argument("names", nargs="*", help="rows whose name contains one of these; all by default")
    run.add_argument("--again", action="store_true", help="also rows that have a record")
    actions.add_parser("merge", help=f"write {record.VERIFIED.name} from the records")
    given = parser.parse_args(arguments)
    if given.action == "merge":
        found = record.merged(record.records(given.folder))
        record.VERIFIED.write_text(record.text(found))
        print(f"{record.VERIFIED}: {len(found['types'])} types, {len(found['rows'])} rows")
        return 0
    failed = 0
    for row in architectures():
        if not given.names or any(name in row.name for name in given.names):
            done = record.run(row, given.folder, again=given.again)
            failed += done.status == "failed"
            print(
                f"{row.name}: {done.status}{'' if done.verified else ', attention left'}, {done.seconds} s", flush=True
            )
            for name, what in done.failures.items():
                print(f"    {name}: {what}", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
