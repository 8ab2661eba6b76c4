"""What all our commands share: options, temporary folders, and how they end when something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import glob
import math
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pyfirst.errors import InputError
from pyfirst.metadata import PREFILL_MODES

MAX_CTX = 2048  # tokens of a sequence where no -c is given and memory allows it
MAX_THREADS = 512  # of ggml
EXTRAS = {"first-convert": "convert", "first-train": "train", "first-serve": "server"}  # of pyproject.toml


def parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """An ArgumentParser whose help ends with a worked example, with --verbose."""
    result = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--verbose", action="store_true", help="show native logs, and the traceback of an error")
    return result


def add_model_options(parser: argparse.ArgumentParser, fits: bool = False) -> None:
    """-c, -t, --threshold and --prefill, which mean the same in every command that opens a model.

    With ``fits`` a context that was not asked for is as long as memory allows (fit.py), MAX_CTX at most.
    """
    add = parser.add_argument
    default = f"default: {MAX_CTX}{', less where memory is short' if fits else ''}"
    more = "; also opens a file that seems too large for memory" if fits else ""
    add(
        "-c",
        "--ctx-size",
        type=int,
        default=None if fits else MAX_CTX,
        metavar="N",
        help=f"tokens of prompt and answer; never more than the model was trained for ({default}){more}",
    )
    add("-t", "--threads", type=int, metavar="N", help="threads (default: the cores this process may use)")
    add("--threshold", type=float, metavar="T", help="keep layers scored T or more (default: the file's)")
    add("--prefill", choices=PREFILL_MODES, help="skip: the prompt skips too (default: the file's, or full)")


def check_model_options(args: argparse.Namespace) -> None:
    """Refuse impossible values of add_model_options(), and two options that decide the layers. Raises InputError."""
    ways = ("--dense", "--threshold", "--skip", "--skip-layers")
    chosen = [way for way in ways if getattr(args, way[2:].replace("-", "_"), None) not in (None, False)]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} exclude each other")
    if args.ctx_size is not None and args.ctx_size < 2:
        raise InputError(f"-c is {args.ctx_size}, expected at least 2 tokens")
    if args.threads is not None:
        check_threads(args.threads)


def check_threads(threads: int) -> None:
    """Raise InputError for a number of threads at which llama.cpp would end the process."""
    if not 1 <= threads <= MAX_THREADS:
        raise InputError(f"-t is {threads}, expected 1 to {MAX_THREADS} threads")


def check_text(option: str, text: str) -> None:
    """Raise InputError for text of the command line that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{option} is not UTF-8 text") from None


def parse_share(text: str) -> float:
    """'20%' or '0.2' as a number from 0 to 1. Raises InputError."""
    number = text.strip()
    try:
        share = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise InputError(f"--skip is '{text}', expected a share of the layers such as 20% or 0.2")
    return share


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A folder in ``parent``, gone at the end whatever happens; those that killed processes left go too.

    Raises InputError where nothing can be written.
    """
    prefix = prefix[:50]  # with 4 bytes a character, and what comes after it, still below the 255 of a name
    for old in parent.glob(f"{glob.escape(prefix)}.*{suffix}"):
        pid = old.name[len(prefix) + 1 :].split(".")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(old, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}.{os.getpid()}.", suffix=suffix, dir=parent))
    except OSError as error:
        raise InputError(f"{parent}: cannot write there ({error.strerror}); choose another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_apart(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise InputError for a file to write that is read too."""
    if Path(path).resolve() in {Path(name).resolve() for name in inputs}:
        raise InputError(f"{path}: is read, so it cannot be written to as well; name another file")


def check_output(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise InputError or OSError for a file that is read too, or cannot be written. What is there stays as it is."""
    check_apart(path, inputs)
    path = Path(path)
    fresh = not path.exists()
    path.open("a").close()
    if fresh:
        path.unlink()


def one_line(error: Exception, prog: str) -> str:
    """What an error says, with what to install where the command ``prog`` lacks a package."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and prog in EXTRAS:
        text += f"; {prog} needs pip install '.[{EXTRAS[prog]}]' in a clone of pyfirst"
    return text


def run(
    build_parser: Callable[[], argparse.ArgumentParser],
    command: Callable[[argparse.Namespace], object],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn exceptions into one line on stderr.

    Returns 0, 2 for wrong input, 130 after Ctrl-C, 1 for anything we did not foresee.
    """
    command_line = build_parser()
    args, prog = command_line.parse_args(argv), command_line.prog
    try:
        if sys.stdout is None:
            raise InputError("stdout is closed, the answer has nowhere to go; send it to a file or to /dev/null")
        command(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away; a second flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError, ImportError))
        hint = "" if expected else " (unexpected; --verbose shows where)"
        print(f"{prog}: error: {one_line(error, prog)}{hint}", file=sys.stderr)
        return 2 if expected else 1
