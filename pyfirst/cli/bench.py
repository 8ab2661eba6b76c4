"""first-bench: what skipping layers gains on this machine, and what it costs where nothing is skipped."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfirst import plots, predict
from pyfirst.cli import bench_files, common
from pyfirst.cpu import machine
from pyfirst.errors import InputError, check_whole
from pyfirst.fit import plan
from pyfirst.layers import evenly

DEFAULT_SHARES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
CLOCKS = ("wall", "cpu")
REBUILD_STEPS = 64


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-bench."""
    parser = common.parser(
        "first-bench",
        "Measure decoding and prefill with forced shares of layers skipped, in turns (A B A B), and print medians\n"
        "beside the ideal: what a file with so many fewer layers would do. Files without routers will do.\n"
        "Forced runs skip in the prompt too (prefill mode skip); the routed one does what the file says.",
        "first-bench -m model.gguf -t 1 -p 64,256 --skipped 25%,50% --stock-lib stock/llama_cpp/lib",
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("-m", "--model", metavar="FILE", help="GGUF file")
    model.add_argument(
        "--synthetic",
        metavar="SHAPE",
        help=f"a file of random weights, made here and removed afterwards: {', '.join(bench_files.SHAPES)}",
    )
    add("--type", metavar="TYPE", help="tensor type of --synthetic (default: q4_0)")
    add(
        "--keep",
        action="store_true",
        help="keep the file of --synthetic, in ~/.cache/pyfirst or $XDG_CACHE_HOME/pyfirst",
    )
    add("--stock-lib", metavar="DIR", help="folder of an unpatched libllama, to compare the dense path with")
    add("-t", "--threads", type=int, default=1, metavar="N", help="threads (default: 1)")
    add(
        "--skipped",
        metavar="LIST",
        help="layers to skip, numbers or shares, such as 8,15 or 25%%,50%% (default: 10%%,20%%,25%%,30%%,40%%,50%%)",
    )
    add("-p", "--prompt-length", default="64,256", metavar="LIST", help="tokens of the prompts (default: 64,256)")
    add("-n", "--n-predict", type=int, default=64, metavar="N", help="tokens to decode a run (default: 64)")
    add("--repeats", type=int, default=5, metavar="N", help="runs of each kind, after a warm-up (default: 5)")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the time of the process, which other work on the machine disturbs less; with -t 1 (default: wall)",
    )
    add(
        "--load-time",
        action="store_true",
        help=f"also load copies of the file without and with {bench_files.ARRAY_FLOATS} floats of router arrays",
    )
    add(
        "--predict",
        metavar="BOARD",
        help=f"measure nothing; from the file's size, predict decoding on {' or '.join(predict.BOARDS)}, or on a "
        "machine that reads so many GB/s from memory; an upper bound",
    )
    add("--plot", metavar="FILE", help="draw speedup and ideal, as PNG, SVG or PDF (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def spread(n_layer: int, n_skip: int) -> list[int]:
    """``n_skip`` layers to skip, evenly spaced, without the first and the last."""
    return evenly(range(1, n_layer - 1), n_skip)


def parse_skipped(text: str | None, n_layer: int) -> list[int]:
    """The numbers of layers to skip, ascending, 0 among them. Raises InputError."""
    most = max(n_layer - 2, 0)
    if text is None:
        return sorted({0, *(min(_share(share, n_layer), most) for share in DEFAULT_SHARES)})
    counts = {0}
    for part in (part.strip() for part in text.split(",")):
        try:
            count = _share(float(part[:-1]) / 100, n_layer) if part.endswith("%") else int(part)
        except (ValueError, OverflowError):
            count = -1
        if not 0 <= count <= most:
            raise InputError(
                f"--skipped names '{part}', expected 0 to {most} of {n_layer} layers, or a share such as 25%"
            )
        counts.add(count)
    return sorted(counts)


def _share(share: float, n_layer: int) -> int:
    """The number of layers next to a share; halves go up."""
    return int(share * n_layer + 0.5)


def parse_lengths(lengths: str | int) -> list[int]:
    """Prompt lengths such as "64,256", ascending. Raises InputError."""
    parts = [part.strip() for part in str(lengths).split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--prompt-length is '{lengths}', expected numbers of at least 1, such as 64,256")
    return sorted({int(part) for part in parts})


def _lengths(found: dict[str, Any], prompt_length: str | int, n_predict: int) -> tuple[list[int], int]:
    """(prompt lengths, tokens of the longest run) of a model by info(). Raises InputError where it has no room."""
    lengths = parse_lengths(prompt_length)
    if n_predict < 1:
        raise InputError(f"-n is {n_predict}, expected at least 1")
    n_ctx = lengths[-1] + n_predict
    if found["context_length"] and n_ctx > found["context_length"]:
        raise InputError(f"prompt and decoding are {n_ctx} tokens, the model was trained for {found['context_length']}")
    return lengths, n_ctx


class Worker:
    """A process that holds one library (see bench_worker)."""

    def __init__(self, lib: str | os.PathLike[str], plain: bool):
        self._lib = lib
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
            code = process.wait()
            if code == -9:
                raise InputError(
                    "a measuring process was killed, perhaps for want of memory: each of them holds the model; "
                    "take a smaller file or type"
                )
            if code == -4:  # SIGILL
                raise InputError(
                    f"{self._lib}: this library runs into an instruction that the processor does not know; build it on "
                    "this machine, without AMX where the compiler is GCC"
                )
            raise RuntimeError(f"the measuring process ended with {code}")
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


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """(median, interquartile range)."""
    import numpy as np

    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(middle), float(high - low)


def _load_time(worker: Worker, model: str, repeats: int) -> dict[str, Any]:
    with bench_files.folder() as folder:
        pair = [str(path) for path in bench_files.router_copies(model, folder)]
        for path in pair:
            worker.ask("load", model=path)
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for path, samples in zip(pair, times, strict=True):
                samples.append(worker.ask("load", model=path)["seconds"])
    without, with_routers = (_quartiles(samples)[0] for samples in times)
    return {
        "floats": bench_files.ARRAY_FLOATS,
        "without_s": without,
        "with_s": with_routers,
        "added_s": with_routers - without,
    }


@dataclass(frozen=True)
class _Kind:
    """One of the things that take turns."""

    mode: str  # "dense", "pruned", "forced", "scored" or "routed"
    library: str  # "pyfirst" or "stock"
    worker: str
    context: str
    skip: int = 0  # layers that are skipped, or missing


def _half(n_layer: int) -> list[int]:
    """The layers of the pruned copy."""
    gone = spread(n_layer, min(n_layer // 2, max(n_layer - 2, 0)))
    return [layer for layer in range(n_layer) if layer not in gone]


def _pruned(model: str, folder: Path, n_layer: int) -> tuple[Path, int]:
    """A copy with half of the layers, and how many are missing. Raises InputError where that cannot be made."""
    from first_convert.ggufio import Gguf

    keep, out = _half(n_layer), folder / "pruned.gguf"
    bench_files.prune(Gguf(model), keep, out)
    return out, n_layer - len(keep)


def _fit(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Seconds = fixed_s + layers * layer_s, least squares over (layers, seconds)."""
    import numpy as np

    layers, seconds = (np.array(column, np.float64) for column in zip(*points, strict=True))
    if len(set(layers)) == 1:
        return {"fixed_s": float(seconds.mean()), "layer_s": 0.0}
    layer, fixed = np.polyfit(layers, seconds, 1)
    return {"fixed_s": float(fixed), "layer_s": float(layer)}


def compare(
    answers: Mapping[tuple[int, _Kind], Sequence[dict[str, Any]]], n_layer: int, n_predict: int, full_prompt: bool
) -> dict[str, Any]:
    """The "runs", "fit", "router_cost" and "dense_against_stock" of bench().

    Args:
        answers: (prompt length, kind) -> of each turn {"prefill", "decode"} in seconds and, where it is routed, "kept".
            There are dense runs, pruned or forced ones, and with scored ones also forced ones that skip nothing.
        n_predict: tokens decoded in each turn.
        full_prompt: whether the prompt of a routed run goes through all layers.
    """
    runs: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    lengths = list(dict.fromkeys(length for length, _ in answers))
    kinds = list(dict.fromkeys(kind for _, kind in answers))
    against_stock: dict[str, dict[str, float]] | None = {} if any(k.library == "stock" for k in kinds) else None
    router_cost: dict[str, float] | None = {} if any(k.mode == "scored" for k in kinds) else None
    for phase in ("prefill", "decode"):
        for length in lengths:
            n_tokens = length if phase == "prefill" else n_predict
            seconds = {kind: _quartiles([a[phase] for a in answers[length, kind]])[0] for kind in kinds}
            dense = next(kind for kind in kinds if (kind.mode, kind.library) == ("dense", "pyfirst"))
            pruned = [kind for kind in kinds if kind.mode == "pruned"]
            source = [dense, *(pruned or (kind for kind in kinds if kind.mode == "forced" and kind.skip))]
            fit = _fit([(n_layer - kind.skip, seconds[kind] / n_tokens) for kind in source])
            fits.append({"phase": phase, "prompt": length, "from": "pruned" if pruned else "forced", **fit})
            for kind in kinds:
                skip: float = kind.skip
                if kind.mode == "routed":
                    skip = n_layer - _quartiles([answer["kept"] for answer in answers[length, kind]])[0]
                running = n_layer if kind.mode == "routed" and phase == "prefill" and full_prompt else n_layer - skip
                ideal = (fit["fixed_s"] + n_layer * fit["layer_s"]) / (fit["fixed_s"] + running * fit["layer_s"])
                rates = [n_tokens / answer[phase] for answer in answers[length, kind]]
                speedup = seconds[dense] / seconds[kind]
                runs.append(
                    {
                        "phase": phase,
                        "prompt": length,
                        "library": kind.library,
                        "mode": kind.mode,
                        "layers_skipped": skip,
                        "skipped": skip / n_layer,
                        "tokens_per_s": n_tokens / seconds[kind],
                        "iqr": _quartiles(rates)[1],
                        "speedup": speedup,
                        "ideal": ideal,
                        "efficiency": speedup / ideal,
                        "samples": rates,
                    }
                )
            by_mode = {(kind.mode, kind.library, kind.skip): seconds[kind] for kind in kinds}
            if against_stock is not None:
                against_stock.setdefault(phase, {})[str(length)] = by_mode["dense", "stock", 0] / seconds[dense]
            if router_cost is not None and phase == "prefill":
                router_cost[str(length)] = by_mode["scored", "pyfirst", 0] / by_mode["forced", "pyfirst", 0] - 1
    return {"runs": runs, "fit": fits, "router_cost": router_cost, "dense_against_stock": against_stock}


def bench(
    model: str,
    *,
    stock_lib: str | None = None,
    threads: int = 1,
    skipped: str | None = None,
    prompt_length: str | int = 256,
    n_predict: int = 64,
    repeats: int = 5,
    clock: str = "wall",
    load_time: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure; what --json prints.

    The ideal comes from a model that has fewer layers instead of skipping them: a copy of the file with half of its
    layers is measured too, and seconds = fixed_s + layers * layer_s goes through it and the dense runs. So what
    skipping itself costs is not in the ideal. Where no such copy can be made, the line is fitted to the forced runs.

    Returns {"machine", "model", "settings", "runs", "fit", "router_cost", "dense_against_stock", "peak_bytes", "graph",
    "load"}; one run is {"phase": "prefill" | "decode", "prompt", "library": "pyfirst" | "stock", "mode": "dense" |
    "pruned" | "forced" | "scored" | "routed", "layers_skipped", "skipped", "tokens_per_s", "iqr", "speedup", "ideal",
    "efficiency", "samples"}. ``speedup`` is the ratio of medians to the dense runs, in a process of their own, and
    efficiency is speedup / ideal. A scored run reads the routers and skips nothing; a routed one does what the file
    says, and its layers_skipped is what they decided. Raises InputError (a ValueError).
    """
    from pyfirst import native
    from pyfirst.info import info, opened

    common.check_threads(threads)
    if repeats < 1:
        raise InputError(f"--repeats is {repeats}, expected at least 1")
    if clock not in CLOCKS or (clock == "cpu" and threads > 1):
        raise InputError(f"--clock {clock} with -t {threads}: expected wall, or cpu with one thread")
    found = info(model)
    n_layer = found["layers"]
    if n_layer is None:
        raise InputError(f"{model}: not a language model: {found['architecture']}.block_count is missing")
    lengths, n_ctx = _lengths(found, prompt_length, n_predict)
    counts = parse_skipped(skipped, n_layer)
    plan(model, max_ctx=n_ctx)  # refuses what not even one process can hold
    if load_time:
        with opened(model) as header:
            check_whole(header, model)
    # The tokens that decide must be in one micro-batch, as in FirstLlama; all kinds of runs read in the same ones.
    first = found["first"] or {}
    n_ubatch = max(512, first["window"]) if first.get("prefill") == "skip" else 512
    if stock_lib is not None and not list(Path(stock_lib).glob("*llama.*")):
        raise InputError(f"--stock-lib {stock_lib}: no libllama there")

    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def start(name: str, lib: str | os.PathLike[str], path: str, plain: bool = True) -> dict[str, Any]:
            worker = stack.enter_context(contextlib.closing(Worker(lib, plain)))
            answer = worker.ask("open", model=path, threads=threads, n_ctx=n_ctx, n_ubatch=n_ubatch)
            workers[name] = worker
            return answer

        # One process for each: what else a process holds moves the figures by some percent.
        routers = start("regions", native.lib_dir(), model, plain=False)["routers"]
        kinds: list[_Kind] = []
        if stock_lib is not None:
            try:
                patched = start("stock", Path(stock_lib).resolve(), model)["patched"]
            except (InputError, RuntimeError) as error:  # a library that is broken, or another program's
                raise InputError(f"--stock-lib {stock_lib}: {error}") from error
            if patched:
                raise InputError(f"--stock-lib {stock_lib}: this library is patched, expected a stock one")
            kinds.append(_Kind("dense", "stock", "stock", "plain"))
        start("dense", native.lib_dir(), model)
        kinds.append(_Kind("dense", "pyfirst", "dense", "plain"))
        with contextlib.suppress(InputError, OSError):
            folder = stack.enter_context(bench_files.folder())
            path, missing = _pruned(model, folder, n_layer)
            start("pruned", native.lib_dir(), str(path))
            kinds.append(_Kind("pruned", "pyfirst", "pruned", "plain", missing))
            path.unlink()  # the mapping is enough; where the system objects, it goes with the folder
        kinds += [_Kind("forced", "pyfirst", "regions", "masked", count) for count in counts]
        if routers:
            kinds += [_Kind(mode, "pyfirst", "regions", mode) for mode in ("scored", "routed")]

        answers: dict[tuple[int, _Kind], list[dict[str, Any]]] = {(n, kind): [] for n in lengths for kind in kinds}
        began, total = time.monotonic(), (repeats + 1) * len(answers)
        for turn in range(repeats + 1):
            for i, ((length, kind), samples) in enumerate(answers.items(), turn * len(answers)):
                left = (time.monotonic() - began) * (total - i) / i if i else None
                on_progress(f"run {i + 1} of {total}" + ("" if left is None else f", {left / 60:.1f} minutes left"))
                answer = workers[kind.worker].ask(
                    "measure",
                    name=kind.context,
                    skip=spread(n_layer, kind.skip) if kind.mode == "forced" else [],
                    n_prompt=length,
                    n_decode=n_predict,
                    clock=clock,
                )
                if turn:
                    samples.append(answer)
        graph = workers["regions"].ask("rebuilds", steps=REBUILD_STEPS)
        peak = {name: worker.ask("memory")["peak"] for name, worker in workers.items()}
        load = _load_time(workers["regions"], model, repeats) if load_time else None
        measured_on = machine(threads)

    return {
        "machine": measured_on,
        "model": {name: found[name] for name in ("path", "architecture", "layers", "width", "tensor_type")},
        "settings": {"prompt_lengths": lengths, "n_predict": n_predict, "repeats": repeats, "clock": clock},
        **compare(answers, n_layer, n_predict, first.get("prefill") == "full"),
        "peak_bytes": peak,
        "graph": graph,
        "load": load,
    }


def _label(run: dict[str, Any], n_layer: int) -> str:
    if run["library"] == "stock":
        return "unpatched llama.cpp"
    return {
        "dense": "dense",
        "pruned": f"pruned to {n_layer - run['layers_skipped']} layers",
        "scored": "routers read, none skipped",
        "forced": f"{run['layers_skipped']} of {n_layer} layers skipped",
        "routed": f"routed, {run['layers_skipped']:g} of {n_layer} skipped",
    }[run["mode"]]


def table(result: dict[str, Any]) -> str:
    """The text form of what bench() returns."""
    machine, model, settings = result["machine"], result["model"], result["settings"]
    facts = [f"threads {machine['threads']}"]
    if machine["load_average"] is not None:
        facts.append(f"load average {machine['load_average']:.1f}")
    if machine["governor"]:
        facts.append(f"governor {machine['governor']}")
    if machine["temperature_c"] is not None:
        facts.append(f"{machine['temperature_c']:.0f} °C")
    lines = [
        f"machine  {machine['cpu']}, {machine['cpus']} cores, {', '.join(facts)}",
        f"model    {model['path']} ({model['layers']} layers, {model['tensor_type']})",
        f"runs     decode {settings['n_predict']} tokens, {settings['repeats']} in turns after a warm-up; medians"
        + (", CPU time" if settings["clock"] == "cpu" else ""),
    ]
    peaks = [f"{name} {size / 1e6:.0f} MB" for name, size in result["peak_bytes"].items() if size]
    if peaks:
        lines.append(f"memory   peak of a process: {', '.join(peaks)}")
    columns = f"{'tokens/s':>9}{'iqr':>7}{'speedup':>9}{'ideal':>7}{'eff.':>6}"
    for length in settings["prompt_lengths"]:
        lines += [
            "",
            f"{f'prompt of {length} tokens':28}{'prefill':>9}{'':29}  {'decode':>9}",
            f"{'':28}{columns}  {columns}",
        ]
        rows = [[r for r in result["runs"] if (r["prompt"], r["phase"]) == (length, p)] for p in ("prefill", "decode")]
        for pair in zip(*rows, strict=True):
            cells = [
                f"{run['tokens_per_s']:9.1f}{run['iqr']:7.1f}{run['speedup']:8.2f}x{run['ideal']:6.2f}x{run['efficiency']:6.2f}"
                for run in pair
            ]
            lines.append(f"{_label(pair[1], model['layers']):28}{'  '.join(cells)}")
        fits = [fit for fit in result["fit"] if fit["prompt"] == length]
        text = "  ".join(
            f"{1e3 * fit['fixed_s']:.3f} + layers * {1e3 * fit['layer_s']:.4f} ms".ljust(39) for fit in fits
        )
        lines.append(f"{'fit, a token':28} {text}".rstrip())
    source = "the pruned copy" if result["fit"][0]["from"] == "pruned" else "the forced runs"
    lines += ["", f"ideal: the line through the dense runs and {source}; eff. = speedup / ideal"]
    for phase, ratios in (result["dense_against_stock"] or {}).items():
        text = ", ".join(f"{ratio:.3f} at {length}" for length, ratio in ratios.items())
        lines.append(f"dense against the unpatched library, {phase}: {text}")
    if result["router_cost"]:
        text = ", ".join(f"{cost:.1%} at {length}" for length, cost in result["router_cost"].items())
        lines.append(f"routers cost of prefill: {text}")
    graph = result["graph"]
    lines.append(f"{graph['steps']} decode steps with another mask each: {graph['rebuilds']} graph rebuilds")
    if result["load"]:
        load = result["load"]
        lines.append(
            f"loading: {load['without_s']:.3f} s without routers, {load['with_s']:.3f} s with arrays of "
            f"{load['floats']} floats: {load['added_s']:+.3f} s"
        )
    return "\n".join(lines)


def predicted(
    model: str, bandwidth: float, *, skipped: str | None = None, prompt_length: str | int = 256, n_predict: int = 64
) -> dict[str, Any]:
    """What --predict --json prints: decoding at ``bandwidth`` GB/s, see predict.predict; nothing is measured.

    The context is that in the middle of decoding ``n_predict`` tokens behind a prompt. Raises InputError.
    """
    from pyfirst.info import info

    found = info(model)
    n_layer = found["layers"] or 0
    counts = parse_skipped(skipped, n_layer)
    contexts = [length + n_predict // 2 for length in _lengths(found, prompt_length, n_predict)[0]]
    masks = [spread(n_layer, count) if count else [] for count in counts]
    return {
        "predicted": True,
        "bandwidth_gb_s": bandwidth,
        "model": {name: found[name] for name in ("path", "architecture", "layers", "width", "tensor_type")},
        "runs": predict.predict(model, bandwidth, masks, contexts),
    }


def predicted_table(result: dict[str, Any]) -> str:
    """The text form of what predicted() returns."""
    model = result["model"]
    lines = [
        f"predicted, not measured: {result['bandwidth_gb_s']:g} GB/s from memory is all that counts, an upper bound",
        f"model    {model['path']} ({model['layers']} layers, {model['tensor_type']})",
    ]
    for context in dict.fromkeys(run["context"] for run in result["runs"]):
        lines += ["", f"{f'context of {context} tokens':28}{'MB/token':>9}{'tokens/s':>10}{'speedup':>9}"]
        for run in result["runs"]:
            if run["context"] == context:
                label = (
                    f"{run['layers_skipped']} of {model['layers']} layers skipped" if run["layers_skipped"] else "dense"
                )
                cells = f"{run['bytes'] / 1e6:9.1f}{run['tokens_per_s']:10.1f}{run['speedup']:8.2f}x"
                lines.append(f"{label:28}{cells}")
    return "\n".join(lines)


def command(args: argparse.Namespace) -> None:
    """Run the parsed command."""
    bandwidth = None if args.predict is None else predict.parse_bandwidth(args.predict)
    if bandwidth is not None and args.plot:
        raise InputError("--plot draws measurements, --predict makes none")
    if bandwidth is not None and (args.stock_lib is not None or args.load_time):
        raise InputError("--stock-lib and --load-time are for measurements, --predict makes none")
    if bandwidth is not None and args.keep:
        raise InputError("--predict reads a header only and leaves no file to --keep")
    if (args.keep or args.type) and not args.synthetic:
        raise InputError("--type and --keep are for the file of --synthetic")
    if args.plot:
        plots.check(args.plot)
        common.check_output(args.plot, [args.model or ""])

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\rfirst-bench: {text}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        with contextlib.ExitStack() as stack:
            model = args.model
            if args.synthetic:
                progress("making the file")
                made = bench_files.synthetic(args.synthetic, args.type or "q4_0", args.keep, weights=bandwidth is None)
                model = str(stack.enter_context(made))
            if bandwidth is not None:
                progress("reading the header")
                result = predicted(
                    model,
                    bandwidth,
                    skipped=args.skipped,
                    prompt_length=args.prompt_length,
                    n_predict=args.n_predict,
                )
            else:
                result = bench(
                    model,
                    stock_lib=args.stock_lib,
                    threads=args.threads,
                    skipped=args.skipped,
                    prompt_length=args.prompt_length,
                    n_predict=args.n_predict,
                    repeats=args.repeats,
                    clock=args.clock,
                    load_time=args.load_time,
                    on_progress=progress,
                )
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    text = table if bandwidth is None else predicted_table
    print(json.dumps(result) if args.json else text(result))
    if args.plot:
        plots.bench(result, args.plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of first-bench."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
