"""Build script: packages, and the native libraries where a compiler is at hand.

Nothing here imports torch for metadata or looks for a GPU. The native libraries are two plain
shared objects without a Python init function, loaded by ``torch.ops.load_library``:

* ``_cpu.abi3.so`` from every ``csrc/<family>/*_cpu.cpp`` (g++), each compiled once per instruction set;
* ``_cuda.abi3.so`` from every ``csrc/<family>/*.cu`` (nvcc), for the architectures of
  ``TORCH_CUDA_ARCH_LIST`` (default ``8.0;9.0a;10.0a``, plus PTX of the first).

``TILEFUSE_BUILD_NATIVE`` is ``auto`` (build what the tools allow, say what is skipped), ``0`` (never)
or ``1`` (fail when the CPU library cannot be built).
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0a;10.0a"

# one object per instruction set; the registering object is the baseline one (see csrc/common/cpu.h)
X86_ISAS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}


class BuildNative(build_ext):
    """Compiles csrc/ with ninja: g++ for the CPU library, nvcc for the CUDA library."""

    def run(self):
        mode = os.environ.get("TILEFUSE_BUILD_NATIVE", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"TILEFUSE_BUILD_NATIVE must be auto, 0 or 1, got {mode!r}")
        if mode == "0":
            return
        include = _torch_include()
        missing = [
            what
            for what, there in {
                "torch (build with --no-build-isolation)": include is not None,
                "ninja": _ninja() is not None,
                "g++": shutil.which(os.environ.get("CXX", "g++")) is not None,
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
        _ninja_build(build_dir, out.resolve(), include, _nvcc())

    def get_outputs(self):
        return []


def _torch_include():
    """The header folder of the installed torch, found without importing it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    include = Path(spec.submodule_search_locations[0]) / "include"
    return include if (include / "torch/csrc/stable/library.h").exists() else None


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
    with open(source) as file:
        for _ in range(10):
            match = re.match(rf"// {name}: (.*)", file.readline())
            if match:
                return match.group(1)
    return ""


def _ninja_build(build_dir, out, include, nvcc):
    build_dir.mkdir(parents=True, exist_ok=True)
    cxx = os.environ.get("CXX", "g++")
    torch_lib = include.parent / "lib"
    isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    common = f"-O3 -std=c++17 -fPIC -fvisibility=hidden -I{ROOT / 'csrc'} -DTORCH_TARGET_VERSION=0x020b000000000000"
    # contraction would make a result depend on the instruction set; kernels that want it ask for it
    cxx_flags = f"{common} -isystem {include} -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra"
    link_torch = f"-L{torch_lib} -ltorch -ltorch_cpu -lc10 -Wl,-rpath,'$$ORIGIN/../torch/lib'"
    rules = [
        f"cxx = {cxx}",
        f"cxxflags = {cxx_flags}",
        "rule cxx\n  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared -o $out $in $libs {link_torch}",
    ]
    builds, defaults = [], []

    objects = []
    for source in sorted((ROOT / "csrc").glob("*/*_cpu.cpp")):
        extra = _file_setting(source, "build-flags")
        for isa, march in isas.items():
            obj = f"{source.parent.name}/{source.stem}.{isa}.o"
            define = f"-DTILEFUSE_ISA={isa}" + (" -DTILEFUSE_REGISTER" if isa == "baseline" else "")
            builds.append(f"build {obj}: cxx {source}\n  flags = {define} {' '.join(march)} {extra}")
            objects.append(obj)
    info = {"compiler": _version(cxx), "instruction_sets": list(isas), "flags": "-O3 -ffp-contract=off"}
    _write_info(build_dir / "cpu_info.cpp", "cpu", info)
    builds.append("build cpu_info.o: cxx cpu_info.cpp")
    builds.append(f"build {out / '_cpu.abi3.so'}: link cpu_info.o {' '.join(objects)}")
    defaults.append(str(out / "_cpu.abi3.so"))

    cuda_sources = sorted(s for s in (ROOT / "csrc").glob("*/*.cu") if s.parent.name != "emulation")
    cudart = _cudart(nvcc) if nvcc else None
    archs = _arch_list(nvcc) if nvcc else []
    # `// build-archs: 9.0a` limits a file to architectures; without any of them there is nothing to build it for
    wanted = {s: _file_setting(s, "build-archs").split() for s in cuda_sources}
    cuda_archs = {s: [a for a in archs if not only or a.removesuffix("+PTX") in only] for s, only in wanted.items()}
    cuda_sources = [s for s in cuda_sources if cuda_archs[s]]
    if cudart and cuda_sources:
        rules.append(
            f"nvccflags = {common.replace('-fPIC -fvisibility=hidden', '')} -isystem {include} -DUSE_CUDA"
            f" -lineinfo -Xfatbin -compress-all -ccbin {cxx} -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
            " -static-global-template-stub=false --expt-relaxed-constexpr -diag-suppress 20012"
        )
        # ptxas -v goes to a log beside the object: the resource gate and a curious reader use it
        rules.append(
            f"rule nvcc\n  command = {nvcc} $nvccflags $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
            " || (cat $out.log; exit 1)\n  depfile = $out.d\n  deps = gcc"
        )
        objects = []
        for source in cuda_sources:
            obj = f"{source.parent.name}/{source.stem}.cu.o"
            flags = f"{_gencode(cuda_archs[source])} {_file_setting(source, 'build-flags')}"
            builds.append(f"build {obj}: nvcc {source}\n  flags = {flags}")
            objects.append(obj)
        info = {"nvcc": _version(nvcc), "architectures": [f"sm_{_number(a)}" for a in archs]}
        _write_info(build_dir / "cuda_info.cpp", "cuda", info)
        builds.append("build cuda_info.o: cxx cuda_info.cpp")
        libs = f"-L{cudart} -lcudart_static -ldl -lrt -lpthread"
        builds.append(f"build {out / '_cuda.abi3.so'}: link cuda_info.o {' '.join(objects)}\n  libs = {libs}")
        defaults.append(str(out / "_cuda.abi3.so"))
    else:
        (out / "_cuda.abi3.so").unlink(missing_ok=True)
        why = "no nvcc" if not nvcc else "no libcudart_static.a beside nvcc" if not cudart else "no CUDA sources"
        print(f"tilefuse: CUDA library not built ({why})", file=sys.stderr)

    (build_dir / "build.ninja").write_text("\n".join([*rules, *builds, f"default {' '.join(defaults)}"]) + "\n")
    jobs = os.environ.get("MAX_JOBS") or str(max(1, min(os.cpu_count() or 1, _memory_gib() // 4)))
    subprocess.run([_ninja(), "-C", str(build_dir), "-j", jobs, "--quiet"], check=True)


def _memory_gib():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30


def _version(tool):
    lines = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return lines[-1] if "nvcc" in tool else lines[0]


def _write_info(path, name, info):
    """A C string in the library that says how it was built; tilefuse.native reads it."""
    text = (
        f'extern "C" __attribute__((visibility("default"))) const char* tilefuse_{name}_build_info() '
        f'{{ return R"({json.dumps(info)})"; }}\n'
    )
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


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
        "tilefuse": ["py.typed", "*.json", "_cpu.abi3.so", "_cuda.abi3.so"],
        "tilefuse.triton_kernels": ["tuned/*.json"],
    },
    # no sources: the extension only makes the wheel a platform wheel, BuildNative compiles csrc/ itself
    ext_modules=[Extension("tilefuse._native", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
