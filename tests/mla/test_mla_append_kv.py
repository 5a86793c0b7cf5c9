"""``mla_append_kv`` and the bytes of the cache. Numbers in names: docs/known-bugs.md."""

import struct

import pytest
import torch

import tilefuse
from tilefuse.ops.mla.layout import RowLayout, fp8_parts, row_layout
from tilefuse.testing import assert_bit_equal, emulation
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.mla.common import normal, tables
from tilefuse.testing.inputs.mla.mla_append_kv import cases

case = by_name(cases)
KERNEL = "mla_append_kv_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def written(args, options):
    """The whole cache after the call, bytes, and the base that it is a view of."""
    *rest, cache, slots = args
    copy = cache.clone(memory_format=torch.preserve_format)
    if cache._base is not None:
        base = cache._base.clone()
        copy = base.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    tilefuse.mla_append_kv(*rest, copy, slots, **options)
    return copy if cache._base is None else base


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_7_same_bytes_as_the_reference(name, dtype, where):
    """Also around and between the rows."""
    args, options = case(name, where, dtype)
    got = written(args, options)
    with tilefuse.backend("reference"):
        expected = written(args, options)
    assert_bit_equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_compress(name):
    """The bf16 layout stores what mla_compress_kv returns; skipped and other rows keep their bytes."""
    (kv_a, weight, cos, sin, positions, cache, slots), options = case(name, dtype=torch.bfloat16)
    if options.pop("layout") == "fp8" or cache.dtype != kv_a.dtype:
        return
    got = written((kv_a, weight, cos, sin, positions, cache, slots), options)
    if cache._base is not None:
        got = got.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    rows = tilefuse.mla_compress_kv(kv_a, weight, cos, sin, positions, **options)
    expected = cache.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // cache.shape[1], slot % cache.shape[1]] = rows[token]
    assert_bit_equal(got, expected)


