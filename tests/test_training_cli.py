"""first-train from the command line, on tiny random models."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import types
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from first_convert.convert import convert
from pyfirst import FirstLlama
from pyfirst.errors import InputError
from pyfirst.evaluation import Scorer
from pyfirst.recipe import load_recipe
from pyfirst.tasks import Example
from pyfirst.training import phases, report
from pyfirst.training.data import Example as Encoded
from pyfirst.training.data import MixedSampler, draw, encode, hold_back, load_examples, read_rows
from pyfirst.training.objectives import steer
from pyfirst.training.options import build_parser, protected_layers
from pyfirst.training.routers import FirstModel, Routers
from pyfirst.training.train import main, train, with_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    lines = []
    for i in range(40):
        lines.append({"prompt": f"Add {i} and {i + 1}.", "response": f"The sum is {2 * i + 1}.", "task": "math"})
        lines.append({"prompt": "over the lazy dog " * (i % 5 + 1) + str(i), "response": "fox", "task": "text"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def arguments(folder, data, out, *more: str) -> list[str]:
    return [
        "-m", str(folder), "--data", str(data), "--out", str(out), "--steps", "5", "--batch-size", "4",
        "--grad-accum", "2", "--hold-back", "6", "--prior-examples", "3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "out"
    assert main(arguments(folder, data, out, "--note", "data: made up, CC0")) == 0
    return out


def test_a_run_leaves_a_complete_recipe(folder, trained):
    names = sorted(p.name for p in trained.iterdir())
    assert names == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "first_config.json",
        "first_routers.safetensors",
    ]  # fmt: skip
    assert not [p for p in trained.parent.iterdir() if p != trained]
    assert len({p.stat().st_mode for p in trained.iterdir()}) == 1  # as the umask says
    recipe = load_recipe(trained)
    config = recipe.config
    assert config.protected == [0, 3]
    assert (config.block_count, config.embedding_length, config.router_norm) == (4, tiny.WIDTH, "rms")
    thresholds, kept = config.calibration["threshold"], config.calibration["kept"]
    assert thresholds == sorted(thresholds)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.9
    results = config.training["held_back"]
    assert abs(results["skipped"] - 0.25) < 0.15
    assert {"base", "dense_lora", "routed", "tasks", "task_from_mask"} <= set(results)
    assert [p["name"] for p in config.training["phases"]] == ["warm-up", "depths", "lora"]
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert "CC0" in card
    assert str(folder.parent) not in card + (trained / "adapter_config.json").read_text(encoding="utf-8")
    assert {t.dtype for t in load_file(trained / "adapter_model.safetensors").values()} == {torch.float16}


@torch.no_grad()
def token_losses(plain, example):
    """Of an example's response, float32 [N], by a model of transformers or PEFT and torch."""
    ids = torch.tensor([[*example.prompt, *example.response]])
    logits = plain(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(example.response), reduction="none")


