"""Completion and chat of FirstLlama: streams add up to the whole, and log-probabilities are torch's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

from pyfirst import FirstLlama, InputError

F32 = {"type_k": 0, "type_v": 0, "n_ctx": 256}
SPELLED = "ab日本🙂éDEFGHIJ!"
STOPS = [None, "DEFGHIJ", "🙂", ["本🙂é"], ["GHIJ", "DEFGHIJ"], ["DEF", "本🙂éDEFGH"], ["", "nowhere"]]


class Spells:
    """A logits processor that makes the model say these tokens, one after the other, and then the end."""

    def __init__(self, tokens, eos: int):
        self.tokens = [*tokens, eos]
        self.n = 0

    def __call__(self, _, scores):
        scores = np.full_like(scores, -1e9)
        scores[self.tokens[min(self.n, len(self.tokens) - 1)]] = 0
        self.n += 1
        return scores


@pytest.fixture(scope="module")
def llm(tiny_model):
    with_routers = FirstLlama(tiny_model("llama")[1], **F32)
    yield with_routers
    with_routers.close()


@pytest.fixture(scope="module")
def byte_tokens(llm) -> dict[int, int]:
    found = {llm.detokenize([i]): i for i in range(tiny.VOCAB - 7)}
    return {byte: found[bytes([byte])] for byte in range(256) if bytes([byte]) in found}


def asked(llm, tokens, chat: bool, stream: bool, **options):
    """(text, finish_reason, chunks) of the spelled tokens."""
    options |= {"logits_processor": [Spells(tokens, llm.token_eos())], "temperature": 0.0, "stream": stream}
    call = llm.create_chat_completion if chat else llm.create_completion
    result = call([{"role": "user", "content": "hi"}] if chat else "the quick", **options)
    if not stream:
        choice = result["choices"][0]
        return choice["message"]["content"] if chat else choice["text"], choice["finish_reason"], [result]
    chunks = list(result)
    texts = [c["choices"][0]["delta"].get("content", "") if chat else c["choices"][0]["text"] for c in chunks]
    return "".join(texts), chunks[-1]["choices"][0]["finish_reason"], texts


@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_stream_is_the_whole_wherever_it_ends(chat, stop, llm, byte_tokens):
    """A character, or a stop string, of many tokens; max_tokens cuts anywhere, also inside a character."""
    raw = SPELLED.encode()
    tokens = [byte_tokens[byte] for byte in raw]
    stops = [s for s in ([stop] if isinstance(stop, str) else stop or []) if s]
    for n in range(1, len(raw) + 2):
        text = raw[:n].decode("utf-8", "ignore")
        ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
        truth = text[: min(ends)[1]] if ends else text
        reason = "stop" if ends or n > len(raw) else "length"
        whole = asked(llm, tokens, chat, False, max_tokens=n, stop=stop)
        streamed = asked(llm, tokens, chat, True, max_tokens=n, stop=stop)
        assert whole[:2] == streamed[:2] == (truth, reason)
        used = whole[2][0]["usage"]["completion_tokens"]
        assert used <= min(n, len(raw))
        assert "\ufffd" not in whole[0]


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_characters_come_whole_and_at_once_after_bytes_that_are_none(chat, llm, byte_tokens):
    tokens = [byte_tokens[b] for b in (*b"a", 0xFF, 0xF0, *b"b", *"日é".encode(), 0x80, *b"c")]
    text, _, pieces = asked(llm, tokens, chat, True, max_tokens=40)
    assert text == "ab日éc" == asked(llm, tokens, chat, False, max_tokens=40)[0]
    assert [p for p in pieces if p] == list(text)


def test_the_turn_after_a_stop_equals_a_fresh_context(llm, byte_tokens, tiny_model):
    tokens = [byte_tokens[byte] for byte in SPELLED.encode()]
    messages = [{"role": "user", "content": "hi"}]
    text, _, _ = asked(llm, tokens, True, True, max_tokens=40, stop="DEFGHIJ")
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and now?"}]
    options = {"max_tokens": 12, "temperature": 0.0}
    fresh = FirstLlama(tiny_model("llama")[1], **F32)
    assert (
        llm.create_chat_completion(messages, **options)["choices"]
        == fresh.create_chat_completion(messages, **options)["choices"]
    )
    fresh.close()


def torch_logprobs(folder, mask, prompt, following, prefill) -> np.ndarray:
    logits = tiny.gold(folder, mask, prompt, following, prefill)
    return torch.log_softmax(torch.from_numpy(logits), -1).numpy()


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_logprobs_with_echo_are_torchs(prefill, tiny_model):
    folder, path = tiny_model("llama")
    llm = FirstLlama(path, mask=[1, 0, 1, 1], prefill=prefill, logits_all=True, **F32)
    prompt = [1, *tiny.prompt(19)]
    kept: list[int] = prompt[1:]  # echo leaves out BOS
    for top in (0, 1, 5, 10_000):
        result = llm.create_completion(prompt, max_tokens=6, temperature=0.0, echo=True, logprobs=top)
        found = result["choices"][0]["logprobs"]
        generated = [int(t) for t in llm.input_ids[20 : llm.n_tokens]]
        truth = torch_logprobs(folder, [1, 0, 1, 1], prompt, generated, prefill)
        generated.append(int(truth[-1].argmax()))
        n = len(found["tokens"])
        assert n == len(kept) + result["usage"]["completion_tokens"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        for i, token in enumerate([*kept, *generated][1:n], 1):
            assert found["tokens"][i] == llm.detokenize([token]).decode("utf-8", "ignore")
            assert abs(found["token_logprobs"][i] - truth[i, token]) < 1e-3
            # Tokens that are no text of their own share one entry; the likeliest must be there if it is text.
            best = int(truth[i].argmax())
            name = llm.detokenize([best]).decode("utf-8", "ignore")
            if top and name:
                assert abs(found["top_logprobs"][i][name] - truth[i, best]) < 1e-3
            assert 1 <= len(found["top_logprobs"][i]) <= top + 1
    llm.close()


def test_logprobs_of_a_stream_are_those_of_the_whole_and_need_no_score_matrix(tiny_model):
    folder, path = tiny_model("llama")
    llm = FirstLlama(path, skip_layers=[1], **{**F32, "n_ctx": 512})
    prompt = tiny.prompt(12)
    options = {"max_tokens": 10, "temperature": 0.0, "logprobs": 3}
    whole = llm.create_completion(prompt, **options)
    merged: dict[str, list] = {}
    for chunk in llm.create_completion(prompt, stream=True, **options):
        for name, column in (chunk["choices"][0]["logprobs"] or {}).items():
            merged.setdefault(name, []).extend(column)
    expected = whole["choices"][0]["logprobs"]
    assert merged["tokens"] == expected["tokens"] and merged["text_offset"] == expected["text_offset"]
    assert len(merged["tokens"]) > 5
    np.testing.assert_allclose(merged["token_logprobs"], expected["token_logprobs"], atol=1e-4)
    for found, top in zip(merged["top_logprobs"], expected["top_logprobs"], strict=True):
        assert found == pytest.approx(top, abs=1e-4)
    generated = [int(t) for t in llm.input_ids[12 : llm.n_tokens]]
    truth = torch_logprobs(folder, [1, 0, 1, 1], prompt, generated, "full")
    for i, token in enumerate(generated):
        assert abs(merged["token_logprobs"][i] - truth[11 + i, token]) < 1e-3
    assert llm.scores.nbytes <= 4 * llm.n_vocab()
    with pytest.raises(InputError, match="logits_all"):
        llm.create_completion(prompt, echo=True, **options)
    with pytest.raises(InputError, match="logprobs is -1"):
        llm.create_completion(prompt, **{**options, "logprobs": -1})
    chat = llm.create_chat_completion(
        [{"role": "user", "content": "hi"}], max_tokens=3, temperature=0.0, logprobs=True, top_logprobs=2
    )
    assert len(chat["choices"][0]["logprobs"]["content"]) == chat["usage"]["completion_tokens"]
    json.dumps(chat)
    llm.close()


def test_top_logprobs_come_best_first_as_the_parents(llm):
    """Also in a chat, whose list the parent makes of them."""
    options = {"max_tokens": 6, "temperature": 0.0, "logprobs": 4}
    for row in llm.create_completion("the quick", **options)["choices"][0]["logprobs"]["top_logprobs"]:
        assert list(row.values()) == sorted(row.values(), reverse=True) and len(row) > 1
    chat = llm.create_chat_completion(
        [{"role": "user", "content": "hi"}], max_tokens=6, temperature=0.0, logprobs=True, top_logprobs=4
    )
    for entry in chat["choices"][0]["logprobs"]["content"]:
        values = [other["logprob"] for other in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True) and len(values) > 1


def test_offsets_of_an_echo_are_places_in_its_text(tiny_model):
    """Control tokens in the prompt have their names in the text."""
    _, path = tiny_model("llama")
    llm = FirstLlama(path, logits_all=True, **F32)
    for prompt in ("<|im_start|>user the quick<|im_end|>é brown", "<s>the quick", [1, *tiny.prompt(9)], "the"):
        for stream in (False, True):
            options = {"max_tokens": 4, "temperature": 0.0, "echo": True, "logprobs": 0, "stream": stream}
            answer = llm.create_completion(prompt, **options)
            choices = [chunk["choices"][0] for chunk in (answer if stream else [answer])]
            text = "".join(choice["text"] for choice in choices)
            values = [choice["logprobs"] for choice in choices if choice["logprobs"]]
            tokens = [t for value in values for t in value["tokens"]]
            offsets = [o for value in values for o in value["text_offset"]]
            assert offsets == sorted(offsets) and len(offsets) > 4
            for token, at in zip(tokens, offsets, strict=True):
                assert text[at:].startswith(token), (prompt, token, at)
    llm.close()


def test_long_tokens_are_shown_whole(tiny_model, tmp_path):
    """The parent's buffer holds 32 bytes; SmolLM2 has 47 tokens that are longer, lines of dashes among them."""
    from first_convert.ggufio import Entry, Gguf, rewrite

    source, key = Gguf(tiny_model("llama")[1]), "tokenizer.ggml.tokens"
    long = {30: "-" * 64, 31: "=" * 33}
    names = [long.get(i, name) for i, name in enumerate(source.get(key))]
    path = tmp_path / "long.gguf"
    rewrite(source, path, [Entry(key, "ARRAY", names, "STRING")], lambda name: name != key)
    llm = FirstLlama(path, **F32)
    assert llm.detokenize([30]) == long[30].encode() and llm.detokenize([5, 31]).endswith(long[31].encode())
    bias = {"max_tokens": 3, "temperature": 0.0, "logit_bias": {30: 100.0}}
    whole = llm.create_completion([1, 5], **bias)["choices"][0]["text"]
    assert (
        whole
        == 3 * long[30]
        == "".join(chunk["choices"][0]["text"] for chunk in llm.create_completion([1, 5], stream=True, **bias))
    )
    llm.close()


