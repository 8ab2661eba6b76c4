"""first-train: task files and a Hugging Face model in, a recipe directory out."""

from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyfirst.cli.common import check_text, parser, run
from pyfirst.cpu import multiplies_bf16
from pyfirst.errors import InputError
from pyfirst.metadata import NORMS, PREFILL_MODES
from pyfirst.recipe import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    ROUTERS_NAME,
    FirstConfig,
    Recipe,
    load_recipe,
    save_recipe,
)

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# The files of a recipe, all that --force deletes.
OWN = ("README.md", CONFIG_NAME, ROUTERS_NAME, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
# Examples a task on which the number of layers is chosen and the routers are fitted.
FIT_EXAMPLES = 64
# How routers decide: a recipe says with what its own were trained; for new ones these are the defaults.
ROUTING = {"target_skip": 0.25, "protect": "0,last", "prefill": "full", "window": 512, "router_norm": "rms"}
# Layers that carry a state from token to token, as a model's config names them.
RECURRENT = {"conv", "linear_attention", "mamba", "recurrent"}


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-train."""
    result = parser(
        "first-train",
        "Train FiRST routers and a LoRA for a causal language model and write a recipe directory.",
        "first-train -m SmolLM2-135M-Instruct --data tasks.jsonl --out my-recipe --steps 400 --bf16",
    )
    add = result.add_argument
    add("-m", "--model", required=True, metavar="DIR", help="Hugging Face model directory (or hub name)")
    data_help = 'JSON lines {"prompt", "response"[, "task"]}, or owner/name[:split] of the datasets library'
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
    add("--bf16", action="store_true", help="base model in bfloat16; routers stay float32")
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


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Inside the block no other run writes to ``out``. Raises InputError where one does already."""
    if fcntl is None or int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another first-train is at work on it; choose another --out") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def told_of_full_disks(folder: Path) -> Iterator[None]:
    """Raise OSError naming ``folder`` where a file cannot be written to its end; libraries have errors of their own."""
    try:
        yield
    except Exception as error:
        short = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if short or "Error while serializing" in str(error) or "inline_container" in str(error):
            raise OSError(f"{folder}: cannot be written to, is the disk full? ({error})") from error
        raise


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


def load_model(name: str, bf16: bool, lora: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a local directory or hub name.

    Raises InputError, with ``lora`` also for weights that first-convert could not merge one into.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / ADAPTER_CONFIG_NAME).is_file():
            raise InputError(f"{path}: an adapter, not a model; -m takes the base model's directory")
        raise InputError(f"{path}: no config.json; expected a Hugging Face model directory")
    if not path.is_dir() and (path.exists() or name.count("/") != 1 or name.startswith((".", "/"))):
        raise InputError(f"{path}: no such directory; expected a Hugging Face model directory")
    if (path / ADAPTER_CONFIG_NAME).is_file():  # transformers would apply it
        raise InputError(f"{path}: holds an adapter beside the model; merge it, or move {ADAPTER_CONFIG_NAME} away")
    if lora and path.is_dir() and not any(path.glob("*.safetensors")):
        raise InputError(f"{path}: no safetensors file, and first-convert merges a LoRA into no other; save it as one")
    try:
        config = AutoConfig.from_pretrained(name)
        for part in (config, config.get_text_config()) if lora else ():
            if quantised := getattr(part, "quantization_config", None):
                kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
                raise InputError(f"{name}: quantised weights ({kind}), which take no LoRA; use the unquantised model")
        dtype = torch.bfloat16 if bf16 else torch.float32
        # What does not fit would get random weights, so it is asked for.
        how: dict[str, Any] = {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **how)
    except InputError:
        raise
    except Exception as error:  # config and weights fail in their own ways
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{name}: cannot be loaded as a causal language model ({what})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # so does a tokenizer
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{name}: the tokenizer's files cannot be read ({what}); expected tokenizer.json") from error
    model, found = loaded
    if found["missing_keys"]:
        raise InputError(f"{name}: the weights lack {min(found['missing_keys'])}; is a file missing?")
    if found["mismatched_keys"]:
        key, there, wanted = min(found["mismatched_keys"])
        raise InputError(f"{name}: {key} has the shape {list(there)}, config.json wants {list(wanted)}")
    text = model.config.get_text_config()
    kinds = {kind for key in ("layer_types", "layers_block_type") for kind in getattr(text, key, None) or ()}
    if recurrent := kinds & RECURRENT:
        raise InputError(f"{name}: has {min(recurrent)} layers, whose state needs every token; none can be skipped")
    return model.eval(), tokenizer


def lora_targets(text: str, model: Any) -> str | list[str]:
    """Module names of ``--lora-targets``, as PEFT takes them. Raises InputError for one that the model lacks."""
    if text == "all-linear":
        return text
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module, _ in model.named_modules() if name):
            raise InputError(f"--lora-targets: no module '{name}' in {type(model).__name__}")
    return names


