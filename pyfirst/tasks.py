"""Task files: JSON lines of prompts, with what should be answered."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfirst.errors import InputError, check_file

logger = logging.getLogger("pyfirst")


@dataclass(frozen=True)
class Example:
    """A prompt with its references; ``where`` is the line it came from, ``named`` whether that names the task."""

    task: str
    prompt: str
    references: list[str]
    where: str
    named: bool = True


def example(row: Any, where: str, task: str, *, need_references: bool = True) -> Example:
    """A row of a task file as Example; ``task`` is that of rows that name none. Raises InputError naming ``where``."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise InputError(f"{where}: expected an object with a text 'prompt'")
    references = row.get("references")  # a table has a null where a row has none
    if references is None and row.get("response") is not None:
        references = [row["response"]]
    if references is None and not need_references:
        references = []
    elif not isinstance(references, list) or not references:
        raise InputError(f"{where}: expected 'references', a list of texts, or a text 'response'")
    if not all(isinstance(text, str) and text.strip() for text in references):
        raise InputError(f"{where}: the response or a reference is not a text, or empty")
    named = row.get("task")
    task = " ".join(str(task if named is None else named).split())  # one line, for tables
    try:
        "".join([row["prompt"], *references, task]).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half of a UTF-16 pair (\\ud800 to \\udfff), which is not a character") from None
    return Example(task, row["prompt"], references, where, named is not None)


def read_examples(
    path: str | os.PathLike[str], limit: int | None = None, *, need_references: bool = True
) -> list[Example]:
    """The first ``limit`` lines of a JSONL file: "prompt" with "references" or "response", and maybe "task".

    Without ``need_references`` a prompt alone will do. Raises InputError naming file and line.
    """
    path = Path(path)
    check_file(path)
    examples: list[Example] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        if limit is not None and len(examples) == limit:
            break
        where = f"{path}:{number}"
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            packed = raw.startswith((b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff"))
            hint = "; gzip or UTF-16, convert it to plain UTF-8 first" if packed else ""
            raise InputError(f"{where}: not UTF-8 text (byte {error.start}){hint}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error}); expected one object a line") from None
        examples.append(example(row, where, path.name.split(".")[0], need_references=need_references))
    if not examples:
        raise InputError(f"{path}: no examples in it")
    return examples


def gather(files: Sequence[str | os.PathLike[str]], read: Callable[[Any], list[Example]]) -> list[Example]:
    """The examples of all files, each as ``read`` gives them.

    Warns where files whose rows name no task are one task by their names: "a.en.jsonl" and "a.de.jsonl". Raises
    InputError for a file that is there twice.
    """
    places = [Path(file).resolve() for file in files]
    examples: list[Example] = []
    sources: dict[str, list[str]] = {}
    for file, place in zip(files, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{file}: given twice, its examples would count double")
        found = read(file)
        examples += found
        for task in {example.task for example in found if not example.named}:
            sources.setdefault(task, []).append(os.fspath(file))
    for task, names in sources.items():
        if len(names) > 1:
            logger.warning('%s: taken as one task, "%s", for their rows name no "task"', ", ".join(names), task)
    return examples
