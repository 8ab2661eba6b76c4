"""What a finished file must pass."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from first_convert import check, pack, quantize
from first_convert.upstream import gguf
from pyfirst.errors import InputError


@pytest.mark.parametrize("kind, bad", [("f32", np.inf), ("f16", np.nan), ("bf16", -np.inf), ("f32", np.nan)])
def test_one_bad_value_is_found_and_named(kind, bad, tiny_model, tmp_path):
    path = tmp_path / "x.gguf"
    quantize.quantize(tiny_model("llama")[1], path, kind)
    check.finite(path)
    tensor = next(t for t in pack.open_gguf(path).tensors if t.name == "blk.3.ffn_down.weight")
    lib = gguf()
    raw = lib.quants.quantize(np.full(32, bad, np.float32), getattr(lib.GGMLQuantizationType, kind.upper()))
    size = tensor.size // tensor.elements
    with path.open("r+b") as file:
        file.seek(tensor.start + tensor.size - size)
        file.write(raw.tobytes()[:size])
    with pytest.raises(InputError, match=r"blk\.3\.ffn_down\.weight"):
        check.finite(path)


def test_largest_finite_values_pass(tmp_path):
    lib = gguf()
    writer = lib.GGUFWriter(tmp_path / "x.gguf", arch="test")
    writer.add_tensor("h", np.array([65504, -65504], np.float16))
    writer.add_tensor("f", np.array([3.4e38, -3.4e38, 1e-45], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check.finite(tmp_path / "x.gguf")


def test_other_tokens_are_reported(tiny_model):
    path = tiny_model("llama")[1]
    text = "the quick brown fox"
    right = tiny.tokenizer().encode(text)
    assert check.loads(path, [(text, right), ("fox", [1, 2])]) == ["fox"]


def test_cost_of_fallbacks(tiny_model, tmp_path):
    source = tiny_model("llama")[1]
    fallbacks = quantize.quantize(source, tmp_path / "q.gguf", "q4_k_s")["fallbacks"]
    one = [entry for entry in fallbacks if entry["tensor"] == "blk.0.attn_q.weight"]
    # 64 x 64 elements at 22 bytes per 32 (q5_0) instead of 144 per 256 (q4_K)
    assert check.fallback_cost(tmp_path / "q.gguf", one) == round(64 * 64 * (22 / 32 - 144 / 256))


def test_routes_or_says_why_not(tiny_model, tmp_path):
    from pyfirst.recipe import load_recipe

    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    pack.pack(base, tmp_path / "first.gguf", load_recipe(recipe), recipe, "recipe")
    assert check.routes(tmp_path / "first.gguf") is None
    assert "no routers" in check.routes(base)
