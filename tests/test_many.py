"""first-run --parallel: a line of JSON for each line of JSON, as if each prompt had been run alone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from pyfirst.cli import many
from pyfirst.cli.common import MAX_CTX
from pyfirst.cli.run import main, run


@pytest.fixture(scope="module")
def model(files) -> str:
    return str(files["full"][2])


WORDS = tiny.TEXT.split()
PROMPTS = [" ".join(WORDS[i : i + 2 + i % 5]) for i in range(12)]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_line_is_answered_as_alone_and_in_order(model, tmp_path, capfd):
    rows: list = [{"prompt": prompt, "max_tokens": 3 + 5 * (i % 4)} for i, prompt in enumerate(PROMPTS)]
    rows[3] = PROMPTS[3]
    rows[4] |= {"references": ["as in a file for first-eval"], "task": "any"}
    file = write(tmp_path / "p.jsonl", rows)
    arguments = ["-m", model, "-f", str(file), "--parallel", "4", "--json", "-n", "9", "--temp", "0.9", "--seed", "40"]
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and "12 prompts" in err and "tokens/s" in err and "of the layers" in err
    found = answers(out)
    assert [row["line"] for row in found] == list(range(1, 13))
    for i, row in enumerate(found):
        n = rows[i]["max_tokens"] if isinstance(rows[i], dict) else 9
        alone = run(model, PROMPTS[i], n_predict=n, temp=0.9, seed=40 + i)
        assert (row["text"], row["finish_reason"], row["usage"]) == (
            alone["text"],
            alone["finish_reason"],
            alone["usage"],
        )
        assert row["first"]["skipped"] == alone["first"]["skipped"] and row["seed"] == 40 + i
    assert len({tuple(row["first"]["skipped"]) for row in found}) > 1
    assert f"kept {np.mean([row['first']['kept'] for row in found]) / 4:.0%} of the layers" in err


def test_verbose_shows_the_log_of_llama_cpp(model, tmp_path, capfd):
    file = write(tmp_path / "p.jsonl", PROMPTS[:2])
    assert main(["-m", model, "-f", str(file), "--parallel", "2", "--json", "-n", "2", "--verbose"]) == 0
    out, err = capfd.readouterr()
    assert len(answers(out)) == 2 and "llama_context:" in err and "2 prompts" in err


def test_options_of_a_line_are_for_that_line_alone(model, tmp_path, capfd):
    chat = [{"role": "user", "content": "the lazy dog"}]
    rows = [
        {"prompt": "the quick", "first": {"dense": True}, "id": "a", "response": "of training data"},
        {"prompt": "the quick", "first": {"mask": [True, False, True, True]}},
        {"prompt": "the quick", "first": {"threshold": 1.0}},
        {"prompt": "the quick", "first": {"skip": 0.0}, "stop": "q", "top_k": 1, "temperature": 1.5},
        {"messages": chat},
        {"prompt": "the quick"},
    ]
    file = write(tmp_path / "p.jsonl", rows)
    assert main(["-m", model, "-f", str(file), "--parallel", "3", "--json", "-n", "8", "--temp", "0"]) == 0
    found = answers(capfd.readouterr()[0])
    assert found[0]["id"] == "a" and found[0]["first"]["skipped"] == []
    assert found[1]["first"]["skipped"] == [1]
    assert found[2]["first"]["kept"] == 0 and found[2]["first"]["threshold"] == 1.0
    assert found[3]["first"]["threshold"] == 0.0 and found[3]["first"]["skipped"] == []
    assert found[4]["text"] == run(model, "the lazy dog", chat=True, n_predict=8, temp=0)["text"]
    assert found[5]["text"] == run(model, "the quick", n_predict=8, temp=0)["text"]
    assert found[1]["text"] == run(model, "the quick", n_predict=8, temp=0, skip_layers=[1])["text"]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--dense", {"dense": True}),
        ("--skip 0%", {"skip": 0.0}),
        ("--skip 0.8", {"skip": 0.8}),
        ("--threshold 0.1", {"threshold": 0.1}),
        ("--skip-layers 1,2", {"skip_layers": [1, 2]}),
        ("--prefill skip", {"prefill": "skip"}),
    ],
)
def test_an_option_decides_for_all_lines_as_it_does_alone(options, settings, model, tmp_path, capfd):
    file = write(tmp_path / "p.jsonl", PROMPTS[:3])
    command = ["-m", model, "-f", str(file), "--parallel", "2", "--json", "-n", "6", "--temp", "0"]
    assert main(command) == main([*command, *options.split()]) == 0
    rows = answers(capfd.readouterr()[0])
    for prompt, usual, row in zip(PROMPTS, rows[:3], rows[3:], strict=False):
        alone = run(model, prompt, n_predict=6, temp=0, **settings)
        assert row["text"] == alone["text"]
        for name in ("kept", "skipped", "prefill"):
            assert row["first"][name] == alone["first"][name]
        assert row["first"] != usual["first"]


def test_the_batch_is_as_large_as_was_asked_for(model, tmp_path, monkeypatch, capfd):
    """Without -c as large as first-run makes it for one prompt, if memory and model allow it."""
    made = []

    class Seen(many.FirstBatch):
        def __init__(self, path, **kwargs):
            super().__init__(path, **kwargs)
            made.append((self.n_parallel, self.n_ctx, self.n_threads, kwargs["max_ctx"]))

    monkeypatch.setattr(many, "FirstBatch", Seen)
    file = write(tmp_path / "p.jsonl", PROMPTS[:1])
    assert main(["-m", model, "-f", str(file), "--parallel", "3", "--json", "-c", "96", "-t", "1", "-n", "1"]) == 0
    assert main(["-m", model, "-f", str(file), "--parallel", "1", "--json", "-n", "-1", "--temp", "0"]) == 0
    assert made[0][:3] == (3, 96, 1) and made[1][3] == MAX_CTX
    row = answers(capfd.readouterr()[0])[1]  # -1: to the end of the text, or of the context
    assert row["usage"] == run(model, PROMPTS[0], n_predict=-1, temp=0)["usage"] and row["finish_reason"]


def test_lines_that_cannot_be_answered_do_not_stop_the_others(model, tmp_path, capfd):
    bad = [
        "the quick " * 300,
        "",
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "tempreature": 1},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "temperature": "hot"},
        {"prompt": "x", "seed": -4},
        {"prompt": "x", "temperature": 10**400},
        {"prompt": "x", "presence_penalty": -1e39},
        {"prompt": "x", "first": {"mask": [True]}},
        {"prompt": "x", "first": {"mask": [1, 1, 1, 1]}},
        {"prompt": "x", "first": {"skip": 7}},
        {"prompt": "x", "first": {"threshold": "low"}},
        {"prompt": "x", "first": {"dense": 1}},
        {"prompt": "x", "first": {"threshold": 1, "dense": True}},
        {"prompt": "x", "first": 3},
        {"prompt": 5},
        {"messages": []},
        {"messages": [3]},
        {"prompt": "x", "messages": []},
        {},
        7,
    ]
    expected = ["tokens", "empty", "max_tokens is 0", "'tempreature'", "temperature is -1", "temperature is 'hot'"]
    expected += ["seed is -4", "at most 3.40282e+38", "presence_penalty is -1e+39"]
    expected += ["[1]", "expected a list of true and false", "7", "'low', expected a number", "1, expected true"]
    expected += ["exclude", "first is a int", "prompt is a int", "empty"]
    expected += ["message 0", "one of", "one of", "found int"]
    rows = [row for entry in bad for row in (entry, "the quick")]
    file = write(tmp_path / "p.jsonl", rows)
    with file.open("ab") as raw:
        raw.write(b'{"prompt": "cut\n\xff\xfe\n')
    code = main(["-m", model, "-f", str(file), "--parallel", "4", "--json", "-n", "4", "--temp", "0"])
    out, err = capfd.readouterr()
    found = answers(out)
    assert code == 2 and err.splitlines()[-1].startswith("first-run: error: 24 of 46 lines not answered; line 1: ")
    good = run(model, "the quick", n_predict=4, temp=0)["text"]
    assert all(row["text"] == good for row in found[1:44:2])
    for row, words in zip(found[:44:2], expected, strict=True):
        assert words in row["error"], row
    assert all("JSON" in row["error"] for row in found[44:])


def test_an_interrupted_run_goes_on_where_it_stopped(model, tmp_path, capfd):
    file = write(tmp_path / "p.jsonl", PROMPTS)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options = ["-m", model, "-f", str(file), "--parallel", "3", "--json", "-n", "6", "--temp", "1", "--seed", "5"]
    assert main([*options, "-o", str(whole)]) == 0
    expected = whole.read_bytes()
    lines = expected.splitlines(keepends=True)
    for cut in (0, len(lines[0]), len(lines[0]) + 1, len(expected) - 1, len(expected) - len(lines[-1]), len(expected)):
        part.write_bytes(expected[:cut])
        capfd.readouterr()
        assert main([*options, "-o", str(part)]) == 0
        out, err = capfd.readouterr()
        done = expected[:cut].count(b"\n")
        assert part.read_bytes() == expected and out == ""
        assert f"({done} answered before)" in err or done == 0


def test_killed_in_the_middle_it_repeats_nothing(model, tmp_path):
    file, out = write(tmp_path / "p.jsonl", PROMPTS * 3), tmp_path / "out.jsonl"
    options = ["-m", model, "-f", str(file), "--parallel", "2", "--json", "-n", "200", "-t", "1", "--seed", "1"]
    command = [sys.executable, "-m", "pyfirst.cli.run", *options, "-o", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 4):
            time.sleep(0.02)
        process.kill()
    before = out.read_bytes()
    assert 4 <= before.count(b"\n") < 36
    assert main([*options, "-o", str(out)]) == 0
    after = out.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    assert [row["line"] for row in answers(after.decode())] == list(range(1, 37))


def test_an_outfile_of_something_else_is_refused_and_kept(model, tmp_path, capfd):
    file = write(tmp_path / "p.jsonl", PROMPTS[:3])
    options = ["-m", model, "--parallel", "2", "--json", "-n", "2", "--temp", "0"]
    out = tmp_path / "out.jsonl"
    assert main([*options, "-f", str(file), "-o", str(out)]) == 0
    content = out.read_bytes()
    other = write(tmp_path / "q.jsonl", [PROMPTS[0], "changed", PROMPTS[2]])
    shorter = write(tmp_path / "s.jsonl", PROMPTS[:2])
    for prompts, message in ((other, "line 2"), (shorter, "line 3")):
        assert main([*options, "-f", str(prompts), "-o", str(out)]) == 2
        assert message in capfd.readouterr()[1] and out.read_bytes() == content
    # Answers to other options too; those that change no answer may be others.
    changes = "--chat|--dense|--threshold 0.4|--skip 50%|--skip-layers 1|--prefill skip|-n 3|--temp 1|--seed 1|-c 99"
    for change in changes.split("|"):
        assert main([*options, "-f", str(file), "-o", str(out), *change.split()]) == 2, change
        said = capfd.readouterr()[1]
        assert "line 1 does not answer" in said and "these options" in said and out.read_bytes() == content
    assert main([*options, "-f", str(file), "-o", str(out), "--parallel", "3", "-t", "1"]) == 0
    assert "(3 answered before)" in capfd.readouterr()[1] and out.read_bytes() == content
    for notes in ("my notes\n", "my notes", '{"line": 1, "input": "0123', "[" * 5000 + "\n"):
        (tmp_path / "notes.txt").write_text(notes)
        assert main([*options, "-f", str(file), "-o", str(tmp_path / "notes.txt")]) == 2
        assert (tmp_path / "notes.txt").read_text() == notes
    # The same model by another name, and another of the same name: answers would be mixed with these.
    same = Path(model).read_bytes()
    for name, weights in (("other.gguf", same), (Path(model).name, same[:-4] + bytes(4))):
        (tmp_path / name).write_bytes(weights)
        assert main(["-m", str(tmp_path / name), *options[2:], "-f", str(file), "-o", str(out)]) == 2
        assert "line 1 does not answer" in capfd.readouterr()[1] and out.read_bytes() == content


def test_a_device_holds_no_answers(model):
    assert many.run_many(model, [b'"the"'], out=Path("/dev/null"), parallel=1, n_predict=1)["resumed"] == 0
    if Path("/dev/full").exists():  # read, it never ends
        with pytest.raises(OSError, match="No space"):
            many.run_many(model, [b'"the"'], out=Path("/dev/full"), parallel=1, n_predict=1)


def test_what_the_output_cannot_show_is_escaped(model, tmp_path, monkeypatch):
    rows = [
        '"once"',
        '{"prompt": "the", "id": "\\ud800"}',
        '{"prompt": "the", "\\ud800": 1}',
        '{"prompt": "a", "id": "é"}',
    ]
    raw = [row.encode() for row in rows]
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # and such answers are known again
        result = many.run_many(model, raw, out=out, parallel=2, n_predict=2, seed=1)
    assert result["resumed"] == 4 and "é" in out.read_text(encoding="utf-8")
    found = answers(out.read_text(encoding="utf-8"))
    assert found[1]["id"] == "\ud800" and "unknown field '\ud800'" in found[2]["error"] and found[3]["id"] == "é"
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    many.run_many(model, raw, parallel=2, n_predict=2, seed=1)
    assert answers(ascii_only.buffer.getvalue().decode("ascii")) == found  # type: ignore[attr-defined]


def test_progress_is_for_terminals_on_stderr(model, tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "p.jsonl", PROMPTS[:4])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["-m", model, "-f", str(file), "--parallel", "2", "--json", "-n", "3", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert len(answers(out)) == 4 and "4/4" in err and "tokens/s" in err


def test_stdin_and_blank_lines(model, capfd, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf"the quick"\n\n{"prompt": "brown"}\r\n'))
    )
    assert main(["-m", model, "-f", "-", "--parallel", "2", "--json", "-n", "2", "--temp", "0"]) == 0
    assert [row["line"] for row in answers(capfd.readouterr()[0])] == [1, 2]


def test_a_slow_line_holds_back_a_bounded_number_of_others(model, monkeypatch, capfd):
    monkeypatch.setattr(many, "AHEAD", 2)
    rows = [json.dumps({"prompt": "the", "max_tokens": 300 if i == 0 else 1, "temperature": 5}) for i in range(20)]
    result = many.run_many(model, [row.encode() for row in rows], parallel=2, seed=3)
    assert result["lines"] == 20 and result["errors"] == 0 and np.isfinite(result["kept"])
    assert [row["line"] for row in answers(capfd.readouterr()[0])] == list(range(1, 21))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel", "0", "-f", "{file}", "--json"], "--parallel is 0"),
        (["--parallel", "2", "--json", "-p", "x"], "-f FILE"),
        (["--parallel", "2", "-f", "{file}"], "--json"),
        (["-o", "out", "-p", "x"], "-o goes with --parallel"),
        (["--parallel", "9999", "-f", "{file}", "--json"], "n_parallel is 9999"),
        (["--parallel", "2", "-f", "{empty}", "--json"], "no prompts"),
        (["--parallel", "2", "-f", "{missing}", "--json"], "No such file"),
        (["--parallel", "2", "-f", "{file}", "--json", "--skip-layers", "4"], "layers 0 to 3"),
        (["--parallel", "2", "-f", "{file}", "--json", "-o", "{missing}/out"], "No such file"),
    ],
)
def test_wrong_options_are_one_line(options, message, model, tmp_path, capfd):
    write(tmp_path / "file", PROMPTS[:2])
    (tmp_path / "empty").write_text("\n")
    places = {name: str(tmp_path / name) for name in ("file", "empty", "missing")}
    assert main(["-m", model, *[option.format(**places) for option in options]]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
