"""Every GGUF key that FiRST writes or reads, and nothing else.

The C++ side (llama-first.cpp) reads the same keys.
"""

VERSION = "first.version"
BLOCK_COUNT = "first.block_count"
EMBEDDING_LENGTH = "first.embedding_length"
ROUTER_WEIGHT = "first.router.weight"
ROUTER_BIAS = "first.router.bias"
ROUTER_NORM = "first.router.norm"
ROUTER_THRESHOLD = "first.router.threshold"
PREFILL = "first.prefill"
WINDOW = "first.window"
PROTECTED = "first.protected"
CALIBRATION_THRESHOLD = "first.calibration.threshold"
CALIBRATION_KEPT = "first.calibration.kept"
LORA_MERGED = "first.lora.merged"
LORA_RANK = "first.lora.rank"
LORA_ALPHA = "first.lora.alpha"
LORA_TARGETS = "first.lora.targets"

FORMAT_VERSION = 1
NORMS = ("none", "rms")
PREFILL_MODES = ("full", "skip")
TAGS = ("first", "layer-skipping")
