"""patches/prepare.py: a patch applies exactly or the build stops with the place named."""

from __future__ import annotations

import importlib.util
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


def trees(root: Path, **texts: str) -> dict[str, Path]:
    for name, text in texts.items():
        (root / name / "src").mkdir(parents=True)
        (root / name / "src" / "model.cpp").write_text(text)
    return {name: root / name for name in texts}


def test_a_patch_moves_to_a_release_with_other_context(refresh, tmp_path):
    (tmp_path / "change.patch").write_text("Subject: change\n---\n" + PATCH)
    old = "one\ntwo\nthree\nfour\n"
    made = trees(
        tmp_path,
        base=old,
        patched=old.replace("two\n", "two\nnew\n"),
        other="zero\none\n\n" + "two\nthree\nfour\n" + "five\n" * 9,
        before="zero\none\n\n" + "two\nthree\nfour\n" + "five\n" * 9,
    )
    assert refresh.merge(tmp_path / "change.patch", made["base"], made["patched"], made["other"]) == []
    fresh = refresh.rewritten(tmp_path / "change.patch", made["before"], made["other"])
    assert fresh.startswith("Subject: change\n---\n")
    (tmp_path / "fresh.patch").write_text(fresh)
    prepare.apply(tmp_path / "fresh.patch", made["before"])
    assert (made["before"] / "src" / "model.cpp").read_text() == (made["other"] / "src" / "model.cpp").read_text()


def test_a_conflict_names_file_and_line(refresh, tmp_path):
    (tmp_path / "change.patch").write_text(PATCH)
    old = "one\ntwo\nthree\nfour\n"
    made = trees(
        tmp_path, base=old, patched=old.replace("two\n", "two\nnew\n"), other=old.replace("two\n", "two\nelse\n")
    )
    conflicts = refresh.merge(tmp_path / "change.patch", made["base"], made["patched"], made["other"])
    assert conflicts == ["src/model.cpp:3"]
