"""Whether a model fits into memory, and the context and batch sizes with which it does; all sizes in bytes.

What is counted, an upper bound::

    weights  all tensors once: those that llama.cpp rearranges are copied, the others are pages of the mapped file
    cache    n_seq * n_ctx tokens of keys and values in all layers; layers with a sliding window keep as many tokens,
             unless a Llama is asked for swa_full=False
    compute  n_ubatch * 4 * (max(n_vocab + 2E, heads * n_ctx + 6E, 3F + 4E) + 2 * n_ctx + 5E)
             E, F: width and feed-forward width; its three parts: logits, attention, feed-forward
    other    30 MB, and 200 for each token of the vocabulary

Pages of a mapped file can be dropped and read again, so a file that fits only without them does run, at the speed of
the disk; it counts as one that does not fit. A limit of the address space (ulimit -v) also counts what is reserved and
never touched: the mapped file beside its copy, logits of a whole batch, stacks and heaps of threads.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfirst import cpu, metadata
from pyfirst.errors import InputError
from pyfirst.info import Header, opened
from pyfirst.memory import kv_bytes

logger = logging.getLogger("pyfirst")

PROC = Path("/proc")
LEAST_CTX, LEAST_BATCH = 256, 64
_F32 = 4
_OTHER, _PER_TOKEN = 30 << 20, 200
_THREAD = 80 << 20  # address space of a thread: stack and heap
_UNLIMITED = 1 << 60  # what version 1 cgroups say
# ggml types that keys and values may have -> bytes a value: f32, f16, q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, bf16
_ITEM = {0: 4.0, 1: 2.0, 2: 0.5625, 3: 0.625, 6: 0.6875, 7: 0.75, 8: 1.0625, 20: 0.5625, 30: 2.0}
# Types that llama.cpp rearranges on some processor (ggml-cpu/repack.cpp); where it does, they are copied.
_COPIED = {"q1_0", "q2_K", "q4_0", "q4_K", "q5_K", "q6_K", "q8_0", "iq4_nl", "mxfp4"}


@dataclass(frozen=True)
class Room:
    """Bytes that this process may still take, and who says so."""

    size: int
    source: str
    address_space: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes, see the module; ``mapped`` and ``reserved`` are address space only."""

    weights: int
    cache: int
    compute: int
    other: int
    mapped: int
    reserved: int

    def total(self, address_space: bool = False) -> int:
        """Bytes of memory, or of address space."""
        memory = self.weights + self.cache + self.compute + self.other
        return memory + self.mapped + self.reserved if address_space else memory


@dataclass(frozen=True)
class Plan:
    """How to open a model: tokens of context for each sequence, of a batch, whether to map the file."""

    n_ctx: int
    n_batch: int
    use_mmap: bool = True
    need: Need | None = None
    room: Room | None = None

    def text(self) -> str:
        """One line for people."""
        settings = f"n_ctx {self.n_ctx}, n_batch {self.n_batch}, mmap {'on' if self.use_mmap else 'off'}"
        if self.need is None or self.room is None:
            return settings
        return f"{settings}: {_needs(self.need, self.room)}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _needs(need: Need, room: Room) -> str:
    parts = [("weights", need.weights), ("keys and values", need.cache), ("computing", need.compute)]
    if room.address_space:
        parts += [("mapped file", need.mapped), ("reserved", need.reserved)]
    found = ", ".join(f"{name} {_mb(size)}" for name, size in [*parts, ("other", need.other)])
    return (
        f"needs about {_mb(need.total(room.address_space))} ({found}), {_mb(room.size)} are available ({room.source})"
    )


def _number(path: Path) -> int:
    """The number in a file. Raises OSError, or ValueError for "max"."""
    return int(path.read_text())


def _statistic(path: Path, *names: str) -> int:
    """Sum of lines "name value". Raises OSError."""
    lines = (line.split() for line in path.read_text().splitlines())
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in names)


