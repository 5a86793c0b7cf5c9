"""Sizes stay symbolic: one compiled graph, and one exported program, for every batch and length."""

import functools
import shutil

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tilefuse
from tilefuse import library
from tilefuse.testing import assert_bit_equal

OPS = tilefuse.ops()
# (batch, length). No two sizes of the first call are equal by chance, and none is 1 or becomes 1 (such as blocks of 128
# tokens): torch takes the same number for the same symbol, and 1 for a constant
SIZES = ((3, 110), (2, 100), (6, 24), (7, 130))
HEADS, DIM = 4, 16
# a table of as many rows as any position
TABLE = 256


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def tables(dim=DIM):
    return tilefuse.rope_tables(dim, TABLE)


def integers(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high), dtype=torch.int32)


def qkv(b, s):
    return draw(b, s, HEADS, DIM), draw(b, s, 2, DIM), draw(b, s, 2, DIM)


def codes(rows, columns, block=(1, 128)):
    return tilefuse.fp8_quantize(draw(rows, columns), block=block)


def integer_codes(rows, columns):
    return integers(255, rows, columns).to(torch.int8)


def pages(b, s):
    """(pages of 16 slots in all, table [b, pages of one sequence], lengths)."""
    each = -(-s // 16)
    table = torch.arange(b * each, dtype=torch.int32).view(b, each)
    return b * each, table, torch.full((b,), s, dtype=torch.int32)


def slots(b, s):
    return torch.arange(b * s, dtype=torch.int64)


def bounds(b, s):
    return torch.arange(b + 1, dtype=torch.int32) * s


def routed(b, s, experts=6):
    ids = torch.stack([integers(experts, b * s), (integers(experts, b * s) + 1) % experts], 1)
    return draw(b * s, 2).softmax(1), ids


def plan(b, s):
    weights, ids = routed(b, s)
    return weights, *tilefuse.moe_plan(ids, 6)


def block_lists(b, s):
    pattern = tilefuse.block_pattern("window", s, s, block_size=16, window=(16, 0))
    return pattern.row_offsets, pattern.col_index


def fp8_experts(b, s):
    up, up_scale = tilefuse.fp8_quantize(draw(6 * 256, 128), block=(128, 128))
    down, down_scale = tilefuse.fp8_quantize(draw(6 * 128, 128), block=(128, 128))
    return up.view(6, 256, 128), up_scale.view(6, 2, 1), down.view(6, 128, 128), down_scale.view(6, 1, 1), *routed(b, s)


def grouped_codes(b, s):
    weight, scale = tilefuse.fp8_quantize(draw(6 * 128, 128), block=(128, 128))
    return weight.view(6, 128, 128), scale.view(6, 1, 1), plan(b, s)[3]


# op -> (tensors of a batch b and a length s, options)
CASES = {
    "add_rms_norm": (lambda b, s: (draw(b, s, 48), draw(b, s, 48), draw(48)), {}),
    "block_sparse_attention": (lambda b, s: (*qkv(b, s), *block_lists(b, s)), {"block_size": 16}),
    "cross_entropy": (
        lambda b, s: (draw(b, s, 60), integers(60, b, s), draw(b, s), draw(60)),
        {"label_smoothing": 0.1},
    ),
    "distillation": (lambda b, s: (draw(b, s, 50), draw(b, s, 60), integers(50, b, s)), {"temperature": 2.0}),
    "fake_quantize": (lambda b, s: (draw(b, s, 160), draw(b, s, 5).abs() + 0.1), {"group_size": 32}),
    "fp8_dequantize": (lambda b, s: codes(b * s, 256), {}),
    "fp8_grouped_matmul": (lambda b, s: (*codes(2 * b * s, 128), *grouped_codes(b, s)), {}),
    "fp8_linear": (lambda b, s: (draw(b, s, 128), draw(64, 128)), {}),
    "fp8_matmul": (lambda b, s: (*codes(b * s, 128), *codes(64, 128, (128, 128))), {}),
    "fp8_quantize": (lambda b, s: (draw(b, s, 256),), {}),
    "fp8_quantize_dual": (lambda b, s: (draw(b * s, 256),), {}),
    "gated_activation": (lambda b, s: (draw(b, s, 96),), {}),
    "global_attention": (lambda b, s: (*qkv(b, s), integers(s, b, 2)), {"window": (5, 5)}),
    "grouped_matmul": (lambda b, s: (draw(2 * b * s, 16), draw(6, 24, 16), plan(b, s)[3]), {}),
    "int8_matmul": (lambda b, s: (integer_codes(b * s, 40), draw(b * s), integer_codes(24, 40), draw(24)), {}),
    "int_dequantize": (
        lambda b, s: tilefuse.int_quantize(draw(b, s, 160), bits=4, group_size=32),
        {"bits": 4, "group_size": 32},
    ),
    "int_quantize": (lambda b, s: (draw(b, s, 96),), {"bits": 6, "group_size": 32, "symmetric": False}),
    "merge_attention": (lambda b, s: (draw(b, s, HEADS, DIM), draw(b, HEADS, s)) * 2, {}),
    "linear_cross_entropy": (
        lambda b, s: (draw(b, s, 16), draw(60, 16), integers(60, b, s), draw(60), draw(b, s)),
        {"label_smoothing": 0.1},
    ),
    "linear_distillation": (
        lambda b, s: (draw(b, s, 16), draw(60, 16), draw(b, s, 24), draw(70, 24), integers(60, b, s)),
        {"beta": 0.3},
    ),
    "linear_logprobs": (lambda b, s: (draw(b, s, 16), draw(60, 16), integers(60, b, s)), {}),
    "linear_topk_distillation": (
        lambda b, s: (draw(b, s, 16), draw(60, 16), draw(b, s, 4), draw(b, s, 60).topk(4).indices, integers(60, b, s)),
        {},
    ),
    "lowbit_matmul": (
        lambda b, s: (draw(b, s, 40), *tilefuse.int_quantize(draw(24, 40), bits=4, group_size=32), integers(40, 40)),
        {"group_size": 32},
    ),
    "logprobs": (lambda b, s: (draw(b, s, 60), integers(60, b, s)), {}),
    "mla_absorb_query": (
        lambda b, s: (draw(b * s, HEADS, 24), draw(HEADS, 16, 32), *tables(8), integers(s, b * s)),
        {},
    ),
    "mla_append_kv": (
        lambda b, s: (
            draw(b * s, 40),
            draw(32),
            *tables(8),
            integers(s, b * s),
            draw(pages(b, s)[0], 16, 40),
            slots(b, s),
        ),
        {},
    ),
    "mla_attention": (lambda b, s: (draw(b, s, HEADS, 24),) * 2 + (draw(b, s, HEADS, 16),), {"softmax_scale": 0.2}),
    "mla_compress_kv": (lambda b, s: (draw(b * s, 40), draw(32), *tables(8), integers(s, b * s)), {}),
    "mla_decode": (
        lambda b, s: (draw(b, 1, HEADS, 40), draw(pages(b, s)[0], 16, 40), *pages(b, s)[1:]),
        {"softmax_scale": 0.2, "kv_lora_rank": 32},
    ),
    "mla_sparse_decode": (
        lambda b, s: (draw(b, 2, HEADS, 40), draw(pages(b, s)[0], 16, 40), integers(b * s, b, 2, s)),
        {"softmax_scale": 0.2, "kv_lora_rank": 32},
    ),
    "mla_expand_kv": (
        lambda b, s: (draw(b * s, 40), draw(HEADS * 32, 32)),
        {"kv_lora_rank": 32, "nope_dim": 16, "v_dim": 16},
    ),
    "mla_gather_kv": (
        lambda b, s: (draw(pages(b, s)[0], 16, 40), pages(b, s)[1], bounds(b, s)),
        {"total_tokens": 40, "kv_lora_rank": 32, "out_dtype": torch.float32},
    ),
    "moe_apply_capacity": (lambda b, s: routed(b, s)[::-1], {"num_experts": 6, "capacity": 5}),
    "moe_balance_loss": (lambda b, s: (draw(b * s, 6), routed(b, s)[1]), {}),
    "moe_combine": (lambda b, s: (draw(2 * b * s, 16), plan(b, s)[2], routed(b, s)[0]), {}),
    "moe_experts": (lambda b, s: (draw(b * s, 16), draw(6, 48, 16), draw(6, 16, 24), *routed(b, s)), {}),
    "moe_experts_fp8": (lambda b, s: (draw(b * s, 128), *fp8_experts(b, s)), {}),
    "moe_plan": (lambda b, s: (routed(b, s)[1],), {"num_experts": 6}),
    "moe_route": (lambda b, s: (draw(b * s, 6),), {"top_k": 2}),
    "moe_update_bias": (lambda b, s: (draw(b * s), draw(b * s)), {}),
    "moe_z_loss": (lambda b, s: (draw(b * s, 6),), {}),
    "paged_attention": (
        lambda b, s: (draw(b, 1, HEADS, DIM), *(draw(pages(b, s)[0], 16, 2, DIM),) * 2, *pages(b, s)[1:]),
        {},
    ),
    "policy_loss": (
        lambda b, s: (draw(b, s), draw(b), draw(b, s), draw(b, s), integers(2, b, s).bool()),
        {"kl_beta": 0.1, "reduction": "sequence"},
    ),
    "preference_loss": (lambda b, s: (draw(b * s), draw(b * s), draw(b * s), draw(b * s)), {}),
    "qk_norm_rope": (lambda b, s: (*qkv(b, s)[:2], draw(DIM), draw(DIM), *tables()), {}),
    "rms_norm": (lambda b, s: (draw(b, s, 48), draw(48)), {}),
    "rms_norm_fp8_linear": (lambda b, s: (draw(b, s, 128), draw(128), draw(64, 128)), {}),
    "rms_norm_gated": (lambda b, s: (draw(b, s, 48), draw(b, s, 48), draw(48)), {}),
    "rms_norm_quantize": (lambda b, s: (draw(b, s, 256), draw(256)), {}),
    "rope": (lambda b, s: (draw(b, s, HEADS, DIM), *tables()), {}),
    "rope_": (lambda b, s: (draw(b, s, HEADS, DIM), *tables()), {}),
    "rope_append_kv": (
        lambda b, s: (
            *(draw(b * s, h, DIM) for h in (HEADS, 2, 2)),
            *tables(),
            integers(s, b * s),
            *(draw(pages(b, s)[0], 16, 2, DIM),) * 2,
            slots(b, s),
        ),
        {},
    ),
    "rope_qk": (lambda b, s: (*qkv(b, s)[:2], *tables()), {}),
    "rope_qk_": (lambda b, s: (*qkv(b, s)[:2], *tables()), {}),
    "sequence_logp": (lambda b, s: (draw(b * s), integers(s, b * s), bounds(b, s)), {"average": True}),
    "silu_mul_fp8_linear": (lambda b, s: (draw(b, s, 256), draw(64, 128)), {}),
    "silu_mul_quantize": (lambda b, s: (draw(b, s, 256),), {}),
    "t5_distance_bias": (lambda b, s: (draw(32, HEADS),), {"length": 50}),
    "window_attention": (lambda b, s: qkv(b, s), {"window": (9, 0)}),
}
each_op = pytest.mark.parametrize("name", sorted(CASES))


def test_every_op_has_a_case():
    assert set(CASES) == set(OPS)


def call_of(name):
    """(function of the tensors alone, the tensors of a size)."""
    make, options = CASES[name]
    return functools.partial(OPS[name].function, **options), lambda size: [t.clone() for t in make(*size)]


def assert_same(name, function, other, size):
    """Two functions agree on their outputs and on what they write."""
    _, tensors = call_of(name)
    found = []
    for run in (function, other):
        arguments = tensors(size)
        found.append([t for t in tree_leaves((run(*arguments), arguments)) if isinstance(t, Tensor)])
    for a, b in zip(*found, strict=True):
        assert_bit_equal(a, b, name=f"{name} {size}")


@each_op
def test_one_graph_for_all_sizes(name):
    function, _ = call_of(name)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: function(*tensors), dynamic=True, fullgraph=True, backend=count)
    for size in SIZES:
        assert_same(name, compiled, function, size)
    assert len(graphs) == 1