def with_lora(base: Any, args: argparse.Namespace, name: str) -> Any:
    """The model under a new LoRA of ``--lora-r``, ``-alpha`` and ``-targets``; ``name`` is what the LoRA calls it.

    Raises InputError for modules that the model lacks, or that first-convert could not merge.
    """
    from peft import LoraConfig, get_peft_model

    from pyfirst.training import report
    from pyfirst.training.routers import find_layers

    how: dict[str, Any] = {"r": args.lora_r, "lora_alpha": args.lora_alpha or 2 * args.lora_r}
    how["task_type"] = "CAUSAL_LM"
    if base.config.get_text_config() is not base.config:  # of a multimodal parent, what llama.cpp runs
        layers = find_layers(base)
        text = next(name for name, module in base.named_modules() if module is layers).rpartition(".")[0]
        how["exclude_modules"] = rf"(?!{re.escape(text)}\.|lm_head$).*"
    lora = LoraConfig(target_modules=lora_targets(args.lora_targets, base), **how)
    try:
        base = get_peft_model(base, lora)
    except ValueError as error:  # PEFT prints the module, and all kinds that it knows
        named = f"--lora-targets {args.lora_targets}"
        raise InputError(f"{named}: a module that takes no LoRA; name linear ones such as q_proj,down_proj") from error
    if lora.target_parameters:  # PEFT's own addition where experts are one tensor
        if args.lora_targets != "all-linear":
            raise InputError(f"--lora-targets {args.lora_targets}: first-convert cannot merge a LoRA on experts")
        report.say("the experts get no LoRA, which first-convert could not merge")
        rest = sorted(lora.target_modules or ())
        base = get_peft_model(base.unload(), LoraConfig(target_modules=rest, **how))
    # What a user's disk is called is nobody's business.
    base.peft_config["default"].base_model_name_or_path = name
    return base


def tokenized(args: argparse.Namespace, rows: Sequence[Any], base: Any, tokenizer: Any) -> tuple[list[Any], Any]:
    """Rows as Examples that the model takes, and how many prompts were cut and examples dropped. Raises InputError."""
    from pyfirst.training import report
    from pyfirst.training.data import load_examples

    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = min(args.max_length, positions or args.max_length)
    examples, counts = load_examples(rows, tokenizer, longest)
    if counts["shortened"] or counts["dropped"]:
        limit = f"--max-length {longest}" if longest == args.max_length else f"the model's {longest} positions"
        report.say(
            f"{counts['shortened']} prompts shortened and {counts['dropped']} examples dropped "
            f"of {len(rows)} to fit {limit}"
        )
    if len(examples) < 2:
        raise InputError(f"{args.data[0]}: {len(examples)} usable examples, training needs at least 2")
    top, vocabulary = max(max((*e.prompt, *e.response)) for e in examples), base.get_input_embeddings().weight.shape[0]
    if top >= vocabulary:
        raise InputError(f"{args.model}: the tokenizer gives token {top}, the model has {vocabulary}")
    return examples, counts


