"""The Hopper CUDA kernel of fp8_matmul: when it is taken (anywhere), and its numbers (on a Hopper GPU)."""

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tilefuse
from tilefuse import library, native
from tilefuse.testing import assert_bit_equal, assert_close

CODES = torch.float8_e4m3fn
TILES = 5
# one tile shape of the kernel
TILE_SCHEMA = (
    "fp8_matmul_sm90(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, ScalarType out_dtype, int tile)"
    " -> Tensor"
)
# (M, N, K): whole tiles, ragged everything, N = 160 tiles across scale blocks, one wave and many, short and long K
SHAPES = [(128, 128, 128), (65, 136, 16), (129, 576, 320), (1000, 2112, 1152), (4096, 1024, 7168), (257, 24, 2048)]


def operands(m, n, k, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator).exp2()
    w = torch.randn(n, k, generator=generator)
    a, a_scale = tilefuse.fp8_quantize(x.to(device))
    b, b_scale = tilefuse.fp8_quantize(w.to(device), block=(128, 128))
    return a, a_scale, b, b_scale


def refusal(change=None, out_dtype=torch.bfloat16, shape=(256, 256, 256), monkeypatch=None):
    m, n, k = shape
    with FakeTensorMode():
        a = torch.empty(m, k, dtype=CODES)
        b = torch.empty(n, k, dtype=CODES)
        stride = (m + 3) // 4 * 4
        blocks = (k + 127) // 128
        a_scale = torch.empty_strided((m, blocks), (1, stride), dtype=torch.float32)
        b_scale = torch.empty((n + 127) // 128, blocks)
        if change is not None:
            a, a_scale, b, b_scale = change(a, a_scale, b, b_scale)
        return library.kernels()["fp8_matmul_fwd"].when["cuda"](a, a_scale, b, b_scale, None, out_dtype)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({}, None),
        ({"out_dtype": torch.float32, "shape": (256, 257, 256)}, None),
        ({"shape": (256, 256, 272)}, None),
        ({"shape": (64, 256, 256)}, "M > 64"),
        ({"shape": (256, 257, 256)}, "16-bit output rows"),
        ({"shape": (256, 256, 264)}, "multiples of 16 bytes"),
        ({"shape": (256, 256, 0)}, "multiples of 16 bytes"),
        ({"out_dtype": torch.float64}, "float64"),
        ({"change": lambda a, s, b, t: (a, s, b, torch.empty(256, 2))}, "weight scales"),
        ({"change": lambda a, s, b, t: (a, torch.empty(256, 2), b, t)}, "M-major"),
        ({"change": lambda a, s, b, t: (a, s, b, torch.empty(2, 2).t())}, "row-major"),
        ({"change": lambda a, s, b, t: (torch.empty(256, 264, dtype=CODES)[:, 8:], s, b, t)}, "multiples of 16"),
        ({"change": lambda a, s, b, t: (a[:1].expand(256, 256), s, b, t)}, "must not overlap"),
        ({"change": lambda a, s, b, t: (a, s, b[:1].expand(256, 256), t)}, "must not overlap"),
        ({"change": lambda a, s, b, t: (a.as_strided((256, 256), (16, 1)), s, b, t)}, "must not overlap"),
        ({"change": lambda a, s, b, t: (a, s[:, :1].expand(256, 2), b, t)}, "at least M"),
        ({"change": lambda a, s, b, t: (a, s.as_strided((256, 2), (1, 8)), b, t)}, "at least M"),
        ({"change": lambda a, s, b, t: (a, torch.empty_strided((260, 2), (1, 260))[1:257], b, t)}, "16 bytes"),
    ],
)
def test_it_takes_only_what_its_copies_can_read(monkeypatch, arguments, reason):
    monkeypatch.setattr("tilefuse.arch.of", lambda device: "sm_90")
    answer = refusal(**arguments)
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize("which", ["a", "a_scale", "b"])
def test_an_address_that_is_no_multiple_of_16_is_refused(monkeypatch, which):
    """Memory of another library may begin anywhere: the offset in the storage says nothing about it."""
    monkeypatch.setattr("tilefuse.arch.of", lambda device: "sm_90")
    call = dict(zip(("a", "a_scale", "b", "b_scale"), operands(256, 256, 256, "cpu")))
    refuses = library.kernels()["fp8_matmul_fwd"].when["cuda"]
    assert refuses(*call.values(), None, torch.bfloat16) is None
    old = call[which]
    size = old.untyped_storage().nbytes()
    memory = numpy.zeros(size + 32, dtype=numpy.uint8)
    start = -memory.ctypes.data % 16 + 8
    foreign = torch.from_numpy(memory[start : start + size]).view(old.dtype)
    call[which] = foreign.as_strided(old.shape, old.stride())
    assert call[which].storage_offset() == 0
    assert "16 bytes" in refuses(*call.values(), None, torch.bfloat16)


def test_it_is_for_hopper_alone(monkeypatch):
    monkeypatch.setattr("tilefuse.arch.of", lambda device: "sm_100")
    assert "sm_90" in refusal()


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", range(TILES))
def test_every_tile_against_the_oracle(tile, shape, out_dtype):
    n = shape[1]
    run, _ = native.find("cuda", TILE_SCHEMA)
    a, a_scale, b, b_scale = operands(*shape, "cuda")
    bias = torch.randn(n, device="cuda")
    outs = [run(a, a_scale, b, b_scale, bias, out_dtype, tile) for _ in range(5)]
    for out in outs[1:]:
        assert_bit_equal(out, outs[0])
    full_a = tilefuse.fp8_dequantize(a, a_scale, out_dtype=torch.float32).double()
    full_b = tilefuse.fp8_dequantize(b, b_scale, block=(128, 128), out_dtype=torch.float32).double()
    oracle = full_a @ full_b.t() + bias.double()
    # the plain computation on the same operands: dequantised to bf16, multiplied by the library
    low = out_dtype if out_dtype != torch.float32 else torch.bfloat16
    naive = (full_a.to(low) @ full_b.to(low).t() + bias.to(low)).to(out_dtype)
    assert_close(outs[0], oracle, naive)


@pytest.mark.gpu
@pytest.mark.sm90
def test_rows_do_not_depend_on_the_batch():
    a, a_scale, b, b_scale = operands(512, 512, 1024, "cuda")
    run, _ = native.find("cuda", TILE_SCHEMA)
    for tile in range(TILES):
        whole = run(a, a_scale, b, b_scale, None, torch.bfloat16, tile)
        part_scale = torch.empty_strided((256, 8), (1, 256), device="cuda").copy_(a_scale[:256])
        part = run(a[:256], part_scale, b, b_scale, None, torch.bfloat16, tile)
        assert_bit_equal(whole[:256], part)
