"""Reads binaries: registers, memory and instructions of what the compilers made."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import arch
from .recorder import Launch

_ROOT = Path(__file__).resolve().parents[4]
CUDA_LIBRARY = Path(__file__).parents[2] / "_cuda.abi3.so"
_MATRIX = re.compile(r"(H|I|Q|O|D|B)MMA|(H|I|Q|B)GMMA|UTC\w*MMA")
_TMA = re.compile(r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP")
# what a loop that works reads or multiplies, in SASS and in AMD's assembly
_WORK = re.compile(r"LDG|LDS|UTMALDG|UBLKCP|UTC\w*MMA|[A-Z]G?MMA|(global|buffer)_load|ds_(read|load)|v_mfma")


@functools.cache
def _tool(name: str) -> str:
    """cuobjdump or nvdisasm: Triton's own copy, else the CUDA toolkit's."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name
        if bundled.exists():
            return str(bundled)
    return name


def can_read() -> bool:
    return all(shutil.which(_tool(name)) for name in ("cuobjdump", "nvdisasm"))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary(mix: Counter[str]) -> dict[str, Any]:
    """The figures of the gate, from the count of each full mnemonic (``LDG.E.128``)."""
    counts = ("spills", "loads_128", "stores_128", "loads_16", "bulk_copies")
    figures: dict[str, Any] = {**dict.fromkeys(counts, 0), "matrix": {}}
    for mnemonic, count in mix.items():
        base, *modifiers = mnemonic.split(".")
        wide = "128" in modifiers or "256" in modifiers
        if base in ("LDL", "STL"):
            figures["spills"] += count
        elif base in ("LDG", "LDGSTS"):
            figures["loads_128"] += count * wide
            figures["loads_16"] += count * bool({"U16", "S16", "U8", "S8"} & set(modifiers))
        elif base == "STG":
            figures["stores_128"] += count * wide
        elif _TMA.fullmatch(base):
            figures["bulk_copies"] += count
        elif _MATRIX.fullmatch(base):
            figures["matrix"][base] = figures["matrix"].get(base, 0) + count
    return figures


@dataclass
class Code:
    """The instructions of one function in order; all positions count them."""

    mnemonics: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branches: list[tuple[int, str]] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    spills: list[int] = field(default_factory=list)

    def loop_spills(self) -> int:
        """How many of the spills lie in an innermost loop that loads or multiplies; one that only waits is none."""
        loops = []
        for end, label in self.branches:
            start = self.labels.get(label, end + 1)
            # rare blocks are set aside past the exit and come back: no loop
            exits = any(start <= at <= end for at in self.exits)
            if not exits and any(_WORK.match(m) for m in self.mnemonics[start : end + 1]):
                loops.append((start, end))
        inner = [(s, e) for s, e in loops if not any((a, b) != (s, e) and s <= a and b <= e for a, b in loops)]
        return sum(any(s <= at <= e for s, e in inner) for at in self.spills)


def read_sass(disassembly: str) -> dict[str, Code]:
    """Function name -> its code, from ``nvdisasm -c``."""
    functions: dict[str, Code] = {}
    code = Code()
    for line in disassembly.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            code = functions.setdefault(section.group(1), Code())
        elif label := re.match(r"\s*(\.L\w+):", line):
            code.labels[label.group(1)] = len(code.mnemonics)
        # predicates (@P0, @!UP1) and {dual issue} braces come before the mnemonic
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            predicate, mnemonic, operands = found.groups()
            at, base = len(code.mnemonics), mnemonic.split(".")[0]
            if base in ("LDL", "STL"):
                code.spills.append(at)
            elif base == "EXIT" and predicate is None:
                code.exits.append(at)
            elif base == "BRA" and (target := re.search(r"`\((\.L\w+)\)", operands)):
                code.branches.append((at, target.group(1)))
            code.mnemonics.append(mnemonic)
    return functions


