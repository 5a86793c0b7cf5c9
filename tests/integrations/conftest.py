"""Whole models, patched and stock, by verification.md's rule."""

import contextlib
import copy

import pytest
import torch

from tilefuse.testing import assert_bit_equal, assert_close


@contextlib.contextmanager
def _exact():
    """Stock models cast softmax to float32 whatever the model's dtype is: here it stays float64."""
    softmax = torch.nn.functional.softmax
    torch.nn.functional.softmax = lambda x, dim=None, dtype=None: softmax(x, dim=dim)
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


def _gradients(model):
    """By layer; a layer's bias is one more column of its weight.

    The gradient of a key projection's bias is exactly zero, so that errors relative to its own size mean nothing.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found.setdefault(name.rpartition(".")[0], []).append(grad if grad.dim() > 1 else grad[:, None])
    return {
        f"{layer}.grad": torch.cat(grads, 1) if len({g.shape[0] for g in grads}) == 1 else grads[0]
        for layer, grads in found.items()
    }


def results(model, run, backward=True):
    """Outputs of ``run(model)`` by name and, from the loss in them, the gradients of all parameters."""
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        outputs = dict(run(model))
        if backward:
            outputs["loss"].backward()
    return {name: x.detach().clone() for name, x in (outputs | (_gradients(model) if backward else {})).items()}


@pytest.fixture
def against_stock():
    """Compares a patched copy of a model with a stock one, the oracle being stock in float64; returns the report."""
    from tilefuse.integrations.transformers import patch, unpatch

    def compare(model, run, backward=True):
        with _exact():
            oracle = results(copy.deepcopy(model).double(), run, backward)
        naive = results(copy.deepcopy(model), run, backward)
        patched = copy.deepcopy(model)
        report = patch(patched)
        got = results(patched, run, backward)
        assert got.keys() == naive.keys() == oracle.keys()
        for name, x in got.items():
            # gradients of weights: a row is one error times a vector, whose ratio to another says little
            assert_close(x, oracle[name].double(), naive[name], rows=not name.endswith(".grad"), name=name)
        unpatch(patched)
        for name, x in results(patched, run, backward).items():
            assert_bit_equal(x, naive[name], name=f"{name} after unpatch")
        return report

    return compare
