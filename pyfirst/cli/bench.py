"""first-bench: what skipping layers gains on this machine, and what it costs where nothing is skipped."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyfirst.cli import common
from pyfirst.errors import InputError

ARRAY_FLOATS = 131072
REBUILD_STEPS = 64


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-bench."""
    parser = common.parser(
        "first-bench",
        "Measure decoding and prefill with forced shares of layers skipped, in turns (A B A B), and print\n"
        "medians. Files without routers will do. The prompt skips too (prefill mode skip).",
        "first-bench -m model.gguf -t 1 --skipped 0,8,15 --stock-lib stock/llama_cpp/lib",
    )
    add = parser.add_argument
    add("-m", "--model", required=True, metavar="FILE", help="GGUF file")
    add("--stock-lib", metavar="DIR", help="folder of an unpatched libllama, to compare the dense path with")
    add("-t", "--threads", type=int, default=1, metavar="N", help="threads (default: 1)")
    add(
        "--skipped",
        metavar="LIST",
        help="layers to skip, numbers or shares, such as 8,15 or 25%%,50%% (default: a quarter and a half)",
    )
    add("--prompt-length", type=int, default=256, metavar="N", help="tokens of the prompt (default: 256)")
    add("-n", "--n-predict", type=int, default=64, metavar="N", help="tokens to decode a run (default: 64)")
    add("--repeats", type=int, default=5, metavar="N", help="runs of each kind, after a warm-up (default: 5)")
    add(
        "--load-time",
        action="store_true",
        help=f"also load copies of the file without and with {ARRAY_FLOATS} floats of router arrays",
    )
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def spread(n_layer: int, n_skip: int) -> list[int]:
    """``n_skip`` layers to skip, evenly spaced, without the first and the last."""
    if n_skip == 1:
        return [n_layer // 2]
    return [1 + i * (n_layer - 3) // (n_skip - 1) for i in range(n_skip)]


def parse_skipped(text: str | None, n_layer: int) -> list[int]:
    """The numbers of layers to skip, ascending, 0 among them. Raises InputError."""
    most = max(n_layer - 2, 0)
    if text is None:
        return sorted({0, min(round(n_layer * 4 / 15), most), min(n_layer // 2, most)})
    counts = {0}
    for part in (part.strip() for part in text.split(",")):
        try:
            count = round(float(part[:-1]) / 100 * n_layer) if part.endswith("%") else int(part)
        except (ValueError, OverflowError):
            count = -1
        if not 0 <= count <= most:
            raise InputError(
                f"--skipped names '{part}', expected 0 to {most} of {n_layer} layers, or a share such as 25%"
            )
        counts.add(count)
    return sorted(counts)


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    from pyfirst.llama import usable_cpus

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu,
        "cpus": usable_cpus(),
        "threads": threads,
        "load_average": load,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


class Worker:
    """A process that holds one library (see bench_worker)."""

    def __init__(self, lib: str | os.PathLike[str], plain: bool):
        environment = {
            **os.environ,
            "LLAMA_CPP_LIB_PATH": os.fspath(lib),
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        command = [sys.executable, "-m", "pyfirst.cli.bench_worker", *(["--plain"] if plain else [])]
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Have something done. Raises InputError with the worker's reason, RuntimeError where it died."""
        process = self._process
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"do": do, **job}) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with {process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise (InputError if answer["expected"] else RuntimeError)(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _worker(lib: str | os.PathLike[str], plain: bool) -> Iterator[Worker]:
    worker = Worker(lib, plain)
    try:
        yield worker
    finally:
        worker.close()


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """(median, interquartile range)."""
    import numpy as np

    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(middle), float(high - low)


def _router_copies(model: str, folder: Path) -> tuple[Path, Path]:
    """The model without routers, and with routers whose arrays are filled up to ARRAY_FLOATS."""
    import numpy as np

    from first_convert.ggufio import Entry, rewrite
    from first_convert.pack import entries, open_gguf
    from pyfirst.recipe import FirstConfig, Recipe

    source = open_gguf(model)
    architecture = source.get("general.architecture")
    n_layer, width = (source.get(f"{architecture}.{name}") for name in ("block_count", "embedding_length"))
    recipe = Recipe(
        FirstConfig(n_layer, width),
        np.zeros((n_layer, width), np.float32),
        np.zeros(n_layer, np.float32),
        None,
    )
    added = entries(recipe)
    missing = ARRAY_FLOATS - n_layer * (width + 1)
    if missing > 0:
        added.append(Entry("first.bench.filler", "ARRAY", [0.0] * missing, "FLOAT32"))
    without, with_routers = folder / "without.gguf", folder / "with.gguf"
    rewrite(source, without, [], lambda name: not name.startswith("first."))
    rewrite(source, with_routers, added, lambda name: not name.startswith("first."))
    return without, with_routers


def _load_time(worker: Worker, model: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        pair = [str(path) for path in _router_copies(model, Path(folder))]
        for path in pair:
            worker.ask("load", model=path)
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for path, samples in zip(pair, times, strict=True):
                samples.append(worker.ask("load", model=path)["seconds"])
    without, with_routers = (_quartiles(samples)[0] for samples in times)
    return {
        "floats": ARRAY_FLOATS,
        "without_s": without,
        "with_s": with_routers,
        "added_s": with_routers - without,
    }


def _router_cost(seconds: dict[tuple[str, str, int | None], list[dict[str, float]]]) -> float | None:
    """Share of a prompt's time that the routers add, from medians of runs in turns; None without routers."""
    scored, masked = (seconds.get(("pyfirst", context, 0)) for context in ("scored", "masked"))
    if not scored or not masked:
        return None
    with_routers, without = (_quartiles([run["prefill"] for run in runs])[0] for runs in (scored, masked))
    return with_routers / without - 1


def bench(
    model: str,
    *,
    stock_lib: str | None = None,
    threads: int = 1,
    skipped: str | None = None,
    prompt_length: int = 256,
    n_predict: int = 64,
    repeats: int = 5,
    load_time: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure; what --json prints.

    Returns {"machine", "model", "settings", "runs", "router_cost", "dense_against_stock", "graph", "load"}; one run is
    {"phase": "prefill" | "decode", "library": "pyfirst" | "stock", "mode": "alone" | "dense" | "routed" | "forced",
    "layers_skipped", "skipped", "tokens_per_s", "iqr", "speedup", "samples"}. ``speedup`` is the ratio of
    medians to the dense runs of the same library, whose graphs hold no regions to switch. Raises InputError
    (a ValueError).
    """
    from pyfirst import native
    from pyfirst.info import info

    for option, value in (("-t", threads), ("--prompt-length", prompt_length), ("-n", n_predict)):
        if value < 1:
            raise InputError(f"{option} is {value}, expected at least 1")
    if repeats < 1:
        raise InputError(f"--repeats is {repeats}, expected at least 1")
    found = info(model)
    n_layer, n_ctx = found["layers"], prompt_length + n_predict
    if n_layer is None:
        raise InputError(f"{model}: not a language model: {found['architecture']}.block_count is missing")
    if found["context_length"] and n_ctx > found["context_length"]:
        raise InputError(f"prompt and decoding are {n_ctx} tokens, the model was trained for {found['context_length']}")
    counts = parse_skipped(skipped, n_layer)
    if stock_lib is not None and not list(Path(stock_lib).glob("*llama.*")):
        raise InputError(f"--stock-lib {stock_lib}: no libllama there")

    with contextlib.ExitStack() as stack:
        workers = {"pyfirst": stack.enter_context(_worker(native.lib_dir(), False))}
        if stock_lib is not None:
            # One context a process for both: what else a process holds moves the figures by some percent.
            workers["alone"] = stack.enter_context(_worker(native.lib_dir(), True))
            workers["stock"] = stack.enter_context(_worker(Path(stock_lib).resolve(), True))
        scored = False
        for name, worker in workers.items():
            opened = worker.ask("open", model=model, threads=threads, n_ctx=n_ctx)
            scored |= opened["scored"]
            if name == "stock" and opened["patched"]:
                raise InputError(f"--stock-lib {stock_lib}: this library is patched, expected a stock one")
        # library, context, layers to skip; None: dense
        kinds: list[tuple[str, str, int | None]] = [(name, "plain", None) for name in reversed(workers)]
        kinds += [("pyfirst", "scored", 0)] if scored else []
        kinds += [("pyfirst", "masked", count) for count in counts]
        seconds: dict[tuple[str, str, int | None], list[dict[str, float]]] = {kind: [] for kind in kinds}
        for turn in range(repeats + 1):
            on_progress("warm-up" if turn == 0 else f"turn {turn} of {repeats}")
            for kind in kinds:
                library, context, count = kind
                answer = workers[library].ask(
                    "measure",
                    name=context,
                    skip=spread(n_layer, count or 0),
                    n_prompt=prompt_length,
                    n_decode=n_predict,
                )
                if turn:
                    seconds[kind].append(answer)
        graph = workers["pyfirst"].ask("rebuilds", steps=REBUILD_STEPS)
        load = _load_time(workers["pyfirst"], model, repeats) if load_time else None

    runs: list[dict[str, Any]] = []
    medians: dict[tuple[str, str], float] = {}
    for phase, n_tokens in (("prefill", prompt_length), ("decode", n_predict)):
        for kind in kinds:
            library, context, count = kind
            samples = [n_tokens / answer[phase] for answer in seconds[kind]]
            median, iqr = _quartiles(samples)
            if count is None:
                medians[phase, library] = median
            runs.append(
                {
                    "phase": phase,
                    "library": "pyfirst" if library == "alone" else library,
                    "mode": "alone"
                    if library == "alone"
                    else "dense"
                    if count is None
                    else "routed"
                    if context == "scored"
                    else "forced",
                    "layers_skipped": count or 0,
                    "skipped": (count or 0) / n_layer,
                    "tokens_per_s": median,
                    "iqr": iqr,
                    "speedup": median / medians[phase, library],
                    "samples": samples,
                }
            )
    against_stock = None
    if stock_lib is not None:
        against_stock = {phase: medians[phase, "alone"] / medians[phase, "stock"] for phase in ("prefill", "decode")}
    return {
        "router_cost": _router_cost(seconds),
        "machine": machine(threads),
        "model": {name: found[name] for name in ("path", "architecture", "layers", "width", "tensor_type")},
        "settings": {"prompt_length": prompt_length, "n_predict": n_predict, "repeats": repeats},
        "runs": runs,
        "dense_against_stock": against_stock,
        "graph": graph,
        "load": load,
    }


def table(result: dict[str, Any]) -> str:
    """The text form of what bench() returns."""
    machine, model, settings = result["machine"], result["model"], result["settings"]
    load = machine["load_average"]
    lines = [
        f"machine  {machine['cpu']}, {machine['cpus']} CPUs, threads {machine['threads']}"
        + (f", load average {load:.1f}" if load is not None else ""),
        f"model    {model['path']} ({model['layers']} layers, {model['tensor_type']})",
        f"runs     prompt {settings['prompt_length']} tokens, decode {settings['n_predict']}, "
        f"{settings['repeats']} in turns after a warm-up; medians",
        "",
        f"{'':28}{'prefill':>9}{'iqr':>8}{'speedup':>9}  {'decode':>9}{'iqr':>8}{'speedup':>9}",
        f"{'':28}{'tokens/s':>9}{'':>17}  {'tokens/s':>9}",
    ]
    half = len(result["runs"]) // 2
    for prefill, decode in zip(result["runs"][:half], result["runs"][half:], strict=True):
        if prefill["mode"] == "forced":
            name = f"{prefill['layers_skipped']} of {model['layers']} layers skipped"
        elif prefill["mode"] == "routed":
            name = "routers read, none skipped"
        elif prefill["mode"] == "alone":
            name = "dense, alone in a process"
        else:
            name = "unpatched llama.cpp" if prefill["library"] == "stock" else "dense, regions inactive"
        columns = [f"{run['tokens_per_s']:9.1f}{run['iqr']:8.1f}{run['speedup']:8.2f}x" for run in (prefill, decode)]
        lines.append(f"{name:28}{'  '.join(columns)}")
    lines.append("")
    if result["dense_against_stock"]:
        ratios = ", ".join(f"{phase} {ratio:.3f}" for phase, ratio in result["dense_against_stock"].items())
        lines.append(f"dense against the unpatched library: {ratios}")
    if result["router_cost"] is not None:
        lines.append(f"routers cost {result['router_cost']:.1%} of prefill")
    graph = result["graph"]
    lines.append(f"{graph['steps']} decode steps with another mask each: {graph['rebuilds']} graph rebuilds")
    if result["load"]:
        load = result["load"]
        lines.append(
            f"loading: {load['without_s']:.3f} s without routers, {load['with_s']:.3f} s with arrays of "
            f"{load['floats']} floats: {load['added_s']:+.3f} s"
        )
    return "\n".join(lines)


def command(args: argparse.Namespace) -> None:
    """Run the parsed command."""

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\rfirst-bench: {text}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        result = bench(
            args.model,
            stock_lib=args.stock_lib,
            threads=args.threads,
            skipped=args.skipped,
            prompt_length=args.prompt_length,
            n_predict=args.n_predict,
            repeats=args.repeats,
            load_time=args.load_time,
            on_progress=progress,
        )
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(json.dumps(result) if args.json else table(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of first-bench."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