def read_cubin(path: Path) -> dict[str, dict[str, Any]]:
    """Function name -> registers, stack, static shared memory and instruction figures of a cubin."""
    usage = _run(_tool("cuobjdump"), "--dump-resource-usage", str(path))
    functions = read_sass(_run(_tool("nvdisasm"), "-c", str(path)))
    found = {}
    for name, figures in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        values = dict(re.findall(r"(\w+(?:\[\d+\])?):(\d+)", figures))
        code = functions.get(name, Code())
        mix = Counter(code.mnemonics)
        found[name] = {
            "registers": int(values["REG"]),
            "stack": int(values["STACK"]),
            "shared": int(values["SHARED"]),
            **summary(mix),
            "loop_spills": code.loop_spills(),
            "mix": _by_base(mix),
        }
    return found


def _by_base(mix: Counter[str]) -> dict[str, int]:
    bases: Counter[str] = Counter()
    for mnemonic, count in mix.items():
        bases[mnemonic.split(".")[0]] += count
    return dict(bases.most_common())


def _amdgcn_code(text: str) -> Code:
    code = Code()
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            code.labels[label.group(1)] = len(code.mnemonics)
        elif found := re.match(r"\s+([a-z]+_[a-z0-9_]+)\s*(.*)", line):
            mnemonic, operands = found.groups()
            at = len(code.mnemonics)
            if mnemonic.startswith(("scratch_", "buffer_")) and "Folded" in operands:
                code.spills.append(at)
            elif mnemonic == "s_endpgm":
                code.exits.append(at)
            elif mnemonic.startswith(("s_branch", "s_cbranch")):
                code.branches.append((at, operands.split()[0]))
            code.mnemonics.append(mnemonic)
    return code


def _read_amdgcn(text: str) -> dict[str, Any]:
    """The same figures from AMD's assembly text; wide accesses are the dwordx4 ones, the matrix unit is MFMA."""
    code = _amdgcn_code(text)

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(match.group(1)) if match else 0

    mix = Counter(code.mnemonics)
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        # scalar registers spill into lanes of vector registers; where those run out, `stack` shows it
        "spills": number("vgpr_spill_count"),
        "loop_spills": code.loop_spills(),
        "loads_128": sum(n for m, n in mix.items() if re.fullmatch(r"(global|buffer)_load_(lds_)?dwordx4", m)),
        "stores_128": sum(n for m, n in mix.items() if re.fullmatch(r"(global|buffer)_store_dwordx4", m)),
        "loads_16": sum(n for m, n in mix.items() if re.fullmatch(r"(global|buffer)_load_(u|s)?(short|byte)\w*", m)),
        "bulk_copies": 0,
        "matrix": {"MFMA": n} if (n := sum(n for m, n in mix.items() if m.startswith("v_mfma"))) else {},
        "mix": dict(mix.most_common()),
    }


def lacking(expected: Iterable[str], figures: Mapping[str, Any]) -> list[str]:
    """Expected instructions that a binary does not have."""

    def has(item: str) -> bool:
        if item == "LDG.128":
            return figures["loads_128"] > 0 or figures["bulk_copies"] > 0
        if item == "STG.128":
            return figures["stores_128"] > 0 or figures["bulk_copies"] > 0
        if item == "MMA":
            return bool(figures["matrix"])
        return any(mnemonic.startswith(item) for mnemonic in figures["mix"])

    return [item for item in expected if not any(has(choice) for choice in item.split("|"))]


def _cache_dir() -> Path:
    if os.access(_ROOT, os.W_OK) and (_ROOT / "setup.py").exists():
        return _ROOT / "build" / "aot"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tilefuse" / "aot"


@functools.cache
def _reader_version() -> str:
    """Changes with the code that makes the figures: cached ones are then made anew."""
    makers = (summary, Code, read_sass, read_cubin, _by_base, _amdgcn_code, _read_amdgcn, _compile, _read_library)
    code = "".join(inspect.getsource(f) for f in (*makers, short_name))
    code += _MATRIX.pattern + _TMA.pattern + _WORK.pattern
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _cached(key: str, make: Any) -> Any:
    path = _cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.exists():
        return json.loads(path.read_text())
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".tmp{os.getpid()}")
    unfinished.write_text(json.dumps(value))
    unfinished.rename(path)
    return value


