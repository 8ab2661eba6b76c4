"""first-eval: what leaving layers out costs in quality and gains in speed, on your own examples."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from pyfirst.cli import common
from pyfirst.errors import InputError
from pyfirst.scores import DEFAULT_METRICS, METRICS

# name: (column, digits)
COLUMNS = {
    "tokens_per_s": ("tok/s", 1),
    "ce": ("CE", 3),
    "bleu": ("BLEU", 1),
    "chrf": ("chrF", 1),
    "rouge1": ("ROUGE-1", 1),
    "rougeL": ("ROUGE-L", 1),
    "bertscore": ("BERTScore", 1),
    "exact": ("exact", 3),
    "answer": ("answer", 3),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-eval."""
    parser = common.parser(
        "first-eval",
        "Score GGUF models on JSON lines of prompts and references, in the runtime that will serve them.\n"
        "Systems are files and modes: dense, routed (the routers decide), static:3,5,7 (these layers are left\n"
        "out), even:N (N evenly spaced layers), random:N; even and random keep the first and the last layer.\n"
        "Scores of two or more examples have a 95% bootstrap interval, their difference to the first system too\n"
        "(tok/s: within one file, whose systems take turns; first-bench compares speeds).",
        "first-eval -m smollm2-first.gguf --data test.jsonl --compare dense routed even:7 --limit 100",
    )
    add = parser.add_argument
    add(
        "-m",
        "--model",
        required=True,
        nargs="+",
        metavar="FILE[=MODE]",
        help="GGUF files; one without MODE takes all modes of --compare",
    )
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help='lines of {"prompt", "references": [...]} or {"prompt", "response"}, with "task" if you like',
    )
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="MODE",
        help="modes, or more FILE=MODE; the first system is what the others are compared with "
        "(default: routed, dense without routers)",
    )
    add(
        "-n",
        "--n-predict",
        type=int,
        default=128,
        metavar="N",
        help="tokens of an answer at most; greedy (default: 128)",
    )
    add("--limit", type=int, metavar="N", help="examples of each data file, from its beginning (default: all)")
    add(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=list(DEFAULT_METRICS),
        metavar="NAME",
        help=f"some of {', '.join(METRICS)} (default: all but bertscore, which downloads a model). ce is the "
        "cross-entropy in nats a token of the first reference; alone, nothing is generated",
    )
    add("--bertscore-model", metavar="NAME", help="model or folder for bertscore (default: bert-score's for English)")
    add("--exact", action="store_true", help="also exact matches, and right numbers behind ####")
    common.add_model_options(parser)
    add("--skip", metavar="SHARE", help="routed: skip this share of the layers on average, such as 20%% or 0.2")
    add("--seed", type=int, default=0, metavar="N", help="draws the layers of random:N and the resamples (default: 0)")
    add("--format", choices=("text", "markdown", "json"), default="text", help="of the result (default: text)")
    add("--out", metavar="FILE", help="write the result there instead of to stdout")
    add("--predictions", metavar="FILE", help="write every answer there, as JSON lines")
    return parser


