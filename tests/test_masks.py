"""first-inspect with prompts: scores and masks as torch computes them, and pictures that show both."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import tiny

from first_convert import convert
from pyfirst import masks, plots
from pyfirst.cli.inspect import main

TASKS = {"story": ["the quick brown fox", "the lazy dog"], "code": ["def f(x):", "return x + 1", "x"]}


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """(model folder, recipe, file) with routers whose decisions depend on the prompt."""
    root = tmp_path_factory.mktemp("masks")
    folder, path = tiny_model("llama")
    recipe = tiny.recipe(root / "recipe", folder, router_norm="rms", seed=2, protected=[0])
    convert.convert(base_gguf=path, first=recipe, outfile=root / "routed.gguf")
    with (root / "tasks.jsonl").open("w", encoding="utf-8") as file:
        for task, prompts in TASKS.items():
            for prompt in prompts:
                file.write(json.dumps({"task": task, "prompt": prompt}) + "\n")
    return folder, recipe, root / "routed.gguf"


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_scores_and_masks_are_those_of_torch(prefill, made, tmp_path):
    folder, recipe, path = made
    pairs = masks.prompts(["the fox"], [path.parent / "tasks.jsonl"])
    assert [task for task, _ in pairs] == ["prompt", "story", "story", "code", "code", "code"]
    seen = masks.observe(path, pairs, prefill=prefill, threads=1)
    assert seen["prefill"] == prefill and seen["layers"] == 4 and seen["threshold"] == 0.5
    config = json.loads((recipe / "first_config.json").read_text())
    other = tmp_path / "recipe"
    other.mkdir()
    (other / "first_routers.safetensors").write_bytes((recipe / "first_routers.safetensors").read_bytes())
    (other / "first_config.json").write_text(json.dumps({**config, "prefill": prefill}))
    net = tiny.load(folder)
    for row in seen["prompts"]:
        ids = tiny.tokenizer()(chat(row["prompt"]))["input_ids"]
        mask, scores = tiny.decide(net, other, ids)
        assert row["tokens"] == len(ids)
        assert np.abs(np.array(row["scores"]) - scores).max() < 2e-3
        assert row["mask"] == mask.tolist()
    every = np.array([row["mask"] for row in seen["prompts"]])
    assert seen["keep_rate"] == pytest.approx(every.mean(0).tolist())
    assert seen["task_keep_rate"]["code"] == pytest.approx(every[3:].mean(0).tolist())
    assert seen["distinct"] == len({tuple(mask) for mask in every.tolist()}) > 1


SEEN = {
    "model": "some.gguf",
    "layers": 3,
    "threshold": 0.5,
    "prefill": "full",
    "prompts": [
        {"task": task, "prompt": "x", "tokens": 1, "scores": scores, "mask": [s >= 0.5 for s in scores]}
        for task, scores in (
            ("a", [0.9, 0.2, 0.6]),
            ("a", [0.9, 0.2, 0.6]),
            ("b", [0.9, 0.6, 0.4]),
            ("b", [0.9, 0.6, 0.6]),
        )
    ],
    "distinct": 3,
    "keep_rate": [1.0, 0.5, 0.75],
    "task_keep_rate": {"a": [1.0, 0.0, 1.0], "b": [1.0, 1.0, 0.5]},
    "guess": 0.75,
    "chance": 0.5,
}


def test_plain_text_shows_each_mask_under_its_task(capsys):
    masks.show(SEEN)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "a", "b"]
    assert [line.split() for line in lines[1:4]] == [
        ["2", "##", "100%", ".#", "50%"],
        ["1", "..", "0%", "##", "100%"],
        ["0", "##", "100%", "##", "100%"],
    ]
    assert "   2 of 3            3  ##############################" in lines
    assert "   3 of 3            1  ##########" in lines
    assert "4 prompts, 3 different masks, 75% of the layers kept on average" in lines
    assert "1 layers are always kept, 0 never, 2 depend on the prompt" in lines
    assert any("75% of prompts go to the right task (50% by chance)" in line for line in lines)


def test_many_prompts_fit_the_width():
    rows = [{**row, "task": task} for task in "abc" for row in SEEN["prompts"] * 30]
    seen = {**SEEN, "prompts": rows, "task_keep_rate": {task: [1.0, 0.5, 0.75] for task in "abc"}}
    for line in masks.heatmap(seen, 80):
        assert len("".join(text for text, _ in line).rstrip()) <= 80


def test_a_picture_has_room_for_many_tasks(tmp_path, recwarn):
    tasks = [f"task{i}" for i in range(30)]
    rows = [{**row, "task": task} for task in tasks for row in SEEN["prompts"]]
    seen = {**SEEN, "prompts": rows, "task_keep_rate": {task: [1.0, 0.5, 0.75] for task in tasks}}
    plots.masks(seen, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn]  # of a layout that collapsed


def test_a_terminal_gets_colours_and_without_rich_the_text(monkeypatch, capsys):
    plain = masks.heatmap(SEEN, 100)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    masks.show(SEEN)
    assert "\x1b[" in capsys.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else find(name, *rest))
    masks.show(SEEN)
    out = capsys.readouterr().out
    assert "\x1b[" not in out and "".join(text for text, _ in plain[1]).rstrip() in out


def test_picture_and_json_of_the_command(made, tmp_path, capsys):
    path, plot = made[2], tmp_path / "masks.png"
    data = str(path.parent / "tasks.jsonl")
    assert main([str(path), "--data", data, "--limit", "3", "-p", "the dog", "-t", "1", "--plot", str(plot)]) == 0
    assert "4 prompts" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([str(path), "-p", "the dog", "-t", "1", "--threshold", "0", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["masks"]
    assert seen["keep_rate"] == [1.0] * 4 and seen["guess"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{plain}", "-p", "x"], "no routers in this file"),
        (["{routed}", "--plot", "x.png"], "--plot needs prompts"),
        (["{routed}", "-p", "x", "--plot", "x.doc"], "--plot x.doc"),
        (["{routed}", "--data", "{tasks}", "--plot", "{tasks}"], "tasks.png: is read"),
        (["{routed}", "--data", "{missing}"], "no such file"),
        (["{routed}", "--data", "{bad}"], "bad.jsonl:1: expected an object with a text 'prompt'"),
        (["{routed}", "-p", "the dog " * 20, "-c", "16"], "expected 1 to 16; see -c"),
        (["{routed}", "-p", "x", "--limit", "0"], "--limit is 0"),
        (["{routed}", "-p", "caf\udce9"], "-p is not UTF-8"),
    ],
)
def test_wrong_input_is_one_line(options, message, made, tiny_model, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text('{"task": "x"}\n')
    names = {
        "plain": tiny_model("llama")[1],
        "routed": made[2],
        "missing": tmp_path / "no",
        "bad": tmp_path / "bad.jsonl",
        "tasks": tmp_path / "tasks.png",
    }
    (tmp_path / "tasks.png").write_text('{"prompt": "x"}\n')
    assert main([option.format(**names) for option in options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
