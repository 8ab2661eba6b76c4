"""first-run: what it prints where, what it decides, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny

from first_convert import convert
from pyfirst import FirstLlama
from pyfirst.cli.common import parse_share
from pyfirst.cli.run import build_parser, converse, main, parse_layers, run
from pyfirst.cli.session import Session
from pyfirst.errors import InputError

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def plain(tiny_model) -> str:
    """A GGUF without routers."""
    return str(tiny_model("llama")[1])


@pytest.fixture(scope="module")
def routed(tiny_model, tmp_path_factory) -> str:
    """A GGUF whose routers leave out layer 2 of 4 at threshold 0.5, whatever the prompt."""
    folder, path = tiny_model("llama")
    root = tmp_path_factory.mktemp("routed")
    recipe = tiny.recipe(
        root / "recipe",
        folder,
        weight=np.zeros((4, tiny.WIDTH), np.float32),
        bias=np.array([3, 1, -1, 3], np.float32),
        calibration={"threshold": [0.0, 0.5, 0.9], "kept": [1.0, 0.75, 0.5]},
    )
    convert.convert(base_gguf=path, first=recipe, outfile=root / "routed.gguf")
    return str(root / "routed.gguf")


def said(capfd, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, native output included."""
    capfd.readouterr()  # what making a fixture has printed
    code = main([*map(str, argv)])
    return code, *capfd.readouterr()


def as_json(capfd, *argv: str) -> dict:
    code, out, err = said(capfd, *argv, "--json")
    assert code == 0 and len(err.splitlines()) == 1, err
    return json.loads(out)


