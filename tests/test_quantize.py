"""llama.cpp's quantizer through ctypes: every type it offers, its fallbacks, its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from first_convert import check, quantize
from first_convert.upstream import gguf
from pyfirst.errors import InputError


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256, so that K-quants fit."""
    root = tmp_path_factory.mktemp("wide")
    model = tiny.make("llama", root / "hf", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    return tiny.gguf(model, root / "f32.gguf")


def types(path):
    return {t.name: t.tensor_type.name for t in gguf().GGUFReader(path).tensors}


def imatrix(path, source, prefix="", value=None, count=100, counts=1, rows=1, dtype=np.float32):
    """An importance matrix in llama-imatrix's format, for every 2-dimensional tensor; random without ``value``."""
    writer = gguf().GGUFWriter(path, arch="imatrix")
    writer.add_type("imatrix")
    generator = np.random.default_rng(0)
    for tensor in gguf().GGUFReader(source).tensors:
        if len(tensor.shape) == 2:
            sums = generator.random((rows, int(tensor.shape[0])), dtype=np.float32) * 100
            sums = sums if value is None else np.full_like(sums, value)
            writer.add_tensor(f"{prefix}{tensor.name}.in_sum2", sums.astype(dtype))
            writer.add_tensor(f"{prefix}{tensor.name}.counts", np.full((counts, 1), count, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", quantize.TYPES)
def test_every_type_loads_or_is_refused_with_a_reason(kind, wide, tmp_path):
    out = tmp_path / "q.gguf"
    try:
        quantize.quantize(wide, out, kind)
    except InputError as error:
        # One-bit types are garbage without an importance matrix, and llama.cpp says so.
        assert "imatrix" in str(error)
        quantize.quantize(wide, out, kind, imatrix=imatrix(tmp_path / "imatrix.gguf", wide))
    assert check.loads(out, ()) == []


def test_imatrix_changes_the_result(wide, tmp_path):
    matrix = imatrix(tmp_path / "imatrix.gguf", wide)
    quantize.quantize(wide, tmp_path / "plain.gguf", "q4_k_m")
    quantize.quantize(wide, tmp_path / "weighted.gguf", "q4_k_m", imatrix=matrix)
    assert types(tmp_path / "plain.gguf") == types(tmp_path / "weighted.gguf")
    plain, weighted = (tmp_path / f"{name}.gguf" for name in ("plain", "weighted"))
    assert plain.read_bytes() != weighted.read_bytes()


def test_file_without_a_matrix_is_refused(wide):
    with pytest.raises(InputError, match="no importance matrix"):
        quantize.load_imatrix(wide)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix": "x."}, r"0 of its 16 tensors \('x\."),
        ({"value": -1}, "holds a negative value"),
        ({"value": np.nan}, "NaN or infinity"),
        ({"dtype": np.float16}, "is f16, expected f32"),
        ({"counts": 7}, "not a multiple of its 7 counts"),
        ({"rows": 2}, "imatrix size 512 is different from tensor size 256"),  # llama.cpp's own words
    ],
)
def test_a_matrix_that_does_not_fit_is_named(options, words, wide, tmp_path):
    path = imatrix(tmp_path / "im.gguf", wide, **options)
    with pytest.raises(InputError, match=words) as caught:
        quantize.quantize(wide, tmp_path / "q.gguf", "q4_0", imatrix=path)
    assert str(path) in str(caught.value) and "needs --imatrix" not in str(caught.value)


def test_what_no_token_reached_is_kept(wide, tmp_path):
    """Counts of zero, as of an expert that was never chosen, weigh all values alike."""
    for name, options in (("never", {"value": 0, "count": 0}), ("alike", {"value": 5, "count": 5})):
        matrix = imatrix(tmp_path / "im.gguf", wide, **options)
        quantize.quantize(wide, tmp_path / f"{name}.gguf", "q4_0", imatrix=matrix)
    assert (tmp_path / "never.gguf").read_bytes() == (tmp_path / "alike.gguf").read_bytes()


def test_types_are_all_that_llama_cpp_has():
    import llama_cpp

    known = {name: getattr(llama_cpp, name) for name in dir(llama_cpp) if name.startswith("LLAMA_FTYPE_MOSTLY_")}
    found = {f"LLAMA_FTYPE_MOSTLY_{name.upper()}": number for name, number in quantize.TYPES.items() if number}
    assert found.items() <= known.items()
    left = {name.removeprefix("LLAMA_FTYPE_MOSTLY_") for name in known.keys() - found.keys()}
    assert left <= {"NVFP4"}, left  # which llama-quantize does not offer


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q4_k_m", "q6_k"])
@pytest.mark.parametrize("shape", [{"intermediate_size": 172}, {"hidden_size": 100, "head_dim": 16}])
def test_rows_that_no_block_divides_are_listed_as_f16(shape, kind, tmp_path):
    source = tiny.gguf(tiny.make("llama", tmp_path / "hf", **shape), tmp_path / "f32.gguf")
    fallbacks = quantize.quantize(source, tmp_path / "q.gguf", kind)["fallbacks"]
    odd = [entry for entry in fallbacks if entry["columns"] % 32]
    assert odd and all(entry["got"] == "f16" for entry in odd)
    found = types(tmp_path / "q.gguf")
    assert all(found[entry["tensor"]].lower() == entry["got"].lower() for entry in fallbacks)
    assert check.loads(tmp_path / "q.gguf", ()) == []


@pytest.mark.parametrize("width, got", [(64, "q5_0"), (96, "q5_0")])
def test_fallbacks_are_listed(width, got, tmp_path):
    model = tiny.make("llama", tmp_path / "hf", hidden_size=width)
    source = tiny.gguf(model, tmp_path / "f32.gguf")
    fallbacks = quantize.quantize(source, tmp_path / "q.gguf", "q4_k_s")["fallbacks"]
    assert {"tensor": "blk.0.attn_q.weight", "columns": width, "wanted": "q4_K", "got": got} in fallbacks
    found = types(tmp_path / "q.gguf")
    assert all(found[entry["tensor"]].lower() == entry["got"].lower() for entry in fallbacks)


def test_no_fallback_where_rows_fit(wide, tmp_path):
    assert quantize.quantize(wide, tmp_path / "q.gguf", "q4_k_m")["fallbacks"] == []


def test_quantised_source_is_refused_and_untouched(wide, tmp_path):
    quantize.quantize(wide, tmp_path / "q8.gguf", "q8_0")
    before = (tmp_path / "q8.gguf").read_bytes()
    with pytest.raises(InputError, match="requantizing from type q8_0 is disabled"):
        quantize.quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0")
    assert (tmp_path / "q8.gguf").read_bytes() == before


def test_names_are_those_of_llama_quantize():
    assert quantize.outtype("Q4_K") == "q4_k_m" and quantize.outtype("IQ4_XS") == "iq4_xs"
    with pytest.raises(InputError, match="unknown outtype"):
        quantize.outtype("int4")
