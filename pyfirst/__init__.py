"""FiRST for llama.cpp: routers read the prompt and leave layers out while decoding (arXiv:2410.12513)."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from pyfirst.errors import InputError

if TYPE_CHECKING:
    from pyfirst.batch import FirstBatch
    from pyfirst.llama import FirstLlama, Routing

__all__ = ["FirstBatch", "FirstLlama", "InputError", "Routing"]

try:
    __version__ = importlib.metadata.version("pyfirst")
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    # Training and conversion import pyfirst without needing the native library.
    if name in ("FirstLlama", "Routing"):
        return getattr(importlib.import_module("pyfirst.llama"), name)
    if name == "FirstBatch":
        return importlib.import_module("pyfirst.batch").FirstBatch
    raise AttributeError(f"module 'pyfirst' has no attribute {name!r}")