def _cgroup_rooms(root: Path, own: Path) -> Iterator[Room]:
    # Pages of files are dropped before a group runs into its limit.
    for folder in cpu.cgroups("memory", root, own):
        for limit, usage, files in (
            ("memory.max", "memory.current", ("active_file", "inactive_file")),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
        ):
            with contextlib.suppress(OSError, ValueError):
                most = _number(folder / limit)
                if most < _UNLIMITED:
                    used = _number(folder / usage) - _statistic(folder / "memory.stat", *files)
                    yield Room(max(0, most - max(0, used)), f"memory limit of the cgroup, {_mb(most)}")


def rooms(proc: Path = PROC, root: Path = cpu.CGROUPS, own: Path = cpu.OWN_CGROUPS) -> list[Room]:
    """What limits this process: MemAvailable, its cgroups, ulimit -v; empty where the system does not tell."""
    found = list(_cgroup_rooms(root, own))
    with contextlib.suppress(OSError, TypeError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
        found.append(Room(int(match[1]) * 1024, "MemAvailable"))  # type: ignore[index]
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int((proc / "self/statm").read_text().split()[0]) * resource.getpagesize()
            found.append(Room(max(0, limit - used), f"ulimit -v, {_mb(limit)}", True))
    return found


def _parts_bytes(path: str) -> int:
    """Bytes of a file, or of all parts of a file in parts."""
    match = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.gguf)", path)
    if not match:
        return os.path.getsize(path)
    names = (f"{match[1]}{i:05}{match[2]}" for i in range(1, int(match[3]) + 1))
    return sum(os.path.getsize(name) for name in names if os.path.exists(name))


