"""One job in a process of its own, so that its memory goes with it and an abort in native code ends only that.

Run as ``python -m first_convert.worker MODULE JOB.json`` by convert.py; the module's ``run_job`` does the work.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    """Wait for the end of the input, which is the parent's, and end the process at once."""
    os.read(0, 1)  # not through sys.stdin, whose lock would be held at the end
    os._exit(1)


def main() -> int:
    """Run the job in a JSON file; its answer, or {"error": line}, goes to the file under "result"."""
    # What imports leave stays to the end: walking it again and again is a quarter of a small model's time.
    gc.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    verbose = job.get("verbose", False)
    logging.basicConfig(level=logging.INFO if verbose else logging.CRITICAL)
    try:
        answer = importlib.import_module(sys.argv[1]).run_job(job)
    except Exception as error:
        if verbose:
            logging.exception("the job failed")
        text = " ".join(str(error).split()) or type(error).__name__
        answer = {"error": text, "expected": isinstance(error, (ValueError, OSError, ImportError))}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
