"""The processor: threads by default, and that an import refuses one that lacks instructions instead of dying."""

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
AMX = ZEN.replace("constant_tsc", "amx_tile amx_int8 amx_bf16")  # which we build without
A76 = "processor\t: 0\nFeatures\t: fp asimd aes fphp asimdhp cpuid asimddp\n"
A72 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"


@pytest.mark.parametrize(("built", "here"), [(ZEN, ZEN), (OLD, ZEN), (A72, A76), ("", OLD), (None, OLD), (AMX, ZEN)])
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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (ZEN, False),
        (ZEN.replace("avx512f", "avx512_bf16"), True),
        (A76, False),
        (A76.replace("aes", "bf16"), True),
        ("", None),
    ],
)
def test_bfloat16(text, found, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu.multiplies_bf16(tmp_path / "cpuinfo") is found
    assert cpu.multiplies_bf16(tmp_path / "none") is None


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_import_says_it(tmp_path):
    folder = tmp_path / "lib"
    shutil.copytree(native.lib_dir(), folder)
    (folder / "built-for.txt").write_text("flags : avx512f sme")  # no processor has both
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", "import pyfirst.native"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "sme, which this one lacks" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
@pytest.mark.parametrize("before", [None, "Features : asimd\n", "flags : avx512f sme\n"])  # the last: none has both
def test_a_build_folder_of_a_better_processor_stops_the_build(before, tmp_path):
    root, built_for = Path(__file__).resolve().parents[1], tmp_path / "built-for.txt"
    text = (root / "CMakeLists.txt").read_text(encoding="utf-8")
    (tmp_path / "part.cmake").write_text(
        f'set(CMAKE_CURRENT_SOURCE_DIR "{root}")\nset(Python_EXECUTABLE "{sys.executable}")\nset(GGML_NATIVE ON)\n'
        "function(install)\nendfunction()\n" + text[text.index("if(GGML_NATIVE AND") :]
    )
    if before is not None:
        built_for.write_text(before)
    done = subprocess.run(["cmake", "-P", "part.cmake"], cwd=tmp_path, capture_output=True, text=True)
    if before is not None and "sme" in before:
        assert done.returncode != 0 and built_for.read_text() == before
        said = " ".join(done.stderr.split())
        assert f"{tmp_path}: compiled for a processor" in said and "delete this folder" in said
    else:
        assert done.returncode == 0, done.stderr
        assert cpu.flags(built_for.read_text()) == cpu.flags(Path("/proc/cpuinfo").read_text())


@pytest.fixture
def four(monkeypatch):
    """A process that may use logical CPUs 0 to 3."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


def test_threads_obey_the_quotas_of_all_cgroups_around(four, tmp_path):
    own, none = tmp_path / "cgroup", tmp_path / "none"
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "cpu/x").mkdir(parents=True)
    own.write_text("0::/a/b\n3:cpu,cpuacct:/x\nrubbish\n")
    assert cpu.usable_cpus(none, none, none) == 4
    for file, content, expected in (
        ("a/cpu.max", "150000 100000", 1),
        ("a/cpu.max", "300000 100000", 3),
        ("a/b/cpu.max", "5000 100000", 1),
        ("cpu.max", "max 100000", 4),
        ("a/cpu.max", "900000 100000", 4),
        ("a/cpu.max", "rubbish", 4),
        ("a/cpu.max", "100000 0", 4),
    ):
        (tmp_path / file).write_text(content)
        assert cpu.usable_cpus(tmp_path, own, none) == expected, content
        (tmp_path / file).unlink()
    for quota, expected in (("-1", 4), ("200000", 2)):
        (tmp_path / "cpu/x/cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "cpu/x/cpu.cfs_period_us").write_text("100000")
        assert cpu.usable_cpus(tmp_path, own, none) == expected


@pytest.mark.parametrize(
    ("file", "siblings", "allowed", "expected"),
    [
        ("thread_siblings_list", ["0,4", "1,5", "2,6", "3,7"] * 2, range(8), 4),
        ("thread_siblings_list", ["0-1", "0-1", "2-3", "2-3"], range(4), 2),
        ("core_cpus_list", ["0-1", "0-1", "2-3", "2-3"], [0, 2, 3], 2),  # one sibling of the first core only
        ("thread_siblings_list", ["0", "1", "2", "3"], [1, 3], 2),
        ("unknown", ["0-1", "0-1", "2-3", "2-3"], range(4), 4),
    ],
)
def test_hyper_threads_are_no_cores(file, siblings, allowed, expected, tmp_path, monkeypatch):
    for number, text in enumerate(siblings):
        (tmp_path / f"cpu{number}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}/topology" / file).write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed), raising=False)
    assert cpu.usable_cpus(tmp_path / "none", tmp_path / "none", tmp_path) == expected


def test_a_system_without_affinity_counts_its_cpus(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpu.usable_cpus(tmp_path, tmp_path / "none", tmp_path) == 6
