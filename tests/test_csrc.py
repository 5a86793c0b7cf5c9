"""Rules that the C++ sources keep, and what their shared host code does."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="needs a source checkout")


def sources():
    return sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))


def test_intrinsics_come_from_one_header():
    # the diagnostics that gcc's own headers raise are silenced there, and nowhere else
    for path in sources():
        text = path.read_text()
        if path.relative_to(CSRC).as_posix() != "common/immintrin.h":
            assert "<immintrin.h>" not in text and "uninitialized" not in text, path


def test_structs_of_the_host_code_have_one_meaning():
    """Two structs of one name in namespace tilefuse are one type to the linker: only CPU and CUDA may share a name."""
    found = {}
    for path in sources():
        if "emulation" in path.parts:
            continue
        device = "cuda" if path.suffix in (".cu", ".cuh") or path.name == "quantize_launch.h" else "cpu"
        depth_of_names = []
        for line in path.read_text().splitlines():
            if match := re.match(r"namespace( [\w:]+)? \{$", line):
                depth_of_names.append((match[1] or " anonymous").strip())
            elif line.startswith("}  // namespace"):
                depth_of_names.pop()
            elif (match := re.match(r"struct (\w+)[ :{]", line)) and "anonymous" not in depth_of_names:
                found.setdefault((device, "::".join(depth_of_names), match[1]), []).append(path.name)
    assert found and not {k: v for k, v in found.items() if len(v) > 1}


HUGE_PAGES = """
#include <sys/mman.h>
static int64_t calls = 0;
#define madvise(...) (++calls)
#include "common/host.h"
using namespace tilefuse;
static int64_t advised(Tensor x) { calls = 0; prefer_huge_pages(x); return calls; }
STABLE_TORCH_LIBRARY(tilefuse_host_test, m) { m.def("advised(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(tilefuse_host_test, CPU, m) { m.impl("advised", TORCH_BOX(&advised)); }
STABLE_TORCH_LIBRARY_IMPL(tilefuse_host_test, Meta, m) { m.impl("advised", TORCH_BOX(&advised)); }
"""


def test_huge_pages_are_asked_for_cpu_memory_only(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    installed = Path(find_spec("torch").submodule_search_locations[0])
    (tmp_path / "host.cpp").write_text("#include <cstdint>\n" + HUGE_PAGES)
    library = tmp_path / "host.so"
    run = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", "-isystem", f"{installed}/include"]
    run += ["-DTORCH_TARGET_VERSION=0x020b000000000000", str(tmp_path / "host.cpp"), "-o", str(library)]
    subprocess.run([*run, f"-L{installed}/lib", "-ltorch", "-ltorch_cpu", "-lc10"], check=True, capture_output=True)
    torch.ops.load_library(str(library))
    advised = torch.ops.tilefuse_host_test.advised
    large = 8 << 20
    assert advised(torch.empty(large, dtype=torch.uint8)) == 1
    assert advised(torch.empty(4096, dtype=torch.uint8)) == 0
    # no memory of the CPU: the address of a device would be advised
    assert advised(torch.empty(large, dtype=torch.uint8, device="meta")) == 0