def test_stored_recipe_decides_as_measured(folder, trained, data):
    """Reloaded through PEFT, the recipe gives the masks and losses that its card names."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    recipe = load_recipe(trained)
    config = recipe.config
    routers = Routers.from_recipe(recipe)
    base = PeftModel.from_pretrained(tiny.load(folder), trained)
    model = FirstModel(base, routers, config.threshold, config.prefill, protected=config.protected)
    examples, _ = load_examples(read_rows(str(data)), AutoTokenizer.from_pretrained(folder), 512)
    held = hold_back(examples, 6, 1)[1]
    results = report.measure(model, held, 4)
    stored = config.training["held_back"]
    assert results["skipped"] == stored["skipped"]
    assert results["modal_masks"] == stored["modal_masks"]
    for name in ("base", "dense_lora", "routed"):
        assert abs(results[name] - stored[name]) < 2e-4
    plain = PeftModel.from_pretrained(tiny.load(folder), trained)
    with plain.disable_adapter():
        assert abs(np.mean([float(token_losses(plain, e).mean()) for e in held]) - stored["base"]) < 2e-4
    assert abs(np.mean([float(token_losses(plain, e).mean()) for e in held]) - stored["dense_lora"]) < 2e-4
    assert stored["base"] - stored["dense_lora"] > 0.01 and abs(stored["dense_lora"] - stored["routed"]) > 1e-3


def test_a_prompt_does_not_help_to_guess_its_own_task(monkeypatch):
    """As first-eval counts it: by the nearest mean mask of the other prompts."""

    def losses(model, examples, *args, **kwargs):
        keep = torch.tensor([[layer == "#" for layer in e.text] for e in examples])
        return torch.ones(len(examples)), keep, torch.ones(keep.shape)

    def measured(*masks):
        none = array("i")
        held = [Encoded(none, none, task, mask) for task, mask in masks]
        return report.measure(types.SimpleNamespace(base=None), held, 1)

    monkeypatch.setattr(report, "losses", losses)
    # The other mask of a task is as far as can be, the mean of the other task in the middle.
    assert measured(("a", "##.."), ("a", "..##"), ("b", "#.#."), ("b", ".#.#"))["task_from_mask"] == 0
    # "...." is as near to b as to the rest of a, which shares the credit.
    found = measured(*2 * [("a", "##.."), ("b", "#.#."), ("c", "####")], ("a", "...."))
    assert found["task_from_mask"] == round(6.5 / 7, 4) and found["layers_that_differ"] == 0.5
    assert found["modal_masks"] == {"a": "##..", "b": "#.#.", "c": "####"}
    assert "task_from_mask" not in measured(("a", "##.."), ("b", "#.#."))


def test_same_seed_same_recipe(folder, data, trained, tmp_path):
    assert main(arguments(folder, data, tmp_path / "again")) == 0
    for name in ("first_routers.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def told(recipe) -> list[dict]:
    """The phases that a recipe names, without how long they took."""
    phases = load_recipe(recipe).config.training["phases"]
    return [{**p, "log": [{k: v for k, v in row.items() if k != "seconds"} for row in p["log"]]} for p in phases]


@pytest.mark.parametrize(("name", "step"), [("warm-up", 1), ("depths", 1), ("lora", 1), ("lora", 3)])
def test_resumed_is_bit_equal(folder, data, trained, tmp_path, monkeypatch, name, step):
    """Interrupted right behind a checkpoint, within a phase or at its end, then resumed."""
    out = tmp_path / "out"
    argv = arguments(folder, data, out, "--save-steps", "1")

    def stop(self, args, state, control, **kwargs):
        if (self.trainer.phase.name, state.global_step) == (name, step):
            raise KeyboardInterrupt

    monkeypatch.setattr(phases.Watch, "on_save", stop)
    assert main(argv) == 130
    assert not out.exists()
    monkeypatch.undo()
    assert main([*argv, "--resume"]) == 0
    assert told(out) == told(trained)
    for file in ("first_routers.safetensors", "adapter_model.safetensors"):
        assert (out / file).read_bytes() == (trained / file).read_bytes()


@pytest.mark.parametrize("broken", ["warm-up.safetensors", "lora/checkpoint-2", "lora/checkpoint-2/model.safetensors"])
def test_what_was_half_written_is_made_again(folder, data, trained, tmp_path, monkeypatch, broken):
    out = tmp_path / "out"
    argv = arguments(folder, data, out, "--save-steps", "1")

    def stop(self, args, state, control, **kwargs):
        if (self.trainer.phase.name, state.global_step) == ("lora", 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(phases.Watch, "on_save", stop)
    assert main(argv) == 130
    monkeypatch.undo()
    path = tmp_path / ".out.work" / broken
    if path.is_dir():
        (path / "trainer_state.json").unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    assert main([*argv, "--resume"]) == 0
    for file in ("first_routers.safetensors", "adapter_model.safetensors"):
        assert (out / file).read_bytes() == (trained / file).read_bytes()


def test_resuming_another_run_is_refused(folder, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = arguments(folder, data, out, "--save-steps", "1")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(phases.Watch, "on_save", stop)
    assert main(argv) == 130
    monkeypatch.undo()
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text(encoding="utf-8").replace("sum", "total"), encoding="utf-8")
    for more, words in (
        (("--target-skip", "0.5"), "--target-skip"),
        (("--lora-r", "4"), "before: 8, now: 4"),
        (("--data", str(other)), "another --data"),
    ):
        capsys.readouterr()
        assert main([*argv, "--resume", *more]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert main([*argv, "--resume", "--note", "other words for the card"]) == 0


def test_resuming_with_other_content_of_a_folder_is_refused(folder, data, trained, tmp_path, monkeypatch, capsys):
    """Of the same shapes; what has only been moved is the same run."""
    here, there = ({o: tmp_path / f"{o}-{n}" for o in ("-m", "--recipe", "--teacher")} for n in (1, 2))
    for paths, seed in ((here, 1), (there, 2)):
        tiny.make("llama", paths["-m"], seed=seed)
        tiny.recipe(paths["--recipe"], folder, seed=seed)
        shutil.copytree(trained, paths["--teacher"])
    other = there["--teacher"] / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(other).items()}, other)

    def run(paths, *more):
        named = [str(part) for option in paths.items() for part in option]
        argv = arguments(folder, data, tmp_path / "out", "--phase", "lora", "--distill", "0.5", "--save-steps", "1")
        return main([*argv, *named, *more])

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(phases.Watch, "on_save", stop)
    assert run(here) == 130
    monkeypatch.undo()
    for option, name in (("-m", "--model"), ("--recipe", "--recipe"), ("--teacher", "--teacher")):
        capsys.readouterr()
        assert run({**here, option: there[option]}, "--resume") == 2
        assert f"another {name} than" in capsys.readouterr().err.splitlines()[-1]
    moved = {option: path.rename(tmp_path / f"moved{option}") for option, path in here.items()}
    assert run(moved, "--resume") == 0


def test_a_template_with_the_date_does_not_end_a_run(folder, data, tmp_path, monkeypatch, capsys):
    """The same template at another time is the same run, another template or tokenizer is not."""
    model = shutil.copytree(folder, tmp_path / "model")
    path = model / "chat_template.jinja"
    path.write_text("{{ strftime_now('%H:%M:%S.%f') }}" + path.read_text(encoding="utf-8"), encoding="utf-8")
    argv = arguments(model, data, tmp_path / "out")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "measure", stop)
    assert main(argv) == 130
    monkeypatch.undo()
    text = path.read_text(encoding="utf-8")
    path.write_text("Hello. " + text, encoding="utf-8")
    assert main([*argv, "--resume"]) == 2
    assert "another --model than" in capsys.readouterr().err.splitlines()[-1]
    path.write_text(text, encoding="utf-8")
    path = model / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    tokenizer = json.loads(text)
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert main([*argv, "--resume"]) == 2
    assert "another --model than" in capsys.readouterr().err.splitlines()[-1]
    path.write_text(text, encoding="utf-8")
    assert main([*argv, "--resume"]) == 0
    assert "lora: done before" in capsys.readouterr().err


@pytest.mark.parametrize("size", [60, 150])
def test_a_full_disk_is_named(folder, data, tmp_path, capsys, size):
    """safetensors and torch have errors of their own for it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 1024, limits[1]))
    try:
        assert main(arguments(folder, data, tmp_path / "out", "--save-steps", "1")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}: cannot be written to, is the disk full?" in capsys.readouterr().err.splitlines()[-1]


def test_routers_alone_then_lora_on_frozen_routers(folder, data, tmp_path, capsys):
    routers = ("--phase", "routers", "--prefill", "skip", "--target-skip", "0.5")
    assert main(arguments(folder, data, tmp_path / "routers", *routers)) == 0
    first = load_recipe(tmp_path / "routers")
    assert first.adapter_dir is None
    assert first.config.prefill == "skip"
    more = ("--phase", "lora", "--recipe", str(tmp_path / "routers"))
    assert main(arguments(folder, data, tmp_path / "both", *more)) == 0
    second = load_recipe(tmp_path / "both")
    assert second.adapter_dir is not None
    assert np.array_equal(first.weight, second.weight)
    assert first.config.threshold == second.config.threshold
    for option, other, same in (
        ("--target-skip", "0.25", "0.5"),
        ("--prefill", "full", "skip"),
        ("--protect", "0", "last,0"),
        ("--window", "8", "512"),
        ("--router-norm", "none", "rms"),
    ):
        capsys.readouterr()
        assert main(arguments(folder, data, tmp_path / "no", *more, option, other)) == 2
        assert f"{option} {other}: the routers of" in capsys.readouterr().err.splitlines()[-1]
        more = (*more, option, same)
    assert main(arguments(folder, data, tmp_path / "again", *more)) == 0
    # Told of what the routers were trained with, not of defaults.
    assert second.config.training["options"]["prefill"] == "skip"
    assert second.config.training["options"]["target_skip"] == 0.5
    assert second.config.training["warnings"] == []