@each_op
def test_one_exported_program_for_all_sizes(name):
    function, tensors = call_of(name)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    first, *others = (tensors(size) for size in SIZES)
    # what is the same for all sizes is a constant of the model
    dims = tuple(
        {d: torch.export.Dim.DYNAMIC for d in range(x.ndim) if any(y.shape[d] != x.shape[d] for y in same)}
        for x, *same in zip(first, *others)
    )
    exported = torch.export.export(Module(), tuple(first), dynamic_shapes=(dims,)).module()
    for size in SIZES:
        assert_same(name, exported, function, size)


@pytest.mark.parametrize("name", sorted(library.kernels()))
def test_no_list_of_a_kernel_may_be_empty(name):
    """AOTInductor passes None for an empty ``int[]``: such an argument must be optional."""
    kinds = {a.name: str(a.type) for a in torch._C.parse_schema(library.kernels()[name].schema).arguments}
    assert not [argument for argument, kind in kinds.items() if kind.startswith("List")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
@pytest.mark.parametrize("name", ["rope", "rope_qk", "window_attention"])
def test_an_aot_inductor_package_runs(name, tmp_path):
    function, tensors = call_of(name)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    dims = tuple({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=TABLE)} for _ in tensors(SIZES[0]))
    if name != "window_attention":
        # the tables
        dims = (*dims[:-2], None, None)
    exported = torch.export.export(Module(), tuple(tensors(SIZES[0])), dynamic_shapes=(dims,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "package.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        assert_same(name, package, function, size)
