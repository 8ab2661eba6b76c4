"""A thin handle on libllama for exact tests: feed tokens, read logits, set masks. No sampling, no cache logic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import llama_cpp
import llama_cpp._logger
import numpy as np

GGML_TYPE_F32 = 0
llama_cpp._logger.set_verbose(False)


class NativeModel:
    """One model with one context; float32 KV cache."""

    def __init__(
        self,
        path,
        n_seq=1,
        n_ctx=256,
        n_batch=256,
        n_ubatch=256,
        kv_unified=False,
        n_threads=2,
        f32_cache=True,
        flash_attn=False,
        cb_eval=None,
    ):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"{path} does not load")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            n_ctx * n_seq,
            n_batch,
            n_ubatch,
            n_seq,
        )
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = kv_unified
        params.no_perf = False
        params.flash_attn_type = int(flash_attn)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
        if cb_eval:
            params.cb_eval = cb_eval
        if f32_cache:
            params.type_k = params.type_v = GGML_TYPE_F32
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise ValueError(f"{path}: no context")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_layer = llama_cpp.llama_model_n_layer(self.model)
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def decode(self, tokens: Sequence[tuple[int, int, int]], outputs: str | Sequence[bool] = "all") -> np.ndarray:
        """Run (token, position, sequence) triples; logits float32 [outputs, vocab]: "all", "last" or those marked."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position, seq) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, seq
                batch.logits[i] = (outputs == "all" or i == len(tokens) - 1) if isinstance(outputs, str) else outputs[i]
            status = llama_cpp.llama_decode(self.ctx, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            wanted = [i for i in range(len(tokens)) if batch.logits[i]]
            rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, i), (self.n_vocab,)) for i in wanted]
            return np.array(rows)
        finally:
            llama_cpp.llama_batch_free(batch)

    def feed(self, ids: Sequence[int], start: int = 0, seq: int = 0, outputs: str = "all") -> np.ndarray:
        """Run consecutive tokens of one sequence."""
        return self.decode([(token, start + i, seq) for i, token in enumerate(ids)], outputs)

    def clear(self, seq: int = -1) -> None:
        if seq < 0:
            llama_cpp.llama_memory_clear(self.memory, True)
        else:
            llama_cpp.llama_memory_seq_rm(self.memory, seq, -1, -1)

    def set_mask(self, mask: Sequence[int], seq: int = 0) -> None:
        from pyfirst import native  # the stock library runs through this class too

        native.set_mask(self.ctx, np.asarray(mask), seq)

    def mask(self, seq: int = 0) -> np.ndarray | None:
        from pyfirst import native

        return native.get_mask(self.ctx, self.n_layer, seq)

    def scores(self, seq: int = 0) -> np.ndarray | None:
        from pyfirst import native

        return native.get_scores(self.ctx, self.n_layer, seq)

    def reused(self) -> int:
        """How many graphs were reused so far."""
        return llama_cpp.llama_perf_context(self.ctx).n_reused

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)


@contextlib.contextmanager
def opened(path, **kwargs) -> Iterator[NativeModel]:
    model = NativeModel(path, **kwargs)
    try:
        yield model
    finally:
        model.close()
