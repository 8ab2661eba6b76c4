"""first-run: a GGUF file answers a prompt, leaving out the layers that the prompt does not need."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfirst.cli import common
from pyfirst.errors import InputError

if TYPE_CHECKING:
    from pyfirst.cli.session import Session


def build_parser() -> argparse.ArgumentParser:
    """The command line of first-run."""
    parser = common.parser(
        "first-run",
        "Run a GGUF model on a prompt; its routers decide which layers are left out.\n"
        "The text goes to stdout, then one line to stderr: layers kept, tokens and tokens/s.\n"
        "With --parallel the file holds a prompt on each line, as JSON: a string, or an object with 'prompt' or\n"
        "'messages' and, for that line alone, max_tokens, temperature, top_k, top_p, min_p, repeat_penalty,\n"
        "frequency_penalty, presence_penalty, seed, stop, id, first: {threshold, skip, dense or mask}.",
        'first-run -m smollm2-first.gguf --chat -p "Name three rivers of France." --temp 0',
    )
    add = parser.add_argument
    add("-m", "--model", required=True, metavar="FILE", help="GGUF file; without routers it runs dense")
    add("-p", "--prompt", metavar="TEXT", help="text to continue, or with --chat the user's message")
    add(
        "-f",
        "--file",
        metavar="FILE",
        help="read the prompt from a UTF-8 file, - is stdin; a final newline is dropped",
    )
    add(
        "-n",
        "--n-predict",
        type=int,
        default=128,
        metavar="N",
        help="tokens to generate, -1: no limit (default: 128)",
    )
    common.add_model_options(parser, fits=True)
    add("--temp", type=float, default=0.8, help="sampling temperature, 0: the likeliest token (default: 0.8)")
    add("--seed", type=int, metavar="N", help="seed of the sampling, -1: random (default: random)")
    add(
        "--chat",
        action="store_true",
        help="use the model's chat template; without -p and -f each line of input is a message, until Ctrl-D",
    )
    add("--dense", action="store_true", help="skip no layer")
    add("--skip", metavar="SHARE", help="skip this share of the layers on average, such as 20%% or 0.2")
    add("--skip-layers", metavar="LIST", help="skip exactly these layers, such as 3,5,7; the first is 0")
    add("--json", action="store_true", help="print one JSON object instead of streaming the text")
    add("--parallel", type=int, metavar="N", help="answer the lines of -f, N at a time; needs --json, a line for each")
    add("-o", "--outfile", metavar="FILE", help="with --parallel: write here; what it answers already is not repeated")
    mem_help = (
        "after the answer, measure from a cold cache what of the file is read and held, with all layers and as asked"
    )
    add("--mem", action="store_true", help=mem_help)
    return parser


def parse_layers(text: str) -> list[int]:
    """'3,5,7' as layer indices. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise InputError(f"--skip-layers is '{text}', expected layer numbers such as 3,5,7")
    return [int(part) for part in parts]


def _check(args: argparse.Namespace) -> None:
    """Refuse impossible options before anything is loaded. Raises InputError."""
    common.check_model_options(args)
    if sys.stdin is None and (args.file == "-" or (args.prompt is None and args.file is None)):
        raise InputError("stdin is closed; give a prompt with -p or -f")
    if args.parallel is not None:
        if args.parallel < 1:
            raise InputError(f"--parallel is {args.parallel}, expected at least 1")
        if args.file is None or not args.json:
            raise InputError("--parallel answers a file of prompts in JSON: add -f FILE and --json")
    elif args.outfile is not None:
        raise InputError("-o goes with --parallel")
    if args.mem and (args.parallel is not None or (args.prompt is None and args.file is None)):
        raise InputError("--mem measures one prompt: give it with -p or -f, without --parallel")
    if args.prompt is not None and args.file is not None:
        raise InputError("-p and -f exclude each other")
    if args.n_predict < 1 and args.n_predict != -1:
        raise InputError(f"-n is {args.n_predict}, expected at least 1 token, or -1 for no limit")
    if not (args.temp >= 0 and math.isfinite(args.temp)):
        raise InputError(f"--temp is {args.temp}, expected 0 or more")
    if args.seed is not None and not -1 <= args.seed < 2**32 - 1:
        raise InputError(f"--seed is {args.seed}, expected 0 to {2**32 - 2}, or -1 for a random one")


def read_prompt(prompt: str | None, file: str | None) -> str | None:
    """The prompt's text, None where neither is given. Raises InputError or OSError."""
    if file is not None:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        try:
            prompt = raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text (byte {error.start})") from None
    if prompt is None:
        return None
    if not prompt:
        raise InputError("the prompt is empty: at least one token must decide")
    common.check_text("-p", prompt)
    return prompt


