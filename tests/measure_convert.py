#!/usr/bin/env python3
"""Figures about first-convert that are too slow or too noisy for a test. Each prints a table.

    python tests/measure_convert.py masks  smollm2-135m-hf [--first examples/smollm2-135m] [--prompts FILE.jsonl]
    python tests/measure_convert.py speed  smollm2-135m-hf [--first examples/smollm2-135m]
    python tests/measure_convert.py memory [--gigabytes 2 | --shape llama-3.2-3b] [--limit GIGABYTES]
    python tests/measure_convert.py older  smollm2-135m-hf --older FOLDER [--first examples/smollm2-135m]

masks: which layers 50 prompts keep under each quantised type, against float32. speed: first-convert to q8_0 against
convert_hf_to_gguf.py and llama.cpp's quantizer on a model merged beforehand. memory: the peak of a synthetic bfloat16
checkpoint with a LoRA on all linear layers. older: logits of a routed file in another release of llama-cpp-python,

    CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install --no-deps --target FOLDER llama-cpp-python==0.3.2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import pyfirst.native  # before anything imports llama_cpp
from pyfirst.tasks import read_examples

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "examples" / "smollm2-135m"
TYPES = ("q8_0", "q6_k", "q4_k_m", "q4_0")


def first_convert(*args: object) -> int:
    """Run the command; peak resident memory of its largest process in MB."""
    code = (
        "import resource as r, sys; from first_convert.convert import main; assert main(sys.argv[1:]) == 0; "
        "print(max(r.getrusage(who).ru_maxrss for who in (r.RUSAGE_SELF, r.RUSAGE_CHILDREN)) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


# masks


def prompts(count: int = 50) -> list[str]:
    """Prompts of three kinds: a restaurant to describe, a sum, a text to summarise."""
    names, foods, areas = (
        ("The Mill", "Blue Spice", "Alimentum"),
        ("Italian", "Chinese", "French"),
        ("riverside", "city"),
    )
    who, what = ("A baker", "Maria", "The school", "A farmer"), ("rolls", "books", "chairs", "apples", "tickets")
    facts = (
        "The committee met on Tuesday and postponed the decision about the bridge. ",
        "Sales of bicycles rose by a third last year, most of them electric. ",
        "Heavy rain closed two roads in the north of the county on Friday evening. ",
        "Researchers trained a small model that reads a prompt once and leaves layers out. ",
        "The museum opens its new wing in May with paintings that were long in storage. ",
        "Trains between the two cities will run every half hour from December on. ",
    )
    found = []
    for i in range(count):
        if i % 3 == 0:
            found.append(
                f"Write one or two sentences that describe this restaurant.\n\nname[{names[i % len(names)]} {i}], "
                f"food[{foods[i // 3 % 3]}], area[{areas[i // 9 % 2]}], familyFriendly[{'yes' if i % 2 else 'no'}]"
            )
        elif i % 3 == 1:
            found.append(
                f"{who[i % 4]} has {i + 7} boxes with {i % 5 + 4} {what[i % 5]} each and gives away {2 * i + 3}. "
                f"How many {what[i % 5]} are left?"
            )
        else:
            text = "".join(facts[(i * (j + 1) + j) % len(facts)] for j in range(2 + i % 4))
            found.append(f"Summarize this text in one sentence.\n\n{text}")
    return found


def routed(path: Path, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(masks, scores) of prompts in the model's chat format, each [prompts, layers]."""
    from pyfirst import FirstLlama

    llm = FirstLlama(str(path), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
    masks, scores = [], []
    for text in texts:
        llm.create_chat_completion([{"role": "user", "content": text}], max_tokens=1, temperature=0)
        routing = llm.routing
        masks.append(routing.mask)
        scores.append(routing.scores)
    return np.array(masks), np.array(scores)


def masks(model: Path, recipe: Path, texts: Sequence[str], folder: Path) -> None:
    first_convert(model, "--first", recipe, "--outfile", folder / "f32.gguf", "--outtype", "f32")
    truth, scores = routed(folder / "f32.gguf", texts)
    print(f"{len(texts)} prompts, {truth.shape[1]} layers; float32 keeps {truth.mean():.1%}, ", end="")
    print(f"{len({tuple(mask) for mask in truth})} distinct masks")
    threshold = json.loads((recipe / "first_config.json").read_text(encoding="utf-8"))["threshold"]
    columns, differing = {}, {}
    for kind in TYPES:
        out = folder / f"{kind}.gguf"
        first_convert(model, "--first", recipe, "--outfile", out, "--outtype", kind)
        found, other = routed(out, texts)
        columns[kind] = (found == truth).mean(axis=0)
        moved = np.abs(other - scores)
        near = np.abs(scores - threshold)[found != truth]
        differing[kind] = (found == truth).mean(), (found == truth).all(axis=1).mean(), found.mean(), moved.mean(), near
        out.unlink()
    print("\nlayer  kept   " + "".join(f"{kind:>9}" for kind in TYPES))
    for layer in range(truth.shape[1]):
        agreement = "".join(f"{columns[kind][layer]:9.0%}" for kind in TYPES)
        print(f"{layer:5} {truth[:, layer].mean():5.0%}   {agreement}")
    for label, i, form in (
        ("agree", 0, "{:9.2%}"),
        ("same mask", 1, "{:9.0%}"),
        ("kept", 2, "{:9.1%}"),
        ("|d score|", 3, "{:9.4f}"),
    ):
        print(f"{label:14}" + "".join(form.format(differing[kind][i]) for kind in TYPES))
    print(f"{'flips within':14}" + "".join(f"{max(differing[kind][4], default=0):9.4f}" for kind in TYPES), end="")
    print("  of the threshold")


# speed


def speed(model: Path, recipe: Path, folder: Path, rounds: int) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from first_convert import quantize

    merged = folder / "merged"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(base, str(recipe)).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(model).save_pretrained(merged)
    upstream = pyfirst.native.upstream_dir()
    env = {**os.environ, "PYTHONPATH": str(upstream / "gguf-py")}
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "first-convert": []}

    def clock() -> tuple[float, float]:
        """Seconds since some moment, and seconds of processors that this process and its children used."""
        return time.monotonic(), sum(os.times()[:4])

    def lap(name: str, since: tuple[float, float]) -> None:
        times[name].append(tuple(now - then for now, then in zip(clock(), since, strict=True)))  # type: ignore[arg-type]

    for _ in range(rounds):
        started = clock()
        script = [sys.executable, upstream / "convert_hf_to_gguf.py", merged, "--outfile", folder / "plain.gguf"]
        subprocess.run(list(map(str, script)), env=env, check=True, capture_output=True)
        quantize.quantize(folder / "plain.gguf", folder / "plain-q8_0.gguf", "q8_0")
        lap("plain", started)
        started = clock()
        command = ["--first", recipe, "--outfile", folder / "first.gguf", "--outtype", "q8_0", "--force"]
        first_convert(model, *command)
        lap("first-convert", started)
        shown = [f"{name} {times[name][-1][0]:5.1f} s ({times[name][-1][1]:.1f} s of processors)" for name in times]
        print("   ".join(shown), flush=True)
    for i, what in enumerate(("time", "processors' time")):
        best = {name: min(lap[i] for lap in laps) for name, laps in times.items()}
        print(f"best of {rounds}, {what}: {best['first-convert'] / best['plain']:.2f} times the plain chain")


