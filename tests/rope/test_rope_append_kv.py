"""``rope_append_kv``. A number in a test's name is that of the edge case in ``test_rope``."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.rope.rope import normal, tables
from tilefuse.testing.inputs.rope.rope_append_kv import cases

case = by_name(cases)
KERNEL = "rope_append_kv_fwd"
E4M3 = torch.float8_e4m3fn
CASES = [case[0] for case in cases("cpu", torch.float32, torch.bfloat16)]
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.bfloat16, E4M3),
    (torch.float32, E4M3),
]


def expected_caches(args, options):
    """Written token by token from the op's definition."""
    _, k, v, cos, sin, positions, k_cache, v_cache, slots = args
    options = dict(options)
    scales = options.pop("k_scale", 1.0), options.pop("v_scale", 1.0)
    with tilefuse.backend("reference"):
        k = tilefuse.rope(k.float(), cos, sin, positions, **options)
    result = []
    for x, cache, scale in ((k, k_cache, scales[0]), (v, v_cache, scales[1])):
        cache = cache.clone()
        for row, slot in zip(x.flatten(0, -3), slots.flatten().tolist()):
            if slot >= 0:
                if cache.dtype == E4M3:
                    row = (row.float() / torch.tensor(scale, device=row.device)).clamp(-448, 448)
                page, place = divmod(slot, cache.shape[1])
                cache.view(torch.uint8 if cache.dtype == E4M3 else cache.dtype)[page, place] = (
                    row.to(cache.dtype).view(torch.uint8) if cache.dtype == E4M3 else row.to(cache.dtype)
                )
        result.append(cache)
    return result


