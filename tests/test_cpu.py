"""The processor check: what it refuses, and that an import says so instead of dying."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyfirst import cpu, native

ZEN = "processor\t: 0\nmodel name\t: a\nflags\t\t: fpu sse4_2 avx avx2 fma f16c avx512f avx512_vnni constant_tsc\n"
OLD = "processor\t: 0\nflags\t\t: fpu sse4_2 avx\n"
A76 = "processor\t: 0\nFeatures\t: fp asimd aes fphp asimdhp cpuid asimddp\n"
A72 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"


@pytest.mark.parametrize(("built", "here"), [(ZEN, ZEN), (OLD, ZEN), (A72, A76), ("", OLD), (None, OLD)])
def test_a_processor_that_can_do_all_passes(built, here, tmp_path):
    if built is not None:
        (tmp_path / "built-for.txt").write_text(built)
    (tmp_path / "cpuinfo").write_text(here)
    cpu.check(tmp_path, tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("built", "here", "missing"),
    [(ZEN, OLD, "avx2, avx512_vnni, avx512f, f16c, fma"), (A76, A72, "asimddp, asimdhp")],
)
def test_a_lesser_processor_is_refused_with_what_it_lacks(built, here, missing, tmp_path):
    (tmp_path / "built-for.txt").write_text(built)
    (tmp_path / "cpuinfo").write_text(here)
    with pytest.raises(ImportError, match=f"compiled for a processor with {missing}, which this one lacks; build"):
        cpu.check(tmp_path, tmp_path / "cpuinfo")


def test_no_cpuinfo_no_check(tmp_path):
    (tmp_path / "built-for.txt").write_text(ZEN)
    cpu.check(tmp_path, tmp_path / "none")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_import_says_it(tmp_path):
    folder = tmp_path / "lib"
    shutil.copytree(native.lib_dir(), folder)
    (folder / "built-for.txt").write_text("flags : amx_tile sme")  # no processor has both
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", "import pyfirst.native"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "sme, which this one lacks" in done.stderr.splitlines()[-1]
