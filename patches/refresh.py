"""Move the patch series to another llama-cpp-python release, or say which hunks need a hand.

    python patches/refresh.py 0.3.35 --out /tmp/refreshed      # try: the series stays as it is
    python patches/refresh.py 0.3.37 --write                   # replace the patches and the lock file

Each patched file is merged three ways: the pinned release, the pinned release patched, the other release. That
resolves moved and changed context. Where both changed the same lines the file and line are named, the merged tree
with its conflict markers is left in --out, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import prepare

MARKER = re.compile(r"^<{7} ", re.MULTILINE)


def fetch(version: str, cache: Path) -> Path:
    """The sdist of a release, downloaded by pip, without the checksum that a lock file would give."""
    name = prepare.pinned()[0].partition("==")[0]
    archive = cache / f"{name.replace('-', '_')}-{version}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        subprocess.run([*command, f"{name}=={version}", "-d", str(cache)], check=True)
    return archive


def unpack(archive: Path, target: Path) -> Path:
    """llama.cpp's tree of an sdist, at ``target``."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
        tree = Path(scratch) / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
        (tree / ".git").unlink(missing_ok=True)
        tree.replace(target)
    return target


def touched(patch: Path) -> list[str]:
    """Files that a patch changes or makes."""
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE)


def merge(patch: Path, base: Path, patched: Path, other: Path) -> list[str]:
    """Bring the change of one patch into ``other``; return "file:line" of every conflict."""
    conflicts = []
    for name in touched(patch):
        if not (base / name).exists():
            if (other / name).exists():
                conflicts.append(f"{name}:1 (the release now has a file of this name)")
            (other / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(patched / name, other / name)
            continue
        if not (other / name).exists():
            conflicts.append(f"{name}:1 (gone from the release)")
            continue
        files = [str(tree / name) for tree in (other, base, patched)]
        labels = ["-L", "release", "-L", "pinned", "-L", "patched"]
        subprocess.run(["git", "merge-file", *labels, *files], check=False)
        text = (other / name).read_text(encoding="utf-8")
        conflicts += [f"{name}:{text.count(chr(10), 0, m.start()) + 1}" for m in MARKER.finditer(text)]
    return conflicts


def rewritten(patch: Path, before: Path, after: Path) -> str:
    """The patch again, its message kept, its hunks made from the trees ``before`` and ``after``."""
    message = patch.read_text(encoding="utf-8").split("\n---\n", 1)[0]
    diffs = []
    for name in touched(patch):
        old = str(before / name) if (before / name).exists() else "/dev/null"
        command = ["git", "diff", "--no-index", "--no-color", old, str(after / name)]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        text = text.replace(str(before / name), f"/{name}").replace(str(after / name), f"/{name}")
        text = re.sub(r"^diff --git .*$", f"diff --git a/{name} b/{name}", text, count=1, flags=re.MULTILINE)
        diffs.append(text.replace("a//", "a/").replace("b//", "b/"))
    return f"{message}\n---\n\n{''.join(diffs)}"


def refresh(version: str, out: Path, write: bool = False) -> int:
    """Try (or with ``write`` do) the move; return the number of conflicts."""
    out.mkdir(parents=True, exist_ok=True)
    cache = out / "sdists"
    cache.mkdir(exist_ok=True)
    for name in ("base", "patched", "before", "check", "llama.cpp"):
        shutil.rmtree(out / name, ignore_errors=True)
    pinned, archive = prepare.download(cache), fetch(version, cache)
    base, other = unpack(pinned, out / "base"), unpack(archive, out / "llama.cpp")
    patched, before = out / "patched", out / "before"
    conflicts: list[str] = []
    fresh: dict[Path, str] = {}
    for patch in prepare.series():
        shutil.copytree(base, patched)
        prepare.apply(patch, patched)
        shutil.copytree(other, before)
        found = merge(patch, base, patched, other)
        for place in found:
            print(f"{patch.name}: conflict in {place}", file=sys.stderr)
        conflicts += found
        if not found:
            fresh[patch] = rewritten(patch, before, other)
            (out / patch.name).write_text(fresh[patch], encoding="utf-8")
            check = before.parent / "check"
            shutil.copytree(before, check)
            prepare.apply(out / patch.name, check)
            shutil.rmtree(check)
        shutil.rmtree(base)
        patched.replace(base)
        shutil.rmtree(before)
    shutil.rmtree(base)
    if conflicts:
        print(f"{len(conflicts)} conflicts; edit {other} and diff it against the release", file=sys.stderr)
        return len(conflicts)
    print(f"the series applies to {version}: {', '.join(str(out / p.name) for p in fresh)}")
    if write:
        for patch, text in fresh.items():
            patch.write_text(text, encoding="utf-8")
        checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
        name = prepare.pinned()[0].partition("==")[0]
        comment = prepare.LOCK.read_text(encoding="utf-8").splitlines()[0]
        prepare.LOCK.write_text(f"{comment}\n{name}=={version} --hash=sha256:{checksum}\n", encoding="utf-8")
        print("wrote patches/ and the lock file; set the version in pyproject.toml, native.py and the Makefile too")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "pyfirst-refresh")
    parser.add_argument("--write", action="store_true", help="replace patches and lock file")
    args = parser.parse_args()
    sys.exit(1 if refresh(args.version, args.out.resolve(), args.write) else 0)