def compile_launch(launch: Launch) -> dict[str, Any]:
    """Compiles one launch and returns its figures; ``error`` holds the compiler's message if it failed."""
    return _cached(f"{launch.key} {_reader_version()}", lambda: _compile(launch))


def _compile(launch: Launch) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        compiled = launch.compile()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - start, 2)
    if launch.target.backend == "hip":
        figures = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            figures = read_cubin(Path(file.name))[compiled.metadata.name]
    # static shared memory of a cubin is what the hardware reserves, the kernel's own is in the metadata
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return {
        **figures,
        "shared": compiled.metadata.shared,
        "tensor_memory": tensor_memory,
        "seconds": seconds,
        "error": None,
    }


def _demangle(names: Sequence[str]) -> dict[str, str]:
    filt = shutil.which("c++filt")
    if filt is None or not names:
        return {n: n for n in names}
    lines = subprocess.run(
        [filt], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {n: short_name(line) for n, line in zip(names, lines, strict=True)}


def short_name(name: str) -> str:
    """``rope_kernel<__nv_bfloat16, 8>`` of ``void tilefuse::rope_kernel<__nv_bfloat16, 8>(...)``."""
    depth, end = 0, len(name)
    for i, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        # the argument list opens at the first parenthesis outside template arguments
        if char == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            end = i
            break
    return re.sub(r"\(anonymous namespace\)::|tilefuse::|^void ", "", name[:end])


def _family_of(stem: str, kernel: str) -> str:
    """The folder of the ``.cu`` file; of two files of one name, the one whose kernel it is."""
    found = sorted((_ROOT / "csrc").glob(f"*/{stem}.cu"))
    base = re.split(r"[<(]", kernel)[0].split("::")[-1]
    for path in found[:-1]:
        if any(re.search(rf"\b{re.escape(base)}\b", f.read_text()) for f in path.parent.glob("*.cu*")):
            return path.parent.name
    return found[-1].parent.name if found else "cuda"


def _read_library(path: Path) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [_tool("cuobjdump"), "-xelf", "all", str(path)], cwd=folder, capture_output=True, text=True, check=True
        )
        for cubin in sorted(Path(folder).glob("*.cubin")):
            # <number>.<source>.<arch>.cubin or tmpxft-<numbers>-<number>_<source>.<arch>.cubin
            match = re.search(r"([A-Za-z]\w*)(?:\.\d+)*\.(sm_\d+)[af]?\.cubin$", cubin.name)
            stem = match.group(1) if match else cubin.stem
            functions = read_cubin(cubin)
            names = _demangle(list(functions))
            target = match.group(2) if match else "unknown"
            for name, figures in functions.items():
                if arch.capability(target) >= 90:
                    # what the hardware reserves for itself
                    figures["shared"] = max(0, figures["shared"] - 1024)
                identity = {"family": _family_of(stem, names[name]), "op": stem, "case": names[name], "kernel": name}
                state = {"first": True, "tensor_memory": 0, "error": None, "allow_spill": None, "lacking": []}
                found.append({**identity, "backend": "cuda", "target": target, **state, **figures})
    return found


def cuda_records(targets: Sequence[str], family: str | None = None) -> list[dict[str, Any]]:
    """One record for each kernel and architecture of the CUDA library; none where it is not built."""
    if not CUDA_LIBRARY.exists() or not can_read():
        return []
    digest = hashlib.sha256(CUDA_LIBRARY.read_bytes()).hexdigest()
    found = _cached(f"{digest} {_reader_version()}", lambda: _read_library(CUDA_LIBRARY))
    return [r for r in found if r["target"] in targets and family in (None, r["family"])]


def nvcc_version() -> str | None:
    """The nvcc that built the CUDA library, from the string it carries."""
    if not CUDA_LIBRARY.exists():
        return None
    match = re.search(rb'"nvcc": "[^"]*?cuda_(\d+\.\d+)', CUDA_LIBRARY.read_bytes())
    return match.group(1).decode() if match else None
