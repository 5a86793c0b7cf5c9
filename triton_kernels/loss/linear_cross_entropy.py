"""linear_cross_entropy with its gradients made in the forward: the kernels of linear_logprobs, one after the other.

Logits are made again here too: they would not fit beside the gradients of large batches.
"""

from __future__ import annotations

from .host import with_gradients
from .linear_logprobs import linear_logprobs_bwd, linear_logprobs_fwd


def linear_cross_entropy_fwd(*args):
    return with_gradients(linear_logprobs_fwd, linear_logprobs_bwd, *args)
