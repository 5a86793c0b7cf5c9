"""Build script: packages, and the native libraries where a compiler is at hand.

Nothing here imports torch for metadata or looks for a GPU. The native libraries are plain shared objects. Two have no
Python init function and are loaded by ``torch.ops.load_library``; the third is an extension module:

* ``_cpu.abi3.so`` from every ``csrc/<family>/*_cpu.cpp`` (g++), each compiled once per instruction set, but for those
  that a source must ask for (``// build-isas: avx512vnni`` in its first lines);
* ``_cuda.abi3.so`` from every ``csrc/<family>/*.cu`` (nvcc), for the architectures of
  ``TORCH_CUDA_ARCH_LIST`` (default ``8.0;9.0a;10.0a``, plus PTX of the first);
* ``_direct.abi3.so`` from ``csrc/python/*.cpp`` (g++ and Python's headers), in Python's limited API.

``TILEFUSE_BUILD_NATIVE`` is ``auto`` (build what the tools allow, say what is skipped), ``0`` (never)
or ``1`` (fail when the CPU library cannot be built). ``CXX`` is the C++ compiler as a command, such as ``ccache g++``.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# older ones stop at pyproject.toml's licence with a message that names neither themselves nor the way out
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"tilefuse: the build needs setuptools >= 77, this is {setuptools.__version__}: "
        "pip install -U 'setuptools>=77', or build without --no-build-isolation"
    )

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0a;10.0a"

# one object per instruction set; the registering object is the baseline one (see csrc/common/cpu.h)
X86_ISAS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi"],
}
# sets of which only a source that asks has a copy, elsewhere the copy before it serves: the option, and the sets above
# whose copies of such a source have it too
ON_REQUEST = {"avx512vnni": ("-mavx512vnni", ("avx512bf16",))}


class BuildNative(build_ext):
    """Compiles csrc/ with ninja: g++ for the CPU library, nvcc for the CUDA library."""

    def run(self):
        mode = os.environ.get("TILEFUSE_BUILD_NATIVE", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"TILEFUSE_BUILD_NATIVE must be auto, 0 or 1, got {mode!r}")
        if mode == "0":
            return
        include = _torch_include()
        cxx = _cxx()
        missing = [
            what
            for what, there in {
                "torch (build with --no-build-isolation)": include is not None,
                "ninja": _ninja() is not None,
                " ".join(cxx): _runs(cxx),
            }.items()
            if not there
        ]
        if missing:
            message = f"tilefuse: native libraries not built, missing: {', '.join(missing)}"
            if mode == "1":
                raise SystemExit(message)
            print(message, file=sys.stderr)
            return
        out = ROOT / "python/tilefuse" if self.inplace else Path(self.build_lib) / "tilefuse"
        out.mkdir(parents=True, exist_ok=True)
        build_dir = Path(self.build_temp).resolve() / "native"
        build_dir.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(_ninja_file(build_dir, out.resolve(), include, cxx, _nvcc()))
        jobs = os.environ.get("MAX_JOBS") or str(max(1, min(os.cpu_count() or 1, _memory_gib() // 4)))
        subprocess.run([_ninja(), "-C", str(build_dir), "-j", jobs, "--quiet"], check=True)

    def get_outputs(self):
        return []


def _torch_include():
    """The header folder of the installed torch, found without importing it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    include = Path(spec.submodule_search_locations[0]) / "include"
    return include if (include / "torch/csrc/stable/library.h").exists() else None


def _cxx():
    """The words of the C++ compiler's command: ``CXX`` may hold a launcher or options as well."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _runs(command):
    return (
        shutil.which(command[0]) is not None
        and subprocess.run([*command, "--version"], capture_output=True).returncode == 0
    )


def _ninja():
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja")


def _nvcc():
    home = os.environ.get("CUDA_HOME")
    beside = Path(home) / "bin/nvcc" if home else None
    return str(beside) if beside and beside.exists() else shutil.which("nvcc")


def _cudart(nvcc):
    """The folder of libcudart_static.a. nvcc is asked for its root, as the one on PATH may be a wrapper script."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    roots = [line.removeprefix("#$ TOP=").strip() for line in dry.splitlines() if line.startswith("#$ TOP=")]
    for root in [*roots, Path(nvcc).resolve().parent.parent]:
        for folder in [Path(root) / "lib64", Path(root) / "lib", *Path(root).glob("targets/*/lib")]:
            if (folder / "libcudart_static.a").exists():
                return folder.resolve()
    return None