def close(out, expected):
    """k may differ in a last bit where a compiler contracts a product and a sum."""
    if out.dtype == E4M3:
        codes, exact = out.view(torch.uint8).int(), expected.view(torch.uint8).int()
        assert ((codes - exact).abs() <= 1).all() and ((codes != exact).float().mean() < 0.02)
    else:
        torch.testing.assert_close(out, expected, rtol=torch.finfo(out.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "_".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("name", CASES)
def test_caches_and_query(name, dtypes, device):
    args, options = case(name, device, *dtypes)
    k_expected, v_expected = expected_caches(args, options)
    q, k_cache, v_cache = args[0], args[6], args[7]
    with poisoned():
        out = tilefuse.rope_append_kv(*args, **options)
    rope_options = {k: v for k, v in options.items() if not k.endswith("scale")}
    assert_bit_equal(out, tilefuse.rope(q, *args[3:6], **rope_options))
    assert_bit_equal(v_cache, v_expected)
    if device == "cpu":
        assert_bit_equal(k_cache, k_expected)
    else:
        close(k_cache, k_expected)


def test_cache_error_is_one_rounding(device):
    """The oracle rule for the written keys: float64 on the same operands, one rounding at the end."""
    args, options = case("tail", device, torch.bfloat16, torch.bfloat16)
    exact_args = [t.double() if i in (0, 1, 2, 6, 7) else t for i, t in enumerate(args)]
    plain = expected_caches([t.bfloat16().float() if i in (3, 4) else t for i, t in enumerate(args)], options)[0]
    tilefuse.rope_append_kv(*args, **options)
    with tilefuse.backend("reference"):
        tilefuse.rope_append_kv(*exact_args, **options)
    assert_close(args[6], exact_args[6], plain)


def test_16_fp8_special_values(device):
    """NaN stays NaN, infinities and overflow saturate, ties go to even, subnormals are kept, -0 too."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e6, 464.0, 17.0, 19.0, 2**-10, 3 * 2**-10, -0.0])
    v = values.to(device)[None, None].expand(1, 1, 10)
    k = torch.zeros(1, 1, 8, device=device)
    caches = [torch.zeros(1, 2, 1, d, device=device).to(E4M3) for d in (8, 10)]
    index = torch.zeros(1, dtype=torch.int32, device=device)
    tilefuse.rope_append_kv(k, k, v, *tables(8, 1, device), index, *caches, index)
    stored = caches[1][0, 0, 0].float().cpu()
    expected = torch.tensor([float("nan"), 448, -448, 448, 448, 16, 20, 0, 2**-8, -0.0])
    torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
    assert stored[-1].signbit()
    assert (caches[1][0, 1].float() == 0).all()


def test_16_fused_rounding_is_within_one_code_of_two_roundings(device):
    args, options = case("plain", device, torch.bfloat16, E4M3)
    twice = tilefuse.rope(args[1], *args[3:6])
    tilefuse.rope_append_kv(*args, **options)
    codes = args[6].view(torch.uint8).int()
    for row, slot in zip(twice, args[8].tolist()):
        if slot >= 0:
            two = row.float().clamp(-448, 448).to(E4M3).view(torch.uint8).int()
            assert ((codes[slot // 16, slot % 16] - two).abs() <= 1).all()


@pytest.mark.parametrize(
    "slot, position, message",
    [(64, 0, r"slot_mapping must be below .* = 64, got 64"), (0, 64, r"positions must be in \[0, 64\), got 64")],
)
def test_8_hostile_indices(slot, position, message, device):
    args, options = case("plain", device)
    args[8][0], args[5][0] = slot, position
    before = [args[6].clone(), args[7].clone()]
    if device == "cpu":
        with pytest.raises(ValueError, match=f"tilefuse.rope_append_kv: {message}"):
            tilefuse.rope_append_kv(*args, **options)
    else:
        tilefuse.rope_append_kv(*args, **options)
        args[8][0] = -1 if slot == 64 else 0
        args[5].clamp_(0, 63)
        before = expected_caches([*args[:6], *before, args[8]], options)
    close(args[6], before[0])
    assert_bit_equal(args[7], before[1])


def test_gradients_are_refused():
    args, options = case("plain")
    args = list(args)
    for i, name in ((0, "q"), (1, "k"), (2, "v")):
        with pytest.raises(RuntimeError, match=f"tilefuse.rope_append_kv: has no gradient, but {name} requires grad"):
            leaves = [t.detach().requires_grad_() if j == i else t for j, t in enumerate(args)]
            tilefuse.rope_append_kv(*leaves, **options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({2: torch.zeros(4, 2, 64)}, ValueError, "v must be of k's shape but for the head dim"),
        ({2: torch.zeros(5, 2, 64).double()}, TypeError, "v must be of q's dtype"),
        ({8: torch.zeros(4, dtype=torch.int32)}, ValueError, r"slot_mapping must be \[5\]"),
        ({8: torch.zeros(5)}, TypeError, "slot_mapping must be .* int32 or int64"),
        ({6: torch.zeros(4, 16, 1, 64)}, ValueError, r"k_cache must be \[pages, page_size, 2, 64\]"),
        ({7: torch.zeros(4, 16, 128)}, ValueError, r"v_cache must be \[pages, page_size, 2, 64\]"),
        ({7: torch.zeros(3, 16, 2, 64)}, ValueError, "v_cache must be of k_cache's pages"),
        ({6: torch.zeros(4, 16, 2, 64, dtype=torch.int8)}, TypeError, "k_cache must be bfloat16 or"),
        ({7: torch.zeros(4, 16, 2, 64).half()}, TypeError, "v_cache must be of k_cache's dtype"),
        ({6: torch.zeros(4, 16, 2, 128).bfloat16()[..., ::2]}, ValueError, "k_cache must be a cache with a contiguous"),
        ({"k_scale": 2.0}, ValueError, "k_scale must be 1 unless the cache is float8_e4m3fn, got 2.0"),
        ({"v_scale": 0.0}, ValueError, "v_scale must be positive and finite, got 0.0"),
        ({"v_scale": float("nan")}, ValueError, "v_scale must be positive and finite"),
        ({5: torch.zeros(4, dtype=torch.int32)}, ValueError, r"positions must be \[5\]"),
        ({2: torch.zeros(5, 2, 64, device="meta")}, ValueError, "v must be on the device of q"),
        ({6: torch.zeros(4, 16, 2, 64, device="meta").bfloat16()}, ValueError, "k_cache must be on the device of q"),
        ({7: torch.zeros(4, 16, 2, 64, device="meta").bfloat16()}, ValueError, "v_cache must be on the device of q"),
        ({8: torch.zeros(5, dtype=torch.int32, device="meta")}, ValueError, "slot_mapping must be on the device of q"),
        ({7: torch.zeros(4, 16, 2, 64, dtype=torch.int8)}, TypeError, "v_cache must be bfloat16 or"),
        ({7: torch.zeros(4, 16, 2, 128).bfloat16()[..., ::2]}, ValueError, "v_cache must be a cache with a contiguous"),
        ({"k_scale": float("inf")}, ValueError, "k_scale must be positive and finite, got inf"),
    ],
)
def test_errors(change, error, message):
    args, options = case("plain")
    args, options = list(args), dict(options)
    for key, value in change.items():
        if isinstance(key, int):
            args[key] = value
        else:
            options[key] = value
    for call in (tilefuse.rope_append_kv, torch.ops.tilefuse.rope_append_kv):
        with pytest.raises(error, match=f"^tilefuse.rope_append_kv: {message}"):
            call(*args, **options)


@pytest.mark.parametrize("name", ["plain", "batched", "views"])
def test_17_opcheck(name):
    args, options = case(name)
    torch.library.opcheck(torch.ops.tilefuse.rope_append_kv.default, args, options)


def test_11_compile_fullgraph():
    args, options = case("plain")
    compiled_args = [t.clone() for t in args]
    out = torch.compile(tilefuse.rope_append_kv, fullgraph=True, backend="aot_eager")(*compiled_args, **options)
    assert_bit_equal(out, tilefuse.rope_append_kv(*args, **options))
    assert_bit_equal(compiled_args[6], args[6])
    assert_bit_equal(compiled_args[7], args[7])


def test_11_compile_without_recompiling():
    """For every number of tokens, with scales, which dynamic shapes turn into inputs of the graph."""
    args, _ = case("plain", cache_dtype=E4M3)
    counter, frames = CompileCounterWithBackend("aot_eager"), 0
    step = torch.compile(tilefuse.rope_append_kv, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 4, 3):
        q, k, v, cos, sin, positions, k_cache, v_cache, slots = args
        # copies: which of them are views is a matter of the graph
        q, k, v, positions, slots = (t[:tokens].clone() for t in (q, k, v, positions, slots))
        caches = [[k_cache.clone(), v_cache.clone()] for _ in range(2)]
        options = {"k_scale": 0.3, "v_scale": 2.0}
        out, expected = (
            f(q, k, v, cos, sin, positions, *c, slots, **options)
            for f, c in zip((step, tilefuse.rope_append_kv), caches)
        )
        assert_bit_equal(out, expected)
        for a, b in zip(*caches):
            assert_bit_equal(a, b)
        # Dynamo counts an empty frame beside the one graph; other lengths add none
        frames = frames or counter.frame_count
        assert counter.frame_count == frames <= 2


def test_caches_bump_their_version():
    args, options = case("plain")
    tilefuse.rope_append_kv(*args, **options)
    assert args[6]._version and args[7]._version and not args[0]._version


def test_9_slots_past_int32(device):
    """Pages 2**30 elements apart, an odd stride that fits int32: the third one starts past 2**31."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    storage = torch.empty(2**31 + 130, dtype=torch.bfloat16, device=device)
    caches = [storage[64 * i :].as_strided((3, 1, 1, 64), (2**30 + 1, 64, 64, 1)) for i in range(2)]
    k = normal(1, 1, 64, device=device)
    index = torch.full((1,), 2, dtype=torch.int32, device=device)
    storage[2**31 :].zero_()
    tilefuse.rope_append_kv(k, k, k, *tables(64, 4, device), index, *caches, index)
    assert_bit_equal(caches[0][2, 0], tilefuse.rope(k, *tables(64, 4, device), index)[0])
    assert_bit_equal(caches[1][2, 0], k[0])
