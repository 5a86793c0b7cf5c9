"""What ``pip install`` gives: with and without a compiler, from the tree and from an sdist, and what setup.py decides.

Nothing is downloaded: builds run without isolation on the installed setuptools.
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import tilefuse
from tilefuse.testing import emulation

setuptools = pytest.importorskip("setuptools", reason="builds need setuptools")

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.xdist_group("packaging"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout"),
]
TRITON_MODULES = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "triton_kernels").rglob("*.py") if "__pycache__" not in p.parts
)


def run(*command, **kwargs):
    ran = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, so that a build leaves nothing behind."""
    copy = tmp_path_factory.mktemp("tree") / "tilefuse"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "shared")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build_wheel(source, out, **environment):
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
        env={**os.environ, **environment},
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def plain_wheel(tree, tmp_path_factory):
    """What a machine without a compiler builds."""
    out = tmp_path_factory.mktemp("plain")
    # a PATH with nothing but Python: neither g++ nor nvcc
    return build_wheel(tree, out, PATH=str(Path(sys.executable).parent), CUDA_HOME="", CXX="")


def test_wheel_without_a_compiler(plain_wheel, tmp_path):
    assert plain_wheel.name.startswith(f"tilefuse-{tilefuse.__version__}-cp310-abi3-linux_")
    names = zipfile.ZipFile(plain_wheel).namelist()
    assert not [n for n in names if n.endswith(".so")]
    installed = {n.split("/")[0] for n in names}
    assert installed == {"tilefuse", f"tilefuse-{tilefuse.__version__}.dist-info"}
    assert {f"tilefuse/{m}" for m in TRITON_MODULES} <= set(names)
    assert {"tilefuse/py.typed", "tilefuse/verified.json"} <= set(names)
    assert any(n.endswith("dist-info/licenses/LICENSE") for n in names)
    assert not [n for n in names if "emulation/" in n or n.endswith((".cuh", ".cu", ".cpp", ".h"))]
    # everything still works: reference ops, the reasons for what is missing, the command line
    zipfile.ZipFile(plain_wheel).extractall(tmp_path)
    program = (
        "import tilefuse, torch\n"
        f"assert tilefuse.__file__.startswith({str(tmp_path)!r}), tilefuse.__file__\n"
        "x = torch.randn(3, 2, 8)\n"
        "cos, sin = tilefuse.rope_tables(8, 16)\n"
        "assert tilefuse.rope(x, cos, sin).shape == x.shape\n"
        "from tilefuse import native\n"
        "print(native.load('cpu').missing, native.load('cuda').missing)\n"
    )
    said = run(sys.executable, "-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "_cpu.abi3.so was not built" in said and "_cuda.abi3.so was not built" in said


@pytest.mark.slow
def test_wheel_with_the_native_libraries(tree, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    wheel = build_wheel(tree, tmp_path, TILEFUSE_BUILD_NATIVE="1", TORCH_CUDA_ARCH_LIST="9.0a")
    assert f"-{tilefuse.__version__}-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    built = {n for n in names if n.endswith(".so")}
    expected = {"tilefuse/_cpu.abi3.so", "tilefuse/_direct.abi3.so"}
    if shutil.which("nvcc") and list((ROOT / "csrc").glob("*/*.cu")):
        expected.add("tilefuse/_cuda.abi3.so")
    assert built == expected
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for name in built:
        check_library(tmp_path / "site" / name)
    program = (
        "from tilefuse import direct, native\n"
        "print(native.load('cpu').missing, direct.load().missing, native.load('cuda').missing)"
    )
    said = run(sys.executable, "-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert said.split()[:2] == ["None", "None"] and (said.split()[2] == "None") == (len(built) == 3)


def check_library(path):
    """One binary for every Python, and none bound to a CUDA version."""
    if shutil.which("readelf") is None:
        return
    symbols = run("readelf", "-W", "--dyn-syms", str(path))
    undefined = {line.split()[-1] for line in symbols.splitlines() if " UND " in line}
    if path.name != "_direct.abi3.so":
        assert not [s for s in undefined if s.startswith(("Py", "_Py"))]
    assert not [s for s in undefined if s.startswith(("_ZN3c10", "_ZN2at"))], "not the stable ABI"
    needed = run("readelf", "-d", str(path))
    assert "libcudart" not in needed and "libcuda.so" not in needed and "libpython" not in needed


@pytest.mark.parametrize("name", ["cpu", "cuda", "direct"])
def test_libraries_in_the_tree(name):
    path = Path(tilefuse.__file__).with_name(f"_{name}.abi3.so")
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    check_library(path)


def test_sdist_has_what_a_build_needs(tree, plain_wheel, tmp_path):
    program = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", program, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {n.split("/", 1)[1] for n in file.getnames() if "/" in n}
        file.extractall(tmp_path / "source", filter="data")
    sources = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert sources and sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "tests/conftest.py", *TRITON_MODULES} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]
    # the sdist builds the same plain wheel as the tree
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "out").mkdir()
    wheel = build_wheel(source, tmp_path / "out", TILEFUSE_BUILD_NATIVE="0")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(plain_wheel).namelist())


