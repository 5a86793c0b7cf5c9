"""Counts that the code keeps: arguments of kernels, lengths of functions and lines, formatter exceptions, names.

``make lint`` runs it; exits with 1 and names each place that passes a limit.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL_ARGUMENTS = 40
# a tensor is one argument where a launch costs little beside its kernel
FEW_KERNEL_ARGUMENTS = 20
FEW = (
    "triton_kernels/attention/",
    "triton_kernels/mla/mla_attention.py",
    "triton_kernels/moe/grouped_matmul.py",
    "triton_kernels/moe/moe_experts.py",
    "triton_kernels/fp8/grouped_matmul.py",
)
FUNCTION_LINES = 120
LINE = 120
FORMATTER_EXCEPTIONS = 59
# put together, so that this file does not count itself
EXCEPTION = "# fmt: " + "skip"
BANNER = re.compile(r"\s*(//|#)\s*([-=*#/~]{3}|.*[-=*#/~]{4}\s*$)")
# gradients of outputs are dout, those of arguments d<argument>
GRADIENT = re.compile(r"\b(grads?|grad_\w+|\w+_grads?)\b")


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).exists()]


def is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def python_problems(path: Path) -> Iterator[str]:
    """Of one Python file: kernels' arguments, long functions, absolute imports of the package by its own kernels."""
    name = str(path.relative_to(ROOT))
    in_kernels = name.startswith("triton_kernels/")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and is_jit(node):
            limit = FEW_KERNEL_ARGUMENTS if name.startswith(FEW) else KERNEL_ARGUMENTS
            if in_kernels and node.name.endswith("_kernel") and len(node.args.args) > limit:
                yield f"{name}:{node.lineno}: {node.name} takes {len(node.args.args)} arguments, at most {limit}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"
        elif in_kernels and isinstance(node, ast.Import | ast.ImportFrom) and path.name != "host.py":
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            absolute = isinstance(node, ast.Import) or node.level == 0
            if absolute and any(n.split(".")[0] == "tilefuse" for n in names):
                yield f"{name}:{node.lineno}: absolute import of the package, only host.py may"


def problems() -> list[str]:
    """Every place that passes a limit."""
    python = tracked("*.py")
    native = tracked("*.cpp", "*.h", "*.cu", "*.cuh")
    found = [problem for path in python for problem in python_problems(path)]
    exceptions = sum(path.read_text().count(EXCEPTION) for path in python)
    if exceptions > FORMATTER_EXCEPTIONS:
        found.append(f"{exceptions} lines with {EXCEPTION}, at most {FORMATTER_EXCEPTIONS}")
    for path in (*python, *native, *tracked("*.sh")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found.extend(f"{path.relative_to(ROOT)}:{number}: {problem}" for problem in line_problems(path, line))
    return found


def line_problems(path: Path, line: str) -> Iterator[str]:
    """Of one line of code: its length, banners, and in C++ what is named or defined as nothing else is."""
    if len(line) > LINE and path.suffix != ".sh":
        yield f"{len(line)} columns, at most {LINE}"
    if BANNER.match(line):
        yield "a banner"
    if path.suffix not in (".py", ".sh"):
        # the emulation binds its functions, ops are defined in Python
        if "emulation" not in path.parts and re.search(r"\bm\.def\(", line):
            yield "m.def, ops are defined in Python"
        if named := GRADIENT.search(line):
            yield f"{named.group()}, gradients are dout and d<argument>"


def main() -> int:
    found = problems()
    print("\n".join(found) if found else "all counts within their limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
