"""first-train: task files and a Hugging Face model in, a recipe directory out."""

from __future__ import annotations

import argparse
import contextlib
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

from pyfirst.cli.common import run
from pyfirst.cpu import multiplies_bf16
from pyfirst.errors import InputError
from pyfirst.recipe import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    FirstConfig,
    load_recipe,
    save_recipe,
)
from pyfirst.training.options import build_parser, check, check_own, settle_options

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Examples a task on which the number of layers is chosen and the routers are fitted.
FIT_EXAMPLES = 64


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


def load_model(name: str, bf16: bool, lora: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a local directory or hub name.

    Raises InputError, with ``lora`` also for weights that first-convert could not merge one into.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from pyfirst.training.routers import check_layers

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
        if lora:  # others in a hub repository would only be refused once trained
            how["use_safetensors"] = True
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **how)
    except InputError:
        raise
    except Exception as error:  # config and weights fail in their own ways
        wanted = "a causal language model" + (" of safetensors files, which take a LoRA" if lora else "")
        raise InputError(f"{name}: cannot be loaded as {wanted} ({type(error).__name__}: {error})") from error
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
    check_layers(model)
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
    from torch import nn

    from pyfirst.training import report
    from pyfirst.training.routers import find_layers

    how: dict[str, Any] = {"r": args.lora_r, "lora_alpha": args.lora_alpha or 2 * args.lora_r}
    how["task_type"] = "CAUSAL_LM"
    linear = [(name, type(module).__name__) for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    # A linear layer of this kind returns more than a product, so that no LoRA can be put on it or merged into it.
    routers = sorted({name.rpartition(".")[2] for name, kind in linear if "Router" in kind})
    excluded = [rf".*\.{re.escape(name)}" for name in routers]
    if base.config.get_text_config() is not base.config:  # of a multimodal parent, what llama.cpp runs
        layers = find_layers(base)
        text = next(name for name, module in base.named_modules() if module is layers).rpartition(".")[0]
        excluded.append(rf"(?!{re.escape(text)}\.|lm_head$).*")
    if excluded:
        how["exclude_modules"] = "|".join(excluded)
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
    from pyfirst.training.data import Example, draw, hold_back, read_rows, weigh
    from pyfirst.training.objectives import leave_one_out, start_from
    from pyfirst.training.phases import keep_heap_small, plan, run_phase
    from pyfirst.training.routers import FirstModel, Routers
    from pyfirst.training.search import (
        NOT_FINITE,
        SPREAD,
        find_order,
        fit_routers,
        nested,
        reach,
        settle,
        static_mask,
        targets_of,
    )

    if not args.verbose:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="transformers|peft")
    started = time.monotonic()
    if args.bf16 and not torch.cuda.is_available() and multiplies_bf16() is False:
        report.say("--bf16: this processor does not multiply bfloat16 and would take many times as long; using float32")
        args = argparse.Namespace(**{**vars(args), "bf16": False})
    rows = gather(args.data, read_rows)
    earlier = load_recipe(args.recipe) if args.recipe else None
    base, tokenizer = load_model(args.model, args.bf16, args.phase != "routers")
    keep_heap_small(base.get_memory_footprint())
    base.requires_grad_(False)
    first_process = int(os.environ.get("RANK", "0")) == 0
    content: dict[str, str | None] = {}
    if first_process:
        described = {**base.config.to_dict(), "_name_or_path": "", "transformers_version": ""}
        described["chat_template"] = tokenizer.chat_template
        described["tokenizer"] = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
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
    weigh(training)
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
        checkpoints.begin(work, report.options(args), content, rows, args.resume)
    elif args.resume:  # or this process would go on from another checkpoint than the first
        checkpoints.drop_halves(work)
    tasks = sorted({e.task for e in training})
    least, most = reach(removals, count)
    most = min(most, possible)
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
        """The layers to leave out, the first first: for routing as many as the easiest task may leave out."""
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
            masks, curves = settle(model, sample(FIT_EXAMPLES), tasks, ladder, total, args.batch_size)
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
        "options": report.options(args),
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
