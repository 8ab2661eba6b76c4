"""patches/prepare.py: a patch applies exactly or the build stops with the place named."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tarfile
from pathlib import Path

import pytest

PATCHES = Path(__file__).resolve().parent.parent / "patches"
spec = importlib.util.spec_from_file_location("prepare", PATCHES / "prepare.py")
assert spec and spec.loader
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

PATCH = """\
--- a/src/model.cpp
+++ b/src/model.cpp
@@ -1,4 +1,5 @@
 one
 two
+new
 three
 four
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tree" / "src").mkdir(parents=True)
    (tmp_path / "change.patch").write_text(PATCH)
    return tmp_path / "tree"


def test_series_lists_every_patch():
    assert sorted(prepare.series()) == sorted(PATCHES.glob("*.patch"))
    assert prepare.pinned()[0].startswith("llama-cpp-python==") and len(prepare.pinned()[1]) == 64


def test_a_patch_applies(tree):
    (tree / "src" / "model.cpp").write_text("one\ntwo\nthree\nfour\n")
    prepare.apply(tree.parent / "change.patch", tree)
    assert (tree / "src" / "model.cpp").read_text() == "one\ntwo\nnew\nthree\nfour\n"


def test_changed_context_stops_the_build_and_names_the_hunk(tree):
    # The patch program would accept this with fuzz 1.
    (tree / "src" / "model.cpp").write_text("ONE\ntwo\nthree\nfour\n")
    with pytest.raises(SystemExit, match=r"change\.patch does not apply(.|\n)*src/model\.cpp:1"):
        prepare.apply(tree.parent / "change.patch", tree)
    assert "new" not in (tree / "src" / "model.cpp").read_text()


def test_a_build_without_git_is_one_line(tree, monkeypatch):
    monkeypatch.setenv("PATH", str(tree))
    with pytest.raises(SystemExit, match=r"^error: no git, .*$"):
        prepare.apply(tree.parent / "change.patch", tree)


def test_a_download_that_fails_is_one_line_with_the_file_to_bring(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.sys, "executable", "false")
    name = prepare.pinned()[0].replace("-", "_").replace("==", "-") + ".tar.gz"
    with pytest.raises(SystemExit, match=f"^error: pip cannot download .*; put {name} into {tmp_path}$"):
        prepare.prepare(tmp_path)


def test_an_isolated_build_holds_the_modules_that_are_run():
    project = (PATCHES.parent / "pyproject.toml").read_text(encoding="utf-8")
    required = re.search(r"^requires = \[(.*)\]", project, re.MULTILINE)
    modules = re.findall(r'"-m", "(\w+)"', (PATCHES / "prepare.py").read_text(encoding="utf-8"))
    assert required and modules and all(f'"{module}"' in required[1] for module in modules)


def test_a_wrong_checksum_stops_the_build(tmp_path):
    name = prepare.pinned()[0].replace("-", "_").replace("==", "-") + ".tar.gz"
    (tmp_path / name).write_bytes(b"not the sdist")
    with pytest.raises(SystemExit, match="sha256"):
        prepare.prepare(tmp_path)


