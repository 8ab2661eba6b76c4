"""first-serve: an OpenAI-compatible server on one GGUF."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyfirst.cli import common


def build_parser() -> argparse.ArgumentParser:
    parser = common.parser(
        "first-serve",
        "Serve a model with the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics. "
        "Requests share one batch, each with its own layers; the JSON field 'first' of a request takes "
        "threshold, skip, dense or mask.",
        "first-serve -m my-model.gguf --parallel 4 --port 8080",
    )
    parser.add_argument("-m", "--model", required=True, help="GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080")
    parser.add_argument("--parallel", type=int, default=4, help="sequences at once (default: 4)")
    parser.add_argument(
        "-c",
        "--ctx",
        type=int,
        help="tokens per sequence, never more than the model was trained for (default: 2048, less where memory is "
        "short); times --parallel it bounds the memory for keys and values",
    )
    parser.add_argument("-t", "--threads", type=int, help="default: the cores this process may use")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait (default: 64); more get a 503")
    parser.add_argument("--threshold", type=float, help="a layer is kept when its mean score reaches this")
    parser.add_argument("--skip", metavar="SHARE", help="share of layers to skip on average, as 20%% or 0.2")
    parser.add_argument("--dense", action="store_true", help="run all layers unless a request says otherwise")
    return parser


def serve(args: argparse.Namespace) -> None:
    """Serve until interrupted. Raises InputError where the model or an option does not fit."""
    import uvicorn

    from pyfirst.batch import FirstBatch
    from pyfirst.server import Engine, create_app

    batch = FirstBatch(
        args.model,
        n_parallel=args.parallel,
        n_ctx=args.ctx,
        max_ctx=common.MAX_CTX,
        n_threads=args.threads,
        routing=not args.dense,
        threshold=args.threshold,
        skip=None if args.skip is None else common.parse_share(args.skip),
        verbose=args.verbose,
    )
    print(f"first-serve: {args.model} on http://{args.host}:{args.port}/v1", file=sys.stderr)
    level = "info" if args.verbose else "warning"
    uvicorn.run(
        create_app(Engine(batch, args.queue)),
        host=args.host,
        port=args.port,
        log_level=level,
        timeout_graceful_shutdown=5,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return common.run(build_parser, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
