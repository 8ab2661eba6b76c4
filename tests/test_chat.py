"""Chat templates: the prompt is Hugging Face's, token for token, and refusals are typed."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import pytest

from first_convert.ggufio import Entry, Gguf, rewrite
from pyfirst import FirstBatch, FirstLlama, InputError
from pyfirst.chat import ChatTemplate
from pyfirst.cli.many import run_many
from pyfirst.cli.session import Session

KEY = "tokenizer.chat_template"
CHATS = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": "Be brief. 日本"},
        {"role": "user", "content": " hello \n"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "and?"},
    ],
]
# Written by the template beside a BOS that the tokenizer would add as well.
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture
def other(tiny_model, tmp_path):
    """(template or None, add BOS) -> a GGUF with that template."""

    def make(template: str | None, add_bos: bool = False) -> Path:
        added = [Entry("tokenizer.ggml.add_bos_token", "BOOL", add_bos)]
        added += [] if template is None else [Entry(KEY, "STRING", template)]
        names = {KEY, "tokenizer.ggml.add_bos_token"}
        rewrite(Gguf(tiny_model("llama")[1]), tmp_path / "m.gguf", added, lambda found: found not in names)
        return tmp_path / "m.gguf"

    return make


def test_an_empty_template_is_none_and_a_broken_one_is_named_once(other):
    path = other("")
    assert FirstLlama(path, n_ctx=64).create_completion("the", max_tokens=1)["usage"]["completion_tokens"] == 1
    with pytest.raises(InputError) as caught:
        FirstLlama(other("{% if %}"), n_ctx=64)
    assert str(caught.value).startswith(f"{path}: the chat template does not parse: ")


@pytest.mark.parametrize("template", [None, WITH_BOS], ids=["own", "with BOS"])
@pytest.mark.parametrize("messages", CHATS, ids=["short", "long"])
def test_token_ids_are_hugging_faces(messages, template, tiny_model, other, tmp_path):
    from fastapi.testclient import TestClient
    from transformers import AutoTokenizer

    from pyfirst.server import Engine, create_app

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama")[0])
    tokenizer.chat_template = template or tokenizer.chat_template
    path = other(tokenizer.chat_template, add_bos=True)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    with FirstBatch(path, n_parallel=1, n_ctx=256) as batch:
        assert batch.tokenize("x")[0] == tokenizer.bos_token_id  # or the test shows nothing
        prompt = ChatTemplate(str(path), batch.metadata, batch.vocab).render(messages)
        assert batch.tokenize(prompt, add_bos=False) == expected
        with TestClient(create_app(Engine(batch))) as web:
            answer = web.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(expected)
    with Session(str(path)) as session:
        assert session.tokens(messages) == expected
        llm = session.llm
        llm.create_chat_completion(messages, max_tokens=1)
        assert llm.input_ids[: len(expected)].tolist() == expected
    run_many(str(path), [json.dumps({"messages": messages}).encode()], n_predict=1, out=tmp_path / "answers.jsonl")
    assert json.loads((tmp_path / "answers.jsonl").read_text())["usage"]["prompt_tokens"] == len(expected)
    if template:
        assert expected[0] == tokenizer.bos_token_id != expected[1]


def test_parts_are_joined_where_the_template_wants_text(tiny_model, other):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    llm = FirstLlama(tiny_model("llama")[1])
    template = llm.chat_template
    assert template.render(parts) == template.render([{"role": "user", "content": "ab"}])
    options = {"max_tokens": 4, "temperature": 0.0}
    joined = [{"role": "user", "content": "ab"}]
    assert (
        llm.create_chat_completion(parts, **options)["choices"]
        == llm.create_chat_completion(joined, **options)["choices"]
    )
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(InputError, match="image_url"):
        llm.create_chat_completion(image)
    with pytest.raises(InputError, match="'text' whose text is missing"):
        llm.create_chat_completion([{"role": "user", "content": [{"type": "text"}]}])
    reads_parts = FirstLlama(other(PARTS))
    assert reads_parts.chat_template.render(parts) == "[a][b]"
    with pytest.raises(InputError, match="image_url"):
        reads_parts.create_chat_completion(image)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nope.deeper }}", "no attribute"),
        ("{{ messages[0]['content'] + 3 }}", "concatenate"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe|access"),
        (None, "no chat template"),
    ],
)
def test_refusals_carry_the_templates_words_and_the_model_goes_on(template, message, other):
    path = other(template)
    llm = FirstLlama(path)
    for stream in (False, True):
        with pytest.raises(InputError, match=message):
            list(llm.create_chat_completion(CHATS[0], stream=stream))
    assert llm.create_completion("the quick", max_tokens=2)["choices"]
    with FirstBatch(path, n_parallel=1) as batch:
        with pytest.raises(InputError, match=message):
            ChatTemplate(str(path), batch.metadata, batch.vocab).render(CHATS[0])
        assert batch.generate(["the quick"], max_tokens=2)


def test_a_template_that_does_not_parse_is_an_input_error(other):
    path = other("{% for m in messages %}{{ m }")
    with pytest.raises(InputError, match="does not parse"):
        FirstLlama(path)
    with FirstBatch(path, n_parallel=1) as batch, pytest.raises(InputError, match="does not parse"):
        ChatTemplate(str(path), batch.metadata, batch.vocab)


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "x"}], [{"role": 3, "content": "x"}], [None]])
def test_what_are_no_messages_is_refused(messages, tiny_model):
    llm = FirstLlama(tiny_model("llama")[1])
    with pytest.raises(InputError, match="message"):
        llm.create_chat_completion(messages)


def test_a_format_that_was_asked_for_is_used(tiny_model):
    path = tiny_model("llama")[1]
    llm, later = FirstLlama(path, chat_format="llama-2"), FirstLlama(path)
    assert later.chat_format == llama_cpp.Llama(str(path), verbose=False).chat_format == "chat_template.default"
    later.chat_format = "llama-2"
    for one in (llm, later):
        one.create_chat_completion(CHATS[0], max_tokens=1)
        assert b"[INST]" in one.detokenize(one.input_ids[: one.n_tokens].tolist())
        one.chat_format = "chat_template.default"
        one.create_chat_completion(CHATS[0], max_tokens=1)
        assert one.input_ids[: one.n_tokens].tolist() == one.chat_tokens(CHATS[0])
