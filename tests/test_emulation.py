"""The CUDA emulation itself: every primitive against plain torch or Python, and every fault that it must catch."""

import math
import shutil

import pytest
import torch

from tilefuse.testing import emulation

pytestmark = pytest.mark.xdist_group("emulation")


@pytest.fixture(scope="module")
def module():
    return emulation.load_or_skip("self", "test")


@pytest.fixture(params=[("forward", 0), ("reverse", 0), ("random", 7)], ids=lambda p: p[0])
def schedule(request, module):
    module.set_schedule(*request.param)
    yield request.param[0]
    module.set_schedule("forward", 0)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "grid, block", [((1, 1, 1), (1, 1, 1)), ((3, 2, 4), (5, 3, 2)), ((2, 1, 1), (1024, 1, 1)), ((1, 7, 1), (8, 1, 64))]
)
def test_indices_of_three_dimensional_grids(module, schedule, grid, block):
    n = math.prod(grid) * math.prod(block)
    out = torch.zeros(n, dtype=torch.int32)
    module.indices(out.data_ptr(), grid, block, 0)
    assert torch.equal(out, torch.arange(1, n + 1, dtype=torch.int32))


@pytest.mark.parametrize(
    "grid, block, shared",
    [
        ((0, 1, 1), (32, 1, 1), 0),
        ((1, 1, 1), (0, 1, 1), 0),
        ((1, 1, 1), (1025, 1, 1), 0),
        ((1, 1, 1), (4, 4, 65), 0),
        ((1, 65536, 1), (1, 1, 1), 0),
        ((1, 1, 1), (32, 1, 1), 228 * 1024),
    ],
)
def test_launches_that_no_gpu_accepts(module, grid, block, shared):
    with pytest.raises(RuntimeError, match="no GPU accepts this launch"):
        module.indices(0, grid, block, shared)


def test_static_shared_memory_and_barrier(module):
    x = torch.randn(1024)

    def run():
        out = torch.empty_like(x)
        module.reverse(x.data_ptr(), out.data_ptr(), 1024, 128, True)
        return out

    out = emulation.in_every_order(module, run)
    assert torch.equal(out, x.view(8, 128).flip(1).flatten())


def test_missing_barrier_is_caught(module):
    x = torch.randn(256)

    def run():
        out = torch.empty_like(x)
        module.reverse(x.data_ptr(), out.data_ptr(), 256, 64, False)
        return out

    with pytest.raises(emulation.OrderDependence, match="tensor 0, flat index 0: nan with forward order"):
        emulation.in_every_order(module, run)


def test_warp_barrier_in_place_of_a_block_barrier_is_caught(module):
    x = torch.randn(128)

    def run():
        out = torch.empty_like(x)
        module.warp_race(x.data_ptr(), out.data_ptr())
        return out

    with pytest.raises(emulation.OrderDependence):
        emulation.in_every_order(module, run)


def test_dependence_between_blocks_is_caught(module):
    def run():
        data = torch.arange(16, dtype=torch.int32)
        module.block_race(data.data_ptr(), 16)
        return data

    with pytest.raises(emulation.OrderDependence):
        emulation.in_every_order(module, run)


def test_in_every_order_resets_the_schedule_and_takes_any_nesting(module):
    seen = []

    def run():
        seen.append(1)
        return {"a": (torch.zeros(3), torch.tensor(1.0)), "b": None}

    assert set(emulation.in_every_order(module, run)) == {"a", "b"}
    assert len(seen) == len(emulation.ORDERS)


@pytest.mark.parametrize("threads", [1, 32, 96, 1000])
def test_dynamic_shared_memory(module, schedule, threads):
    x = torch.randn(threads, dtype=torch.float64)
    out = torch.empty_like(x)
    module.reverse_dynamic(x.data_ptr(), out.data_ptr(), threads, 0)
    assert torch.equal(out, x.flip(0))


@pytest.mark.parametrize("past", [1, 16])
def test_write_past_dynamic_shared_memory_is_caught(module, past):
    x = torch.randn(64, dtype=torch.float64)
    out = torch.empty_like(x)
    with pytest.raises(RuntimeError, match="wrote outside the 512 bytes of dynamic shared memory"):
        module.reverse_dynamic(x.data_ptr(), out.data_ptr(), 64, past)


