"""The ops, one module each at ``<family>/<op>.py``. Importing this package defines all of them."""

import importlib
import pkgutil

__all__: list[str] = []

# no central list: every module below defines its ops when imported and names them in `__all__`
for _info in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
    if not _info.ispkg:
        _module = importlib.import_module(_info.name)
        globals().update({name: getattr(_module, name) for name in _module.__all__})
        __all__.extend(_module.__all__)
