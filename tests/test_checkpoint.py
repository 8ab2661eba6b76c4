"""Looking at a checkpoint folder without loading it."""

from __future__ import annotations

import json
import struct

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from first_convert.checkpoint import Checkpoint, safetensors_header
from pyfirst.errors import InputError


def test_header_is_that_of_safetensors(tiny_model):
    path = tiny_model("llama")[0] / "model.safetensors"
    found = safetensors_header(path)
    with safe_open(path, framework="np") as file:
        assert set(found) == set(file.keys())
        for name, tensor in found.items():
            truth = file.get_tensor(name)
            assert tensor.shape == list(truth.shape) and tensor.read() == truth.tobytes()
            assert tensor.count == truth.size


OTHER = '"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}'


@pytest.mark.parametrize(
    "header, word",
    [
        (OTHER.replace("[8, 16]", "[0, 8]"), "'b' begins at byte"),
        (OTHER.replace("[8, 16]", "[4, 12]"), "'b' begins at byte"),
        (OTHER.replace("[8, 16]", "[8.0, 16.0]"), "'b'"),
        (OTHER.replace("[8, 16]", "[true, 9]"), "'b'"),
        (OTHER.replace("[2]", "[-1, -2]"), "'b'"),
        (OTHER.replace("F32", "X9"), "'b' is of type X9"),
        (OTHER.replace('"b"', '"a"'), "'a' is there twice"),
        ('"b": ' + "[" * 100000, "not a readable safetensors file"),
    ],
)
def test_damaged_headers_are_refused(header, word, tmp_path):
    path = tmp_path / "x.safetensors"

    def write(last):
        text = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ' + last + "}"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(16))

    write(OTHER)
    assert list(safetensors_header(path)) == ["a", "b"]
    write(header)
    with pytest.raises(InputError) as error:
        safetensors_header(path)
    assert str(path) in str(error.value) and word in str(error.value)


def test_shape_of_every_architecture(tiny_model):
    for arch in ("llama", "gpt2", "gptneox", "gemma3"):
        folder, _ = tiny_model(arch)
        checkpoint = Checkpoint(folder)
        assert checkpoint.block_count == len(tiny.layers(tiny.load(folder)))
        assert checkpoint.embedding_length == tiny.WIDTH and checkpoint.quantization is None


@pytest.mark.parametrize(
    "dtypes, kind",
    [(["bfloat16"], "bf16"), (["float16"], "f16"), (["float32"], "f32"), (["float16", "bfloat16"], "f32")],
)
def test_native_type_loses_nothing(dtypes, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "hidden_size": 4}))
    tensors = {f"w{i}": torch.ones(2, 2, dtype=getattr(torch, name)) for i, name in enumerate(dtypes)}
    save_file({**tensors, "norm": torch.ones(2)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).native_type() == kind


def test_torch_checkpoints_are_checked_for_being_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(100, 100)}, path)
    assert Checkpoint(tmp_path).element_count > 0
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_not_json_is_named(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint(tmp_path)
