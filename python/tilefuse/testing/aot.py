"""Compiles every kernel for every architecture without a GPU and reads what the compiler made of it.

A Triton module ``tilefuse.triton_kernels.<family>.<op>`` lists what the gate compiles::

    def aot_cases():
        from ...testing.aot import AotCase

        for dtype in ("bf16", "fp32"):
            config = rope_config(dim=128, tokens=4096)
            yield AotCase(
                f"rope_{dtype}_d128",
                rope_kernel,
                signature={"x": f"*{dtype}", "out": f"*{dtype}", "tokens": "i32", "BLOCK": "constexpr"},
                constexprs={"BLOCK": config.block},
                options={"num_warps": config.num_warps, "num_stages": 1},
                divisible=("x", "out"),
                expect=("LDG.128", "STG.128"),
            )

The first case of a kernel should be its most typical one: ``make test`` compiles only that, and the baseline must have
it. The CUDA library needs no list: all its kernels are read from ``_cuda.abi3.so``.

``python -m tilefuse.testing.aot --json OUT`` does the work in a process of its own, because a function that was
decorated under ``TRITON_INTERPRET=1`` cannot be compiled. ``records(...)`` runs that process and returns what it found;
``problems(...)`` compares it with the baseline in ``tests/resources/<family>.json``.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import arch

_ROOT = Path(__file__).resolve().parents[3]
_CUDA_LIBRARY = Path(__file__).parents[1] / "_cuda.abi3.so"
BASELINE_DIR = _ROOT / "tests" / "resources"
# what a compiler may change from build to build without anybody caring
REGISTER_SLACK = 8

# the most shared memory that one block can have; asking for more compiles but does not launch
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
# columns of Blackwell's tensor memory
TENSOR_MEMORY = 512

_MATRIX = re.compile(r"(H|I|Q|O|D|B)MMA|(H|I|Q|B)GMMA|UTC\w*MMA")
_TMA = re.compile(r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP")


def _jit(fn: Any) -> Any:
    while not hasattr(fn, "cache_key") and hasattr(fn, "fn"):
        fn = fn.fn
    return fn


@dataclass(frozen=True)
class AotCase:
    """One Triton kernel with the constants and options of one configuration.

    Args:
        name: unique within the module; the baseline is keyed by it.
        fn: the ``@triton.jit`` function (a heuristics or autotune wrapper is unwrapped).
        signature: argument -> Triton type (``"*bf16"``, ``"i64"``, ``"fp32"``) or ``"constexpr"``; every argument.
        constexprs: value of each ``"constexpr"`` argument.
        options: compile options, such as ``num_warps`` and ``num_stages``.
        targets: architectures to compile for; None is all of ``arch.COMPILE_TARGETS``.
        expect: instructions that must be there, for all NVIDIA targets, or a mapping from target to them.
            ``"LDG.128"`` and ``"STG.128"`` mean a 128-bit access (or a bulk copy), ``"MMA"`` the matrix unit,
            anything else a mnemonic's start (``"HGMMA"``); ``"HGMMA|QGMMA"`` takes either. A mapping may have the key
            ``"nvidia"`` for the targets that it does not name.
        divisible: arguments known to be multiples of 16 (pointers: 16-byte aligned); None is every pointer.
        attrs: raw Triton attributes, ``{(index,): [["tt.divisibility", 16]]}``, in place of ``divisible``.
        allow_spill: the reason why this case may spill; it is then only compared with its baseline.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] | None = None
    expect: Sequence[str] | Mapping[str, Sequence[str]] | None = None
    divisible: Sequence[str] | None = None
    attrs: Mapping[tuple[int, ...], Any] | None = None
    allow_spill: str | None = None

    @property
    def jit(self) -> Any:
        """The JIT function below any wrappers."""
        return _jit(self.fn)

    def resolved_attrs(self) -> dict[tuple[int, ...], Any]:
        if self.attrs is not None:
            return dict(self.attrs)
        names = list(self.signature)
        divisible = self.divisible
        if divisible is None:
            divisible = [n for n, kind in self.signature.items() if kind.startswith("*")]
        return {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}

    def expected(self, target: str) -> tuple[str, ...]:
        nvidia = target.startswith("sm_")
        if self.expect is None:
            return ()
        if isinstance(self.expect, Mapping):
            return tuple(self.expect.get(target, self.expect.get("nvidia", ()) if nvidia else ()))
        return tuple(self.expect) if nvidia else ()

    def check(self) -> None:
        """Raises ValueError for a case that does not fit its function."""
        names = list(self.jit.arg_names)
        if list(self.signature) != names:
            raise ValueError(
                f"aot case {self.name}: signature must name {names} in this order, got {list(self.signature)}"
            )
        constants = {n for n, kind in self.signature.items() if kind == "constexpr"}
        if constants != set(self.constexprs):
            raise ValueError(
                f"aot case {self.name}: constexprs must be {sorted(constants)}, got {sorted(self.constexprs)}"
            )
        unknown = set(self.targets or ()) - set(arch.COMPILE_TARGETS)
        if unknown:
            raise ValueError(f"aot case {self.name}: targets must be of {arch.COMPILE_TARGETS}, got {sorted(unknown)}")