def test_gates_learn_with_the_lora(folder, data, tmp_path, monkeypatch):
    argv = ("--objective", "gates", "--save-steps", "1")
    monkeypatch.setattr(phases, "collapse", lambda *_: ["collapsed"])
    seen = {}
    on_step_end = phases.Watch.on_step_end

    def watched(self, *args, **kwargs):
        on_step_end(self, *args, **kwargs)
        first = self.trainer.first
        learning = {name for name, parameter in first.named_parameters() if parameter.requires_grad}
        found = learning, first.routers.weight.detach().clone(), float(first.threshold)
        seen.setdefault(self.trainer.phase.name, []).append(found)

    monkeypatch.setattr(phases.Watch, "on_step_end", watched)
    assert main(arguments(folder, data, tmp_path / "whole", *argv)) == 0
    for name, routers in (("warm-up", set()), ("joint", {"routers.weight", "routers.bias"}), ("lora", set())):
        learning = seen[name][0][0]
        assert routers <= learning and any("lora_" in other for other in learning - routers)
        assert all("lora_" in other for other in learning - routers)
    (_, before, start), *_, (_, after, end) = seen["joint"]
    assert (after - before)[1:3].abs().amax(1).min() > 0 and start != end
    config = load_recipe(tmp_path / "whole").config
    assert [p["name"] for p in config.training["phases"]] == ["warm-up", "joint", "lora"]
    assert abs(config.training["held_back"]["skipped"] - 0.25) < 0.15

    for name in ("joint", "lora"):

        def stop(self, args, state, control, name=name, **kwargs):
            if (self.trainer.phase.name, state.global_step) == (name, 1):
                raise KeyboardInterrupt

        monkeypatch.setattr(phases.Watch, "on_save", stop)
        assert main([*arguments(folder, data, tmp_path / "cut", *argv), "--resume"]) == 130
    monkeypatch.undo()
    assert main([*arguments(folder, data, tmp_path / "cut", *argv), "--resume"]) == 0
    assert load_recipe(tmp_path / "cut").config.training["warnings"] == config.training["warnings"] != []
    for file in ("first_routers.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_lora_meets_many_depths_before_one_is_chosen(folder, data, tmp_path, capsys):
    assert main(arguments(folder, data, tmp_path / "out", "--prior-examples", "16", "--steps", "20")) == 0
    phases = {phase["name"]: phase for phase in load_recipe(tmp_path / "out").config.training["phases"]}
    assert {name: phase["steps"] for name, phase in phases.items()} == {"warm-up": 4, "depths": 5, "lora": 11}
    assert phases["lora"]["log"][-1]["kept"] == 0.75
    assert any(0 < share < 1 for share in phases["depths"]["layer_kept"])
    said = capsys.readouterr().err
    assert said.count("leaving out each of 2 layers on 32 examples") == 1


@pytest.mark.parametrize("kind", ["loo", "even", "random", "2"])
def test_static_gives_every_prompt_the_same_mask(folder, data, tmp_path, kind):
    assert main(arguments(folder, data, tmp_path / "out", "--static", kind)) == 0
    recipe = load_recipe(tmp_path / "out")
    assert recipe.config.training["held_back"]["masks"] == 1
    assert recipe.config.training["held_back"]["skipped"] == 0.25
    assert not recipe.weight.any()


@pytest.mark.parametrize("kind", ["one task", "loo"])
def test_a_single_mask_grows_and_shrinks_in_the_order_of_its_layers(data, tmp_path, monkeypatch, kind):
    """In the runtime, by skip=; at the recipe's threshold it is the mask that was asked for."""
    model, order = tiny.make("llama", tmp_path / "model", num_hidden_layers=8), [5, 2, 6, 1, 3, 4]
    monkeypatch.setattr("pyfirst.training.search.find_order", lambda *given: torch.tensor(order)[: given[2]])
    path = tmp_path / "some.jsonl"
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if kind == "loo" or '"text"' in line]
    path.write_text("\n".join(lines), encoding="utf-8")
    more = ("--phase", "routers", *(("--static", "loo") if kind == "loo" else ()))
    assert main(arguments(model, path, tmp_path / "out", *more)) == 0
    convert(model, first=tmp_path / "out", outfile=tmp_path / "out.gguf", outtype="f32")

    def skipped(**how) -> list[int]:
        llm = FirstLlama(str(tmp_path / "out.gguf"), n_ctx=64, verbose=False, **how)
        next(iter(llm.generate([5, 6, 7], temp=0.0)))
        llm.close()
        return (~llm.routing.mask).nonzero()[0].tolist()

    assert skipped() == sorted(order[:2])
    for count in range(6):
        assert skipped(skip=count / 8) == sorted(order[:count])


def test_long_work_tells_how_far_it_is(folder, data, tmp_path, monkeypatch, capsys):
    """A line at the latest every half a minute, and none of these where everything is done by then."""
    monkeypatch.setattr(report, "QUIET", 3600.0)
    assert main(arguments(folder, data, tmp_path / "out")) == 0
    quiet = capsys.readouterr().err
    monkeypatch.setattr(report, "QUIET", 0.0)
    assert main(arguments(folder, data, tmp_path / "out", "--force")) == 0
    told = capsys.readouterr().err
    for pattern in (
        r"0 of \d+ examples, layer 1$",
        r"depths 1/\d+$",
        r"\w+: 1 of \d+ depths$",
        r"(\d+) of \1 prompts$",
        r"(\d+) of \1 examples$",
    ):
        assert re.search(f"^  {pattern}", told, re.MULTILINE), pattern
        assert not re.search(f"^  {pattern}", quiet, re.MULTILINE), pattern


