"""first-serve as a process of its own, spoken to by the real openai client."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import tiny

from pyfirst import FirstBatch, FirstLlama, InputError

CONTEXT = 128
# With this seed and the three after it no answer ends by itself.
LONG = {"prompt": "the quick", "max_tokens": 400, "temperature": 1, "seed": 20}
SOAK_SECONDS = float(os.environ.get("PYFIRST_SOAK_SECONDS", "20"))


@contextlib.contextmanager
def started(model, *options: str):
    """(base URL, process, file with its stderr: a pipe that nobody reads would stop it)."""
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    command = [sys.executable, "-m", "pyfirst.cli.serve", "-m", str(model), "--port", "0", "-t", "1", *options]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, "--parallel", "4", "-c", str(CONTEXT)], stderr=stderr)
    url = ""
    for _ in range(600):
        try:
            url = url or "".join(re.findall(r"(http://\S+)/v1\n", log.read_text()))
            assert httpx.get(f"{url}/health").json() == {"status": "ok"}
            break
        except (httpx.HTTPError, httpx.InvalidURL):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    try:
        yield url, process, log
    finally:
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM)
        log.unlink()


@pytest.fixture(scope="module")
def server(model):
    with started(model) as found:
        yield found


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60)


def metric(url: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def wait_until_idle(url: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if metric(url, "first_active_sequences") == 0 and metric(url, "first_waiting_requests") == 0:
            return True
        time.sleep(0.05)
    return False


def alone(model: Path, prompts: list[str], n: int, **options) -> list[dict]:
    with FirstBatch(model, n_parallel=1, n_ctx=CONTEXT) as batch:
        return [batch.generate([p], max_tokens=n, temperature=0.0, **options)[0] for p in prompts]


def test_completion_equals_a_solo_run(client, model):
    prompts = ["the quick brown fox", "Съешь же ещё", "def f(x):"]
    for prompt, truth in zip(prompts, alone(model, prompts, 12), strict=True):
        answer = client.completions.create(model="any", prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == truth["choices"][0]["text"]
        assert answer.choices[0].finish_reason == truth["choices"][0]["finish_reason"]
        assert answer.model_extra["first"] == truth["first"]
        assert answer.usage.completion_tokens == truth["usage"]["completion_tokens"]
    assert client.models.list().data == [client.models.retrieve("full")]
    with pytest.raises(openai.NotFoundError, match="no model 'other' here, only 'full'"):
        client.models.retrieve("other")


def test_chat_streams_what_it_answers(client):
    messages = [{"role": "user", "content": "the lazy dog"}]
    whole = client.chat.completions.create(model="any", messages=messages, max_tokens=16, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="any",
            messages=messages,
            max_completion_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": True},
            extra_body={"safety_identifier": "x", "prompt_cache_key": "y"},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[0].model_extra["first"] == whole.model_extra["first"]
    endless = client.chat.completions.create(model="any", messages=messages, temperature=0)
    assert endless.choices[0].finish_reason == "length" and endless.usage.total_tokens == CONTEXT
    arguments = {"model": "any", "messages": messages, "max_tokens": 8, "temperature": 1, "seed": 3}
    with client.chat.completions.stream(n=2, **arguments) as stream:  # openai's own way to join the deltas
        joined = stream.until_done().current_completion_snapshot
    several = client.chat.completions.create(n=2, **arguments)
    for ours, theirs in zip(joined.choices, several.choices, strict=True):
        assert (ours.message.role, ours.message.content) == ("assistant", theirs.message.content)


@pytest.mark.parametrize("ids", [False, True], ids=["texts", "token ids"])
def test_a_list_of_prompts_is_a_list_of_answers(ids, client, model):
    texts = ["the quick brown fox", "Съешь же ещё", "def f(x):", "a"]
    truth = alone(model, texts, 12)
    with FirstBatch(model, n_parallel=1, n_ctx=CONTEXT) as batch:
        prompts = [batch.tokenize(text) for text in texts] if ids else texts
    arguments = {"model": "any", "prompt": prompts, "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**arguments)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, expected in zip(answer.choices, truth, strict=True):
        assert choice.text == expected["choices"][0]["text"]
        assert choice.finish_reason == expected["choices"][0]["finish_reason"]
        assert choice.model_extra["first"] == expected["first"]
    assert answer.usage.prompt_tokens == sum(t["usage"]["prompt_tokens"] for t in truth)
    assert answer.usage.completion_tokens == sum(t["usage"]["completion_tokens"] for t in truth)
    streamed, ended = [""] * 4, 0
    usage = None
    for chunk in client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            ended += choice.finish_reason is not None
            assert choice.model_extra["first"] == truth[choice.index]["first"]
        usage = chunk.usage
    assert streamed == [choice.text for choice in answer.choices] and ended == 4
    assert usage == answer.usage
    one = client.completions.create(**{**arguments, "prompt": prompts[:1]})
    assert one.choices[0].text == streamed[0] and one.model_extra["first"] == truth[0]["first"]


def test_several_choices_have_seeds_of_their_own(client):
    arguments = {"model": "any", "prompt": "the quick", "max_tokens": 20, "temperature": 1}
    single = [client.completions.create(**arguments, seed=11 + i) for i in range(3)]
    several = client.completions.create(**arguments, seed=11, n=3)
    assert [c.text for c in several.choices] == [one.choices[0].text for one in single]
    assert len({c.text for c in several.choices}) == 3 and [c.index for c in several.choices] == [0, 1, 2]
    assert several.usage.prompt_tokens == single[0].usage.prompt_tokens
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in single)
    assert several.model_extra["first"] == single[0].model_extra["first"]
    last = client.completions.create(**arguments, seed=2**32 - 2, n=2)  # the next one is 0
    assert last.choices[1].text == client.completions.create(**arguments, seed=0).choices[0].text
    pairs = client.completions.create(**{**arguments, "prompt": ["the quick", "fox"]}, seed=11, n=2)
    assert [c.text for c in pairs.choices[:2]] == [c.text for c in several.choices[:2]]
    assert [c.index for c in pairs.choices] == [0, 1, 2, 3]
    chat = {"model": "any", "messages": [{"role": "user", "content": "the lazy dog"}], "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**chat, temperature=1, n=2)
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**chat, temperature=1, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [c.message.content for c in whole.choices] and streamed[0] != streamed[1]
    assert len({c.text for c in client.completions.create(**arguments, n=4).choices}) > 1


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_those_of_first_llama(top, client, model):
    llm = FirstLlama(model, n_ctx=CONTEXT, n_threads=1)
    prompts = ["the quick brown fox", "Съешь же ещё"]
    arguments = {"model": "any", "max_tokens": 12, "temperature": 0, "logprobs": top}
    answer = client.completions.create(prompt=prompts, **arguments)
    pieces: list[list] = [[], []]
    for chunk in client.completions.create(prompt=prompts, stream=True, **arguments):
        for choice in chunk.choices:
            pieces[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    for prompt, choice, streamed in zip(prompts, answer.choices, pieces, strict=True):
        truth = llm.create_completion(prompt, max_tokens=12, temperature=0, logprobs=top)["choices"][0]["logprobs"]
        found = choice.logprobs
        assert (found.tokens, found.text_offset) == (truth["tokens"], truth["text_offset"])
        assert found.token_logprobs == pytest.approx(truth["token_logprobs"], abs=1e-3)
        assert streamed == pytest.approx(found.token_logprobs, abs=1e-3)
        for ours, theirs in zip(found.top_logprobs, truth["top_logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
    without = client.completions.create(**{**arguments, "prompt": prompts[0], "logprobs": None})
    assert without.choices[0].logprobs is None and without.choices[0].text == answer.choices[0].text


def test_logprobs_of_a_chat(client):
    chat = {"model": "any", "messages": [{"role": "user", "content": "the lazy dog"}], "max_tokens": 12}
    arguments = {**chat, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**arguments).choices[0]
    entries = choice.logprobs.content
    raw = b"".join(bytes(entry.bytes) for entry in entries)
    assert raw.decode("utf-8", "ignore") == choice.message.content
    for entry in entries:
        values = [other.logprob for other in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert entry.logprob == values[0] <= 0 and entry.bytes == entry.top_logprobs[0].bytes  # greedy
    streamed = []
    for chunk in client.chat.completions.create(**arguments, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in entries], abs=1e-3)
    bare = client.chat.completions.create(**{**arguments, "top_logprobs": None}).choices[0].logprobs.content
    assert [entry.logprob for entry in bare] == pytest.approx([entry.logprob for entry in entries], abs=1e-3)
    assert not any(entry.top_logprobs for entry in bare)
    assert client.chat.completions.create(**chat).choices[0].logprobs is None


def test_the_first_field_decides_layers(client, model):
    def first(**options):
        body = {"first": options}
        answer = client.completions.create(
            model="any", prompt="the quick", max_tokens=4, temperature=0, extra_body=body
        )
        return answer.choices[0].text, answer.model_extra["first"]

    assert 0 < first()[1]["kept"] < 4
    assert first(dense=True)[1]["kept"] == 4
    assert first(threshold=1.0)[1]["kept"] == 0
    assert first(threshold=0.0)[1]["kept"] == 4
    forced = first(mask=[True, False, True, True])
    truth = alone(model, ["the quick"], 4, masks=[[1, 0, 1, 1]])[0]
    assert forced == (truth["choices"][0]["text"], truth["first"])
    assert (first(skip=0.0)[1]["kept"], first(skip=0.8)[1]["kept"]) == (4, 0)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--dense", {"routing": False}),
        ("--skip 0%", {"skip": 0.0}),
        ("--skip 0.8", {"skip": 0.8}),
        ("--threshold 0.1", {"threshold": 0.1}),
        ("--prefill skip", {"prefill": "skip"}),
    ],
)
def test_options_of_first_serve_decide_what_requests_leave_open(options, settings, model, monkeypatch):
    """By what a server in this process answers, without the network."""
    from fastapi.testclient import TestClient

    from pyfirst.cli import serve
    from pyfirst.server import create_app

    found = []

    class Local:
        def __init__(self, engine, level, origins):
            self.engine = engine

        def run(self, sockets):
            batch = self.engine.batch
            assert (batch.n_parallel, batch.n_ctx, batch.n_threads, self.engine.max_waiting) == (3, 96, 1, 5)
            with TestClient(create_app(self.engine)) as web:
                found.append(web.post("/v1/completions", json={"prompt": "the quick", "temperature": 0}).json())

    monkeypatch.setattr("pyfirst.server.Server", Local)
    command = ["-m", str(model), "--port", "0", "--parallel", "3", "-c", "96", "-t", "1", "--queue", "5"]
    assert serve.main(command) == serve.main([*command, *options.split()]) == 0
    truth = FirstLlama(model, n_ctx=96, n_threads=1, **settings).create_completion("the quick", temperature=0)
    assert found[1]["choices"][0]["text"] == truth["choices"][0]["text"]
    assert found[1]["first"] == truth["first"] != found[0]["first"]


@contextlib.contextmanager
def bystander(client, model):
    """A client whose answers must stay what they are alone, whatever others send meanwhile."""
    truth = alone(model, ["the quick brown fox"], 20)[0]["choices"][0]["text"]
    answers, done = [], threading.Event()

    def ask() -> None:
        arguments = {"model": "any", "prompt": "the quick brown fox", "max_tokens": 20, "temperature": 0}
        while not done.is_set():
            answers.append(client.completions.create(**arguments).choices[0].text)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            done.set()
        asking.result()
    assert answers and set(answers) == {truth}


def test_bad_requests_are_400_and_the_server_goes_on(server, client, model):
    url = server[0]
    good = {"prompt": "the quick", "max_tokens": 2, "temperature": 0}
    bad = (
        ("completions", {**good, "prompt": ""}),
        ("completions", {**good, "prompt": []}),
        ("completions", {**good, "prompt": "the quick " * 200}),
        ("completions", {**good, "prompt": [99999]}),
        ("completions", {**good, "tempreature": 1}),
        ("completions", {**good, "max_tokens": 0}),
        ("completions", {**good, "n": 0}),
        ("completions", {**good, "n": 65}),
        ("completions", {**good, "prompt": ["the", "quick"], "n": 33}),
        ("completions", {**good, "prompt": ["the", ""]}),
        ("completions", {**good, "prompt": [[5, 6], []]}),
        ("completions", {**good, "prompt": [[5, 6], [99999]]}),
        ("completions", {**good, "prompt": ["the", [5, 6]]}),
        ("completions", {**good, "prompt": ["the", "quick " * 200]}),
        ("completions", {**good, "logprobs": -1}),
        ("completions", {**good, "logprobs": 21}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "logprobs": 2}),
        ("completions", {**good, "temperature": -1}),
        ("completions", {**good, "first": {"mask": [True]}}),
        ("completions", {**good, "first": {"mask": [True] * 4, "dense": True}}),
        ("completions", {**good, "first": {"treshold": 1}}),
        ("completions", {**good, "first": {"threshold": "low"}}),
        ("completions", {**good, "first": {"mask": [1, 2, 3, 4]}}),
        ("completions", {**good, "first": {"skip": 1.5}}),
        ("completions", {**good, "first": []}),
        ("completions", {**good, "seed": -2}),
        ("completions", {**good, "temperature": float("nan")}),
        ("completions", {**good, "seed": 2**32}),
        ("completions", {**good, "top_p": 0}),
        ("completions", {**good, "repeat_penalty": 0}),
        ("completions", {**good, "stop": [3]}),
        ("completions", {**good, "prompt": "\ud800"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("chat/completions", {"messages": [{"content": "hi"}]}),
        ("chat/completions", {"messages": []}),
        ("chat/completions", {"messages": "hello"}),
        ("chat/completions", {"messages": [5] * 200_000}),
        ("chat/completions", {}),
        ("completions", {**good, "prompt": [True]}),
        ("completions", {**good, "prompt": [5.5] * 200_000}),
        ("completions", {**good, "prompt": ["a"] * 200_000}),
        ("completions", {**good, **{f"unknown{i}": i for i in range(50_000)}}),
        ("completions", {**good, "n": "2"}),
        ("completions", {**good, "n": True}),
        ("completions", {**good, "n": 10**30}),
        ("completions", {**good, "max_tokens": -1}),
        ("completions", {**good, "max_tokens": True}),
        ("completions", {**good, "temperature": "hot"}),
        ("completions", {**good, "temperature": 10**400}),
        ("completions", {**good, "top_k": 2**32 + 1}),
        ("completions", {**good, "stop": 3}),
        ("completions", {**good, "stop": [["a"]]}),
        ("completions", {**good, "stop": ["x"] * 65}),
        ("completions", {**good, "model": "x" * 300}),
        ("completions", {**good, "stream": 5}),
        ("completions", {**good, "stream": True, "stream_options": {"usage": True}}),
        ("completions", {**good, "first": {"threshold": 10**400}}),
        ("completions", {**good, "first": {"threshold": float("nan")}}),
        ("completions", {**good, "first": {"mask": [True] * 100_000}}),
        ("completions", 5),
        ("completions", None),
    )
    with bystander(client, model):
        for path, body in bad:
            raw = json.dumps(body).encode()  # httpx would refuse half a surrogate pair and NaN itself
            answer = httpx.post(f"{url}/v1/{path}", content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (path, raw[:200], answer.text)
            assert 0 < len(answer.json()["error"]["message"]) <= 1000
    too_long = httpx.post(f"{url}/v1/completions", json={**good, "prompt": [5] * 200}).json()
    assert "200 tokens" in too_long["error"]["message"] and str(CONTEXT) in too_long["error"]["message"]
    short = httpx.post(f"{url}/v1/completions", json={**good, "first": {"mask": [True]}}).json()
    assert "[1]" in short["error"]["message"] and "4 layers" in short["error"]["message"]
    assert client.completions.create(model="any", **good).choices[0].text is not None
    nulls = dict.fromkeys(("temperature", "stop", "n", "first", "logit_bias"))
    assert httpx.post(f"{url}/v1/completions", json={**good, **nulls}).status_code == 200


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("echo", [False], True),
        ("best_of", [1], 2),
        ("suffix", ["", None], "x"),
        ("logit_bias", [{}], {"5": 1}),
        ("response_format", [{"type": "text"}], {"type": "json_object"}),
        ("tools", [[]], [{"type": "function"}]),
        ("tool_choice", ["none", "auto"], "required"),
        ("parallel_tool_calls", [True, False], "yes"),
        ("store", [False], True),
        ("metadata", [{}], {"a": "b"}),
        ("service_tier", ["auto", "default"], "flex"),
        ("functions", [[], None], [{"name": "f"}]),
        ("function_call", ["none", "auto"], {"name": "f"}),
    ],
)
def test_fields_that_we_lack_may_ask_for_nothing(field, neutral, other, client):
    arguments = {"model": "any", "prompt": "the quick", "max_tokens": 2, "temperature": 0}
    truth = client.completions.create(**arguments).choices
    for value in neutral:
        assert client.completions.create(**arguments, extra_body={field: value}).choices == truth
    with pytest.raises(openai.BadRequestError, match=f"{field} .* is not supported"):
        client.completions.create(**arguments, extra_body={field: other})


def test_bad_bodies_are_refused_and_the_server_goes_on(server, client, model):
    """Not JSON, not text, too large; nothing is read for longer than it takes to see that it does not fit."""
    url, process, _ = server
    target, kind = f"{url}/v1/completions", {"content-type": "application/json"}
    whole = json.dumps({"prompt": "a" * 9_000_000}).encode()
    with bystander(client, model):
        before = psutil.Process(process.pid).memory_info().rss
        for raw, status in (
            (b"", 400),
            (b"{not json", 400),
            (b'{"prompt": "the', 400),
            (b'{"prompt": "\xff\xfe"}', 400),
            (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
            (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", 400),
            (whole, 413),
            (b'{"prompt": [' + b"5," * 20_000_000 + b"5]}", 413),
            ((whole[i : i + 500_000] for i in range(0, len(whole), 500_000)), 413),  # of unknown length
        ):
            answer = httpx.post(target, content=raw, headers=kind, timeout=30)
            assert answer.status_code == status and answer.json()["error"]["message"]
        for character in ("a", " ", "1", "日", "\n"):
            answer = httpx.post(target, json={"prompt": character * 2_000_000}, timeout=30)
            assert answer.status_code == 400
            found = re.search(r"has (\d+) tokens or more, a sequence holds 128", answer.json()["error"]["message"])
            assert found and int(found[1]) >= CONTEXT
        assert psutil.Process(process.pid).memory_info().rss - before < 100e6
    for headers in ({"content-type": "text/plain"}, {}):
        answer = httpx.post(target, content=b'{"prompt": "a"}', headers=headers)
        assert answer.status_code == 400 and "expected application/json" in answer.json()["error"]["message"]
    assert httpx.head(f"{url}/health").status_code == 200
    for method, path, status in (("GET", "/v1/nowhere", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_template_that_refuses_is_400(model, tmp_path, tiny_model):
    from fastapi.testclient import TestClient

    from pyfirst.server import Engine, create_app

    batch = FirstBatch(model, n_parallel=1, n_ctx=CONTEXT)
    batch.metadata["tokenizer.chat_template"] = "{{ raise_exception('roles must alternate: ' + messages[0]['role']) }}"
    with TestClient(create_app(Engine(batch))) as web:
        for role in ("user", "\ud800"):
            raw = json.dumps({"messages": [{"role": role, "content": "x"}]})
            answer = web.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and "roles must alternate" in answer.text
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as for two operations of one name
            assert web.get("/openapi.json").status_code == web.head("/health").status_code == 200
        assert web.post("/v1/completions", json={"prompt": "the", "max_tokens": 1}).status_code == 200


def test_only_pages_that_are_allowed_may_ask_from_a_browser(model):
    from fastapi.testclient import TestClient

    from pyfirst.server import Engine, create_app

    page, other = "http://localhost:3000", "http://elsewhere.example"
    for origins in ([], [page]):
        with TestClient(create_app(Engine(FirstBatch(model, n_parallel=1, n_ctx=CONTEXT)), origins)) as web:
            for origin in (page, other):
                allowed = page if origin in origins else None
                asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
                answer = web.options("/v1/completions", headers={"origin": origin, **asks})
                assert answer.headers.get("access-control-allow-origin") == allowed
                for body, status in (({"prompt": "the", "max_tokens": 1}, 200), ({"prompt": 1}, 400)):
                    answer = web.post("/v1/completions", json=body, headers={"origin": origin})
                    assert answer.status_code == status
                    assert answer.headers.get("access-control-allow-origin") == allowed


def test_a_port_is_taken_before_the_model_is_loaded():
    from pyfirst.cli.serve import _bind

    with _bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=f"--host 127.0.0.1 --port {port}: .* in use"):
            _bind("127.0.0.1", port)


@contextlib.contextmanager
def slowed(model, monkeypatch, seconds_per_token: float):
    """(base URL, batch) of a server in this process whose steps take as long as a large model's."""
    from pyfirst.cli.serve import _bind
    from pyfirst.server import Engine, Server

    decode = FirstBatch._decode

    def slow(self):
        end = time.monotonic() + seconds_per_token * self._batch.n_tokens
        while time.monotonic() < end and not self._abort.on:
            time.sleep(min(seconds_per_token, 0.01))
        decode(self)

    monkeypatch.setattr(FirstBatch, "_decode", slow)
    batch = FirstBatch(model, n_parallel=4, n_ctx=512, n_threads=1)
    server, bound = Server(Engine(batch), "error"), _bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", batch
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.mark.parametrize("what", ["stream", "whole", "four choices", "list", "prompt", "prompt that decides"])
def test_hung_up_clients_free_their_sequences_within_a_second(what, files, monkeypatch):
    """Answers that would go on for a long time, and a prompt that takes ten seconds to read, in "skip" at once."""
    body, n = {**LONG, "stream": True}, 1
    if what == "whole":
        body["stream"] = False
    elif what == "four choices":
        body["n"] = n = 4
    elif what == "list":
        body["prompt"], n = ["a", "b", "c"], 3
    elif "prompt" in what:
        body["prompt"] = tiny.prompt(500)
    with slowed(files["skip" if what == "prompt that decides" else "full"][2], monkeypatch, 0.02) as (url, batch):
        for _ in range(3):
            with httpx.Client() as http, contextlib.suppress(httpx.TimeoutException):
                request = http.build_request("POST", f"{url}/v1/completions", json=body, timeout=0.5)
                lines = http.send(request, stream=True).iter_lines()
                while batch.n_active < n:
                    next(lines)
            assert batch.n_active == n
            hung_up = time.monotonic()
            while batch.n_active or batch.n_waiting:
                assert time.monotonic() - hung_up < 1, what
                time.sleep(0.01)
            print(f"{what}: free after {time.monotonic() - hung_up:.3f} s")