# memory


# The public shape of a model of 3 billion weights.
SHAPES = {
    "llama-3.2-3b": {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
}


def synthetic(folder: Path, shape: dict[str, int], shard: int = 500 << 20) -> int:
    """Write a random bfloat16 Llama in shards of about ``shard`` bytes with a recipe that brings a LoRA.

    The model goes to folder/hf, the recipe to folder/recipe; little more than a shard is held in memory.
    Returns the size of the largest shard.
    """
    import tiny
    import torch
    from safetensors.torch import save_file

    from first_convert.checkpoint import Checkpoint
    from first_convert.merge import meta_model

    tiny.make("llama", folder / "hf", num_hidden_layers=1)
    path = folder / "hf" / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **shape, "dtype": "bfloat16"}
    path.write_text(json.dumps(config), encoding="utf-8")
    shapes = {name: p.shape for name, p in meta_model(Checkpoint(folder / "hf")).named_parameters()}
    (folder / "hf" / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn((1 << 20) + 7, generator=generator)).to(torch.bfloat16)

    def random(*size: int) -> torch.Tensor:
        count = torch.Size(size).numel()
        return block.repeat(count // block.numel() + 1)[:count].reshape(size).clone()

    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    adapter: dict[str, torch.Tensor] = {}
    sizes = []

    def flush() -> None:
        name = f"part-{len(sizes)}.safetensors"
        save_file(pending, folder / "hf" / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        sizes.append((folder / "hf" / name).stat().st_size)
        pending.clear()

    for name, size in shapes.items():
        pending[name] = random(*size)
        if "_proj" in name:
            stem = "base_model.model." + name.removesuffix(".weight")
            adapter[f"{stem}.lora_A.weight"] = random(8, size[1]).float()
            adapter[f"{stem}.lora_B.weight"] = random(size[0], 8).float()
        if sum(2 * tensor.numel() for tensor in pending.values()) > 0.9 * shard:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    recipe = tiny.recipe(folder / "recipe", folder / "hf")
    save_file(adapter, recipe / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    (recipe / "adapter_config.json").write_text(json.dumps(lora), encoding="utf-8")
    return max(sizes)


def memory(shape: dict[str, int], limit: float, folder: Path) -> None:
    # In a process of its own: a child begins with the peak of the process that starts it.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        largest = pool.apply(synthetic, (folder, shape))
        pool.close()
        pool.join()
    size = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    for kind in ("q8_0", "f32"):
        started = time.monotonic()
        out = folder / f"{kind}.gguf"
        peak = first_convert(folder / "hf", "--first", folder / "recipe", "--outfile", out, "--outtype", kind)
        print(f"{size / 1e9:.2f} GB bfloat16, largest shard {largest / 1e6:.0f} MB, to {kind}: peak {peak} MB", end="")
        print(f", {time.monotonic() - started:.0f} s", flush=True)
        out.unlink()


# older releases

LOGITS = """
import json, sys
import numpy as np
import llama_cpp
model, out, ids = sys.argv[1:]
llm = llama_cpp.Llama(model, n_ctx=256, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False)
ids = json.loads(ids)
llm.eval(ids)
np.save(out, llm.scores[: len(ids)])
print(llama_cpp.__version__)
"""


def older(model: Path, recipe: Path, package: Path, folder: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The quick brown fox jumps over the lazy dog, and Maria has 12 boxes of 5 books each."
    ids = AutoTokenizer.from_pretrained(model).encode(text)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        truth = peft.PeftModel.from_pretrained(base, str(recipe)).eval()(torch.tensor([ids])).logits[0].numpy()
    environment = {**os.environ, "PYTHONPATH": str(package)}
    environment.pop("LLAMA_CPP_LIB_PATH", None)
    for kind in ("f32", "q8_0"):
        first_convert(model, "--first", recipe, "--outfile", folder / "first.gguf", "--outtype", kind, "--force")
        first_convert("--strip", folder / "first.gguf", "--outfile", folder / "plain.gguf", "--force")
        found = {}
        for name in ("first", "plain"):
            command = [sys.executable, "-c", LOGITS, folder / f"{name}.gguf", folder / f"{name}.npy", json.dumps(ids)]
            done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[name] = np.load(folder / f"{name}.npy")
        same = "the same bits" if np.array_equal(found["first"], found["plain"]) else "other logits"
        print(f"llama-cpp-python {done.stdout.strip()}, {kind}: with and without routers {same}; ", end="")
        print(f"against unmerged PEFT in float32 at most {np.abs(found['first'] - truth).max():.1e} apart", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["masks", "speed", "memory", "older"])
    parser.add_argument("model", nargs="?", type=Path, help="model folder, for all but memory")
    parser.add_argument("--first", type=Path, default=RECIPE, help="recipe (default %(default)s)")
    parser.add_argument("--prompts", type=Path, help='JSONL with a "prompt" in each line (default: made up)')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="instead, the shape of this model")
    parser.add_argument("--limit", type=float, default=0.0, help="gigabytes that each process may allocate")
    parser.add_argument("--older", type=Path, help="folder that 'pip install --target' filled")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    args = parser.parse_args()
    if args.what != "memory" and args.model is None:
        parser.error(f"{args.what} needs a model folder")
    if args.what == "older" and args.older is None:
        parser.error("older needs --older FOLDER")
    with tempfile.TemporaryDirectory(prefix="measure-convert-", dir=args.folder) as name:
        folder = Path(name)
        if args.what == "masks":
            texts = prompts()
            if args.prompts:
                texts = [e.prompt for e in read_examples(args.prompts, 50, need_references=False)]
            masks(args.model, args.first, texts, folder)
        elif args.what == "speed":
            speed(args.model, args.first, folder, args.rounds)
        elif args.what == "older":
            older(args.model, args.first, args.older, folder)
        else:
            width = 2048
            per_layer = 2 * width * width * (4 + 12)
            layers = max(1, round(args.gigabytes * 1e9 / per_layer))
            shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
            shape |= {"num_key_value_heads": 4, "head_dim": width // 4}
            memory(SHAPES[args.shape] if args.shape else shape, args.limit, folder)


if __name__ == "__main__":
    main()
