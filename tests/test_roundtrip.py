"""A recipe through every tool on the way: the routers decide the same at its end."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from native_model import opened

from first_convert import child, convert, pack, quantize
from first_convert.upstream import gguf
from pyfirst import native
from pyfirst.errors import InputError


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    jobs = {
        "first_convert.child": child.run_job,
        "first_convert.quantize": quantize.run_job,
    }
    monkeypatch.setattr(convert, "_child", lambda module, job, folder: jobs[module](job))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose rows fit every quantised type, and routers that split prompts by what is in them."""
    root = tmp_path_factory.mktemp("wide")
    model = tiny.make(
        "llama",
        root / "hf",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    recipe = tiny.recipe(root / "recipe", model, seed=3, router_norm="rms")
    base = tiny.gguf(model, root / "base.gguf")
    convert.convert(base_gguf=base, first=recipe, outfile=root / "packed.gguf")
    return recipe, base, root / "packed.gguf"


def routed(path, prompts, next_ids=()):
    """Masks [prompts, layers], scores, and the last prompt's logits."""
    masks, scores, logits = [], [], None
    with opened(path, n_threads=1) as model:
        native.set_routing(model.ctx, True)
        for ids in prompts:
            model.clear()
            native.begin(model.ctx)
            logits = model.feed(ids)
            native.commit(model.ctx)
            masks.append(model.mask())
            scores.append(model.scores())
            if next_ids:
                logits = np.concatenate([logits, model.feed(next_ids, start=len(ids))])
    return np.array(masks), np.array(scores), logits


@pytest.mark.parametrize("prefill", ["full", "skip"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_folder_to_routed_logits(arch, prefill, tiny_model, tmp_path):
    """Model folder, recipe with LoRA, first-convert, patched llama.cpp: mask and logits of plain torch."""
    import peft

    model, _ = tiny_model(arch)
    recipe = tiny.recipe(tmp_path / "recipe", model, seed=3, router_norm="rms", prefill=prefill)
    tiny.adapter(model, recipe, target_modules=["q_proj", "down_proj"])
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    merged = peft.PeftModel.from_pretrained(tiny.load(model), str(recipe)).merge_and_unload()
    seen = set()
    for seed in range(3):
        prompt, after = tiny.prompt(20, seed), tiny.prompt(6, seed + 100)
        mask, _ = tiny.decide(merged, recipe, prompt)
        got, _, logits = routed(tmp_path / "out.gguf", [prompt], after)
        assert np.array_equal(got[0], mask)
        truth = tiny.gold(merged, mask, prompt, after, prefill)
        assert np.abs(logits - truth).max() < 1e-4
        seen.add(tuple(mask))
    assert any(not all(mask) for mask in seen)


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q6_k", "q4_k_m", "q4_0"])
def test_quantised_files_decide_alike(kind, wide, tmp_path):
    """50 prompts: masks under each type against float32; one differs only where the score was near 0.5.

    Random weights are the worst case for a quantiser, and these routers' scores crowd around the threshold.
    """
    _, _, packed = wide
    quantize.quantize(packed, tmp_path / "q.gguf", kind)
    prompts = [tiny.prompt(16 + seed % 9, seed) for seed in range(50)]
    masks, scores, _ = routed(packed, prompts)
    others, other_scores, _ = routed(tmp_path / "q.gguf", prompts)
    agreement = (masks == others).mean(axis=0)
    moved = np.abs(scores - other_scores)
    print(f"{kind}: agreement per layer {agreement.round(2).tolist()}, scores moved by {moved.mean():.4f}")
    assert 0.05 < masks.mean() < 0.95 and len({tuple(mask) for mask in masks}) > 5
    assert moved.mean() < {"bf16": 0.005, "q8_0": 0.01, "q6_k": 0.03, "q4_k_m": 0.08, "q4_0": 0.1}[kind]
    assert agreement.mean() > {"bf16": 0.96, "q8_0": 0.94, "q6_k": 0.9, "q4_k_m": 0.8, "q4_0": 0.8}[kind]
    assert (np.abs(scores - 0.5) <= moved + 1e-6)[masks != others].all()


def test_routers_survive_pack_quantise_and_new_metadata(wide, tmp_path):
    """pack, llama-quantize, then gguf-py's own way of editing metadata; then the routers go again."""
    recipe, base, packed = wide
    quantize.quantize(packed, tmp_path / "q8.gguf", "q8_0")
    quantize.quantize(base, tmp_path / "plain.gguf", "q8_0")
    convert.convert(base_gguf=tmp_path / "plain.gguf", first=recipe, outfile=tmp_path / "after.gguf")
    lib = gguf()
    reader = lib.GGUFReader(tmp_path / "q8.gguf")
    writer = lib.GGUFWriter(tmp_path / "edited.gguf", arch="llama")
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            item = field.types[-1] if field.types[0] == lib.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item)
    writer.add_description("edited")
    for tensor in reader.tensors:
        shape, dtype = tensor.data.shape, tensor.data.dtype
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    prompts = [tiny.prompt(20, seed) for seed in range(8)]
    truth = routed(tmp_path / "after.gguf", prompts)[0]
    assert len({tuple(mask) for mask in truth}) > 1
    assert np.array_equal(routed(tmp_path / "q8.gguf", prompts)[0], truth)
    assert np.array_equal(routed(tmp_path / "edited.gguf", prompts)[0], truth)
    convert.convert(strip=tmp_path / "q8.gguf", outfile=tmp_path / "stripped.gguf")
    assert (tmp_path / "stripped.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.fixture(scope="module")
def gguf_split(tmp_path_factory):
    """Upstream's gguf-split, compiled from its one file against our library."""
    import os
    import subprocess
    from pathlib import Path

    folder = tmp_path_factory.mktemp("split")
    root = Path(__file__).resolve().parent.parent / "build" / "upstream" / "llama.cpp"
    root = root if root.is_dir() else Path(os.environ.get("PYFIRST_UPSTREAM", root))
    # All functions that it takes from llama.cpp's common/ are what --version prints.
    (folder / "version.cpp").write_text(
        '#include "build-info.h"\nint llama_build_number() { return 0; }\nconst char * llama_commit() { return ""; }\n'
        'const char * llama_compiler() { return ""; }\nconst char * llama_build_target() { return ""; }\n'
    )
    lib, tool = native.lib_dir(), folder / "gguf-split"
    command = ["c++", "-std=c++17", "-O0", *(f"-I{root / name}" for name in ("common", "include", "ggml/include"))]
    command += [str(root / "tools/gguf-split/gguf-split.cpp"), str(folder / "version.cpp"), "-o", str(tool)]
    command += [f"-L{lib}", f"-Wl,-rpath,{lib}"]
    # Some files of the library may need others that only its own rpath finds.
    command += ["-lllama", "-lggml", "-lggml-base", "-Wl,--allow-shlib-undefined"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lambda *args: subprocess.run([str(tool), *map(str, args)], check=True, capture_output=True)


def test_split_and_merged_files_still_route(wide, gguf_split, tmp_path):
    """pack, gguf-split, load the first piece; gguf-split --merge gives back the same tensors and routers."""
    recipe, _, packed = wide
    prompts = [tiny.prompt(20, seed) for seed in range(8)]
    truth, scores, logits = routed(packed, prompts, [5, 6])
    assert len({tuple(mask) for mask in truth}) > 1
    gguf_split("--split-max-tensors", 20, packed, tmp_path / "piece")
    pieces = sorted(tmp_path.glob("piece-*.gguf"))
    assert len(pieces) > 2
    masks, split_scores, split_logits = routed(pieces[0], prompts, [5, 6])
    assert np.array_equal(masks, truth) and np.array_equal(split_scores, scores)
    assert np.array_equal(split_logits, logits)
    with pytest.raises(InputError, match="join them first"):
        convert.convert(strip=pieces[0], outfile=tmp_path / "no.gguf")
    gguf_split("--merge", pieces[0], tmp_path / "merged.gguf")
    assert np.array_equal(routed(tmp_path / "merged.gguf", prompts)[0], truth)
    before, after = pack.open_gguf(packed), pack.open_gguf(tmp_path / "merged.gguf")
    keys = [name for name in before.keys if name.startswith("first.")]
    assert len(keys) > 10 and set(keys) == {name for name in after.keys if name.startswith("first.")}
    assert [before.get(name) for name in keys] == [after.get(name) for name in keys]
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert a.name == b.name
        assert before.data[a.start : a.start + a.size] == after.data[b.start : b.start + b.size]
    convert.convert(base_gguf=tmp_path / "merged.gguf", first=recipe, outfile=tmp_path / "again.gguf")
    assert np.array_equal(routed(tmp_path / "again.gguf", prompts)[0], truth)


def test_all_layers_protected_runs_as_the_base(tiny_model, tmp_path):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, mask=[0, 0, 0, 0], protected=[0, 1, 2, 3])
    convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "out.gguf")
    ids = tiny.prompt()
    masks, _, logits = routed(tmp_path / "out.gguf", [ids])
    with opened(base) as plain:
        dense = plain.feed(ids)
    assert masks.all() and np.array_equal(logits, dense)


def test_half_a_set_of_router_keys_is_not_run_silently(tiny_model, tmp_path):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "packed.gguf")
    source = pack.open_gguf(tmp_path / "packed.gguf")
    pack.rewrite(source, tmp_path / "half.gguf", [], lambda name: name != "first.router.bias")
    with pytest.raises(ValueError), opened(tmp_path / "half.gguf"):
        pass


LOGITS = """
import json, sys
import numpy as np
from native_model import opened
with opened(sys.argv[1], n_threads=1) as model:
    np.save(sys.argv[2], model.feed(json.loads(sys.argv[3])))
"""


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_unpatched_llama_cpp_runs_the_file_as_the_dense_model(kind, wide, tmp_path):
    """The stock library gives a FiRST file the logits it gives the base, to the bit."""
    import json
    import os
    import subprocess
    import sys

    from test_patch import STOCK

    recipe, base, _ = wide
    quantize.quantize(base, tmp_path / "base.gguf", kind)
    convert.convert(base_gguf=tmp_path / "base.gguf", first=recipe, outfile=tmp_path / "first.gguf")
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(STOCK), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("base", "first"):
        command = [sys.executable, "-c", LOGITS, tmp_path / f"{name}.gguf", tmp_path / f"{name}.npy"]
        command.append(json.dumps(tiny.prompt()))
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "base.npy"), np.load(tmp_path / "first.npy"))
