"""Upstream's converter, imported and completed from our side."""

from __future__ import annotations

import sys
import types

import pytest
import tiny
from tokenizers import Regex, normalizers, pre_tokenizers

from first_convert import upstream
from pyfirst import native


def test_another_gguf_package_stays_what_it_is(monkeypatch):
    foreign = types.ModuleType("gguf")
    monkeypatch.setitem(sys.modules, "gguf", foreign)
    path = list(sys.path)
    ours = upstream.gguf()
    assert ours is not foreign and str(native.upstream_dir()) in ours.__file__
    assert sys.modules["gguf"] is foreign and sys.path == path


def rules(pre_tokenizer, normalizer=None):
    """A tokenizer as transformers hands it over, with these rules."""
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


LLAMA3 = Regex(upstream._LLAMA3)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "tokenizer, name",
    [
        (rules(GPT2), "gpt-2"),
        (rules(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2])), "smollm"),
        (rules(pre_tokenizers.Sequence([pre_tokenizers.Split(LLAMA3, "isolated"), BYTES])), "llama-bpe"),
        (rules(GPT2, normalizers.NFC()), "gpt-2"),
        (rules(GPT2, normalizers.Lowercase()), None),
        (rules(pre_tokenizers.Sequence([pre_tokenizers.Digits(False), GPT2])), None),
        (rules(pre_tokenizers.ByteLevel(add_prefix_space=True)), None),
        (rules(pre_tokenizers.Whitespace()), None),
        (object(), None),
    ],
)
def test_pre_tokenizers_are_known_by_their_rules_alone(tokenizer, name):
    assert upstream.recognise(tokenizer) == name


def test_named_pre_tokenizers_cut_as_transformers_does(tmp_path):
    """Each name in the table against llama.cpp, on strings that tell their rules apart."""
    from first_convert import check
    from first_convert.child import PROBES

    steps = {
        "gpt-2": GPT2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(LLAMA3, "isolated"), BYTES]),
        "qwen2": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(upstream._LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), "isolated"), BYTES]
        ),
    }
    assert set(steps) == set(upstream.PRE_TOKENIZERS)
    for name, step in steps.items():
        model = tiny.make("llama", tmp_path / name)
        tokenizer = rules(step)
        tokenizer.save_pretrained(model)
        path = tiny.gguf(model, tmp_path / f"{name}.gguf")
        texts = [*PROBES, tiny.TEXT, "12345 67\n\n 8 ", "I'M they'LL 'Tis", "x  \n\n  y", "…?!\r\n\r\n"]
        probes = [(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        assert check.loads(path, probes) == [], name
