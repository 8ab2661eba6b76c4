#!/usr/bin/env python3
"""Memory that pyfirst takes more than plain llama-cpp-python, same file and options. Prints a table.

    PYFIRST_STOCK_LIB=DIR python tests/measure_memory.py MODEL.gguf [--n-ctx 2048] [--repeats 3]

Each run is a process of its own: load, read a prompt of 64 tokens, generate 32. stock: llama_cpp.Llama with the
unpatched library in PYFIRST_STOCK_LIB; dense: FirstLlama without routing; routed: as the file's routers decide, or
with every other layer left out where it has none. peak: most bytes in memory (VmHWM), pages of the file that are
mapped among them; anonymous: bytes not backed by a file at the end (RssAnon). Linux only; the least of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

KINDS = ("stock", "dense", "routed")
PROMPT, ANSWER = 64, 32


def child(kind: str, model: str, n_ctx: int) -> dict[str, int]:
    """Bytes that this process needed."""
    options = {"n_ctx": n_ctx, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    if kind == "stock":
        import llama_cpp

        llm = llama_cpp.Llama(model, **options)
    else:
        from pyfirst import FirstLlama
        from pyfirst.info import info

        found = info(model)
        forced = range(1, found["layers"], 2) if kind == "routed" and not found["routers"] else None
        llm = FirstLlama(model, routing=kind == "routed", skip_layers=forced, **options)
    for _ in islice(llm.generate(list(range(100, 100 + PROMPT)), temp=0.0), ANSWER):
        pass
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(lines[key].split()[0]) * 1024
        for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"), ("virtual", "VmPeak"))
    }


def measure(model: str, stock_lib: str, n_ctx: int = 2048, repeats: int = 3) -> dict[str, dict[str, int]]:
    """Kind -> {"peak", "anonymous", "virtual"} in bytes."""
    found: dict[str, dict[str, int]] = {}
    for kind in KINDS * repeats:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        if kind == "stock":
            environment["LLAMA_CPP_LIB_PATH"] = stock_lib
        command = [sys.executable, __file__, model, "--n-ctx", str(n_ctx), "--child", kind]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        now = json.loads(done.stdout)
        before = found.setdefault(kind, now)
        found[kind] = {name: min(before[name], now[name]) for name in now}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.model, args.n_ctx)))
        return
    found = measure(args.model, os.environ["PYFIRST_STOCK_LIB"], args.n_ctx, args.repeats)
    print(f"{'MB':8}{'peak':>10}{'anonymous':>12}{'virtual':>10}{'peak over stock':>24}")
    for kind, sizes in found.items():
        more = sizes["peak"] - found["stock"]["peak"]
        cells = "".join(
            f"{sizes[key] / 1e6:{width}.1f}" for key, width in (("peak", 10), ("anonymous", 12), ("virtual", 10))
        )
        print(f"{kind:8}{cells}{more / 1e6:14.1f} ({more / found['stock']['peak']:+.1%})")


if __name__ == "__main__":
    main()