# ---- what there is to compile ----


def modules(family: str | None = None) -> Iterator[tuple[str, str, Any]]:
    """(family, op, module) of every Triton module."""
    from .. import triton_kernels

    for info in pkgutil.walk_packages(triton_kernels.__path__, triton_kernels.__name__ + "."):
        parts = info.name.removeprefix(triton_kernels.__name__ + ".").split(".")
        if len(parts) == 2 and parts[0] != "common" and family in (None, parts[0]):
            yield parts[0], parts[1], importlib.import_module(info.name)


def launched(module: Any) -> dict[str, Any]:
    """The JIT functions that a module launches, by their ``kernel[grid](...)`` calls."""
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.value, ast.Name)
        ):
            value = getattr(module, node.func.value.id, None)
            if value is not None and type(value).__module__.startswith("triton."):
                found[node.func.value.id] = _jit(value)
    return found


def _from_file(path: str) -> Iterator[tuple[str, str, Any]]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield "file", spec.name, module


def cases(found_modules: Iterable[tuple[str, str, Any]]) -> tuple[list[tuple[str, str, AotCase]], list[str]]:
    """Every case of the modules, and the kernels that one of them launches but no case compiles."""
    found, launches = [], []
    for family, op, module in found_modules:
        listed = [(family, op, case) for case in getattr(module, "aot_cases", tuple)()]
        names = Counter(case.name for _, _, case in listed)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"{family}/{op}: aot cases must have different names, got {repeated} more than once")
        for _, _, case in listed:
            case.check()
        found += listed
        launches += [(family, op, name, kernel) for name, kernel in sorted(launched(module).items())]
    covered = {id(case.jit) for _, _, case in found}
    return found, [f"{family}/{op}: {name}" for family, op, name, kernel in launches if id(kernel) not in covered]


# ---- reading binaries ----


@functools.cache
def _tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: Triton's own copy, else the CUDA toolkit's."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name
        if bundled.exists():
            return str(bundled)
    return shutil.which(name)


def _can_read() -> bool:
    return _tool("cuobjdump") is not None and _tool("nvdisasm") is not None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _summary(mix: Counter[str]) -> dict[str, Any]:
    """The figures of the gate, from the count of each full mnemonic (``LDG.E.128``)."""
    figures: dict[str, Any] = {
        "spills": 0, "loads_128": 0, "stores_128": 0, "loads_16": 0, "bulk_copies": 0, "matrix": {}
    }  # fmt: skip
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


def _instructions(disassembly: str) -> dict[str, Counter[str]]:
    """Function name -> count of each mnemonic, from ``nvdisasm -c``."""
    mixes: dict[str, Counter[str]] = {}
    mix: Counter[str] = Counter()
    for line in disassembly.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            mix = mixes.setdefault(section.group(1), Counter())
        # predicates (@P0, @!UP1) and {dual issue} braces come before the mnemonic
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            mix[found.group(1)] += 1
    return mixes


