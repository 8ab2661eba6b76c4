"""One mask for each task, found by trying, and routers that tell from the prompt which mask it gets.

The form of the routers is that of ``routers`` (after FiRST, https://arxiv.org/abs/2410.12513); only the way they
get their weights differs. With CE_g(M) the mean cross-entropy of the examples of task g under mask M,

    remove the (g, l) with the least CE_g(M_g - l) - CE_g(M_g), until the tasks skip the wanted share together
    train the LoRA with M_g for every example of task g
    w_l, b_l = ridge regression of y_l(g) on the mean features of prompts of task g

where y_l(g) is negative if M_g skips l, and the further from zero the earlier that layer was removed. Layers go
where they are missed least, so an easy task skips more than a hard one.
"""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Callable, Sequence

import torch

from pyfirst.errors import InputError
from pyfirst.training.data import Example, collate
from pyfirst.training.objectives import ridge
from pyfirst.training.report import batches
from pyfirst.training.routers import FirstModel, per_example

# Largest and smallest size of a router's logit on the prompts it is fitted to.
SPREAD = 1.5
MARGIN = 0.5
# Without gradients more fits into memory than in training, and short responses want company.
TRIAL_BATCH = 12

Trial = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def trial(model: FirstModel, examples: Sequence[Example], batch_size: int) -> Trial:
    """A function from a mask bool [L] to the cross-entropy float32 [N] of each example's response under it.

    In prefill "full" prompts are run only once; their keys and values stay in memory.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    size = max(batch_size, TRIAL_BATCH)
    chosen = [[examples[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    if model.prefill == "full":
        parts = [model.after_prompt(part) for part in chosen]
    else:
        parts = [_whole(model, part) for part in chosen]
    back = torch.tensor(order).argsort()
    return lambda keep: torch.cat([part(keep) for part in parts])[back]


def _whole(model: FirstModel, examples: Sequence[Example]) -> Trial:
    batch = {k: v.to(model.routers.weight.device) for k, v in collate(examples).items()}
    return torch.no_grad()(lambda keep: per_example(model(**batch, keep=keep), len(examples)))


def search(
    trials: Sequence[Trial],
    protected: torch.Tensor,
    removals: int,
    say: Callable[[str], None] = lambda text: None,
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove ``removals`` layers from the masks of G tasks, always the one that costs its task least.

    A removal's cost mostly grows as others go before it, so costs known from earlier are tried in their order
    and measured again only when they come first (lazy greedy, Minoux 1978).

    Args:
        trials: one for each task.
        protected: bool [L], layers that stay.
        removals: of layers, over all tasks together and with those that are gone before.
        say: told of every removal.
        before: targets [G, L] of an earlier search; what it removed stays removed.

    Returns the masks bool [G, L] and targets float32 [G, L] for the routers, rising with a layer's worth:
    -SPREAD for the first removed to -MARGIN for the last, MARGIN to SPREAD for those that stay.
    Raises InputError if the model gives values that are not finite.
    """
    masks = torch.ones(len(trials), len(protected), dtype=torch.bool)
    removed: list[tuple[int, int]] = []
    if before is not None:
        masks = before > 0
        removed = sorted(map(tuple, (~masks).nonzero().tolist()), key=lambda place: float(before[place]))
    device = protected.device
    loss = [float(run(mask.to(device)).mean()) for run, mask in zip(trials, masks, strict=True)]
    tried = [0] * len(trials)

    def cost(group: int, layer: int) -> tuple[float, int, int, int]:
        mask = masks[group].clone()
        mask[layer] = False
        delta = float(trials[group](mask.to(device)).mean()) - loss[group]
        if delta != delta:
            raise InputError("the model gives values that are not finite; train without --bf16 or check its weights")
        return delta, group, layer, tried[group]

    free = (~protected).nonzero()[:, 0].tolist()
    queue = [cost(group, layer) for group in range(len(trials)) for layer in free if masks[group, layer]]
    heapq.heapify(queue)
    while len(removed) < removals and queue:
        delta, group, layer, when = heapq.heappop(queue)
        if when != tried[group]:
            heapq.heappush(queue, cost(group, layer))
            continue
        masks[group, layer] = False
        loss[group] += delta
        tried[group] += 1
        removed.append((group, layer))
        say(f"task {group} without layer {layer}: {delta:+.3f}, now {loss[group]:.3f}")
    targets = torch.full(masks.shape, SPREAD)
    kept = [(group, layer) for _, group, layer, _ in sorted(queue)]
    for places, values in (
        (removed, torch.linspace(-SPREAD, -MARGIN, len(removed))),
        (kept, torch.linspace(MARGIN, SPREAD, len(kept))),
    ):
        for (group, layer), value in zip(places, values.tolist(), strict=True):
            targets[group, layer] = value
    return masks, targets


