"""Routers into and out of an existing GGUF."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tiny

from first_convert import convert, pack, quantize
from first_convert.ggufio import Entry
from first_convert.upstream import gguf
from pyfirst import metadata as key
from pyfirst.errors import InputError
from pyfirst.recipe import load_recipe


def tensor_bytes(path):
    return [(t.name, t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in gguf().GGUFReader(path).tensors]


def fields(path):
    return {n: f.contents() for n, f in gguf().GGUFReader(path).fields.items() if not n.startswith("GGUF.")}


@pytest.fixture
def packed(tiny_model, tmp_path):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, protected=[1])
    convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "packed.gguf")
    return base, tmp_path / "packed.gguf", recipe


def normal(requirement: str) -> str:
    """The package that a requirement names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0].lower())  # type: ignore[index]


def test_the_base_dependencies_are_enough(packed, tmp_path):
    """No module of another package is there, for the command and the processes that it starts."""
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    todo = re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*)\]", project, re.MULTILINE)[1])  # type: ignore[index]
    allowed = {"pyfirst", "gguf"}  # the second is upstream's, beside our library
    while todo:
        if (name := normal(todo.pop())) not in allowed:
            allowed.add(name)
            with contextlib.suppress(metadata.PackageNotFoundError):
                todo += [text for text in metadata.requires(name) or [] if "extra ==" not in text]
    owners = metadata.packages_distributions()
    refused = {module for module, names in owners.items() if not {normal(name) for name in names} & allowed}
    assert "torch" in refused and "numpy" not in refused
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Refuse:\n  @staticmethod\n  def find_spec(name, path=None, target=None):\n"
        f"    if name in {refused}: raise ModuleNotFoundError(name, name=name)\nsys.meta_path.insert(0, Refuse)\n"
    )
    base, path, recipe = packed
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "first_convert.convert", "--base-gguf", base, "--first", recipe, "--outfile", out]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == path.read_bytes()


def test_tensors_stay_byte_for_byte_and_only_first_keys_are_added(packed):
    base, path, _ = packed
    assert tensor_bytes(path) == tensor_bytes(base)
    added = {n: v for n, v in fields(path).items() if not n.startswith(("first.", "general.tags"))}
    assert added == fields(base)
    assert fields(path)["general.tags"] == ["first", "layer-skipping"]
    assert fields(path)[key.PROTECTED] == [1]


def test_strip_gives_the_base_back(packed, tmp_path):
    base, path, _ = packed
    convert.convert(strip=path, outfile=tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == base.read_bytes()
    with pytest.raises(InputError, match="nothing to remove"):
        convert.convert(strip=base, outfile=tmp_path / "again.gguf")


def test_packing_again_replaces_the_routers(packed, tiny_model, tmp_path):
    base, path, _ = packed
    other = tiny.recipe(tmp_path / "other", tiny_model("llama")[0], seed=5)
    result = convert.convert(base_gguf=path, first=other, outfile=tmp_path / "second.gguf")
    assert result["replaced_routers"] and key.PROTECTED not in fields(tmp_path / "second.gguf")
    fresh = tmp_path / "fresh.gguf"
    convert.convert(base_gguf=base, first=other, outfile=fresh)
    first, second = fields(fresh), fields(tmp_path / "second.gguf")
    assert {n for n in first | second if first.get(n) != second.get(n)} == {key.SOURCE_NAMES, key.SOURCE_SHA256}
    assert tensor_bytes(fresh) == tensor_bytes(base)


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "q4_0", "f16"])
def test_llama_quantize_keeps_the_routers_as_they_are(kind, packed, tmp_path):
    _, path, _ = packed
    quantize.quantize(path, tmp_path / "q.gguf", kind)
    before, after = fields(path), fields(tmp_path / "q.gguf")
    assert {n: v for n, v in before.items() if n.startswith("first.")} == {
        n: v for n, v in after.items() if n.startswith("first.")
    }


def test_recipe_with_lora_is_refused_with_the_reason(tiny_model, tmp_path):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    tiny.adapter(model, recipe, target_modules=["q_proj"])
    with pytest.raises(InputError, match="holds a LoRA, which cannot be merged into an existing GGUF"):
        convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_broken_files_are_named(packed, tmp_path):
    _, path, recipe = packed
    data = path.read_bytes()
    for n, cut in enumerate((0, 3, 20, 1000, len(data) - 10_000)):
        broken = tmp_path / f"broken{n}.gguf"
        broken.write_bytes(data[:cut])
        with pytest.raises(InputError, match=broken.name):
            convert.convert(base_gguf=broken, first=recipe, outfile=tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry("general.alignment", "UINT32", 0), "alignment 0"),
        (Entry("general.alignment", "STRING", "32"), "must be of type u32 but is str"),
        (Entry("split.count", "ARRAY", [2], "UINT32"), "is u32[], expected a whole number"),
        (Entry("general.tags", "STRING", "abc"), "is str, expected str[]"),
        (Entry("general.tags", "ARRAY", [5], "UINT32"), "is u32[], expected str[]"),
        (Entry("general.name", "STRING", "twice"), "duplicate key"),
        (Entry("llama.attention.layer_norm_rms_epsilon", "FLOAT32", -1.5), "is -1.5"),
        (Entry(key.LORA_MERGED, "STRING", "no"), "is str, expected bool; --strip"),
        (Entry(key.SOURCE_NAMES, "UINT32", 1), "is u32, expected str[]; --strip"),
    ],
)
def test_odd_keys_of_a_base_are_named(entry, words, packed, tmp_path):
    _, path, recipe = packed
    twice, odd = words == "duplicate key", tmp_path / "odd.gguf"
    pack.rewrite(pack.open_gguf(path), odd, [entry], lambda name: twice or name != entry.name)
    out = tmp_path / "out.gguf"
    for dry_run in (True, False):
        with pytest.raises(InputError) as caught:
            convert.convert(base_gguf=odd, first=recipe, outfile=out, dry_run=dry_run)
        assert words in str(caught.value) and str(odd) in str(caught.value) and not out.exists()
    if entry.name.startswith("first."):
        convert.convert(strip=odd, outfile=out)
        assert not any(name.startswith("first.") for name in fields(out))


def test_routers_of_the_size_of_a_7b_model(tiny_model, tmp_path):
    """131,072 floats stay what they were, to the bit."""
    from pyfirst.recipe import FirstConfig, Recipe

    weight = np.random.default_rng(0).normal(size=(32, 4096)).astype(np.float32)
    recipe = Recipe(FirstConfig(32, 4096), weight, np.zeros(32, np.float32))
    found = pack.entries(recipe)
    base = tiny_model("llama")[1]
    pack.rewrite(pack.open_gguf(base), tmp_path / "big.gguf", found, lambda name: True)
    read = fields(tmp_path / "big.gguf")
    assert np.array_equal(np.float32(read[key.ROUTER_WEIGHT]), weight.ravel())
    assert pack.open_gguf(tmp_path / "big.gguf").get(key.ROUTER_WEIGHT) == weight.ravel().tolist()


def test_a_card_that_is_no_yaml_is_named(tiny_model, tmp_path):
    recipe = tiny.recipe(tmp_path / "recipe", tiny_model("llama")[0])
    (recipe / "README.md").write_text("---\nlicense: other: mine\n---\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe/README.md: .*no YAML") as caught:
        pack.describe(gguf().Metadata(), load_recipe(recipe), "", [recipe])
    assert "\n" not in str(caught.value)