def _sections(result: dict[str, Any]) -> Iterator[tuple[str, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """(heading, [(system, its scores)]) of each task, then of all together."""
    systems = result["systems"]
    for task, count in result["tasks"].items():
        yield f"{task}, {count} examples", [(system, system["by_task"][task]) for system in systems]
    if len(result["tasks"]) > 1:
        count = sum(result["tasks"].values())
        yield f"all tasks, {count} examples", [(system, system["total"]) for system in systems]


def _columns(result: dict[str, Any]) -> list[str]:
    """Names of the scores that a system has, in the order of the table."""
    return [name for name in COLUMNS if name in result["systems"][0]["total"]]


def _value(estimate: dict[str, Any] | None, digits: int, signed: bool = False) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    return f"{estimate['value']:{'+' if signed else ''}.{digits}f}"


def _range(estimate: dict[str, Any] | None, digits: int, signed: bool = False) -> str:
    if estimate is None or estimate["low"] is None:
        return ""
    sign = "+" if signed else ""
    return f"{estimate['low']:{sign}.{digits}f}..{estimate['high']:{sign}.{digits}f}"


def _estimate(estimate: dict[str, Any], digits: int, signed: bool = False) -> str:
    """Value and interval in one cell."""
    interval = _range(estimate, digits, signed)
    return _value(estimate, digits, signed) + (f" ({interval})" if interval else "")


def _kept(scores: dict[str, Any]) -> str:
    """Layers that ran on average, and their share of the file's."""
    return f"{scores['layers']['value']:.1f} ({scores['kept']['value']:.0%})"


def _clear(difference: dict[str, Any] | None, digits: int) -> str:
    """A star where the interval of a difference leaves out 0, which the difference as printed is not."""
    if difference is None or difference["low"] is None or not float(_value(difference, digits)):
        return ""
    return "*" if difference["low"] > 0 or difference["high"] < 0 else ""


def _masks(result: dict[str, Any]) -> list[str]:
    """Lines on how the masks of the tasks differ, for systems that have more than one mask."""
    lines = []
    for system in result["systems"]:
        masks = system["masks"]
        if masks is None or system["total"]["distinct_masks"] < 2:
            continue
        lines.append(f"masks of {system['name']}:")
        lines += [f"  {task} mostly leaves out {skipped or 'nothing'}" for task, skipped in masks["modal"].items()]
        lines += [f"  {pair} differ on {share:.0%} of the layers" for pair, share in masks["differ"].items()]
        for kind, guess in (masks["guess"] or {}).items():
            lines.append(
                f"  task guessed from the nearest {kind} mask: {guess['value']:.1%} right "
                f"[{guess['low']:.1%}..{guess['high']:.1%}], by chance {masks['chance']:.1%}"
            )
    return lines


def text(result: dict[str, Any]) -> str:
    """The result as a table for a terminal: score, interval, difference to the first system, its interval."""
    names = _columns(result)
    first = result["systems"][0]["name"]
    width = max(len("system"), len(f"  - {first}"), *(len(system["name"]) for system in result["systems"]))
    lines = []
    for heading, rows in _sections(result):
        lines += [heading, ""]
        blocks: list[list[str]] = [["system", "layers", "masks", *(COLUMNS[name][0] for name in names)]]
        for system, scores in rows:
            shown = [(scores[name], COLUMNS[name][1]) for name in names]
            masks = str(scores["distinct_masks"])
            blocks.append([system["name"], _kept(scores), masks, *(_value(found, digits) for found, digits in shown)])
            blocks.append(["", "", "", *(_range(found, digits) for found, digits in shown)])
            if any(found["difference"] for found, _ in shown):
                gaps = [(found["difference"], digits) for found, digits in shown]
                blocks.append(
                    [f"  - {first}", "", "", *(_clear(gap, digits) + _value(gap, digits, True) for gap, digits in gaps)]
                )
                blocks.append(["", "", "", *(_range(gap, digits, True) for gap, digits in gaps)])
        widths = [max(len(row[i]) for row in blocks) for i in range(len(blocks[0]))]
        widths[0] = width
        for row in filter(any, blocks):
            cells = [row[0].ljust(width), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    lines += _masks(result)
    if lines[-1]:
        lines.append("")
    lines.append(_note(result))
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The result as one Markdown table."""
    names = _columns(result)
    header = ["task", "system", "layers", "masks", *(COLUMNS[name][0] for name in names)]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for heading, rows in _sections(result):
        for system, scores in rows:
            cells = [heading, system["name"], _kept(scores), str(scores["distinct_masks"])]
            for name in names:
                found, digits = scores[name], COLUMNS[name][1]
                cell, gap = _estimate(found, digits), found["difference"]
                if gap and gap["value"] is not None:
                    cell += "<br>" + ("\\*" if _clear(gap, digits) else "") + _estimate(gap, digits, True)
                cells.append(cell)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    masks = _masks(result)
    if masks:
        lines += ["", *(line.replace("  ", "- ", 1) if line.startswith("  ") else f"\n{line}\n" for line in masks)]
    lines += ["", _note(result).replace("*", "\\*")]
    return "\n".join(lines)


def _note(result: dict[str, Any]) -> str:
    settings = result["settings"]
    said = f"95% intervals from {settings['resamples']} resamples of the examples, seed {settings['seed']}"
    if len(result["systems"]) > 1:
        said += f"; signed: difference to {result['systems'][0]['name']}, paired; *: without 0 in its interval"
    totals = [system["total"] for system in result["systems"][1:]]
    if any("tokens_per_s" in total and total["tokens_per_s"]["difference"] is None for total in totals):
        said += "; tok/s of files is not compared, they are not measured in turns: see first-bench"
    return f"{said}. {result['machine']['cpu']}, {result['machine']['threads']} threads."


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal's stderr, silent elsewhere."""
    from tqdm import tqdm

    bar = tqdm(disable=None, file=sys.stderr, unit="answer", leave=False)

    def update(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.set_description(name, refresh=False)
        bar.update(done - bar.n)

    with contextlib.closing(bar):
        yield update


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError or OSError for a file that is read too, or cannot be written. What is there stays as it is."""
    from pyfirst.evaluation import model_files

    files = [*model_files(args.model, args.compare), *args.data]
    outputs = list(map(Path, filter(None, (args.out, args.predictions))))
    for path in outputs:
        common.check_output(path, files)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise InputError(f"{outputs[0]}: --out and --predictions need files of their own")


def _open(path: str) -> TextIO:
    return Path(path).open("w", encoding="utf-8", newline="\n")


def command(args: argparse.Namespace) -> None:
    """Run the parsed command."""
    common.check_model_options(args)
    skip = None if args.skip is None else common.parse_share(args.skip)
    _check_outputs(args)
    from pyfirst.evaluation import evaluate

    with contextlib.ExitStack() as stack:
        update = stack.enter_context(_progress())
        predictions: TextIO | None = None

        def on_answer(row: dict[str, Any]) -> None:
            nonlocal predictions
            if args.predictions:
                predictions = predictions or stack.enter_context(_open(args.predictions))
                predictions.write(json.dumps(row, ensure_ascii=False) + "\n")
                predictions.flush()

        result = evaluate(
            args.model,
            args.data,
            compare=args.compare,
            max_tokens=args.n_predict,
            limit=args.limit,
            metrics=args.metrics,
            match=args.exact,
            ctx=args.ctx_size,
            threads=args.threads,
            threshold=args.threshold,
            skip=skip,
            prefill=args.prefill,
            seed=args.seed,
            bertscore_model=args.bertscore_model,
            on_progress=update,
            on_answer=on_answer,
            verbose=args.verbose,
        )
    first, *others = result["systems"]
    apart = [s["name"] for s in others if "ce" in s["total"] and s["total"]["ce"]["difference"] is None]
    if apart:
        print(
            f"first-eval: no difference in CE to {first['name']} for {', '.join(apart)}: there the references are "
            "another number of tokens",
            file=sys.stderr,
        )
    shown = {"text": text, "markdown": markdown, "json": lambda found: json.dumps(found, indent=1)}[args.format](result)
    if args.out:
        with _open(args.out) as file:
            file.write(shown + "\n")
    else:
        print(shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of first-eval."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
