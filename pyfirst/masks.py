"""What the routers of a file decide for prompts: scores, masks, and how they follow the input."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyfirst.errors import InputError
from pyfirst.evaluation import Scorer
from pyfirst.info import info
from pyfirst.scores import compare_tasks, draw
from pyfirst.tasks import gather, read_examples

_BAR = 30


def prompts(
    texts: Sequence[str] = (), files: Sequence[str | os.PathLike[str]] = (), limit: int | None = None
) -> list[tuple[str, str]]:
    """(task, prompt) of texts and of JSONL files, grouped by task; ``limit`` holds for each file. Raises InputError."""
    examples = gather(files, lambda file: read_examples(file, limit, need_references=False))
    found = [("prompt", text) for text in texts] + [(example.task, example.prompt) for example in examples]
    order = {task: i for i, task in enumerate(dict.fromkeys(task for task, _ in found))}
    return sorted(found, key=lambda pair: order[pair[0]])


def observe(
    model: str | os.PathLike[str],
    prompts: Sequence[tuple[str, str]],
    *,
    threshold: float | None = None,
    prefill: str | None = None,
    ctx: int = 2048,
    threads: int | None = None,
) -> dict[str, Any]:
    """Let the routers read (task, prompt) pairs, in the model's chat template where it has one.

    Returns {"model", "layers", "threshold", "prefill", "prompts", "distinct", "keep_rate", "task_keep_rate", "guess",
    "chance"}; "prompts" holds {"task", "prompt", "tokens", "scores" [n_layer], "mask" [n_layer]} each, "keep_rate" is
    the share of prompts that keep a layer, and "guess" how often the nearest usual mask names a prompt's own task
    ("chance": by luck; both None for one task). Raises InputError.
    """
    found = info(model)
    if not found["routers"]:
        raise InputError(f"{model}: no routers in this file, so prompts decide nothing")
    ctx = min(ctx, found["context_length"] or ctx)
    llm = Scorer(model, threshold=threshold, prefill=prefill, n_ctx=ctx, n_threads=threads, n_threads_batch=threads)
    rows: list[dict[str, Any]] = []
    try:
        for task, text in prompts:
            tokens = llm.prompt_tokens(text)
            if not 0 < len(tokens) <= ctx:
                raise InputError(f"the prompt '{_short(text)}' has {len(tokens)} tokens, expected 1 to {ctx}; see -c")
            llm.reset()
            llm.eval(tokens)
            routing = llm.routing
            assert routing is not None and routing.scores is not None
            rows.append(
                {
                    "task": task,
                    "prompt": text,
                    "tokens": len(tokens),
                    "scores": routing.scores.tolist(),
                    "mask": routing.mask.tolist(),
                }
            )
        tasks = [row["task"] for row in rows]
        masks = np.array([row["mask"] for row in rows])
        compared = compare_tasks(masks, tasks, draw(tasks, 0))
        return {
            "model": os.fspath(model),
            "layers": llm.n_layer,
            "threshold": llm.threshold,
            "prefill": llm.prefill,
            "prompts": rows,
            "distinct": len(np.unique(masks, axis=0)),
            "keep_rate": masks.mean(0).tolist(),
            "task_keep_rate": {
                task: masks[[own == task for own in tasks]].mean(0).tolist() for task in dict.fromkeys(tasks)
            },
            "guess": compared["guess"]["modal"]["value"] if compared and compared["guess"] else None,
            "chance": compared["chance"] if compared else None,
        }
    finally:
        llm.close()


def _short(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _shown(seen: dict[str, Any], width: int) -> dict[str, list[dict[str, Any]]]:
    """The prompts of each task that fit beside each other, evenly drawn."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in seen["prompts"]:
        by_task.setdefault(row["task"], []).append(row)
    room = max((width - 8 - 7 * len(by_task)) // len(by_task), 4)
    return {
        task: [rows[i * len(rows) // min(len(rows), room)] for i in range(min(len(rows), room))]
        for task, rows in by_task.items()
    }


def _cell(score: float, keep: bool, threshold: float) -> tuple[str, str]:
    """(character, rich style) of one layer for one prompt: the brighter, the farther from the threshold."""
    room = 1 - threshold if keep else threshold
    far = min(abs(score - threshold) / max(room, 1e-6), 1)
    if keep:
        colour = f"rgb({int(120 - 100 * far)},{int(170 - 110 * far)},240)"
        return "#", f"{colour} on {colour}"
    return ".", f"rgb({int(130 + 100 * far)},{int(90 - 90 * far)},40)"


def heatmap(seen: dict[str, Any], width: int) -> list[list[tuple[str, str]]]:
    """Lines of (text, rich style), the last layer first: a column a prompt, each task with its keep rate behind."""
    shown = _shown(seen, width)
    head = [("layer  ", "")]
    for task, rows in shown.items():
        head.append((task[: len(rows) + 5].ljust(len(rows) + 7), "bold"))
    lines = [head]
    for layer in reversed(range(seen["layers"])):
        line = [(f"{layer:5}  ", "")]
        for task, rows in shown.items():
            line += [_cell(row["scores"][layer], row["mask"][layer], seen["threshold"]) for row in rows]
            line.append((f" {seen['task_keep_rate'][task][layer]:4.0%}  ", "dim"))
        lines.append(line)
    return lines


def summary(seen: dict[str, Any]) -> list[str]:
    """How many layers the prompts kept, and whether masks follow the input."""
    n_layer, rows = seen["layers"], seen["prompts"]
    counts = Counter(sum(row["mask"]) for row in rows)
    most = max(counts.values())
    lines = ["layers kept   prompts"]
    for kept in range(min(counts), max(counts) + 1):
        bar = "#" * round(_BAR * counts[kept] / most)
        lines.append(f"{kept:4} of {n_layer:<4} {counts[kept]:9}  {bar}".rstrip())
    always = sum(rate == 1 for rate in seen["keep_rate"])
    never = sum(rate == 0 for rate in seen["keep_rate"])
    kept = np.mean([np.mean(row["mask"]) for row in rows])
    prompts = f"{len(rows)} prompt{'s' if len(rows) > 1 else ''}"
    different = f"{seen['distinct']} different masks" if seen["distinct"] > 1 else "one mask"
    lines += [
        "",
        f"{prompts}, {different}, {kept:.0%} of the layers kept on average",
        f"{always} layers are always kept, {never} never, {n_layer - always - never} depend on the prompt",
    ]
    if seen["guess"] is not None:
        lines.append(
            f"from its mask alone, {seen['guess']:.0%} of prompts go to the right task ({seen['chance']:.0%} by chance)"
        )
    return lines


def show(seen: dict[str, Any]) -> None:
    """Print heatmap and summary: in colours on a terminal where rich is installed, else as plain text."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False)
        for line in heatmap(seen, console.width):
            console.print(Text.assemble(*line), no_wrap=True, crop=True)
    else:
        for line in heatmap(seen, shutil.get_terminal_size((100, 24)).columns):
            print("".join(text for text, _ in line).rstrip())
    note = f"threshold {seen['threshold']:.6g}, prefill {seen['prefill']}; # kept, . skipped, % of a task that keeps"
    print("\n".join(["", note, "", *summary(seen)]))