def _arch_list(nvcc):
    """The architectures to build for: those asked for, or of the default ones those that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return [a for a in re.split(r"[;, ]+", asked.strip()) if a]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [a for a in DEFAULT_ARCHS.split(";") if "sm_" + a.rstrip("af").replace(".", "") in known]


def _gencode(archs):
    """nvcc flags for architectures such as ``8.0`` or ``9.0+PTX``; the first also gets PTX for GPUs yet to come."""
    flags = []
    for i, arch in enumerate(archs):
        number = _number(arch)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        # architecture-specific PTX (9.0a) runs nowhere else
        if arch.endswith("+PTX") or (i == 0 and number.isdigit()):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def _number(arch):
    return arch.removesuffix("+PTX").replace(".", "")


def _file_setting(source, name):
    """What a source asks for in a comment among its first ten lines: ``// build-flags: -ffast-math``."""
    with open(source, encoding="utf-8") as file:
        for _ in range(10):
            match = re.match(rf"// {name}: (.*)", file.readline())
            if match:
                return match.group(1)
    return ""


def _path(path):
    """A path in a build line of ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _words(*words):
    """Words of a command in a rule or variable of ninja: neither ninja nor the shell takes them apart."""
    return shlex.join(str(word) for word in words).replace("$", "$$")


def _ninja_file(build_dir, out, include, cxx, nvcc):
    """The text of build.ninja; the sources that say how the libraries were built are written beside it."""
    csrc = f"{_words(f'-I{ROOT}/csrc')} -DTORCH_TARGET_VERSION=0x020b000000000000"
    torch = _words("-isystem", include)
    # contraction would make a result depend on the instruction set; kernels that want it ask for it
    floats = "-fno-math-errno -fno-trapping-math -ffp-contract=off"
    link_torch = f"{_words(f'-L{include.parent}/lib')} -ltorch -ltorch_cpu -lc10 -Wl,-rpath,'$$ORIGIN/../torch/lib'"
    lines = [
        f"cxx = {_words(*cxx)}",
        f"cxxflags = -O3 -std=c++17 -fPIC -fvisibility=hidden {csrc} {torch} {floats} -Wall -Wextra",
        "rule cxx\n  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared -o $out $in $libs {link_torch}",
        *_cpu_builds(build_dir, out, cxx),
    ]
    libraries = [out / "_cpu.abi3.so"]
    python, why = _python_include()
    if python:
        lines += _direct_builds(out, python)
        libraries.append(out / "_direct.abi3.so")
    else:
        (out / "_direct.abi3.so").unlink(missing_ok=True)
        print(f"tilefuse: eager calls keep their Python, no _direct ({why})", file=sys.stderr)
    cudart = _cudart(nvcc) if nvcc else None
    sources = _cuda_sources(_arch_list(nvcc)) if cudart else {}
    if sources:
        host = _words(_host_compiler(build_dir, cxx))
        lines += [
            f"nvccflags = -O3 -std=c++17 {csrc} {torch} -DUSE_CUDA -lineinfo -Xfatbin -compress-all -ccbin {host}"
            " -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
            " -static-global-template-stub=false --expt-relaxed-constexpr -diag-suppress 20012",
            # ptxas -v goes to a log beside the object: the resource gate and a curious reader use it
            f"rule nvcc\n  command = {_words(nvcc)} $nvccflags $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
            " || (cat $out.log; exit 1)\n  depfile = $out.d\n  deps = gcc",
            *_cuda_builds(build_dir, out, sources, nvcc, cudart),
        ]
        libraries.append(out / "_cuda.abi3.so")
    else:
        (out / "_cuda.abi3.so").unlink(missing_ok=True)
        why = "no nvcc" if not nvcc else "no libcudart_static.a beside nvcc" if not cudart else "no CUDA sources"
        print(f"tilefuse: CUDA library not built ({why})", file=sys.stderr)
    return "\n".join([*lines, f"default {' '.join(map(_path, libraries))}"]) + "\n"


def _cpu_builds(build_dir, out, cxx):
    """Build lines of the CPU library."""
    isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    builds, objects = [], []
    for source in sorted((ROOT / "csrc").glob("*/*_cpu.cpp")):
        extra = _file_setting(source, "build-flags")
        asked = _file_setting(source, "build-isas").split()
        for isa, march in isas.items():
            if isa in ON_REQUEST and isa not in asked:
                continue
            obj = f"{source.parent.name}/{source.stem}.{isa}.o"
            flags = [f"-DTILEFUSE_ISA={isa}", *march]
            flags += [ON_REQUEST[name][0] for name in asked if isa in ON_REQUEST[name][1]]
            if isa == "baseline":
                flags += ["-DTILEFUSE_REGISTER", *(f"-DTILEFUSE_{name.upper()}" for name in asked)]
            builds.append(f"build {obj}: cxx {_path(source)}\n  flags = {' '.join(flags)} {extra}")
            objects.append(obj)
    info = {"compiler": _version(cxx, 0), "instruction_sets": list(isas), "flags": "-O3 -ffp-contract=off"}
    _write_info(build_dir / "cpu_info.cpp", "cpu", info)
    builds.append("build cpu_info.o: cxx cpu_info.cpp")
    builds.append(f"build {_path(out / '_cpu.abi3.so')}: link cpu_info.o {' '.join(objects)}")
    return builds


def _python_include():
    """The folder of Python.h, or None and the reason why there is no extension module."""
    if not LIMITED_API:
        return None, "a free-threaded Python has no limited API"
    include = Path(sysconfig.get_paths()["include"])
    return (include, "") if (include / "Python.h").exists() else (None, f"no Python.h in {include}")


def _direct_builds(out, python):
    """Build lines of the extension module."""
    sources = sorted((ROOT / "csrc/python").glob("*.cpp"))
    objects = " ".join(f"python/{source.stem}.o" for source in sources)
    return [
        *(f"build python/{s.stem}.o: cxx {_path(s)}\n  flags = {_words('-isystem', python)}" for s in sources),
        f"build {_path(out / '_direct.abi3.so')}: link {objects}\n  libs = -ltorch_python",
    ]


def _cuda_sources(archs):
    """The architectures of every .cu file: ``// build-archs: 9.0a`` limits them, and without any it is not built."""
    wanted = {s: _file_setting(s, "build-archs").split() for s in sorted((ROOT / "csrc").glob("*/*.cu"))}
    chosen = {s: [a for a in archs if not only or a.removesuffix("+PTX") in only] for s, only in wanted.items()}
    return {s: of_source for s, of_source in chosen.items() if of_source}


