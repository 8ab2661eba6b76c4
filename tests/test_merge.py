"""Every adapter's merge against PEFT's own unmerged forward, through the whole chain to llama.cpp."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from first_convert import child, merge
from first_convert.checkpoint import Checkpoint
from pyfirst.errors import InputError

LORA = {
    "all linear layers": ("llama", {}),
    "grouped heads, biases": ("llama-bias", {}),
    "lora_bias": ("llama-bias", {"lora_bias": True}),
    "all biases trained": ("llama-bias", {"bias": "all"}),
    "all biases trained, norms too": ("gptneox", {"target_modules": ["query_key_value"], "bias": "all"}),
    "biases of the LoRA's layers": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "biases of Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "biases and lora_bias": ("llama-bias", {"bias": "lora_only", "lora_bias": True}),
    "biases of a model that has none": ("llama", {"bias": "all"}),
    "rank and alpha patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
    "negative alpha": ("llama", {"lora_alpha": -8}),
    "rslora": ("llama", {"use_rslora": True, "r": 16, "lora_alpha": 16}),
    "dora": ("llama", {"use_dora": True}),
    "fan_in_fan_out by mistake": ("llama", {"target_modules": ["o_proj"], "fan_in_fan_out": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embeddings and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "saved modules": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "saved norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "trained tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
    "tied: head": ("llama-tied", {"target_modules": ["lm_head"]}),
    "tied: embeddings": ("llama-tied", {"target_modules": ["embed_tokens"]}),
    "tied: both": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied: saved head": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied: saved embeddings": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "tied: trained tokens": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
    "tied: gemma3's head": ("gemma3", {"target_modules": ["lm_head"]}),
    "tied: gpt2's head": ("gpt2", {"target_modules": ["lm_head"]}),
    "tied: gpt2's embeddings": ("gpt2", {"target_modules": ["wte"]}),
    "fused qkv": ("phi3", {}),
    "gemma's norms": ("gemma3", {"target_modules": ["q_proj", "down_proj"]}),
    "gptneox": ("gptneox", {}),
    "mixture of experts": ("qwen3moe", {"target_modules": ["q_proj", "k_proj"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "qwen2": ("qwen2", {"target_modules": ["q_proj", "k_proj"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}),
    "all but": ("llama", {"exclude_modules": ["v_proj"]}),
    "a regular expression": ("llama", {"target_modules": r".*layers\.[02]\..*q_proj"}),
}


def convert(model, out, lora=None, recipe=None, outtype="f32", **job):
    """The conversion process's job, run in this one; its answer."""
    job = {"pre_tokenizer": None, "drop": [], "imatrix": None, "base_model": "", "recipe_name": "", "date": "", **job}
    paths = {
        "model": str(model),
        "outfile": str(out),
        "lora": lora and str(lora),
        "recipe": recipe and str(recipe),
    }
    return child.run_job({**job, **paths, "outtype": outtype})


