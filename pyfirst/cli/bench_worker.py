"""One libllama under measurement: a process that obeys JSON lines on stdin, each answered by one on stdout.

The library is what LLAMA_CPP_LIB_PATH says; with "--plain" it need not be the patched one and has one context only.
Only functions of llama.cpp are timed: no sampling, no detokenising, no Python beyond one call a step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from pyfirst import metadata

# What the prompts repeat: routers should see text.
TEXT = (
    "The ferry to the island leaves at a quarter past nine, and in winter there is only one. Most of those who live "
    "there keep sheep, mend nets or write software; the school has eleven pupils and two teachers. In 2019 the last "
    "shop closed, so people order by telephone and the ferryman carries the parcels up the hill. Asked why she stays, "
    "the postwoman says: 'You can hear the weather coming, and nobody is in a hurry.' "
)


WARM_STEPS = 4


class Runner:
    """A model with one context for dense runs, or with several for masks and routers, whose graphs hold regions."""

    def __init__(self, plain: bool):
        self.native: Any = None
        if not plain:
            from pyfirst import native

            self.native = native
        import llama_cpp

        self.llama = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
        llama_cpp.llama_backend_init()

    def open(self, model: str, threads: int, n_ctx: int, n_ubatch: int = 512) -> dict[str, Any]:
        """Load the model and make the contexts, which read at most ``n_ubatch`` tokens at once."""
        llama = self.llama
        reasons: list[str] = []
        with self.native.captured_errors() if self.native else contextlib.nullcontext(reasons) as reasons:
            self.model = llama.llama_model_load_from_file(os.fsencode(model), llama.llama_model_default_params())
        if not self.model:
            reason = reasons[0].partition(": ")[2] if reasons else "llama.cpp does not load it"
            raise ValueError(f"{model}: {reason}")
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = min(n_ctx, n_ubatch)
        params.n_threads = params.n_threads_batch = threads
        self.contexts = {}
        names = ["plain"]
        if self.native is not None:
            names = ["masked", "scored", "routed"] if self.native.routed_layers(self.model) else ["masked"]
        for name in names:
            self.contexts[name] = llama.llama_init_from_model(self.model, params)
            if not self.contexts[name]:
                raise ValueError(f"{model}: no context")
        self.n_layer = llama.llama_model_n_layer(self.model)
        self.tokens = self._tokens(n_ctx)
        if self.native is not None:
            self._mask([])  # refused here where layers cannot be skipped
        if "scored" in self.contexts:
            # The routers read the prompt, but keep every layer: the difference is what scoring costs.
            self.native.set_prefill(self.contexts["scored"], metadata.PREFILL_MODES.index("full"))
            self.native.set_threshold(self.contexts["scored"], 0.0)
            self.native.set_routing(self.contexts["scored"], True)
            self.native.set_routing(self.contexts["routed"], True)
        patched = hasattr(llama.llama_cpp._lib, "llama_first_api_version")
        return {"n_layer": self.n_layer, "routers": "routed" in self.contexts, "patched": patched}

    def _tokens(self, n: int) -> list[int]:
        """``n`` tokens of TEXT, over and over; without a vocabulary the first one."""
        llama = self.llama
        vocab = llama.llama_model_get_vocab(self.model)
        if llama.llama_vocab_type(vocab) == llama.LLAMA_VOCAB_TYPE_NONE:
            return [0] * n
        text, room = TEXT.encode(), len(TEXT) + 8
        buffer = (llama.llama_token * room)()
        count = llama.llama_tokenize(vocab, text, len(text), buffer, room, False, False)
        found = list(buffer[:count]) if count > 0 else [0]
        return (found * (n // len(found) + 1))[:n]

    def _clear(self, name: str) -> None:
        llama = self.llama
        llama.llama_memory_clear(llama.llama_get_memory(self.contexts[name]), False)

    def _mask(self, skip: Sequence[int]) -> None:
        import numpy as np

        mask = np.ones(self.n_layer, bool)
        mask[list(skip)] = False
        self.native.set_mask(self.contexts["masked"], mask)

    def _decode(self, context: Any, tokens: Any) -> None:
        # llama_batch_get_one points into the array: the caller holds it.
        if self.llama.llama_decode(context, self.llama.llama_batch_get_one(tokens, len(tokens))):
            raise RuntimeError("llama_decode failed")
        self.llama.llama_synchronize(context)

    def measure(self, name: str, skip: Sequence[int], n_prompt: int, n_decode: int, clock: str) -> dict[str, Any]:
        """Seconds, "wall" or "cpu", for a prompt, which skips too, and for n_decode single tokens after it.

        "kept" is the number of layers that the routers kept, None where they did not decide.
        """
        context, token_type = self.contexts[name], self.llama.llama_token
        prompt = (token_type * n_prompt)(*self.tokens[:n_prompt])
        steps = [(token_type * 1)(token) for token in self.tokens[n_prompt : n_prompt + n_decode]]
        for timed in (False, True):  # caches are cold where another process came before
            self._clear(name)
            if name == "masked":
                self._mask(skip)
            if not timed:
                for step in steps[:WARM_STEPS]:
                    self._decode(context, step)
        now = time.process_time if clock == "cpu" else time.perf_counter
        start = now()
        self._decode(context, prompt)
        read = now()
        for step in steps:
            self._decode(context, step)
        decoded = now()
        mask = self.native.get_mask(context, self.n_layer) if name == "routed" else None
        return {
            "prefill": read - start,
            "decode": decoded - read,
            "kept": None if mask is None else int(mask.sum()),
        }

    def memory(self) -> dict[str, int | None]:
        """Most bytes that this process has held; None where the system does not tell."""
        try:
            import resource
        except ImportError:
            return {"peak": None}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak": peak if sys.platform == "darwin" else peak * 1024}

    def rebuilds(self, steps: int) -> dict[str, int]:
        """Decode with a mask that changes before every step; count the graphs that were not reused.

        A live sequence only loses layers, since what it skipped has no keys and values. When one layer is
        left the sequence starts afresh, and all layers come back at once.
        """
        context, token = self.contexts["masked"], (self.llama.llama_token * 1)(self.tokens[0])
        rng, off = random.Random(1), list[int]()

        def change() -> None:
            nonlocal off
            left = [layer for layer in range(self.n_layer) if layer not in off]
            if len(left) < 2:
                self._clear("masked")
                off = []
                return self._mask(off)
            off = [*off, rng.choice(left)]
            self._mask(off)

        self._clear("masked")
        self._mask(off)
        for _ in range(2):  # from here on each step finds a graph for one token
            self._decode(context, token)
        before = self.llama.llama_perf_context(context).n_reused
        for _ in range(steps):
            change()
            self._decode(context, token)
        return {
            "steps": steps,
            "rebuilds": steps - (self.llama.llama_perf_context(context).n_reused - before),
        }

    def load(self, model: str) -> dict[str, float]:
        """Seconds to load a file and free it."""
        start = time.perf_counter()
        loaded = self.llama.llama_model_load_from_file(os.fsencode(model), self.llama.llama_model_default_params())
        if not loaded:
            raise ValueError(f"{model}: does not load")
        self.llama.llama_model_free(loaded)
        return {"seconds": time.perf_counter() - start}


def main(argv: Sequence[str]) -> int:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who closes stdin
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    runner: Runner | None = None
    for line in sys.stdin:
        try:
            job = json.loads(line)
            if runner is None:
                runner = Runner("--plain" in argv)
            answer = getattr(runner, job.pop("do"))(**job)
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError, ImportError))
            answer = {"error": str(error) or type(error).__name__, "expected": expected}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
