"""The options of first-train: what they are, and what they mean for a model."""

from __future__ import annotations

import argparse
import copy
import math
import os
from pathlib import Path

from pyfirst.cli.common import check_text, parser
from pyfirst.errors import InputError
from pyfirst.metadata import NORMS, PREFILL_MODES
from pyfirst.recipe import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    ROUTERS_NAME,
    FirstConfig,
    Recipe,
)

# The files of a recipe, all that --force deletes.
OWN = ("README.md", CONFIG_NAME, ROUTERS_NAME, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
# How routers decide: a recipe says with what its own were trained; for new ones these are the defaults.
ROUTING = {"target_skip": 0.25, "protect": "0,last", "prefill": "full", "window": 512, "router_norm": "rms"}


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-train."""
    result = parser(
        "first-train",
        "Train FiRST routers and a LoRA for a causal language model and write a recipe directory.",
        "first-train -m SmolLM2-135M-Instruct --data tasks.jsonl --out my-recipe --steps 400 --bf16",
    )
    add = result.add_argument
    add("-m", "--model", required=True, metavar="DIR", help="Hugging Face model directory (or hub name)")
    data_help = (
        'JSON lines {"prompt", "response"[, "task"]}, or owner/name[/configuration][:split] of the datasets library'
    )
    add("--data", required=True, nargs="+", metavar="FILE", help=data_help)
    add("--out", required=True, metavar="DIR", help="recipe directory to write")
    add("--force", action="store_true", help="replace the recipe in --out")
    add("--phase", choices=("both", "routers", "lora"), default="both", help="what to train (default: both)")
    add("--recipe", metavar="DIR", help="with --phase lora: the recipe whose routers stay as they are")
    add("--objective", choices=("search", "gates", "paper"), default="search", help="see docs/training.md")
    static_help = "one mask for every prompt: loo, even, random or layer numbers (default: routing)"
    add("--static", metavar="KIND", help=static_help)
    length = result.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps of all phases together (default: one epoch)")
    length.add_argument("--epochs", type=float, help="passes over the data of all phases together")
    add("--batch-size", type=int, default=2, help="examples a forward pass: memory grows with it (default: 2)")
    add("--grad-accum", type=int, default=8, help="forward passes an optimizer step (default: 8)")
    add("--lr", type=float, default=1e-3, help="learning rate of the LoRA (default: 1e-3)")
    add("--router-lr", type=float, default=5e-3, help="of routers trained by gates or paper (default: 5e-3)")
    add("--lora-r", type=int, default=8, help="rank (default: 8)")
    add("--lora-alpha", type=float, help="scale (default: twice the rank)")
    add("--lora-targets", default="all-linear", help="module names, comma-separated (default: all-linear)")
    add("--target-skip", type=float, help="share of all layers to skip (default: 0.25)")
    add("--protect", help="layers never skipped, or none (default: 0,last)")
    add(
        "--prefill",
        choices=PREFILL_MODES,
        help="does the prompt skip too? (default: full, no)",
    )
    add(
        "--window",
        type=int,
        help="with --prefill skip: prompt tokens that decide (default: 512)",
    )
    add("--router-norm", choices=NORMS, help="normalisation before the router (default: rms)")
    distill_help = "share of the loss that is divergence from the teacher with all layers (default: 0)"
    add("--distill", type=float, default=0.0, metavar="SHARE", help=distill_help)
    teacher_help = "with --distill: recipe of the same rank, trained with --target-skip 0 (default: the warm-up's LoRA)"
    add("--teacher", metavar="DIR", help=teacher_help)
    add("--penalty", type=float, default=0.01, help="lambda of --objective paper (default: 0.01)")
    add("--max-length", type=int, default=512, help="tokens an example; longer prompts are cut (default: 512)")
    add("--hold-back", type=int, default=32, help="examples a task kept from training (default: 32)")
    add("--prior-examples", type=int, default=16, help="examples a task to try layers on (default: 16)")
    add("--seed", type=int, default=1, help="of data order and initial LoRA (default: 1)")
    add(
        "--bf16",
        action="store_true",
        help="base model in bfloat16 if the processor multiplies it; routers stay float32",
    )
    add("--save-steps", type=int, default=0, help="checkpoint every so many steps (default: each phase only)")
    add("--keep-checkpoints", action="store_true", help="leave them in .NAME.work beside --out")
    add("--resume", action="store_true", help="go on from the checkpoints of an interrupted run")
    add("--base-name", help="name of the base model for the card (default: the directory's)")
    add("--base-license", default="", help="licence of the base model for the card, such as apache-2.0")
    add("--note", action="append", default=[], help="line for the card: credit and licence of data, say")
    return result


def check(args: argparse.Namespace) -> None:
    """Refuse impossible options before anything is loaded. Raises InputError."""
    named = {"--base-name": args.base_name or "", "--base-license": args.base_license}
    for option, text in [("--out", os.path.realpath(args.out)), *named.items(), *(("--note", n) for n in args.note)]:
        check_text(option, text)
    for option in ("batch_size", "grad_accum", "lora_r", "window", "hold_back", "prior_examples", "steps"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} is {value}, expected at least 1")
    if args.max_length < 16:
        raise InputError(f"--max-length is {args.max_length}, expected at least 16 tokens")
    for option in ("lr", "router_lr", "epochs", "lora_alpha"):
        value = getattr(args, option)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{option.replace('_', '-')} is {value}, expected a positive number")
    if not (args.penalty >= 0 and math.isfinite(args.penalty)):
        raise InputError(f"--penalty is {args.penalty}, expected 0 or a positive number such as 0.01")
    if args.save_steps < 0:
        raise InputError(f"--save-steps is {args.save_steps}, expected a number of steps, or 0 for none")
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed is {args.seed}, expected 0 to {2**31 - 1}")
    if not 0 <= args.distill <= 1:
        raise InputError(f"--distill is {args.distill}, expected a share from 0 to 1, such as 0.5")
    if args.teacher and not args.distill:
        raise InputError("--teacher needs --distill SHARE, such as 0.5")
    if args.distill and args.phase == "routers":
        raise InputError("--distill needs a LoRA that learns, --phase both or lora")
    if args.target_skip is not None and not 0 <= args.target_skip < 1:
        raise InputError(f"--target-skip is {args.target_skip}, expected a share from 0 to below 1, such as 0.25")
    if args.phase == "lora" and not args.recipe:
        raise InputError("--phase lora needs --recipe DIR, the recipe with the routers to keep")
    if args.recipe and args.phase != "lora":
        raise InputError("--recipe needs --phase lora; other phases train routers of their own")
    if args.static and (args.objective != "search" or args.phase == "lora"):
        raise InputError("--static needs --objective search, and --phase both or routers")
    out = Path(args.out).resolve()
    if not out.exists():
        return
    if out in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(out):  # the whole folder will be replaced
        raise InputError(f"{out}: cannot be replaced while it is in use; name a folder in it with --out")
    if not out.is_dir():
        raise InputError(f"{out}: not a folder; choose another --out")
    if any(out.iterdir()):
        if not args.force:
            raise InputError(f"{out}: exists and is not empty; choose another --out or add --force")
        if not (out / CONFIG_NAME).is_file():
            raise InputError(f"{out}: no recipe, so --force does not replace it; choose another --out")
        check_own(out, out)


def check_own(folder: Path, out: Path) -> None:
    """Raise InputError for a folder, ``out`` to the user, that holds anything but the files of a recipe."""
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in OWN or path.is_dir()):
        raise InputError(f"{out}: --force would delete {foreign[0]}, which is no part of a recipe; move it away")


def protected_layers(text: str, count: int) -> list[int]:
    """Layer indices of ``--protect``: numbers, ``last`` or ``none``. Raises InputError."""
    if text.strip() in ("none", ""):
        return []
    result = set()
    for part in text.split(","):
        part = part.strip()
        if part != "last" and not (part.isdecimal() and int(part) < count):
            raise InputError(f"--protect names layer '{part}', expected 0 to {count - 1}, last or none")
        result.add(count - 1 if part == "last" else int(part))
    return sorted(result)


def settle_options(
    args: argparse.Namespace, earlier: Recipe | None, count: int, width: int
) -> tuple[argparse.Namespace, FirstConfig, int]:
    """What the options mean for a model of ``count`` layers: options, what the recipe will say, layers to leave out.

    ``earlier`` is the recipe whose routers stay as they are. Raises InputError for what such a model cannot do.
    """
    import torch

    from pyfirst.training.search import removals_of, static_mask

    if earlier and (earlier.config.block_count, earlier.config.embedding_length) != (count, width):
        raise InputError(
            f"{args.recipe}: routers for {earlier.config.block_count} layers of width "
            f"{earlier.config.embedding_length}, the model has {count} of width {width}"
        )
    given = {name: getattr(args, name) for name in ROUTING if getattr(args, name) is not None}
    settled = {**ROUTING, **given}
    if earlier:
        own = {name: getattr(earlier.config, name) for name in ("prefill", "window", "router_norm")}
        own["protect"] = ",".join(map(str, sorted(earlier.config.protected))) or "none"
        told = {**settled, **earlier.config.training.get("options", {})}
        skip = own["target_skip"] = told["target_skip"]
        if isinstance(skip, bool) or not (isinstance(skip, (int, float)) and 0 <= skip < 1):
            key = f"{Path(args.recipe) / CONFIG_NAME}: 'training.options.target_skip'"
            raise InputError(f"{key} is {skip!r}, expected a number from 0 to below 1")
        if "protect" in given:
            given["protect"] = ",".join(map(str, protected_layers(given["protect"], count))) or "none"
        for name, value in given.items():
            if value != own[name]:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {value}: the routers of {args.recipe} have {own[name]}; leave {option} out")
        settled = own
    args = argparse.Namespace(**{**vars(args), **settled})
    config = (
        copy.deepcopy(earlier.config)
        if earlier
        else FirstConfig(
            count,
            width,
            router_norm=args.router_norm,
            prefill=args.prefill,
            window=args.window,
            protected=protected_layers(args.protect, count),
        )
    )
    here = Path(args.model)
    config.base_model = args.base_name or (here.resolve().name if here.is_dir() else args.model)
    unprotected = count - len(config.protected)
    removals = removals_of(args.target_skip, count)
    if unprotected == 0:
        raise InputError("every layer is protected, so none can be skipped; see --protect")
    if removals > min(unprotected, count - 1) and not earlier:
        raise InputError(
            f"--target-skip {args.target_skip}: {removals} layers of {count}, but only {unprotected} of {count} are "
            "unprotected and one at least must run"
        )
    if args.static not in (None, "loo"):
        protected = torch.tensor([layer in config.protected for layer in range(count)])
        if not static_mask(args.static, protected, removals, args.seed).any():
            raise InputError(f"--static {args.static}: no layer would be left")
    return args, config, removals
