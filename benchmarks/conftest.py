"""``pytest benchmarks``: the quick CPU cases under pytest-benchmark, stored so that runs can be compared."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # pytest-benchmark compare needs stored runs; .benchmarks/ is where it looks
    if hasattr(config.option, "benchmark_autosave"):
        config.option.benchmark_autosave = True
