"""Packed weights give the bits of the weights they were made of, everywhere where a weight is taken."""

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close
from tilefuse.testing.memory import allocations

BF16, CODES = torch.bfloat16, torch.float8_e4m3fn
SHAPES = [
    (0, 8),
    (1, 1),
    (5, 0),
    (15, 3),
    (16, 4),
    (17, 130),
    (63, 5),
    (64, 128),
    (100, 66),
    (2, 64, 128),
    (3, 40, 7),
    (0, 4, 4),
]


def bits(shape, dtype, seed=0):
    """Every bit pattern may occur, NaN and infinities too."""
    g = torch.Generator().manual_seed(seed)
    if dtype == CODES:
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).view(CODES)
    return torch.randint(-(2**15), 2**15, shape, generator=g, dtype=torch.int16).view(dtype)


def normal(*shape, seed=0, dtype=BF16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(*shape, seed=9):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def blocks(n):
    return -(-n // 128)


def pack_codes(w):
    return tilefuse.pack_weight(w, scales(*w.shape[:-2], blocks(w.shape[-2]), blocks(w.shape[-1])), format="fp8")


def pack(w):
    return pack_codes(w) if w.dtype == CODES else tilefuse.pack_weight(w)


def equal_bits(a, b):
    view = torch.uint8 if a.element_size() == 1 else torch.int16
    assert a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(view), b.contiguous().view(view))


@pytest.mark.parametrize("dtype", [BF16, CODES])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_gives_the_bits_back(shape, dtype):
    w = bits(shape, dtype)
    p = pack(w)
    assert (p.shape, p.dtype, p.ndim) == (w.shape, dtype, w.ndim)
    assert p.format == ("fp8" if dtype == CODES else "bf16")
    equal_bits(p.unpack(), w)
    # nothing but the padding of K to a multiple of 4 is added
    assert p.nbytes == w[..., :1].numel() * -(-shape[-1] // 4) * 4 * w.element_size() if shape[-1] else p.nbytes == 0


@pytest.mark.parametrize("dtype", [BF16, CODES])
def test_any_strides(dtype):
    w = bits((2, 48, 36), dtype)
    equal_bits(pack(w.transpose(1, 2)).data, pack(w.transpose(1, 2).contiguous()).data)
    equal_bits(pack(w[:, ::2, 1::3]).data, pack(w[:, ::2, 1::3].contiguous()).data)


def products(pick):
    """The results of every op with weights that `pick` made, over rows and sizes that reach every path."""
    out = {}
    for n, k, counts in [(64, 128, (1, 0, 2)), (96, 200, (3, 7, 0)), (130, 259, (6, 1, 20)), (33, 31, (2, 530, 1))]:
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        x = normal(int(offsets[-1]), k, seed=k)
        w, bias = normal(3, n, k, seed=n), normal(3, n, seed=5)
        out["grouped", n] = tilefuse.grouped_matmul(x, pick(w), offsets, bias=bias)
        out["float32", n] = tilefuse.grouped_matmul(x, pick(w), offsets, out_dtype=torch.float32)
        codes, scale = bits((3, n, k), CODES, seed=n), scales(3, blocks(n), blocks(k))
        rows = scales(3, n, blocks(k))
        q, q_scale = tilefuse.fp8_quantize(x)
        for name, a, a_scale in (("w8a8", q, q_scale), ("w8a16", x, None)):
            out[name, n] = tilefuse.fp8_grouped_matmul(a, a_scale, pick(codes, scale), scale, offsets)
            out[name, "rows", n] = tilefuse.fp8_grouped_matmul(a, a_scale, pick(codes, rows), rows, offsets)
            for m in (1, 4, 9):
                out[name, n, m] = tilefuse.fp8_matmul(
                    a[:m], None if a_scale is None else a_scale[:m], pick(codes[0], scale[0]), scale[0], bias[0]
                )
    for inner, hidden, tokens in [(64, 128, 1), (40, 72, 5), (19, 33, 30)]:
        x, ids = (
            normal(tokens, hidden, seed=1),
            torch.randint(0, 4, (tokens, 2), generator=torch.Generator().manual_seed(2)),
        )
        weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(3))
        up, down = normal(4, 2 * inner, hidden, seed=4) / 8, normal(4, hidden, inner, seed=5) / 8
        out["experts", inner] = tilefuse.moe_experts(x, pick(up), pick(down), weights, ids)
        up, down = up.to(CODES), down.to(CODES)
        up_scale, down_scale = scales(4, blocks(2 * inner), blocks(hidden)), scales(4, blocks(hidden), blocks(inner))
        for quantize in (True, False):
            out["experts fp8", quantize, inner] = tilefuse.moe_experts_fp8(
                x, pick(up, up_scale), up_scale, pick(down, down_scale), down_scale, weights, ids,
                quantize_activations=quantize,
            )  # fmt: skip
    return out


def packed(w, scale=None):
    return tilefuse.pack_weight(w, scale, format="fp8" if w.dtype == CODES else "bf16")


def plain(w, scale=None):
    return w


def transposed(w, scale=None):
    """The weight with N as its contiguous dim, where an op reads that in place."""
    return w.transpose(-2, -1).contiguous().transpose(-2, -1)


def check_bits():
    expected = products(plain)
    for pick in (packed, transposed):
        for name, result in products(pick).items():
            assert torch.equal(result.nan_to_num(1.5), expected[name].nan_to_num(1.5)), (pick.__name__, name)
    return expected


def test_the_bits_are_those_of_the_plain_weight():
    check_bits()


def check_near(results, expected):
    for name, result in results.items():
        other = expected[name].float()
        largest = other.nan_to_num(0.0).abs().max().item()
        torch.testing.assert_close(result.float(), other, rtol=2e-2, atol=2e-2 * largest, equal_nan=True, msg=str(name))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_on_other_instruction_sets(isa, on_instruction_set):
    """Packed and plain have the same bits there too; from one instruction set to the next only sums differ."""
    check_near(on_instruction_set(isa, check_bits), products(plain))


def test_the_reference_unpacks():
    expected = products(plain)
    with tilefuse.backend("reference"):
        check_near(products(packed), expected)


def test_unquantised_activations_are_nearer():
    """W8A16 against float64 on the scaled codes: as near as a bfloat16 product, nearer than quantised activations."""
    x, codes, scale = normal(20, 384, seed=1), normal(96, 384, seed=2).to(CODES), scales(1, 3)
    weight = tilefuse.fp8_dequantize(codes, scale, block=(128, 128), out_dtype=torch.float64)
    oracle = x.double() @ weight.T
    out = tilefuse.fp8_matmul(x, None, codes, scale)
    assert_close(out, oracle, x @ weight.to(BF16).T)
    quantised = tilefuse.fp8_matmul(*tilefuse.fp8_quantize(x), codes, scale)
    assert (quantised - oracle).norm() > 5 * (out - oracle).norm()
    linear = tilefuse.fp8_linear(x, pack_of(codes, scale), quantize_activations=False)
    assert_bit_equal(linear, out)
    assert_bit_equal(tilefuse.fp8_linear(x, pack_of(codes, scale)), quantised)


def pack_of(codes, scale):
    return tilefuse.pack_weight(codes, scale, format="fp8")


def test_a_packed_weight_brings_its_scales():
    x, codes, scale = normal(3, 130), normal(2, 40, 130).to(CODES), scales(2, 1, 2)
    offsets = torch.tensor([0, 1, 3])
    q, q_scale = tilefuse.fp8_quantize(x)
    own = tilefuse.fp8_grouped_matmul(q, q_scale, pack_of(codes, scale), None, offsets)
    assert_bit_equal(own, tilefuse.fp8_grouped_matmul(q, q_scale, codes, scale, offsets))
    own = tilefuse.fp8_matmul(q, q_scale, pack_of(codes[0], scale[0]))
    assert_bit_equal(own, tilefuse.fp8_matmul(q, q_scale, codes[0], scale[0]))


@pytest.mark.parametrize("dtype", [BF16, CODES])
def test_packing_holds_one_matrix_beside_the_pack(dtype):
    w = bits((8, 128, 256), dtype).transpose(1, 2)
    with allocations() as made:
        p = pack(w)
    whole = p.data.untyped_storage().nbytes()
    # everything but the pack is of one matrix
    assert {m.nbytes for m in made if m.nbytes != whole} <= set(range(whole // 8 + 1))
    assert whole == w.nbytes


@pytest.mark.parametrize("dtype", [BF16, CODES])
def test_copies_and_processes(dtype):
    p = pack(bits((3, 40, 130), dtype))
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p), torch.load(buffer, weights_only=False)):
        assert (other.shape, other.version) == (p.shape, p.version)
        equal_bits(other.unpack(), p.unpack())
        assert (other.scale is None) == (dtype == BF16)


def test_another_layout_is_refused():
    state = tilefuse.pack_weight(normal(4, 4)).__getstate__() | {"version": 0}
    with pytest.raises(
        ValueError, match="a pack of layout 0, this version reads 1: pack the checkpoint's weight again"
    ):
        object.__new__(tilefuse.PackedWeight).__setstate__(state)


def test_threads_and_fork():
    x, p, offsets = normal(5, 64), tilefuse.pack_weight(normal(2, 80, 64)), torch.tensor([0, 2, 5])
    expected = tilefuse.grouped_matmul(x, p, offsets)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: tilefuse.grouped_matmul(x, p, offsets), range(16)):
            assert_bit_equal(out, expected)
    # one thread: the parent's pool does not exist in the child
    script = (
        "import os, torch, tilefuse; torch.set_num_threads(1); torch.manual_seed(0)\n"
        "x, o = torch.randn(5, 64).bfloat16(), torch.tensor([0, 2, 5])\n"
        "p = tilefuse.pack_weight(torch.randn(2, 80, 64).bfloat16()); want = tilefuse.grouped_matmul(x, p, o)\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if torch.equal(tilefuse.grouped_matmul(x, p, o), want) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_compiled_and_fake():
    x, ids, weights = normal(3, 32), torch.tensor([[0, 1], [1, 2], [2, 9]]), torch.rand(3, 2)
    up, down = tilefuse.pack_weight(normal(3, 64, 32)), tilefuse.pack_weight(normal(3, 32, 32))
    expected = tilefuse.moe_experts(x, up, down, weights, ids)
    compiled = torch.compile(tilefuse.moe_experts, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(x, up, down, weights, ids), expected)
    plan = tilefuse.explain("moe_experts", x, up, down, weights, ids)
    assert plan["moe_experts_up"]["cpu"] == "runs"


def test_other_backends_say_why_not():
    x, offsets = normal(2, 32), torch.tensor([0, 2])
    with tilefuse.backend("triton"), pytest.raises(NotImplementedError, match="packed weights are for the CPU"):
        tilefuse.grouped_matmul(x, tilefuse.pack_weight(normal(1, 16, 32)), offsets)


W, FP8, SCALE = normal(4, 4), normal(4, 4).to(CODES), torch.ones(1, 1)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((W,), {"format": "int4"}, ValueError, "format must be one of bf16, fp8, got 'int4'"),
        ((W[0],), {}, ValueError, r"w must be \[N, K\] or \[E, N, K\], got \[4\] bfloat16"),
        ((W.float(),), {}, TypeError, "w must be bfloat16 with format 'bf16', got"),
        ((W, SCALE), {"format": "fp8"}, TypeError, "w must be float8_e4m3fn with format 'fp8', got"),
        ((W.to("meta"),), {}, ValueError, "w must be on the CPU, whose kernels read packed weights, got meta"),
        ((W, SCALE), {}, ValueError, "scale must be None with format 'bf16'"),
        ((FP8,), {"format": "fp8"}, ValueError, r"scale must be \[1, 1\] or \[4, 1\] float32, got None"),
        ((FP8, torch.ones(2, 1)), {"format": "fp8"}, ValueError, r"scale must be \[1, 1\] or \[4, 1\] float32"),
        ((FP8, SCALE.double()), {"format": "fp8"}, TypeError, r"scale must be \[1, 1\] or \[4, 1\] float32"),
        ((FP8, SCALE.to("meta")), {"format": "fp8"}, ValueError, "scale must be on the device of w"),
        ((FP8, SCALE.clone().requires_grad_()), {"format": "fp8"}, RuntimeError, "scales get no gradient, but scale"),
        ((normal(4, 4).requires_grad_(),), {}, RuntimeError, "packed weights are for inference, but w requires grad"),
    ],
)  # fmt: skip
def test_errors(args, options, error, message):
    with pytest.raises(error, match="^tilefuse.pack_weight: " + message):
        tilefuse.pack_weight(*args, **options)


