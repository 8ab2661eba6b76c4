"""Whether this processor has the instructions that the library was compiled for; without, it dies of SIGILL."""

from __future__ import annotations

from pathlib import Path

# What llama.cpp's CPU backend makes use of, as /proc/cpuinfo names it on x86-64 and on aarch64.
_NAMES = (
    "sse4_2 avx f16c fma avx2 bmi2 avx_vnni avx512f avx512bw avx512vl avx512dq avx512cd avx512_vbmi avx512vbmi "
    "avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16 asimddp asimdhp i8mm sve sve2 sme"
)
_USED = set(_NAMES.split())


def flags(text: str) -> set[str]:
    """The instructions that a /proc/cpuinfo lists, those that matter here."""
    for line in text.splitlines():
        name, _, found = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return _USED & set(found.split())
    return set()


def check(lib_dir: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Raise ImportError when the library in ``lib_dir`` was compiled for a processor that can do more than this one.

    A build for one machine leaves that machine's flags in built-for.txt; a portable one has none and passes.
    """
    try:
        built_for, here = (path.read_text(encoding="utf-8") for path in (lib_dir / "built-for.txt", cpuinfo))
    except OSError:
        return
    if missing := flags(built_for) - flags(here):
        raise ImportError(
            f"{lib_dir}: compiled for a processor with {', '.join(sorted(missing))}, which this one lacks; build "
            "pyfirst again on this machine (pip install --no-cache-dir --force-reinstall .) or install a wheel"
        )
