"""The one exception type that means: the user gave us something wrong; and checks of files that raise it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Wrong input: a file, key, tensor or option.

    The message names what was found, what was expected and what to do; the
    command line shows it as one line and exits with code 2.
    """


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError for what is not a file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")


def check_whole(header: Any, path: str | os.PathLike[str]) -> None:
    """Raise InputError for one piece of a split GGUF; ``header`` gives its keys by get(), whichever reader it is of."""
    if (count := header.get("split.count", 0)) > 1:
        raise InputError(f"{path}: one of {count} pieces; join them first with llama-gguf-split --merge")
