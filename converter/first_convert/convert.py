"""first-convert: a Hugging Face model, its LoRA and its FiRST routers into one GGUF file."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from first_convert import check, pack, provenance, quantize
from first_convert.checkpoint import Checkpoint, local_folder
from pyfirst.cli import common
from pyfirst.errors import InputError
from pyfirst.recipe import ADAPTER_CONFIG_NAME, Recipe, load_recipe, read_json

# Bits per weight of the types that are wider than q6_k, whose 6.6 stands for all the others.
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "mxfp4_moe": 8.5}
_KEYS = 16 << 20  # bytes, more than vocabulary and routers take


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-convert."""
    parser = common.parser(
        "first-convert",
        "Convert a Hugging Face model folder, with the LoRA and routers of a recipe, to one GGUF file.",
        "first-convert smollm2-135m-hf --first recipe --outfile smollm2-first.gguf --outtype q4_k_m",
    )
    parser.add_argument(
        "model_dir",
        nargs="?",
        metavar="MODEL_DIR",
        help="model folder, or owner/name on the Hugging Face Hub",
    )
    parser.add_argument(
        "--first", metavar="RECIPE_DIR", help="recipe of first-train (routers, LoRA), folder or Hub name"
    )
    parser.add_argument(
        "--lora", metavar="ADAPTER_DIR", help="PEFT LoRA to merge, when the recipe has none; folder or Hub name"
    )
    parser.add_argument("--base-gguf", metavar="FILE", help="pack the routers into this GGUF, tensors untouched")
    parser.add_argument("--strip", metavar="FILE", help="remove the routers from this GGUF, tensors untouched")
    parser.add_argument("--outfile", metavar="FILE", help="GGUF to write")
    parser.add_argument("--outtype", metavar="TYPE", help=f"{', '.join(quantize.TYPES)} (default q8_0)")
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix of llama-imatrix, as GGUF")
    parser.add_argument("--pre-tokenizer", metavar="NAME", help="llama.cpp's pre-tokenizer, where not recognised")
    parser.add_argument("--threads", type=int, default=0, help="threads for quantising (default: all cores)")
    parser.add_argument("--force", action="store_true", help="replace an existing outfile")
    parser.add_argument("--allow-dense", action="store_true", help="also write models whose layers cannot be skipped")
    parser.add_argument(
        "--date", action="store_true", help="record the time in the file (SOURCE_DATE_EPOCH is, without asking)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _say(text: str) -> None:
    print(f"first-convert: {text}", file=sys.stderr, flush=True)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _utf8(path: str | Path | None) -> str | None:
    """A path for a child process, which runs in UTF-8 mode whatever the locale here is."""
    return None if path is None else os.fsencode(os.path.abspath(path)).decode("utf-8", "surrogateescape")


def _child(module: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the module's job in a process of its own and return its answer. Raises InputError with the child's line."""
    request, result = folder / "job.json", folder / "result.json"
    result.unlink(missing_ok=True)
    request.write_text(json.dumps({**job, "result": _utf8(result)}), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONUTF8": "1",  # upstream reads and prints with the locale's encoding
        "OMP_NUM_THREADS": "1",  # merges are many and small: waking threads costs 20 times the work
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # else glibc keeps every freed matrix below 32 MB
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not sys.stderr.isatty():
        environment["TQDM_DISABLE"] = "1"
    if not job.get("verbose"):
        environment["PYTHONWARNINGS"] = "ignore"
    command = [sys.executable, "-m", "first_convert.worker", module, str(request)]
    # stdout carries our result only. Ctrl-C reaches us alone, and we end the child; if we are killed, it sees the end
    # of its input.
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=null, start_new_session=True) as process:
        try:
            process.wait()
        finally:
            process.kill()
    if not result.is_file():
        code = process.returncode
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        raise RuntimeError(f"{module} ended with {reason}{memory}")
    answer = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        raise (InputError if answer["expected"] else RuntimeError)(answer["error"])
    return answer


def _publish(temporary: Path, outfile: Path) -> None:
    """Put a finished file at its final name so that a crash leaves the old file or the new one."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(outfile)
    folder = os.open(outfile.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_routes(path: Path, allow_dense: bool) -> None:
    """Raise InputError, or say so with ``allow_dense``, where llama.cpp cannot skip layers of a file."""
    if reason := check.routes(path):
        if not allow_dense:
            raise InputError(f"{reason}; --allow-dense writes a file that runs all layers")
        _say(f"warning: {reason}; the file will run all layers")


def _check_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise InputError, naming both numbers, for a recipe of another depth or width."""
    config, path = recipe.config, checkpoint.path / "config.json"
    for what, found, wanted in (
        ("layers", checkpoint.block_count, config.block_count),
        ("wide", checkpoint.embedding_length, config.embedding_length),
    ):
        if found != wanted:
            raise InputError(f"{path}: the model is {found} {what}, the recipe was trained for {wanted}")


def _bits(checkpoint: Checkpoint, kind: str) -> float:
    """Bits per weight that a file of this type needs at most, wider types for odd rows included."""
    rows = [tensor.shape[-1] for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1]
    if kind in quantize.PLAIN or all(row % 256 == 0 for row in rows):
        return BITS.get(kind, 6.6)
    return 8.5 if all(row % 32 == 0 for row in rows) else 16.0


def _lora_dir(recipe: Recipe | None, lora: str | Path | None) -> Path | None:
    """The folder of the adapter to merge, if any. Raises InputError where there are two or a wrong one."""
    if lora is None:
        return recipe.adapter_dir if recipe else None
    if recipe is not None and recipe.adapter_dir is not None:
        raise InputError(f"--lora {lora}: the recipe brings its own LoRA ({recipe.adapter_dir}); give one of them")
    if not (Path(lora) / ADAPTER_CONFIG_NAME).is_file():
        raise InputError(f"--lora {lora}: no {ADAPTER_CONFIG_NAME} there; expected a PEFT adapter folder")
    return Path(lora)


def convert(
    model_dir: str | Path | None = None,
    *,
    outfile: str | Path,
    first: str | Path | None = None,
    lora: str | Path | None = None,
    base_gguf: str | Path | None = None,
    strip: str | Path | None = None,
    outtype: str | None = None,
    imatrix: str | Path | None = None,
    pre_tokenizer: str | None = None,
    threads: int = 0,
    force: bool = False,
    allow_dense: bool = False,
    date: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Write one GGUF; see ``first-convert --help`` for the arguments. Progress goes to stderr.

    Exactly one of ``model_dir``, ``base_gguf`` and ``strip`` is the source. The file appears under its name
    only when it is complete and llama.cpp has loaded it. Returns {"outfile", "bytes", "outtype", "layers",
    "lora", "fallbacks", "fallback_bytes", "seconds", ...}; with ``dry_run``, which writes nothing, {"output_at_most",
    "disk_needed", "disk_free", ...} in bytes. Raises InputError (a ValueError) for wrong input, OSError for a full
    disk.
    """
    started = time.monotonic()
    if sum(x is not None for x in (model_dir, base_gguf, strip)) != 1:
        raise InputError("give exactly one of MODEL_DIR, --base-gguf and --strip")
    outfile = Path(outfile)
    kind = quantize.outtype(outtype or "q8_0")
    if model_dir is None and (outtype or imatrix or lora or pre_tokenizer):
        raise InputError(
            "--outtype, --imatrix, --lora and --pre-tokenizer need MODEL_DIR; tensors of a GGUF stay as is"
        )
    if base_gguf is not None and first is None:
        raise InputError("--base-gguf needs --first RECIPE_DIR, whose routers are packed")
    if strip is not None and first is not None:
        raise InputError("--strip removes routers and --first brings some; give one of them")
    if imatrix is not None and kind in quantize.PLAIN:
        raise InputError(f"--imatrix is for quantised types, not {kind}")
    if threads < 0:
        raise InputError(f"--threads is {threads}, expected a positive number, or 0 for all cores")
    if outfile.is_dir():
        raise InputError(f"{outfile}: a directory, expected a file name")
    if outfile.exists() and not outfile.is_file():
        raise InputError(f"{outfile}: not a regular file, expected the name of one to write")
    if not outfile.absolute().parent.is_dir():
        raise InputError(f"{outfile.absolute().parent}: no such directory, so {outfile.name} cannot be written there")
    if outfile.exists() and not force:
        raise InputError(f"{outfile}: exists already; --force replaces it")
    outfile = outfile.absolute()
    created, name = provenance.created(date), ""
    if first is not None:
        name = provenance.recipe_name(first)
        first = local_folder(first, weights=False)
    recipe = load_recipe(first) if first is not None else None
    common.check_apart(outfile, [*(provenance.recipe_files(first) if first else ()), *([imatrix] if imatrix else ())])

    source = base_gguf if base_gguf is not None else strip
    if source is not None:
        write = (
            functools.partial(pack.pack, recipe=recipe, directory=first, name=name, date=created)
            if recipe is not None and first is not None
            else pack.strip
        )
        return _from_gguf(Path(source), outfile, recipe, write, allow_dense, dry_run, started)

    checkpoint = Checkpoint(local_folder(model_dir or "", weights=True))
    adapter = _lora_dir(recipe, None if lora is None else local_folder(lora, weights=False))
    inside = (checkpoint.path / ADAPTER_CONFIG_NAME).is_file()
    if inside and not (adapter and adapter.resolve() == checkpoint.path.resolve()):  # transformers would apply it
        raise InputError(
            f"{checkpoint.path}: holds a LoRA too; give --lora {checkpoint.path} to merge it, or move "
            f"{ADAPTER_CONFIG_NAME} away"
        )
    common.check_apart(outfile, provenance.checkpoint_files(checkpoint))
    common.check_apart(outfile, provenance.adapter_files(adapter) if adapter else ())
    if recipe is not None:
        _check_recipe(checkpoint, recipe)
    if checkpoint.quantization and (adapter or checkpoint.quantization in ("bitsandbytes", "awq", "hqq", "eetq")):
        raise InputError(
            f"{checkpoint.path}: quantised weights ({checkpoint.quantization}); needs the unquantised base"
        )
    if imatrix is not None:
        quantize.load_imatrix(imatrix)
    checkpoint.check_complete()
    duplicate = checkpoint.tied_copy()
    # Merged weights stay float32 up to the quantizer; plain ones go through the type they have.
    direct = kind in quantize.PLAIN
    middle = kind if direct else ("f32" if adapter else checkpoint.native_type())
    count = checkpoint.element_count
    most = count + (checkpoint.embedding.count if adapter and checkpoint.embedding else 0)  # it may untie them
    output = int(most * _bits(checkpoint, kind) / 8) + _KEYS
    needed = output + (0 if direct else int(most * BITS[middle] / 8) + _KEYS)
    free = shutil.disk_usage(outfile.parent).free
    plan: dict[str, Any] = {
        "model": str(checkpoint.path),
        "recipe": str(first) if first else None,
        "lora_dir": str(adapter) if adapter else None,
        "weights": count,
        "outtype": kind,
        "intermediate": None if direct else middle,
        "output_at_most": output,
        "disk_needed": needed,
        "disk_free": free,
    }
    if needed > free:
        raise OSError(f"{outfile.parent}: {_size(needed)} needed, {_size(free)} free")
    if dry_run:
        if adapter:
            from first_convert import merge

            checkpoint.tensors.pop(duplicate or "", None)
            plan["lora"] = merge.summary(merge.plan(checkpoint, adapter))
        return plan

    with common.temporary_folder(outfile.parent, f".{outfile.name}", ".first") as folder:
        stage = folder / "model.gguf"
        _say(f"converting {count / 1e6:.1f}M weights to {middle}" + (", merging the LoRA" if adapter else ""))
        model = _utf8(checkpoint.path)
        if model != (clean := provenance.text(os.path.abspath(checkpoint.path))):  # no UTF-8, which tokenizers needs
            link = folder / Path(clean).name
            link.symlink_to(checkpoint.path.absolute())
            model = _utf8(link)
        job: dict[str, Any] = {
            "model": model,
            "outfile": _utf8(stage),
            "outtype": middle,
            "pre_tokenizer": pre_tokenizer,
            "recipe": _utf8(first),
            "lora": _utf8(adapter),
            "drop": [duplicate] if duplicate else [],
            "imatrix": _utf8(imatrix),
            "base_model": _base_model(adapter),
            "recipe_name": name,
            "date": created,
            "verbose": verbose,
        }
        try:
            answer = _child("first_convert.child", job, folder)
        except Exception:
            # Readers of a damaged tokenizer do not say which file it is.
            for path in (*checkpoint.path.glob("tokenizer*.json"), checkpoint.path / "generation_config.json"):
                if path.is_file():
                    read_json(path)
            raise
        try:
            converted = pack.open_gguf(stage)
        except InputError as error:  # what config.json says went into the keys
            raise InputError(str(error).replace(str(stage), str(checkpoint.path))) from None
        if recipe is not None:
            pack.check_shape(converted, checkpoint.path, recipe)
        if (answer["lora"] or {}).get("untied") and not any(t.name == "output.weight" for t in converted.tensors):
            raise InputError(
                f"{adapter}: the LoRA makes the tied output matrix differ from the embeddings, but for this "
                "architecture llama.cpp's converter writes no output.weight"
            )
        check.finite(stage)
        fallbacks: list[dict[str, Any]] = []
        result = stage
        if not direct:
            _say(f"quantising to {kind}")
            result = folder / "quantised.gguf"
            job = {"source": _utf8(stage), "out": _utf8(result), "kind": kind, "threads": threads, "verbose": verbose}
            job["imatrix"] = _utf8(imatrix)
            fallbacks = _child("first_convert.quantize", job, folder)["fallbacks"]
            pack.open_gguf(result)  # native code does not see a disk that fills up
            stage.unlink()
        cost = check.fallback_cost(result, fallbacks)
        if fallbacks:
            kinds = sorted({f"{entry['wanted']} -> {entry['got']}" for entry in fallbacks})
            _say(f"{len(fallbacks)} tensors too narrow for {kind}: {', '.join(kinds)}, {_size(cost)} more")
        probes = answer["probes"]
        if probes is None:
            _say("warning: transformers cannot read the tokenizer, so nothing checks llama.cpp's against it")
        wrong = check.loads(result, probes or ())
        if wrong and (pre_tokenizer or answer["pre_tokenizer"]):
            name = pre_tokenizer or answer["pre_tokenizer"]
            raise InputError(f"{checkpoint.path}: as '{name}', llama.cpp cuts {wrong[0]!r} into other tokens")
        if wrong:
            _say(f"warning: llama.cpp cuts {len(wrong)} of {len(probes)} strings into other tokens")
        if recipe is not None:
            _check_routes(result, allow_dense)
        _publish(result, outfile)
    return {
        "outfile": str(outfile),
        "bytes": outfile.stat().st_size,
        "outtype": kind,
        "layers": checkpoint.block_count,
        "routers": recipe is not None,
        "lora": answer["lora"],
        "fallbacks": fallbacks,
        "fallback_bytes": cost,
        "seconds": round(time.monotonic() - started, 1),
    }


def _base_model(adapter: Path | None) -> str:
    """What the adapter says of its base, for provenance only; it is never looked up."""
    if adapter is None:
        return ""
    name = str(read_json(adapter / ADAPTER_CONFIG_NAME).get("base_model_name_or_path") or "")
    name = name.encode(errors="replace").decode()
    return Path(name).name if os.path.exists(name) else name  # without an error for what no path can be


def _from_gguf(
    source: Path,
    outfile: Path,
    recipe: Recipe | None,
    write: Callable[[Path, Path], dict[str, Any]],
    allow_dense: bool,
    dry_run: bool,
    started: float,
) -> dict[str, Any]:
    """--base-gguf (with a recipe) and --strip (without)."""
    reader = pack.open_base(source, replace=recipe is not None)
    if recipe is not None:
        pack.check_lora(recipe)
        pack.check_shape(reader, source, recipe)
    needed, free = source.stat().st_size + _KEYS, shutil.disk_usage(outfile.parent).free
    if needed > free:
        raise OSError(f"{outfile.parent}: {_size(needed)} needed, {_size(free)} free")
    if dry_run:
        plan = {"base_gguf": str(source), "recipe": recipe is not None, "output_at_most": needed}
        return {**plan, "disk_needed": needed, "disk_free": free}
    with common.temporary_folder(outfile.parent, f".{outfile.name}", ".first") as folder:
        result = folder / "model.gguf"
        answer = write(source, result)
        if answer.get("replaced_routers"):
            _say("the file had routers already; they are replaced")
        check.loads(result, ())
        if recipe is not None:
            _check_routes(result, allow_dense)
        _publish(result, outfile)
    return {
        "outfile": str(outfile),
        "bytes": outfile.stat().st_size,
        "routers": recipe is not None,
        **answer,
        "seconds": round(time.monotonic() - started, 1),
    }


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Run the parsed command line and print the result on stdout."""
    if args.outfile is None:
        raise InputError("--outfile FILE is required")
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    options = {name: value for name, value in vars(args).items() if name != "json"}
    result = convert(options.pop("model_dir"), **options)
    if args.json:
        print(json.dumps(result))
    elif args.dry_run:
        for name, item in result.items():
            print(f"{name}: {_size(item) if name.startswith(('disk', 'output')) else item}")
    else:
        lora = result.get("lora")
        merged = f", {lora['pairs_used']} LoRA pairs merged into {lora['modules']} tensors" if lora else ""
        routers = ", with routers" if result["routers"] else ", without routers"
        print(f"{args.outfile}: {_size(result['bytes'])}{routers}{merged}, {result['seconds']} s")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of first-convert; returns the exit code."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
