"""FiRST against everything that is free: the same LoRA budget under other ways to leave out layers.

    python examples/baselines.py MODEL_DIR --train a.train.jsonl b.train.jsonl --test a.test.jsonl b.test.jsonl

trains, converts to q8_0 and scores each system in the runtime, one after another, and writes one JSON file a
system to docs/results/baselines and the table docs/baselines.md (--results docs/results/NAME: docs/NAME.md). Systems
whose JSON is there are not run again, recipes in --work not trained again; another --seed or --steps needs another
--work and --results, another --limit, --answers or --test another --results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from first_convert.convert import convert
from pyfirst.evaluation import evaluate
from pyfirst.scores import Statistic, bleu, draw, estimate, mean, rouge
from pyfirst.training.options import build_parser as train_parser
from pyfirst.training.train import train

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "first": ("FiRST + LoRA", []),
    "loo": ("one mask by leave-one-out + LoRA", ["--static", "loo"]),
    "even": ("evenly spaced + LoRA", ["--static", "even"]),
    "random": ("random + LoRA", ["--static", "random"]),
    "routers": ("FiRST, routers only", ["--phase", "routers"]),
}


def systems() -> dict[str, tuple[str, list[str]]]:
    """Name -> (title, options of first-train), in the order in which they are run."""
    found = {"dense-lora": ("all layers + LoRA", ["--target-skip", "0"])}
    for prefill in ("full", "skip"):
        for skip in (25, 15):
            for way, (title, options) in WAYS.items():
                more = ["--target-skip", str(skip / 100), "--prefill", prefill, *options]
                found[f"{way}-{skip}-{prefill}"] = (title, more)
    found["base"] = ("all layers, untrained", ["--target-skip", "0", "--phase", "routers"])
    return found


def score(gguf: Path, tests: list[str], limit: int, answers: int, threads: int | None) -> dict[str, Any]:
    """What each example contributes to each score, by task, so that systems can be compared in pairs."""

    def rows_of(path: str, limit: int, metric: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        evaluate(
            [str(gguf)], [path], limit=limit, metrics=[metric], max_tokens=96, threads=threads, on_answer=rows.append
        )
        return rows

    tasks: dict[str, Any] = {}
    for path in tests:
        rows = rows_of(path, limit, "ce")
        found: dict[str, Any] = {
            "ce": [[round(-row["log_likelihood"], 4), row["reference_tokens"]] for row in rows],
            "skipped": [row["skipped"] for row in rows],
        }
        # Answers to sums are long and say little about layers: their cross-entropy is enough.
        if answers and "gsm8k" not in Path(path).name:
            rows = rows_of(path, answers, "rougeL")
            texts, references = [row["text"] for row in rows], [row["references"] for row in rows]
            found["bleu"] = bleu(texts, references).rows.tolist()
            found["rougeL"] = rouge(texts, references, "rougeL").rows[:, 0].round(4).tolist()
        if rows[0]["task"] in tasks:
            sys.exit(f"{path}: task '{rows[0]['task']}' again; name a \"task\" in the rows or rename the file")
        tasks[rows[0]["task"]] = found
    return tasks


def base_names(paths: Sequence[str]) -> list[str]:
    return sorted(Path(path).name for path in paths)


def answers_of(name: str, args: argparse.Namespace) -> int:
    """How many answers of each file a system is asked for."""
    return args.answers if args.generate == "all" or name.split("-")[0] in ("dense", "first", "loo") else 0


def same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """End the program where what is there was made with other options; one that is not stored may be any."""
    for key, value in wanted.items():
        if found.get(key, value) != value:
            sys.exit(f"{path}: made with --{key} {found[key]}, not {value}; change --work and --results")


def run(name: str, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Train (unless the recipe is there), convert and score one system."""
    recipe, gguf = args.work / name, args.work / f"{name}.gguf"
    work = args.work / f".{name}.work"
    shared = args.work / ".dense-lora.work" / "warm-up.safetensors"
    command = ["-m", args.model, "--data", *args.train, "--out", str(recipe), "--force", "--keep-checkpoints"]
    command += ["--steps", str(args.steps), "--batch-size", "3", "--grad-accum", "3", "--max-length", "288"]
    command += ["--hold-back", "24", "--prior-examples", "24", "--seed", str(args.seed), "--bf16", *options]
    if not (recipe / "first_config.json").is_file():
        if shared.is_file() and "--phase" not in options:  # the warm-up is the same for all
            work.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared, work)
            command.append("--resume")
        train(train_parser().parse_args(command))
        if name != "dense-lora":
            shutil.rmtree(work, ignore_errors=True)
    config = json.loads((recipe / "first_config.json").read_text(encoding="utf-8"))
    same(recipe, config["training"]["options"], {"seed": args.seed, "steps": args.steps})
    convert(args.model, first=recipe, outfile=gguf, outtype="q8_0", force=True)
    result = {
        "name": name,
        "seed": args.seed,
        "options": options,
        "steps": args.steps,
        "limit": args.limit,
        "answers": args.answers,
        "test": base_names(args.test),
        "training": {k: config["training"][k] for k in ("options", "held_back", "warnings")},
        "tasks": score(gguf, args.test, args.limit, answers_of(name, args), args.threads),
    }
    gguf.unlink()
    return result


