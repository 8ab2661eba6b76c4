"""The conversion process: upstream's converter, with the LoRA merged on the fly and the routers added.

A job of worker.py, so that its memory goes when it ends.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from first_convert import merge, pack, provenance
from first_convert.checkpoint import Checkpoint, is_tokenizer
from first_convert.upstream import by_rules, convert_hf_to_gguf
from pyfirst.errors import InputError
from pyfirst.recipe import load_recipe

PROBES = (
    "Hello, world! It's 12345 and 3.14.",
    "  two  spaces\n\n\ttab\r\nend ",
    "Съешь ещё этих мягких булок",
    "我能吞下玻璃而不伤身体。日本語",
    "👩‍👩‍👧 🦙🚀 café naïve ½",
    "def f(x):\n    return x**2  # they'll, YOU'RE",
    "مرحبا हिन्दी ไทย 2024-12-31",
)


def _probe(model_dir: str) -> list[tuple[str, list[int]]] | None:
    """Strings and their token ids by transformers, added tokens among them; None when it cannot read the tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        added = list(tokenizer.get_added_vocab())[:20]
        texts = [*PROBES, *(f"a{token}b" for token in added)]
        return [(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    except Exception:
        return None  # upstream reads some tokenizers that transformers does not


def _tokens(model_dir: str) -> int:
    """Number of token ids of a tokenizer, added tokens among them."""
    from transformers import AutoTokenizer

    return 1 + max(AutoTokenizer.from_pretrained(model_dir, local_files_only=True).get_vocab().values())


@contextlib.contextmanager
def _tokenizer_of(lora: Path, checkpoint: Checkpoint, vocabulary: int, outfile: str) -> Iterator[Path]:
    """A folder with the model's configuration and the tokenizer that a LoRA's embeddings were trained with.

    Raises InputError when embeddings grew and no tokenizer lies beside the adapter.
    """
    files = [path for path in lora.iterdir() if is_tokenizer(path.name)]
    if not any(path.name.startswith(("tokenizer.", "vocab.")) for path in files):
        if vocabulary > checkpoint.number("vocab_size"):
            raise InputError(
                f"{lora}: the adapter has embeddings for {vocabulary} tokens, the base model for "
                f"{checkpoint.number('vocab_size')}; copy the tokenizer it was trained with to the adapter's folder"
            )
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(dir=Path(outfile).parent) as parent:
        folder = Path(parent) / checkpoint.path.resolve().name
        folder.mkdir()
        for path in (*checkpoint.path.glob("*config.json"), *files):
            shutil.copyfile(path, folder / path.name)
        yield folder


def _checksums(checkpoint: Checkpoint, job: dict[str, Any]) -> list[provenance.Source]:
    """Name and checksum of every input."""
    found = provenance.sources("checkpoint", provenance.checkpoint_files(checkpoint))
    if job["recipe"]:
        found += provenance.sources("recipe", provenance.recipe_files(job["recipe"]))
    if job["lora"]:
        found += provenance.sources("adapter", provenance.adapter_files(job["lora"]))
    if job["imatrix"]:
        found += provenance.sources("imatrix", [Path(job["imatrix"])])
    return found


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The conversion process: one checkpoint to GGUF, merged and with routers.

    ``job``: model, outfile, outtype, pre_tokenizer, recipe, lora, drop (tensor names), imatrix, base_model,
    recipe_name, date.
    Returns {"lora": counts or None, "pre_tokenizer": name found by its rules or None, "probes": list or None}.
    """
    checkpoint = Checkpoint(job["model"])
    for name in job["drop"]:
        checkpoint.tensors.pop(name, None)
    checkpoint.transformers_config()
    recipe = load_recipe(job["recipe"]) if job["recipe"] else None
    # A second core reads and hashes while this one imports and plans, and tokenizes while it writes.
    second = ThreadPoolExecutor(1)
    checksums = second.submit(_checksums, checkpoint, job) if recipe or job["lora"] else None
    plan = merge.plan(checkpoint, job["lora"]) if job["lora"] else None
    undo = contextlib.ExitStack()
    tokens = Path(job["model"])
    if plan is not None and plan.vocabulary:
        tokens = undo.enter_context(_tokenizer_of(Path(job["lora"]), checkpoint, plan.vocabulary, job["outfile"]))
    if not gc.isenabled():  # as in worker.py; from here on there are large things to collect
        gc.freeze()
        gc.enable()
    reached: set[str] = set()
    by_rules.clear()

    def prepare(base: Any) -> None:
        lib, lazy = base.gguf, base.LazyTorchTensor
        index, load = base.ModelBase.index_tensors, base.ModelBase.load_hparams
        metadata = base.ModelBase.prepare_metadata
        local, part = lib.utility.LocalTensor, lib.utility.LocalTensorRange

        def read(name: str) -> torch.Tensor:
            tensor = checkpoint.tensors[name]
            raw = np.fromfile(tensor.path, np.uint8, tensor.size, offset=tensor.start)
            return torch.from_numpy(raw).view(lazy._dtype_str_map[tensor.dtype]).reshape(tensor.shape)

        def index_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not checkpoint.tensors:
                return index(self, *args, **kwargs)
            tensors: dict[str, Any] = {}
            for name, tensor in checkpoint.tensors.items():  # upstream itself would read every file it finds
                data = local(tensor.dtype, tuple(tensor.shape), part(tensor.path, tensor.start, tensor.size))
                if kept := self.filter_tensors((name, functools.partial(lazy.from_local_tensor, data))):
                    tensors.update([kept])
            for stored, (shape, compute) in (plan.modules if plan else {}).items():
                text_only = stored.replace("language_model.", "")  # upstream's name, of a multimodal parent
                name = text_only if text_only in tensors else stored
                if name not in tensors and name in checkpoint.tensors:
                    continue  # upstream renames or leaves out this tensor; counted below
                meta = lazy.meta_with_dtype_and_shape(torch.float32, shape)

                def merged(meta: Any = meta, compute: Any = compute) -> Any:
                    return lazy(meta=meta, args=(), func=lambda: compute(read).contiguous())

                tensors[name] = merged
                reached.add(stored)
            return tensors

        def load_hparams(*args: Any, **kwargs: Any) -> Any:
            config = load(*args, **kwargs)
            for part in (config, config.get("text_config") or {}):
                if plan is not None and plan.untied:
                    part["tie_word_embeddings"] = False
                if plan is not None and plan.vocabulary and "vocab_size" in part:
                    part["vocab_size"] = plan.vocabulary
            return config

        def prepare_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
            original = lib.Metadata.load

            def described(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                if checksums is not None:
                    cards = [Path(job[name]) for name in ("recipe", "lora") if job[name]]
                    pack.describe(result, recipe, job["base_model"], cards)
                return result

            lib.Metadata.load = staticmethod(described)
            self.dir_model = tokens
            try:
                metadata(self, *args, **kwargs)
            finally:
                lib.Metadata.load = staticmethod(original)
            if checksums is not None:
                found = pack.entries(recipe) if recipe else []
                if recipe:  # its prompts end without EOS; the tokenizer's keys are still to come
                    add_eos = self.gguf_writer.add_add_eos_token
                    self.gguf_writer.add_add_eos_token = lambda _: add_eos(False)
                found += pack.lora_entries(plan.config if plan else None)
                base_model = (recipe.config.base_model if recipe else "") or job["base_model"]
                found += provenance.entries(checksums.result(), job["recipe_name"], base_model, job["date"])
                pack.add(self.gguf_writer, found)
            probes.append(second.submit(_probe, str(tokens)))

        undo.callback(setattr, base.ModelBase, "index_tensors", index)
        undo.callback(setattr, base.ModelBase, "load_hparams", staticmethod(load))
        undo.callback(setattr, base.ModelBase, "prepare_metadata", metadata)
        base.ModelBase.index_tensors = index_tensors
        base.ModelBase.load_hparams = staticmethod(load_hparams)
        base.ModelBase.prepare_metadata = prepare_metadata

    probes: list[Future[list[tuple[str, list[int]]] | None]] = []
    errors: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    handler = Keep(logging.ERROR)
    logging.getLogger().addHandler(handler)
    argv = [job["model"], "--outfile", job["outfile"], "--outtype", job["outtype"]]
    try:
        convert_hf_to_gguf(argv, job["pre_tokenizer"], prepare)
    except SystemExit as error:
        if error.code:
            raise InputError(f"{job['model']}: {errors[-1] if errors else 'the converter gave up'}") from None
    except (InputError, ImportError, MemoryError):
        raise
    except KeyError as error:
        where = "config.json or tokenizer.json"
        raise InputError(f"{job['model']}: llama.cpp's converter misses {error} in {where}") from error
    except FileNotFoundError as error:
        if error.errno is None:  # the converter's own words for a file of the tokenizer
            raise InputError(f"{job['model']}: {error}; copy it from the base model") from None
        raise
    except OSError as error:
        if error.errno is None:  # numpy's word for a write that came to an end early
            raise OSError(f"cannot write {job['outfile']} ({error}); is the disk full?") from None
        raise
    except NotImplementedError as error:
        hint = "; name one with --pre-tokenizer" if "pre-tokenizer" in str(error) else ""
        raise InputError(f"{job['model']}: {error}{hint}") from None
    except Exception as error:  # upstream's classes take the configuration, the tokenizer and the weights at their word
        rows = (plan.vocabulary if plan else None) or checkpoint.number("vocab_size")
        if isinstance(error, AssertionError) and (count := _tokens(str(tokens))) > rows:
            raise InputError(f"{tokens}: the tokenizer has {count} tokens, the embeddings have {rows} rows") from None
        if "map tensor" in str(error):
            raise InputError(f"{job['model']}: llama.cpp's converter has no place for it: {error}") from None
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise InputError(f"{job['model']}: llama.cpp's converter cannot convert it ({reason})") from error
    finally:
        undo.close()
        logging.getLogger().removeHandler(handler)
    if plan is not None and (lost := sorted(set(plan.modules) - reached)):
        raise InputError(
            f"{job['lora']}: {len(reached)} of {len(plan.modules)} changed tensors reached the file; "
            f"llama.cpp's converter leaves out {', '.join(lost[:4])}"
        )
    return {
        "lora": merge.summary(plan),
        "pre_tokenizer": by_rules[-1] if by_rules else None,
        "probes": probes[-1].result(),
    }
