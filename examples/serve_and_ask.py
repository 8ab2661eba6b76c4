"""Start first-serve, ask it with the openai client, and see which layers each answer took.

python examples/serve_and_ask.py MODEL.gguf "Name three rivers." "What is 3 times 4?"
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from openai import OpenAI


def main() -> None:
    model, *questions = sys.argv[1:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pyfirst.cli.serve", "-m", model, "--port", str(port), "--parallel", "4"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                if server.poll() is not None:
                    sys.exit("first-serve did not start; run it by hand to see why")
                time.sleep(0.1)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

        def ask(question: str) -> str:
            messages = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(
                model="first", messages=messages, max_tokens=24, temperature=0, extra_body={"first": {"dense": False}}
            )
            return f"{answer.first['kept']} of {answer.first['n_layer']} layers\t{answer.choices[0].message.content!r}"

        with ThreadPoolExecutor() as pool:  # at the same time: the server batches them
            for line in pool.map(ask, questions):
                print(line)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