def test_hung_up_clients_leave_nothing_behind(server):
    url = server[0]
    body = {"prompt": "the quick", "max_tokens": 100, "temperature": 1, "stop": None, "n": 2}
    for stream in (True, False):
        for _ in range(6):
            with httpx.Client() as http, contextlib.suppress(httpx.TimeoutException):
                body["stream"] = stream
                with http.stream("POST", f"{url}/v1/completions", json=body, timeout=0.3) as answer:
                    next(answer.iter_lines())
        assert wait_until_idle(url, 10)


def test_metrics_count_what_was_done(server, client):
    url = server[0]
    names = ("requests_total", "tokens_total", "layers_kept_total", "layers_total", "busy_seconds_total")
    before = [metric(url, f"first_{name}") for name in names]
    answer = client.completions.create(model="any", prompt="the quick", max_tokens=7, temperature=0)
    after = [metric(url, f"first_{name}") for name in names]
    kept = answer.model_extra["first"]["kept"]
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert grown[:4] == [1, answer.usage.completion_tokens, kept, 4] and grown[4] > 0
    text = httpx.get(f"{url}/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in text.text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) first_\w+ .+|first_\w+ [\d.e+-]+", line), line
    assert metric(url, "first_tokens_per_second") > 0


def test_a_seed_is_the_same_answer_alone_and_among_others(client):
    arguments = {"model": "any", "prompt": "the quick", "max_tokens": 20, "temperature": 1, "seed": 11}
    text = client.completions.create(**arguments).choices[0].text
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(client.completions.create, **{**arguments, "seed": i}) for i in range(5)]
        again = pool.submit(client.completions.create, **arguments)
        assert again.result().choices[0].text == text
        assert len({other.result().choices[0].text for other in others}) > 1


