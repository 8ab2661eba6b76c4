"""Quality against decode speed on this machine: is leaving out layers worth it beside what else is free?

    python examples/frontier.py MODEL_DIR --recipes build/baselines --test a.test.jsonl b.test.jsonl

takes the recipes that examples/baselines.py trained, measures every point and writes docs/results/frontier.json,
the picture docs/results/frontier.png and the page docs/results.md. Cross-entropies in the JSON are kept where --limit
is the same; with --docs FOLDER all is measured anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from demo import decode_speed
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from first_convert.convert import convert
from pyfirst.cpu import machine, usable_cpus
from pyfirst.evaluation import Scorer, evaluate
from pyfirst.tasks import read_examples

ROOT = Path(__file__).resolve().parent.parent
SKIPS = (0.10, 0.15, 0.20, 0.25, 0.30)


def points(recipes: Path) -> list[dict[str, Any]]:
    """What is measured: label, series, recipe, outtype and arguments of FirstLlama."""
    found: list[dict[str, Any]] = []

    def add(series: str, recipe: str, outtype: str, label: str, **arguments: Any) -> None:
        if (recipes / recipe / "first_config.json").is_file():
            found.append(
                {"series": series, "recipe": recipe, "outtype": outtype, "label": label, "arguments": arguments}
            )

    for outtype in ("q8_0", "q4_k_m", "q4_0"):
        add("all layers + LoRA", "dense-lora", outtype, outtype, routing=False)
    add("n-gram speculative", "dense-lora", "q8_0", "q8_0", routing=False, speculative=True)
    for outtype in ("q8_0", "q4_k_m"):
        for skip in SKIPS:
            add(f"FiRST {outtype}", "first-25-full", outtype, f"{skip:.0%}", skip=skip)
    for outtype in ("q8_0", "q4_k_m"):
        for share in (15, 25):
            add("one mask by leave-one-out", f"loo-{share}-full", outtype, f"{outtype} {share}%")
            add("evenly spaced", f"even-{share}-full", outtype, f"{outtype} {share}%")
    return found


def open_model(gguf: Path, arguments: dict[str, Any], threads: int | None) -> Scorer:
    arguments = dict(arguments)
    if arguments.pop("speculative", False):
        arguments["draft_model"] = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=4)
        arguments["logits_all"] = True
    return Scorer(str(gguf), n_ctx=640, n_threads=threads, n_threads_batch=threads, **arguments)


def quality(gguf: Path, point: dict[str, Any], tests: list[str], limit: int, threads: int | None) -> dict[str, Any]:
    """Cross-entropy of the first references by task, nats a token, and the share of layers kept."""
    skip = point["arguments"].get("skip")
    dense = point["arguments"].get("routing") is False
    result = evaluate(
        [f"{gguf}=dense" if dense else str(gguf)], tests, limit=limit, metrics=["ce"], threads=threads, skip=skip
    )["systems"][0]
    by_task = {task: found["ce"]["value"] for task, found in result["by_task"].items()}
    return {
        "ce": float(np.mean(list(by_task.values()))),
        "by_task": by_task,
        "kept": result["total"]["kept"]["value"],
        "masks": result["total"]["distinct_masks"],
    }


def speeds(
    opened: list[tuple[dict[str, Any], Path]], tests: list[str], rounds: int, n: int, threads: int | None
) -> None:
    """Median decode speed of each point, all in turns on the same prompts."""
    models = [open_model(gguf, point["arguments"], threads) for point, gguf in opened]
    taken: list[list[float]] = [[] for _ in opened]
    files = [read_examples(path, rounds) for path in tests]
    for example in itertools.chain(*files):
        for place, llm in enumerate(models):
            taken[place].append(decode_speed(llm, llm.prompt_tokens(example.prompt), n))
    for (point, _), values in zip(opened, taken, strict=True):
        # The mean of the tasks' medians: masks differ by task, and one slow turn should not count.
        left = iter(values)
        parts = [list(itertools.islice(left, len(file))) for file in files]
        point["tokens_per_s"] = statistics.mean(map(statistics.median, parts))
        point["quartiles"] = np.percentile(values, (25, 75)).round(2).tolist()
    for llm in models:
        llm.close()


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for series in dict.fromkeys(point["series"] for point in found):
        part = sorted((p for p in found if p["series"] == series), key=lambda p: p["tokens_per_s"])
        line = "o-" if series.startswith("FiRST") else "s"
        axes.plot([p["tokens_per_s"] for p in part], [p["ce"] for p in part], line, label=series)
        for p in part:
            axes.annotate(
                p["label"], (p["tokens_per_s"], p["ce"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    axes.set_xlabel("decode, tokens per second")
    axes.set_ylabel("cross-entropy, nats per token (lower is better)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def frontier(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that no other point beats in both speed and cross-entropy."""
    return [p for p in found if not any(q["tokens_per_s"] > p["tokens_per_s"] and q["ce"] <= p["ce"] for q in found)]


