"""A job's process ends with its parent, whatever the job is doing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

JOB = """
import ctypes, pathlib, time
def run_job(job):
    pathlib.Path(job["started"]).touch()
    {wait}
"""

PARENT = """
import subprocess, sys, time
command = [sys.executable, "-m", "first_convert.worker", "slow_job", sys.argv[1]]
print(subprocess.Popen(command, stdin=subprocess.PIPE).pid, flush=True)
time.sleep(60)
"""


def command_line(pid: int) -> bytes:
    """Empty where the process is gone or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a job that keeps Python's lock ends when it lets go")
@pytest.mark.parametrize("wait", ["ctypes.PyDLL(None).sleep(30)", "time.sleep(30)"], ids=["locked", "free"])
def test_a_job_ends_with_its_parent(wait, tmp_path, monkeypatch):
    (tmp_path / "slow_job.py").write_text(JOB.format(wait=wait))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    request, started = tmp_path / "job.json", tmp_path / "started"
    request.write_text(f'{{"started": "{started}", "result": "{tmp_path / "result"}"}}')
    with subprocess.Popen([sys.executable, "-c", PARENT, str(request)], stdout=subprocess.PIPE) as parent:
        job = int(parent.stdout.readline())
        while not started.exists():
            time.sleep(0.01)
        assert b"slow_job" in command_line(job)
        parent.kill()
    killed = time.monotonic()
    while command_line(job) and time.monotonic() < killed + 20:
        time.sleep(0.01)
    assert not command_line(job)
