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
from pyfirst.training.search import MARGIN, SPREAD, fit_routers, search, static_mask, trial


def costs(*worth: float):
    """A trial in which layers cost what they are worth, each removal making the next dearer."""

    def run(keep: torch.Tensor) -> torch.Tensor:
        lost = torch.tensor(worth)[~keep].sum()
        return torch.stack([lost, lost * 3]) / 2 * (1 + 0.1 * float((~keep).sum()))

    return run


def test_layers_go_where_they_cost_least():
    protected = torch.tensor([True, False, False, False, False])
    easy, hard = costs(9, 0.1, 0.2, 0.3, 5), costs(9, 4, 0.15, 6, 7)
    masks, targets = search([easy, hard], protected, 4)
    assert masks.tolist() == [[True, False, False, False, True], [True, True, False, True, True]]
    assert targets[~masks].max() == -MARGIN
    assert targets[~masks].min() == -SPREAD
    assert targets[masks].min() >= MARGIN
    assert targets[0, 1] < targets[0, 2] < targets[0, 3] < targets[0, 4]


def test_lazy_search_equals_full_greedy_where_costs_rise():
    torch.manual_seed(0)
    protected = torch.zeros(7, dtype=torch.bool)
    runs = [costs(*torch.rand(7).tolist()) for _ in range(3)]
    masks = torch.ones(3, 7, dtype=torch.bool)
    for _ in range(8):
        best = None
        for group, layer in itertools.product(range(3), range(7)):
            if masks[group, layer]:
                mask = masks[group].clone()
                mask[layer] = False
                delta = float((runs[group](mask) - runs[group](masks[group])).mean())
                best = min(best or (delta, group, layer), (delta, group, layer))
        masks[best[1], best[2]] = False
    assert torch.equal(search(runs, protected, 8)[0], masks)


def test_a_search_goes_on_from_an_earlier_one():
    torch.manual_seed(1)
    protected = torch.zeros(6, dtype=torch.bool)
    runs = [costs(*torch.rand(6).tolist()) for _ in range(2)]
    masks, targets = search(runs, protected, 2)
    again, ranked = search(runs, protected, 5, before=targets)
    assert torch.equal(again, search(runs, protected, 5)[0])
    assert ranked[~masks].max() < ranked[~again & masks].min()


def test_search_refuses_nan():
    with pytest.raises(InputError, match="not finite"):
        search([lambda keep: torch.tensor([float("nan")])], torch.zeros(3, dtype=torch.bool), 1)


def test_static_masks():
    protected = torch.tensor([True, *[False] * 6, True])
    run = costs(9, 3, 1, 5, 2, 6, 4, 9)

    def skipped(kind: str, count: int = 2) -> list[int]:
        return (~static_mask(kind, protected, count, run, 7)).nonzero()[:, 0].tolist()

    assert skipped("loo") == [2, 4]
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
