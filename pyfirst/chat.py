"""Chat messages to prompt text, by the template in the file, rendered sandboxed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyfirst import native  # noqa: F401  points llama_cpp at our library
from pyfirst.errors import InputError

import llama_cpp  # isort: skip
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # isort: skip


class ChatTemplate:
    """The chat template of a model.

    Args:
        model_path: for error messages.
        metadata: the file's keys, as strings.
        vocab: llama_vocab pointer.

    Raises:
        InputError: no template in the file, or one that does not parse.
    """

    def __init__(self, model_path: str, metadata: dict[str, str], vocab: Any):
        self.model_path = model_path
        template = metadata.get("tokenizer.chat_template")
        if not template:
            raise InputError(f"{model_path}: no chat template in this file; use plain completion")

        def text(token: int) -> str:
            raw = llama_cpp.llama_vocab_get_text(vocab, token) if token != -1 else b""
            return (raw or b"").decode("utf-8", "replace")

        eos, bos = text(llama_cpp.llama_vocab_eos(vocab)), text(llama_cpp.llama_vocab_bos(vocab))
        try:
            self._formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
        except Exception as error:
            raise InputError(f"{model_path}: the chat template does not parse: {error}") from error

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt for an answer to ``messages``, [{"role", "content"}, ...], with BOS where the template wants it.

        Raises InputError with the template's own words where it refuses the messages.
        """
        if not messages:
            raise InputError("messages is empty: at least one message must decide")
        try:
            return self._formatter(messages=list(messages)).prompt  # type: ignore[arg-type]
        except Exception as error:
            # Templates are programs of the model's author: they raise what they like.
            raise InputError(f"{self.model_path}: the chat template refuses the messages: {error}") from error
