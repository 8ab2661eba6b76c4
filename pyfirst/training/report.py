"""What first-train measures on held-back examples and how it tells: log, calibration, model card."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyfirst.recipe import FirstConfig
from pyfirst.scores import compare_tasks
from pyfirst.training.data import Example, batches
from pyfirst.training.routers import FirstModel, per_example

# Options that say where things lie, not how the recipe was made.
PRIVATE = (
    "model",
    "data",
    "out",
    "force",
    "verbose",
    "resume",
    "keep_checkpoints",
    "recipe",
    "teacher",
    "save_steps",
    "note",
    "base_name",
)
CALIBRATION_POINTS = 21
# Scores that differ by less are the same but for rounding.
TIE = 1e-5
# Seconds without a line after which work looks as if it hung.
QUIET = 30.0
_spoken = time.monotonic()


def say(text: str) -> None:
    """One line on stderr, from the first process only."""
    global _spoken
    _spoken = time.monotonic()
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    """``say`` how far it is, where nothing was said for ``QUIET`` seconds."""
    if time.monotonic() - _spoken >= QUIET:
        say(f"  {text}")


@torch.no_grad()
def losses(
    model: FirstModel, examples: Sequence[Example], batch_size: int, dense: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy float32 [N] of each example's response, masks bool [N, L], mean scores float32 [N, L]."""
    loss = torch.zeros(len(examples))
    keep = torch.ones(len(examples), model.block_count, dtype=torch.bool)
    scores = torch.zeros(len(examples), model.block_count)
    done = 0
    for chosen, batch in batches(examples, batch_size, model.routers.weight.device):
        output = model(**batch, dense=dense)
        done += len(chosen)
        progress(f"{done} of {len(examples)} examples")
        loss[chosen] = per_example(output, len(chosen)).cpu()
        keep[chosen] = output["keep"].cpu()
        if not dense:
            scores[chosen] = output["scores"].cpu()
    return loss, keep, scores


def kept_share(model: FirstModel, held: Sequence[Example], batch_size: int, threshold: float) -> float:
    """Mean share of all layers kept at ``threshold``."""
    before = float(model.threshold)
    model.threshold.fill_(threshold)
    keep = losses(model, held, batch_size)[1]
    model.threshold.fill_(before)
    return float(keep.float().mean())


