"""A model that answers prompts for first-run: text as it comes, what was decided, and how long it took."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from pyfirst.cli import common
from pyfirst.errors import InputError
from pyfirst.info import info
from pyfirst.llama import FirstLlama
from pyfirst.text import TextStream

CLOCK = "time.perf_counter around reading the prompt and around each later step; sampling included"


class _CountingLlama(FirstLlama):
    """Counts the tokens that are computed: fewer than the prompt's where its beginning is reused."""

    n_computed = 0

    def eval(self, tokens: Sequence[int]) -> None:
        self.n_computed += len(tokens)
        super().eval(tokens)


class Session:
    """An open model. Raises InputError for whatever does not fit the file.

    Args:
        model: GGUF file.
        ctx: context length in tokens, prompt and answer; at most what the model was trained for. Default: 2048,
            less where memory is short.
        threads: default: the cores this process may use.
        dense: no layer is skipped.
        threshold, skip, skip_layers, prefill, sticky: as in FirstLlama.
        verbose: let llama.cpp log to stderr.
    """

    def __init__(
        self,
        model: str,
        *,
        ctx: int | None = None,
        threads: int | None = None,
        dense: bool = False,
        threshold: float | None = None,
        skip: float | None = None,
        skip_layers: Sequence[int] | None = None,
        prefill: str | None = None,
        sticky: bool = False,
        verbose: bool = False,
    ):
        found = info(model)
        self.routers = bool(found["routers"])
        for name, value in (("threshold", threshold), ("skip", skip)):
            if value is not None and not self.routers:
                raise InputError(f"{model}: no routers in this file, so --{name} has nothing to decide")
        self.mode = "dense" if dense else "forced" if skip_layers is not None else "routed"
        if self.mode == "routed" and not self.routers:
            self.mode = "dense"
        self.llm = _CountingLlama(
            model,
            routing=self.mode == "routed",
            threshold=threshold,
            skip=skip,
            skip_layers=skip_layers,
            prefill=prefill,
            sticky=sticky,
            n_ctx=None if ctx is None else min(ctx, found["context_length"] or ctx),
            max_ctx=common.MAX_CTX,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=verbose,
        )
        self.ctx = self.llm.context_params.n_ctx

    def close(self) -> None:
        """Free the model."""
        self.llm.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokens(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text to continue, or of chat messages in the model's own template."""
        if isinstance(prompt, str):
            return self.llm.tokenize(prompt.encode("utf-8"), add_bos=True, special=True)
        return self.llm.chat_tokens(prompt)

    def answer(
        self,
        prompt: str | list[dict[str, str]],
        *,
        n_predict: int = 128,
        temp: float = 0.8,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Continue a text, or answer chat messages.

        Args:
            prompt: text, or [{"role", "content"}, ...].
            n_predict: tokens to generate at most; -1: until the context is full.
            temp: 0 takes the likeliest token.
            seed: None draws one, which the result names.
            on_text: called with each piece of whole characters as it comes.

        Returns:
            {"text", "finish_reason", "first", "usage", "timings", "seed", ...}, as --json prints it.
        """
        llm, tokens = self.llm, self.tokens(prompt)
        if not tokens:
            raise InputError("the prompt is empty: at least one token must decide")
        if len(tokens) >= self.ctx:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.ctx} with the answer; see -c"
            )
        limit = self.ctx - len(tokens)
        if n_predict >= 0:
            limit = min(limit, n_predict)
        seed = secrets.randbits(31) if seed is None else seed
        llm.set_seed(seed)
        llm.n_computed = 0

        text = TextStream()
        pieces: list[str] = []

        steps = llm.generate(tokens, temp=temp)
        n_generated, n_read, finish = 0, 0, "length"
        seconds: list[float] = []
        while n_generated < limit:
            start = time.perf_counter()
            token = next(steps)
            seconds.append(time.perf_counter() - start)
            n_read = n_read or llm.n_computed
            if llm.is_eog(token):
                finish = "stop"
                break
            n_generated += 1
            piece, _ = text.feed(llm.detokenize([token]))
            if piece:
                pieces.append(piece)
                if on_text:
                    on_text(piece)
        steps.close()

        routing = llm.routing
        assert routing is not None
        reading, decoding = seconds[0], sum(seconds[1:])
        return {
            "text": "".join(pieces),
            "finish_reason": finish,
            "first": {
                **routing.report(),
                "mode": self.mode,
                "mask": routing.mask.tolist(),
                "scores": None if routing.scores is None else routing.scores.tolist(),
                "threshold": routing.threshold,
            },
            "usage": {
                "prompt_tokens": len(tokens),
                "completion_tokens": n_generated,
                "total_tokens": len(tokens) + n_generated,
            },
            "timings": {
                "clock": CLOCK,
                "prompt_tokens": n_read,
                "prompt_seconds": reading,
                "prompt_tokens_per_s": n_read / reading,
                "decode_tokens": len(seconds) - 1,
                "decode_seconds": decoding,
                "decode_tokens_per_s": (len(seconds) - 1) / decoding if decoding else None,
            },
            "seed": seed,
            "routers": self.routers,
            "model": llm.model_path,
            "n_ctx": self.ctx,
            "n_threads": llm.n_threads,
        }