def test_7_bytes_of_an_fp8_row(where):
    """Every byte of one 656-byte row, from the documentation of the layout."""
    latent = torch.zeros(1, 576)
    generator = torch.Generator().manual_seed(3)
    latent[0, :512] = torch.randn(512, generator=generator)
    latent[0, 512:] = torch.randn(64, generator=generator) * 1e3  # outliers stay bfloat16
    # the weight makes the norm's result arbitrary: a block of zeros, one whose amax is exactly 448, tiny and large ones
    weight = torch.ones(512)
    weight[:128] = 0
    with tilefuse.backend("reference"):
        cos, sin = tables(64, 1)
        normed = tilefuse.mla_compress_kv(latent, weight, cos, sin)[0, :512]
        weight[128:256] *= 448 / normed[128:256].abs().max()
        weight[256:384] *= 1e-6
        weight[384:] *= 3e4
        normed = tilefuse.mla_compress_kv(latent, weight, cos, sin)[0, :512].double()
    cache = torch.full((1, 2, 656), 0xAB, dtype=torch.uint8, device=where)
    position = torch.zeros(1, dtype=torch.int64, device=where)
    tilefuse.mla_append_kv(
        latent.to(where), weight.to(where), cos.to(where), sin.to(where), position, cache, position + 1, layout="fp8"
    )
    assert (cache[0, 0] == 0xAB).all()
    row = bytes(cache[0, 1].tolist())
    scales = struct.unpack("<4f", row[512:528])
    for group in range(4):
        values = normed[128 * group : 128 * group + 128]
        amax = float(values.abs().max())
        scale = 1.0 if amax == 0 else 2.0 ** int(torch.tensor(amax / 448).log2().ceil())
        assert scales[group] == scale
        codes = cache[0, 1, 128 * group : 128 * group + 128].cpu().view(torch.float8_e4m3fn).double()
        step = torch.maximum(2.0 ** (codes.abs().clamp(min=2**-6).log2().floor() - 3), torch.tensor(2.0**-9))
        assert ((codes * scale - values).abs() <= step * scale / 2 * 1.0001).all()
    rotated = torch.frombuffer(bytearray(row[528:]), dtype=torch.bfloat16)
    assert_bit_equal(rotated, latent[0, 512:].bfloat16())


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (96, 0)])
def test_many_rows_have_the_bytes_of_few(rank, rope):
    """Above 2 MiB of whole cache lines the CPU kernel writes past the caches."""
    tokens = 2**21 // (2 * (rank + rope)) + 5
    cos, sin = tables(rope, tokens)
    kv_a = normal(tokens, rank + rope, device="cpu", dtype=torch.bfloat16, seed=1)
    weight = normal(rank, device="cpu", dtype=torch.bfloat16, seed=2)
    positions = torch.arange(tokens)
    slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(3))
    slots[7] = -1
    many, few = torch.zeros(2, -(-tokens // 16), 16, rank + rope, dtype=torch.bfloat16).unbind()
    tilefuse.mla_append_kv(kv_a, weight, cos, sin, positions, many, slots)
    for part in torch.arange(tokens).chunk(5):
        tilefuse.mla_append_kv(kv_a[part], weight, cos, sin, positions[part], few, slots[part])
    assert_bit_equal(many, few)


def test_7_layout_in_one_place():
    row = row_layout("fp8", 512, 656)
    assert (row.rope_dim, row.scale_offset, row.rope_offset, row.width) == (64, 512, 528, 656)
    assert row_layout("bf16", 512, 576) == RowLayout("bf16", 512, 64)
    assert row_layout("fp8", 128, 132).rope_dim == 0
    for bad in (("fp8", 100, 656), ("fp8", 512, 500), ("fp8", 512, 657), ("bf16", 512, 500), ("bf16", 0, 64)):
        assert row_layout(*bad) is None
    parts = fp8_parts(torch.zeros(3, 2, 656, dtype=torch.uint8), row)
    assert [tuple(p.shape) for p in parts] == [(3, 2, 512), (3, 2, 4), (3, 2, 64)]


def test_8_nothing_but_listed_slots_is_written(where):
    (kv_a, weight, cos, sin, positions, cache, slots), options = case("deepseek_fp8", where, torch.bfloat16)
    slots[:] = -1
    positions[:] = 2**30  # belongs to skipped tokens only
    before = cache.clone()
    tilefuse.mla_append_kv(kv_a, weight, cos, sin, positions, cache, slots, **options)
    assert_bit_equal(cache, before)
    assert tilefuse.mla_append_kv(kv_a, weight, cos, sin, positions, cache, slots[:0], **options) is None


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_9_pages_past_2_31_elements(layout, where):
    """Two pages more than 2^31 elements apart: untouched memory between them is never committed."""
    kv_a = normal(2, 576, device=where, dtype=torch.bfloat16)
    width, dtype = (656, torch.uint8) if layout == "fp8" else (576, torch.bfloat16)
    far = 2**31 // 16 * 16 + 1600
    cache = torch.empty(far + width, dtype=dtype, device=where).as_strided((2, 1, width), (far, width, 1))
    small = torch.zeros(2, 1, width, dtype=dtype, device=where)
    slots = torch.tensor([1, 0], device=where)
    for target in (cache, small):
        cos, sin = tables(64, 4, where)
        tilefuse.mla_append_kv(kv_a, torch.ones(512, device=where), cos, sin, slots, target, slots, layout=layout)
    assert_bit_equal(cache.clone(), small)


def test_bad_values_raise_before_anything_is_written(where):
    if where != "cpu":
        pytest.skip("a GPU skips such slots and clamps such positions: the check would synchronise")
    (kv_a, weight, cos, sin, positions, cache, slots), options = case("deepseek_bf16", where)
    before = cache.clone()
    slots[3] = cache.shape[0] * cache.shape[1]
    with pytest.raises(ValueError, match=r"tilefuse.mla_append_kv: slot_mapping must be less than 192, got 192"):
        tilefuse.mla_append_kv(kv_a, weight, cos, sin, positions, cache, slots, **options)
    slots[3], positions[3] = 5, 32
    with pytest.raises(ValueError, match=r"tilefuse.mla_append_kv: positions must be in \[0, 32\), got 32"):
        tilefuse.mla_append_kv(kv_a, weight, cos, sin, positions, cache, slots, **options)
    assert_bit_equal(cache.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cuda_kernel_under_emulation(name, dtype):
    args, options = case(name, dtype=dtype)
    kv_a, weight, cos, sin, positions, cache, slots = args
    is_fp8 = options["layout"] == "fp8"
    if slots.numel() == 0 or (not is_fp8 and cache.dtype != dtype) or weight.dtype not in (dtype, torch.float32):
        return
    module = emulation.load_or_skip("mla", "mla_append_kv")
    base = cache if cache._base is None else cache._base

    def run():
        memory = base.clone()
        view = memory.as_strided(cache.shape, cache.stride(), cache.storage_offset())
        itemsize = cache.element_size()
        tensors = (kv_a, weight, cos, sin, positions, slots, view)
        sizes = (
            kv_a.stride(0),
            cos.stride(0),
            sin.stride(0),
            view.stride(0) * itemsize,
            view.stride(1) * itemsize,
            view.shape[0],
            view.shape[1],
            cos.shape[0],
            slots.shape[0],
            weight.shape[0],
            (kv_a.shape[1] - weight.shape[0]) // 2,
        )
        module.append(
            str(dtype).removeprefix("torch."),
            weight.dtype == dtype,
            is_fp8,
            [t.data_ptr() for t in tensors],
            list(sizes),
            options.get("eps", 1e-6),
            options.get("interleaved", True),
            positions.dtype == torch.int64,
            slots.dtype == torch.int64,
        )
        return memory.view(torch.uint8)

    got = emulation.in_every_order(module, run) if name == "deepseek_fp8" else run()
    with tilefuse.backend("reference"):
        assert_bit_equal(got, written(args, options).view(torch.uint8))


def change(**values):
    return lambda a: a.update(values)


def cache_of(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


ERRORS = {
    "layout": (change(layout="int4"), ValueError, "layout must be one of bf16, fp8, got 'int4'"),
    "cache_rank": (change(cache=cache_of(4, 576)), ValueError, r"cache must be \[pages, page_size, width\]"),
    "cache_width": (change(cache=cache_of(2, 4, 580)), ValueError, "cache must be wide enough for R = 512 and r = 64"),
    "cache_narrow": (change(cache=cache_of(2, 4, 500)), ValueError, r"cache must be \[pages, page_size, R \+ r\] with"),
    "cache_dtype": (change(cache=cache_of(2, 4, 576, dtype=torch.uint8)), TypeError, "cache must be float32 or"),
    "cache_device": (change(cache=cache_of(2, 4, 576).to("meta")), ValueError, "cache must be on the device of kv_a"),
    "cache_strides": (
        change(cache=cache_of(2, 576, 4).transpose(1, 2)),
        ValueError,
        "cache must be contiguous in its last dim",
    ),
    "fp8_dtype": (change(cache=cache_of(2, 4, 656), layout="fp8"), TypeError, "cache must be uint8"),
    "fp8_width": (
        change(cache=cache_of(2, 4, 655, dtype=torch.uint8), layout="fp8"),
        ValueError,
        r"cache must be \[pages, page_size, R \+ R / 32 \+ 2 r bytes\] with R = 512",
    ),
    "fp8_rank": (
        change(weight=torch.ones(500), cache=cache_of(2, 4, 656, dtype=torch.uint8), layout="fp8"),
        ValueError,
        "kv_lora_rank must be a multiple of 128 for layout fp8, got 500",
    ),
    "fp8_alignment": (
        change(cache=cache_of(2, 4, 658, dtype=torch.uint8)[..., :656], layout="fp8"),
        ValueError,
        "cache must be made of rows that start at multiples of 4 bytes",
    ),
    "slots_long": (change(slot_mapping=torch.zeros(6).long()), ValueError, r"slot_mapping must be \[5\] int32"),
    "slots_rank": (change(slot_mapping=torch.zeros(5, 1).long()), ValueError, r"slot_mapping must be \[5\] int32"),
    "slots_dtype": (change(slot_mapping=torch.zeros(5)), TypeError, r"slot_mapping must be \[5\] int32 or int64"),
    "positions": (change(positions=torch.zeros(4).long()), ValueError, r"positions must be \[5\] int32"),
    "odd_rope": (
        change(weight=torch.ones(511), cache=cache_of(2, 4, 576)),
        ValueError,
        "kv_a must be of an even RoPE width",
    ),
    "eps": (change(eps=-1.0), ValueError, "eps must be positive, got -1.0"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", [tilefuse.mla_append_kv, torch.ops.tilefuse.mla_append_kv], ids=["function", "op"])
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    cos, sin = tables(64, 8)
    index = torch.arange(5)
    arguments = {
        "kv_a": torch.zeros(5, 576),
        "weight": torch.ones(512),
        "cos": cos,
        "sin": sin,
        "positions": index,
        "cache": cache_of(2, 4, 576),
        "slot_mapping": index,
    }
    edit(arguments)
    with pytest.raises(error, match=f"^tilefuse.mla_append_kv: {message}"):
        call(**arguments)


def test_no_gradient():
    (kv_a, weight, *rest), options = case("deepseek_bf16")
    with pytest.raises(RuntimeError, match="no backward, but kv_a requires grad"):
        tilefuse.mla_append_kv(kv_a.requires_grad_(), weight, *rest, **options)
    with torch.no_grad():
        tilefuse.mla_append_kv(kv_a, weight, *rest, **options)


@pytest.mark.parametrize("name", ["deepseek_bf16", "deepseek_fp8", "odd_widths_bf16"])
def test_19_opcheck(name):
    args, options = case(name)
    cache = args[5].zero_()
    rest = (options.get("eps", 1e-6), options.get("interleaved", True), options["layout"])
    torch.library.opcheck(torch.ops.tilefuse.mla_append_kv_fwd.default, (*args[:5], cache, args[6], *rest))
    torch.library.opcheck(torch.ops.tilefuse.mla_append_kv.default, (*args[:5], cache, args[6]), options)


def test_19_compile_fullgraph():
    args, options = case("deepseek_fp8", dtype=torch.bfloat16)
    expected = written(args, options)
    step = torch.compile(
        lambda *a: tilefuse.mla_append_kv(*a, **options), fullgraph=True, backend="aot_eager", dynamic=True
    )
    cache = args[5].clone()
    step(*args[:5], cache, args[6])
    assert_bit_equal(cache, expected)
