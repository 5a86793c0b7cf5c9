"""A sweep over every language architecture of transformers: is a patched model still Hugging Face's?

``architectures`` says which there are and makes a tiny random model of each, ``modes`` what each is asked, ``check``
compares stock and patched, ``record`` keeps the answers and makes the verified list of them. Needs transformers.
"""

from .architectures import Architecture, architectures, tiny
from .check import Record, check
from .record import QUICK

__all__ = ["QUICK", "Architecture", "Record", "architectures", "check", "tiny"]
