"""tilefuse: fused CUDA/Triton kernels for DeepSeek-style language models, as PyTorch ops with CPU parity.

Every op is reachable twice with the same name, argument order and defaults: as the documented function
``tilefuse.<op>`` and as ``torch.ops.tilefuse.<op>``. ``tilefuse.ops()`` lists them.
"""

from . import ops as _ops_package
from .backends import backend
from .library import explain
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "explain", "nn", "ops", *_ops_package.__all__]

from . import nn
from .library import ops
