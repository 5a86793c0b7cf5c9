"""A module of tilefuse.nn against the Hugging Face module that it replaces, by the rule of tilefuse.testing.numeric."""

import copy

import pytest
import torch

from tilefuse.testing import assert_bit_equal
from tilefuse.testing.numeric import error_report


def randomize(module, scale=0.3):
    """Every parameter and buffer of a state dict drawn anew, norms around 1."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            tensor.copy_(1 + 0.1 * noise if "norm" in name else scale * noise)
    return module


def _run(module, run, x, grad):
    x = x.detach().clone().requires_grad_()
    out = run(module, x)
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, [x, *leaves.values()], grad.to(out.dtype))
    return {"out": out.detach(), "x": grads[0]} | dict(zip(leaves, grads[1:]))


def compare_with_hf(ours, theirs, x, run_theirs, *, dtype, run_ours=None):
    """State dicts both ways, then output and all gradients; the oracle is theirs in float64 on the rounded weights."""
    theirs = randomize(theirs.train()).to(dtype)
    ours = ours.to(dtype).train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert ours.state_dict()[name].shape == tensor.shape

    run_ours = run_ours or (lambda module, x: module(x))
    x = x.to(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = _run(ours, run_ours, x, grad)
    exact = _run(copy.deepcopy(theirs).double(), run_theirs, x.double(), grad)
    naive = _run(theirs, run_theirs, x, grad)
    assert got.keys() == exact.keys() == naive.keys()
    largest = max(float(g.abs().max()) for g in exact.values())
    for name in got:
        assert got[name].dtype == dtype, name
        if float(exact[name].abs().max()) < 1e-12 * largest:
            # a key's bias shifts all scores of a row alike: what there is of a gradient is rounding
            assert got[name].abs().max() < 8 * torch.finfo(dtype).eps * largest, name
            continue
        # sums of many terms are rounded at the magnitude of their partial sums
        tiny = 2**-20 * float(exact[name].abs().max()) if dtype == torch.float32 else None
        report = error_report(got[name], exact[name].double(), naive[name], tiny=tiny)
        # not the single rows: a chain of layers makes a row's error from few roundings (of scores, of one token's
        # gradient), where naive may be lucky; 64x64 tiles average over enough of them
        ratios = (report.max_ratio, report.rms_ratio, report.tile_ratio)
        assert max(ratios) <= 2, f"{name}: {report.message}"


def check_initialisation(make):
    """Same seed, same weights; the meta device; the round trip of a state dict; a useful repr."""
    one, two = make(), make()
    one.reset_parameters(torch.Generator().manual_seed(3))
    two.reset_parameters(torch.Generator().manual_seed(3))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert_bit_equal(a, b, name=name)
    torch.manual_seed(7)
    first = make()
    torch.manual_seed(7)
    for (name, a), b in zip(first.state_dict().items(), make().state_dict().values(), strict=True):
        assert_bit_equal(a, b, name=name)

    meta = make(device="meta")
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    meta.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(3))
    for (name, a), b in zip(one.state_dict().items(), meta.state_dict().values(), strict=True):
        assert_bit_equal(a, b, name=name)
    for (name, a), (other, b) in zip(one.named_buffers(), meta.named_buffers(), strict=True):
        assert name == other
        assert_bit_equal(a, b, name=name)

    two.reset_parameters(torch.Generator().manual_seed(4))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    two.load_state_dict(one.state_dict(), strict=True)
    for a, b in zip(one.state_dict().values(), two.state_dict().values()):
        assert_bit_equal(a, b)
    assert type(one).__name__ in repr(one) and one.extra_repr()
    copied = copy.deepcopy(one).to(torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} <= {torch.bfloat16, torch.float8_e4m3fn, torch.float32}
    return one


@pytest.fixture
def hf():
    """compare_with_hf, where transformers is installed."""
    pytest.importorskip("transformers")
    return compare_with_hf


@pytest.fixture
def initialisation():
    return check_initialisation
