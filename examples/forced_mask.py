"""Research with forced masks: what is each layer worth to a text? Works on any GGUF, with or without routers.

    python examples/forced_mask.py MODEL.gguf "The capital of France is Paris."

The text is read once a layer with that layer left out; printed is the rise of its cross-entropy in nats a token.
"""

from __future__ import annotations

import sys

import numpy as np

from pyfirst import FirstLlama


def cross_entropy(llm: FirstLlama, tokens: list[int], mask: np.ndarray) -> float:
    """Mean of -log p of all tokens but the first, nats."""
    with llm.forcing(mask):
        llm.reset()
        llm.eval(tokens)
    logits = llm.scores[: len(tokens) - 1].astype(np.float64)
    top = logits.max(-1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    return float((log_sum - logits[np.arange(len(logits)), tokens[1:]]).mean())


def main() -> None:
    # In "skip" the prompt itself leaves the layers out, so that every token of the text shows the difference.
    llm = FirstLlama(sys.argv[1], n_ctx=512, logits_all=True, routing=False, prefill="skip")
    tokens = llm.tokenize(sys.argv[2].encode())
    whole = cross_entropy(llm, tokens, np.ones(llm.n_layer, bool))
    print(f"all layers: {whole:.3f}")
    for layer in range(llm.n_layer):
        mask = np.arange(llm.n_layer) != layer
        print(f"without {layer:3d}: {cross_entropy(llm, tokens, mask) - whole:+.3f}")


if __name__ == "__main__":
    main()
