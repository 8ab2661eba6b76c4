"""An OpenAI-compatible server whose requests share one batch, each with its own layers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import reprlib
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyfirst.batch import FirstBatch, Request, Update, first_options
from pyfirst.chat import ChatTemplate
from pyfirst.completion import TokenLogprob, chat_logprobs, completion_logprobs
from pyfirst.errors import InputError
from pyfirst.llama import Routing

# The likeliest tokens that a request may ask for at each place, as at OpenAI.
MAX_LOGPROBS = 20
# Each is looked for after every token.
MAX_STOPS = 64
# Bytes of a request: 64 prompts of 8000 tokens are about 2 MB.
MAX_BODY = 8 * 2**20
# Seconds that requests have once the server is told to end, and that answers have to leave it after that.
GRACE, LEAVE = 5, 3
# Characters that take long enough to tokenize that other clients must be served meanwhile.
LONG_TEXT = 2_000
# Fields of the OpenAI API that we lack, with the values that ask for nothing: clients send them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "include_obfuscation": (False, True),  # of stream_options
}


class _Body(BaseModel):
    """Unknown fields are refused, so that no setting is lost in silence; null is as good as absent.

    Of long lists the entries are not checked here: pydantic keeps a record of each that is wrong.
    """

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {n: value for n, value in data.items() if value is not None and value not in NEUTRAL.get(n, ())}
        for name, value in given.items():
            if name in NEUTRAL:
                only = " or ".join(map(json.dumps, NEUTRAL[name]))
                raise ValueError(f"{name} {reprlib.repr(value)} is not supported (only {only})")
            if name not in cls.model_fields:
                raise ValueError(f"unknown field {reprlib.repr(name)} (known: {', '.join(cls.model_fields)})")
        return given


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False


class Common(_Body):
    """What both kinds of completion take."""

    model: str | None = Field(None, max_length=256)
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[Any] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    first: dict[str, Any] = {}


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | list[Any]
    max_tokens: int = 16
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Any]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


@dataclass
class _Job:
    """A request on its way through the engine; updates reach the event loop that waits for them.

    Attributes:
        index: place among the choices of the answer, which share ``updates``.
    """

    request: Request
    index: int
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[tuple[_Job, Update | BaseException]]
    handle: int = -1
    routing: Routing | None = None
    n_generated: int = 0
    cancelled: bool = False

    def put(self, item: Update | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(self.updates.put_nowait, (self, item))


class Engine:
    """Runs a FirstBatch in a thread of its own, the only one that computes.

    Requests are tokenized and checked outside of it.

    Args:
        batch: closed with the engine.
        max_waiting: requests beyond this are refused.
        step_seconds: how long a step should take at most, prompts are read in pieces accordingly: what comes in
            meanwhile waits for its end, clients that hang up among them.
    """

    def __init__(self, batch: FirstBatch, max_waiting: int = 64, step_seconds: float = 0.5):
        self.batch = batch
        batch.step_seconds = step_seconds
        self.max_waiting = max_waiting
        self.jobs: dict[int, _Job] = {}
        self.inbox: queue.Queue[tuple[str, _Job] | None] = queue.Queue()
        self._n_submitted = self._n_taken = 0  # each is written by one thread only
        self.n_tokens = self.n_requests = self.n_layers_kept = self.n_layers = 0
        self.busy_seconds = 0.0
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="first-engine", daemon=True)
        self.thread.start()

    def submit(self, requests: list[Request]) -> list[_Job]:
        """Queue the parts of one answer, from inside an event loop. Raises RuntimeError once the engine is closed."""
        if self.closed:
            raise RuntimeError("the server is shutting down")
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[tuple[_Job, Update | BaseException]]()
        jobs = [_Job(request, i, loop, updates) for i, request in enumerate(requests)]
        self._n_submitted += len(jobs)
        for job in jobs:
            self.inbox.put(("submit", job))
        return jobs

    def cancel(self, job: _Job) -> None:
        """Free the sequence of a request that nobody waits for; harmless when it has ended."""
        job.cancelled = True
        self.batch.interrupt(job.handle)
        self.inbox.put(("cancel", job))

    def close(self) -> None:
        """End the thread; whoever still waits gets a RuntimeError."""
        self.closed = True
        self.inbox.put(None)
        self.thread.join()

    @property
    def n_waiting(self) -> int:
        """Requests without a sequence yet."""
        return self.batch.n_waiting + self._n_submitted - self._n_taken

    def _take(self, item: tuple[str, _Job] | None) -> bool:
        """Act on one message; False ends the engine."""
        if item is None:
            return False
        kind, job = item
        if kind == "cancel":
            if self.jobs.pop(job.handle, None) is not None:
                self.batch.cancel(job.handle)
            return True
        self._n_taken += 1
        if not job.cancelled:
            try:
                job.handle = self.batch.submit(job.request)
                self.jobs[job.handle] = job
            except Exception as error:
                job.put(error)
        return True

    def _work(self) -> None:
        running = True
        while running:
            try:
                # Sleep only where there is nothing to compute.
                idle = not self.jobs
                running = self._take(self.inbox.get(block=idle))
                continue
            except queue.Empty:
                pass
            start = time.perf_counter()
            try:
                for update in self.batch.step():
                    self._deliver(update)
            except Exception as error:
                for job in self.jobs.values():
                    self.batch.cancel(job.handle)
                    job.put(RuntimeError(f"{type(error).__name__}: {error}"))
                self.jobs.clear()
            self.busy_seconds += time.perf_counter() - start
        # Whoever came in meanwhile, or still waits.
        with contextlib.suppress(queue.Empty):
            while item := self.inbox.get_nowait():
                item[1].put(RuntimeError("the server is shutting down"))
        for job in self.jobs.values():
            job.put(RuntimeError("the server is shutting down"))
        self.batch.close()

    def _deliver(self, update: Update) -> None:
        job = self.jobs.get(update.request)
        if job is None:
            return
        self.n_tokens += update.n_generated - job.n_generated
        job.n_generated = update.n_generated
        if job.routing is None:
            job.routing = self.batch.routing(update.request)
            assert job.routing is not None
            self.n_requests += 1
            self.n_layers_kept += int(job.routing.mask.sum())
            self.n_layers += len(job.routing.mask)
        job.put(update)
        if update.finish_reason:
            self.batch.take_routing(update.request)
            del self.jobs[update.request]

    def metrics(self) -> str:
        """Counters in Prometheus' text format."""
        rows = (
            ("first_requests_total", "counter", "requests whose prompt was read", self.n_requests),
            ("first_tokens_total", "counter", "tokens generated", self.n_tokens),
            ("first_busy_seconds_total", "counter", "time spent computing", round(self.busy_seconds, 6)),
            ("first_layers_kept_total", "counter", "layers kept, summed over requests", self.n_layers_kept),
            ("first_layers_total", "counter", "layers of the model, summed over requests", self.n_layers),
            (
                "first_tokens_per_second",
                "gauge",
                "tokens generated per busy second",
                self.n_tokens / max(self.busy_seconds, 1e-9),
            ),
            ("first_active_sequences", "gauge", "sequences at work", self.batch.n_active),
            ("first_waiting_requests", "gauge", "requests without a sequence yet", self.n_waiting),
        )
        return "".join(f"# HELP {n} {text}\n# TYPE {n} {kind}\n{n} {value}\n" for n, kind, text, value in rows)


