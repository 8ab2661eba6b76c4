"""first-convert as a whole: what it writes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from first_convert import check, child, convert, quantize
from first_convert.convert import build_parser, main
from first_convert.upstream import gguf
from pyfirst import metadata as key
from pyfirst.errors import InputError


@pytest.fixture(autouse=True)
def same_process(request, monkeypatch):
    """The child processes' work, done here to save their imports; "processes" tests start them."""
    if "processes" not in request.fixturenames:
        jobs = {
            "first_convert.child": child.run_job,
            "first_convert.quantize": lambda job: quantize.quantize(**job),
        }
        monkeypatch.setattr(convert, "_child", lambda module, job, folder: jobs[module](job))


@pytest.fixture
def processes():
    """Marks a test that runs the real child processes."""


def copy_of(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(path) -> tuple[dict, dict]:
    reader = gguf().GGUFReader(path)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors}


def logits(path, ids):
    from native_model import opened

    with opened(path, n_threads=1) as model:
        return model.feed(ids)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    assert "first-convert smollm2-135m-hf --first recipe" in capsys.readouterr().out


def test_without_a_recipe_the_file_is_upstreams_own(tiny_model, tmp_path):
    model, upstreams = tiny_model("llama")
    convert.convert(model, outfile=tmp_path / "out.gguf", outtype="f32")
    assert (tmp_path / "out.gguf").read_bytes() == upstreams.read_bytes()


def test_recipe_lands_in_metadata_and_tensors_stay(tiny_model, tmp_path):
    model, upstreams = tiny_model("llama")
    recipe = tiny.recipe(
        tmp_path / "recipe",
        model,
        router_norm="rms",
        threshold=0.625,
        prefill="skip",
        window=99,
        protected=[3, 0],
        base_model="some-org/Some-Model-1B",
        calibration={"threshold": [0.25, 0.5], "kept": [0.875, 0.5]},
    )
    result = convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    assert result["routers"] and result["layers"] == 4
    fields, tensors = contents(tmp_path / "out.gguf")
    assert tensors == contents(upstreams)[1]
    routers = load_file(recipe / "first_routers.safetensors")
    assert np.array_equal(np.float32(fields[key.ROUTER_WEIGHT]), routers["router.weight"].numpy().ravel())
    assert np.array_equal(np.float32(fields[key.ROUTER_BIAS]), routers["router.bias"].numpy())
    expected = {
        key.VERSION: 1,
        key.BLOCK_COUNT: 4,
        key.EMBEDDING_LENGTH: 64,
        key.ROUTER_NORM: "rms",
        key.ROUTER_THRESHOLD: 0.625,
        key.PREFILL: "skip",
        key.WINDOW: 99,
        key.PROTECTED: [0, 3],
        key.CALIBRATION_THRESHOLD: [0.25, 0.5],
        key.CALIBRATION_KEPT: [0.875, 0.5],
        key.LORA_MERGED: False,
        "general.tags": ["first", "layer-skipping"],
        "general.finetune": "first",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Some Model 1B",
        "general.base_model.0.organization": "some-org",
        "general.base_model.0.repo_url": "https://huggingface.co/some-org/Some-Model-1B",
    }
    assert {name: fields.get(name) for name in expected} == expected


def test_recipe_with_lora_is_merged_and_said_so(tiny_model, tmp_path):
    import peft

    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, mask=[1, 1, 1, 1])
    tiny.adapter(model, recipe, target_modules=["q_proj", "v_proj"])
    result = convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    assert result["lora"]["pairs_used"] == result["lora"]["modules"] == 8
    fields, _ = contents(tmp_path / "out.gguf")
    assert fields[key.LORA_MERGED] is True and fields[key.LORA_RANK] == 4 and fields[key.LORA_ALPHA] == 8
    assert fields[key.LORA_TARGETS] == ["q_proj", "v_proj"]
    ids = tiny.prompt()
    net = peft.PeftModel.from_pretrained(tiny.load(model), str(recipe)).eval()
    with torch.no_grad():
        truth = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert np.abs(logits(tmp_path / "out.gguf", ids) - truth).max() < 1e-4