def page(result: dict[str, Any]) -> str:
    """docs/results.md."""
    found = sorted(result["points"], key=lambda p: -p["tokens_per_s"])
    best = frontier(found)
    ours = [p for p in best if p["series"].startswith("FiRST")]
    missed = [p for p in found if p["series"].startswith("FiRST") and p not in ours]

    def name(p: dict[str, Any]) -> str:
        return f"{p['series']} {p['label']}"

    lines = ["# Quality against decode speed", ""]
    if missed:
        lines += [
            "Not on the frontier, because something else is faster and at least as good: "
            + f"{', '.join(map(name, missed))}.",
            "",
        ]
    lines += [
        f"On the frontier: {', '.join(map(name, best))}." if ours else "No FiRST point is on the frontier.",
        "",
        "![Cross-entropy against tokens per second](results/frontier.png)",
        "",
        f"{result['machine']['cpu']}, threads: {result['machine']['threads']}, SmolLM2-135M-Instruct, cross-entropy of",
        f"{result['limit']} test references a task, mean of the tasks; speed in turns on",
        f"{result['rounds']} prompts a task, mean of the tasks' medians. Training of every point and the test files:",
        "[baselines.md](baselines.md). Speculative decoding is llama-cpp-python's prompt lookup, up to 4 tokens ahead.",
        "Written by `examples/frontier.py`.",
        "",
        "| | tokens/s | cross-entropy | layers kept | masks | on the frontier |",
        "|---|---|---|---|---|---|",
    ]
    for p in found:
        mark = "yes" if p in best else ""
        cells = [name(p), f"{p['tokens_per_s']:.1f}", f"{p['ce']:.3f}", f"{p['kept']:.0%}", str(p["masks"]), mark]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def measured(stored: Path, limit: int) -> dict[tuple[str, str], dict[str, Any]]:
    """(series, label) -> point of an earlier run; none where its cross-entropies are of other examples."""
    before = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    return {(p["series"], p["label"]): p for p in before.get("points", ()) if before["limit"] == limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("--recipes", type=Path, default=ROOT / "build" / "baselines")
    parser.add_argument("--test", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, default=60, help="test examples of each file for the cross-entropy")
    parser.add_argument("--rounds", type=int, default=8, help="prompts of each file for the speed")
    parser.add_argument("-n", type=int, default=48, help="tokens a turn")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    folder = args.docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "frontier.json"
    known = measured(stored, args.limit)
    opened = []
    for point in points(args.recipes):
        gguf = args.recipes / f"{point['recipe']}-{point['outtype']}.gguf"
        if not gguf.is_file():
            convert(args.model, first=args.recipes / point["recipe"], outfile=gguf, outtype=point["outtype"])
        point = known.get((point["series"], point["label"]), point)
        if "ce" not in point:
            print(f"== {point['series']} {point['label']}", file=sys.stderr, flush=True)
            point.update(quality(gguf, point, args.test, args.limit, args.threads))
        opened.append((point, gguf))
    result = {"machine": machine(args.threads or usable_cpus()), "limit": args.limit, "rounds": args.rounds}
    result["points"] = [point for point, _ in opened]
    stored.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    speeds(opened, args.test, args.rounds, args.n, args.threads)
    stored.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result["points"], folder / "frontier.png")
    (args.docs / "results.md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
