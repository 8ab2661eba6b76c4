"""The examples run as their docstrings say, on tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from first_convert.convert import convert

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command: object, stdin: str = "") -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(word) for word in command], input=stdin, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def routed(tiny_model, tmp_path_factory):
    """A tiny model with routers that skip a layer."""
    folder, _ = tiny_model("llama")
    root = tmp_path_factory.mktemp("routed")
    recipe = tiny.recipe(root / "recipe", folder, mask=[1, 0, 1, 1])
    path = root / "routed.gguf"
    convert(folder, first=recipe, outfile=path, outtype="f32")
    return path


def test_chat(routed):
    lines = run(sys.executable, EXAMPLES / "chat.py", routed, stdin="Hi there\nAnd now?\n\n").splitlines()
    masks = [line.strip() for line in lines if line.startswith("  ") and set(line.strip()) <= set("#.")]
    assert len(masks) == 2
    assert all(len(mask) == 4 for mask in masks)


def test_batch(routed):
    lines = run(sys.executable, EXAMPLES / "batch.py", routed, stdin="the quick\nbrown fox\nlazy dog\n").splitlines()
    assert [line.split("\t")[1] for line in lines] == ["'the quick'", "'brown fox'", "'lazy dog'"]
    assert all(" of 4 layers" in line for line in lines)


def test_forced_mask(tiny_model):
    _, gguf = tiny_model("llama")
    lines = run(sys.executable, EXAMPLES / "forced_mask.py", gguf, "the quick brown fox jumps").splitlines()
    assert len(lines) == 5
    assert len({line.split(":")[1] for line in lines}) == 5


def test_serve_and_ask(routed):
    lines = run(sys.executable, EXAMPLES / "serve_and_ask.py", routed, "Hi", "And you?").splitlines()
    assert len(lines) == 2
    assert all(" of 4 layers" in line for line in lines)


def test_frontier_takes_no_cross_entropy_of_other_examples(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import frontier

    path, point = tmp_path / "frontier.json", {"series": "FiRST", "label": "10%", "ce": 1.5}
    assert frontier.measured(path, 16) == {}
    path.write_text(json.dumps({"limit": 16, "points": [point]}))
    assert frontier.measured(path, 16) == {("FiRST", "10%"): point}
    assert frontier.measured(path, 60) == {}


def test_baselines_of_one_example_have_no_interval(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import baselines

    training = {"held_back": {"modal_masks": {"describe": [1, 0, 1, 1]}}}
    for name, ce in (("first-25-full", [[3.0, 2], [8.0, 2]]), ("loo-25-full", [[5.0, 2], [9.0, 2]])):
        for count in (1, 2):
            stored = {"limit": count, "answers": 1, "steps": 4, "seed": 1, "training": training}
            stored["tasks"] = {"describe": {"ce": ce[:count], "skipped": [[1]] * count}}
            folder = tmp_path / str(count)
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(stored))
    titles = {name: title for name, (title, _) in baselines.systems().items()}
    (row,) = (line for line in baselines.table(tmp_path / "1", titles).splitlines() if line.startswith("| one mask"))
    assert row.split(" | ")[3] == "2.500 (+1.000)"
    (row,) = (line for line in baselines.table(tmp_path / "2", titles).splitlines() if line.startswith("| one mask"))
    assert row.split(" | ")[3] == "3.500 (+0.750, +0.500..+1.000)"


def test_baselines_pair_the_tasks_whatever_their_order(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import baselines

    ce = {"describe": [[2.0, 2], [4.0, 2]], "math": [[20.0, 4], [30.0, 4], [90.0, 4]]}
    stored = {"tasks": {task: {"ce": ce[task]} for task in ("math", "describe")}}
    found = baselines.statistics(stored, ["describe", "math"], {})["ce"]
    # The first describe alone, and the last math: rows 0 and 4 of "describe", then "math".
    assert found.of(np.array([0, 4])) == (1.0 + 22.5) / 2
    assert found.of(np.arange(5)) == (6 / 4 + 140 / 12) / 2


def test_baselines_take_no_result_of_other_tests_or_answers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import baselines

    stored = {"limit": 300, "answers": 100, "test": ["a.test.jsonl", "b.test.jsonl"]}
    path = tmp_path / "base.json"
    baselines.same(path, stored, {"answers": 100, "test": baselines.base_names(["x/b.test.jsonl", "a.test.jsonl"])})
    baselines.same(path, {"limit": 300}, {"limit": 300, "test": ["a.test.jsonl"]})
    for wanted in ({"answers": 10}, {"test": ["a.test.jsonl"]}, {"limit": 1}):
        with pytest.raises(SystemExit, match="made with --"):
            baselines.same(path, stored, wanted)


def test_baselines_do_not_write_one_task_over_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import baselines

    row = {"task": "q", "log_likelihood": -1.0, "reference_tokens": 2, "skipped": []}
    monkeypatch.setattr(baselines, "evaluate", lambda *_, on_answer, **__: on_answer(row))
    assert baselines.score(tmp_path / "x.gguf", ["q.en.jsonl"], 1, 0, 1) == {"q": {"ce": [[1.0, 2]], "skipped": [[]]}}
    with pytest.raises(SystemExit, match="task 'q' again"):
        baselines.score(tmp_path / "x.gguf", ["q.en.jsonl", "q.de.jsonl"], 1, 0, 1)


def test_train_your_own(tiny_model, tmp_path):
    folder, _ = tiny_model("llama")
    data = tmp_path / "task.jsonl"
    rows = [{"prompt": f"Add {i} and 1.", "response": f"It is {i + 1}."} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--steps", "2", "--batch-size", "2", "--grad-accum", "1", "--prior-examples", "2"]
    out = run("sh", EXAMPLES / "train_your_own.sh", folder, data, tmp_path / "out", *options)
    assert (tmp_path / "out" / "model.gguf").is_file()
    assert "routed" in out
