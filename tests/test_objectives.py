"""Losses and gates of training, against their equations."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from pyfirst.training.data import Example, collate
from pyfirst.training.objectives import distillation, hard_gate_loss, paper_loss, router_parameters
from pyfirst.training.routers import FirstModel, Routers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=6)


@pytest.fixture
def batch():
    return collate([Example([5, 6, 7, 8, 9], [10, 11, 2], "a", ""), Example([5, 6], [7, 2], "a", "")])


def test_losses_are_their_equations():
    scores = torch.tensor([[0.2, 0.4], [0.9, 0.1]], requires_grad=True)
    assert float(paper_loss(torch.tensor(1.0), scores.detach(), 0.01)) == pytest.approx(1 + 0.01 * (0.6 + 1.0) / 2)
    loss = hard_gate_loss(torch.tensor(1.0), scores, 0.7, 10.0)
    assert loss.item() == pytest.approx(1 + 10 * (0.4 - 0.7) ** 2)
    loss.backward()
    assert (scores.grad < 0).all()  # too low, so they are to rise
    student, teacher = [0.9, 0.1], [0.5, 0.5]
    found = distillation(torch.tensor([student, teacher]).log() + 3, torch.tensor([teacher, teacher]).log())
    wanted = sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))
    assert found.tolist() == pytest.approx([wanted, 0], abs=1e-6)


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_soft_gate_blends_each_token_by_its_score(folder, batch, prefill):
    routers = Routers(6, tiny.WIDTH)
    torch.nn.init.normal_(routers.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    model = FirstModel(tiny.load(folder), routers, prefill=prefill, protected=[0, 5])
    model.gate = "soft"
    with torch.no_grad():
        found = model(**batch)["loss"]
        model.unwrap()
        tokens = torch.ones_like(batch["labels"]) if prefill == "skip" else 1 - batch["prompt_mask"]

        def blended(index, original):
            def forward(hidden, *args, **kwargs):
                unit = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                score = torch.sigmoid(unit @ routers.weight[index])[..., None]
                gate = torch.where(tokens[..., None].bool(), score, 1.0)
                return hidden + gate * (original(hidden, *args, **kwargs) - hidden)

            return forward

        for index, layer in enumerate(model.layers[1:-1], 1):
            layer.forward = blended(index, layer.forward)
        assert abs(float(found - model(**batch, dense=True)["loss"])) < 1e-5


@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_routers_learn_without_the_lowest_layers_and_the_prompts_logits(folder, batch, gate, prefill):
    """Backward goes no deeper than the lowest layer that may be skipped; a large vocabulary costs more than a layer."""
    model = FirstModel(tiny.load(folder), Routers(6, tiny.WIDTH), prefill=prefill, protected=[0, 1, 5])
    model.base.requires_grad_(False)
    model.gate = gate
    reached, logits = set(), []

    def watch(index):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: reached.add(index))

        return hook

    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(watch(index))
    model.inner.lm_head.register_forward_hook(lambda _, args, output: logits.append(tuple(output.shape)))
    output = model(**batch)
    paper_loss(output["loss"], output["scores"][:, ~model.protected], 0.01).backward()
    assert reached == {2, 3, 4, 5}
    assert logits == [(1, 5, tiny.VOCAB)]  # of five response tokens
    assert (model.routers.bias.grad != 0).tolist() == [False, False, True, True, True, False]


def test_the_weights_rate_is_divided_by_the_width(folder):
    model = FirstModel(tiny.load(folder), Routers(6, tiny.WIDTH))
    rates = {id(group["params"][0]): group["lr"] for group in router_parameters(model, 0.5)}
    assert rates == {id(model.routers.bias): 0.5, id(model.routers.weight): pytest.approx(0.5 / tiny.WIDTH**0.5)}


def test_scores_are_float32_whatever_the_models_precision(folder, batch):
    """A score near the threshold must not depend on how bfloat16 rounds it."""
    routers = Routers(6, tiny.WIDTH)
    torch.nn.init.normal_(routers.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    model = FirstModel(tiny.load(folder).bfloat16(), routers)
    seen = []
    with torch.no_grad(), model._inputs(lambda hidden: seen.append(hidden.double())):
        found = model(**batch)["scores"]
    prompt = batch["prompt_mask"].double()
    for index, hidden in enumerate(seen):
        unit = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        scores = torch.sigmoid(unit @ routers.weight[index].double())
        wanted = (scores * prompt).sum(1) / prompt.sum(1)
        assert (found[:, index] - wanted).abs().max() < 1e-6