def test_streams_hide_stop_strings_and_add_up(client):
    arguments = {"model": "any", "prompt": "the quick brown", "max_tokens": 30, "temperature": 1, "seed": 3}
    whole = client.completions.create(**arguments).choices[0].text
    for stop in (whole[4:7], whole[9], [whole[12:15], whole[5:8]]):
        answer = client.completions.create(**arguments, stop=stop).choices[0]
        chunks = [c.choices[0] for c in client.completions.create(**arguments, stop=stop, stream=True)]
        assert "".join(c.text for c in chunks) == answer.text
        assert answer.finish_reason == chunks[-1].finish_reason == "stop"
        stops = [stop] if isinstance(stop, str) else stop
        assert whole.startswith(answer.text) and not any(s in answer.text for s in stops)


def test_chat_takes_content_in_parts(client):
    parts = [{"type": "text", "text": "the lazy "}, {"type": "text", "text": "dog"}]
    arguments = {"model": "any", "max_tokens": 8, "temperature": 0}
    joined = client.chat.completions.create(messages=[{"role": "user", "content": "the lazy dog"}], **arguments)
    answer = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **arguments)
    assert answer.choices == joined.choices and answer.usage == joined.usage


def test_a_full_queue_is_429_and_empties(model):
    from fastapi.testclient import TestClient

    from pyfirst.server import Engine, create_app

    engine = Engine(FirstBatch(model, n_parallel=1, n_ctx=CONTEXT), max_waiting=2)
    with TestClient(create_app(engine)) as web, ThreadPoolExecutor(12) as pool:
        body = {"prompt": "the quick", "max_tokens": 60, "temperature": 1}
        found = list(pool.map(lambda _: web.post("/v1/completions", json=body), range(12)))
        codes = [r.status_code for r in found]
        assert set(codes) == {200, 429} and codes.count(200) >= 3
        assert {r.json()["error"]["type"] for r in found if r.status_code == 429} == {"rate_limit_error"}
        assert web.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 200
        # Whatever goes wrong inside is an answer too, and the next request is served.
        step = engine.batch.step
        engine.batch.step = lambda: (_ for _ in ()).throw(RuntimeError("llama_decode returned -3"))  # type: ignore[method-assign]
        broken = web.post("/v1/completions", json=body)
        assert broken.status_code == 500 and "llama_decode" in broken.json()["error"]["message"]
        engine.batch.step = step  # type: ignore[method-assign]
        assert web.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 200
    assert not engine.jobs and not engine.batch._routings


