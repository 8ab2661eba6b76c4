"""Measurements of training that take minutes on a real model; not collected by pytest.

python tests/measure_training.py parity MODEL_DIR RECIPE --data FILE...   routed torch against the runtime, float32
python tests/measure_training.py speed MODEL_DIR                           time and memory, bfloat16 where it can
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from first_convert.convert import convert
from pyfirst import FirstLlama
from pyfirst.evaluation import read_examples
from pyfirst.recipe import load_recipe
from pyfirst.training import phases
from pyfirst.training.data import encode
from pyfirst.training.options import build_parser
from pyfirst.training.routers import FirstModel, Routers
from pyfirst.training.train import load_model, train

F32 = 0  # GGML_TYPE_F32
WORDS = "river stone winter glass market yellow garden simple bridge number letter window silver paper"


def parity(
    model_dir: str, recipe_dir: Path, data: list[str], count: int, new: int, prefill: str | None
) -> dict[str, float]:
    """Masks and greedy tokens of ``count`` prompts, torch's ``generate`` against the GGUF, all in float32.

    ``recipe_dir`` is ours: a ``prefill`` is written into it.
    """
    if prefill:
        path = recipe_dir / "first_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "prefill": prefill}), encoding="utf-8")
    recipe = load_recipe(recipe_dir)
    config = recipe.config
    routers = Routers.from_recipe(recipe)
    base, tokenizer = load_model(model_dir, bf16=False)
    if recipe.adapter_dir:
        base = PeftModel.from_pretrained(base, recipe.adapter_dir)
    reference = FirstModel(base, routers, config.threshold, config.prefill, config.window, config.protected).eval()
    examples = [e for path in data for e in read_examples(path, -(-count // len(data)))][:count]
    prompts = [encode(tokenizer, e.prompt, "x")[0] for e in examples]
    same_mask = same_tokens = 0
    masks = set()
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "f32.gguf"
        convert(model_dir, first=recipe_dir, outfile=gguf, outtype="f32")
        llm = FirstLlama(str(gguf), n_ctx=1024, type_k=F32, type_v=F32, verbose=False)
        for prompt in prompts:
            tokens, keep = reference.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
            expected = tokens[0, len(prompt) :].tolist()
            found = []
            for token in llm.generate(prompt, temp=0.0):
                found.append(token)
                if len(found) == len(expected):
                    break
            assert llm.routing is not None
            same_mask += np.array_equal(llm.routing.mask, keep[0].numpy())
            same_tokens += found == expected
            masks.add(tuple(keep[0].tolist()))
        llm.close()
    return {
        "prompts": len(prompts), "tokens": new, "masks": len(masks), "same mask": same_mask, "same tokens": same_tokens,
    }  # fmt: skip


def speed(model_dir: str, examples: int, length: int) -> dict[str, float]:
    """Seconds of a phase over ``examples`` of ``length`` tokens, what 2,000 would take, and peak memory."""
    _, tokenizer = load_model(model_dir, bf16=True)
    chooser = random.Random(1)
    words = WORDS.split()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(examples):
                text = " ".join(chooser.choice(words) for _ in range(length))
                ids = tokenizer(text)["input_ids"]
                row = {"prompt": tokenizer.decode(ids[: length - 70]), "response": tokenizer.decode(ids[-40:])}
                file.write(json.dumps(row) + "\n")
        steps = max(1, examples // 8)
        options = ["-m", model_dir, "--data", str(path), "--out", f"{folder}/out", "--steps", str(steps), "--bf16"]
        options += ["--batch-size", "2", "--grad-accum", "4", "--hold-back", "4", "--prior-examples", "4"]
        started = time.monotonic()
        out = train(build_parser().parse_args(options))
        log = load_recipe(out).config.training["phases"][-1]["log"]
        whole = time.monotonic() - started
    # Without the first entry, which waits for the model to load and for the search.
    per_example = (log[-1]["seconds"] - log[0]["seconds"]) / (log[-1]["step"] - log[0]["step"]) / 8
    return {
        "seconds": round(whole, 1),
        "seconds an example": round(per_example, 3),
        "minutes for 2,000": round(2000 * per_example / 60, 1),
        "peak memory GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parity", "speed"))
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--prefill", choices=("full", "skip"), help="other than the recipe's")
    parser.add_argument("--examples", type=int, default=120)
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--scarce", action="store_true", help="large blocks of memory as where little of it is free")
    args = parser.parse_args()
    if args.what == "parity":
        with tempfile.TemporaryDirectory() as folder:
            recipe = shutil.copytree(args.recipe, Path(folder) / "recipe")
            print(json.dumps(parity(args.model, recipe, args.data, args.count, args.new, args.prefill)))
    else:
        if args.scarce:
            phases.PLENTY = sys.maxsize
        print(json.dumps(speed(args.model, args.examples, args.length)))


if __name__ == "__main__":
    main()
