"""The rule for gradients."""

import pytest
import torch

from tilefuse.testing.verification import gradient_report


def outer(seed: int, tokens: int):
    """(oracle, naive, out): d.T @ x, where naive and out round d's elements each in a way of its own."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(tokens, 512, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, 96, generator=generator, dtype=torch.float64)

    def rounded() -> torch.Tensor:
        # a rounding that is uniform within half a unit in bfloat16's last place
        noise = torch.rand(d.shape, generator=generator, dtype=torch.float64) - 0.5
        return ((d * (1 + noise * 2.0**-7)).T @ x).bfloat16()

    return d.T @ x, rounded(), rounded()


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 64])
def test_rows_of_few_terms(tokens):
    for seed in range(4):
        oracle, naive, out = outer(seed, tokens)
        report = gradient_report(out, oracle, naive)
        assert report, report.message
        assert 0 < report.row_ratio <= 2


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
def test_a_wrong_row_is_found(tokens, factor):
    oracle, naive, out = outer(0, tokens)
    # a row of the size most have
    row = int(oracle.square().mean(1).argsort()[len(oracle) // 2])
    out[row] *= factor
    report = gradient_report(out, oracle, naive)
    assert not report
    assert report.message


def test_rows_that_cancel_and_empty():
    oracle = torch.zeros(8, 64, dtype=torch.float64)
    oracle[0] = torch.randn(64, dtype=torch.float64)
    noise = torch.full((8, 64), 1e-8)
    assert gradient_report(oracle.float() + noise, oracle, oracle.float())
    assert not gradient_report(oracle.float() + 1e-3 * noise.sign(), oracle, oracle.float())
    assert gradient_report(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, 4))
