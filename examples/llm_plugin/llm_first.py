"""A plugin for https://llm.datasette.io: models of llm-gguf leave out the layers that the prompt does not need.

CMAKE_ARGS=-DLLAMA_BUILD=OFF llm install --no-cache-dir . llm-gguf examples/llm_plugin  (in a clone, not from PyPI)
export LLAMA_CPP_LIB_PATH=$(python -m pyfirst lib-path)
llm gguf register-model rivers MODEL.gguf --n-ctx 1024
llm -m gguf/rivers "Name three rivers."                 (LLM_FIRST_REPORT=1 says which layers were left out)
"""

from __future__ import annotations

import os
import sys
from typing import Any

import llm_gguf

from pyfirst import FirstLlama


class Model(FirstLlama):
    """FirstLlama as llm-gguf wants it."""

    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Says on stderr what was decided, once the answer has been streamed."""
        yield from super().create_chat_completion(messages, *args, **kwargs)
        if os.environ.get("LLM_FIRST_REPORT") and self.routing is not None:
            print(f"\n{self.routing.report()}", file=sys.stderr)


llm_gguf.Llama = Model