def read_cubin(path: Path) -> dict[str, dict[str, Any]]:
    """Function name -> registers, stack, static shared memory and instruction figures of a cubin."""
    usage = _run(_tool("cuobjdump"), "--dump-resource-usage", str(path))
    mixes = _instructions(_run(_tool("nvdisasm"), "-c", str(path)))
    found = {}
    for name, figures in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        values = dict(re.findall(r"(\w+(?:\[\d+\])?):(\d+)", figures))
        mix = mixes.get(name, Counter())
        found[name] = {
            "registers": int(values["REG"]),
            "stack": int(values["STACK"]),
            "shared": int(values["SHARED"]),
            **_summary(mix),
            "mix": _by_base(mix),
        }
    return found


def _by_base(mix: Counter[str]) -> dict[str, int]:
    bases: Counter[str] = Counter()
    for mnemonic, count in mix.items():
        bases[mnemonic.split(".")[0]] += count
    return dict(bases.most_common())


def _read_amdgcn(text: str) -> dict[str, Any]:
    """The same figures from AMD's assembly text; wide accesses are the dwordx4 ones, the matrix unit is MFMA."""

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(match.group(1)) if match else 0

    mix = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.MULTILINE))
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        # scalar registers spill into lanes of vector registers; where those run out, `stack` shows it
        "spills": number("vgpr_spill_count"),
        "loads_128": sum(n for m, n in mix.items() if re.fullmatch(r"(global|buffer)_load_(lds_)?dwordx4", m)),
        "stores_128": sum(n for m, n in mix.items() if re.fullmatch(r"(global|buffer)_store_dwordx4", m)),
        "loads_16": sum(n for m, n in mix.items() if re.fullmatch(r"(global|buffer)_load_(u|s)?(short|byte)\w*", m)),
        "bulk_copies": 0,
        "matrix": {"MFMA": n} if (n := sum(n for m, n in mix.items() if m.startswith("v_mfma"))) else {},
        "mix": dict(mix.most_common()),
    }


def _lacking(expected: Iterable[str], figures: Mapping[str, Any]) -> list[str]:
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


# ---- compiling Triton kernels ----


def _cache_dir() -> Path:
    if os.access(_ROOT, os.W_OK) and (_ROOT / "setup.py").exists():
        return _ROOT / "build" / "aot"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tilefuse" / "aot"


@functools.cache
def _reader_version() -> str:
    """Changes with the code that makes the figures: cached ones are then made anew."""
    makers = (_summary, _instructions, read_cubin, _by_base, _read_amdgcn, _compile_triton, _read_library, _short)
    code = "".join(inspect.getsource(f) for f in makers) + _MATRIX.pattern + _TMA.pattern
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


def compile_case(case: AotCase, target: str) -> dict[str, Any]:
    """Compiles one case and returns its figures; ``error`` holds the compiler's message if it failed."""
    import triton

    parts = [case.jit.cache_key, dict(case.signature), dict(case.constexprs), case.resolved_attrs(), dict(case.options)]
    key = f"{[getattr(p, 'cache_key', p) for p in parts]} {target} {triton.__version__} {_reader_version()}"
    return _cached(key, lambda: _compile_triton(case, target))


def _compile_triton(case: AotCase, target: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    capability = arch.capability(target)
    gpu = GPUTarget("cuda", capability, 32) if capability else GPUTarget("hip", target, 64)
    source = ASTSource(case.jit, dict(case.signature), dict(case.constexprs), case.resolved_attrs())
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=gpu, options=dict(case.options))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - start, 2)
    if not capability:
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


# ---- reading the CUDA library ----


