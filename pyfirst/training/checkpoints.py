"""The folder of an unfinished run: what it was told, the phases that are done, and Trainer's checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from pyfirst.errors import InputError
from pyfirst.recipe import read_json
from pyfirst.tasks import Example
from pyfirst.training import report


def begin(
    work: Path,
    options: Mapping[str, Any],
    content: Mapping[str, str | None],
    rows: Sequence[Example],
    resume: bool,
) -> None:
    """Make an empty folder or, to resume, check that the one that lies there is of the same run.

    ``content`` holds digests of what options name by its path, for a folder may have been moved; ``rows`` are the data.
    Raises InputError where another option, content or data was used, OSError where nothing can be written.
    """
    path = work / "options.json"
    content = {**content, "data": _fingerprint(rows)}
    now = json.loads(json.dumps({**options, **content}))
    if resume and work.is_dir():
        before = read_json(path) if path.is_file() else now
        for name in now:
            if before.get(name, now[name]) != now[name] and name != "base_license":  # only the card holds it
                what = "" if name in content else f" (before: {before[name]}, now: {now[name]})"
                raise InputError(
                    f"--resume with another --{name.replace('_', '-')} than the interrupted run{what}; "
                    "start anew without --resume"
                )
        drop_halves(work)
        return
    if resume:
        report.say(f"no interrupted run in {work}, starting anew")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def drop_halves(work: Path) -> None:
    """Remove what is not whole; in a checkpoint, trainer_state.json is written last."""
    for path in [*work.glob("*.safetensors"), *work.glob("*/checkpoint-*")]:
        try:
            if path.is_dir():
                read_json(path / "trainer_state.json")
            load_file(path / SAFE_WEIGHTS_NAME if path.is_dir() else path)
        except (InputError, OSError, SafetensorError):
            report.say(f"{path}: not complete, removed")
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(path)


def digest(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Of what a model, a recipe or a LoRA holds, wherever it lies."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _fingerprint(rows: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for row in rows:  # not their tokens: a chat template may put the date in
        digest.update(repr((row.prompt, row.references[0], row.task)).encode())
    return digest.hexdigest()