def test_licence_of_the_model_card_is_kept(tiny_model, tmp_path):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- tiny\n---\n# Tiny\n")
    recipe = tiny.recipe(tmp_path / "recipe", model, mask=[1, 1, 1, 1])
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    fields, _ = contents(tmp_path / "out.gguf")
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.tags"] == ["tiny", "first", "layer-skipping"]


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_goes_through(arch, tiny_model, tmp_path):
    model, upstreams = tiny_model(arch)
    recipe = tiny.recipe(tmp_path / "recipe", model)
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(upstreams)[1]


def test_config_keys_that_transformers_no_longer_writes_are_added(tmp_path):
    for arch, lost in (("gpt2", "n_ctx"), ("gptneox", "rotary_pct")):
        model = tiny.make(arch, tmp_path / arch)
        config = json.loads((model / "config.json").read_text())
        config.pop(lost)
        (model / "config.json").write_text(json.dumps(config))
        n_layer = len(tiny.layers(tiny.load(model)))
        convert.convert(model, outfile=tmp_path / f"{arch}.gguf", outtype="f32")
        ids = tiny.prompt()
        truth = tiny.gold(model, [1] * n_layer, ids)
        assert np.abs(logits(tmp_path / f"{arch}.gguf", ids) - truth).max() < 1e-4


# Whole runs of the command.


def run(*args, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "first_convert.convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", **options)


def test_command_quantises_and_reports(processes, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, mask=[1, 0, 1, 1])
    out = tmp_path / "out.gguf"
    done = run(model, "--first", recipe, "--outfile", out, "--outtype", "Q4_K_M", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bytes"] == out.stat().st_size and result["outtype"] == "q4_k_m"
    assert (
        result["fallbacks"][0]
        == {
            "tensor": "token_embd.weight",
            "columns": 64,
            "wanted": "q4_K",
            "got": "q5_0",
        }
        and result["fallback_bytes"] > 0
    )
    assert "too narrow for q4_k_m" in done.stderr
    assert all(line.startswith("first-convert: ") for line in done.stderr.splitlines())
    fields, _ = contents(out)
    assert fields[key.ROUTER_BIAS] == [10.0, -10.0, 10.0, 10.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "recipe"]


def test_ctrl_c_and_kill_leave_nothing_at_the_final_name(processes, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    out = tmp_path / "out.gguf"
    out.write_bytes(b"the old file")
    command = [sys.executable, "-m", "first_convert.convert", model, "--outfile", out, "--force"]
    for sent, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".out.gguf.*")):
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(sent)
        assert process.wait(timeout=30) == code
        assert out.read_bytes() == b"the old file"
        left = list(tmp_path.glob(".out.gguf.*"))
        assert bool(left) == (sent == signal.SIGKILL)
    assert run(*command[3:]).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]  # and the killed run's folder is swept