def test_only_requests_wait(model, monkeypatch):
    """What tells the engine that an answer has ended is no request, however long the step takes."""
    import asyncio

    from pyfirst.batch import Request
    from pyfirst.server import Engine

    step, inside, go = FirstBatch.step, threading.Event(), threading.Event()

    def held(self):
        inside.set()
        assert go.wait(60)
        return step(self)

    monkeypatch.setattr(FirstBatch, "step", held)
    engine = Engine(FirstBatch(model, n_parallel=2, n_ctx=CONTEXT))

    async def client() -> None:
        (job,) = engine.submit([Request([5, 6, 7], max_tokens=2)])
        assert await asyncio.to_thread(inside.wait, 60)
        for _ in range(5):
            engine.cancel(job)
        assert engine.n_waiting == 1  # it was submitted; the step that gives it a place has not begun
        others = engine.submit([Request([5, 6, 7], max_tokens=2) for _ in range(3)])
        assert engine.n_waiting == 4
        engine.cancel(others[2])
        go.set()
        for _ in range(2):
            while (await others[0].updates.get())[1].finish_reason is None:  # type: ignore[union-attr]
                pass
        assert engine.n_waiting == 0

    try:
        asyncio.run(client())
    finally:
        go.set()
        engine.close()


def test_requests_during_shutdown_end_and_the_process_too(model):
    with started(model) as (url, process, log):
        body = {"prompt": "the quick", "max_tokens": 100, "temperature": 1, "stream": True}

        def ask(_: int) -> str:
            try:
                return httpx.post(f"{url}/v1/completions", json=body, timeout=30).text
            except httpx.HTTPError as error:
                return type(error).__name__

        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(ask, i) for i in range(12)]
            time.sleep(0.3)
            process.terminate()
            assert process.wait(30) in (0, -signal.SIGTERM)
            assert all(answer.result(30) for answer in answers)
        assert "Traceback" not in log.read_text()