@pytest.fixture
def bf16(monkeypatch):
    """A processor that multiplies bfloat16; others emulate it, fast enough for tiny models."""
    monkeypatch.setattr("pyfirst.training.train.multiplies_bf16", lambda: True)


@pytest.mark.usefixtures("bf16")
def test_the_papers_objective_and_bf16(folder, data, tmp_path):
    assert main(arguments(folder, data, tmp_path / "out", "--objective", "paper", "--bf16")) == 0
    config = load_recipe(tmp_path / "out").config
    assert config.threshold == 0.5
    assert [p["name"] for p in config.training["phases"]] == ["routers", "lora"]


@pytest.mark.parametrize(
    "more",
    [
        ("--router-lr", "1e-1", "--target-skip", "0.5"),
        ("--target-skip", "0"),
        ("--target-skip", "0", "--static", "loo"),
        ("--bf16", "--router-norm", "none"),
    ],
)
@pytest.mark.usefixtures("bf16")
def test_extreme_settings_stay_finite(folder, data, tmp_path, more):
    assert main(arguments(folder, data, tmp_path / "out", *more)) == 0
    recipe = load_recipe(tmp_path / "out")
    assert np.isfinite(recipe.weight).all()


def test_nan_steps_are_left_out_and_end_the_run(folder, data, trained, tmp_path, monkeypatch, capsys):
    """One bad step costs nothing but itself, lasting NaN leaves the recipe there was."""
    before = (trained / "first_routers.safetensors").read_bytes()
    original = phases.PhaseTrainer.compute_loss
    calls = []

    def poisoned(bad):
        def compute_loss(self, *args, **kwargs):
            calls.append(1)
            loss = original(self, *args, **kwargs)
            return loss * float("nan") if bad(len(calls)) else loss

        return compute_loss

    monkeypatch.setattr(phases.PhaseTrainer, "compute_loss", poisoned(lambda n: n == 3))
    assert main(arguments(folder, data, tmp_path / "one")) == 0
    assert "left out" in capsys.readouterr().err
    assert np.isfinite(load_recipe(tmp_path / "one").weight).all()
    monkeypatch.setattr(phases.PhaseTrainer, "compute_loss", poisoned(lambda n: True))
    for steps in ("30", "5"):  # in a short run too
        assert main(arguments(folder, data, trained, "--force", "--steps", steps)) == 2
        assert "not finite" in capsys.readouterr().err
    assert (trained / "first_routers.safetensors").read_bytes() == before


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_calibrated_thresholds_lie_between_scores(folder, prefill):
    """Also between those of layers with a bias alone, which are the same for every prompt but for rounding."""
    routers = Routers(4, tiny.WIDTH)
    torch.nn.init.normal_(routers.weight[1], std=0.3)
    with torch.no_grad():
        routers.bias.copy_(torch.tensor([0.0, 0.0, 0.7, -0.9]))
    model = FirstModel(tiny.load(folder), routers, 0.5, prefill, window=5, protected=[0])
    some, _ = load_examples([Example("a", f"the {i} dogs" * i, ["fox"], "") for i in range(1, 7)], tiny.tokenizer(), 99)
    found = report.calibration(model, some, 2)
    for threshold, kept in zip(found["threshold"], found["kept"], strict=True):
        for moved in (threshold - 2e-6, threshold + 2e-6):
            assert report.kept_share(model, some, 2, moved) == pytest.approx(kept, abs=1e-5)
    assert found["kept"][0] == 1.0 and len(set(found["kept"])) > 2


def test_collapse_is_told():
    class Stub:
        protected = torch.tensor([True, False, False])

    def told(*rows):
        return phases.collapse([tuple(map(bool, row)) for row in rows] * 20, Stub())

    assert "no layer" in told([1, 1, 1])[0]
    assert "every unprotected" in told([1, 0, 0])[0]
    assert "same mask" in told([1, 0, 1])[0]
    assert told([1, 0, 1], [1, 1, 0]) == []


def test_missed_budget_is_told(folder, data, tmp_path, capsys):
    assert main(arguments(folder, data, tmp_path / "out", "--objective", "paper", "--target-skip", "0.5")) == 0
    assert "the target was 50%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--target-skip", "1.5"], "target-skip"),
        (["--target-skip", "0.75"], "only 2 of 4"),
        (["--protect", "9"], "layer '9'"),
        (["--protect", "x"], "layer 'x'"),
        (["--batch-size", "0"], "batch-size"),
        (["--lr", "nan"], "--lr"),
        (["--lora-targets", "no_such_layer"], "no_such_layer"),
        (["--phase", "lora"], "--recipe"),
        (["--teacher", "x"], "--distill"),
        (["--teacher", "x", "--distill", "0.5", "--phase", "routers"], "--phase both or lora"),
        (["--distill", "0.5", "--teacher", "/no/such/dir"], "/no/such/dir"),
        (["--static", "best"], "--static 'best'"),
        (["--static", "3"], "layer 3"),
        (["--static", "0,1,2,3", "--protect", "none"], "no layer would be left"),
        (["--target-skip", "0.9", "--protect", "none"], "4 layers of 4"),
        (["--protect", "0,1,2,3", "--target-skip", "0"], "every layer is protected"),
        (["--lora-alpha", "0"], "--lora-alpha"),
        (["--lora-targets", "q_proj,no_such_layer"], "no_such_layer"),
        (["--lora-targets", ""], "--lora-targets"),
        (["--lora-targets", "mlp"], "--lora-targets mlp: a module that takes no LoRA"),
        (["--penalty", "nan"], "--penalty"),
        (["--save-steps", "-1"], "--save-steps"),
        (["--seed", "-1"], "--seed"),
        (["--recipe", "x"], "--phase lora"),
        (["--static", "loo", "--objective", "paper"], "--objective search"),
        (["--max-length", "18"], "usable examples"),
        (["--note", "by \udcff"], "--note is not UTF-8"),
        (["--base-name", "\udcff"], "--base-name is not UTF-8"),
        (["--base-license", "\udcff"], "--base-license is not UTF-8"),
        (["--out", "/tmp/\udcff"], "--out is not UTF-8"),
        (["-m", "/no/such/dir"], "no such directory"),
        (["--data", "/no/such/file.jsonl"], "no such file"),
        (["--data", "me/mine", "./me/mine"], "given twice"),
    ],
)
def test_wrong_options_end_in_one_line(folder, data, tmp_path, capsys, more, words):
    capsys.readouterr()
    assert main(arguments(folder, data, tmp_path / "out", *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("0 prompts", "80 prompts"))]
    assert len([line for line in lines if "error:" in line]) == 1
    assert words in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{}", "[]", '{"added_tokens": [{"id": "x"}]}'])