def statistics(result: dict[str, Any], tasks: Sequence[str], metrics: dict[str, str]) -> dict[str, Statistic]:
    """Scores of one system: "TASK NAME" by task, and "ce" as the mean of the tasks' cross-entropies.

    Rows are in the order of ``tasks``, so that systems are paired whatever the order of their test files.
    """
    found: dict[str, Statistic] = {}
    rows = []
    for task in tasks:
        parts = result["tasks"][task]
        ce = np.array(parts["ce"], np.float64)
        found[f"{task} ce"] = Statistic(ce)
        rows.append(ce)
        if metrics.get(task) == "bleu" and "bleu" in parts:
            found[f"{task} bleu"] = Statistic(np.array(parts["bleu"], np.float64), bleu(["x"], [["x"]]).score)
        if metrics.get(task) == "rougeL" and "rougeL" in parts:
            found[f"{task} rougeL"] = mean(parts["rougeL"])
    blocks = np.zeros((sum(map(len, rows)), 2 * len(rows)))
    at = 0
    for i, part in enumerate(rows):
        blocks[at : at + len(part), 2 * i : 2 * i + 2] = part
        at += len(part)
    found["ce"] = Statistic(blocks, lambda sums: (sums[:, ::2] / sums[:, 1::2]).mean(1))
    return found


def table(folder: Path, titles: dict[str, str]) -> str:
    """The page docs/baselines.md from the JSON files in ``folder``."""
    results = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}
    shown = [name for name in titles if name in results]
    any_result = results[shown[0]]
    tasks = list(any_result["tasks"])
    scores = {"describe": "bleu", "summarize": "rougeL"}
    measured = {name: statistics(results[name], tasks, scores) for name in shown}

    def cell(name: str, score: str, against: str | None, digits: int) -> str:
        if score not in measured[name]:
            return "-"
        first = measured[against].get(score) if against in measured and against != name else None
        strata = [task for task in tasks if score in ("ce", f"{task} ce") for _ in any_result["tasks"][task]["ce"]]
        strata = strata or [score] * len(measured[name][score].rows)
        found = estimate(measured[name][score], draw(strata, 0), np.arange(len(strata)), first)
        text = f"{found['value']:.{digits}f}"
        if found["difference"]:
            gap = found["difference"]
            interval = "" if gap["low"] is None else f", {gap['low']:+.{digits}f}..{gap['high']:+.{digits}f}"
            text += f" ({gap['value']:+.{digits}f}{interval})"
        return text

    columns = ["ce", *(f"{task} ce" for task in tasks), *(f"{t} {s}" for t, s in scores.items() if t in tasks)]
    heads = ["mean cross-entropy", *columns[1:]]
    lines = []
    for prefill in ("full", "skip"):
        for skip in (15, 25):
            names_here = [n for n in shown if n.endswith(f"-{skip}-{prefill}")]
            if not names_here:
                continue
            lines += [f"\n## Prefill `{prefill}`, {skip}% of the layers skipped\n"]
            lines += ["| | skipped | masks | " + " | ".join(heads) + " |", "|---" * (len(heads) + 3) + "|"]
            against = f"first-{skip}-{prefill}"
            for name in [n for n in ("base", "dense-lora") if n in shown] + names_here:
                parts = results[name]["tasks"].values()
                skipped = [tuple(row) for part in parts for row in part["skipped"]]
                depth = len(next(iter(results[name]["training"]["held_back"]["modal_masks"].values())))
                share = np.mean([len(row) for row in skipped]) / depth
                cells = [cell(name, c, against, 3 if c.endswith("ce") else 1) for c in columns]
                row = [titles[name], f"{share:.1%}", str(len(set(skipped))), *cells]
                lines.append("| " + " | ".join(row) + " |")
    head = [
        "# FiRST against other ways to leave out layers",
        "",
        f"Test examples of each task: the first {any_result['limit']} for cross-entropy,",
        f"{any_result['answers']} for BLEU and ROUGE-L. {any_result['steps']} optimizer steps of 9 examples for every",
        f"LoRA, seed {any_result['seed']}, q8_0, scored in the runtime. In brackets the",
        "difference to FiRST + LoRA with its 95% interval (paired bootstrap over examples).",
        "Cross-entropy in nats per token of the first reference: lower is better. Written by `examples/baselines.py`",
        f"from `docs/results/{folder.name}/*.json`.",
    ]
    return "\n".join([*head, *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("--train", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of " + ", ".join(systems()))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--limit", type=int, default=300, help="test examples of each file for cross-entropy")
    parser.add_argument("--answers", type=int, default=100, help="and for answers, which BLEU and ROUGE-L score")
    parser.add_argument("--generate", choices=("all", "key"), default="key", help="which systems also answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "baselines")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "baselines")
    args = parser.parse_args()
    known = systems()
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    for name in args.only or known:
        path = args.results / f"{name}.json"
        if path.is_file():
            wanted = {key: getattr(args, key) for key in ("seed", "steps", "limit")}
            wanted |= {"answers": args.answers} if answers_of(name, args) else {}
            wanted |= {"test": base_names(args.test)} if args.test else {}
            same(path, json.loads(path.read_text(encoding="utf-8")), wanted)
            continue
        started = time.monotonic()
        print(f"== {name}", file=sys.stderr, flush=True)
        result = run(name, known[name][1], args)
        result["seconds"] = round(time.monotonic() - started)
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    text = table(args.results, {name: title for name, (title, _) in known.items()})
    (args.results.parent.parent / f"{args.results.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
