"""``python -m pyfirst lib-path`` and ``python -m pyfirst info MODEL.gguf``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

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


def command(args: argparse.Namespace) -> None:
    """Run the parsed command."""
    if args.command == "lib-path":
        from pyfirst import native

        print(native.lib_dir())
        return
    from pyfirst.info import info, rows, text

    found = info(args.model)
    print(json.dumps(found, indent=2) if args.json else text(rows(found)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of python -m pyfirst."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
