"""The main job on a real model: convert SmolLM2 with its recipe, then answer three prompts with layers left out.

Run it with ``make demo``. It shows each command before it runs it; all files land in build/demo.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pyfirst import FirstLlama

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "demo"
RECIPE = ROOT / "examples" / "smollm2-135m"
PROMPTS = {
    "summarize": "Summarize this abstract in one sentence.\n\n"
    "Small computers are cheap and everywhere, yet language models rarely run on them at a comfortable speed, "
    "because every generated token reads all weights from memory. We train a small router for each layer that "
    "reads the prompt once and decides which layers can be left out while the answer is written. As skipped layers "
    "need no keys and values, the cache stays valid. On three tasks a quarter of the layers can be skipped, and "
    "the answers stay close to those of the whole model after a short fine-tuning.",
    "describe": "Write one or two sentences that describe this restaurant.\n\n"
    "name[The Copper Kettle], eatType[coffee shop], food[Italian], priceRange[cheap], area[riverside], "
    "familyFriendly[yes]",
    "math": "A baker fills 6 trays with 8 rolls each and sells 30 rolls before noon. "
    "How many rolls are left for the afternoon?",
}


def shell(*command: str | Path) -> None:
    words = [str(word) for word in command]
    shown = [str(Path(word).relative_to(ROOT)) if word.startswith(str(ROOT)) else word for word in words]
    print("$", shlex.join(["python" if shown[0] == str(Path(sys.executable)) else shown[0], *shown[1:]]), flush=True)
    subprocess.run(words, check=True)


def decode_speed(llm: FirstLlama, prompt: list[int], n: int = 32) -> float:
    """Tokens per second after the first token, greedy, without stopping."""
    tokens = llm.generate(prompt, temp=0.0)
    next(tokens)
    start = time.perf_counter()
    for _ in range(n):
        next(tokens)
    return n / (time.perf_counter() - start)


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    hf, gguf = WORK / "smollm2-hf", WORK / "smollm2-first-q4_0.gguf"
    bin_dir = Path(sys.executable).parent
    if not (hf / "config.json").exists():
        shell(sys.executable, ROOT / "examples" / "smollm2_hf.py", hf)
    shell(bin_dir / "first-convert", hf, "--first", RECIPE, "--outfile", gguf, "--outtype", "q4_0", "--force")

    llm = FirstLlama(gguf, n_ctx=1024)
    dense = np.ones(llm.n_layer, bool)
    for task, text in PROMPTS.items():
        messages = [{"role": "user", "content": text}]
        answer = llm.create_chat_completion(messages, temperature=0, repeat_penalty=1.1, max_tokens=96)
        report, routing = answer["first"], llm.routing
        assert routing is not None
        marks = "".join("█" if keep else "·" for keep in routing.mask)
        print(f"\n[{task}] {text.splitlines()[-1][:90]}...")
        print(f"  {answer['choices'][0]['message']['content'].strip()}")
        print(f"  layers {marks}  {report['kept']}/{report['n_layer']} kept")

        prompt = llm.input_ids[: answer["usage"]["prompt_tokens"]].tolist()
        speeds: dict[str, list[float]] = {"routed": [], "dense": []}
        for _ in range(3):
            for name, forced in (("routed", None), ("dense", dense)):
                with llm.forcing(forced):
                    speeds[name].append(decode_speed(llm, prompt))
        routed, whole = (statistics.median(speeds[name]) for name in ("routed", "dense"))
        print(f"  decode {routed:.1f} tokens/s, dense {whole:.1f} tokens/s: {routed / whole:.2f}x")


if __name__ == "__main__":
    main()