def _options(engine: Engine, body: Common) -> dict[str, Any]:
    """The part of a Request that does not depend on the kind of completion. Raises InputError."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if len(stop) > MAX_STOPS or not all(isinstance(text, str) for text in stop):
        raise InputError(f"stop: expected a text, or a list of at most {MAX_STOPS}")
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repeat_penalty": body.repeat_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "seed": body.seed,
        "stop": stop,
        **first_options(engine.batch, body.first),
    }


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a request: a text, token ids, or a list of one of these. Raises InputError."""

    def ids(value: Any) -> bool:
        return isinstance(value, list) and all(type(token) is int for token in value)

    if isinstance(prompt, str) or (prompt and ids(prompt)):
        return [prompt]
    if all(isinstance(text, str) for text in prompt) or all(ids(tokens) for tokens in prompt):
        return prompt
    raise InputError("prompt: expected a text, token ids, or a list of one of these")


class _Limited:
    """Refuses to read more than MAX_BODY bytes of a request."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        n_read = 0

        async def counted() -> Message:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > MAX_BODY:
                raise HTTPException(413, f"the request has more than {MAX_BODY} bytes")
            return message

        await self.app(scope, counted, send)


def create_app(engine: Engine, origins: Sequence[str] = ()) -> FastAPI:
    """The ASGI application; the engine is closed when the server ends. Pages of ``origins`` may ask from a browser."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="pyfirst", lifespan=lifespan)
    app.add_middleware(_Limited)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    batch = engine.batch
    name = Path(batch.model_path).stem
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local"}
    try:
        template: ChatTemplate | None = ChatTemplate(batch.model_path, batch.metadata, batch.vocab)
        template_error = ""
    except InputError as error:
        template, template_error = None, str(error)

    def error_body(status: int, message: str) -> JSONResponse:
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        shown = message[:1000].encode("utf-8", "replace").decode()  # it may repeat half a surrogate pair
        return JSONResponse({"error": {"message": shown, "type": kind, "param": None, "code": None}}, status)

    @app.exception_handler(InputError)
    async def wrong_input(_: HttpRequest, error: InputError) -> Response:
        return error_body(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def wrong_body(http: HttpRequest, error: RequestValidationError) -> Response:
        if isinstance(error.body, bytes):  # not even parsed
            found = http.headers.get("content-type")
            return error_body(400, f"Content-Type is {reprlib.repr(found)}, expected application/json")
        first = error.errors()[0]
        where, what = ".".join(str(x) for x in first["loc"]), first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            where, what = f"{where} is not JSON", first["ctx"]["error"]
        return error_body(400, f"{where}: {what}")

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: HttpRequest, error: StarletteHTTPException) -> Response:
        return error_body(error.status_code, str(error.detail))

    @app.exception_handler(RuntimeError)
    async def our_fault(_: HttpRequest, error: RuntimeError) -> Response:
        return error_body(503 if engine.closed else 500, str(error))

    async def submit(
        prompts: list[Any], max_tokens: int, logprobs: int | None, body: Common, add_bos: bool = True
    ) -> list[_Job]:
        """n choices of each prompt; with a seed each has its own, the first the one that was asked for."""
        count = len(prompts) * body.n
        if count > engine.max_waiting:
            raise InputError(
                f"{len(prompts)} prompts with n={body.n} are {count} answers, at most {engine.max_waiting}"
            )
        options = _options(engine, body)
        requests = []
        for prompt in prompts:
            if not isinstance(prompt, str):
                tokens = prompt
            elif len(prompt) < LONG_TEXT:
                tokens = batch.tokenize(prompt, add_bos)
            else:
                tokens = await asyncio.to_thread(batch.tokenize, prompt, add_bos)
            requests.append(Request(tokens, max_tokens=max_tokens, logprobs=logprobs, **options))
            batch.check(requests[-1])
        if engine.n_waiting + count > engine.max_waiting:
            raise HTTPException(429, f"{engine.n_waiting} requests are waiting already; try again later")
        seeds = [None if body.seed is None else (body.seed + i) % (2**32 - 1) for i in range(body.n)]
        return engine.submit([replace(request, seed=seed) for request in requests for seed in seeds])

    async def updates(jobs: list[_Job]) -> AsyncIterator[tuple[_Job, Update]]:
        """Updates until the last of all; however the reader ends, the sequences are freed."""
        left = len(jobs)
        try:
            while left:
                job, item = await jobs[0].updates.get()
                if isinstance(item, BaseException):
                    raise item
                left -= item.finish_reason is not None
                yield job, item
        finally:
            for job in jobs:
                engine.cancel(job)

    async def whole(http: HttpRequest, jobs: list[_Job]) -> list[tuple[str, list[TokenLogprob], str]]:
        """(text, log-probabilities, finish_reason) of each; a client that hangs up ends the work."""

        async def collect() -> list[tuple[str, list[TokenLogprob], str]]:
            texts, scored, reasons = [""] * len(jobs), [list[TokenLogprob]() for _ in jobs], [""] * len(jobs)
            async for job, update in updates(jobs):
                texts[job.index] += update.text
                scored[job.index] += update.logprobs
                reasons[job.index] = update.finish_reason or ""
            return list(zip(texts, scored, reasons, strict=True))

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise HTTPException(499, "the client hung up")
            return tasks[0].result()  # type: ignore[return-value]
        finally:
            for task in tasks:
                task.cancel()

    def usage(jobs: list[_Job], n: int) -> dict[str, int]:
        """The choices of a prompt share its tokens."""
        prompt = sum(len(job.request.tokens) for job in jobs[::n])
        generated = sum(job.n_generated for job in jobs)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    async def respond(http: HttpRequest, body: Common, jobs: list[_Job], starts: list[int] | None) -> Response:
        """``starts``: character where each prompt's answer begins, None for a chat."""
        chat, several = starts is None, len(jobs) > body.n
        kind = "chat.completion" if chat else "text_completion"
        base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4()}",
            "created": int(time.time()),
            "model": body.model or name,
        }

        def report(job: _Job) -> dict[str, Any]:
            assert job.routing is not None
            return {"first": job.routing.report()}

        def choice(
            job: _Job, text: str, scored: list[TokenLogprob], reason: str | None, begun: bool = False
        ) -> dict[str, Any]:
            if starts is None:
                role = {} if begun else {"role": "assistant"}
                content: dict[str, Any] = {"delta" if body.stream else "message": {**role, "content": text}}
                logprobs = chat_logprobs(scored)
            else:
                content = {"text": text}
                logprobs = completion_logprobs(scored, starts[job.index // body.n])
            # Prompts decide for themselves; the choices of one share what it decided.
            first = report(job) if several else {}
            return {"index": job.index, **content, "logprobs": logprobs, "finish_reason": reason, **first}

        if not body.stream:
            found = await whole(http, jobs)
            choices = [choice(job, *values) for job, values in zip(jobs, found, strict=True)]
            first = {} if several else report(jobs[0])
            return JSONResponse({**base, "object": kind, "choices": choices, "usage": usage(jobs, body.n), **first})

        async def events() -> AsyncIterator[str]:
            # As at OpenAI: clients join what the deltas of a choice hold, and take the choices in this order.
            roles = [choice(job, "", [], None) for job in jobs] if chat else []
            try:
                async for job, update in updates(jobs):
                    for part in (*roles, choice(job, update.text, update.logprobs, update.finish_reason, True)):
                        chunk = {
                            **base,
                            "object": kind + (".chunk" if chat else ""),
                            "choices": [part],
                            **({} if several else report(job)),
                        }
                        yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                    roles = []
                    await asyncio.sleep(0)  # lets the loop notice a client that has hung up
                if body.stream_options.include_usage:
                    last = {"object": kind + (".chunk" if chat else ""), "choices": [], "usage": usage(jobs, body.n)}
                    yield f"data: {json.dumps({**base, **last})}\n\n"
                yield "data: [DONE]\n\n"
            except RuntimeError as error:
                yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        prompts = _prompts(body.prompt)
        if not all(prompts) or not prompts:
            raise InputError("the prompt is empty: at least one token must decide")
        jobs = await submit(prompts, body.max_tokens, body.logprobs, body)
        starts = [batch.answer_start(prompt, body.logprobs) for prompt in prompts]
        return await respond(http, body, jobs, starts)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        if template is None:
            raise InputError(template_error)
        if body.top_logprobs is not None and not body.logprobs:
            raise InputError("top_logprobs needs logprobs: true")
        prompt = await asyncio.to_thread(template.render, body.messages)
        given = (body.max_completion_tokens, body.max_tokens, batch.n_ctx)
        limit = next(n for n in given if n is not None)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await respond(http, body, await submit([prompt], limit, logprobs, body, add_bos=False), None)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{wanted}")
    async def model(wanted: str) -> dict[str, Any]:
        if wanted != name:
            raise HTTPException(404, f"no model {reprlib.repr(wanted)} here, only '{name}'")
        return about

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        if not engine.thread.is_alive():
            return JSONResponse({"status": "error"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(engine.metrics(), media_type="text/plain; version=0.0.4")

    return app


class Server(uvicorn.Server):
    """Closes the engine before uvicorn cancels the requests, so that each is told why it ends."""

    def __init__(self, engine: Engine, log_level: str, origins: Sequence[str] = ()):
        app = create_app(engine, origins)
        super().__init__(uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=GRACE + LEAVE))
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = threading.Timer(GRACE, self.engine.close)  # a thread, as close() waits for a step
        closing.start()
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()
