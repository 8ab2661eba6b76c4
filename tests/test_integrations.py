"""The examples for `llm` and LangChain, run as their docstrings say; each where its packages are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyfirst import FirstLlama, native

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
QUESTIONS = ["the quick brown fox", "Съешь же ещё"]


def run(*command: object, **env: str) -> tuple[str, str]:
    """(stdout, stderr)"""
    path = os.pathsep.join([*env.pop("PYTHONPATH", "").split(os.pathsep), *sys.path])
    settings = {**os.environ, "LLAMA_CPP_LIB_PATH": str(native.lib_dir()), **env, "PYTHONPATH": path}
    done = subprocess.run([str(word) for word in command], env=settings, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_langchain(model):
    out = run(sys.executable, "-W", "ignore", EXAMPLES / "langchain_chat.py", model, *QUESTIONS)[0]
    llm = FirstLlama(model, n_ctx=1024)
    expected = ""
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        answer = llm.create_chat_completion(messages, max_tokens=64, temperature=0.0, repeat_penalty=1.1)
        expected += f"{answer['choices'][0]['message']['content']}\n  {answer['first']}\n"
    assert out == expected


def test_llm(model, tmp_path):
    pytest.importorskip("llm_gguf", reason="llm-gguf is not installed")
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", tmp_path / "plugin")
    shutil.copytree(EXAMPLES / "llm_plugin", tmp_path / "source")
    run(sys.executable, *install, tmp_path / "source")
    env = {"PYTHONPATH": str(tmp_path / "plugin"), "LLM_USER_PATH": str(tmp_path / "home"), "LLM_FIRST_REPORT": "1"}
    run(sys.executable, "-m", "llm", "gguf", "register-model", "tiny", model, "--n-ctx", "256", **env)
    llm = FirstLlama(model, n_ctx=256, chat_format="chatml-function-calling")
    for question in QUESTIONS:
        answer = llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=1)
        out, err = run(sys.executable, "-m", "llm", "-m", "gguf/tiny", "--no-log", question, **env)
        assert out and err.strip().splitlines()[-1] == str(answer["first"])
