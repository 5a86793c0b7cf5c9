"""Tools that check a kernel: error bounds, poisoned memory, sample inputs, a faithful Triton interpreter.

Importable by users who test their own kernels; needs nothing beyond torch and numpy until
``tilefuse.testing.interpreter.install()`` is called, which needs Triton and ml_dtypes.
"""

from .memory import Canary, canary, poisoned
from .numeric import ErrorReport, assert_bit_equal, assert_close, error_report
from .sample import Sample, samples

__all__ = [
    "Canary",
    "ErrorReport",
    "Sample",
    "assert_bit_equal",
    "assert_close",
    "canary",
    "error_report",
    "poisoned",
    "samples",
]
