"""Makes Triton's CPU interpreter (``TRITON_INTERPRET=1``) compute what an NVIDIA GPU computes.

Triton stores bfloat16 and FP8 as unsigned integers in its interpreter, and several operations then work on those
integers. ``install()`` replaces them by those of ``interpreter_repairs``; everything else stays Triton's. What differs
from upstream (3.6 to 3.9; later versions have some of it):

==========================  ==================================================  ========================================
operation                   upstream                                            here
==========================  ==================================================  ========================================
float -> bf16, fp8          no carry into the exponent, no saturation,          round to nearest even, once, from any
                            truncated subnormals                                source; ``rtz`` truncates
int -> bf16                 integer stored as bits                              round to nearest even, once
``tl.dot`` on bf16          product of the bit patterns                         float32 product and sum
``tl.dot`` on float32       exact whatever ``input_precision`` says             operands cut to TF32 for ``"tf32"``
bf16 + - * / < == exp ...   on the bit patterns                                 in float32, rounded to bf16
bf16 sum, max, cumsum       on the bit patterns                                 in float32, rounded to bf16
``tl.maximum``, ``clamp``   NaN wins                                            as ``propagate_nan`` says
float -> int                undefined out of range                              saturates, NaN gives 0
bf16 atomic add             integer add                                         float32 add, rounded to bf16
arithmetic on fp8           on the bit patterns                                 NotImplementedError: convert first
argmax, argmin with NaN     first NaN                                           ValueError: a GPU's answer depends on
                                                                                the order of the reduction
masked load, no ``other``   zero                                                all bits set (NaN, -1, True): a GPU
                                                                                promises nothing
access out of bounds        reads or writes whatever is there                   IndexError
``and``, ``if`` on a block  always true                                         ValueError
int < == of scalars         spread to integers, which 3.9 refuses as a mask     int1
int1 arithmetic             saturates                                           wraps around
histogram                   counts ``bins`` in the last bin                     ignores it
``fma``                     two roundings                                       one
block load padded with NaN  NaN as an integer                                   NaN of the format
signed ``>>``, ``umulhi``   the operands change type; of sign-extended values   of the bits, as the hardware does
==========================  ==================================================  ========================================

Conversion to FP8 saturates as Triton's code for sm_90 and later does (``cvt.rn.satfinite.e4m3x2.f32`` and
``.e5m2x2.f32``, read from the PTX of Triton 3.7): values beyond the largest finite one, infinities included, become
+-448 (e4m3) or +-57344 (e5m2), NaN becomes 0x7F whatever its sign, -0 is kept, subnormals round to nearest even.
On sm_89 the same Triton code goes through float16 with truncation (``cvt.rz.f16.f32``) and may differ in the last
place; that path is not modelled.

Not modelled: approximate division and special functions (exact here, within a few units in the last place on a GPU),
the order of sums, the 14-bit accumulator of Hopper's FP8 tensor cores (``max_num_imprecise_acc``), races.
"""

from __future__ import annotations

_installed = False


def install() -> None:
    """Repairs the interpreter of this process. Safe to call more than once.

    Raises:
        ImportError: Triton or ml_dtypes is missing.
    """
    global _installed
    if _installed:
        return
    try:
        from . import interpreter_repairs
    except ImportError as error:
        raise ImportError(
            f"tilefuse.testing.interpreter needs triton and ml_dtypes (pip install triton ml_dtypes): {error}"
        ) from error
    interpreter_repairs.apply()
    _installed = True
