"""Comparison with a formula: outputs, gradients and a second run."""

import functools

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.mla.common import normal


def _on_cpu(args, dtype):
    return tuple(a if a is None else a.cpu().to(dtype) if a.is_floating_point() else a.cpu() for a in args)


def _all_close(got, exact, naive, dtype):
    for g, e, n in zip(got, exact, naive, strict=True):
        assert g.dtype == dtype and g.is_contiguous()
        # sums of k terms are rounded at the magnitude of their partial sums
        tiny = 2**-20 * float(e.detach().abs().max()) if dtype == torch.float32 and e.numel() else None
        assert_close(g.detach(), e.detach(), n.detach(), tiny=tiny)


def _compare(function, formula, args, options, dtype, gradients=True):
    """Outputs and the gradients of the first two arguments."""

    def run(f, args):
        leaves = [a.detach().requires_grad_(gradients) for a in args[:2]]
        out = f(*leaves, *args[2:], **options)
        out = out if isinstance(out, tuple) else (out,)
        if not gradients:
            return out
        grads = [normal(*o.shape, device="cpu", dtype=dtype, seed=i).to(o.device, o.dtype) for i, o in enumerate(out)]
        return [*out, *torch.autograd.grad(out, leaves, grads)]

    with poisoned():
        got = run(function, args)
    exact, naive = run(formula, _on_cpu(args, torch.float64)), run(formula, _on_cpu(args, dtype))
    _all_close(got, exact, naive, dtype)
    for g, a in zip(got, run(function, args)):
        assert_bit_equal(g.detach(), a.detach())


@pytest.fixture
def compare_forward():
    """Compares the outputs of a function with those of a formula, and a second run."""
    return functools.partial(_compare, gradients=False)


@pytest.fixture
def compare():
    """Compares a function with a formula: outputs, the gradients of the first two arguments, and a second run."""
    return _compare


@pytest.fixture
def backward_kernel():
    """Compares the CPU library's backward kernel with a formula, and its bits across numbers of threads."""

    def compare(kernel, formula, args, dtype):
        with tilefuse.backend("cpu"), poisoned():
            got = kernel(*args)
        wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        _all_close(got, formula(*wide), formula(*args), dtype)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                with tilefuse.backend("cpu"):
                    for g, again in zip(got, kernel(*args), strict=True):
                        assert_bit_equal(g, again)
        finally:
            torch.set_num_threads(threads)

    return compare
