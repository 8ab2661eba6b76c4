"""An OpenAI-compatible server whose requests share one batch, each with its own layers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from pyfirst.batch import FirstBatch, Request, Update, first_options
from pyfirst.chat import ChatTemplate
from pyfirst.errors import InputError
from pyfirst.llama import Routing


class Common(BaseModel):
    """What both kinds of completion take; anything else is refused, so that no setting is lost in silence."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: Literal[1] = 1
    user: str | None = None
    first: dict[str, Any] = {}


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | list[int]
    max_tokens: int = 16


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


@dataclass
class _Job:
    """A request on its way through the engine; updates reach the event loop that waits for them."""

    request: Request
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[Update | BaseException]
    handle: int = -1
    routing: Routing | None = None
    n_generated: int = 0
    cancelled: bool = False

    def put(self, item: Update | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(self.updates.put_nowait, item)


class Engine:
    """Runs a FirstBatch in a thread of its own; the only one that touches it.

    Args:
        batch: closed with the engine.
        max_waiting: requests beyond this are refused.
    """

    def __init__(self, batch: FirstBatch, max_waiting: int = 64):
        self.batch = batch
        self.max_waiting = max_waiting
        self.jobs: dict[int, _Job] = {}
        self.inbox: queue.Queue[tuple[str, _Job] | None] = queue.Queue()
        self.n_tokens = self.n_requests = self.n_layers_kept = self.n_layers = 0
        self.busy_seconds = 0.0
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="first-engine", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> _Job:
        """Queue a request from inside an event loop. Raises RuntimeError once the engine has been closed."""
        if self.closed:
            raise RuntimeError("the server is shutting down")
        job = _Job(request, asyncio.get_running_loop(), asyncio.Queue())
        self.inbox.put(("submit", job))
        return job

    def cancel(self, job: _Job) -> None:
        """Free the sequence of a request that nobody waits for; harmless when it has ended."""
        job.cancelled = True
        self.inbox.put(("cancel", job))

    def close(self) -> None:
        """End the thread; whoever still waits gets a RuntimeError."""
        self.closed = True
        self.inbox.put(None)
        self.thread.join()

    @property
    def n_waiting(self) -> int:
        """Requests without a sequence yet."""
        return self.batch.n_waiting + self.inbox.qsize()

    def _take(self, item: tuple[str, _Job] | None) -> bool:
        """Act on one message; False ends the engine."""
        if item is None:
            return False
        kind, job = item
        if kind == "cancel":
            if self.jobs.pop(job.handle, None) is not None:
                self.batch.cancel(job.handle)
        elif not job.cancelled:
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
    """The part of a Request that does not depend on the kind of completion."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
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


def create_app(engine: Engine) -> FastAPI:
    """The ASGI application; the engine is closed when the server ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="pyfirst", lifespan=lifespan)
    batch = engine.batch
    name = Path(batch.model_path).stem
    started = int(time.time())
    try:
        template: ChatTemplate | None = ChatTemplate(batch.model_path, batch.metadata, batch.vocab)
        template_error = ""
    except InputError as error:
        template, template_error = None, str(error)

    def error_body(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    @app.exception_handler(InputError)
    async def wrong_input(_: HttpRequest, error: InputError) -> Response:
        return error_body(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def wrong_body(_: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return error_body(400, f"{'.'.join(str(x) for x in first['loc'][1:])}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http_error(_: HttpRequest, error: HTTPException) -> Response:
        return error_body(error.status_code, str(error.detail))

    @app.exception_handler(RuntimeError)
    async def our_fault(_: HttpRequest, error: RuntimeError) -> Response:
        return error_body(503 if engine.closed else 500, str(error))

    def submit(tokens: list[int], max_tokens: int, body: Common) -> _Job:
        request = Request(tokens, max_tokens=max_tokens, **_options(engine, body))
        batch.check(request)
        if engine.n_waiting >= engine.max_waiting:
            raise HTTPException(503, f"{engine.n_waiting} requests are waiting already; try again later")
        return engine.submit(request)

    async def updates(job: _Job) -> AsyncIterator[Update]:
        """Updates until the last; however the reader ends, the sequence is freed."""
        try:
            while True:
                item = await job.updates.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            engine.cancel(job)

    async def whole(http: HttpRequest, job: _Job) -> tuple[str, str, int]:
        """(text, finish_reason, tokens); a client that hangs up ends the work."""

        async def collect() -> tuple[str, str, int]:
            text, reason, n = "", "", 0
            async for update in updates(job):
                text, reason, n = text + update.text, update.finish_reason or "", update.n_generated
            return text, reason, n

        async def gone() -> None:
            while not await http.is_disconnected():
                await asyncio.sleep(0.2)

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise HTTPException(499, "the client hung up")
            return tasks[0].result()  # type: ignore[return-value]
        finally:
            for task in tasks:
                task.cancel()

    def usage(job: _Job, n: int) -> dict[str, int]:
        prompt = len(job.request.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": n, "total_tokens": prompt + n}

    async def respond(http: HttpRequest, body: Common, job: _Job, chat: bool) -> Response:
        kind = "chat.completion" if chat else "text_completion"
        base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4()}",
            "created": int(time.time()),
            "model": body.model or name,
        }

        def choice(text: str, reason: str | None, delta: bool) -> dict[str, Any]:
            content: dict[str, Any] = {"text": text}
            if chat:
                content = {"delta" if delta else "message": {"role": "assistant", "content": text}}
            return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

        if not body.stream:
            text, reason, n = await whole(http, job)
            assert job.routing is not None
            answer = {**base, "object": kind, "choices": [choice(text, reason, False)], "usage": usage(job, n)}
            return JSONResponse({**answer, "first": job.routing.report()})

        async def events() -> AsyncIterator[str]:
            n = 0
            try:
                async for update in updates(job):
                    n = update.n_generated
                    assert job.routing is not None
                    chunk = {
                        **base,
                        "object": kind + (".chunk" if chat else ""),
                        "choices": [choice(update.text, update.finish_reason, True)],
                        "first": job.routing.report(),
                    }
                    yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                    await asyncio.sleep(0)  # lets the loop notice a client that has hung up
                if (body.stream_options or {}).get("include_usage"):
                    last = {**base, "object": kind + (".chunk" if chat else ""), "choices": [], "usage": usage(job, n)}
                    yield f"data: {json.dumps(last)}\n\n"
                yield "data: [DONE]\n\n"
            except RuntimeError as error:
                yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        tokens = batch.tokenize(body.prompt) if isinstance(body.prompt, str) else body.prompt
        if not body.prompt:
            raise InputError("the prompt is empty: at least one token must decide")
        return await respond(http, body, submit(tokens, body.max_tokens, body), chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        if template is None:
            raise InputError(template_error)
        tokens = batch.tokenize(template.render(body.messages), add_bos=False)
        given = (body.max_completion_tokens, body.max_tokens, batch.n_ctx)
        limit = next(n for n in given if n is not None)
        return await respond(http, body, submit(tokens, limit, body), chat=True)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "local"}]}

    @app.get("/health")
    async def health() -> Response:
        if not engine.thread.is_alive():
            return JSONResponse({"status": "error"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(engine.metrics(), media_type="text/plain; version=0.0.4")

    return app