def test_a_damaged_tokenizer_is_named(folder, data, tmp_path, capsys, content):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").write_text(content, encoding="utf-8")
    assert main(arguments(broken, data, tmp_path / "out")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(broken) in last and "tokenizer.json" in last and "causal" not in last


@pytest.mark.parametrize("epochs", ["0", "-1", "nan", "inf"])
def test_epochs_are_a_positive_number(folder, data, tmp_path, capsys, epochs):
    assert main(["-m", str(folder), "--data", str(data), "--out", str(tmp_path / "out"), "--epochs", epochs]) == 2
    assert "--epochs" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("odd", ["fox\n", " fox", "\n\n fox \t"])
def test_white_space_around_an_answer_is_not_trained(odd):
    """first-eval strips it, so the model would be measured on other tokens than it learned."""
    tokenizer = tiny.tokenizer()
    assert encode(tokenizer, "the quick", odd) == encode(tokenizer, "the quick", "fox")


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("answer", ["x + 1 <|im_end|> more", "<|im_start|>", "fox"])
def test_answers_are_the_tokens_that_are_scored(tiny_model, template, answer):
    """The name of a special token in an answer is text, in the runtime too; what ends the answer is a token."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    if not template:
        tokenizer.chat_template = None
    llm = Scorer(tiny_model("llama")[1], routing=False)
    assert encode(tokenizer, "over <|im_end|>", answer)[1] == llm.answer_tokens(answer, tokenizer.eos_token_id)
    llm.close()


def test_a_template_without_the_users_turn_is_refused():
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}"
    tokenizer.name_or_path = "my-model"
    with pytest.raises(InputError, match=r"tasks:7: no token is left .* chat template of my-model"):
        load_examples([Example("a", "fox", ["dog"], "tasks:7")], tokenizer, 60)


def test_a_task_that_is_only_held_back_is_told(folder, data, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    lines = data.read_text(encoding="utf-8") + json.dumps({"prompt": "solo", "response": "fox", "task": "rare"})
    path.write_text(lines, encoding="utf-8")
    assert main(arguments(folder, path, tmp_path / "out", "--phase", "routers")) == 0
    words = "nothing of rare was trained"
    assert capsys.readouterr().err.startswith(f"warning: {words}")
    assert words in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("skip", ["a lot", None, 7, True])
def test_the_share_that_a_recipe_names_is_a_share(folder, data, tmp_path, capsys, skip):
    recipe = tiny.recipe(tmp_path / "recipe", folder, training={"options": {"target_skip": skip}})
    assert main(arguments(folder, data, tmp_path / "out", "--phase", "lora", "--recipe", str(recipe))) == 2
    words = f"first_config.json: 'training.options.target_skip' is {skip!r}"
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_on_one_task_the_search_is_the_best_single_mask(folder, data, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text("".join(line for line in data.read_text("utf-8").splitlines(True) if "math" in line), "utf-8")
    for name, more in (("search", ()), ("loo", ("--static", "loo"))):
        assert main(arguments(folder, path, tmp_path / name, *more)) == 0
    for file in ("first_routers.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "search" / file).read_bytes() == (tmp_path / "loo" / file).read_bytes()


def test_one_mask_for_all_tasks_is_told(folder, data, tmp_path, monkeypatch):
    measure = report.measure
    monkeypatch.setattr(report, "measure", lambda *args: {**measure(*args), "masks": 1})
    assert main(arguments(folder, data, tmp_path / "out", "--phase", "routers")) == 0
    told = [w for w in load_recipe(tmp_path / "out").config.training["warnings"] if "collapsed" in w]
    assert told == ["routing collapsed: every held-back prompt got the same mask"]
    assert f"Warning: {told[0]}." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_one_mask_is_no_collapse_where_no_other_is_possible(folder, data, tmp_path):
    more = ("--phase", "routers", "--protect", "none", "--target-skip", "0.75")
    assert main(arguments(folder, data, tmp_path / "out", *more)) == 0
    training = load_recipe(tmp_path / "out").config.training
    assert (training["held_back"]["skipped"], training["warnings"]) == (0.75, [])


@pytest.mark.parametrize("targets", [(), ("--lora-targets", "q_proj,o_proj")])
def test_only_the_language_model_of_a_multimodal_parent_learns(targets, data, tmp_path):
    folder, out = tiny.multimodal(tmp_path / "hf"), tmp_path / "out"
    assert main(arguments(folder, data, out, *targets)) == 0
    names = load_file(out / "adapter_model.safetensors")
    assert names and all("language_model.layers" in name for name in names)
    convert(folder, first=out, outfile=tmp_path / "out.gguf", outtype="f32")


@pytest.mark.parametrize("kind", ["lfm2", "rwkv"])
def test_layers_with_a_state_are_refused_before_training(folder, data, tmp_path, capsys, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2} if kind == "lfm2" else {}
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, **own)
    odd = shutil.copytree(folder, tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(odd)
    assert main(arguments(odd, data, tmp_path / "out")) == 2
    named = {"lfm2": "has conv layers", "rwkv": "has recurrent layers"}
    assert named[kind] in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_router_of_experts_gets_no_lora(tmp_path):
    """Llama 4's is a linear layer that returns two tensors."""
    args = build_parser().parse_args(arguments("x", "x", "x"))
    model = with_lora(tiny.load(tiny.make("llama4", tmp_path)), args, "x")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert any("q_proj" in name for name in names) and not any("router" in name for name in names)


@pytest.mark.parametrize("named", [True, False])
def test_distillation_follows_a_teacher_that_stays_what_it_was(named, folder, data, tmp_path, monkeypatch):
    """Its logits are those of its own adapter with all layers, through PEFT, whatever has been trained meanwhile."""
    from peft import PeftModel

    folder = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))  # the teacher has none
    teacher = tmp_path / "teacher"
    same = () if named else ("--keep-checkpoints",)
    assert main(arguments(folder, data, teacher, "--target-skip", "0", *same)) == 0
    truth = PeftModel.from_pretrained(tiny.load(folder), teacher)
    if not named:  # the same warm-up as in the run below
        warm = load_file(tmp_path / ".teacher.work" / "warm-up.safetensors")
        lora = {k.removeprefix("base."): v for k, v in warm.items() if "lora_" in k}
        assert not truth.load_state_dict(lora, strict=False).unexpected_keys
    batches, worst = [], []
    loss, divergence = phases.PhaseTrainer.compute_loss, phases.distillation

    def watched_loss(self, model, inputs, *args, **kwargs):
        batches.append(inputs)
        return loss(self, model, inputs, *args, **kwargs)

    def watched_divergence(student, logits):
        batch = batches[-1]
        mask, labels = batch["attention_mask"], batch["labels"]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            wanted = truth(input_ids=batch["input_ids"], attention_mask=mask, position_ids=places).logits
        worst.append(float((logits - wanted[:, :-1][labels[:, 1:] != -100]).abs().max()))
        return divergence(student, logits)

    monkeypatch.setattr(phases.PhaseTrainer, "compute_loss", watched_loss)
    monkeypatch.setattr(phases, "distillation", watched_divergence)
    more = ("--teacher", str(teacher)) if named else ()
    assert main(arguments(folder, data, tmp_path / "out", "--distill", "0.5", *more)) == 0
    assert len(worst) == 8
    assert max(worst) < 1e-4
    assert main(arguments(folder, data, tmp_path / "alone")) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() != (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("share", ["0", "0.5"])
def test_passes_add_up_to_one_batch(folder, data, tmp_path, monkeypatch, share):
    """With responses of different lengths, and the divergence from a teacher."""
    more = ("--phase", "lora", "--recipe", str(tiny.recipe(tmp_path / "routers", folder)), "--distill", share)
    gradients = []

    def stop(self, *_, **__):
        gradients.append(torch.cat([p.grad.flatten() for p in self.trainer.first.lora().values()]))
        raise KeyboardInterrupt

    monkeypatch.setattr(phases.Watch, "on_pre_optimizer_step", stop)
    for batch, passes in (("8", "1"), ("2", "4")):
        sizes = ("--batch-size", batch, "--grad-accum", passes)
        assert main(arguments(folder, data, tmp_path / "out", *more, *sizes)) == 130
    assert gradients[0].any()
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_a_teacher_of_another_rank_is_refused(folder, data, trained, tmp_path, capsys):
    more = ("--distill", "0.5", "--teacher", str(trained), "--lora-r", "4")
    assert main(arguments(folder, data, tmp_path / "out", *more)) == 2
    assert "expected rank 4" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16")
@pytest.mark.parametrize("able", [True, False, None])
def test_bf16_on_a_processor_without_it_is_float32(folder, data, tmp_path, monkeypatch, capsys, able):
    found = []

    def stop(_, options, content, *more):
        found.append((options["bf16"], content["model"]))
        raise InputError("enough")

    monkeypatch.setattr("pyfirst.training.train.multiplies_bf16", lambda: able)
    monkeypatch.setattr("pyfirst.training.checkpoints.begin", stop)
    assert main(arguments(folder, data, tmp_path / "out", "--bf16")) == 2
    assert ("does not multiply bfloat16" in capsys.readouterr().err) == (able is False)
    assert main(arguments(folder, data, tmp_path / "out")) == 2
    assert (found[0] == found[1]) == (able is False)


def test_a_data_set_by_name(monkeypatch):
    class Table(list):
        column_names = ("prompt", "response", "other")

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, kind, split: Table([{"prompt": f"{name} {kind}", "response": split, "other": 1}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_rows("me/mine:dev") == [Example("mine", "me/mine None", ["dev"], "me/mine:dev: row 0", named=False)]
    found = read_rows("me/mine/its:dev")[0]
    assert (found.task, found.prompt, found.references) == ("mine/its", "me/mine its", ["dev"])
    assert read_rows("me/mine:train[:10%]")[0].references == ["train[:10%]"]
    fake.load_dataset = lambda *_, split: Table([{"prompt": "x", "response": None}])
    with pytest.raises(InputError, match="row 0: expected 'references'"):
        read_rows("me/mine")
    fake.load_dataset = lambda *_, split: Table([{"prompt": "half \ud83d", "response": "a", "task": "two\nlines"}])
    with pytest.raises(InputError, match="row 0: half of a UTF-16 pair"):
        read_rows("me/mine")
    fake.load_dataset = lambda *_, split: Table([{"prompt": "b", "response": "a", "task": "two\nlines"}])
    assert read_rows("me/mine")[0].task == "two lines"
    Table.column_names = ("prompt", "text")
    with pytest.raises(InputError, match="no column 'response'"):
        read_rows("me/mine")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_rows("me/mine")


@pytest.mark.parametrize(
    ("options", "drawn", "words"),
    [(("--steps", "1"), 3, "trained on: 24 examples"), (("--phase", "routers"), 0, "fitted to some of")],
)
def test_the_card_counts_the_steps_that_were_taken(folder, data, tmp_path, options, drawn, words):
    """Each of the three phases takes a step at least; routers alone are fitted, which takes none."""
    assert main(arguments(folder, data, tmp_path / "out", *options)) == 0
    training = load_recipe(tmp_path / "out").config.training
    assert training["drawn"] == drawn * training["options"]["batch_size"] * training["options"]["grad_accum"]
    assert words in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "licence", "options"),
    [
        ("Llama 3.2: my tune #2", "other: see the file", ("--static", "even", "--target-skip", "0")),
        ("'@me/[x] \u6a21\u578b \U0001f999", "no", ("--penalty", "0", "--epochs", "0.3", "--protect", "0, 3")),
    ],
)
def test_the_card_can_be_read_and_its_options_make_the_recipe_again(folder, data, tmp_path, name, licence, options):
    argv = arguments(folder, data, tmp_path / "out", "--phase", "routers", *options)
    if "--epochs" in options:
        argv = [part for at, part in enumerate(argv) if "--steps" not in argv[max(0, at - 1) : at + 1]]
    assert main([*argv, "--base-name", name, "--base-license", licence]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"license": licence, "base_model": name, "tags": ["first", "layer-skipping"]}
    shown = shlex.split(card.splitlines()[-1])
    again = build_parser().parse_args(["-m", "x", "--data", "x", "--out", "x", *shown])
    training = load_recipe(tmp_path / "out").config.training
    wanted = {**training["options"], "epochs": None, "steps": training["steps"]}
    assert {key: value for key, value in vars(again).items() if key in wanted} == wanted


@pytest.fixture(scope="module")
def of_one_process(folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    assert main(arguments(folder, data, out, "--steps", "4", "--batch-size", "8")) == 0
    return out


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_write_one_recipe(folder, data, of_one_process, tmp_path, machines):
    """As with two GPUs, or on two machines with one each; that there are none is said by the environment alone."""
    given = " ".join(arguments(folder, data, tmp_path / "out")).replace("--steps 5", "--epochs 1").split(" ")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *where]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def launched(rank: int) -> subprocess.CompletedProcess[str]:
        command = [*launch, "--machine_rank", str(rank), "--module", "pyfirst.training.train", *given]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(launched, range(machines)))
    assert [process.returncode for process in done] == [0] * machines, [process.stderr for process in done]
    assert [process.stderr.count("wrote") for process in done] == [1, 0][:machines]
    training = load_recipe(tmp_path / "out").config.training
    assert training["steps"] == 4  # of 2 processes x 4 x 2 examples, from 68
    assert training["drawn"] == 4 * 16
    for name in ("adapter_model.safetensors", "first_routers.safetensors"):
        both, one = (load_file(out / name) for out in (tmp_path / "out", of_one_process))
        assert max(float((both[key].float() - one[key].float()).abs().max()) for key in one) < 5e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no examples"),
        ("{oops", "not valid JSON"),
        ('{"prompt": "a"}', "expected"),
        ('["a"]', "expected"),
        ('{"prompt": "a", "response": ""}', "not a text, or empty"),
        ('{"prompt": "a\\ud83d", "response": "b"}', "bad.jsonl:1: half of a UTF-16 pair"),
        ('[\n{"prompt": "a", "response": "b"}\n]', "one object a line"),
    ],
)
def test_wrong_data_names_the_line(tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_rows(str(path))


def test_what_is_no_model_is_refused(folder, data, trained, tmp_path, capsys):
    assert main(arguments(trained, data, tmp_path / "out")) == 2
    assert "adapter" in capsys.readouterr().err
    assert main(arguments(tmp_path, data, tmp_path / "out")) == 2
    assert main(arguments(folder, data, trained)) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["fp8", "unknown", "bin", "adapter"])