@pytest.mark.parametrize("token", [-1, tiny.VOCAB, 2**31])
def test_tokens_that_the_vocabulary_lacks_are_an_error(token, llm):
    """Some of them made llama.cpp end the process."""
    wrong = f"holds token {token}, the vocabulary has {tiny.VOCAB}"
    for call in (
        lambda: llm.create_completion([1, token]),
        lambda: list(llm.create_completion([1, token], stream=True)),
        lambda: llm.create_completion([1, 5], logit_bias={token: 5.0}),
        lambda: llm.detokenize([token]),
        lambda: next(llm.generate([1, token])),
    ):
        with pytest.raises(InputError, match=wrong):
            call()
    assert llm.create_completion([1, 5], max_tokens=2)["usage"]["completion_tokens"] <= 2


def test_echo_streams_as_it_answers(llm):
    for prompt in ("the quick", [1, *tiny.prompt(5)]):
        options = {"max_tokens": 5, "temperature": 0.0, "echo": True}
        whole = llm.create_completion(prompt, **options)["choices"][0]["text"]
        pieces = [c["choices"][0]["text"] for c in llm.create_completion(prompt, stream=True, **options)]
        assert "".join(pieces) == whole
        text = prompt if isinstance(prompt, str) else llm.detokenize(prompt).decode("utf-8", "ignore")
        assert whole.startswith(text)


def test_suffix_is_refused(llm):
    with pytest.raises(InputError, match="suffix"):
        llm.create_completion("the", suffix="dog")


@pytest.mark.parametrize(
    ("prompt", "options", "wrong"),
    [
        (b"the", {}, "the prompt is b'the'"),
        (["the"], {}, "the prompt holds 'the'"),
        ([1, 5.0], {}, "the prompt holds 5.0"),
        ("the", {"stop": 5}, "stop is 5"),
        ("the", {"stop": ["x", None]}, "stop is .*None"),
    ],
)
def test_prompts_and_stops_of_another_type_are_an_error(prompt, options, wrong, llm):
    with pytest.raises(InputError, match=wrong):
        llm.create_completion(prompt, **options)