def test_metadata_needs_no_torch(tree):
    program = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['setup.py', '-q', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    assert tilefuse.__version__ in run(sys.executable, "-c", program, cwd=tree)


@pytest.mark.parametrize("mode, fails", [("auto", False), ("1", True)])
def test_build_without_torch(tree, mode, fails):
    program = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, "TILEFUSE_BUILD_NATIVE": mode},
    )
    assert (ran.returncode != 0) == fails
    assert "native libraries not built, missing: torch (build with --no-build-isolation)" in ran.stderr
    assert not list(tree.glob("python/tilefuse/*.so"))


def test_kernel_folder_refuses_to_be_top_level():
    ran = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ImportError: this is tilefuse's kernel folder, import it as tilefuse.triton_kernels" in ran.stderr


def test_import_without_triton():
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import tilefuse, torch\n"
        "cos, sin = tilefuse.rope_tables(8, 16)\n"
        "tilefuse.rope(torch.randn(3, 2, 8), cos, sin)\n"
        "from tilefuse import backends\n"
        "print(backends.triton_missing())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert run(sys.executable, "-c", program, cwd="/", env=environment).startswith("Triton cannot be imported")


def test_every_folder_is_a_package():
    # an editable install does not see a folder without __init__.py
    for layer in ("python/tilefuse", "triton_kernels", "benchmarks"):
        for path in (ROOT / layer).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_architecture_flags(script):
    assert script["_gencode"](["8.0", "9.0a", "10.0a"]).split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100a,code=sm_100a",
    ]
    # PTX of 9.0a would run nowhere else, so it is left out
    assert script["_gencode"](["9.0a"]) == "-gencode=arch=compute_90a,code=sm_90a"
    assert script["_gencode"](["9.0a", "9.0+PTX"]).endswith(
        "arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90"
    )


