"""Many prompts for first-run: JSONL in, JSONL out, in the same order, and an interrupted run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from pyfirst.batch import FirstBatch, Request, first_options
from pyfirst.chat import ChatTemplate
from pyfirst.cli import common
from pyfirst.errors import InputError
from pyfirst.llama import fingerprint

# Prompts submitted ahead of the oldest unanswered one, per place: what an interruption may lose.
AHEAD = 64
_NUMBERS = ("temperature", "top_p", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty")
_INTEGERS = ("max_tokens", "top_k", "seed")
FIELDS = ("prompt", "messages", "id", "stop", "first", *_INTEGERS, *_NUMBERS)
# What training data holds beside the prompt.
IGNORED = ("response", "references", "task")


def read_line(raw: bytes) -> dict[str, Any]:
    """A line of the file: an object with "prompt" or "messages" and options, or a string. Raises InputError."""
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not a line of JSON: {error}") from None
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise InputError(f"expected an object or a string, found {type(row).__name__}")
    unknown = sorted(set(row) - {*FIELDS, *IGNORED})
    if unknown:
        raise InputError(f"unknown field '{unknown[0]}' (known: {', '.join(FIELDS)})")
    if ("prompt" in row) == ("messages" in row):
        raise InputError("expected one of 'prompt' and 'messages'")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise InputError(f"prompt is a {type(row['prompt']).__name__}, expected a string")
    if "messages" in row and not isinstance(row["messages"], list):
        raise InputError(f"messages is a {type(row['messages']).__name__}, expected a list")
    for name in (*_NUMBERS, *_INTEGERS):
        kinds: tuple[type, ...] = (int,) if name in _INTEGERS else (int, float)
        if name in row and (not isinstance(row[name], kinds) or isinstance(row[name], bool)):
            raise InputError(f"{name} is {row[name]!r}, expected {'an integer' if name in _INTEGERS else 'a number'}")
    stop = row.get("stop", [])
    if not (isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(s, str) for s in stop))):
        raise InputError("stop is neither a string nor a list of strings")
    return row


def _resume(out: Path, digests: list[str], model: str) -> int:
    """Lines of ``out`` that are complete answers to the first lines of the input; a torn end is cut off."""
    if not out.is_file():  # a device or a pipe holds no answers
        return 0
    done = size = 0
    with out.open("rb+") as file:
        for line in file:
            if done >= len(digests) or not _answers(line, done + 1, digests[done], model):
                raise InputError(
                    f"{out}: line {done + 1} does not answer line {done + 1} of this file with this {model} and "
                    "these options; give another -o"
                )
            if line.endswith(b"\n"):
                done, size = done + 1, size + len(line)
        file.truncate(size)
    return done


def _answers(line: bytes, number: int, digest: str, model: str) -> bool:
    """Whether a line, or the beginning of one that was torn, answers that line of the input."""
    if not line.endswith(b"\n"):
        start = f'{{"line": {number}, "input": "{digest}"'.encode()
        return start.startswith(line[: len(start)])
    try:
        row = json.loads(line)
        return bool((row["line"], row["input"], row["model"]) == (number, digest, model))
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _encodable(answer: dict[str, Any], encoding: str) -> str:
    """The JSON of an answer, escaped where it holds what the encoding lacks, such as half a surrogate pair."""
    text = json.dumps(answer, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(answer)
    return text


def run_many(
    model: str,
    lines: Iterable[bytes],
    *,
    parallel: int = 8,
    ctx: int | None = None,
    out: Path | None = None,
    chat: bool = False,
    n_predict: int = 128,
    temp: float = 0.8,
    seed: int | None = None,
    dense: bool = False,
    threshold: float | None = None,
    skip: float | None = None,
    skip_layers: list[int] | None = None,
    prefill: str | None = None,
    threads: int | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Answer each line of JSONL, ``parallel`` at a time; one line of JSON per line of input, in order.

    A line is a string or an object with "prompt" or "messages" and, for this line alone, max_tokens, temperature,
    top_k, top_p, min_p, repeat_penalty, frequency_penalty, presence_penalty, seed, stop, id and
    first: {threshold, skip, dense, mask}. A line that cannot be answered gives {"error": ...}; the others go on.

    Args:
        out: append here and skip what is there already, if it was made with the same options; None: stdout.
        seed: line i is sampled with seed + i; None draws one for each line, which its answer names.
        Others: as in pyfirst.cli.run.run().

    Returns:
        {"lines", "resumed", "errors", "tokens", "seconds", "kept", "first_error"}; kept: mean share of layers.

    Raises:
        InputError: no lines, a model or option that does not fit, ``out`` holding something else.
    """
    rows = [line for line in (line.strip() for line in lines) if line]
    if not rows:
        raise InputError("no prompts: expected a line of JSON for each")
    name = Path(model).name
    errors, kept, first_error = 0, [], None
    with contextlib.ExitStack() as stack:
        batch = stack.enter_context(
            FirstBatch(
                model,
                n_parallel=parallel,
                n_ctx=ctx,
                max_ctx=common.MAX_CTX,
                routing=not dense,
                threshold=threshold,
                skip=skip,
                prefill=prefill,
                n_threads=threads,
                verbose=verbose,
            )
        )
        decisive = [chat, n_predict, temp, seed, dense, threshold, skip, skip_layers, prefill, ctx]
        source = (fingerprint(model) + json.dumps(decisive)).encode()
        digests = [hashlib.sha256(source + row).hexdigest()[:16] for row in rows]
        resumed = done = _resume(out, digests, name) if out is not None else 0
        forced = None
        if skip_layers is not None:
            forced = np.ones(batch.n_layer, bool)
            for layer in skip_layers:
                if layer >= batch.n_layer:
                    raise InputError(
                        f"--skip-layers names layer {layer}, the model has layers 0 to {batch.n_layer - 1}"
                    )
                forced[layer] = False
        file: TextIO = sys.stdout if out is None else stack.enter_context(out.open("a", encoding="utf-8"))
        templates: list[ChatTemplate] = []

        def request(i: int) -> tuple[Request, dict[str, Any]]:
            row = read_line(rows[i])
            asked = row.get("messages")
            if asked is None and chat:
                asked = [{"role": "user", "content": row["prompt"]}]
            if asked is None:
                tokens = batch.tokenize(row["prompt"])
            else:
                if not templates:
                    templates.append(ChatTemplate(model, batch.metadata, batch.vocab))
                tokens = batch.tokenize(templates[0].render(asked), add_bos=False)
            stop = row.get("stop", [])
            options = {k: row[k] for k in (*_NUMBERS, *_INTEGERS) if k in row}
            options.setdefault("temperature", temp)
            options.setdefault("max_tokens", n_predict)
            if options["max_tokens"] == -1:
                options["max_tokens"] = batch.n_ctx
            options.setdefault("seed", secrets.randbits(31) if seed is None else (seed + i) % (2**32 - 1))
            layers = {"mask": forced, **first_options(batch, row["first"])} if "first" in row else {"mask": forced}
            return Request(tokens, stop=[stop] if isinstance(stop, str) else stop, **options, **layers), row

        working: dict[int, tuple[int, Request, list[str]]] = {}  # handle -> (line, request, pieces)
        ready: dict[int, dict[str, Any]] = {}
        following, n_tokens, began = done, 0, time.monotonic()
        # Only for terminals, on which tokens come in before a prompt is done: miniters.
        with tqdm(total=len(rows), initial=done, disable=None, file=sys.stderr, unit="prompt", miniters=0) as bar:
            while done < len(rows):
                while following < len(rows) and following - done < AHEAD * parallel and batch.n_waiting < parallel:
                    base = {"line": following + 1, "input": digests[following], "model": name}
                    try:
                        made, row = request(following)
                        if "id" in row:
                            base["id"] = row["id"]
                        working[batch.submit(made)] = (following, made, [])
                        ready[following] = base
                    except ValueError as error:
                        ready[following] = {**base, "error": str(error)}
                        errors, first_error = errors + 1, first_error or f"line {following + 1}: {error}"
                    following += 1
                for update in batch.step() if working else ():
                    i, made, pieces = working[update.request]
                    pieces.append(update.text)
                    n_tokens += 1
                    if update.finish_reason:
                        routing = batch.take_routing(update.request)
                        assert routing is not None
                        del working[update.request]
                        kept.append(float(routing.mask.mean()))
                        n = len(made.tokens)
                        ready[i] |= {
                            "text": "".join(pieces),
                            "finish_reason": update.finish_reason,
                            "first": {**routing.report(), "threshold": routing.threshold},
                            "usage": {
                                "prompt_tokens": n,
                                "completion_tokens": update.n_generated,
                                "total_tokens": n + update.n_generated,
                            },
                            "seed": made.seed,
                        }
                while done in ready and ("text" in ready[done] or "error" in ready[done]):
                    file.write(_encodable(ready.pop(done), file.encoding) + "\n")
                    file.flush()
                    done += 1
                bar.set_postfix_str(f"{n_tokens / max(time.monotonic() - began, 1e-9):.1f} tokens/s", refresh=False)
                bar.update(done - bar.n)
    return {
        "lines": len(rows),
        "resumed": resumed,
        "errors": errors,
        "tokens": n_tokens,
        "seconds": time.monotonic() - began,
        "kept": float(np.mean(kept)) if kept else None,
        "first_error": first_error,
    }


def read_lines(path: str) -> Iterator[bytes]:
    """Lines of a file, or of stdin for "-"."""
    if path == "-":
        yield from sys.stdin.buffer
        return
    with open(path, "rb") as file:
        yield from file


def summary(result: dict[str, Any]) -> str:
    """The line that follows the answers."""
    said = f"{result['lines']} prompts"
    if result["resumed"]:
        said += f" ({result['resumed']} answered before)"
    said += f", {result['tokens']} tokens in {result['seconds']:.1f} s"
    if result["tokens"]:
        said += f", {result['tokens'] / result['seconds']:.1f} tokens/s"
    if result["kept"] is not None:
        said += f"; kept {result['kept']:.0%} of the layers"
    return said
