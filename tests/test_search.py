"""Masks found by trying layers, and the routers fitted to them, on tiny random models and made-up costs."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from pyfirst.errors import InputError
from pyfirst.training import report
from pyfirst.training.data import Example
from pyfirst.training.routers import FirstModel, Routers
from pyfirst.training.search import (
    MARGIN,
    SPREAD,
    allocate,
    find_order,
    fit_routers,
    nested,
    reach,
    settle,
    static_mask,
    targets_of,
    trial,
)


def test_layers_are_shared_out_for_the_least_sum():
    torch.manual_seed(2)
    curves = torch.rand(3, 5).sort(1).values  # not convex: taking the cheapest step each time would not do
    for removals in range(13):
        every = [d for d in itertools.product(range(5), repeat=3) if sum(d) == removals]
        best = min(every, key=lambda depths: float(sum(curves[g, d] for g, d in enumerate(depths))))
        assert tuple(allocate(curves, removals)) == best


@pytest.mark.parametrize(
    ("removals", "blocks", "least", "most"),
    [(8, 30, 6, 10), (5, 30, 3, 7), (4, 16, 3, 5), (20, 80, 15, 25), (2, 4, 1, 3), (1, 40, 0, 2), (0, 30, 0, 0)],
)
def test_tasks_stay_near_the_target(removals, blocks, least, most):
    assert reach(removals, blocks) == (least, most)


def test_targets_rank_layers_by_their_cost():
    order, curves = torch.tensor([3, 1]), torch.tensor([[1.0, 1.1, 1.4], [2.0, 2.3, 2.2]])
    masks = torch.tensor([[True, False, True, False], [True, True, True, True]])
    targets = targets_of(order, curves, masks)
    assert targets[0].tolist() == [SPREAD, -MARGIN, SPREAD, -SPREAD]
    longer = targets_of(torch.tensor([2, 3, 1]), curves, masks & (torch.arange(4) != 2))
    assert longer[:, 2].tolist() == [-SPREAD, pytest.approx(-SPREAD + (SPREAD - MARGIN) / 3)]
    assert longer[1, 3] == MARGIN
    assert targets[1].tolist() == [SPREAD, SPREAD, SPREAD, MARGIN]  # 1 is no cheaper than 3, which precedes it


def test_static_masks():
    protected = torch.tensor([True, *[False] * 6, True])

    def skipped(kind: str, count: int = 2) -> list[int]:
        return (~static_mask(kind, protected, count, 7)).nonzero()[:, 0].tolist()

    assert skipped("even") == [2, 5]
    assert skipped("1,3,6") == [1, 3, 6]
    assert skipped("random") == skipped("random")
    assert len(skipped("random", 4)) == 4
    assert not {0, 7} & set(skipped("random", 6))
    for wrong in ("0", "9", "best", "1,,2"):
        with pytest.raises(InputError, match="--static"):
            skipped(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


def wrapped(folder, prefill: str) -> FirstModel:
    return FirstModel(tiny.load(folder), Routers(4, tiny.WIDTH), prefill=prefill, window=6, protected=[0])


def examples(count: int) -> tuple[list[Example], torch.Tensor]:
    """Two tasks whose prompts use different tokens."""
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    made = []
    for i in range(count):
        low = 10 + 40 * (i % 2)
        made.append(Example(draw(low, low + 8, 8 + i % 4), draw(10, 90, 3), str(i % 2), ""))
    return made, torch.arange(count) % 2


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_trial_is_the_loss_under_the_mask(folder, prefill):
    model = wrapped(folder, prefill)
    some, _ = examples(5)
    keep = torch.tensor([True, False, True, False])
    expected = []
    for example in some:
        for_one, _, _ = report.losses(model, [example], 1, dense=True)
        assert torch.allclose(trial(model, [example], 1)(torch.ones(4, dtype=torch.bool)), for_one, atol=1e-5)
        batch = {"tokens": torch.tensor([example.prompt + example.response])}
        mask = torch.ones_like(batch["tokens"])
        prompt = mask.clone()
        prompt[:, len(example.prompt) :] = 0
        logits = model(batch["tokens"], mask, prompt, keep=keep)["logits"][0, len(example.prompt) - 1 : -1]
        expected.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(example.response)).detach())
    assert torch.allclose(trial(model, some, 2)(keep), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_fitted_routers_give_prompts_the_mask_of_their_task(folder, prefill):
    model = wrapped(folder, prefill)
    masks = torch.tensor([[True, False, True, True], [True, True, True, False]])
    targets = torch.where(masks, 1.0, -1.0)
    some, groups = examples(80)
    fit_routers(model, some, groups, masks, targets, 8)
    unseen, kinds = examples(120)
    _, keep, _ = report.losses(model, unseen[80:], 8)
    assert (keep == masks[kinds[80:]]).float().mean() > 0.95
    assert not model.routers.weight[2].any()


def test_a_threshold_may_skip_every_unprotected_layer(folder):
    model = wrapped(folder, "full")
    torch.nn.init.normal_(model.routers.weight, generator=torch.Generator().manual_seed(3))
    some, _ = examples(4)
    for skipped in range(4):
        model.threshold.fill_(report.threshold_for(model, some, 2, skipped / 4))
        assert int((~report.losses(model, some, 2)[1]).sum()) == 4 * skipped


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_the_order_is_that_of_the_losses_without_each_layer(folder, prefill):
    model = wrapped(folder, prefill)
    some, _ = examples(6)
    run = trial(model, some, 2)
    costs = {layer: float(run(torch.arange(4) != layer).mean()) for layer in (1, 2, 3)}
    assert find_order(model, some, 3, 2).tolist() == sorted(costs, key=costs.__getitem__)


def test_values_that_are_not_finite_are_refused(folder):
    model = wrapped(folder, "full")
    model.inner.model.layers[2].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        find_order(model, examples(2)[0], 2, 2)


def test_tasks_get_the_masks_that_cost_least(folder):
    model = wrapped(folder, "full")
    some, _ = examples(8)
    order = torch.tensor([2, 1])
    masks, curves = settle(model, some, ["0", "1"], nested(order, 4), 2, 2)
    assert torch.equal(masks, targets_of(order, curves, masks) > 0)
    assert int((~masks).sum()) == 2
    assert bool(masks[:, 0].all())
    runs = [trial(model, [e for e in some if e.task == task], 2) for task in ("0", "1")]
    ladder = nested(order, 4)
    assert ladder.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1]]
    least, _ = settle(model, some, ["0", "1"], ladder[1:], 2, 2)
    assert least.tolist() == [ladder[1].tolist()] * 2
    sums = [float(runs[0](ladder[d]).mean() + runs[1](ladder[2 - d]).mean()) for d in range(3)]
    found = float(sum(run(mask).mean() for run, mask in zip(runs, masks, strict=True)))
    assert abs(found - min(sums)) < 1e-5
