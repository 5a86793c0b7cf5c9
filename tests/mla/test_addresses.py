"""Known bug 9 for the ops without a cache: rows past 2^31 elements.

(``mla_append_kv``, ``mla_decode`` and ``mla_gather_kv`` have theirs in their own files.)
"""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs.mla.common import normal, tables

# a stride that fits int32: a product of two int32 would wrap at the third row
GAP = 2**30 + 64
# interpreter on the CPU, compiled on a GPU
WHERE = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("auto", "cpu"), id="auto"),
    pytest.param(("triton", "cpu"), id="interpreter"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]


def far(t):
    """The same three rows, GAP elements apart; what lies between is never touched."""
    assert t.shape[0] == 3
    memory = t.new_empty(2 * GAP + t[0].numel())
    view = memory.as_strided(t.shape, (GAP, *t[0].contiguous().stride()))
    view.copy_(t)
    return view


def calls(device):
    """op -> function of its row tensors, and those."""

    def x(*shape, seed=0):
        return normal(*shape, device=device, dtype=torch.bfloat16, seed=seed)

    cos, sin = tables(16, 4, device)
    weight, w_uk, w_ukv = x(128), x(2, 32, 128), x(2 * 64, 128)
    bounds = torch.tensor([0, 3], device=device, dtype=torch.int32)
    lse = normal(2, 3, device=device, dtype=torch.float32, seed=5)
    return {
        "mla_compress_kv": (lambda a: (tilefuse.mla_compress_kv(a, weight, cos, sin),), [x(3, 144)]),
        "mla_absorb_query": (lambda q: (tilefuse.mla_absorb_query(q, w_uk, cos, sin),), [x(3, 2, 48)]),
        "mla_expand_kv": (
            lambda a: tilefuse.mla_expand_kv(a, w_ukv, kv_lora_rank=128, nope_dim=32, v_dim=32),
            [x(3, 144)],
        ),
        "mla_attention": (
            lambda q, k, v: tilefuse.mla_attention(q, k, v, bounds, bounds, softmax_scale=0.1),
            [x(3, 2, 48), x(3, 2, 48, seed=1), x(3, 2, 32, seed=2)],
        ),
        "merge_attention": (
            lambda a, b: tilefuse.merge_attention(a, lse, b, lse * 0.5),
            [x(3, 2, 32), x(3, 2, 32, seed=1)],
        ),
    }


@pytest.mark.parametrize("place", WHERE)
@pytest.mark.parametrize("name", calls("cpu"))
def test_9_rows_past_2_31_elements(name, place):
    """Outputs and gradients, each row tensor in turn."""
    backend, device = place
    function, rows = calls(device)[name]

    def run(rows):
        leaves = [t.detach().requires_grad_() for t in rows]
        out = function(*leaves)
        grads = [normal(*o.shape, device=device, dtype=torch.float32, seed=i).to(o.dtype) for i, o in enumerate(out)]
        return [t.detach() for t in (*out, *torch.autograd.grad(out, leaves, grads))]

    with tilefuse.backend(backend):
        expected = run(rows)
        for i in range(len(rows)):
            for a, b in zip(run([far(t) if j == i else t for j, t in enumerate(rows)]), expected):
                assert_bit_equal(a.contiguous(), b.contiguous())
