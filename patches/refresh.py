"""Move the patch series to another llama-cpp-python release, or say which hunks need a hand.

    python patches/refresh.py 0.3.35 --out refreshed      # try: the series stays as it is
    python patches/refresh.py 0.3.37 --write              # replace the patches and the lock file

In OUT/llama.cpp, a git repository, the patches are commits on the pinned release and are cherry-picked onto the other
one, which resolves moved and changed context. Where both changed the same lines the file and line are named and the
exit code is 1: edit the marked places there and run again with --continue. That also takes up what was amended after a
clean move, for merged text need not compile.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import prepare

WHO = {"GIT_COMMITTER_NAME": "pyfirst", "GIT_COMMITTER_EMAIL": "pyfirst@users.noreply.example"}


def git(tree: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in ``tree``, whatever the user's own settings; a failure ends the program with what git said."""
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_EDITOR": "true"}
    env = {**os.environ, **settings, **WHO, "GIT_AUTHOR_NAME": "release", "GIT_AUTHOR_EMAIL": "release@invalid"}
    done = subprocess.run(["git", *arguments], cwd=tree, env=env, capture_output=True, text=True)
    if check and done.returncode != 0:
        sys.exit(f"error: git {arguments[0]} in {tree}: {(done.stderr or done.stdout).strip()}")
    return done


def fetch(version: str, cache: Path) -> Path:
    """The sdist of a release, downloaded by pip, without the checksum that a lock file would give."""
    name = prepare.pinned()[0].partition("==")[0]
    archive = cache / f"{name.replace('-', '_')}-{version}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        if subprocess.run([*command, f"{name}=={version}", "-d", str(cache)]).returncode != 0:
            sys.exit(f"error: pip cannot download the sdist {name}=={version}; put {archive.name} into {cache}")
    return archive


def release(archive: Path, tree: Path, branch: str) -> None:
    """Commit llama.cpp as an sdist holds it, as the new ``branch`` of the repository ``tree``."""
    git(tree, "checkout", "--quiet", "-b", branch)
    for path in tree.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        for member in tar:
            # The sdist carries the pointer file of the submodule.
            if member.name.startswith(prefix) and member.name != prefix + ".git":
                member.name = member.name.removeprefix(prefix)
                tar.extract(member, tree, **prepare.SAFELY)
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--allow-empty", "--message", archive.name)


def start(pinned: Path, other: Path, tree: Path) -> None:
    """Make the repository ``tree``: branch ``pinned`` and the series on it, branch ``moved`` of the other release."""
    mark = tree / ".git" / "pyfirst-refresh"
    if tree.exists() and not mark.is_file():
        sys.exit(f"error: {tree}: not made by this script, so it is not replaced; move it away or take another --out")
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    git(tree, "init", "--quiet")
    mark.touch()
    release(pinned, tree, "pinned")
    git(tree, "checkout", "--quiet", "-b", "series")
    git(tree, "am", "--quiet", "--whitespace=nowarn", *map(str, prepare.series()))
    git(tree, "checkout", "--quiet", "pinned")
    release(other, tree, "moved")
    git(tree, "tag", "release")


def conflicts(tree: Path) -> list[str]:
    """ "file:line" of every place that git could not merge, or that still has its marker."""
    places = []
    for name in git(tree, "diff", "--name-only", "--diff-filter=U").stdout.splitlines():
        path = tree / name
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        marked = [n for n, line in enumerate(lines, 1) if line.startswith("<<<<<<< ")]
        places += [f"{name}:{n}" for n in marked] or [f"{name} (gone from one side, or new on both)"]
    return places


def move(tree: Path, go_on: bool = False) -> list[str]:
    """Bring the series to branch ``moved``, or go on after an edit; return the places that stop it."""
    if go_on and not (tree / ".git" / "CHERRY_PICK_HEAD").exists():
        if git(tree, "status", "--porcelain").stdout:
            sys.exit(f"error: {tree}: commit what you edited, with --fixup and rebase -i --autosquash, or undo it")
        return []
    if go_on:
        open_places = [place for place in conflicts(tree) if "(" not in place]
        if open_places:
            return open_places
        git(tree, "add", "--all", "--force")
    done = git(tree, "cherry-pick", *(["--continue"] if go_on else ["pinned..series"]), check=False)
    if done.returncode == 0:
        return []
    places = conflicts(tree)
    return places or sys.exit(f"error: git cherry-pick in {tree}: {(done.stderr or done.stdout).strip()}")


def refresh(version: str, out: Path, write: bool = False, go_on: bool = False) -> int:
    """Try (or with ``write`` do) the move; return the number of conflicts."""
    cache, tree = out / "sdists", out / "llama.cpp"
    cache.mkdir(parents=True, exist_ok=True)
    archive = fetch(version, cache)
    if not go_on:
        start(prepare.download(cache), archive, tree)
    elif (
        not (tree / ".git").exists() or git(tree, "log", "-1", "--format=%s", "release").stdout.strip() != archive.name
    ):
        sys.exit(f"error: {tree}: no move to {version} to go on with; run without --continue")
    places = move(tree, go_on)
    if places:
        at = git(tree, "log", "-1", "--format=%s", "CHERRY_PICK_HEAD").stdout.strip()
        for place in places:
            print(f'"{at}": conflict in {place}', file=sys.stderr)
        print(f"{len(places)} conflicts: edit {tree}, then run again with --continue", file=sys.stderr)
        return len(places)
    commits = git(tree, "rev-list", "--reverse", "release..moved").stdout.split()
    fresh = [out / patch.name for patch in prepare.series()]
    if len(commits) != len(fresh):
        sys.exit(
            f"error: {tree}: {len(commits)} commits for {len(fresh)} patches, expected one for each; "
            "join an edit and its patch with git rebase -i --autosquash release"
        )
    for commit, path in zip(commits, fresh, strict=True):
        options = ["--stdout", "--zero-commit", "--no-signature", "-1"]
        path.write_text(git(tree, "format-patch", *options, commit).stdout, encoding="utf-8")
    print(f"the series applies to {version}: {', '.join(map(str, fresh))}")
    if write:
        for path, patch in zip(fresh, prepare.series(), strict=True):
            shutil.copyfile(path, patch)
        checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
        name = prepare.pinned()[0].partition("==")[0]
        comment = prepare.LOCK.read_text(encoding="utf-8").splitlines()[0]
        prepare.LOCK.write_text(f"{comment}\n{name}=={version} --hash=sha256:{checksum}\n", encoding="utf-8")
        others = "pyproject.toml, native.py, the Makefile, README.md and docs/raspberry-pi.md"
        print(f"wrote patches/ and the lock file; a new version belongs into {others} too")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "pyfirst-refresh")
    parser.add_argument("--write", action="store_true", help="replace patches and lock file")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="after the conflicts have been edited")
    args = parser.parse_args()
    sys.exit(1 if refresh(args.version, args.out.resolve(), args.write, args.go_on) else 0)