def test_unwritten_memory_reads_as_poison(module):
    out = torch.zeros(64)
    module.unwritten_shared(out.data_ptr())
    assert out.isnan().all()
    out = torch.zeros(8)
    module.unwritten_local(out.data_ptr(), 3)
    if emulation._poison_flag():
        # the compiler's pattern for locals is a large negative number
        assert (out[:3] == 1).all() and (out[3:] < -1e30).all()


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("argument", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("kind", ["index", "up", "down", "xor"])
def test_shuffles(module, schedule, kind, argument, width):
    x = torch.arange(100, 164, dtype=torch.int32)
    out = torch.zeros_like(x)
    module.shuffle(
        x.data_ptr(), out.data_ptr(), 64, ["index", "up", "down", "xor"].index(kind), argument, width, 2**32 - 1
    )
    for thread in range(64):
        warp, lane = thread // 32 * 32, thread % 32
        base, place = lane // width * width, lane % width
        source = {
            "index": base + argument % width,
            "up": lane - argument if place >= argument else lane,
            "down": lane + argument if place + argument < width else lane,
            "xor": lane ^ argument if (lane ^ argument) < base + width else lane,
        }[kind]
        assert out[thread] == x[warp + source]


def test_shuffles_in_part_of_a_warp(module, schedule):
    x = torch.arange(32, dtype=torch.int32)
    out = torch.full_like(x, -7)
    # lanes 0..11 of one warp; the others return early
    module.shuffle(x.data_ptr(), out.data_ptr(), 32, 3, 1, 32, 0x00000FFF)
    assert out.tolist() == [i ^ 1 for i in range(12)] + [-7] * 20
    # a block of 20 threads: the mask may name lanes that do not exist, reading from one gives poison
    out = torch.full_like(x, -7)
    module.shuffle(x.data_ptr(), out.data_ptr(), 20, 2, 4, 32, 2**32 - 1)
    assert out.tolist() == [i + 4 for i in range(16)] + [-1] * 4 + [-7] * 12
    # and reading from a lane that the mask leaves out does too
    out = torch.full_like(x, -7)
    module.shuffle(x.data_ptr(), out.data_ptr(), 32, 0, 3, 32, 0x7)
    assert out[:3].tolist() == [-1] * 3


@pytest.mark.parametrize("threads", [32, 64, 45])
def test_votes(module, schedule, threads):
    x = torch.randint(-2, 2, (threads,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    out = torch.zeros(6, threads, dtype=torch.int32)
    module.votes(x.data_ptr(), out.data_ptr(), threads)
    values, out = x.tolist(), (out.long() & 0xFFFFFFFF).tolist()
    for thread in range(threads):
        warp = values[thread // 32 * 32 : thread // 32 * 32 + 32]
        assert out[0][thread] == sum(1 << i for i, v in enumerate(warp) if v > 0)
        assert out[1][thread] == any(v > 0 for v in warp)
        assert out[2][thread] == all(v > 0 for v in warp)
        assert out[3][thread] == sum(1 << i for i, v in enumerate(warp) if v == values[thread])
        assert out[4][thread] == sum(warp) % 2**32
        assert out[5][thread] == max(warp) % 2**32


def test_groups_of_lanes_in_different_branches(module):
    x = torch.randn(32)

    def run():
        out = torch.empty_like(x)
        module.groups(x.data_ptr(), out.data_ptr())
        return out

    out = emulation.in_every_order(module, run).view(4, 8)
    for group, values in enumerate(x.view(4, 8)):
        expected = values.max() if group % 2 else values.sum()
        torch.testing.assert_close(out[group], expected.expand(8), rtol=1e-6, atol=1e-6)


def test_shuffle_of_sixteen_bit_values(module):
    x = torch.randn(32).bfloat16()
    out = torch.empty_like(x)
    module.half_shuffle(x.data_ptr(), out.data_ptr())
    assert torch.equal(out, x.view(16, 2).flip(1).flatten())


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_block_reductions(module, threads):
    x = torch.randn(2, threads)

    def run():
        out = torch.empty(2, threads, 2)
        module.reductions(x.data_ptr(), out.data_ptr(), 2, threads)
        return out

    out = emulation.in_every_order(module, run)
    torch.testing.assert_close(out[..., 0], x.sum(1, keepdim=True).expand(-1, threads), rtol=1e-5, atol=1e-4)
    assert torch.equal(out[..., 1], x.amax(1, keepdim=True).expand(-1, threads))


@pytest.mark.parametrize("values", [[0] * 40, [1] * 40, [0, 1] * 20])
def test_barrier_votes(module, schedule, values):
    x, out = ints(*values), torch.zeros(3, 40, dtype=torch.int32)
    module.barrier_votes(x.data_ptr(), out.data_ptr(), 40)
    assert out.tolist() == [[sum(values)] * 40, [int(all(values))] * 40, [int(any(values))] * 40]


def test_atomics(module):
    x = torch.randint(0, 10, (1000,), dtype=torch.int32, generator=torch.Generator().manual_seed(2))

    def run():
        counts, largest, ticket = torch.zeros(10, dtype=torch.int32), ints(-1), ints(0)
        module.histogram(x.data_ptr(), counts.data_ptr(), largest.data_ptr(), ticket.data_ptr(), 1000)
        return counts, largest, ticket

    counts, largest, ticket = emulation.in_every_order(module, run)
    assert torch.equal(counts, x.bincount(minlength=10).int())
    assert largest.item() == x.max() and ticket.item() == 1000 % 10


def test_lock_by_compare_and_swap(module, schedule):
    lock, counter = ints(0), ints(0)
    module.locked(lock.data_ptr(), counter.data_ptr(), 48)
    assert counter.item() == 96 and lock.item() == 0
    # without the lock, updates are lost
    counter.zero_()
    module.unlocked(counter.data_ptr(), 48)
    assert counter.item() < 48


def test_asynchronous_copies_land_when_waited_for(module):
    x = torch.randn(4, 128)

    def run(wait):
        out = torch.zeros(4, 128)
        module.pipeline(x.data_ptr(), out.data_ptr(), 4, wait)
        return out

    out = emulation.in_every_order(module, lambda: run(True))
    # the last tile asks for 8 of 16 bytes, the others become zero
    expected = x.clone()
    expected[3].view(32, 4)[:, 2:] = 0
    assert torch.equal(out, expected.flip(1))
    assert run(False).isnan().any()


FAULTS = {
    "barrier some skip": r"only 40 of 64 threads reach a barrier: .* waits at the barrier of test.cpp:\d+, but "
    r"thread \(40, 0, 0\) has exited",
    "barriers differ": r"waits at the barrier of test.cpp:\d+, but thread \(\d+, 0, 0\) waits at the barrier of "
    r"test.cpp:\d+: every thread must reach the same one",
    "lane not in mask": r"thread \(\d+, 0, 0\) \(lane \d+\) calls __shfl_sync at test.cpp:\d+ with mask "
    "0x0000ffff, which does not name it",
    "masks differ": r"__shfl_xor_sync",
    "operations differ": "must execute the same operation with the same mask",
    "lanes at a barrier": r"waits at the barrier of .*, but .* waits in __shfl_xor_sync of .* with mask 0xffffffff",
    "bad width": "has width 12, not a power of two",
    "misaligned": r"thread \(\d+, 0, 0\): access through a null or misaligned pointer at cuda.cuh:\d+",
    "shared index": r"thread \(63, 0, 0\): index out of the array's bounds at test.cpp:\d+",
    "null": "null or misaligned",
    "overflow": r"thread \([1-9]\d*, 0, 0\): signed integer overflow in \+",
    "division": "division by zero",
    "trap": r"thread \(5, 0, 0\): __trap\(\) at test.cpp:\d+",
    "spin": "spins forever",
    "async misaligned": "cp.async of 16 bytes is misaligned",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_errors_that_say_where(module, schedule, name):
    data = torch.zeros(1024)
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        module.fault(name, data.data_ptr())
    # the next launch starts from a clean state
    module.fault("none", data.data_ptr())


def test_integer_intrinsics(module):
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-(2**31), 2**31, (256,), generator=g).int()
    y = torch.randint(-(2**31), 2**31, (256,), generator=g).int()
    x[:4], y[:4] = ints(0, -1, 1, -(2**31)), ints(0, 1, -(2**31), 2**31 - 1)
    out = torch.zeros(12, 256, dtype=torch.int32)
    module.integers(x.data_ptr(), y.data_ptr(), out.data_ptr(), 256)

    def signed(value):
        value &= 0xFFFFFFFF
        return value - 2**32 if value >= 2**31 else value

    def bytes_of(value):
        return [value >> (8 * i) & 0xFF for i in range(4)]

    for i, (a, b) in enumerate(zip(x.tolist(), y.tolist())):
        ua, ub = a % 2**32, b % 2**32
        wide = ub << 32 | ua
        picked = bytes_of(ua) + bytes_of(ub)
        permuted = [picked[1], picked[7], 0xFF if picked[3] & 0x80 else 0, picked[3]]
        dot = 3 + sum(
            (p - 256 if p > 127 else p) * (q - 256 if q > 127 else q)
            for p, q in zip(bytes_of(ua & 0x7F7F7F7F), bytes_of(ub & 0x7F7F7F7F))
        )
        expected = [
            ua.bit_count(),
            (ua & -ua).bit_length(),
            32 - ua.bit_length(),
            int(f"{ua:032b}"[::-1], 2),
            int.from_bytes(bytes(permuted), "little"),
            (wide << 7) >> 32,
            wide >> 7,
            (a * b) >> 32,
            (ua * ub) >> 32,
            min(a, b),
            max(a, b),
            dot,
        ]
        assert out[:, i].tolist() == [signed(e) for e in expected]


def test_float_intrinsics(module):
    x = torch.cat(
        [torch.linspace(-20, 20, 100), torch.tensor([0.5, 1.5, 2.5, 3e9, -3e9, math.inf, -math.inf, math.nan])]
    )
    out = torch.zeros(11, x.numel())
    module.floats(x.data_ptr(), out.data_ptr(), x.numel())
    d = x.double()
    whole = 2**31 - 1
    expected = [
        d.rsqrt(),
        1 / d,
        1 / d,
        d * d + 1,
        d.exp(),
        d.log(),
        d.exp2(),
        d.round().clamp(-(2**31), whole).nan_to_num(0),
        d.trunc().clamp(-(2**31), whole).nan_to_num(0),
        d.clamp(0, 1).nan_to_num(0),
        d,
    ]
    for row, want in zip(out, expected):
        torch.testing.assert_close(row, want.float(), rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_dtype_conversions_on_every_bit_pattern(module, name):
    dtype = getattr(torch, name)
    bits = torch.arange(256**dtype.itemsize).to({1: torch.uint8, 2: torch.uint16}[dtype.itemsize])
    x = bits.view(dtype)
    wide, back = torch.empty(x.numel()), torch.empty_like(x)
    getattr(module, f"convert_{name}")(x.data_ptr(), wide.data_ptr(), back.data_ptr(), x.numel())
    assert torch.equal(wide.nan_to_num(12345), x.float().nan_to_num(12345))
    finite = wide.isfinite()
    assert torch.equal(back.view(bits.dtype).int()[finite], bits.int()[finite])
    assert back.float()[wide.isnan()].isnan().all()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_to_each_dtype(module, name):
    dtype = getattr(torch, name)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(20000, generator=g) * torch.exp2(torch.randint(-30, 30, (20000,), generator=g).float())
    x[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30, -1e-30])
    out = torch.empty(x.shape, dtype=dtype)
    getattr(module, f"narrow_{name}")(x.data_ptr(), out.data_ptr(), x.numel())
    if dtype.itemsize == 1:
        # the FP8 types saturate
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert torch.equal(out.float(), x.to(dtype).float())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn"])
def test_vector_accesses(module, name):
    x = torch.randint(0, 256, (4096 * 4,), dtype=torch.uint8).view(getattr(torch, name))
    out = torch.zeros_like(x)
    getattr(module, f"copy_{name}")(x.data_ptr(), out.data_ptr(), x.numel())
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))
    with pytest.raises(RuntimeError, match="misaligned"):
        getattr(module, f"copy_{name}")(x.data_ptr() + 4, out.data_ptr(), x.numel() - 16)


def test_unknown_schedule(module):
    with pytest.raises(ValueError, match="order must be forward, reverse or random, got sideways"):
        module.set_schedule("sideways", 0)


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(emulation, "_compiler", lambda: None)
    compiler = "there is no C++ compiler (g++, or the command in CXX)"
    assert emulation.missing() == compiler
    with pytest.raises(RuntimeError, match="emulation: there is no C\\+\\+ compiler"):
        emulation.load_source(emulation._CSRC / "emulation/self/test.cpp")
    monkeypatch.undo()
    monkeypatch.setattr(emulation, "_cuda_include", lambda: None)
    assert emulation.missing() in (
        "the CUDA headers are not installed (cuda_bf16.h)",
        "there is no C++ compiler (g++, or the command in CXX)",
    )


def test_compiler_command(monkeypatch):
    # a launcher in front, and one without a compiler behind it
    for cxx, words in (("env g++", ["env", "g++"]), ("", ["g++"]), ("env no-such-compiler", None), ("no-such", None)):
        monkeypatch.setenv("CXX", cxx)
        assert emulation._compiler.__wrapped__() == (words if shutil.which("g++") else None)


def test_compiler_errors_are_shown(tmp_path):
    if emulation.missing():
        pytest.skip(f"CUDA emulation: {emulation.missing()}")
    source = tmp_path / "broken.cpp"
    source.write_text('#include "emulation/binding.h"\nTILEFUSE_EMULATION(m) { return nonsense; }\n')
    with pytest.raises(RuntimeError, match="nonsense"):
        emulation.load_source(source)
