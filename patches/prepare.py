"""Unpack the pinned llama-cpp-python sdist, apply the patch series and print the tree's path.

Called by CMake; also useful by hand: ``python patches/prepare.py DIRECTORY``. A tree that was made
from the same lock file and the same patches is left alone, so its timestamps do not change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOCK = HERE / "upstream.lock"
# Debian 12's Python, 3.11.2, has no filters yet.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
STAMP = ".prepared"


def series() -> list[Path]:
    """The patches in order, as ``patches/series`` lists them."""
    lines = (HERE / "series").read_text(encoding="utf-8").splitlines()
    return [HERE / line.strip() for line in lines if line.strip() and not line.startswith("#")]


def fingerprint(patches: list[Path]) -> str:
    """Hash of everything that decides what the tree looks like."""
    digest = hashlib.sha256(LOCK.read_bytes())
    for patch in patches:
        digest.update(patch.read_bytes())
    return digest.hexdigest()


def pinned() -> tuple[str, str]:
    """(requirement, sha256) of the lock file."""
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement, _, checksum = line.partition(" --hash=sha256:")
            return requirement.strip(), checksum.strip()
    sys.exit(f"error: {LOCK}: no requirement found")


def download(cache: Path) -> Path:
    """The sdist in ``cache``, downloaded by pip if it is not there; its checksum is verified either way."""
    requirement, checksum = pinned()
    name, _, version = requirement.partition("==")
    archive = cache / f"{name.replace('-', '_')}-{version}.tar.gz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        env = {k: v for k, v in os.environ.items() if k != "CMAKE_ARGS"}  # which is meant for us alone
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        if subprocess.run([*command, "--require-hashes", "-r", str(LOCK), "-d", str(cache)], env=env).returncode != 0:
            sys.exit(f"error: pip cannot download the sdist {requirement}; put {archive.name} into {cache}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != checksum:
        sys.exit(f"error: {archive}: sha256 is {found}, {LOCK.name} expects {checksum}; delete the file and retry")
    return archive


def apply(patch: Path, tree: Path) -> None:
    """Apply one patch; git apply knows no fuzz, and names the file and line of a hunk that fails."""
    # The ceiling keeps git from mistaking our own repository for the tree's.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    if shutil.which("git") is None:
        sys.exit("error: no git, which applies the patches; install it")
    result = subprocess.run(
        ["git", "apply", "--verbose", str(patch)], cwd=tree, env=env, capture_output=True, text=True
    )
    if result.returncode != 0:
        sys.exit(f"error: {patch.name} does not apply to {pinned()[0]}:\n{result.stderr.strip()}")


def prepare(directory: Path) -> Path:
    """Return the patched llama.cpp below ``directory``, making it if needed."""
    patches = series()
    wanted = fingerprint(patches)
    tree = directory / "llama.cpp"
    found = (tree / STAMP).read_text() if (tree / STAMP).is_file() else None
    if found == wanted:
        return tree
    if tree.exists() and (found is None or (tree / ".git").exists()):
        sys.exit(f"error: {tree}: not as this script leaves it, or under git, so it is not replaced; move it away")
    archive = download(directory)
    with tempfile.TemporaryDirectory(dir=directory) as scratch, tarfile.open(archive) as tar:
        top = archive.name.removesuffix(".tar.gz")
        tar.extractall(scratch, **SAFELY)
        fresh = Path(scratch) / top / "vendor" / "llama.cpp"
        # The sdist carries the submodule's pointer file, which would confuse git and llama.cpp's version script.
        (fresh / ".git").unlink(missing_ok=True)
        for patch in patches:
            apply(patch, fresh)
        keep_timestamps(fresh, tree)
        (fresh / STAMP).write_text(wanted)
        shutil.rmtree(tree, ignore_errors=True)
        fresh.replace(tree)
    return tree


def keep_timestamps(fresh: Path, old: Path) -> None:
    """Give files that did not change the old modification time, so that a new patch recompiles only what it touches."""
    for path in fresh.rglob("*"):
        twin = old / path.relative_to(fresh)
        if path.is_file() and twin.is_file() and path.read_bytes() == twin.read_bytes():
            shutil.copystat(twin, path)
        elif path.is_file():
            path.touch()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: prepare.py DIRECTORY")
    print(prepare(Path(sys.argv[1]).resolve()).as_posix())