def _cuda_builds(build_dir, out, sources, nvcc, cudart):
    """Build lines of the CUDA library, from the architectures of each source."""
    builds, objects = [], []
    for source, archs in sources.items():
        obj = f"{source.parent.name}/{source.stem}.cu.o"
        flags = f"{_gencode(archs)} {_file_setting(source, 'build-flags')}"
        builds.append(f"build {obj}: nvcc {_path(source)}\n  flags = {flags}")
        objects.append(obj)
    # asked for, even where no source is built for one of them
    info = {"nvcc": _version([nvcc], -1), "architectures": [f"sm_{_number(a)}" for a in _arch_list(nvcc)]}
    _write_info(build_dir / "cuda_info.cpp", "cuda", info)
    builds.append("build cuda_info.o: cxx cuda_info.cpp")
    libs = f"{_words(f'-L{cudart}')} -lcudart_static -ldl -lrt -lpthread"
    builds.append(f"build {_path(out / '_cuda.abi3.so')}: link cuda_info.o {' '.join(objects)}\n  libs = {libs}")
    return builds


def _host_compiler(build_dir, cxx):
    """The C++ compiler as the one word that nvcc's -ccbin takes: a script where its command has several."""
    if len(cxx) == 1:
        return cxx[0]
    script = build_dir / "host-compiler"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(cxx)} "$@"\n')
    script.chmod(0o755)
    return script


def _memory_gib():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30


def _version(command, line):
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[line]


def _write_info(path, name, info):
    """A C string in the library that says how it was built; tilefuse.native reads it."""
    text = (
        f'extern "C" __attribute__((visibility("default"))) const char* tilefuse_{name}_build_info() '
        f'{{ return R"json({json.dumps(info)})json"; }}\n'
    )
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# a free-threaded Python has no stable ABI, and its wheels say so; the libraries are the same, but for the extension
# module, which it goes without
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

# the folder triton_kernels/ lives beside python/ and installs below the package, never at top level
PACKAGE_DIR = {"": "python", "tilefuse.triton_kernels": "triton_kernels", "tilefuse.benchmarks": "benchmarks"}
PACKAGES = [
    *find_packages("python"),
    *("tilefuse.triton_kernels" + ("." + p if p else "") for p in ["", *find_packages("triton_kernels")]),
    *("tilefuse.benchmarks" + ("." + p if p else "") for p in ["", *find_packages("benchmarks")]),
]

setup(
    package_dir=PACKAGE_DIR,
    packages=PACKAGES,
    package_data={
        "tilefuse": ["py.typed", "*.json", "_cpu.abi3.so", "_cuda.abi3.so", "_direct.abi3.so"],
        "tilefuse.integrations.transformers": ["verified.json"],
        "tilefuse.triton_kernels": ["tuned/*.json"],
    },
    # no sources: the extension only makes the wheel a platform wheel, BuildNative compiles csrc/ itself
    ext_modules=[Extension("tilefuse._native", sources=[], py_limited_api=LIMITED_API)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
