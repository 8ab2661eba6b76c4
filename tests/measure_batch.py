#!/usr/bin/env python3
"""Decode speed of several sequences in one batch, each with its own random layers left out. Prints a table.

    python tests/measure_batch.py MODEL.gguf [--sequences 1 2 4 8 16] [--share 0.25] [--json OUT.json]
    python tests/measure_batch.py llama-3.2-1b                     # random weights of a shape that first-bench knows

All variants take turns, a few steps each; a figure is the median over the turns of the ratio to dense in the same turn.
dense: the same sequences, nothing skipped. mixed: one batch. split: one llama_decode per sequence. adverse: each layer
is kept by all sequences but one. fewer: so many sequences fewer, nothing skipped; where every layer is kept by somebody
its weights are read, and the rows are all that masks can save. ideal: dense with the time of the layers multiplied by
the share that is kept; what is not layers is what a step without any takes. --clock cpu counts the time of one thread,
for machines that do other things too; with wall all threads count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pyfirst.cli.bench_files import KINDS, SHAPES, synthetic

import pyfirst.native  # noqa: F401  isort: skip  before anything imports llama_cpp
import llama_cpp  # isort: skip
from native_model import NativeModel  # isort: skip

Masks = np.ndarray  # bool [sequence, layer]
TITLES = {
    "sequences": "sequences",
    "dense_tokens_per_second": "dense tok/s",
    "mixed": "mixed",
    "ideal": "ideal",
    "of_ideal": "of ideal",
    "fewer": "fewer",
    "split": "split",
    "adverse": "adverse",
}


class Variant:
    """Sequences of one length with their masks in a context of their own."""

    def __init__(self, path: Path, masks: Masks, prompt: int, clock: Callable[[], float], split=False, **kwargs):
        self.masks, self.prompt, self.clock, self.split = masks, prompt, clock, split
        n_seq = len(masks)
        self.model = NativeModel(path, n_seq=n_seq, n_ctx=prompt + 64, f32_cache=False, **kwargs)
        for seq, mask in enumerate(masks):
            ids = np.random.default_rng(seq).integers(3, 250, prompt).tolist()
            for i in range(0, prompt, 128):
                self.model.feed(ids[i : i + 128], i, seq, outputs="last")
            if not mask.all():
                self.model.set_mask(mask, seq)

    def turn(self, steps: int) -> float:
        """Seconds per step of all sequences."""
        n_seq, taken = len(self.masks), 0.0
        for step in range(steps + 1):
            tokens = [(5 + step, self.prompt + step, seq) for seq in range(n_seq)]
            start = self.clock()
            for part in [[token] for token in tokens] if self.split else [tokens]:
                self.model.decode(part)
            taken += (self.clock() - start) * (step > 0)  # the first step may build a graph
        for seq in range(n_seq):
            llama_cpp.llama_memory_seq_rm(self.model.memory, seq, self.prompt, -1)
        return taken / steps


def measure(path: Path, n_seq: int, args: argparse.Namespace, n_layer: int) -> dict:
    """Figures of one number of sequences."""
    rng = np.random.default_rng(args.seed)
    off = round(args.share * n_layer)
    mixed = np.array([rng.permutation(n_layer) >= off for _ in range(n_seq)])
    adverse = np.arange(n_seq)[:, None] != np.arange(n_layer)[None] % max(n_seq, 2)
    variants = {
        "dense": np.ones((n_seq, n_layer), bool),
        "mixed": mixed,
        "split": mixed,
        "adverse": adverse,
        "fewer": np.ones((max(1, round(n_seq * mixed.mean())), n_layer), bool),
        "none": np.zeros((n_seq, n_layer), bool),
    }
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    kwargs = {
        "n_threads": 1 if args.clock == "cpu" else args.threads,
        "kv_unified": args.kv_unified,
        "flash_attn": args.flash_attn,
    }
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, masks in variants.items():
            runs[name] = Variant(path, masks, args.prompt, clock, split=name == "split", **kwargs)
            stack.callback(runs[name].model.close)
        turns = [{name: run.turn(args.steps) for name, run in runs.items()} for _ in range(args.turns)]
    kept = mixed.mean()
    for turn in turns:
        turn["ideal"] = turn["none"] + (turn["dense"] - turn["none"]) * kept
    ratio = {name: statistics.median(turn["dense"] / turn[name] for turn in turns) for name in [*variants, "ideal"]}
    return {
        "sequences": n_seq,
        "kept": round(float(kept), 4),
        "dense_tokens_per_second": round(n_seq / statistics.median(turn["dense"] for turn in turns), 2),
        **{name: round(ratio[name], 3) for name in ("mixed", "ideal", "split", "adverse", "fewer")},
        "of_ideal": round(statistics.median(turn["ideal"] / turn["mixed"] for turn in turns), 3),
    }


@contextlib.contextmanager
def model_file(name: str, kind: str) -> Iterator[Path]:
    if name in SHAPES:
        with synthetic(name, kind) as path:
            yield path
    else:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"GGUF file, or one of {', '.join(SHAPES)}")
    parser.add_argument("--type", choices=KINDS, default="q4_0", help="of random weights (default %(default)s)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--share", type=float, default=0.25, help="of the layers left out (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each sequence (default %(default)s)")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="in each turn (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--kv-unified", action="store_true")
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    rows = []
    with model_file(args.model, args.type) as path:
        header = NativeModel(path, n_ctx=32)
        n_layer = header.n_layer
        header.close()
        print("".join(f"{title:>13}" for title in TITLES.values()))
        for n_seq in args.sequences:
            rows.append(measure(path, n_seq, args, n_layer))
            print("".join(f"{rows[-1][key]:>13}" for key in TITLES), flush=True)
    if args.json:
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"options": options, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
