"""The prediction of decoding speed, against bytes counted by the gguf package and by hand."""

from __future__ import annotations

import json
import os
import re

import gguf
import pytest
import tiny

from first_convert.ggufio import Entry, rewrite
from first_convert.pack import open_gguf
from pyfirst import predict
from pyfirst.cli.bench import main
from pyfirst.errors import InputError


def sizes(path) -> dict[str, int]:
    """Tensor name -> bytes, read by another reader."""
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def test_bytes_of_an_untied_model(tiny_model):
    path = tiny_model("llama")[1]
    tensors = sizes(path)
    assert "output.weight" in tensors
    read = predict.token_bytes(path)
    assert read["fixed"] == sum(n for name, n in tensors.items() if not re.match(r"blk|token_embd", name))
    for layer, found in enumerate(read["layers"]):
        assert found == sum(n for name, n in tensors.items() if name.startswith(f"blk.{layer}."))
    keys = gguf.GGUFReader(path).fields
    heads = int(keys["llama.attention.head_count_kv"].contents())
    per_head = tiny.WIDTH // int(keys["llama.attention.head_count"].contents())
    assert read["kv"] == [heads * 2 * per_head * 2] * 4


def test_tied_embeddings_are_read_as_the_output_matrix(tmp_path):
    path = tiny.gguf(tiny.make("llama", tmp_path / "hf", tie_word_embeddings=True), tmp_path / "tied.gguf")
    tensors = sizes(path)
    assert "output.weight" not in tensors
    assert predict.token_bytes(path)["fixed"] == sum(n for name, n in tensors.items() if not name.startswith("blk."))


def test_experts_count_by_the_share_that_is_used(tiny_model):
    path = tiny_model("qwen3moe")[1]
    keys = gguf.GGUFReader(path).fields
    used, all_of_them = (int(keys[f"qwen3moe.expert{name}_count"].contents()) for name in ("_used", ""))
    assert used < all_of_them
    expected = sum(
        n * used / all_of_them if "_exps" in name else n for name, n in sizes(path).items() if name.startswith("blk.2.")
    )
    assert predict.token_bytes(path)["layers"][2] == pytest.approx(expected)


def test_speed_is_bandwidth_over_bytes(tiny_model):
    path = tiny_model("llama")[1]
    read = predict.token_bytes(path)
    dense, skipped = predict.predict(path, 10, [[], [1, 2]], [100])
    everything = read["fixed"] + sum(read["layers"]) + 100 * sum(read["kv"])
    without = everything - sum(read["layers"][i] + 100 * read["kv"][i] for i in (1, 2))
    assert dense["tokens_per_s"] == pytest.approx(10e9 / everything)
    assert skipped["tokens_per_s"] == pytest.approx(10e9 / without)
    assert skipped["speedup"] == pytest.approx(everything / without) and dense["speedup"] == 1


def test_command_marks_its_numbers_as_predicted(tiny_model, capfd):
    path = os.fspath(tiny_model("llama")[1])
    assert main(["-m", path, "--predict", "pi5", "--skipped", "50%", "-p", "64", "-n", "8"]) == 0
    out = capfd.readouterr().out
    assert "predicted" in out and "10 GB/s" in out and "2 of 4 layers skipped" in out
    assert main(["-m", path, "--predict", "12.5", "--skipped", "50%", "-p", "64,128", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["predicted"] is True and result["bandwidth_gb_s"] == 12.5
    assert [(run["context"], run["layers_skipped"]) for run in result["runs"]] == [(96, 0), (96, 2), (160, 0), (160, 2)]


@pytest.mark.parametrize("text", ["pi3", "0", "-1", "nan", "inf", ""])
def test_bandwidths_that_are_none(text, tiny_model, capfd):
    assert main(["-m", os.fspath(tiny_model("llama")[1]), "--predict", text]) == 2
    assert "expected pi5, pi4 or a memory bandwidth" in capfd.readouterr().err


@pytest.mark.parametrize("options", [("-n", "0"), ("-p", "1000")])
def test_a_context_that_the_model_has_not_is_refused_as_where_it_is_measured(options, tiny_model, capfd):
    assert main(["-m", os.fspath(tiny_model("llama")[1]), "--predict", "pi5", *options]) == 2
    assert ("-n is 0" if options[0] == "-n" else "the model was trained for 512") in capfd.readouterr().err


def test_one_piece_of_a_model_is_refused(tiny_model, tmp_path):
    rewrite(open_gguf(tiny_model("llama")[1]), tmp_path / "a", [Entry("split.count", "UINT32", 2)], lambda _: True)
    with pytest.raises(InputError, match="a: one of 2 pieces; join them first"):
        predict.token_bytes(tmp_path / "a")


def test_a_file_without_attention_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="nothing to predict"):
        predict.token_bytes(tmp_path / "adapter.gguf")


def test_heads_for_another_number_of_layers_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(4)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 2, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"model.gguf: the key 'llama.attention.head_count_kv' holds 3 values for 4 l"):
        predict.token_bytes(tmp_path / "model.gguf")
