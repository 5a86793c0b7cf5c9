"""What the documentation makes of the code while it is built: pictures, tables, the API and formulas.

A page asks for a table with a comment, ``<!-- table: support rope -->``, and for a picture by linking to
``pictures/<name>.svg``; both are made from the installed package, so neither is in the repository.
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

# mkdocs imports this file by its path
sys.path.insert(0, str(Path(__file__).parent))

import pictures
import tables

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"^<!-- table: (\w+)((?: [\w.-]+)*) -->$", re.MULTILINE)
PICTURE = re.compile(r"pictures/([\w-]+)\.svg")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
# the name of a function, as in tanh
WORD = re.compile(r"<mi>(?=[a-z]{2,}<)")
_folder = tempfile.TemporaryDirectory(prefix="tilefuse-docs-")


def on_files(files: Files, config: Any) -> Files:
    """Draws the pictures that pages link to, before links are checked."""
    wanted = {"benchmarks": tables.benchmark_pictures}
    for file in list(files.documentation_pages()):
        text = Path(file.abs_src_path).read_text()
        for name in PICTURE.findall(text):
            make = getattr(pictures, name.replace("-", "_"), None)
            if make is None:
                raise PluginError(f"{file.src_uri}: there is no picture {name!r} in docs/tools/pictures.py")
            wanted[name] = partial(_one_picture, make, name)
    folder = Path(_folder.name)
    for make in wanted.values():
        for path in make(folder):
            uri = f"pictures/{path.name}"
            files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def _one_picture(make: Any, name: str, folder: Path) -> list[Path]:
    path = folder / f"{name}.svg"
    pictures.save(make(), path)
    return [path]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Puts the tables in."""

    def table(match: re.Match[str]) -> str:
        make = getattr(tables, match[1], None)
        if make is None:
            raise PluginError(f"{page.file.src_uri}: there is no table {match[1]!r} in docs/tools/tables.py")
        return make(*match[2].split())

    return TABLE.sub(table, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """TeX becomes MathML, which browsers draw by themselves: no script, no font, no network."""

    def formula(match: re.Match[str]) -> str:
        tex = match[2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        drawn = convert(tex.strip()[2:-2].strip(), display="block" if match[1] == "div" else "inline")
        return WORD.sub('<mi mathvariant="normal">', drawn)

    return FORMULA.sub(formula, html)