def teacher_of(name: str | None, model: Any) -> dict[str, Any]:
    """LoRA weights of a recipe, or of the model as it is now, by the names of ``model.lora()``. Raises InputError."""
    from safetensors.torch import load_file

    mine = model.lora()
    if name is None:
        return {key: parameter.detach().clone() for key, parameter in mine.items()}
    folder = load_recipe(name).adapter_dir
    if folder is None:
        raise InputError(f"--teacher {name}: a recipe without a LoRA")
    path, ours = folder / ADAPTER_WEIGHTS_NAME, model.base.peft_config["default"]
    stored = {f"base.{key.replace('.weight', '.default.weight')}": value for key, value in load_file(path).items()}
    theirs = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    if (theirs.get("r"), theirs.get("lora_alpha")) != (ours.r, ours.lora_alpha) or stored.keys() != mine.keys():
        raise InputError(f"{path}: expected rank {ours.r}, scale {ours.lora_alpha} and the modules of this run's LoRA")
    return {key: value.to(mine[key]) for key, value in stored.items()}


def train(args: argparse.Namespace) -> Path:
    """Train as the options of ``build_parser`` say; returns the recipe directory.

    Raises InputError for wrong input and when training does not stay finite. The recipe in ``--out`` is only
    replaced by a complete new one.
    """
    check(args)
    out = Path(args.out).resolve()
    with alone(out), told_of_full_disks(out.parent):
        return _train(args, out)


