"""``sinusoidal_table`` against the formula, number by number."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.parametrize("dim", [2, 10, 64])
def test_is_the_formula_to_the_last_bit_at_far_positions(dim, base):
    rows = 131073
    table = tilefuse.sinusoidal_table(dim, rows, base=base, layout="interleaved")
    assert table.shape == (rows, dim) and table.dtype == torch.float32
    for p in (0, 1, 2, 511, 8191, 65537, 131072):
        for i in range(dim // 2):
            angle = p * base ** (-2 * i / dim)
            for got, want in zip(table[p, 2 * i : 2 * i + 2].tolist(), (math.sin(angle), math.cos(angle))):
                # half a unit of the last place, and that of float64's sine at this angle
                assert abs(got - want) <= 0.5 * math.ulp(1.0) * 2**29 * abs(want) + 1e-9


def test_layouts_hold_the_same_numbers():
    concat = tilefuse.sinusoidal_table(12, 50)
    interleaved = tilefuse.sinusoidal_table(12, 50, layout="interleaved")
    assert_bit_equal(torch.cat((interleaved[:, ::2], interleaved[:, 1::2]), -1), concat)
    assert_bit_equal(concat[0], torch.tensor([0.0] * 6 + [1.0] * 6))


def test_rows_do_not_depend_on_their_number():
    assert_bit_equal(tilefuse.sinusoidal_table(16, 300)[:7], tilefuse.sinusoidal_table(16, 7))
    assert tilefuse.sinusoidal_table(16, 0).shape == (0, 16)


def test_float32_angles_are_worse():
    exact = tilefuse.sinusoidal_table(64, 131072)
    rough = tilefuse.sinusoidal_table(64, 131072, angle_dtype=torch.float32)
    assert 1e-3 < (rough - exact).abs().max() < 2e-2


def test_device_and_default_dtype():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert tilefuse.sinusoidal_table(8, 4).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert tilefuse.sinusoidal_table(8, 4, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert tilefuse.sinusoidal_table(8, 4).device.type == "meta"


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((7, 4), {}, ValueError, "dim must be even and at least 2, got 7"),
        ((0, 4), {}, ValueError, "dim must be even and at least 2, got 0"),
        ((8, -1), {}, ValueError, "max_positions must be at least 0, got -1"),
        ((8, 4), {"base": 0.0}, ValueError, "base must be positive and finite, got 0.0"),
        ((8, 4), {"base": math.nan}, ValueError, "base must be positive and finite, got nan"),
        ((8, 4), {"layout": "split"}, ValueError, "layout must be 'concat' or 'interleaved', got 'split'"),
        ((8, 4), {"angle_dtype": torch.bfloat16}, TypeError, "angle_dtype must be torch.float32 or torch.float64"),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=rf"^tilefuse.sinusoidal_table: {message}"):
        tilefuse.sinusoidal_table(*args, **options)
