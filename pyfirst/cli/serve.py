"""first-serve: an OpenAI-compatible server on one GGUF."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence

from pyfirst.cli import common
from pyfirst.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-serve."""
    parser = common.parser(
        "first-serve",
        "Serve a model with the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.\n"
        "Requests share one batch, each with its own layers; the JSON field 'first' of a request takes\n"
        "threshold, skip, dense or mask.",
        "first-serve -m my-model.gguf --parallel 4 --port 8080",
    )
    add = parser.add_argument
    add("-m", "--model", required=True, metavar="FILE", help="GGUF file; without routers it runs dense")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8080, metavar="N", help="default: 8080; 0: any that is free")
    add(
        "--allow-origin",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may ask from a browser (CORS), such as http://localhost:3000 (default: none)",
    )
    add("--parallel", type=int, default=4, metavar="N", help="sequences at once, each of -c tokens (default: 4)")
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64); more get a 429")
    common.add_model_options(parser, fits=True)
    add("--dense", action="store_true", help="run all layers unless a request says otherwise")
    add("--skip", metavar="SHARE", help="skip this share of the layers on average, such as 20%% or 0.2")
    add(
        "-fa",
        "--flash-attn",
        choices=("on", "off"),
        default="off",
        help="attention in one pass: less memory, answers may differ in the last digits (default: off)",
    )
    return parser


def _bind(host: str, port: int) -> socket.socket:
    """A socket of that address, before a model is loaded in vain. Raises InputError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port is {port}, expected 0 to {2**16 - 1}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # or another may bind it, too, while the model loads
    except OSError as error:
        raise InputError(f"cannot listen on --host {host} --port {port}: {error}") from None
    return bound


def serve(args: argparse.Namespace) -> None:
    """Serve until interrupted. Raises InputError where the model or an option does not fit."""
    common.check_model_options(args)
    for option, value in (("--parallel", args.parallel), ("--queue", args.queue)):
        if value < 1:
            raise InputError(f"{option} is {value}, expected at least 1")
    bound = _bind(args.host, args.port)

    from pyfirst.batch import FirstBatch
    from pyfirst.server import Engine, Server

    batch = FirstBatch(
        args.model,
        n_parallel=args.parallel,
        n_ctx=args.ctx_size,
        max_ctx=common.MAX_CTX,
        n_threads=args.threads,
        routing=not args.dense,
        threshold=args.threshold,
        skip=None if args.skip is None else common.parse_share(args.skip),
        prefill=args.prefill,
        flash_attn=args.flash_attn == "on",
        verbose=args.verbose,
    )
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"first-serve: {args.model} on http://{host}:{bound.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    level = "info" if args.verbose else "warning"
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        Server(Engine(batch, args.queue), level, args.allow_origin).run(sockets=[bound])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of first-serve."""
    return common.run(build_parser, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