def candidates(model: FirstModel, held: Sequence[Example], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted scores [K] of the unprotected layers, and all of them [N, L]."""
    scores = losses(model, held, batch_size)[2]
    return scores[:, ~model.protected.cpu()].flatten().sort().values, scores


def threshold_for(model: FirstModel, held: Sequence[Example], batch_size: int, skip: float) -> float:
    """The threshold at which the held-back prompts skip about the share ``skip`` of all layers."""
    ordered, _ = candidates(model, held, batch_size)
    if len(ordered) == 0:
        return float(model.threshold)

    if model.prefill == "full":  # scores do not depend on the masks
        share = skip * model.block_count / int((~model.protected).sum())
        place = min(max(round(share * len(ordered)), 0), len(ordered))
        above = ordered[place] if place < len(ordered) else 1.0  # all are skipped
        # Between two scores, so that rounding elsewhere does not turn a decision over.
        return float((ordered[max(place - 1, 0)] + above) / 2)
    low, high = float(ordered[0]), float(ordered[-1])
    for _ in range(8):
        middle = (low + high) / 2
        if 1 - kept_share(model, held, batch_size, middle) < skip:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def calibration(model: FirstModel, held: Sequence[Example], batch_size: int) -> dict[str, list[float]]:
    """Rising thresholds and the mean share of all layers kept at each, on the held-back prompts."""
    ordered, scores = candidates(model, held, batch_size)
    if len(ordered) == 0:
        return {"threshold": [], "kept": []}
    points = 9 if model.prefill == "skip" else CALIBRATION_POINTS
    places = torch.linspace(0, len(ordered) - 1, points).round().long()
    # Between a score and the next lower one, so that rounding elsewhere turns no decision over: a layer with a bias
    # alone has the same score for every prompt.
    first = torch.cat([torch.zeros(1, dtype=torch.long), (ordered.diff() > TIE).nonzero()[:, 0] + 1])
    middles = (ordered[first] + torch.cat([torch.zeros(1), ordered[first[1:] - 1]])) / 2
    steps = torch.searchsorted(first, places, right=True) - 1
    thresholds = sorted({round(t, 6) for t in middles[steps].tolist()} | {float(model.threshold)})
    if model.prefill == "full":
        protected = model.protected.cpu()
        kept = [float(((scores >= t) | protected).float().mean()) for t in thresholds]
    else:
        kept = [kept_share(model, held, batch_size, t) for t in thresholds]
    return {"threshold": thresholds, "kept": [round(k, 5) for k in kept]}


def measure(model: FirstModel, held: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """Cross-entropies, share skipped and diversity of the masks, over all held-back examples and by task."""
    adapted = hasattr(model.base, "disable_adapter")
    with model.base.disable_adapter() if adapted else contextlib.nullcontext():
        base = losses(model, held, batch_size, dense=True)[0]
    dense = losses(model, held, batch_size, dense=True)[0] if adapted else None
    routed, keep, _ = losses(model, held, batch_size)
    tasks = sorted({e.task for e in held})
    rows = {t: torch.tensor([e.task == t for e in held]) for t in tasks}

    def entry(which: torch.Tensor) -> dict[str, Any]:
        result: dict[str, Any] = {"examples": int(which.sum()), "base": round(float(base[which].mean()), 4)}
        if dense is not None:
            result["dense_lora"] = round(float(dense[which].mean()), 4)
        result["routed"] = round(float(routed[which].mean()), 4)
        result["skipped"] = round(1 - float(keep[which].float().mean()), 4)
        masks = Counter(map(tuple, keep[which].tolist()))
        result["masks"] = len(masks)
        return result

    result = entry(torch.ones(len(held), dtype=torch.bool))
    if len(tasks) > 1:
        result["tasks"] = {t: entry(rows[t]) for t in tasks}
        told = compare_tasks(keep.numpy(), [e.task for e in held], np.ones((1, len(held))))
        assert told is not None
        if told["guess"]:
            result["task_from_mask"] = round(told["guess"]["mean"]["value"], 4)
        result["layers_that_differ"] = round(sum(told["differ"].values()) / len(told["differ"]), 4)
        layers = range(keep.shape[1])
        result["modal_masks"] = {t: "".join(".#"[layer not in told["modal"][t]] for layer in layers) for t in tasks}
    return result


def leave_one_out_table(sample: Sequence[Example], deltas: torch.Tensor) -> None:
    """Say by task what each layer's absence costs."""
    for task in sorted({e.task for e in sample}):
        rows = torch.tensor([e.task == task for e in sample])
        mean = deltas[rows].mean(0).tolist()
        say(f"  {task}: " + " ".join("  -- " if m == float("inf") else f"{m:5.2f}" for m in mean))


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that made the recipe, without paths."""
    return {name: value for name, value in vars(args).items() if name not in PRIVATE}


def summary(results: dict[str, Any]) -> str:
    """The outcome in one line."""
    parts = [f"cross-entropy base {results['base']:.3f}"]
    if "dense_lora" in results:
        parts.append(f"with LoRA {results['dense_lora']:.3f}")
    parts.append(f"routed {results['routed']:.3f}")
    return ", ".join(parts) + f"; {results['skipped']:.1%} of the layers skipped, {results['masks']} masks"


def card(config: FirstConfig, args: argparse.Namespace) -> str:
    """README.md of the recipe, with the front matter that model hubs read."""
    results = config.training["held_back"]
    named = {"license": args.base_license, "base_model": config.base_model}
    # Quoted as JSON, which YAML reads, whatever characters there are.
    front = [f"{key}: {json.dumps(text, ensure_ascii=False)}" for key, text in named.items() if text]
    front.append("tags: [first, layer-skipping]")
    drawn = config.training["drawn"]
    lines = ["---", *front, "---", "", f"# FiRST recipe for {config.base_model}", ""]
    lora = f" and a LoRA of rank {args.lora_r}" if args.phase != "routers" else ""
    lines += [
        f"Routers for {config.block_count} layers of width {config.embedding_length}{lora}.",
        f"About {results['skipped']:.0%} of the layers are skipped for each prompt. `first-train` wrote it;",
        "`first-convert` turns base model and recipe into a GGUF.",
        "",
        f"- prefill {config.prefill}, threshold {config.threshold:.4f}, router norm {config.router_norm}, "
        f"never skipped: {', '.join(map(str, config.protected)) or 'none'}",
        (f"- trained on: {drawn} examples drawn from " if drawn else "- fitted to some of ")
        + ", ".join(f"{count} {task}" for task, count in config.training["data"].items()),
    ]
    lines += [f"- {note}" for note in args.note]
    lines += ["", "Mean cross-entropy in nats per response token on held-back examples:", ""]
    columns = ["base", "dense_lora", "routed"] if "dense_lora" in results else ["base", "routed"]
    names = {"base": "base, all layers", "dense_lora": "LoRA, all layers", "routed": "routed"}
    lines.append("| | examples | " + " | ".join(names[c] for c in columns) + " | layers skipped | distinct masks |")
    lines.append("|---|---|" + "---|" * (len(columns) + 2))
    for name, row in [("all", results), *results.get("tasks", {}).items()]:
        cells = " | ".join(f"{row[c]:.3f}" for c in columns)
        lines.append(f"| {name} | {row['examples']} | {cells} | {row['skipped']:.1%} | {row['masks']} |")
    if "modal_masks" in results:
        lines.append("")
        if "task_from_mask" in results:
            found = f"{results['task_from_mask']:.0%}"
            lines.append(f"The nearest mean mask of the other prompts names the task of {found} of the prompts.")
        lines += [
            f"The usual masks of two tasks differ in {results['layers_that_differ']:.0%} of the layers.",
            "Layers kept (`#`) and skipped (`.`):",
            "",
            *(f"    {mask}  {task}" for task, mask in results["modal_masks"].items()),
        ]
    for warning in config.training["warnings"]:
        lines += ["", f"Warning: {warning}."]
    options = {**config.training["options"], "steps": config.training["steps"], "epochs": None}
    shown = " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
        for name, value in options.items()
        if value is not None and value is not False and value != ""  # 0 is a value
    )
    lines += ["", "Options of first-train:", "", f"    {shown}", ""]
    return "\n".join(lines)