def _train(args: argparse.Namespace, out: Path) -> Path:
    # Imported late: they take seconds, which --help and a wrong option need not wait for.
    import torch
    import transformers
    from safetensors.torch import load_file

    from pyfirst.tasks import gather
    from pyfirst.training import checkpoints, report
    from pyfirst.training.data import Example, draw, hold_back, read_rows
    from pyfirst.training.objectives import leave_one_out, start_from
    from pyfirst.training.phases import keep_heap_small, plan, run_phase
    from pyfirst.training.routers import FirstModel, Routers
    from pyfirst.training.search import (
        NOT_FINITE,
        SPREAD,
        find_order,
        fit_routers,
        nested,
        settle,
        static_mask,
        targets_of,
    )

    if not args.verbose:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="transformers|peft")
    keep_heap_small()
    started = time.monotonic()
    rows = gather(args.data, read_rows)
    earlier = load_recipe(args.recipe) if args.recipe else None
    base, tokenizer = load_model(args.model, args.bf16, args.phase != "routers")
    base.requires_grad_(False)
    first_process = int(os.environ.get("RANK", "0")) == 0
    content: dict[str, str | None] = {}
    if first_process:
        described = {**base.config.to_dict(), "_name_or_path": "", "transformers_version": ""}
        described["chat_template"] = tokenizer.chat_template
        content["model"] = checkpoints.digest(described, base.state_dict())
    transformers.set_seed(args.seed)
    text_config = base.config.get_text_config()
    count, width = text_config.num_hidden_layers, text_config.hidden_size
    args, config, removals = settle_options(args, earlier, count, width)
    unprotected = count - len(config.protected)
    possible = min(unprotected, count - 1)  # of layers to leave out
    target_keep = max(0.0, 1 - args.target_skip * count / unprotected)

    examples, counts = tokenized(args, rows, base, tokenizer)
    training, held = hold_back(examples, args.hold_back, args.seed)
    if not training:
        raise InputError(f"{args.data[0]}: no task has two different prompts; nothing is left to train on")
    faults = []
    if absent := sorted({e.task for e in held} - {e.task for e in training}):
        faults.append(f"nothing of {', '.join(absent)} was trained: a task needs two prompts, one to hold back")
        report.say(f"warning: {faults[0]}")
    per_step = args.batch_size * args.grad_accum * int(os.environ.get("WORLD_SIZE", "1"))
    steps = args.steps or max(1, round((args.epochs or 1) * len(training) / per_step))

    if args.phase != "routers":
        base = with_lora(base, args, config.base_model)
    routers = Routers.from_recipe(earlier) if earlier else Routers(count, width, config.router_norm)
    model = FirstModel(base, routers, config.threshold, config.prefill, config.window, config.protected)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.bf16 and not torch.cuda.is_available() and multiplies_bf16() is False:
        report.say("warning: this processor does not multiply bfloat16 itself: --bf16 takes several times as long here")

    def prior() -> None:
        some = sample()
        report.say(f"leave-one-out over {len(some)} examples, {unprotected} layers")
        deltas, features = leave_one_out(model, some, args.batch_size)
        if not torch.isfinite(features).all() or deltas.isnan().any():
            raise InputError(NOT_FINITE)
        start_from(model, deltas, features, target_keep)
        report.leave_one_out_table(some, deltas)

    teacher = teacher_of(args.teacher, model) if args.teacher else None
    work = out.parent / f".{out.name}.work"
    if first_process:
        content["recipe"] = checkpoints.digest(asdict(earlier.config), routers.state_dict()) if earlier else None
        content["teacher"] = checkpoints.digest({}, teacher) if teacher else None
        checkpoints.begin(work, report.options(args, build_parser()), content, rows, args.resume)
    elif args.resume:  # or this process would go on from another checkpoint than the first
        checkpoints.drop_halves(work)
    tasks = sorted({e.task for e in training})
    least = removals // 2  # even the hardest task
    most = min(2 * removals - least, possible)  # even the easiest one
    routed = len(tasks) > 1 and not args.static and args.target_skip > 0

    def sample(size: int = args.prior_examples) -> list[Example]:
        return draw(training, size, args.seed + 1)

    known: dict[str, dict[str, torch.Tensor]] = {}

    def once(name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What ``make`` found, before the run was interrupted perhaps."""
        stored = work / f"{name}.safetensors"
        if name not in known and args.resume and stored.is_file():
            known[name] = load_file(stored)
        elif name not in known:
            known[name] = make()
            if first_process:
                checkpoints.save(stored, known[name])
        return known[name]

    def order() -> torch.Tensor:
        """The layers to leave out, the first first: for routing half as many again as the target asks of one mask."""
        if not removals:
            return torch.empty(0, dtype=torch.long)

        def find() -> dict[str, torch.Tensor]:
            some = sample()
            report.say(f"leaving out each of {unprotected} layers on {len(some)} examples of {', '.join(tasks)}")
            return {"order": find_order(model, some, most if routed else possible, args.batch_size)}

        return once("order", find)["order"]

    def choose() -> dict[str, torch.Tensor]:
        if routed:
            ladder, total = nested(order(), count, least), len(tasks) * removals
            masks, curves = settle(model, sample(FIT_EXAMPLES), tasks, ladder, total, args.batch_size, report.say)
            targets = targets_of(order(), curves, masks)
        elif args.static in (None, "loo"):
            masks = nested(order(), count)[removals][None]
            targets = targets_of(order(), torch.zeros(1, 1), masks)
        else:
            masks = static_mask(args.static, model.protected, removals, args.seed)[None]
            targets = torch.where(masks, SPREAD, -SPREAD)
        masks, targets = (found.expand(len(tasks), -1).clone() for found in (masks, targets))
        for task, row in zip(tasks, masks.tolist(), strict=True):
            report.say(f"  {''.join('#' if keep else '.' for keep in row)}  {task}")
        return {"masks": masks, "targets": targets}

    history = []
    for number, phase in enumerate(plan(args.phase, args.objective, steps, routed)):
        if args.distill and teacher is None and not phase.dense:  # the LoRA that skips is soon no good with all layers
            teacher = teacher_of(args.teacher, model)
        masks: dict[str, torch.Tensor] = {}
        if phase.masks == "depths":
            masks = dict.fromkeys(tasks, nested(order(), count, least))
        elif phase.masks:
            masks = dict(zip(tasks, once("masks", choose)["masks"][:, None], strict=True))
        prepare = prior if phase.steer and phase.routers else None
        history.append(
            run_phase(model, phase, training, args, target_keep, args.seed + number, prepare, work, masks, teacher)
        )

    with torch.no_grad():  # what is measured from here on is what is stored
        for parameter in model.lora().values():
            parameter.copy_(parameter.half().to(parameter.dtype))
    if args.objective == "search" and args.phase != "lora":
        found = once("masks", choose)
        many = sample(FIT_EXAMPLES)
        groups = torch.tensor([tasks.index(e.task) for e in many])
        fit_routers(model, many, groups, found["masks"], found["targets"], args.batch_size)
    elif args.objective == "gates" and args.phase != "lora":
        model.threshold.fill_(report.threshold_for(model, held, args.batch_size, args.target_skip))
    config.threshold = float(model.threshold)
    report.say(f"measuring on {len(held)} held-back examples")
    results = report.measure(model, held, args.batch_size)
    if not all(math.isfinite(results.get(name, 0.0)) for name in ("base", "dense_lora", "routed")):
        raise InputError(NOT_FINITE)
    config.calibration = report.calibration(model, held, args.batch_size)
    results["seconds"] = round(time.monotonic() - started)
    faults += [w for entry in history for w in entry.pop("warnings")]
    several = args.phase != "lora" and 0 < removals < possible and (routed or args.objective != "search")
    if several and results["masks"] == 1 and len(held) > 1 and not any("collapsed" in fault for fault in faults):
        faults.append("routing collapsed: every held-back prompt got the same mask")
    if abs(results["skipped"] - args.target_skip) > 0.05:
        faults.append(f"skips {results['skipped']:.0%} of the layers, the target was {args.target_skip:.0%}")
    config.training = {
        "options": report.options(args, build_parser()),
        "steps": steps,
        "drawn": sum(entry["steps"] for entry in history) * per_step,
        "data": {task: sum(e.task == task for e in training) for task in sorted({e.task for e in training})},
        "truncation": counts,
        "phases": history,
        "held_back": results,
        "warnings": faults,
    }
    if first_process:
        write(out, model, config, args)
        if not args.keep_checkpoints:
            shutil.rmtree(work, ignore_errors=True)
    for fault in faults:
        report.say(f"warning: {fault}")
    report.say(report.summary(results) + f"; wrote {out}")
    return out


def write(out: Path, model: Any, config: FirstConfig, args: argparse.Namespace) -> None:
    """Write the whole recipe beside ``out``, then put it in place of what is there."""
    import torch
    from safetensors.torch import load_file, save

    from pyfirst.training import report

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        new = Path(folder) / "new"
        if args.phase != "routers":
            # Otherwise PEFT looks for the base model's name on the hub, to tell whether its vocabulary has grown.
            model.base.save_pretrained(new, save_embedding_layers=False)
            path = new / ADAPTER_CONFIG_NAME
            adapter = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(adapter["target_modules"], list):  # PEFT writes a set, in any order
                adapter["target_modules"].sort()
            path.write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
            path = new / ADAPTER_WEIGHTS_NAME
            tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
            bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
            if bad:
                raise InputError(f"the trained LoRA is not finite ({bad[0]}); nothing written, try a lower --lr")
            path.unlink()  # readable for its owner only, whatever the umask
            path.write_bytes(save(tensors, metadata={"format": "pt"}))
        routers = model.routers
        save_recipe(new, config, routers.weight.detach().cpu().numpy(), routers.bias.detach().cpu().numpy())
        (new / "README.md").write_text(report.card(config, args), encoding="utf-8")
        old = Path(folder) / "old"
        try:
            if args.force and out.exists():
                out.rename(old)
                check_own(old, out)  # what has come since the start too
            new.rename(out)  # of what is there, replaces an empty folder only
        except (InputError, OSError) as error:
            if old.exists():
                old.rename(out)
            kept = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
            new.rename(kept)
            reason = error if isinstance(error, InputError) else f"{out}: cannot be replaced ({error.strerror})"
            raise InputError(f"{reason}; the new recipe is in {kept}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    return run(build_parser, train, argv)


if __name__ == "__main__":
    sys.exit(main())
