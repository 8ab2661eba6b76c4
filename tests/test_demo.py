"""The real model through the whole chain. Slow: it converts SmolLM2 and trains nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_make_demo_answers_three_prompts_with_layers_left_out():
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    kept = re.findall(r"layers ([█·]{30})  (\d+)/30 kept", result.stdout)
    assert len(kept) == 3
    for marks, count in kept:
        assert marks.count("█") == int(count) < 30
    assert len({marks for marks, _ in kept}) > 1, "prompts of different kinds must get different masks"
    assert len(re.findall(r"decode [\d.]+ tokens/s, dense [\d.]+ tokens/s: [\d.]+x", result.stdout)) == 3