class Estimate:
    """What the header of a GGUF file says of memory."""

    def __init__(self, path: str, header: Header, *, n_seq: int, item: float, threads: int, scores: bool):
        name = header.get("general.architecture", "")

        def most(key: str) -> int:
            value = header.get(f"{name}.{key}", 0)
            return max(value, default=0) if isinstance(value, list) else value

        self._file = _parts_bytes(path)
        kinds = header.tensor_bytes()
        in_parts = bool(header.get("split.count", 0))
        self._weights = self._file if in_parts else sum(kinds.values())
        self._copied = self._file if in_parts else sum(size for kind, size in kinds.items() if kind in _COPIED)
        self._token = sum(kv_bytes(header, 1, 1, reserved=True)) * item * n_seq
        self._heads, self._width = most("attention.head_count"), most("embedding_length")
        used = most("expert_feed_forward_length") * most("expert_used_count")
        self._forward = max(most("feed_forward_length"), used)
        self._vocab = most("vocab_size") or len(header.get("tokenizer.ggml.tokens", ()))
        self._n_seq, self._threads, self._scores = n_seq, threads, scores
        self.prefill = header.get(metadata.PREFILL, "full")
        self.window = header.get(metadata.WINDOW, 512)
        self.trained = most("context_length")

    def need(self, n_ctx: int, n_batch: int, use_mmap: bool) -> Need:
        """For a context of ``n_ctx`` tokens in each sequence, and ``n_batch`` tokens computed at once."""
        cells = -(-n_ctx // 256) * 256
        width, n_batch = self._width, min(n_batch, cells * self._n_seq)
        row = max(self._vocab + 2 * width, self._heads * cells + 6 * width, 3 * self._forward + 4 * width)
        logits = (n_batch if self._scores else self._n_seq) * self._vocab * _F32
        return Need(
            weights=self._weights,
            cache=round(cells * self._token),
            compute=n_batch * _F32 * (row + 2 * cells + 5 * width),
            other=_OTHER + _PER_TOKEN * self._vocab,
            mapped=self._copied + self._file - self._weights if use_mmap else 0,
            reserved=logits + self._threads * _THREAD,
        )


def plan(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    max_ctx: int = 512,
    n_batch: int | None = None,
    use_mmap: bool | None = None,
    n_seq: int = 1,
    prefill: str | None = None,
    type_k: int | None = None,
    type_v: int | None = None,
    threads: int = 1,
    scores: bool = True,
    verbose: bool = False,
) -> Plan:
    """Sizes for a file that fit into memory: the longest context, then the largest batch.

    Args:
        n_ctx: tokens of context of each sequence, as the user wants it (0: what the model was trained for); then what
            does not fit is warned of and tried all the same.
        max_ctx: the most to take where n_ctx is None; halved, down to 256, until it fits.
        n_batch: tokens computed at once; default: 512, halved down to 64 until it fits. In prefill "skip" it is
            more than the window that decides.
        use_mmap: default: yes, unless the address space is limited and holds the file only once.
        n_seq: sequences in the context.
        prefill: as in FirstLlama; default: what the file says.
        type_k, type_v: ggml types of keys and values, default float16.
        threads: threads that will compute.
        scores: whether llama-cpp-python reserves logits of a whole batch.
        verbose: print the plan to stderr.

    A file that says nothing of its size gets the defaults: whoever loads it says why. Raises InputError for a file that
    cannot be read, a size below 0, a type that keys and values cannot have, and with the numbers when nothing fits.
    """
    path = os.fspath(path)
    for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch)):
        if value is not None and value < 0:
            raise InputError(f"{name} is {value}, expected a number of tokens")
    for name, kind in (("type_k", type_k), ("type_v", type_v)):
        if kind is not None and kind not in _ITEM:  # llama.cpp ends the process
            raise InputError(f"{name} is {kind}, expected a ggml type of keys and values: {', '.join(map(str, _ITEM))}")
    item = max(_ITEM[1 if kind is None else kind] for kind in (type_k, type_v))
    with opened(path) as header:
        try:
            model = Estimate(path, header, n_seq=n_seq, item=item, threads=threads, scores=scores)
        except (ValueError, TypeError, IndexError):
            return Plan(max_ctx if n_ctx is None else n_ctx, n_batch or 512, use_mmap is not False)
    limits = rooms()
    maps = [use_mmap is not False]
    if use_mmap is None and any(room.address_space for room in limits):
        maps = [True, False]
    contexts, batches = [n_ctx or model.trained or max_ctx], [n_batch or 512]
    if n_ctx is None:
        contexts = [min(max_ctx, contexts[0])]
        while contexts[-1] // 2 >= LEAST_CTX:
            contexts.append(contexts[-1] // 2)
    while n_batch is None and batches[-1] // 2 >= LEAST_BATCH:
        batches.append(batches[-1] // 2)

    found = None
    for context, batch, mapped in itertools.product(contexts, batches, maps):
        if n_batch is None and (prefill or model.prefill) == "skip":
            batch = max(batch, min(model.window + 1, context))
        need = model.need(context, batch, mapped)
        room = min(limits, key=lambda room: room.size - need.total(room.address_space), default=None)
        found = Plan(context, batch, mapped, need, room)
        if room is None or need.total(room.address_space) <= room.size:
            break
    else:
        assert found is not None and found.need is not None and found.room is not None
        said = f"{path}: with n_ctx {found.n_ctx} it {_needs(found.need, found.room)}"
        if n_ctx is None:
            raise InputError(f"{said}; take a smaller file or type, or insist on a context length (-c, n_ctx)")
        logger.warning("%s", said)
    if verbose:
        print(f"pyfirst: {found.text()}", file=sys.stderr)
    return found


def fill(path: str | os.PathLike[str], options: dict[str, Any], prefill: str | None, max_ctx: int) -> None:
    """Complete the arguments of a llama_cpp.Llama by plan(): n_ctx, n_batch, n_ubatch and use_mmap where missing.

    Raises InputError when nothing fits.
    """
    if options.get("vocab_only"):
        return
    given = [options[name] for name in ("n_batch", "n_ubatch") if options.get(name)]
    found = plan(
        path,
        n_ctx=options.get("n_ctx"),
        max_ctx=max_ctx,
        n_batch=min(512, *given) if given else None,
        use_mmap=options.get("use_mmap"),
        prefill=prefill,
        type_k=options.get("type_k"),
        type_v=options.get("type_v"),
        threads=options.get("n_threads") or 1,
        verbose=bool(options.get("verbose")),
    )
    if options.get("n_ctx") is None:
        options["n_ctx"] = found.n_ctx
    if not given:
        options["n_batch"] = options["n_ubatch"] = found.n_batch
    if options.get("use_mmap") is None:
        options["use_mmap"] = found.use_mmap