def peft_logits(model, adapter, ids):
    """The adapter not merged, in PEFT's own forward."""
    import peft

    net = peft.PeftModel.from_pretrained(tiny.load(model), str(adapter)).eval()
    with torch.no_grad():
        return net(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def gguf_logits(path, ids):
    from native_model import opened

    with opened(path, n_threads=1) as model:
        return model.feed(ids)


@pytest.mark.parametrize("name", LORA)
def test_merged_file_equals_unmerged_peft(name, tiny_model, tmp_path):
    arch, config = LORA[name]
    model, base = tiny_model(arch)
    adapter = tiny.adapter(model, tmp_path / "adapter", **config)
    answer = convert(model, tmp_path / "out.gguf", lora=adapter)["lora"]
    names = load_file(adapter / "adapter_model.safetensors")
    in_file = sum("lora_A" in name or "lora_embedding_A" in name for name in names)
    assert answer["pairs_used"] == answer["pairs"] == in_file > 0
    ids = tiny.prompt()
    truth, got = peft_logits(model, adapter, ids), gguf_logits(tmp_path / "out.gguf", ids)
    assert np.abs(got - truth).max() < 1e-4
    assert np.abs(got - gguf_logits(base, ids)).max() > 0.01  # the adapter does something


@pytest.mark.parametrize("name", [name for name in LORA if name.startswith("tied: ")])
def test_tied_model_whose_files_repeat_the_head(name, tiny_model, tmp_path):
    arch, config = LORA[name]
    model = tmp_path / "hf"
    shutil.copytree(tiny_model(arch)[0], model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    tensors = load_file(model / "model.safetensors")
    embedding = next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors[embedding].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    adapter = tiny.adapter(model, tmp_path / "adapter", **config)
    convert(model, tmp_path / "out.gguf", lora=adapter, drop=[Checkpoint(model).tied_copy()])
    ids = tiny.prompt()
    assert np.abs(gguf_logits(tmp_path / "out.gguf", ids) - peft_logits(model, adapter, ids)).max() < 1e-4


def test_the_language_model_of_a_multimodal_parent(tmp_path):
    """Its tensors have one name in memory, another in the file, and a third in upstream's converter."""
    model = tiny.multimodal(tmp_path / "hf")
    adapter = tiny.adapter(model, tmp_path / "adapter", exclude_modules=r".*(vision|multi_modal).*")
    answer = convert(model, tmp_path / "out.gguf", lora=adapter)["lora"]
    assert answer["pairs_used"] == answer["pairs"] == 7 * 7
    ids = tiny.prompt()
    assert np.abs(gguf_logits(tmp_path / "out.gguf", ids) - peft_logits(model, adapter, ids)).max() < 1e-4


def test_architecture_without_an_output_tensor_refuses_an_untied_head(tiny_model, tmp_path):
    model, _ = tiny_model("gemma2")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(InputError, match=r"no place for it: .*lm_head\.weight"):
        convert(model, tmp_path / "out.gguf", lora=adapter)


@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (4, 1), (8, 2), (6, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_row_permutation_of_grouped_queries(heads, kv, bias, tmp_path):
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": 16 * heads if heads > 4 else 64}
    shape["attention_bias"] = bias
    model = tiny.make("llama", tmp_path / "hf", **shape)
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    convert(model, tmp_path / "out.gguf", lora=adapter)
    ids = tiny.prompt()
    truth = peft_logits(model, adapter, ids)
    assert np.abs(gguf_logits(tmp_path / "out.gguf", ids) - truth).max() < 1e-4


def test_saved_module_is_stored_bit_for_bit(tiny_model, tmp_path):
    from first_convert.upstream import gguf

    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    convert(model, tmp_path / "out.gguf", lora=adapter)
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    tensors = {t.name: t.data for t in gguf().GGUFReader(tmp_path / "out.gguf").tensors}
    assert np.array_equal(tensors["output.weight"], saved.numpy())
    assert not np.array_equal(saved, load_file(model / "model.safetensors")["lm_head.weight"])


def rename(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("base_model.model.model.", "base_model.model.language_model.model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: "base_model.model." + key,
    ],
)
def test_foreign_prefixes_are_understood(change, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter")
    ids = tiny.prompt()
    truth = peft_logits(model, adapter, ids)
    rename(adapter, change)
    convert(model, tmp_path / "out.gguf", lora=adapter)
    assert np.abs(gguf_logits(tmp_path / "out.gguf", ids) - truth).max() < 1e-4


def plan_error(model, adapter):
    with pytest.raises(InputError) as error:
        merge.plan(Checkpoint(model), adapter)
    return str(error.value)


def test_adapter_that_matches_nothing_is_refused(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    rename(adapter, lambda key: key.replace("self_attn", "attention"))
    text = plan_error(model, adapter)
    assert "0 of 4 adapter pairs" in text and "layers.0.attention.q_proj.lora_A" in text


def test_one_renamed_layer_is_refused(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    rename(adapter, lambda key: key.replace("layers.2.", "layers.two."))
    assert "3 of 4 adapter pairs" in plan_error(model, adapter)


@pytest.mark.parametrize("layers, words", [(6, "4 of 6 adapter pairs"), (3, "3 of 3 adapter pairs found, but")])
def test_adapter_of_another_depth_is_refused(layers, words, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    other = tiny.make("llama", tmp_path / "other", num_hidden_layers=layers)
    adapter = tiny.adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    assert words in plan_error(model, adapter)


def test_adapter_of_another_width_is_refused(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    other = tiny.make("llama", tmp_path / "other", hidden_size=96)
    adapter = tiny.adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    text = plan_error(model, adapter)
    assert "[4, 96]" in text and "[4, 64]" in text


def resized(model, out, rows, tokenizer=True, **lora):
    """A LoRA trained on the model with embeddings for ``rows`` tokens; its folder and logits of some of them."""
    import peft
    from transformers import AutoTokenizer

    net = tiny.load(model)
    net.resize_token_embeddings(rows, mean_resizing=False)
    net = peft.get_peft_model(net, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **lora)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    net.save_pretrained(out)
    if tokenizer:
        tokens = AutoTokenizer.from_pretrained(model)
        tokens.add_tokens([f"<new{i}>" for i in range(rows - len(tokens))])
        tokens.save_pretrained(out)
    ids = [*tiny.prompt(), rows - 1, rows - 2]
    with torch.no_grad():
        return ids, net(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


GROWN = {
    "saved embeddings and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "embeddings beside the LoRA": {"target_modules": ["q_proj"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("arch, rows", [("llama", 387), ("llama-tied", 387), ("llama", 380)])
@pytest.mark.parametrize("name", GROWN)
def test_vocabulary_of_the_adapter(name, arch, rows, tiny_model, tmp_path):
    """Tokens added (or padding cut off) in fine-tuning: the adapter's embeddings and tokenizer count."""
    from first_convert.upstream import gguf

    model, _ = tiny_model(arch)
    ids, truth = resized(model, tmp_path / "adapter", rows, **GROWN[name])
    answer = convert(model, tmp_path / "out.gguf", lora=tmp_path / "adapter")
    assert answer["lora"]["vocabulary"] == rows
    got = gguf_logits(tmp_path / "out.gguf", ids)
    assert got.shape == truth.shape and np.abs(got - truth).max() < 1e-4
    tokens = gguf().GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[-1] == f"<new{rows - 378}>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.gguf"]


def test_added_tokens_without_their_tokenizer_are_refused(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    resized(model, tmp_path / "adapter", 387, tokenizer=False, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"387 tokens, the base model for 384; copy the tokenizer"):
        convert(model, tmp_path / "out.gguf", lora=tmp_path / "adapter")


def test_embeddings_of_another_size_than_the_head_are_refused(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    resized(model, tmp_path / "adapter", 387, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, path)
    text = plan_error(model, tmp_path / "adapter")
    assert "387 tokens, the base model has 384" in text and "lm_head.weight" in text


def test_lora_on_embeddings_of_another_vocabulary_is_refused_with_both_sizes(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    other = tiny.make("llama", tmp_path / "other", vocab_size=tiny.VOCAB + 3)
    adapter = tiny.adapter(other, tmp_path / "adapter", target_modules=["embed_tokens"])
    path = adapter / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "lora_" in key}, path)
    text = plan_error(model, adapter)
    assert "387" in text and "384" in text


def test_saved_copy_that_differs_is_refused(tiny_model, tmp_path):
    """PEFT writes a saved module twice when the vocabulary grew; two values for one tensor are a contradiction."""
    model, _ = tiny_model("llama")
    resized(model, tmp_path / "adapter", 387, target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.lm_head.modules_to_save.weight"
    tensors[key] = tensors[key] + 1
    save_file(tensors, path)
    assert key in plan_error(model, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["SEQ_CLS", "TOKEN_CLS"])
def test_classification_head_is_refused_by_name(kind, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, task_type=kind, modules_to_save=["score"])
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.score.weight": torch.ones(2, 64)}, path)
    assert "score.weight" in plan_error(model, adapter)


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"bias": "some"}, "bias"),
        ({"a_new_method": {"strength": 2}}, "a_new_method"),
        ({"use_qalora": True}, "use_qalora"),
        ({"r": 0}, "'r'"),
        ({"r": 2**31}, "'r'"),
        ({"rank_pattern": None}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2**31}}, "rank_pattern"),
        ({"alpha_pattern": "x"}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"modules_to_save": [None]}, "modules_to_save"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": "("}, "unterminated"),
        ({"trainable_token_indices": [1.5]}, "trainable_token_indices"),
        ({"trainable_token_indices": [5, 2**31]}, "384 tokens"),
        ({"trainable_token_indices": {"embed_tokens": [384]}}, "384 tokens"),
    ],
)
def test_variants_that_cannot_be_merged_are_refused_by_name(changes, word, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, **changes)
    text = plan_error(model, adapter)
    assert text.startswith(str(adapter / "adapter_config.json")) and word in text


@pytest.mark.parametrize(
    "arch, base, config, word",
    [
        ("llama-bias", "llama", {"lora_bias": True}, "lora_bias"),
        ("llama-tied", "llama-tied", {"trainable_token_indices": [5]}, "trainable_token_indices"),
    ],
)
def test_parts_that_the_model_has_no_place_for_are_refused(arch, base, config, word, tiny_model, tmp_path):
    adapter = tiny.adapter(tiny_model(arch)[0], tmp_path / "adapter", target_modules=["lm_head", "q_proj"], **config)
    assert word in plan_error(tiny_model(base)[0], adapter)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_narrow_adapter_weights_are_read(kind, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    narrow = {key: (tensor * 10).to(kind) for key, tensor in load_file(path).items()}
    save_file(narrow, path)
    found = merge.load_adapter(adapter)
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in narrow.items())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_must_all_be_there(bias, tiny_model, tmp_path):
    model, _ = tiny_model("llama-bias")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"], bias=bias)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = next(key for key in tensors if "layers.2" in key and key.endswith("q_proj.base_layer.bias"))
    tensors.pop(lost)
    save_file(tensors, path)
    assert "lacks model.layers.2.self_attn.q_proj.bias" in plan_error(model, adapter)


def test_unknown_key_without_a_value_is_ignored(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, a_new_method=None)
    assert merge.plan(Checkpoint(model), adapter).pairs == 4


@pytest.mark.parametrize("base", ["some-org/some-model", None, "/no/longer/there"])
def test_named_base_is_never_looked_up(base, tiny_model, tmp_path, monkeypatch):
    import socket

    def refuse(*args):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, base_model_name_or_path=base)
    assert merge.plan(Checkpoint(model), adapter).pairs == 4


def test_nan_in_the_adapter_is_named(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)
    assert key in plan_error(model, adapter)


def test_short_adapter_file_is_named(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert str(path) in plan_error(model, adapter)
    path.write_bytes(whole.replace(b"pt", b"p\xff", 1))  # metadata, which only safetensors itself reads
    assert str(path) in plan_error(model, adapter)
    path.unlink()
    torch.save([1], path.with_suffix(".bin"))
    assert str(path.with_suffix(".bin")) in plan_error(model, adapter)


def test_quantised_base_is_refused(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    copy = tmp_path / "q"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    assert "unquantised" in plan_error(copy, adapter)