def test_gradients_are_refused():
    x, ids, weights = normal(3, 32).requires_grad_(), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    up, down = tilefuse.pack_weight(normal(1, 64, 32)), tilefuse.pack_weight(normal(1, 32, 32))
    codes = pack_of(normal(32, 32).to(CODES), SCALE)
    message = "inference, but x requires grad"
    with pytest.raises(RuntimeError, match="^tilefuse.moe_experts: .*" + message):
        tilefuse.moe_experts(x, up, down, weights, ids)
    with pytest.raises(RuntimeError, match="^tilefuse.fp8_linear: .*" + message):
        tilefuse.fp8_linear(x, codes)
    with pytest.raises(RuntimeError, match="^tilefuse.fp8_linear: .*" + message):
        tilefuse.fp8_linear(x, normal(32, 32), quantize_activations=False)
    with pytest.raises(RuntimeError, match=r"^tilefuse.grouped_matmul: .*inference, but a requires grad"):
        tilefuse.grouped_matmul(x, up, torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match=r"^tilefuse.fp8_matmul: .*but a requires grad"):
        tilefuse.fp8_matmul(x, None, codes)
    with torch.no_grad():
        assert tilefuse.moe_experts(x, up, down, weights, ids).shape == (3, 32)


def test_wrong_packs():
    x, offsets = normal(3, 32), torch.tensor([0, 3])
    with pytest.raises(
        ValueError, match=r"^tilefuse.grouped_matmul: b must be \[E, N, 32\], got PackedWeight\(\[1, 64, 30\] bf"
    ):
        tilefuse.grouped_matmul(x, tilefuse.pack_weight(normal(1, 64, 30)), offsets)
    with pytest.raises(TypeError, match=r"^tilefuse.fp8_matmul: b must be float8_e4m3fn, got PackedWeight"):
        tilefuse.fp8_matmul(x, None, tilefuse.pack_weight(normal(64, 32)), SCALE)
    with pytest.raises(
        ValueError, match=r"^tilefuse.fp8_matmul: b_scale must be \[1, 1\] or \[4, 1\] float32, got None"
    ):
        tilefuse.fp8_matmul(normal(2, 4), None, FP8)