def test_help_shows_an_example_and_the_defaults(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert "first-run -m smollm2-first.gguf" in text
    for default in ("default: 128", "default: 2048", "default: 0.8"):
        assert default in " ".join(text.split())


def test_mem_tells_what_is_read(routed, capfd):
    arguments = ["-m", routed, "-p", PROMPT, "-n", 3, "--temp", 0, "--prefill", "skip", "--mem"]
    result = as_json(capfd, *arguments)
    assert result["memory"]["routed"]["kept"] == result["first"]["kept"] < result["memory"]["dense"]["kept"]
    code, out, _ = said(capfd, *arguments)
    assert code == 0 and out.startswith(result["text"]) and "read from the file, MB" in out
    assert said(capfd, "-m", routed, "--chat", "--mem")[0] == 2
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = shutil.copy(routed, folder)  # cannot be dropped from memory: told before there is an answer to lose
        code, out, err = said(capfd, "-m", copy, *arguments[2:])
        assert code == 2 and out == "" and "cannot be dropped from memory" in err


def test_streamed_text_is_the_json_text_and_first_llamas(routed, capfd):
    arguments = ("-m", routed, "-p", PROMPT, "-n", 24, "--temp", 0)
    code, out, err = said(capfd, *arguments)
    assert code == 0 and len(err.splitlines()) == 1
    for part in ("first-run: kept 3/4 layers", "prompt ", "decode 24 tokens", "tokens/s"):
        assert part in err
    result = as_json(capfd, *arguments)
    llm = FirstLlama(routed, n_ctx=512)
    expected = llm.create_completion(PROMPT, max_tokens=24, temperature=0)
    assert out == result["text"] + "\n"
    assert result["text"] == expected["choices"][0]["text"]
    assert result["finish_reason"] == expected["choices"][0]["finish_reason"]
    assert result["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert {name: result["first"][name] for name in expected["first"]} == expected["first"]
    assert result["first"]["mask"] == [True, True, False, True]
    assert result["first"]["mode"] == "routed" and result["first"]["threshold"] == 0.5
    np.testing.assert_allclose(result["first"]["scores"], llm.routing.scores, atol=1e-6)
    assert result["timings"]["decode_tokens"] == 23 and result["timings"]["prompt_tokens_per_s"] > 0
    llm.close()


def test_pieces_hold_whole_characters_and_add_up(plain):
    """A random byte-level model emits broken UTF-8 all the time: the pieces must be what one decoding gives."""
    compared = 0
    for seed in range(4):
        pieces: list[str] = []
        result = run(plain, PROMPT, temp=5.0, seed=seed, n_predict=80, on_text=pieces.append)
        assert "".join(pieces) == result["text"] and "\ufffd" not in result["text"]
        llm = FirstLlama(plain, n_ctx=512, routing=False)
        expected = llm.create_completion(PROMPT, temperature=5.0, seed=seed, max_tokens=80)
        llm.close()
        if result["usage"] == expected["usage"]:  # the parent runs on when the last character is unfinished
            assert result["text"] == expected["choices"][0]["text"]
            compared += 1
    assert compared


def test_a_character_made_of_several_tokens_is_shown_once_it_is_whole(plain, monkeypatch):
    from pyfirst.cli import session

    spelled = "日🙂é"
    with session.Session(plain) as opened:
        ids = [i for byte in spelled.encode() for i in range(tiny.VOCAB) if opened.llm.detokenize([i]) == bytes([byte])]
        assert len(ids) == len(spelled.encode())
        monkeypatch.setattr(opened.llm, "generate", lambda tokens, **_: (i for i in ids))
        opened.llm.routing = opened.llm.routing or _dense(4)
        pieces: list[str] = []
        result = opened.answer(PROMPT, n_predict=len(ids), on_text=pieces.append)
        assert pieces == list(spelled) and result["text"] == spelled
        monkeypatch.setattr(opened.llm, "generate", lambda tokens, **_: (i for i in ids))
        assert opened.answer(PROMPT, n_predict=len(ids) - 1)["text"] == spelled[:-1]


def _dense(n_layer: int):
    from pyfirst.llama import Routing

    return Routing(np.ones(n_layer, bool), None, "full", None)


def test_each_piece_is_flushed(routed, monkeypatch):
    """Whoever reads a pipe has the text while the command still runs."""
    calls: list[str] = []

    class Stdout(io.StringIO):
        def write(self, text: str) -> int:
            calls.append("write")
            return super().write(text)

        def flush(self) -> None:
            calls.append("flush")

    monkeypatch.setattr(sys, "stdout", Stdout())
    assert main(["-m", routed, "-p", PROMPT, "-n", "8", "--temp", "0"]) == 0
    assert calls.count("write") > 2
    assert all(calls[i + 1] == "flush" for i, call in enumerate(calls) if call == "write")


def test_a_reader_that_goes_away_ends_it_quietly(routed):
    command = [sys.executable, "-m", "pyfirst.cli.run", "-m", routed, "-p", PROMPT, "-n", "400", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == 0


@pytest.mark.parametrize("prefill", ["full", "skip"])
@pytest.mark.parametrize("which", ["plain", "routed"])
def test_forced_layers_are_the_ones_skipped(which, prefill, request, capfd):
    path = request.getfixturevalue(which)
    arguments = ("-m", path, "-p", PROMPT, "-n", 8, "--temp", 0, "--skip-layers", "0,3", "--prefill", prefill)
    result = as_json(capfd, *arguments)
    assert result["first"]["mask"] == [False, True, True, False]
    assert result["first"]["skipped"] == [0, 3] and result["first"]["prefill"] == prefill
    assert result["first"]["mode"] == "forced" and result["first"]["scores"] is None
    llm = FirstLlama(path, n_ctx=512, skip_layers=[0, 3], prefill=prefill)
    expected = llm.create_completion(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
    llm.close()
    assert result["text"] == expected


def test_dense_threshold_and_skip_decide(routed, plain, capfd):
    def kept(*options: str) -> int:
        return as_json(capfd, "-m", routed, "-p", PROMPT, "-n", 2, *options)["first"]["kept"]

    assert kept("--dense") == 4
    assert kept("--threshold", "0.1") == 4
    assert kept("--threshold", "0.9") == 2
    assert kept("--skip", "25%") == kept("--skip", "0.25") == 3
    assert kept("--skip", "50%") == 2
    dense = as_json(capfd, "-m", routed, "-p", PROMPT, "-n", 8, "--temp", 0, "--dense")
    without = as_json(capfd, "-m", plain, "-p", PROMPT, "-n", 8, "--temp", 0)
    assert dense["text"] == without["text"] and without["first"]["mode"] == "dense"


def test_a_file_without_routers_runs_dense_and_says_so(plain, capfd):
    code, _, err = said(capfd, "-m", plain, "-p", PROMPT, "-n", 2)
    assert code == 0 and len(err.splitlines()) == 1
    assert "kept 4/4 layers (no routers in this file)" in err


def test_seed_repeats_and_its_absence_does_not(routed):
    def text(seed: int | None) -> tuple[str, int]:
        result = run(routed, PROMPT, temp=3.0, seed=seed, n_predict=24)
        return result["text"], result["seed"]

    assert text(7) == text(7) and text(0) == text(0)
    drawn = [text(None) for _ in range(3)]
    assert len({seed for _, seed in drawn}) == 3 and len({found for found, _ in drawn}) > 1
    assert text(drawn[0][1]) == drawn[0]  # the seed that was drawn brings the text back
    llm = FirstLlama(routed, n_ctx=512)
    expected = llm.create_completion(PROMPT, temperature=3.0, seed=7, max_tokens=24)["choices"][0]["text"]
    llm.close()
    assert text(7)[0] == expected


def test_thread_count_is_ours_and_changes_nothing(routed, capfd):
    texts = []
    for threads in (1, 2, 5):
        result = as_json(capfd, "-m", routed, "-p", PROMPT, "-n", 16, "--temp", 0, "-t", threads)
        assert result["n_threads"] == threads
        texts.append(result["text"])
    assert len(set(texts)) == 1


def test_chat_uses_the_models_template_once(tiny_model, routed, capfd):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "hello"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama")[0])
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    result = as_json(capfd, "-m", routed, "--chat", "-p", "hello", "-n", 12, "--temp", 0)
    assert result["usage"]["prompt_tokens"] == len(ids)
    llm = FirstLlama(routed, n_ctx=512)
    expected = llm.create_chat_completion(messages, max_tokens=12, temperature=0)
    llm.close()
    assert result["text"] == expected["choices"][0]["message"]["content"]


def test_chat_on_stdin_remembers_and_keeps_its_mask(routed, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand again\n"))
    code, out, err = said(capfd, "-m", routed, "--chat", "-n", 6, "--temp", 0)
    assert code == 0
    lines = err.splitlines()
    assert len(lines) == 2 and all("kept 3/4" in line for line in lines)
    assert "reused" not in lines[0] and "reused" in lines[1]
    first = run(routed, "hello", chat=True, n_predict=6, temp=0)["text"]
    assert out.startswith(first + "\n")


def test_a_message_that_is_not_utf8_is_one_line(plain, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\ncaf\xe9\n"), encoding="utf-8"))
    code, out, err = said(capfd, "-m", plain, "--chat", "-n", 2, "--temp", 0)
    assert code == 2 and out.count("\n") >= 1 and "kept" in err.splitlines()[0]  # what came before is answered
    assert err.splitlines()[-1] == "first-run: error: the message on stdin is not UTF-8 text"


@pytest.mark.parametrize(
    ("closed", "options", "message"),
    [
        ("<&-", "--chat", "stdin is closed"),
        ("<&-", "-f -", "stdin is closed"),
        ("<&-", "-f - --parallel 2 --json", "stdin is closed"),
        (">&-", "-p x", "stdout is closed"),
        ("<&-", "-p x -n 2", None),
    ],
)
def test_what_is_closed_is_named(closed, options, message, plain):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = f"'{sys.executable}' -m pyfirst.cli.run -m '{plain}' {options} {closed}"
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == (2 if message else 0) and len(done.stderr.splitlines()) == 1, done.stderr
    assert message is None or done.stderr.startswith(f"first-run: error: {message}")


def test_a_long_chat_forgets_its_oldest_turns(routed, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello there\n" * 5))
    code, _, err = said(capfd, "-m", routed, "--chat", "-n", 10, "-c", 60, "--seed", 1)
    assert code == 0 and len(err.splitlines()) == 5
    # Room for an answer, not for the one token that happens to be left.
    for n, room in ((10, 10), (-1, 15), (500, 15)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello there\n" * 5))
        lengths: list[int] = []
        with Session(routed, ctx=60) as session:
            answer = session.answer

            def counted(history, session=session, answer=answer, lengths=lengths, **options):
                lengths.append(len(session.tokens(history)))
                return answer(history, **options)

            session.answer = counted  # type: ignore[method-assign]
            converse(session, n_predict=n, seed=1)
        assert len(lengths) == 5 and max(lengths) <= 60 - room


def test_prompt_from_file_and_stdin(routed, tmp_path, capfd, monkeypatch):
    text = "日本語 🙂\nline two"
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n")
    direct = as_json(capfd, "-m", routed, "-p", text, "-n", 6, "--temp", 0)
    file = as_json(capfd, "-m", routed, "-f", tmp_path / "prompt.txt", "-n", 6, "--temp", 0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode() + b"\r\n")))
    stdin = as_json(capfd, "-m", routed, "-f", "-", "-n", 6, "--temp", 0)
    assert direct["text"] == file["text"] == stdin["text"]
    assert direct["usage"] == file["usage"] == stdin["usage"]


def test_the_context_ends_the_answer(routed, capfd):
    n_prompt = as_json(capfd, "-m", routed, "-p", PROMPT, "-n", 1)["usage"]["prompt_tokens"]
    result = as_json(capfd, "-m", routed, "-p", PROMPT, "-n", -1, "-c", n_prompt + 30, "--temp", 5, "--seed", 3)
    assert result["n_ctx"] == n_prompt + 30
    if result["finish_reason"] == "length":
        assert result["usage"]["total_tokens"] == n_prompt + 30
    one = as_json(capfd, "-m", routed, "-p", PROMPT, "-n", -1, "-c", n_prompt + 1, "--temp", 0)
    assert one["usage"]["completion_tokens"] == 1 and one["finish_reason"] == "length"
    code, out, err = said(capfd, "-m", routed, "-p", PROMPT, "-c", n_prompt)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert f"{n_prompt} tokens" in err and "-c" in err
    # 2048 by default, but no more than the 512 the model was trained for
    assert as_json(capfd, "-m", routed, "-p", PROMPT, "-n", 1)["n_ctx"] == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", ""], "prompt is empty"),
        (["-f", "{empty}"], "prompt is empty"),
        (["-f", "{binary}"], "not UTF-8"),
        (["-p", "caf\udce9"], "-p is not UTF-8"),
        (["-f", "{missing}"], "No such file"),
        (["-p", "x", "-f", "{empty}"], "exclude each other"),
        ([], "no prompt"),
        (["--chat", "--json"], "--json"),
        (["-p", "word " * 600], "context holds 512"),
        (["-p", "x", "--skip-layers", "4"], "layers 0 to 3"),
        (["-p", "x", "--skip-layers", "1,two"], "--skip-layers is '1,two'"),
        (["-p", "x", "--skip-layers", "-1"], "--skip-layers is '-1'"),
        (["-p", "x", "--skip-layers", "1", "--dense"], "--dense and --skip-layers"),
        (["-p", "x", "--skip", "20"], "--skip is '20'"),
        (["-p", "x", "--skip", "much"], "--skip is 'much'"),
        (["-p", "x", "--threshold", "nan"], "threshold"),
        (["-p", "x", "--threshold", "0.5", "--skip", "20%"], "exclude each other"),
        (["-p", "x", "-n", "0"], "-n is 0"),
        (["-p", "x", "-c", "0"], "-c is 0"),
        (["-p", "x", "-t", "0"], "-t is 0"),
        (["-p", "x", "--temp", "-1"], "--temp is -1"),
        (["-p", "x", "--seed", "-5"], "--seed is -5"),
        (["-p", "x", "-m", "{missing}"], "no such file"),
        (["-p", "x", "-m", "{folder}"], "not a file"),
        (["-p", "x", "-m", "{binary}"], "not a usable GGUF"),
        (["-p", "x", "-m", "{cut}"], "GGUF"),
        (["-p", "x", "-m", "{tensors cut}"], "{tensors cut}"),
        (["-p", "x", "-m", "{plain}", "--threshold", "0.5"], "no routers"),
        (["-p", "x", "-m", "{plain}", "--skip", "20%"], "no routers"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40] or "nothing",
)
def test_wrong_input_is_one_line_and_exit_code_2(options, message, routed, plain, tmp_path, capfd):
    whole = Path(routed).read_bytes()
    for name, content in (
        ("empty", b""),
        ("binary", b"\xff\xfe\x00rubbish" * 9),
        ("cut", whole[:3000]),
        ("tensors cut", whole[:-5000]),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    names = ("empty", "binary", "missing", "folder", "cut", "tensors cut")
    places = {name: str(tmp_path / name) for name in names} | {"plain": plain}
    options = [option.format(**places) if "{" in option else option for option in options]
    if "-m" not in options:
        options += ["-m", routed]
    code, out, err = said(capfd, *options)
    assert code == 2 and out == "", err
    assert len(err.splitlines()) == 1 and err.startswith("first-run: error: ")
    assert message.format(**places) in err


def test_verbose_adds_the_traceback_and_changes_nothing_else(tmp_path, capfd):
    code, out, err = said(capfd, "-m", tmp_path / "missing.gguf", "-p", PROMPT, "--verbose")
    assert code == 2 and out == "" and "Traceback" in err
    assert err.splitlines()[-1].startswith("first-run: error: ") and "missing.gguf" in err.splitlines()[-1]


def test_skip_needs_calibration(tiny_model, tmp_path, capfd):
    folder, path = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", folder, mask=[1, 1, 0, 1])
    convert.convert(base_gguf=path, first=recipe, outfile=tmp_path / "out.gguf")
    code, _, err = said(capfd, "-m", tmp_path / "out.gguf", "-p", "x", "--skip", "20%")
    assert code == 2 and len(err.splitlines()) == 1 and "not calibrated" in err


def test_templates_that_refuse_or_are_missing(tiny_model, tmp_path, capfd):
    from first_convert.ggufio import Entry, Gguf, rewrite

    source, key = Gguf(tiny_model("llama")[1]), "tokenizer.chat_template"

    def other(name: str, template: str | None) -> Path:
        added = [] if template is None else [Entry(key, "STRING", template)]
        rewrite(source, tmp_path / name, added, lambda found: found != key)
        return tmp_path / name

    for path, message in (
        (other("raises.gguf", "{{ raise_exception('roles must alternate') }}"), "roles must alternate"),
        (other("undefined.gguf", "{{ messages[0].content.nope.deeper }}"), "undefined"),
        (other("none.gguf", None), "no chat template"),
    ):
        code, out, err = said(capfd, "-m", path, "--chat", "-p", "hello")
        assert code == 2 and out == "" and len(err.splitlines()) == 1
        assert message in err


@pytest.mark.parametrize("kind", ["empty folder", "no symbols"])
def test_no_usable_library_is_one_line(kind, tmp_path, plain):
    from test_patch import STOCK

    folder = STOCK if kind == "no symbols" else tmp_path
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pyfirst.cli.run", "-m", plain, "-p", "x"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    if kind == "no symbols":
        assert "llama_first_" in done.stderr and "unset LLAMA_CPP_LIB_PATH" in done.stderr


def test_a_terminal_that_lacks_characters_does_not_end_it(plain):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pyfirst.cli.run", "-m", plain, "-p", "日本", "-n", "60", "--temp", "5"]
    done = subprocess.run([*command, "--seed", "2"], env=env, capture_output=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert done.stdout.isascii()


def test_parse_share_and_layers():
    assert parse_share("20%") == parse_share(" 0.2 ") == 0.2
    assert parse_share("0") == 0 and parse_share("100%") == 1
    assert parse_layers("3, 5,7") == [3, 5, 7]
    for text in ("", "nan", "-1%", "101%", "%"):
        with pytest.raises(InputError):
            parse_share(text)
