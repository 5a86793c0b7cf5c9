"""Sample inputs shared by tests, opcheck and benchmarks: one module per op at ``<family>/<op>.py``.

Each module defines ``SAMPLES: dict[op name, Callable[[device], Iterable[Sample]]]``; ``tilefuse.testing.samples``
finds it through the op's record in ``tilefuse.ops()``.
"""
