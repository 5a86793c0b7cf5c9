"""Messages name op, argument, what was expected and what came."""

import re

import pytest
import torch

from tilefuse import errors


def test_descriptions():
    assert errors.describe(torch.zeros(128, 64, dtype=torch.bfloat16)) == "[128, 64] bfloat16"
    assert errors.describe(torch.zeros(())) == "[] float32"
    assert errors.describe("half") == "'half'"
    assert errors.describe(None) == "None"
    assert errors.dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"


def test_value_and_type_error():
    cos = torch.zeros(128, 64, dtype=torch.bfloat16)
    message = "tilefuse.rope: cos must be [P, rotary_dim / 2] float32, got [128, 64] bfloat16"
    with pytest.raises(ValueError, match=re.escape(message)):
        errors.value_error("rope", "cos", "[P, rotary_dim / 2] float32", cos)
    with pytest.raises(TypeError, match=re.escape(message)):
        errors.type_error("rope", "cos", "[P, rotary_dim / 2] float32", cos)


def test_check_dtype():
    errors.check_dtype("f", "x", torch.zeros(2), errors.FLOATS)
    with pytest.raises(TypeError, match=re.escape("tilefuse.f: ids must be int32 or int64, got [2] float32")):
        errors.check_dtype("f", "ids", torch.zeros(2), errors.INDEX_DTYPES)


def test_check_device():
    x, y = torch.zeros(2), torch.zeros(2, device="meta")
    errors.check_device("f", "y", x, x, "x")
    with pytest.raises(ValueError, match=re.escape("tilefuse.f: y must be on the device of x (cpu), got meta")):
        errors.check_device("f", "y", y, x, "x")


def test_last_dim_contiguous():
    x = torch.randn(4, 6)
    assert errors.check_last_dim_contiguous(x) is x
    assert errors.check_last_dim_contiguous(x[:, :3]).data_ptr() == x.data_ptr()
    assert errors.check_last_dim_contiguous(x[:, :1]).data_ptr() == x.data_ptr()
    copied = errors.check_last_dim_contiguous(x.t())
    assert copied.is_contiguous() and torch.equal(copied, x.t())


def test_needs_grad():
    x, w = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert errors.needs_grad(x, None, w)
    assert not errors.needs_grad(x, None)
    assert not errors.needs_grad()
    with torch.no_grad():
        assert not errors.needs_grad(w)


def test_check_not_differentiated():
    x, w = torch.zeros(2), torch.zeros(2, requires_grad=True)
    errors.check_not_differentiated("f", "is not differentiable", x=x, y=None)
    with torch.no_grad():
        errors.check_not_differentiated("f", "is not differentiable", w=w)
    with pytest.raises(RuntimeError, match=r"tilefuse.f: is not differentiable, but w requires grad; detach it"):
        errors.check_not_differentiated("f", "is not differentiable", x=x, w=w)
