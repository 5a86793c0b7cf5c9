"""What docstrings of this package hold and Markdown does not know, written in Markdown before they are parsed."""

from __future__ import annotations

import re
from typing import Any

import griffe

RULE = re.compile(r"^ *=+(  *=+)+ *$")


def to_markdown(text: str) -> str:
    """``Example::`` and ``words::`` before a literal block lose a colon; tables drawn with ``===`` become literal."""
    lines, inside = [], 0
    following = [*text.splitlines()[1:], ""]
    for line, after in zip(text.splitlines(), following):
        if RULE.match(line):
            # the first rule opens the table, the third closes it, or the second of a table without headings
            indent = line[: len(line) - len(line.lstrip())]
            inside += 1
            if inside == 1:
                lines.append(f"{indent}```text")
            lines.append(line)
            if inside == 3 or (inside == 2 and not after.strip()):
                lines.append(f"{indent}```")
                inside = 0
            continue
        if not inside and line.rstrip().endswith("::"):
            line = line.rstrip()[:-1]
            if re.fullmatch(r" *Examples?:", line):
                # not a section of doctests but a literal block
                line = re.sub(r"Examples?:", "**Example**", line)
        lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Runs once per object, before its docstring is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
