"""Chat messages to prompt text, by the template in the file, rendered sandboxed."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from pyfirst import native  # noqa: F401  points llama_cpp at our library
from pyfirst.errors import InputError

import llama_cpp  # isort: skip
from llama_cpp.llama_chat_format import ChatFormatterResponse, Jinja2ChatFormatter  # isort: skip


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

        eos = llama_cpp.llama_vocab_eos(vocab)
        bos = text(llama_cpp.llama_vocab_bos(vocab))
        try:
            self._formatter = Jinja2ChatFormatter(template, eos_token=text(eos), bos_token=bos, stop_token_ids=[eos])
        except Exception as error:
            raise InputError(f"{model_path}: the chat template does not parse: {error}") from error
        self._takes_parts = self._renders_parts()

    def _renders_parts(self) -> bool:
        """Whether the template reads content given as a list of parts; many would print the list itself."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            prompt = self._formatter(messages=probe).prompt  # type: ignore[arg-type]
        except Exception:
            return False
        return "probe" in prompt and "'probe'" not in prompt and '"probe"' not in prompt

    def _plain(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its text parts joined, where the template wants a string. Raises InputError for others."""
        content = message.get("content")
        if not isinstance(content, list):
            return message
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if not (isinstance(part, dict) and kind == "text"):
                raise InputError(f"{self.model_path}: a message holds a part of type {kind!r}, this model reads text")
            if not isinstance(part.get("text"), str):
                found = reprlib.repr(part["text"]) if "text" in part else "missing"
                raise InputError(f"a message holds a part of type 'text' whose text is {found}, expected a text")
            texts.append(part["text"])
        return message if self._takes_parts else {**message, "content": "".join(texts)}

    def __call__(self, *, messages: Sequence[dict[str, Any]], **kwargs: Any) -> ChatFormatterResponse:
        """As the formatters of llama_cpp.llama_chat_format.

        Raises InputError with the template's own words where it refuses the messages.
        """
        if not messages:
            raise InputError("messages is empty: at least one message must decide")
        for i, message in enumerate(messages):
            if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
                raise InputError(f"message {i} is not an object with a 'role'")
        plain = [self._plain(message) for message in messages]
        try:
            return self._formatter(messages=plain, **kwargs)  # type: ignore[arg-type]
        except Exception as error:
            # Templates are programs of the model's author: they raise what they like.
            raise InputError(f"{self.model_path}: the chat template refuses the messages: {error}") from error

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt for an answer to ``messages``, [{"role", "content"}, ...], with BOS where the template wants it.

        Raises InputError as __call__ does.
        """
        return self(messages=messages).prompt
