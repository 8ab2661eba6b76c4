"""Many prompts at once, each with its own layers.

python examples/batch.py MODEL.gguf < prompts.txt          (one prompt a line)
"""

from __future__ import annotations

import sys

from pyfirst import FirstBatch


def main() -> None:
    prompts = [line.strip() for line in sys.stdin if line.strip()]
    with FirstBatch(sys.argv[1], n_parallel=4, n_ctx=256) as batch:
        for prompt, result in zip(prompts, batch.generate(prompts, max_tokens=32, temperature=0.0), strict=True):
            first = result["first"]
            print(f"{first['kept']} of {first['n_layer']} layers\t{prompt!r}\t{result['choices'][0]['text']!r}")


if __name__ == "__main__":
    main()
