"""Our walk through a GGUF header against gguf-py's reader, and on damaged files."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from first_convert.ggufio import Entry, Gguf, pack_entry, rewrite
from first_convert.upstream import gguf
from pyfirst.errors import InputError


@pytest.fixture
def every_type(tmp_path):
    """A file of gguf-py's with each type of value, odd alignment and three types of tensor."""
    path = tmp_path / "all.gguf"
    lib = gguf()
    writer = lib.GGUFWriter(path, arch="test")
    writer.add_custom_alignment(64)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"a.{name}", 7)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "ключ 🦙")
    writer.add_array("a.strings", ["x", "", "мир"])
    writer.add_array("a.floats", [1.5, -2.0])
    writer.add_array("a.ints", [1, -2])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("t.f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("t.f16", np.ones((5,), dtype=np.float16))
    q8 = lib.quants.quantize(np.random.rand(4, 64).astype(np.float32), lib.GGMLQuantizationType.Q8_0)
    writer.add_tensor("t.q8", q8, raw_dtype=lib.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(path):
    reader = gguf().GGUFReader(path)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type.name, tuple(t.shape.tolist()), t.data.tobytes()) for t in reader.tensors}


def ours(path):
    file = Gguf(path)
    tensors = {t.name: (t.kind, t.shape, bytes(file.data[t.start : t.start + t.size])) for t in file.tensors}
    return {name: file.get(name) for name in file.keys}, tensors


def test_same_as_gguf_pys_reader(every_type, tiny_model):
    for path in (every_type, tiny_model("llama")[1], tiny_model("gpt2")[1], tiny_model("gemma2")[1]):
        assert ours(path) == theirs(path)


def test_rewriting_with_nothing_changed_gives_the_same_bytes(every_type, tmp_path):
    rewrite(Gguf(every_type), tmp_path / "copy.gguf", [], lambda name: True)
    assert (tmp_path / "copy.gguf").read_bytes() == every_type.read_bytes()


def test_entries_are_read_back_by_gguf_py(every_type, tmp_path):
    added = [
        Entry("b.u", "UINT32", 5),
        Entry("b.f", "FLOAT32", 0.25),
        Entry("b.b", "BOOL", False),
        Entry("b.s", "STRING", "мир"),
        Entry("b.af", "ARRAY", [0.5, 1.5], "FLOAT32"),
        Entry("b.au", "ARRAY", [3, 4], "UINT32"),
        Entry("b.as", "ARRAY", ["x", "ж"], "STRING"),
    ]
    rewrite(Gguf(every_type), tmp_path / "more.gguf", added, lambda name: not name.startswith("a."))
    fields, tensors = theirs(tmp_path / "more.gguf")
    assert {n: v for n, v in fields.items() if n.startswith("b.")} == {e.name: e.value for e in added}
    assert not any(name.startswith("a.") for name in fields)
    assert tensors == theirs(every_type)[1]


def test_every_cut_of_the_header_is_an_input_error(every_type, tmp_path):
    data = every_type.read_bytes()
    broken = tmp_path / "broken.gguf"
    for cut in range(0, len(data) - 64, 7):
        broken.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"broken\.gguf"):
            Gguf(broken)


def test_hostile_sizes_are_input_errors(tmp_path):
    path = tmp_path / "hostile.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    name = struct.pack("<Q", 1) + b"x"
    bodies = [
        struct.pack("<Q", 2**63) + b"x",
        name + struct.pack("<I", 99),
        name + struct.pack("<IQ", 8, 2**64 - 1),
        name + struct.pack("<IIQ", 9, 8, 2**62),
        name + struct.pack("<IIQ", 9, 9, 2),
        name + struct.pack("<IIQ", 9, 6, 2**61),
    ]
    for body in bodies:
        path.write_bytes(head + body + bytes(64))
        with pytest.raises(InputError, match=r"hostile\.gguf"):
            Gguf(path)
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(InputError, match="not a GGUF"):
        Gguf(path)
    path.write_bytes(struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + bytes(100))
    with pytest.raises(InputError, match="byte order"):
        Gguf(path)


def test_pack_entry_is_gguf_pys_encoding():
    entry = pack_entry(Entry("k", "ARRAY", ["a"], "STRING"))
    assert entry == struct.pack("<Q1sIIQQ1s", 1, b"k", 9, 8, 1, 1, b"a")
