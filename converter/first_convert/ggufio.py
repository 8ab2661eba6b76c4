"""The header of a GGUF file, walked in place, and files rewritten with other keys.

gguf-py's reader takes seconds for a vocabulary of 50,000 tokens and its writer packs every value again. Here
a kept key is copied as the bytes it is, and the tensors' bytes are never looked at.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from first_convert.progress import bar
from first_convert.upstream import gguf
from pyfirst.errors import InputError, check_file

# struct codes of the scalar types, by GGUF's type number; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = {"UINT32": 4, "INT32": 5, "FLOAT32": 6, "BOOL": 7, "STRING": 8, "ARRAY": 9}
STRING, ARRAY = 8, 9


class Entry(NamedTuple):
    """One key-value pair to write; ``kind`` is a key of NUMBERS, ``item`` the kind of an array's items."""

    name: str
    kind: str
    value: Any
    item: str | None = None


class Key(NamedTuple):
    """Where a pair is in the file: type number, start of the pair, start of its value, end."""

    kind: int
    start: int
    value: int
    end: int


class Tensor(NamedTuple):
    """One tensor: name, GGUF's name of its type, dimensions innermost first, start in the file, bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Gguf:
    """A GGUF file's keys and tensors.

    Attributes:
        path: the file.
        keys: name -> Key, in the file's order.
        tensors: list of Tensor, in the file's order.
        data_start: where the tensors begin, in bytes from the start of the file.
    """

    def __init__(self, path: str | Path):
        """Walk the header. Raises InputError for a file that is cut short, big-endian or no GGUF."""
        self.path = Path(path)
        check_file(path)
        self.size = self.path.stat().st_size
        if self.size < 24:
            raise InputError(f"{path}: cut short or not a GGUF file ({self.size} bytes)")
        with self.path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._walk()
        except (struct.error, UnicodeDecodeError, KeyError, ValueError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cut short or damaged ({error})") from None

    def _unpack(self, code: str, at: int) -> Any:
        return struct.unpack_from(f"<{code}", self.data, at)[0]

    def _string(self, at: int) -> tuple[str, int]:
        length = self._unpack("Q", at)
        end = at + 8 + length
        if end > self.size:
            raise ValueError("a string runs past the end")
        return self.data[at + 8 : end].decode("utf-8", "surrogateescape"), end

    def _skip(self, kind: int, at: int) -> int:
        """The end of a value that begins at ``at``."""
        if kind in SCALARS:
            return at + struct.calcsize(SCALARS[kind])
        if kind == STRING:
            return at + 8 + self._unpack("Q", at)
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        item, count = struct.unpack_from("<IQ", self.data, at)
        at += 12
        if item in SCALARS:
            return at + count * struct.calcsize(SCALARS[item])
        if item != STRING or count > self.size:
            raise ValueError(f"an array of {count} items of type {item}")
        unpack, data = struct.Struct("<Q").unpack_from, self.data
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        return at

    def _walk(self) -> None:
        magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", self.data, 0)
        if magic != b"GGUF":
            raise InputError(f"{self.path}: not a GGUF file (it begins with {magic!r})")
        if version not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version} or byte order is not supported")
        self.version, at = version, 24
        self.keys: dict[str, Key] = {}
        for _ in range(n_keys):
            start = at
            name, at = self._string(at)
            kind = self._unpack("I", at)
            end = self._skip(kind, at + 4)
            if end > self.size:
                raise ValueError(f"key '{name}' runs past the end")
            self.keys[name] = Key(kind, start, at + 4, end)
            at = end
        self.tensors_start = at
        found = []
        for _ in range(n_tensors):
            name, at = self._string(at)
            n_dims = self._unpack("I", at)
            *dims, kind, offset = struct.unpack_from(f"<{min(n_dims, 9)}QIQ", self.data, at + 4)
            at += 4 + n_dims * 8 + 12
            found.append((name, kind, tuple(dims), offset))
        self.tensors_end = at
        self.alignment = self.get("general.alignment", 32)
        self.data_start = -(-at // self.alignment) * self.alignment
        lib = gguf()
        self.tensors: list[Tensor] = []
        for name, kind, shape, offset in found:
            block, size = lib.GGML_QUANT_SIZES[lib.GGMLQuantizationType(kind)]
            tensor = Tensor(
                name,
                lib.GGMLQuantizationType(kind).name,
                shape,
                self.data_start + offset,
                math.prod(shape) // block * size,
            )
            if tensor.start + tensor.size > self.size:
                end = tensor.start + tensor.size
                raise InputError(f"{self.path}: cut short, {self.size} bytes where '{name}' ends at {end}")
            self.tensors.append(tensor)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key (a list for an array), ``default`` when it is absent."""
        if name not in self.keys:
            return default
        key = self.keys[name]
        if key.kind in SCALARS:
            return self._unpack(SCALARS[key.kind], key.value)
        if key.kind == STRING:
            return self._string(key.value)[0]
        item, count = struct.unpack_from("<IQ", self.data, key.value)
        at = key.value + 12
        if item in SCALARS:
            return list(struct.unpack_from(f"<{count}{SCALARS[item]}", self.data, at))
        result = []
        for _ in range(count):
            text, at = self._string(at)
            result.append(text)
        return result


def _pack(kind: int, value: Any, item: int | None = None) -> bytes:
    if kind in SCALARS:
        return struct.pack(f"<{SCALARS[kind]}", value)
    if kind == STRING:
        raw = value.encode("utf-8", "surrogateescape")
        return struct.pack("<Q", len(raw)) + raw
    assert item is not None
    head = struct.pack("<IQ", item, len(value))
    if item in SCALARS:
        return head + struct.pack(f"<{len(value)}{SCALARS[item]}", *value)
    return head + b"".join(_pack(item, element) for element in value)


def pack_entry(entry: Entry) -> bytes:
    """A pair as the bytes of a GGUF header."""
    kind, item = NUMBERS[entry.kind], NUMBERS[entry.item] if entry.item else None
    return _pack(STRING, entry.name) + struct.pack("<I", kind) + _pack(kind, entry.value, item)


def rewrite(source: Gguf, out: str | Path, added: Sequence[Entry], keep: Callable[[str], bool]) -> None:
    """Copy a GGUF, tensors byte for byte, with the keys that ``keep`` accepts and then ``added``.

    Raises OSError when the disk is full.
    """
    pairs = [source.data[key.start : key.end] for name, key in source.keys.items() if keep(name)]
    pairs += [pack_entry(entry) for entry in added]
    with Path(out).open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", source.version, len(source.tensors), len(pairs)))
        file.writelines(pairs)
        file.write(source.data[source.tensors_start : source.tensors_end])
        file.write(bytes(-file.tell() % source.alignment))
        with source.path.open("rb") as data, bar("Copying", source.size - source.data_start) as progress:
            data.seek(source.data_start)
            while chunk := data.read(1 << 24):
                file.write(chunk)
                progress.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
