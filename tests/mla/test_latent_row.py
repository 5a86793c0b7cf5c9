"""The bytes of a latent cache row in C++ (csrc/mla/latent_row.h) are those of ops/mla/layout.py."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from tilefuse.ops.mla.layout import GROUP, RowLayout

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = """
#include "mla/latent_row.h"
using namespace tilefuse;
extern "C" {
int64_t group() { return kLatentGroup; }
int64_t scale_offset(int64_t rank, int64_t g) { return latent_scale_offset(rank, g); }
int64_t rope_offset(int64_t rank) { return latent_rope_offset(rank); }
int64_t row_bytes(int64_t rank, int64_t rope) { return latent_row_bytes(rank, rope); }
int64_t rope_dim(int64_t rank, int64_t bytes) { return latent_rope_dim(rank, bytes); }
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    if shutil.which("g++") is None or not CSRC.is_dir():
        pytest.skip("needs g++ and a source checkout")
    folder = tmp_path_factory.mktemp("latent_row")
    (folder / "row.cpp").write_text(SOURCE)
    library = folder / "row.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", str(folder / "row.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("group", "scale_offset", "rope_offset", "row_bytes", "rope_dim"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


@pytest.mark.parametrize("rank", [128, 256, 512, 640, 1024])
@pytest.mark.parametrize("rope_dim", [0, 32, 64, 66])
def test_offsets(header, rank, rope_dim):
    row = RowLayout("fp8", rank, rope_dim)
    assert header.group() == GROUP
    scales = [header.scale_offset(rank, g) for g in range(rank // GROUP)]
    assert scales == list(range(row.scale_offset, row.rope_offset, 4))
    assert header.rope_offset(rank) == row.rope_offset
    assert header.row_bytes(rank, rope_dim) == row.width
    assert header.rope_dim(rank, row.width) == rope_dim


def test_deepseek_row(header):
    # the 656 bytes of fp8_ds_mla
    assert (header.scale_offset(512, 0), header.rope_offset(512), header.row_bytes(512, 64)) == (512, 528, 656)