def summary(result: dict[str, Any]) -> str:
    """The line that follows an answer."""
    first, usage, timings = result["first"], result["usage"], result["timings"]
    kept = f"kept {first['kept']}/{first['n_layer']} layers"
    if first["mode"] == "dense" and not result["routers"]:
        kept += " (no routers in this file)"
    reused = usage["prompt_tokens"] - timings["prompt_tokens"]
    prompt = f"prompt {usage['prompt_tokens']} tokens" + (f" ({reused} reused)" if reused else "")
    decode = f"decode {usage['completion_tokens']} tokens"
    if timings["decode_tokens_per_s"]:
        decode += f", {timings['decode_tokens_per_s']:.1f} tokens/s"
    return f"{kept}; {prompt}, {timings['prompt_tokens_per_s']:.1f} tokens/s; {decode}"


def run(
    model: str,
    prompt: str,
    *,
    chat: bool = False,
    n_predict: int = 128,
    temp: float = 0.8,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
    mem: bool = False,
    **session: Any,
) -> dict[str, Any]:
    """Answer one prompt; what --json prints.

    ``chat`` makes the prompt a user's message. ``mem`` adds "memory", see pyfirst.memory.compare(), for the prompt
    and up to 16 tokens of answer. ``session`` takes the arguments of
    pyfirst.cli.session.Session, the others are those of its answer(). Raises InputError (a ValueError).
    """
    from pyfirst import memory
    from pyfirst.cli.session import Session

    if mem:
        memory.check(model)
    with Session(model, **session) as opened:
        asked = [{"role": "user", "content": prompt}] if chat else prompt
        result = opened.answer(asked, n_predict=n_predict, temp=temp, seed=seed, on_text=on_text)
        tokens = opened.tokens(asked)
    if mem:
        options = {name: session.get(name) for name in ("threshold", "skip", "skip_layers", "prefill")}
        options["routing"] = not session.get("dense")
        count = min(16, n_predict) if n_predict > 0 else 16
        result["memory"] = memory.compare(model, tokens, n_predict=count, threads=session.get("threads"), **options)
    return result


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(f"first-run: {text}", file=sys.stderr, flush=True)


def _fit(session: Session, history: list[dict[str, str]], n_predict: int) -> None:
    """Drop the oldest turns until the chat leaves room for an answer, or for a quarter of the context."""
    room = min(session.ctx // 4, n_predict if n_predict > 0 else session.ctx)
    while len(history) > 1 and len(session.tokens(history)) + max(room, 1) > session.ctx:
        del history[:2]


def converse(session: Session, *, n_predict: int = 128, **options: Any) -> None:
    """Answer each line of stdin as the next message of one chat, until it ends. Raises InputError."""
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # the messages before one that is not UTF-8 are answered
    history: list[dict[str, str]] = []
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        common.check_text("the message on stdin", line)
        if not line:
            break
        if not line.strip():
            continue
        history.append({"role": "user", "content": line.strip()})
        _fit(session, history, n_predict)
        result = session.answer(history, n_predict=n_predict, on_text=_write, **options)
        _write("\n")
        _say(summary(result))
        history.append({"role": "assistant", "content": result["text"]})
    if terminal:
        print(file=sys.stderr)
    elif not history:
        raise InputError("no prompt: give one with -p or -f, or messages on stdin")


def command(args: argparse.Namespace) -> None:
    """Run the parsed command."""
    _check(args)
    options: dict[str, Any] = {
        "n_predict": args.n_predict,
        "temp": args.temp,
        "seed": None if args.seed == -1 else args.seed,
    }
    settings: dict[str, Any] = {
        "ctx": args.ctx_size,
        "threads": args.threads,
        "dense": args.dense,
        "threshold": args.threshold,
        "skip": None if args.skip is None else common.parse_share(args.skip),
        "skip_layers": None if args.skip_layers is None else parse_layers(args.skip_layers),
        "prefill": args.prefill,
        "verbose": args.verbose,
    }
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end us
    if args.parallel is not None:
        from pyfirst.cli import many

        found = many.run_many(
            args.model,
            many.read_lines(args.file),
            parallel=args.parallel,
            out=None if args.outfile is None else Path(args.outfile),
            chat=args.chat,
            **options,
            **settings,
        )
        _say(many.summary(found))
        if found["errors"]:
            raise InputError(f"{found['errors']} of {found['lines']} lines not answered; {found['first_error']}")
        return
    prompt = read_prompt(args.prompt, args.file)
    if prompt is None and not args.chat:
        raise InputError("no prompt: give one with -p or -f, or chat with --chat")
    if prompt is None and args.json:
        raise InputError("--json answers one prompt: give it with -p or -f")
    if prompt is None:
        from pyfirst.cli.session import Session

        with Session(args.model, sticky=True, **settings) as session:
            converse(session, **options)
        return
    on_text = None if args.json else _write
    result = run(args.model, prompt, chat=args.chat, on_text=on_text, mem=args.mem, **options, **settings)
    _write(json.dumps(result) + "\n" if args.json else "\n")
    _say(summary(result))
    if args.mem and not args.json:
        from pyfirst import memory

        _write(memory.text(result["memory"]) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of first-run."""
    return common.run(build_parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