def _demangle(names: Sequence[str]) -> dict[str, str]:
    filt = shutil.which("c++filt")
    if filt is None or not names:
        return {n: n for n in names}
    lines = subprocess.run(
        [filt], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {n: _short(line) for n, line in zip(names, lines, strict=True)}


def _short(name: str) -> str:
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
                found.append(
                    {
                        "family": _family_of(stem, names[name]), "op": stem, "case": names[name], "backend": "cuda",
                        "target": target, "first": True, "tensor_memory": 0, "error": None, "allow_spill": None,
                        "lacking": [], **figures,
                    }
                )  # fmt: skip
    return found


def cuda_records(targets: Sequence[str], family: str | None = None) -> list[dict[str, Any]]:
    """One record for each kernel and architecture of the CUDA library; none where it is not built."""
    if not _CUDA_LIBRARY.exists() or not _can_read():
        return []
    digest = hashlib.sha256(_CUDA_LIBRARY.read_bytes()).hexdigest()
    found = _cached(f"{digest} {_reader_version()}", lambda: _read_library(_CUDA_LIBRARY))
    return [r for r in found if r["target"] in targets and family in (None, r["family"])]


# ---- the process that compiles ----

_work: list[tuple[str, str, AotCase, str, bool]] = []


def _compile_one(index: int) -> dict[str, Any]:
    family, op, case, target, is_first = _work[index]
    figures = compile_case(case, target)
    lacking = [] if figures["error"] else _lacking(case.expected(target), figures)
    return {
        "family": family, "op": op, "case": case.name, "backend": "triton", "target": target, "first": is_first,
        "allow_spill": case.allow_spill, "lacking": lacking, **figures,
    }  # fmt: skip


def _first_of_each(listed: Sequence[tuple[str, str, AotCase]]) -> list[tuple[str, str, AotCase]]:
    """The first case of each kernel, and of each set of targets that a kernel is restricted to."""
    first = {}
    for family, op, case in listed:
        first.setdefault((family, op, id(case.jit), tuple(case.targets or ())), (family, op, case))
    return list(first.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for every architecture")
    parser.add_argument("--json", required=True, help="file for the records")
    parser.add_argument("--family")
    parser.add_argument("--file", help="a Python file with aot_cases(), in place of this package")
    parser.add_argument("--targets", nargs="*", default=list(arch.COMPILE_TARGETS))
    parser.add_argument("--quick", action="store_true", help="only the first case of each kernel")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", min(8, os.cpu_count() or 1))))
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET must be 0: a function decorated under the interpreter cannot be compiled")
    found, uncovered, triton_version = [], [], None
    known: dict[str, dict[str, list[str]]] = {}
    if importlib.util.find_spec("triton") is not None:
        import triton

        triton_version = triton.__version__
        listed, uncovered = cases(_from_file(args.file) if args.file else modules(args.family))
        first = {(family, op, case.name) for family, op, case in _first_of_each(listed)}
        for family, op, case in listed:
            targets = list(case.targets or arch.COMPILE_TARGETS)
            known.setdefault(family, {})[f"{op}/{case.name}"] = targets
            is_first = (family, op, case.name) in first
            if is_first or not args.quick:
                _work.extend((family, op, case, t, is_first) for t in targets if t in args.targets)
        with tempfile.TemporaryDirectory() as folder:
            # the figures are cached; keeping the binaries as well would only take space
            os.environ["TRITON_CACHE_DIR"] = folder
            with multiprocessing.get_context("fork").Pool(max(1, args.jobs)) as pool:
                for record in pool.imap(_compile_one, range(len(_work))):
                    found.append(record)
                    print(f"{len(found)}/{len(_work)} {label(record)}", flush=True)
    found += [] if args.file else cuda_records(args.targets, args.family)
    missing = [] if triton_version else ["Triton kernels: triton is not installed"]
    if not _CUDA_LIBRARY.exists():
        missing.append(f"CUDA kernels: {_CUDA_LIBRARY.name} was not built (needs nvcc)")
    elif not _can_read():
        missing.append("CUDA kernels: neither Triton nor the CUDA toolkit provides cuobjdump and nvdisasm")
    result = {
        "triton": triton_version,
        "nvcc": _nvcc_version(),
        "targets": args.targets,
        "family": args.family,
        "known": known,
        "records": found,
        "uncovered": uncovered,
        "missing": missing,
    }
    Path(args.json).write_text(json.dumps(result))
    return 0


def _nvcc_version() -> str | None:
    """The nvcc that built the CUDA library, from the string it carries."""
    if not _CUDA_LIBRARY.exists():
        return None
    match = re.search(rb'"nvcc": "[^"]*?cuda_(\d+\.\d+)', _CUDA_LIBRARY.read_bytes())
    return match.group(1).decode() if match else None


# ---- for tests and the CLI ----


def records(
    *,
    family: str | None = None,
    targets: Sequence[str] | None = None,
    file: str | Path | None = None,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Runs the compiling process and returns its result: versions, ``records``, ``uncovered``, ``missing``.

    Args:
        family, targets: only these; None is all.
        file: a Python file with ``aot_cases()``, in place of this package.
        quick: only the first case of each kernel.
        progress: called with (compiled so far, of how many, name) after each compilation.

    Raises:
        RuntimeError: the process failed (a module that cannot be imported, a case that does not fit its kernel).
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.json"
        command = [sys.executable, "-m", "tilefuse.testing.aot", "--json", str(out)]
        command += ["--family", family] if family else []
        command += ["--file", str(file)] if file else []
        command += ["--targets", *targets] if targets else []
        command += ["--quick"] if quick else []
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        with open(Path(folder) / "stderr", "w+") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            for line in process.stdout:
                if progress and (step := re.match(r"(\d+)/(\d+) (.*)", line)):
                    progress(int(step.group(1)), int(step.group(2)), step.group(3))
            if process.wait() != 0:
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
        return json.loads(out.read_text())


def key(record: Mapping[str, Any]) -> str:
    """Name of a record's kernel within its family's baseline."""
    suffix = ".cu" if record["backend"] == "cuda" else ""
    return f"{record['op']}{suffix}/{record['case']}"


def label(record: Mapping[str, Any]) -> str:
    """How ``problems`` names a record."""
    return f"{record['family']}/{key(record)} on {record['target']}"


_KEPT = ("registers", "stack", "shared", "spills", "loads_128", "stores_128")


def read_baseline(family: str, folder: Path = BASELINE_DIR) -> dict[str, Any]:
    path = folder / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {"kernels": {}}


def write_baseline(result: Mapping[str, Any], folder: Path = BASELINE_DIR) -> list[Path]:
    """Writes the baseline of every family in ``result``; kernels that it did not compile keep their lines."""
    written = []
    for family in sorted({r["family"] for r in result["records"]}):
        old = read_baseline(family, folder)
        fresh = [r for r in result["records"] if r["family"] == family and not r["error"]]
        backends = {r["backend"] for r in fresh}
        kernels: dict[str, dict[str, Any]] = {}
        for name, lines in old["kernels"].items():
            compiler, backend = ("nvcc", "cuda") if ".cu/" in name else ("triton", "triton")
            # figures of two compilers do not mix
            if backend in backends and old.get(compiler) != result[compiler]:
                continue
            there = _still_there(result, family, name)
            if kept := {t: line for t, line in lines.items() if there(t)}:
                kernels[name] = kept
        for r in fresh:
            kernels.setdefault(key(r), {})[r["target"]] = {k: r[k] for k in _KEPT} | {"matrix": r["matrix"]}
        versions = {
            "triton": result["triton"] if "triton" in backends else old.get("triton"),
            "nvcc": result["nvcc"] if "cuda" in backends else old.get("nvcc"),
        }
        # one line per kernel and target keeps the differences readable
        text = ",\n".join(
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(f"   {json.dumps(t)}: {json.dumps(line)}" for t, line in sorted(kernels[name].items()))
            + "\n  }"
            for name in sorted(kernels)
        )
        path = folder / f"{family}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "".join(f' "{k}": {json.dumps(v)},\n' for k, v in versions.items())
        path.write_text(f'{{\n{head} "kernels": {{\n{text}\n }}\n}}\n')
        written.append(path)
    return written


def problems(result: Mapping[str, Any], folder: Path = BASELINE_DIR) -> list[str]:
    """What is wrong with the compiled kernels, one line each: the resource gate.

    A spill (or any stack) without ``allow_spill``, an expected instruction that is missing, more shared memory than the
    architecture has, a kernel that no case compiles; and where there are baselines, a first case that is not in its
    baseline, a line of a baseline whose case no longer exists, and a case that got worse: more than ``REGISTER_SLACK``
    more registers, more shared memory, more spills, a 128-bit access or the matrix unit lost. Registers, shared memory
    and spills are compared only for the same version of Triton or nvcc.
    """
    found = [f"{name} is launched but compiled by no aot case" for name in result["uncovered"]]
    for r in result["records"]:
        if r["error"]:
            found.append(f"{label(r)}: does not compile: {r['error']}")
            continue
        if (r["stack"] or r["spills"]) and not r["allow_spill"]:
            found.append(f"{label(r)}: {r['stack']} bytes of stack, {r['spills']} spill instructions")
        found += [f"{label(r)}: no {item}" for item in r["lacking"]]
        limit = SHARED_MEMORY[r["target"]]
        if r["shared"] > limit:
            found.append(f"{label(r)}: cannot launch, {r['shared']} bytes of shared memory, {limit} there")
        if r["tensor_memory"] > TENSOR_MEMORY:
            found.append(
                f"{label(r)}: cannot launch, {r['tensor_memory']} tensor memory columns, {TENSOR_MEMORY} there"
            )
    if not folder.is_dir():
        return found
    families = {r["family"] for r in result["records"]} - {"file"}
    if result["family"] is None and families:
        families |= {path.stem for path in folder.glob("*.json")}
    for family in sorted(families):
        baseline = read_baseline(family, folder)
        seen = {(key(r), r["target"]): r for r in result["records"] if r["family"] == family}
        for (name, target), r in seen.items():
            old = baseline["kernels"].get(name, {}).get(target)
            if old is None and r["first"] and not r["error"]:
                found.append(f"{label(r)}: not in {family}.json, run python -m tilefuse inspect --update-baseline")
            elif old is not None and not r["error"]:
                compiler = "triton" if r["backend"] == "triton" else "nvcc"
                found += _worse(r, old, baseline.get(compiler) == result[compiler])
        for name, lines in baseline["kernels"].items():
            there = _still_there(result, family, name)
            found += [f"{family}/{name} on {t}: in the baseline but no longer compiled" for t in lines if not there(t)]
    return found


def _still_there(result: Mapping[str, Any], family: str, name: str) -> Callable[[str], bool]:
    """Whether a kernel of the baseline still exists for a target; yes where this run could not know."""
    if ".cu/" in name:
        built = [r for r in result["records"] if r["backend"] == "cuda"]
        targets = {r["target"] for r in built if (r["family"], key(r)) == (family, name)}
        return lambda t: t in targets or t not in {r["target"] for r in built}
    if not result["triton"]:
        return lambda t: True
    return lambda t: t in result["known"].get(family, {}).get(name, ())


def _worse(r: Mapping[str, Any], old: Mapping[str, Any], same_compiler: bool) -> list[str]:
    found = []
    if same_compiler:
        limits = {"registers": REGISTER_SLACK, "shared": 0, "stack": 0, "spills": 0}
        found += [f"{label(r)}: {k} {old[k]} -> {r[k]}" for k, slack in limits.items() if r[k] > old[k] + slack]
    for k in ("loads_128", "stores_128"):
        if old[k] and not r[k] and not r["bulk_copies"]:
            found.append(f"{label(r)}: {k} {old[k]} -> 0")
    if old["matrix"] and not r["matrix"]:
        found.append(f"{label(r)}: matrix instructions {old['matrix']} -> none")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
