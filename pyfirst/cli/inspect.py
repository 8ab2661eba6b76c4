"""first-inspect: what a GGUF file holds, whether its routers add up, and what they decide for prompts."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst import metadata as key
from pyfirst import plots
from pyfirst.cli import common
from pyfirst.errors import InputError

_WIDE = 24
_MOST_PIECES = 65535


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-inspect."""
    parser = common.parser(
        "first-inspect",
        "Print what a GGUF file holds and where it came from, and check its routers. Exit code 2 if they are broken.\n"
        "With prompts: show which layers each of them keeps, grouped by task.",
        "first-inspect smollm2-first.gguf --json\n"
        "  first-inspect smollm2-first.gguf --data tasks.jsonl --limit 20 --plot masks.png",
    )
    add = parser.add_argument
    add("model", metavar="MODEL.gguf", help="the file; of a split model, its first piece")
    add(
        "-p", "--prompt", action="append", default=[], metavar="TEXT", help="a prompt to show the layers of; repeatable"
    )
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help='JSONL files of {"prompt", "task"}; without "task" the file\'s name is the task',
    )
    add("--limit", type=int, metavar="N", help="prompts of each file at most")
    common.add_model_options(parser)
    add("--plot", metavar="FILE", help="draw the scores of the prompts, as PNG, SVG or PDF (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _pieces(path: Path, count: int, number: int) -> list[Path]:
    """All files of a split model. Raises InputError when one is missing or ``path`` is not the first."""
    if count < 2:
        return [path]
    if count > _MOST_PIECES:
        raise InputError(f"{path}: one of {count} pieces, more than llama.cpp knows")
    match = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name)
    names = [f"{match[1] if match else path.stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if number != 0:
        raise InputError(f"{path}: piece {number + 1} of {count}; give the first, {names[0]}")
    if match is None:
        raise InputError(f"{path}: the first of {count} pieces, but not named -00001-of-{count:05}.gguf")
    return [path.with_name(name) for name in names]


def _routers(header: Any) -> list[dict[str, Any]]:
    """Norm and bias of every layer's router; nothing where they do not make a matrix."""
    bias = np.array(header.get(key.ROUTER_BIAS, []), np.float64)
    weight = np.array(header.get(key.ROUTER_WEIGHT, []), np.float64)
    if bias.size == 0 or weight.size == 0 or weight.size % bias.size:
        return []
    norms = np.linalg.norm(weight.reshape(bias.size, -1), axis=1)
    protected = set(header.get(key.PROTECTED, []))
    return [
        {"layer": i, "norm": float(norms[i]), "bias": float(bias[i]), "protected": i in protected}
        for i in range(bias.size)
    ]


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All of ``pyfirst.info.info``, and what a look at the numbers adds.

    Adds "types" (tensor type -> bytes, of all pieces of a split model, as is "bytes"), "router_layers" (norm
    of the weights, bias, protected), "modified" (of the file, ISO 8601) and "problems", a list of lines that
    is empty for a sound file. Raises InputError for a file that cannot be read.
    """
    from pyfirst import info

    types: dict[str, int] = {}
    with info.opened(path) as header:
        pieces = _pieces(Path(path), header.get("split.count", 0), header.get("split.no", 0))
        result = info.describe_header(header, path)
        found = info.problems(header)
        if info.mistyped(header):
            result |= {"first": None, "lora": None, "provenance": None}
            routers = []
        else:
            routers = _routers(header)
    for piece in pieces:
        with info.opened(piece) as header:
            for name, size in header.tensor_bytes().items():
                types[name] = types.get(name, 0) + size
    modified = datetime.datetime.fromtimestamp(int(Path(path).stat().st_mtime), datetime.timezone.utc)
    return {
        **result,
        "bytes": sum(piece.stat().st_size for piece in pieces),
        "pieces": len(pieces),
        "tensor_type": max(types, key=lambda name: types[name]) if types else None,
        "types": dict(sorted(types.items(), key=lambda item: -item[1])),
        "modified": modified.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "router_layers": routers,
        "problems": found,
    }


def describe(found: dict[str, Any]) -> str:
    """The text form of inspect()."""
    from pyfirst import info

    pairs = info.rows(found)
    total = max(sum(found["types"].values()), 1)
    shares = [f"{kind} {size / 1e6:.1f} MB ({size / total:.1%})" for kind, size in found["types"].items()]
    pairs.insert(1, ("tensors", ", ".join(shares) or "none"))
    if found["pieces"] > 1:
        pairs.insert(1, ("pieces", found["pieces"]))
    origin = found["provenance"] or {}
    pairs += [
        ("recipe", origin.get("recipe")),
        ("trained for", origin.get("base_model")),
        ("made by", f"pyfirst {origin['pyfirst']}" if origin.get("pyfirst") else None),
        ("with llama.cpp", origin.get("llama_cpp")),
        ("made on", origin.get("date") or f"unknown (file of {found['modified']})"),
    ]
    pairs += [(f"sha256 {name}", checksum) for name, checksum in origin.get("sources", {}).items()]
    lines = [info.text(pairs)]
    if found["router_layers"]:
        lines.append("\nlayer   |weight|       bias")
        norms = [layer["norm"] for layer in found["router_layers"]]
        widest = max((norm for norm in norms if np.isfinite(norm)), default=0.0)
        for layer, norm in zip(found["router_layers"], norms, strict=True):
            bar = "#" * round(_WIDE * norm / widest) if np.isfinite(norm) and widest > 0 else ""
            note = "  never skipped" if layer["protected"] else ""
            line = f"{layer['layer']:5} {norm:10.4f} {layer['bias']:10.4f}  {bar:{_WIDE}}{note}"
            lines.append(line.rstrip())
    lines += ["", *(f"problem: {line}" for line in found["problems"])]
    if not found["problems"]:
        lines.append("no problems found")
    return "\n".join(lines)


def _numbers(value: Any) -> Any:
    """The value without NaN and infinity, which are no JSON."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Run the parsed command line: print the report. Raises InputError, after it, for a file with problems."""
    common.check_model_options(args)
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}, expected at least 1")
    for prompt in args.prompt:
        common.check_text("-p", prompt)
    if args.plot and not (args.prompt or args.data):
        raise InputError("--plot needs prompts: see -p and --data")
    if args.plot:
        plots.check(args.plot)
        common.check_output(args.plot, [args.model, *args.data])
    found = inspect(args.model)
    if (args.prompt or args.data) and not found["problems"]:
        from pyfirst import masks

        seen = masks.observe(
            args.model,
            masks.prompts(args.prompt, args.data, args.limit),
            threshold=args.threshold,
            prefill=args.prefill,
            ctx=args.ctx_size,
            threads=args.threads,
        )
        found["masks"] = seen
    if args.json:
        print(json.dumps(_numbers(found), indent=2))
    elif "masks" in found:
        masks.show(found["masks"])
    else:
        print(describe(found))
    if args.plot and "masks" in found:
        plots.masks(found["masks"], args.plot)
    if found["problems"]:
        more = f" (and {len(found['problems']) - 1} more)" if len(found["problems"]) > 1 else ""
        raise InputError(f"{args.model}: {found['problems'][0]}{more}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of first-inspect; returns the exit code."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