def test_what_shutting_down_ends_is_told_so(model, monkeypatch, capfd):
    monkeypatch.setattr("pyfirst.server.GRACE", 0.5)
    with ThreadPoolExecutor(8) as pool:
        with slowed(model, monkeypatch, 0.02) as (url, batch):
            bodies = [{**LONG, "stream": i % 2 == 1} for i in range(8)]
            asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=b, timeout=60) for b in bodies]
            while batch.n_active + batch.n_waiting < len(asked):
                time.sleep(0.01)
        for i, answer in enumerate(found.result() for found in asked):
            event = answer.text.rstrip().rpartition("data: ")[2] if i % 2 else answer.text
            assert json.loads(event)["error"]["message"] == "the server is shutting down"
            assert answer.status_code == (200 if i % 2 else 503)
    assert capfd.readouterr().err == ""


def test_flash_attention_is_switched_on(model):
    """The log-probabilities tell: it rounds differently."""
    asked = {"prompt": "the quick brown fox", "max_tokens": 6, "temperature": 0.0, "logprobs": 0}
    found = []
    for flash_attn in (False, True):
        with FirstBatch(model, n_parallel=4, n_ctx=CONTEXT, n_threads=1, flash_attn=flash_attn) as batch:
            options = {name: value for name, value in asked.items() if name != "prompt"}
            found.append(batch.generate([asked["prompt"]], **options)[0]["choices"][0]["logprobs"])
    assert found[0] != found[1]
    with started(model, "-fa", "on") as (url, _, _):
        assert httpx.post(f"{url}/v1/completions", json=asked).json()["choices"][0]["logprobs"] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-c", "1"], "-c is 1"),
        (["-t", "0"], "-t is 0"),
        (["--parallel", "0"], "--parallel is 0"),
        (["--parallel", "10000"], "10000"),
        (["--queue", "0"], "--queue is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--port", "-1"], "--port is -1"),
        (["--port", "{taken}"], "in use"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--dense", "--threshold", "0.5"], "--dense and --threshold"),
        (["--skip", "20"], "--skip is '20'"),
        (["-m", "absent.gguf"], "no such file"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_wrong_options_are_one_line_and_exit_code_2(options, message, model, server, capfd):
    from pyfirst.cli import serve

    options = [option.format(taken=server[0].rpartition(":")[2]) for option in options]
    assert serve.main(["-m", str(model), "--port", "0", *options]) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("first-serve: error: ") and message in said


def test_sixteen_clients_half_of_them_hanging_up(server, model):
    """No crash, no leak, every answer as if alone. PYFIRST_SOAK_SECONDS=300 makes it a soak test."""
    url, process, log = server
    prompts = [f"{word} {tail}" for word in tiny.TEXT.split()[:8] for tail in ("is", "fox jumps", "日本")]
    truth = dict(zip(prompts, alone(model, prompts, 16), strict=True))
    wrong: list[str] = []
    streamed: list[str] = []
    finished = [0]
    end = time.monotonic() + SOAK_SECONDS

    def work(number: int) -> None:
        rng = random.Random(number)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        while time.monotonic() < end:
            prompt = rng.choice(prompts)
            arguments = {"model": "any", "prompt": prompt, "max_tokens": 16, "temperature": 0}
            try:
                expected = truth[prompt]["choices"][0]["text"]
                if number % 2:  # every other stream is read to its end
                    with client.completions.create(stream=True, **arguments) as stream:
                        parts = list(itertools.islice(stream, rng.choice((None, rng.randint(1, 6)))))
                    text = "".join(part.choices[0].text for part in parts)
                    if parts[-1].choices[0].finish_reason is None:
                        expected = expected[: len(text)]
                    else:
                        streamed.append(text)
                    first = parts[0].model_extra["first"]
                else:
                    answer = client.completions.create(**arguments)
                    text, first = answer.choices[0].text, answer.model_extra["first"]
                    finished[0] += 1
                if (text, first) != (expected, truth[prompt]["first"]):
                    wrong.append(f"{prompt!r}: {text!r}")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    memory = psutil.Process(process.pid)
    time.sleep(SOAK_SECONDS / 4)
    early = memory.memory_info().rss
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    assert finished[0] > 16 and len(streamed) > 16
    assert wait_until_idle(url, 1.0)
    late = memory.memory_info().rss
    print(f"{finished[0]} answers, {late / 1e6:.1f} MB, {late / early - 1:+.2%} since a quarter of the time")
    assert late < early * 1.02
    assert log.read_text().count("\n") == 1, log.read_text()[:2000]
    assert process.poll() is None
