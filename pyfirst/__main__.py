"""``python -m pyfirst lib-path`` and ``python -m pyfirst info MODEL.gguf``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from pyfirst.cli import common


def build_parser() -> argparse.ArgumentParser:
    """The command line of python -m pyfirst."""
    parser = common.parser(
        "python -m pyfirst",
        "Where pyfirst's libllama is, and what a GGUF file says of its routers.",
        "export LLAMA_CPP_LIB_PATH=$(python -m pyfirst lib-path)\n  python -m pyfirst info model.gguf",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "lib-path",
        help="print the folder of our libllama",
        description="Print the folder of our libllama, for the variable LLAMA_CPP_LIB_PATH.",
    )
    info = commands.add_parser(
        "info",
        help="print a model's shape, routers and provenance",
        description="Read the header of a GGUF file.",
    )
    info.add_argument("model", metavar="MODEL.gguf")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _layers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def describe(found: dict[str, Any]) -> str:
    """The text form of pyfirst.info.info()."""
    rows = [
        ("file", f"{found['path']} ({found['bytes'] / 1e6:.1f} MB, {found['tensor_type']})"),
        ("name", found["name"]),
        ("architecture", found["architecture"]),
        ("layers", found["layers"]),
        ("width", found["width"]),
        ("trained context", found["context_length"]),
        ("licence", found["license"]),
    ]
    for base in found["base_models"]:
        rows.append(("base model", " ".join(base.values())))
    first = found["first"]
    rows.append(("routers", "yes" if first else "no; the file runs dense"))
    if first:
        points = first["calibration"]
        table = [
            f"{kept:.0%} kept at {threshold:.3g}"
            for threshold, kept in zip(points["threshold"], points["kept"], strict=False)
        ]
        lora = first["lora"]
        rows += [
            ("router norm", first["norm"]),
            ("threshold", f"{first['threshold']:.6g}"),
            ("prefill", first["prefill"]),
            ("window", f"{first['window']} tokens" + ("" if first["prefill"] == "skip" else " (skip only)")),
            ("never skipped", _layers(first["protected"])),
            ("calibration", ", ".join(table) or "none"),
            ("LoRA merged", "no"),
        ]
        if first["lora_merged"]:
            targets = ", ".join(lora["targets"]) or "unknown modules"
            rows[-1] = ("LoRA merged", f"rank {lora['rank']}, alpha {lora['alpha']:g}, {targets}")
    return "\n".join(f"{name:16} {'unknown' if value is None else value}" for name, value in rows)


def command(args: argparse.Namespace) -> None:
    """Run the parsed command."""
    if args.command == "lib-path":
        from pyfirst import native

        print(native.lib_dir())
        return
    from pyfirst.info import info

    found = info(args.model)
    print(json.dumps(found, indent=2) if args.json else describe(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of python -m pyfirst."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
