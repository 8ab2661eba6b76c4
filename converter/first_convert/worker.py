"""One job in a process of its own, so that its memory goes with it and an abort in native code ends only that.

Run as ``python -m first_convert.worker MODULE JOB.json`` by convert.py; the module's ``run_job`` does the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import select
import signal
import sys
import threading
from pathlib import Path

from pyfirst.cli.common import one_line

PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """End the process with its parent, whose end is the end of the input."""
    # Linux ends us even where an import or native code keeps Python's lock; elsewhere a thread has to do.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([0], [], [], 0)[0]:  # the parent was gone before we asked
        os._exit(1)

    def wait() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock would be held at the end
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Run the job in a JSON file; its answer, or {"error": line, "expected": bool}, goes to the file under "result"."""
    # What imports leave stays to the end: walking it again and again is a quarter of a small model's time.
    gc.disable()
    _end_with_parent()
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    verbose = job.get("verbose", False)
    logging.basicConfig(level=logging.INFO if verbose else logging.CRITICAL)
    try:
        answer = importlib.import_module(sys.argv[1]).run_job(job)
    except Exception as error:
        if verbose:
            logging.exception("the job failed")
        text = one_line(error, "first-convert")
        answer = {"error": text, "expected": isinstance(error, (ValueError, OSError, ImportError))}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
