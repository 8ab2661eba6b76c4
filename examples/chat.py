"""A chat in the terminal that shows, turn by turn, which layers answer.

python examples/chat.py MODEL.gguf          (an empty line ends it)
"""

from __future__ import annotations

import sys
from typing import Any

from pyfirst import FirstLlama


def main() -> None:
    llm = FirstLlama(sys.argv[1], n_ctx=1024)
    messages: list[dict[str, Any]] = []
    while text := (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip():
        messages.append({"role": "user", "content": text})
        answer = ""
        for chunk in llm.create_chat_completion(messages, max_tokens=128, temperature=0.0, stream=True):
            piece = chunk["choices"][0]["delta"].get("content") or ""
            answer += piece
            print(piece, end="", flush=True)
        assert llm.routing is not None
        print("\n  " + "".join("#" if keep else "." for keep in llm.routing.mask))
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
