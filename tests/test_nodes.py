"""What really runs: nodes of the graph counted one by one, and none of a skipped layer.

The scheduler calls back before and after each node. A pattern written over a node's output before is gone after
if the node ran. So what is counted is the work itself, not the flags that should switch it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np
import pytest
import tiny
from native_model import NativeModel

from first_convert import convert
from pyfirst import native

COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE
IDLE = {b"NONE", b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE"}  # nothing to compute
PATTERN = 0x7FC0DEAD  # a NaN that no kernel writes


class Tensor(ctypes.Structure):
    """ggml_tensor, as ggml.h declares it."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Counter:
    """Counts the nodes of each layer in the graphs that run.

    Watched are nodes that own their output, and ``ran`` says how many of them ran. What others write to may hold what
    is still needed, so of all nodes that compute ``on`` counts those that are switched on.
    """

    def __init__(self, n_layer: int):
        self.n_layer = n_layer
        self.op_name = native.lib.ggml_op_name
        self.op_name.restype, self.op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._call)
        self.clear()

    def clear(self) -> None:
        self.watched, self.ran, self.on = (np.zeros(self.n_layer, int) for _ in range(3))
        self._pending = False

    def _call(self, address: int, ask: bool, user_data: object) -> bool:
        node = Tensor.from_address(address)
        match = re.search(r"-(\d+)( |$)", node.name.decode())
        if match is None:
            return True
        layer = int(match[1])
        if ask:
            inputs = [source.contents.data for source in node.src if source]
            self._pending = not node.view_src and node.data not in inputs
            self.on[layer] += bool(node.flags & COMPUTE) and self.op_name(node.op) not in IDLE
            if self._pending:
                ctypes.c_uint32.from_address(node.data).value = PATTERN
        elif self._pending:
            self.watched[layer] += 1
            self.ran[layer] += ctypes.c_uint32.from_address(node.data).value != PATTERN
        return True


@contextlib.contextmanager
def counting(path) -> Iterator[tuple[NativeModel, Counter]]:
    """A model whose context calls a Counter."""
    model = NativeModel(path)
    counter = Counter(model.n_layer)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    params.cb_eval = counter.callback
    llama_cpp.llama_free(model.ctx)
    model.ctx = llama_cpp.llama_init_from_model(model.model, params)
    model.memory = llama_cpp.llama_get_memory(model.ctx)
    try:
        counter.clear()
        yield model, counter
    finally:
        model.close()


def check(counter: Counter, keep: Sequence[int], like: np.ndarray) -> None:
    """Kept layers ran all that ``like`` watched, the others nothing."""
    kept = np.array(keep, bool)
    assert (counter.watched == like).all()
    assert (counter.ran[kept] == like[kept]).all() and (counter.ran[~kept] == 0).all()
    assert (counter.on[~kept] == 0).all()
    assert (counter.on[kept] >= like[kept]).all()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "olmo2", "qwen3moe"])
def test_a_skipped_layer_runs_no_node(arch, tiny_model):
    with counting(tiny_model(arch)[1]) as (model, counter):
        n_layer = model.n_layer
        model.set_mask([1] * n_layer)
        model.feed(tiny.prompt(8))
        counter.clear()
        model.feed([5], 8)
        whole = counter.watched.copy()
        assert (whole >= 5).all() and (counter.ran == whole).all()
        for keep in ([1] + [0] * (n_layer - 1), [1, *([1, 0] * n_layer)[: n_layer - 1]], [1] * (n_layer - 1) + [0]):
            model.clear()
            model.set_mask(keep)
            for ids, start in ((tiny.prompt(8), 0), ([5], 8), ([6], 9)):
                counter.clear()
                model.feed(ids, start)
                check(counter, keep, whole if start else counter.watched)


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_what_routers_switch_off_runs_no_node(prefill, tiny_model, tmp_path):
    folder, path = tiny_model("llama")
    keep = [1, 0, 1, 0]
    recipe = tiny.recipe(tmp_path / "recipe", folder, mask=keep, prefill=prefill)
    convert.convert(base_gguf=path, first=recipe, outfile=tmp_path / "routed.gguf")
    with counting(tmp_path / "routed.gguf") as (model, counter):
        native.set_routing(model.ctx, True)
        native.begin(model.ctx)
        counter.clear()
        model.feed(tiny.prompt(8))
        ran = np.array([1, 1, 1, 1] if prefill == "full" else keep, bool)
        assert (counter.ran[ran] == counter.watched[ran]).all()
        native.commit(model.ctx)
        assert model.mask().tolist() == [bool(k) for k in keep]
        counter.clear()
        model.feed([5], 8)
        check(counter, keep, counter.watched)