def test_what_cannot_be_converted_is_not_trained(data, tmp_path, capsys, change):
    """The same folders with a LoRA are refused by first-convert."""
    model = tiny.make("llama", tmp_path / "model")
    lora, path = tiny.adapter(model, tmp_path / "lora"), model / "config.json"
    if change == "bin":
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    elif change == "adapter":
        shutil.copy(lora / "adapter_config.json", model)
        shutil.copy(lora / "adapter_model.safetensors", model)
    else:
        how = {"quant_method": change} if change == "fp8" else {"bits": 4}
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
    assert main(arguments(model, data, tmp_path / "out")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(model) in last and {"bin": "safetensors"}.get(change, change) in last
    with pytest.raises(InputError):
        convert(model, lora=lora, outfile=tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("change", "words"),
    [("missing", "lack model.layers.1.mlp.up_proj.weight"), ("short", r"[127, 64]"), ("cut", "cannot be loaded")],
)
def test_weights_that_do_not_fit_are_never_made_up(data, tmp_path, capsys, change, words):
    model = tiny.make("llama", tmp_path / "model")
    path, name = model / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    if change == "missing":
        del tensors[name]
    elif change == "short":
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    assert main(arguments(model, data, tmp_path / "out")) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("objective", ["search", "paper"])
def test_a_model_that_is_not_finite_leaves_no_recipe(data, tmp_path, capsys, objective):
    model = tiny.make("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    more = ("--steps", "2", "--target-skip", "0", "--objective", objective)
    assert main(arguments(model, data, tmp_path / "out", *more)) == 2
    assert "values that are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_do_not_do(data, tmp_path, capsys):
    assert main(arguments(tiny.make("llama", tmp_path / "few", vocab_size=100), data, tmp_path / "out")) == 2
    assert "the model has 100" in capsys.readouterr().err
    model = tiny.make("llama", tmp_path / "endless")
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["eos_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    (model / "chat_template.jinja").unlink()
    assert main(arguments(model, data, tmp_path / "out")) == 2
    assert "no eos_token" in capsys.readouterr().err.splitlines()[-1]


def test_prompts_are_cut_to_the_models_positions(data, tmp_path, capsys):
    model = tiny.make("gpt2", tmp_path / "model", max_position_embeddings=48)
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": f"{i} " + "the lazy dog " * 30, "response": f"{i}"} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(arguments(model, path, tmp_path / "out", "--phase", "routers")) == 0
    assert (
        "20 prompts shortened and 0 examples dropped of 20 to fit the model's 48 positions" in capsys.readouterr().err
    )


def test_the_recipe_of_a_mixture_of_experts_can_be_converted(data, tmp_path):
    model = tiny.make("mixtral", tmp_path / "model")
    assert main(arguments(model, data, tmp_path / "out")) == 0
    convert(model, first=tmp_path / "out", outfile=tmp_path / "out.gguf", outtype="f32")
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_only_recipes_are_replaced(folder, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "letters").mkdir()
    letter = tmp_path / "letters" / "letter.txt"
    letter.write_text("dear", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for out, words in (
        (letter.parent, "no recipe"),
        (letter, "not a folder"),
        (".", "in use"),
        (letter / "x", "letter"),
    ):
        assert main(arguments(folder, data, out, "--force")) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert letter.read_text(encoding="utf-8") == "dear"
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    assert main(arguments(folder, data, "link", "--phase", "routers")) == 0
    assert (target / "first_config.json").is_file()


def test_force_deletes_nothing_but_a_recipe(folder, data, tmp_path, capsys):
    recipe = tiny.recipe(tmp_path / "recipe", folder)
    (recipe / "my-model.gguf").write_text("mine", encoding="utf-8")
    assert main(arguments(folder, data, recipe, "--force")) == 2
    assert "my-model.gguf" in capsys.readouterr().err.splitlines()[-1]
    assert len(list(recipe.iterdir())) == 3


@pytest.mark.parametrize("force", [True, False])
def test_what_comes_into_out_during_a_run_stays(folder, data, tmp_path, monkeypatch, capsys, force):
    out, measure = tmp_path / "out", report.measure
    if force:
        tiny.recipe(out, folder)

    def late(*args):
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("mine", encoding="utf-8")
        return measure(*args)

    monkeypatch.setattr(report, "measure", late)
    more = ("--phase", "routers", *(("--force",) if force else ()))
    assert main(arguments(folder, data, out, *more)) == 2
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "mine"
    words = capsys.readouterr().err.splitlines()[-1].split()
    assert str(out) in " ".join(words[:-1])
    load_recipe(words[-1])


def test_two_runs_do_not_share_an_out(folder, data, tmp_path, monkeypatch, capsys):
    measure, codes = report.measure, []
    argv = arguments(folder, data, tmp_path / "out", "--phase", "routers")

    def meanwhile(*args):
        codes.append(subprocess.run([sys.executable, "-m", "pyfirst.training.train", *argv], capture_output=True))
        return measure(*args)

    monkeypatch.setattr(report, "measure", meanwhile)
    assert main(argv) == 0
    assert codes[0].returncode == 2
    assert b"another first-train is at work" in codes[0].stderr and codes[0].stderr.count(b"\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_threshold_outlives_scores_that_are_not_finite():
    assert steer(0.4, torch.tensor([[0.1, float("nan")]]), 0.5) == 0.4
    assert steer(0.4, torch.tensor([[0.1, 0.2, 0.6]]), 0.5) == pytest.approx(0.3)


def test_help_shows_an_example():
    text = build_parser().format_help()
    assert "example:\n  first-train -m" in text


def test_encoding_is_what_the_runtime_feeds():
    tokens = tiny.tokenizer()
    prompt, response = encode(tokens, "Hi there", "Hello.")
    chat = [{"role": "user", "content": "Hi there"}]
    assert prompt == tokens.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokens.decode(response) == "Hello.<|im_end|>"


def test_long_prompts_lose_their_end_but_not_the_template():
    tokens = tiny.tokenizer()
    rows = [
        Example("a", "the quick brown fox " * 50, ["dog"], "1"),
        Example("a", "fox", ["dog " * 200], "2"),
    ]
    examples, counts = load_examples(rows, tokens, 60)
    assert counts == {"shortened": 1, "dropped": 1}
    assert len(examples[0]) <= 60
    text = tokens.decode(examples[0].prompt)
    assert "\ufffd" not in tokens.decode(
        load_examples([Example("a", "日" * 50, ["dog"], "3")], tokens, 59)[0][0].prompt
    )
    assert text.startswith("<|im_start|>user\nthe quick")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_every_token_of_a_task_counts_as_much(folder, tmp_path):
    """In passes of four, where the plain model and torch have all examples at once."""
    path = tmp_path / "lengths.jsonl"
    lines = [
        {"prompt": f"{task} {i}", "response": "yes " * (i + 1 if task == "many" else 3 * i + 1), "task": task}
        for task in ("many", "more")
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    more = ("--target-skip", "0", "--batch-size", "4", "--grad-accum", "2", "--hold-back", "1", "--seed", "1")
    assert main(arguments(folder, path, tmp_path / "out", *more)) == 0
    found = load_recipe(tmp_path / "out").config.training["phases"][0]["log"][0]["loss"]
    examples, _ = load_examples(read_rows(str(path)), tiny.tokenizer(), 200)
    training, plain, means = hold_back(examples, 1, 1)[0], tiny.load(folder), []
    for task in ("many", "more"):
        each = [token_losses(plain, e) for e in training if e.task == task]
        assert len({len(losses) for losses in each}) == len(each) == 4
        means.append(float(torch.cat(each).mean()))
    assert found == pytest.approx(np.mean(means), abs=2e-4)
    by_example = np.mean([float(losses.mean()) for losses in each])
    assert abs(by_example - means[1]) > 1e-3  # or nothing is seen here


def test_every_task_is_in_every_step_and_no_prompt_on_both_sides(data):
    examples, _ = load_examples(read_rows(str(data)), tiny.tokenizer(), 200)
    training, held = hold_back(examples, 6, 1)
    assert not {e.text for e in training} & {e.text for e in held}
    assert {e.task for e in held} == {"math", "text"}
    order = list(MixedSampler(training, 4, 2, seed=1))
    for start in range(0, len(order), 8):
        assert [training[i].task for i in order[start : start + 8]].count("math") == 4
    assert order == list(MixedSampler(training, 4, 2, seed=1))
    assert order != list(MixedSampler(training, 4, 2, seed=2))


def test_few_examples_are_all_drawn_and_no_prompt_twice():
    """A small task is measured whole; many are held back a fifth at most."""
    none = array("i")
    made = [Encoded(none, none, t, f"{t} {i % n}") for t, n in (("few", 9), ("many", 90)) for i in range(2 * n)]
    texts = [e.text for e in draw(made, 16, 1)]
    assert len(texts) == len(set(texts)) == 9 + 16
    assert [e.task for e in hold_back(made, 16, 1)[1]] == ["few"] + ["many"] * 16


def test_protect_names_layers():
    assert protected_layers("0,last", 30) == [0, 29]
    assert protected_layers("none", 30) == []


def test_main_is_the_function(folder, data, tmp_path):
    args = build_parser().parse_args(arguments(folder, data, tmp_path / "out", "--phase", "routers"))
    assert train(args) == tmp_path / "out"


def test_module_runs_by_name():
    done = subprocess.run(
        [sys.executable, "-m", "pyfirst.training.train", "--help"], capture_output=True, text=True, check=True
    )
    assert "--target-skip" in done.stdout
