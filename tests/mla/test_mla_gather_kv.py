"""``mla_gather_kv``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.mla.mla_gather_kv import cases

case = by_name(cases)
KERNEL = "mla_gather_kv_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]


def oracle(cache, table, bounds, *, total_tokens, kv_lora_rank, layout, out_dtype):
    """Row by row, byte by byte."""
    rows = []
    rope = cache.shape[2] - kv_lora_rank
    if layout == "fp8":
        rope = (cache.shape[2] - kv_lora_rank - kv_lora_rank // 32) // 2
    for b in range(table.shape[0]):
        for key in range(int(bounds[b + 1] - bounds[b])):
            row = cache[int(table[b, key // cache.shape[1]]), key % cache.shape[1]].cpu()
            if layout == "fp8":
                codes = row[:kv_lora_rank].view(torch.float8_e4m3fn).float()
                scales = row[kv_lora_rank : kv_lora_rank + kv_lora_rank // 32].clone().view(torch.float32)
                rotated = row[kv_lora_rank + kv_lora_rank // 32 :].clone()
                rotated = rotated.view(torch.bfloat16) if rope else row[:0]
                values = (codes * scales.repeat_interleave(128)).to(out_dtype)
                row = torch.cat((values, rotated.to(out_dtype)))
            rows.append(row.to(out_dtype))
    rows += [torch.zeros(kv_lora_rank + rope, dtype=out_dtype)] * (total_tokens - len(rows))
    return torch.stack(rows) if rows else torch.zeros(0, kv_lora_rank + rope, dtype=out_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_3_same_bits_as_the_oracle(name, dtype, where):
    """Unused rows are NaN, table tails wild; rows past the last sequence are zero."""
    args, options = case(name, where, dtype)
    with poisoned():
        out = tilefuse.mla_gather_kv(*args, **options)
    assert_bit_equal(out.cpu(), oracle(*args, **options))


def test_7_arbitrary_scales_are_read(where):
    args, options = case("page5_fp8", where)
    scales = args[0][..., 256:264].contiguous().view(torch.float32)
    args[0][..., 256:264] = (scales * 1.2345).view(torch.uint8)
    assert_bit_equal(tilefuse.mla_gather_kv(*args, **options).cpu(), oracle(*args, **options))


@pytest.mark.parametrize("name", ["page5_bf16", "page5_fp8"])
def test_9_pages_past_2_31_elements(name, where):
    (cache, table, bounds), options = case(name, where, torch.bfloat16)
    page_size, width = cache.shape[1:]
    # a stride that fits int32: a product of two int32 would wrap at the third page
    far = 2**30 + 4096
    memory = torch.empty(2 * far + page_size * width, dtype=cache.dtype, device=where)
    wide = memory.as_strided((3, page_size, width), (far, width, 1))
    wide.copy_(cache[table[0, :3].long()])
    moved = torch.tensor([[0, 1, 2]], device=where, dtype=table.dtype)
    one = torch.tensor([0, 3 * page_size], device=where, dtype=bounds.dtype)
    options["total_tokens"] = 3 * page_size
    expected = tilefuse.mla_gather_kv(cache, table[:1], one, **options)
    assert_bit_equal(tilefuse.mla_gather_kv(wide, moved, one, **options), expected)


def test_out_of_the_pool_is_a_zero_row(where):
    (cache, table, bounds), options = case("ragged_bf16", where)
    expected = tilefuse.mla_gather_kv(cache, table, bounds, **options)
    table[4, 1] = -3
    out = tilefuse.mla_gather_kv(cache, table, bounds, **options)
    first = int(bounds[4])
    assert (out[first + 64 : first + 70] == 0).all()
    assert_bit_equal(out[: first + 64], expected[: first + 64])


def test_fewer_rows_than_tokens(where):
    (cache, table, bounds), options = case("ragged_bf16", where)
    expected = tilefuse.mla_gather_kv(cache, table, bounds, **options)
    out = tilefuse.mla_gather_kv(cache, table, bounds, **options | {"total_tokens": 20})
    assert_bit_equal(out, expected[:20])


ERRORS = {
    "table": ({"block_table": torch.zeros(4).int()}, ValueError, r"block_table must be \[B, max_pages\]"),
    "table_dtype": ({"block_table": torch.zeros(2, 4)}, TypeError, r"block_table must be \[2, 4\] int32 or int64"),
    "bounds": ({"cu_seqlens": torch.zeros(2).int()}, ValueError, r"cu_seqlens must be \[3\] int32 or int64"),
    "total": ({"total_tokens": -1}, ValueError, "total_tokens must be >= 0, got -1"),
    "out_dtype": ({"out_dtype": torch.int32}, TypeError, "out_dtype must be a floating dtype"),
    "rank": ({"kv_lora_rank": 600}, ValueError, r"cache must be \[pages, page_size, R \+ r\] with R = 600"),
    "layout": ({"layout": "x"}, ValueError, "layout must be one of bf16, fp8"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", [tilefuse.mla_gather_kv, torch.ops.tilefuse.mla_gather_kv], ids=["function", "op"])
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    arguments = {
        "cache": torch.zeros(2, 4, 576),
        "block_table": torch.zeros(2, 4).int(),
        "cu_seqlens": torch.zeros(3).int(),
        "total_tokens": 3,
    }
    with pytest.raises(error, match=f"^tilefuse.mla_gather_kv: {message}"):
        call(**arguments | edit)


def test_19_opcheck_and_compile():
    args, options = case("page5_bf16")
    torch.library.opcheck(
        torch.ops.tilefuse.mla_gather_kv_fwd.default, (*args, options["total_tokens"], 256, "bf16", torch.float32)
    )
    step = torch.compile(lambda *a: tilefuse.mla_gather_kv(*a, **options), fullgraph=True, backend="aot_eager")
    assert_bit_equal(step(*args), tilefuse.mla_gather_kv(*args, **options))