def test_full_disk_is_said_and_leaves_nothing(processes, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    limit = "ulimit -f 200; exec "
    command = [sys.executable, "-m", "first_convert.convert", model, "--outfile", tmp_path / "out.gguf"]
    text = limit + " ".join(f"'{part}'" for part in command)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.strip()
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_work(tiny_model, tmp_path, monkeypatch, capsys):
    model, _ = tiny_model("llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    assert main([str(model), "--outfile", str(tmp_path / "out.gguf")]) == 2
    assert "needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_locale_and_odd_paths_change_nothing(processes, tiny_model, tmp_path):
    model, upstreams = tiny_model("llama")
    odd = tmp_path / "T64 копия" / "モデル v1"
    copy_of(model, odd)
    os.symlink(odd, tmp_path / "link")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    runs = ((f"{odd}/", tmp_path), (".", odd), (tmp_path / "link", tmp_path))
    for i, (source, cwd) in enumerate(runs):
        out = tmp_path / f"вывод {i}.gguf"
        done = run(source, "--outfile", out, "--outtype", "f32", env=environment, cwd=cwd)
        assert done.returncode == 0, done.stderr
        (fields, tensors), (wanted_fields, wanted) = contents(out), contents(upstreams)
        differing = {name for name in fields | wanted_fields if fields.get(name) != wanted_fields.get(name)}
        assert tensors == wanted and differing <= {"general.name", "general.basename", "general.version"}


# Wrong input: one line, exit code 2, nothing written.


def refused(capsys, out: Path, *args) -> str:
    before = sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None
    assert main([*map(str, args), "--outfile", str(out)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1 and captured.out == ""
    assert before == (sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None)
    return lines[0]


def test_recipe_of_another_shape(tiny_model, tmp_path, capsys):
    model, base = tiny_model("llama")
    for change, numbers in (({"num_hidden_layers": 6}, ("4", "6")), ({"hidden_size": 96}, ("64", "96"))):
        other = tiny.make("llama", tmp_path / "other", **change)
        recipe = tiny.recipe(tmp_path / "recipe", other)
        for source in ([model], ["--base-gguf", base]):
            text = refused(capsys, tmp_path / "out.gguf", *source, "--first", recipe)
            assert all(number in text for number in numbers)


def test_broken_routers(tiny_model, tmp_path, capsys):
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    path = recipe / "first_routers.safetensors"
    good = load_file(path)
    bad = {
        "is missing": {"router.bias": good["router.bias"]},
        "NaN": {**good, "router.weight": good["router.weight"].clone().fill_(float("nan"))},
        "infinity": {**good, "router.bias": torch.full((4,), float("inf"))},
        "[3, 64]": {**good, "router.weight": good["router.weight"][:3].clone()},
        "unexpected": {**good, "router.extra": torch.zeros(1)},
    }
    for word, tensors in bad.items():
        save_file(tensors, path)
        assert word in refused(capsys, tmp_path / "out.gguf", model, "--first", recipe)


def test_wrong_arguments(tiny_model, tmp_path, capsys):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    out = tmp_path / "out.gguf"
    assert "unknown outtype 'q9_9'" in refused(capsys, out, model, "--outtype", "q9_9")
    assert "exactly one" in refused(capsys, out)
    assert "exactly one" in refused(capsys, out, model, "--base-gguf", base)
    assert "stay as is" in refused(capsys, out, "--base-gguf", base, "--first", recipe, "--outtype", "q8_0")
    assert "needs --first" in refused(capsys, out, "--base-gguf", base)
    assert "give one of them" in refused(capsys, out, "--strip", base, "--first", recipe)
    assert "--threads" in refused(capsys, out, model, "--threads", "-1")
    assert "no such directory" in refused(capsys, tmp_path / "missing" / "out.gguf", model)
    assert "a directory" in refused(capsys, recipe, model)
    assert main([str(model)]) == 2 and "--outfile" in capsys.readouterr().err
    out.write_bytes(b"old")
    assert "--force" in refused(capsys, out, model)
    assert out.read_bytes() == b"old"


def test_folders_that_are_not_models(tiny_model, tmp_path, capsys):
    model, base = tiny_model("llama")
    out = tmp_path / "out.gguf"
    recipe = tiny.recipe(tmp_path / "recipe", model)
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    assert "--lora" in refused(capsys, out, adapter)
    assert "--first" in refused(capsys, out, recipe)
    assert "--base-gguf" in refused(capsys, out, base)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(capsys, out, tmp_path / "empty")
    assert "no such folder" in refused(capsys, out, tmp_path / "nowhere")
    assert "no adapter_config.json" in refused(capsys, out, model, "--lora", recipe)
    both = tiny.recipe(tmp_path / "both", model)
    tiny.adapter(model, both, target_modules=["q_proj"])
    assert "brings its own LoRA" in refused(capsys, out, model, "--first", both, "--lora", adapter)
    (both / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: not found" in refused(capsys, out, model, "--first", both)


def test_quantised_base_is_refused(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    edit_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "unquantised" in refused(capsys, tmp_path / "out.gguf", model)


def test_unknown_architecture_is_named(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    edit_json(model / "config.json", architectures=["NobodyForCausalLM"])
    assert "NobodyForCausalLM is not supported" in refused(capsys, tmp_path / "out.gguf", model)


# Shards (A07).


@pytest.fixture
def sharded(tiny_model, tmp_path):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    (model / "model.safetensors").unlink()
    tiny.load(tiny_model("llama")[0]).save_pretrained(model, max_shard_size="200KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    return model


def test_sharded_equals_whole(sharded, tiny_model, tmp_path):
    convert.convert(sharded, outfile=tmp_path / "out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(tiny_model("llama")[1])[1]


def test_incomplete_shards_are_named(sharded, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    second = sorted(sharded.glob("model-*.safetensors"))[1]
    data = second.read_bytes()
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    second.write_bytes(data[:-100])
    assert second.name in refused(capsys, out, sharded)
    second.write_bytes(data[:4])
    assert second.name in refused(capsys, out, sharded)
    second.unlink()
    assert second.name in refused(capsys, out, sharded)
    index.rename(tmp_path / "index")
    assert "shards found" in refused(capsys, out, sharded)
    (tmp_path / "index").rename(index)
    second.write_bytes(data)
    stale = {n: f.replace("-of-00", "-of-01") for n, f in good["weight_map"].items()}
    edit_json(index, weight_map=stale)
    assert "-of-01" in refused(capsys, out, sharded)
    edit_json(index, weight_map={**good["weight_map"], "model.ghost.weight": second.name})
    text = refused(capsys, out, sharded)
    assert "model.ghost.weight" in text and second.name in text
    index.write_text("{")
    assert index.name in refused(capsys, out, sharded)


# Tied heads (A01).


def test_tied_head_is_stored_once_also_when_the_checkpoint_repeats_it(tiny_model, tmp_path, capsys):
    model, upstreams = tiny_model("llama-tied")
    twice = copy_of(model, tmp_path / "twice")
    tensors = load_file(model / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, twice / "model.safetensors")
    convert.convert(twice, outfile=tmp_path / "out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(upstreams)[1]
    save_file({**tensors, "lm_head.weight": embeddings + 1}, twice / "model.safetensors")
    text = refused(capsys, tmp_path / "other.gguf", twice)
    assert "tie_word_embeddings" in text and "lm_head.weight" in text


# Vocabularies (A08).


def test_added_tokens_have_the_ids_of_transformers(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.add_tokens(["foobar", "<think>"])
    tokenizer.save_pretrained(model)
    net = tiny.load(model)
    net.resize_token_embeddings(tiny.VOCAB + 3)
    net.save_pretrained(model)
    convert.convert(model, outfile=tmp_path / "out.gguf", outtype="f32")
    texts = [tiny.TEXT[i : i + 40] for i in range(0, 200, 8)]
    texts += [f"a{new} b{new}{text[:7]}" for new in ("<|tool|>", "foobar", "<think>") for text in texts[:9]]
    assert len(texts) > 50
    probes = [(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert check.loads(tmp_path / "out.gguf", probes) == []
    fields, tensors = contents(tmp_path / "out.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == tiny.VOCAB + 3
    stored = np.frombuffer(tensors["token_embd.weight"][1], np.float32).reshape(-1, 64)
    assert np.array_equal(stored, net.get_input_embeddings().weight.detach().numpy())


def test_changed_pre_tokenizer_is_refused_or_named_by_the_user(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": False}, tokenizer["pre_tokenizer"]],
    }
    path.write_text(json.dumps(tokenizer))
    out = tmp_path / "out.gguf"
    assert "--pre-tokenizer" in refused(capsys, out, model)
    assert "other tokens" in refused(capsys, out, model, "--pre-tokenizer", "deepseek-llm")


# Values that do not fit (A09).


def test_overflow_of_f16_is_refused_and_wider_types_keep_the_value(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    text = refused(capsys, tmp_path / "out.gguf", model, "--outtype", "f16")
    assert "blk.1.ffn_up.weight" in text and "bf16" in text
    ids = tiny.prompt()
    truth = tiny.gold(model, [1] * 4, ids)
    convert.convert(model, outfile=tmp_path / "f32.gguf", outtype="f32")
    assert np.abs(logits(tmp_path / "f32.gguf", ids) - truth).max() < 1e-4
    for kind in ("bf16", "q8_0"):
        convert.convert(model, outfile=tmp_path / f"{kind}.gguf", outtype=kind)
        assert np.isfinite(logits(tmp_path / f"{kind}.gguf", ids)).all()


def test_nan_in_the_source_is_named(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for kind in ("f32", "q8_0"):
        text = refused(capsys, tmp_path / "out.gguf", model, "--outtype", kind)
        assert "blk.2.attn_v.weight" in text


def test_merge_comes_before_quantising(tiny_model, tmp_path):
    """Deltas too small for the steps of q4_0 reach the float32 file exactly (A10)."""
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "a", spread=1e-2, target_modules=["q_proj"])
    result = convert.convert(model, lora=adapter, outfile=tmp_path / "f32.gguf", outtype="f32")
    assert result["lora"]["pairs_used"] == 4
    convert.convert(model, lora=adapter, outfile=tmp_path / "q4.gguf", outtype="q4_0")
    quantize.quantize(tmp_path / "f32.gguf", tmp_path / "again.gguf", "q4_0")
    assert contents(tmp_path / "q4.gguf")[1] == contents(tmp_path / "again.gguf")[1]


def test_dry_run_writes_nothing(tiny_model, tmp_path, capsys):
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    tiny.adapter(model, recipe, target_modules=["q_proj"])
    before = sorted(tmp_path.rglob("*"))
    args = [str(model), "--first", str(recipe), "--outfile", str(tmp_path / "o.gguf"), "--dry-run", "--json"]
    assert main(args) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["lora"]["pairs"] == 4 and plan["intermediate"] == "f32" and plan["disk_needed"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_local_folders_never_touch_the_network(tiny_model, tmp_path, monkeypatch):
    import socket

    def refuse(*args):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, base_model="some-org/some-model")
    tiny.adapter(model, recipe, target_modules=["q_proj"])
    edit_json(recipe / "adapter_config.json", base_model_name_or_path="some-org/some-model")
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    fields, _ = contents(tmp_path / "out.gguf")
    assert fields["general.base_model.0.organization"] == "some-org"


def test_python_call_raises_what_the_command_prints(tiny_model, tmp_path):
    with pytest.raises(InputError, match="unknown outtype"):
        convert.convert(tiny_model("llama")[0], outfile=tmp_path / "o.gguf", outtype="q9")


def test_hub_names_are_fetched_and_folders_are_not(tiny_model, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    model, upstreams = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    asked = []

    def snapshot_download(name, allow_patterns=None):
        asked.append(name)
        if name == "some/nothing":
            raise OSError("404 Client Error")
        return str({"some/model": model, "some/recipe": recipe}[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    convert.convert("some/model", first="some/recipe", outfile="out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(upstreams)[1] and len(asked) == 2
    assert "404" in refused(capsys, tmp_path / "other.gguf", "some/nothing")
    asked.clear()
    convert.convert(model, first="recipe", outfile="third.gguf", outtype="f32")
    assert not asked


def test_result_that_llama_cpp_cannot_load_is_never_published(tmp_path, capsys):
    model = tiny.make("gemma3", tmp_path / "hf")
    tiny.tokenizer().save_pretrained(model)  # 377 tokens: upstream cuts the 384 embeddings to 380
    text = refused(capsys, tmp_path / "out.gguf", model)
    assert "does not load the result" in text and "token_embd.weight" in text


PEAK = """
import resource, sys
from first_convert.convert import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_layers(processes, tmp_path):
    """Sharded bfloat16 models of 4 and 12 layers of 10 MB; the peak of the largest process, in MB."""
    peaks = []
    for layers in (4, 12):
        model = tmp_path / f"hf{layers}"
        tiny.make("llama", model, num_hidden_layers=layers, hidden_size=1024, intermediate_size=1024, head_dim=256)
        recipe = tiny.recipe(tmp_path / f"recipe{layers}", model)
        tiny.adapter(model, recipe)
        net = tiny.load(model).to(torch.bfloat16)
        (model / "model.safetensors").unlink()
        net.save_pretrained(model, max_shard_size="20MB")
        out = tmp_path / f"{layers}.gguf"
        command = [sys.executable, "-c", PEAK, model, "--first", recipe, "--outfile", out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    grown = (tmp_path / "12.gguf").stat().st_size - (tmp_path / "4.gguf").stat().st_size
    assert grown > 30e6  # as q8_0; the merged weights of the difference take four times that
    assert peaks[1] - peaks[0] < 60, peaks


def test_architecture_that_cannot_route_is_refused_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, "mamba", ("mamba", {"state_size": 16}))
    model = tiny.make("mamba", tmp_path / "hf")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    text = refused(capsys, tmp_path / "out.gguf", model, "--first", recipe)
    assert "routing is not supported for 'mamba'" in text and "--allow-dense" in text
    args = [model, "--first", recipe, "--outfile", tmp_path / "out.gguf", "--outtype", "f32"]
    assert main([*map(str, args), "--allow-dense"]) == 0
    assert "warning: " in capsys.readouterr().err and (tmp_path / "out.gguf").exists()
