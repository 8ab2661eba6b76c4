"""LangChain's ChatLlamaCpp on a FiRST file; shows for each answer which layers were left out.

pip install langchain-community
LLAMA_CPP_LIB_PATH=$(python -m pyfirst lib-path) python examples/langchain_chat.py MODEL.gguf "Name three rivers."
"""

from __future__ import annotations

import sys

import llama_cpp
from langchain_community.chat_models import ChatLlamaCpp

from pyfirst import FirstLlama

# LangChain makes its llama_cpp.Llama itself; ours decides for each prompt anew.
llama_cpp.Llama = FirstLlama  # type: ignore[misc]


def main() -> None:
    model, *questions = sys.argv[1:]
    chat = ChatLlamaCpp(model_path=model, n_ctx=1024, max_tokens=64, temperature=0.0, verbose=False)
    for question in questions:
        for chunk in chat.stream(question):
            print(chunk.content, end="", flush=True)
        print(f"\n  {chat.client.routing.report()}")


if __name__ == "__main__":
    main()