def static_mask(kind: str, protected: torch.Tensor, removals: int, pooled: Trial, seed: int) -> torch.Tensor:
    """One mask bool [L] for every prompt.

    Args:
        kind: "loo", without the layers whose absence alone costs least; "even", without evenly spaced layers;
            "random"; or the layers to leave out, comma-separated.
        protected: bool [L].
        removals: number of layers to leave out.
        pooled: the trial over examples of all tasks.
        seed: of "random".

    Raises InputError for an unknown kind or layer.
    """
    free = (~protected).nonzero()[:, 0].tolist()
    mask = torch.ones(len(protected), dtype=torch.bool)
    if kind == "loo":
        costs = []
        for layer in free:
            without = mask.clone()
            without[layer] = False
            costs.append(float(pooled(without.to(protected.device)).mean()))
        chosen = [layer for _, layer in sorted(zip(costs, free, strict=True))[:removals]]
    elif kind == "even":
        chosen = [free[int((i + 0.5) * len(free) / removals)] for i in range(removals)]
    elif kind == "random":
        chosen = random.Random(seed).sample(free, removals)
    elif re.fullmatch(r"\d+(,\d+)*", kind):
        chosen = [int(part) for part in kind.split(",")]
        bad = [layer for layer in chosen if layer not in free]
        if bad:
            raise InputError(f"--static names layer {bad[0]}, which does not exist or is protected")
    else:
        raise InputError(f"--static '{kind}': expected loo, greedy, even, random or layer numbers")
    mask[chosen] = False
    return mask


def choose(
    model: FirstModel,
    examples: Sequence[Example],
    tasks: Sequence[str],
    static: str | None,
    skip: float,
    batch_size: int,
    seed: int,
    say: Callable[[str], None],
    before: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Masks bool [G, L] and targets float32 [G, L] for ``tasks``, as ``search`` gives them.

    Args:
        examples: what layers are tried on, some of every task.
        static: None to search a mask for each task, "greedy" to search one for all, or a kind of ``static_mask``.
        skip: share of all layers to leave out.
        before: targets of an earlier search, on which this one builds.
    """
    removals = round(skip * model.block_count * len(tasks))
    if not removals:
        masks = torch.ones(len(tasks), model.block_count, dtype=torch.bool)
        targets = torch.full(masks.shape, SPREAD)
    elif static is None:
        parts = [[e for e in examples if e.task == task] for task in tasks]
        trials = [trial(model, part, batch_size) for part in parts]
        masks, targets = search(trials, model.protected, removals, say, before)
    elif static == "greedy":
        pooled = [trial(model, examples, batch_size)]
        one = None if before is None else before[:1]
        masks, targets = search(pooled, model.protected, round(skip * model.block_count), say, one)
        masks, targets = (x.expand(len(tasks), -1).clone() for x in (masks, targets))
    else:
        mask = static_mask(
            static, model.protected, round(skip * model.block_count), trial(model, examples, batch_size), seed
        )
        masks = mask.expand(len(tasks), -1).clone()
        targets = torch.where(masks, SPREAD, -SPREAD)
    for task, row in zip(tasks, masks.tolist(), strict=True):
        say(f"  {''.join('#' if keep else '.' for keep in row)}  {task}")
    return {"masks": masks, "targets": targets}


@torch.no_grad()
def fit_routers(
    model: FirstModel,
    examples: Sequence[Example],
    groups: torch.Tensor,
    masks: torch.Tensor,
    targets: torch.Tensor,
    batch_size: int,
) -> None:
    """Give the routers the weights whose scores name the task's mask, at a threshold of 0.5.

    Layers on which all tasks agree get a bias alone. For the others the border between keep and skip is drawn
    near the prompts that skip, so that a prompt of no known task rather keeps a layer.

    Args:
        examples: N prompts; groups: int64 [N], the task of each.
        masks, targets: [G, L] from ``search``.
    """
    device = model.routers.weight.device
    features = torch.empty(len(examples), *model.routers.weight.shape, device=device)
    for chosen, batch in batches(examples, batch_size, device):
        with model.features(model.deciding(batch["prompt_mask"].bool())) as means:
            model(**batch, keep=masks[groups[chosen]])
        features[chosen] = torch.stack(means, 1)
    for layer in range(model.block_count):
        y = targets[:, layer].to(device)[groups.to(device)]
        if bool((masks[:, layer] == masks[0, layer]).all()):
            model.routers.weight[layer] = 0
            model.routers.bias[layer] = targets[:, layer].mean()
            continue
        x = features[:, layer]
        weight, centre = ridge(x, y)
        found = (x - centre) @ weight
        skips = ~masks[:, layer].to(device)[groups.to(device)]
        border = found[skips].mean() + 0.35 * (found[~skips].mean() - found[skips].mean())
        model.routers.weight[layer] = weight
        model.routers.bias[layer] = -(centre @ weight) - border