def test_architectures_come_from_the_environment_never_from_a_gpu(script, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_75\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    # an nvcc that does not know Blackwell builds the others
    assert script["_arch_list"](str(nvcc)) == ["8.0", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6; 9.0a+PTX")
    assert script["_arch_list"](str(nvcc)) == ["8.6", "9.0a+PTX"]


def test_settings_in_a_source(script, tmp_path):
    source = tmp_path / "a.cu"
    source.write_text("// build-archs: 9.0a 10.0a\n// build-flags: -O2\n\n#include <x>\n")
    assert script["_file_setting"](source, "build-archs") == "9.0a 10.0a"
    assert script["_file_setting"](source, "build-flags") == "-O2"
    assert script["_file_setting"](source, "build-other") == ""


def test_cudart_is_found_beside_a_wrapped_nvcc(script):
    nvcc = shutil.which("nvcc")
    if nvcc is None or emulation._cuda_include() is None:
        pytest.skip("needs nvcc")
    assert (script["_cudart"](nvcc) / "libcudart_static.a").exists()


def test_packages_cover_every_kernel_folder(script):
    folders = {Path(m).parent.as_posix().replace("/", ".") for m in TRITON_MODULES}
    assert {f"tilefuse.{f}" for f in folders} <= set(script["PACKAGES"])
    assert "triton_kernels" not in script["PACKAGES"]


@pytest.fixture
def toy_tree(tmp_path):
    """setup.py with one tiny source per compiler, at a path that ninja and the shell would take apart."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    tree = tmp_path / "a path with spaces"
    (tree / "csrc/toy").mkdir(parents=True)
    (tree / "python/tilefuse").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "csrc/toy/toy_cpu.cpp").write_text('#include "toy/toy.h"\nint TILEFUSE_ISA = TOY;\n')
    (tree / "csrc/toy/toy.cu").write_text('#include "toy/toy.h"\n__global__ void toy(int* x) { *x = TOY; }\n')
    (tree / "csrc/toy/toy.h").write_text("#define TOY 1\n")
    (tree / "csrc/python").mkdir()
    (tree / "csrc/python/toy.cpp").write_text('#include <Python.h>\n#include "toy/toy.h"\nint python = TOY;\n')
    return tree


def test_path_with_spaces_and_a_compiler_of_two_words(toy_tree, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/launched\nexec "$@"\n')
    launcher.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": f"{launcher} g++",
        "TORCH_CUDA_ARCH_LIST": "9.0a",
        "TILEFUSE_BUILD_NATIVE": "1",
    }

    def build():
        run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=toy_tree, env=environment)
        return {p: p.stat().st_mtime_ns for p in toy_tree.rglob("toy*.o")}

    first = build()
    names = {p.name for p in toy_tree.glob("python/tilefuse/*.so")}
    cuda = shutil.which("nvcc") is not None
    python = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    optional = {"_cuda.abi3.so": cuda, "_direct.abi3.so": python}
    assert names == {"_cpu.abi3.so", *(name for name, there in optional.items() if there)}
    assert len(first) == 4 + cuda + python
    # nvcc's host compiler is the launched one too
    launched = (tmp_path / "launched").read_text().splitlines()
    assert all(line.startswith("g++ ") for line in launched)
    assert any("toy.cu" in line for line in launched) == cuda
    # the lists of headers are understood: nothing is compiled again until one changes
    assert build() == first
    (toy_tree / "csrc/toy/toy.h").write_text("#define TOY 2\n")
    again = build()
    assert not [p for p in first if again[p] == first[p]]


def test_a_compiler_that_does_not_run_is_named(toy_tree, tmp_path):
    # a launcher alone is no compiler: what it launches must run as well
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    for cxx in (f"{launcher} no-such-compiler", "no-such-launcher g++"):
        ran = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=toy_tree,
            capture_output=True,
            text=True,
            env={**os.environ, "CXX": cxx, "TILEFUSE_BUILD_NATIVE": "1"},
        )
        assert ran.returncode == 1 and f"native libraries not built, missing: {cxx}\n" in ran.stderr


def test_compiler_command(script, monkeypatch):
    for value, words in (
        (None, ["g++"]),
        ("", ["g++"]),
        ("clang++", ["clang++"]),
        ("ccache g++ -m64", ["ccache", "g++", "-m64"]),
        ("'/a path/g++'", ["/a path/g++"]),
    ):
        monkeypatch.delenv("CXX", raising=False)
        if value is not None:
            monkeypatch.setenv("CXX", value)
        assert script["_cxx"]() == words


def test_build_information_survives_any_compiler_version(script, tmp_path):
    # Red Hat's ends in a bracket, which beside JSON's quote would end a plain raw string
    script["_write_info"](tmp_path / "info.cpp", "cpu", {"compiler": "g++ (GCC) 13.2.1 (Red Hat 13.2.1-4)"})
    if shutil.which("g++") is not None:
        run("g++", "-fsyntax-only", str(tmp_path / "info.cpp"))


SETUP = (
    "import runpy, sys\nsys.argv = ['setup.py', '-q', *sys.argv[1:]]\nrunpy.run_path('setup.py', run_name='__main__')\n"
)


def test_wheel_of_a_free_threaded_python(tree, tmp_path):
    # it has no stable ABI, and setuptools refuses to be asked for one
    program = (
        "import sysconfig\n"
        "real = sysconfig.get_config_var\n"
        "sysconfig.get_config_var = lambda name: 1 if name == 'Py_GIL_DISABLED' else real(name)\n"
    )
    environment = {**os.environ, "TILEFUSE_BUILD_NATIVE": "0"}
    run(sys.executable, "-c", program + SETUP, "bdist_wheel", "-d", str(tmp_path), cwd=tree, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert "abi3" not in wheel.name and wheel.name.startswith(f"tilefuse-{tilefuse.__version__}-cp3")


def test_a_python_without_a_limited_api_or_headers_goes_without_the_extension_module(script, monkeypatch, tmp_path):
    include, why = script["_python_include"]()
    assert (include / "Python.h").exists() if include else why
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert script["_python_include"]() == (None, f"no Python.h in {tmp_path}")
    monkeypatch.setitem(script["_python_include"].__globals__, "LIMITED_API", False)
    assert script["_python_include"]() == (None, "a free-threaded Python has no limited API")


def test_old_setuptools_is_named(script):
    program = "import setuptools\nsetuptools.__version__ = '68.1.2'\n"
    ran = subprocess.run([sys.executable, "-c", program + SETUP, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("tilefuse: the build needs setuptools >= 77, this is 68.1.2: pip install -U ")
    assert '"setuptools>=77"' in (ROOT / "pyproject.toml").read_text()
