"""The machine: what it is, how many threads to use, whether its processor has what the library was compiled for.

Nothing of the library is imported here: without those instructions it dies of SIGILL.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SYSFS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")

# What our build of llama.cpp's CPU backend makes use of, as /proc/cpuinfo names it on x86-64 and on aarch64.
_NAMES = (
    "sse4_2 avx f16c fma avx2 bmi2 avx_vnni avx512f avx512bw avx512vl avx512dq avx512cd avx512_vbmi avx512vbmi "
    "avx512_vnni avx512_bf16 asimddp asimdhp i8mm sve sve2 sme"
)
_USED = set(_NAMES.split())


def _listed(text: str) -> set[str]:
    """The instructions that a /proc/cpuinfo lists."""
    for line in text.splitlines():
        name, _, found = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(found.split())
    return set()


def flags(text: str) -> set[str]:
    """The instructions that a /proc/cpuinfo lists, those that matter here."""
    return _USED & _listed(text)


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor multiplies bfloat16 numbers itself; None where that cannot be told."""
    try:
        found = _listed(cpuinfo.read_text(encoding="utf-8"))
    except OSError:
        return None
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & found) if found else None


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
            "pyfirst again on this machine (in its source folder delete build/py3-none-*, then pip install --no-deps "
            "--force-reinstall .) or install a wheel"
        )


def cgroups(controller: str, root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> set[Path]:
    """Folders of the cgroups around this process, version 2 and version 1, that may hold limits of a controller."""
    folders = {root, root / controller}
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        groups = []
    for controllers, path in (group for group in groups if len(group) == 2):
        if not controllers or controller in controllers.split(","):
            base = root / controller if controllers else root
            inner = base / path.strip("/")
            folders.update((inner, *inner.parents))
    return folders


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """CPUs that each cgroup around this process may use, where one is limited."""
    for folder in cgroups("cpu", root, own):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            yield quota / period
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota / period


def _cores(cpus: Iterable[int], sysfs: Path) -> int:
    """Physical cores among logical CPUs; one whose siblings the system does not tell is its own."""
    found = set()
    for cpu in cpus:
        siblings = str(cpu)
        for name in ("thread_siblings_list", "core_cpus_list"):
            with contextlib.suppress(OSError):
                siblings = (sysfs / f"cpu{cpu}" / "topology" / name).read_text().strip() or siblings
                break
        found.add(siblings)
    return len(found)


def usable_cpus(root: Path = CGROUPS, own: Path = OWN_CGROUPS, sysfs: Path = SYSFS) -> int:
    """Physical cores that this process may use: affinity and, on Linux, the quotas of its cgroups.

    Two threads on one core share what decoding waits for, so hyper-threads do not count.
    """
    count = os.cpu_count() or 1
    cpus: Iterable[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    return max(1, int(min([_cores(cpus, sysfs), *_quotas(root, own)])))


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on; None for what the system does not tell."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model\t")):
                cpu = line.partition(":")[2].strip()
                break
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    governors = _sensor("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    degrees = [
        int(value) / 1000 for value in _sensor("class/thermal/thermal_zone*/temp") if value.lstrip("-").isdigit()
    ]
    return {
        "cpu": cpu,
        "cpus": usable_cpus(),
        "threads": threads,
        "load_average": load,
        "governor": ", ".join(sorted(set(governors))) or None,
        "temperature_c": max(degrees, default=None),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _sensor(pattern: str) -> list[str]:
    """What the files below /sys that match say, without those that cannot be read."""
    found = []
    for path in sorted(Path("/sys").glob(pattern)):
        with contextlib.suppress(OSError):
            found.append(path.read_text().strip())
    return found
