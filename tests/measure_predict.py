#!/usr/bin/env python3
"""How near the formula of first-bench --predict comes to measured decoding on this machine. Prints a table.

    python tests/measure_predict.py MODEL.gguf ... [--repeats 5]

The bandwidth is not fitted to the files: for each of their tensor types a random model of three layers of width 2048
decodes, too large for the cache, and what it reads in a second is the bandwidth of that type. Predicted seconds are the
sum of bytes / bandwidth over the types. One thread, CPU time, all models in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
from collections import Counter
from pathlib import Path

import gguf

from pyfirst import native, predict
from pyfirst.cli import bench, bench_files

PROMPT, STEPS = 64, 24
CONTEXT = PROMPT + STEPS // 2
PROBE = bench_files.Shape("llama", 3, 2048, 8192, 32, 8, 64, 512, 4096, 5e5, 1e-5)


def token_bytes(path: Path, gone: list[int]) -> Counter[str]:
    """Bytes that decoding one token reads, by tensor type; keys and values count as the type that is read most."""
    tensors = gguf.GGUFReader(path).tensors
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    found: Counter[str] = Counter()
    for tensor in tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        read = int(layer[1]) not in gone if layer else tied or tensor.name != "token_embd.weight"
        if read and tensor.tensor_type.name != "F32":
            found[tensor.tensor_type.name] += int(tensor.n_bytes)
    kv = predict.token_bytes(path)["kv"]
    found[found.most_common(1)[0][0]] += round(CONTEXT * sum(size for i, size in enumerate(kv) if i not in gone))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    kinds = sorted({kind for path in args.models for kind in token_bytes(path, [])})
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(bench_files.folder())
        probes = {kind: folder / f"{kind}.gguf" for kind in kinds}
        for kind, path in probes.items():
            name = next(name for name in bench_files.KINDS if name.lower() == kind.lower())
            bench_files.write_synthetic(PROBE, path, name)
        runs: list[tuple[Path, list[int]]] = [(path, []) for path in probes.values()]
        for path in args.models:
            n = len(predict.token_bytes(path)["layers"])
            runs += [(path, bench.spread(n, count) if count else []) for count in (0, n // 4, n // 2)]
        workers = {}
        for path in {path for path, _ in runs}:
            workers[path] = bench.Worker(native.lib_dir(), False)
            stack.callback(workers[path].close)
            workers[path].ask("open", model=str(path), threads=1, n_ctx=PROMPT + STEPS)
        samples: list[list[float]] = [[] for _ in runs]
        for turn in range(args.repeats + 1):
            for (path, gone), taken in zip(runs, samples, strict=True):
                job = {"name": "masked", "skip": gone, "n_prompt": PROMPT, "n_decode": STEPS, "clock": "cpu"}
                seconds = workers[path].ask("measure", **job)["decode"] / STEPS
                if turn:
                    taken.append(seconds)
        medians = [statistics.median(taken) for taken in samples]
        bandwidth = {
            kind: token_bytes(path, []).total() / seconds
            for (kind, path), seconds in zip(probes.items(), medians, strict=False)
        }
    print("GB/s:", ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in bandwidth.items()))
    print(f"{'':44}{'skipped':>8}{'tokens/s':>10}{'predicted':>11}{'error':>8}")
    for (path, gone), seconds in list(zip(runs, medians, strict=True))[len(probes) :]:
        expected = sum(size / bandwidth[kind] for kind, size in token_bytes(path, gone).items())
        print(f"{path.name[:43]:44}{len(gone):8}{1 / seconds:10.1f}{1 / expected:11.1f}{seconds / expected - 1:+8.0%}")


if __name__ == "__main__":
    main()
