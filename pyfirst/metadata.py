"""Every GGUF key that FiRST writes or reads, and values that some may have; llama-first.cpp reads those in ROUTING."""

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
# Provenance. Source names are "checkpoint/FILE", "recipe/FILE", "adapter/FILE" or "base/FILE", without folders.
RECIPE_NAME = "first.recipe.name"
RECIPE_BASE_MODEL = "first.recipe.base_model"
SOURCE_NAMES = "first.source.names"
SOURCE_SHA256 = "first.source.sha256"
MADE_PYFIRST = "first.made.pyfirst"
MADE_LLAMA_CPP = "first.made.llama_cpp"
MADE_DATE = "first.made.date"

# A file with any of these is meant to route, and then needs all of REQUIRED.
REQUIRED = (VERSION, BLOCK_COUNT, EMBEDDING_LENGTH, ROUTER_WEIGHT, ROUTER_BIAS)
ROUTING = (
    *REQUIRED,
    ROUTER_NORM,
    ROUTER_THRESHOLD,
    PREFILL,
    WINDOW,
    PROTECTED,
    CALIBRATION_THRESHOLD,
    CALIBRATION_KEPT,
)

FORMAT_VERSION = 1
NORMS = ("none", "rms")
PREFILL_MODES = ("full", "skip")
TAGS = ("first", "layer-skipping")
