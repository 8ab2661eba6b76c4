"""A recipe directory: the routers, their configuration and, if trained, a PEFT LoRA.

``first-train`` writes it, ``first-convert`` reads it::

    first_config.json  first_routers.safetensors  [adapter_config.json adapter_model.safetensors]  README.md
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst.errors import InputError
from pyfirst.metadata import FORMAT_VERSION, NORMS, PREFILL_MODES

CONFIG_NAME = "first_config.json"
ROUTERS_NAME = "first_routers.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, a JSON object whose keys are all different. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{twice}' is there twice; remove one")
    return found


def read_json(path: Path, *, once: bool = False) -> dict[str, Any]:
    """A JSON object from a UTF-8 file. Raises InputError naming the file, with ``once`` for a key that is there twice.

    Files of others keep the last value of such a key, as for transformers.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique if once else None)
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


@dataclass
class FirstConfig:
    """What ``first_config.json`` holds; the defaults are those of absent GGUF keys too.

    Attributes:
        block_count: number of layers L of the base model.
        embedding_length: width D of the residual stream.
        router_norm: "none", or "rms" for RMS normalisation without gain before the router.
        threshold: a layer is kept when its mean score reaches this, in [0, 1].
        prefill: "full" (the prompt runs all layers) or "skip" (the prompt skips too).
        window: in "skip", at most this many first prompt tokens decide.
        protected: layer indices (from 0) that are never skipped.
        base_model: name of the base checkpoint, for provenance.
        calibration: {"threshold": [...], "kept": [...]}, mean share of layers kept at each threshold.
        training: free-form record of how the recipe was made.
    """

    block_count: int
    embedding_length: int
    version: int = FORMAT_VERSION
    router_norm: str = "none"
    threshold: float = 0.5
    prefill: str = "full"
    window: int = 512
    protected: list[int] = field(default_factory=list)
    base_model: str = ""
    calibration: dict[str, list[float]] = field(default_factory=lambda: {"threshold": [], "kept": []})
    training: dict[str, Any] = field(default_factory=dict)

    def validate(self, source: str | Path) -> None:
        """Raise InputError naming ``source`` and the first key whose value is not usable."""

        def check(ok: bool, key: str, expected: str) -> None:
            if not ok:
                raise InputError(f"{source}: '{key}' is {getattr(self, key)!r}, expected {expected}")

        def integer(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def share(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1

        supported = integer(self.version) and self.version == FORMAT_VERSION
        check(supported, "version", f"{FORMAT_VERSION} (made by a newer pyfirst?)")
        check(integer(self.block_count) and self.block_count > 0, "block_count", "a positive integer")
        check(
            integer(self.embedding_length) and self.embedding_length > 0,
            "embedding_length",
            "a positive integer",
        )
        check(self.router_norm in NORMS, "router_norm", f"one of {', '.join(NORMS)}")
        check(self.prefill in PREFILL_MODES, "prefill", f"one of {', '.join(PREFILL_MODES)}")
        check(integer(self.window) and 0 < self.window < 2**32, "window", "a positive number of tokens")
        check(share(self.threshold), "threshold", "a number from 0 to 1")
        check(
            isinstance(self.protected, list)
            and all(integer(i) and 0 <= i < self.block_count for i in self.protected)
            and len(set(self.protected)) == len(self.protected),
            "protected",
            f"a list of layer indices from 0 to {self.block_count - 1}, each once",
        )
        check(
            isinstance(self.base_model, str) and not re.search("[\ud800-\udfff]", self.base_model),
            "base_model",
            "a name, without half of a UTF-16 pair",
        )
        check(
            isinstance(self.training, dict) and isinstance(self.training.get("options", {}), dict),
            "training",
            "an object, and so its 'options'",
        )
        calibration = self.calibration
        check(
            isinstance(calibration, dict)
            and isinstance(calibration.get("threshold"), list)
            and isinstance(calibration.get("kept"), list)
            and len(calibration["threshold"]) == len(calibration["kept"])
            and all(map(share, (*calibration["threshold"], *calibration["kept"]))),
            "calibration",
            "two lists 'threshold' and 'kept' of equal length, of numbers from 0 to 1",
        )

    @classmethod
    def load(cls, path: str | Path) -> FirstConfig:
        """Read and validate ``first_config.json``. Raises InputError."""
        data = read_json(Path(path), once=True)
        for key in ("version", "block_count", "embedding_length"):
            if key not in data:
                raise InputError(f"{path}: required key '{key}' is missing")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise InputError(f"{path}: unknown key '{unknown[0]}' (known: {', '.join(sorted(known))})")
        config = cls(**data)
        config.validate(path)
        return config


@dataclass
class Recipe:
    """Routers and their configuration.

    Attributes:
        config: see FirstConfig.
        weight: float32 [block_count, embedding_length], row l routes layer l.
        bias: float32 [block_count].
        adapter_dir: directory of the PEFT adapter, or None when there is none.
    """

    config: FirstConfig
    weight: np.ndarray
    bias: np.ndarray
    adapter_dir: Path | None = None


def load_recipe(directory: str | Path) -> Recipe:
    """Read a recipe directory, checking every shape and value. Raises InputError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a recipe directory as first-train writes it")
    if not (directory / CONFIG_NAME).is_file():
        raise InputError(f"{directory / CONFIG_NAME}: not found; a recipe directory is what first-train writes")
    config = FirstConfig.load(directory / CONFIG_NAME)
    path = directory / ROUTERS_NAME
    if not path.is_file():
        raise InputError(f"{path}: not found; the recipe has no routers")
    try:
        # From bytes: safetensors opens paths in the locale's encoding, which may not hold them.
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    except KeyError as error:  # a type that numpy does not have
        raise InputError(f"{path}: holds a tensor that is {str(error.args[0]).lower()}, expected float32") from None
    expected = {
        "router.weight": (config.block_count, config.embedding_length),
        "router.bias": (config.block_count,),
    }
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: tensor '{name}' is missing, expected shape {list(shape)}")
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise InputError(
                f"{path}: tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, "
                f"expected float32 {list(shape)} as {CONFIG_NAME} says"
            )
        if not np.isfinite(tensor).all():
            row = int(np.argwhere(~np.isfinite(tensor))[0][0])
            raise InputError(f"{path}: tensor '{name}' holds NaN or infinity at layer {row}; train the routers again")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise InputError(f"{path}: unexpected tensor '{extra[0]}' (expected {', '.join(expected)} only)")
    has_config = (directory / ADAPTER_CONFIG_NAME).is_file()
    has_weights = (directory / ADAPTER_WEIGHTS_NAME).is_file()
    if has_config != has_weights:
        missing = ADAPTER_WEIGHTS_NAME if has_config else ADAPTER_CONFIG_NAME
        raise InputError(f"{directory / missing}: not found, although the recipe holds the other half of a LoRA")
    return Recipe(config, tensors["router.weight"], tensors["router.bias"], directory if has_config else None)


def save_recipe(directory: str | Path, config: FirstConfig, weight: np.ndarray, bias: np.ndarray) -> None:
    """Write ``first_config.json`` and ``first_routers.safetensors``; each replaces the old file at once.

    Raises InputError for shapes that do not match the config or values that are not finite.
    """
    from safetensors.numpy import save

    directory = Path(directory)
    config.validate(directory / CONFIG_NAME)
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    bias = np.ascontiguousarray(bias, dtype=np.float32)
    if weight.shape != (config.block_count, config.embedding_length) or bias.shape != (config.block_count,):
        raise InputError(
            f"{directory}: routers of shape {list(weight.shape)} and {list(bias.shape)} do not fit "
            f"{config.block_count} layers of width {config.embedding_length}"
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise InputError(f"{directory}: refusing to save routers that hold NaN or infinity")
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    blobs = {
        CONFIG_NAME: text.encode(),
        ROUTERS_NAME: save({"router.weight": weight, "router.bias": bias}),
    }
    for name, blob in blobs.items():
        temporary = directory / f".{name}.tmp"
        temporary.write_bytes(blob)
        temporary.replace(directory / name)