def test_unchanged_files_keep_their_timestamps(tmp_path):
    for name, text in (("old", "same"), ("new", "same")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept.cpp").write_text(text)
        (tmp_path / name / "changed.cpp").write_text(name)
    import os

    os.utime(tmp_path / "old" / "kept.cpp", (1000, 1000))
    os.utime(tmp_path / "old" / "changed.cpp", (1000, 1000))
    prepare.keep_timestamps(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "new" / "kept.cpp").stat().st_mtime == 1000
    assert (tmp_path / "new" / "changed.cpp").stat().st_mtime > 1000


@pytest.mark.parametrize("made", ["elsewhere", "under git"])
def test_a_tree_that_holds_somebodys_work_is_not_replaced(made, refresh, releases, tmp_path, capsys):
    """Another llama.cpp in the folder, or one in which a patch is being changed."""
    out = tmp_path / "out"
    for path, run in (
        (out / "sdists", lambda: refresh.prepare.prepare(out / "sdists")),
        (out, lambda: refresh.refresh("1.0", out)),
    ):
        tree = path / "llama.cpp"
        if made == "under git":
            run()
            (tree / ".git").mkdir(exist_ok=True)
            (tree / ".git" / "pyfirst-refresh").unlink(missing_ok=True)
        else:
            tree.mkdir()
        (tree / "mine.cpp").write_text("work")
        with (tmp_path / "patches" / "0002-b.patch").open("a") as patch:
            patch.write("\n")  # so that what was prepared is out of date
        with pytest.raises(SystemExit, match=r"llama.cpp: .*not replaced; move it away"):
            run()
        assert (tree / "mine.cpp").read_text() == "work"


@pytest.fixture(scope="module")
def refresh():
    import sys

    sys.path.insert(0, str(PATCHES))
    try:
        spec = importlib.util.spec_from_file_location("refresh", PATCHES / "refresh.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(PATCHES))


@pytest.fixture
def releases(refresh, tmp_path, monkeypatch):
    """Lock, series and sdists of a llama.cpp with one file and two patches; makes more releases."""
    patches, cache = tmp_path / "patches", tmp_path / "out" / "sdists"
    patches.mkdir()
    cache.mkdir(parents=True)

    def make(version: str, text: str) -> Path:
        top = f"llama_cpp_python-{version}"
        source = tmp_path / "made" / top / "vendor" / "llama.cpp"
        (source / "src").mkdir(parents=True)
        (source / "src" / "model.cpp").write_text(text)
        (source / ".git").write_text("gitdir: elsewhere")
        with tarfile.open(cache / f"{top}.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "made" / top, top)
        return cache / f"{top}.tar.gz"

    mail = "From: a <a@example.com>\nDate: Wed, 25 Nov 2026 03:36:38 +0000\nSubject: [PATCH] change {}\n\nwhy\n\n---\n"
    second = PATCH.replace(" two\n+new\n three\n four", " two\n new\n-three\n+3\n four").replace(
        "-1,4 +1,5", "-1,5 +1,5"
    )
    (patches / "0001-a.patch").write_text(mail.format(1) + PATCH)
    (patches / "0002-b.patch").write_text(mail.format(2) + second)
    checksum = hashlib.sha256(make("1.0", "one\ntwo\nthree\nfour\n").read_bytes()).hexdigest()
    lock = patches / "upstream.lock"
    lock.write_text(f"# the release\nllama-cpp-python==1.0 --hash=sha256:{checksum}\n")
    monkeypatch.setattr(refresh.prepare, "LOCK", lock)
    monkeypatch.setattr(refresh.prepare, "series", lambda: sorted(patches.glob("*.patch")))
    return make


def test_the_series_moves_to_a_release_with_other_context(refresh, releases, tmp_path):
    archive = releases("1.1", "zero\none\n\ntwo\nthree\nfour\n" + "five\n" * 9)
    assert refresh.refresh("1.1", tmp_path / "out", write=True) == 0
    # The lock file names the release now, so what the build does proves that the written series applies to it.
    made = refresh.prepare.prepare(tmp_path / "out" / "sdists")
    assert (made / "src" / "model.cpp").read_text() == "zero\none\n\ntwo\nnew\n3\nfour\n" + "five\n" * 9
    assert refresh.prepare.pinned() == ("llama-cpp-python==1.1", hashlib.sha256(archive.read_bytes()).hexdigest())
    first = (tmp_path / "patches" / "0001-a.patch").read_text()
    assert "From: a <a@example.com>" in first and "Subject: [PATCH] change 1\n\nwhy\n" in first


def test_a_conflict_names_file_and_line_and_its_edit_is_taken_up(refresh, releases, tmp_path, capsys):
    releases("1.1", "one\ntwo\nTHREE\nfour\n")
    out, series = tmp_path / "out", {p: p.read_text() for p in (tmp_path / "patches").iterdir()}
    file = out / "llama.cpp" / "src" / "model.cpp"
    for go_on in (False, True):  # going on without an edit says the same
        assert refresh.refresh("1.1", out, write=True, go_on=go_on) == 1
        line = file.read_text().splitlines().index(next(x for x in file.read_text().splitlines() if "<<<<" in x)) + 1
        assert f'"change 1": conflict in src/model.cpp:{line}' in capsys.readouterr().err
    file.write_text("one\ntwo\nnew\nTHREE\nfour\n")
    assert refresh.refresh("1.1", out, write=True, go_on=True) == 1
    assert '"change 2": conflict in src/model.cpp' in capsys.readouterr().err
    assert {p: p.read_text() for p in series} == series
    file.write_text("one\ntwo\nnew\n3!\nfour\n")
    assert refresh.refresh("1.1", out, write=True, go_on=True) == 0
    made = refresh.prepare.prepare(out / "sdists")
    assert (made / "src" / "model.cpp").read_text() == "one\ntwo\nnew\n3!\nfour\n"


def test_a_change_after_a_clean_move_is_taken_up_when_it_is_committed(refresh, releases, tmp_path):
    releases("1.1", "zero\none\ntwo\nthree\nfour\n")
    out = tmp_path / "out"
    assert refresh.refresh("1.1", out) == 0
    file = out / "llama.cpp" / "src" / "model.cpp"
    file.write_text(file.read_text().replace("3", "3!"))
    with pytest.raises(SystemExit, match="commit what you edited"):
        refresh.refresh("1.1", out, go_on=True)
    refresh.git(out / "llama.cpp", "commit", "--all", "--fixup", "HEAD")
    with pytest.raises(SystemExit, match="3 commits for 2 patches"):
        refresh.refresh("1.1", out, go_on=True)
    refresh.git(out / "llama.cpp", "-c", "sequence.editor=true", "rebase", "-i", "--autosquash", "release")
    assert refresh.refresh("1.1", out, write=True, go_on=True) == 0
    made = refresh.prepare.prepare(out / "sdists")
    assert (made / "src" / "model.cpp").read_text() == "zero\none\ntwo\nnew\n3!\nfour\n"


def test_going_on_with_another_release_is_refused(refresh, releases, tmp_path):
    for version in ("1.1", "1.2"):
        releases(version, "one\ntwo\nTHREE\nfour\n")
    with pytest.raises(SystemExit, match=r"no move to 1\.1"):
        refresh.refresh("1.1", tmp_path / "out", go_on=True)
    assert refresh.refresh("1.1", tmp_path / "out") == 1
    with pytest.raises(SystemExit, match=r"no move to 1\.2"):
        refresh.refresh("1.2", tmp_path / "out", go_on=True)
