"""SmolLM2 out of its GGUF and back: the same tokens, and nearly the same weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from first_convert import check
from first_convert.convert import convert
from first_convert.pack import open_gguf
from first_convert.upstream import gguf

TEXTS = [
    "Hello world",
    "12345 and 3.14159",
    "I'm, you'RE WE'VE don't",
    "  leading",
    "trailing  ",
    "\n\n\nx\t\ty",
    "日本語の文",
    "Привет, мир!",
    "🦙🦙 👩‍👩‍👧‍👦",
    "def f(x):\n    return x**2\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<|im_end|>b",
    "2024-12-31T23:59:59Z",
    "$1,234.56",
    "café naïve",
    "ǅ ß ﬁ",
    "\u00a0nbsp\u200bzw",
    "ΑΒΓ αβγ",
    "مرحبا",
    "हिन्दी",
    "ไทย",
    "CamelCase snake_case",
    "http://a.b/c?d=e&f=1",
    "....!!!???",
    "'''\"\"\"```",
    "x\r\ny",
    "   \n   ",
    "\t",
    "0",
    "007",
    "1st 2nd",
    "e\u0301",
    "<repo_name>foo<file_sep>",
    "½ ² ③",
    "#include <stdio.h>",
    "a" * 50,
    "Ａｂｃ",
    "៣៤",
    "\ufeffbom",
]


@pytest.mark.slow
def test_out_and_back(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = Path(__file__).parents[1] / "examples" / "smollm2_hf.py"
    spec = importlib.util.spec_from_file_location("smollm2_hf", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["smollm2_hf"] = module
    spec.loader.exec_module(module)
    source = module.package_gguf()
    folder = module.smollm2_hf(tmp_path / "smollm2")
    with pytest.raises(FileExistsError):
        module.smollm2_hf(folder)
    convert(folder, outfile=tmp_path / "out.gguf", outtype="bf16")

    original = llama_cpp.Llama(str(source), vocab_only=True, verbose=False)
    probes = [(text, original.tokenize(text.encode(), add_bos=False, special=True)) for text in TEXTS]
    assert check.loads(tmp_path / "out.gguf", probes) == []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.encode(text) for text in TEXTS] == [ids for _, ids in probes]

    ours, theirs = open_gguf(tmp_path / "out.gguf"), open_gguf(source)
    for name in ("tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"):
        assert ours.get(name) == theirs.get(name), name
    assert ours.get("general.license") == "apache-2.0" and ours.get("tokenizer.ggml.eos_token_id") == 2
    lib = gguf()
    stored = {t.name: t for t in lib.GGUFReader(tmp_path / "out.gguf").tensors}
    for tensor in lib.GGUFReader(source).tensors[:12]:
        truth = lib.quants.dequantize(tensor.data, tensor.tensor_type)
        got = lib.quants.dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type)
        assert np.abs(got - truth).max() <= np.abs(truth).max() * 2**-8
