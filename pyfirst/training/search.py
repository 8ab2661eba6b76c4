"""One mask for each task, found by trying, and routers that tell from the prompt which mask it gets.

The form of the routers is that of ``routers`` (after FiRST, https://arxiv.org/abs/2410.12513); only the way they
get their weights differs. With CE_g(M) the mean cross-entropy of the examples of task g under mask M,

    l_g(1), l_g(2), ... = the layers of task g in the order in which leaving them out costs CE_g least
    train the LoRA with every example under some depth d of its task: without l_g(1) ... l_g(d)
    choose d_g for the least sum of CE_g(d_g), with the wanted share left out over all tasks together
    train the LoRA with the chosen masks
    w_l, b_l = ridge regression of y_l(g) on the mean features of prompts of task g

where y_l(g) is negative if task g leaves out l, and the further from zero the less that costs. Layers go where they
are missed least once the LoRA has adapted, so an easy task skips more than a hard one.
"""

from __future__ import annotations

import heapq
import math
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
Say = Callable[[str], None]


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


def removal_order(run: Trial, protected: torch.Tensor, count: int, say: Say = lambda text: None) -> list[int]:
    """The first ``count`` layers to leave out, always the one that costs least with those before it gone.

    A removal's cost mostly grows as others go before it, so costs known from earlier are tried in their order
    and measured again only when they come first (lazy greedy, Minoux 1978).

    Args:
        run: the trial of one task.
        protected: bool [L], layers that stay.
        say: told of every removal.

    Raises InputError if the model gives values that are not finite.
    """
    mask = torch.ones_like(protected)
    order: list[int] = []
    loss = _mean(run, mask)

    def cost(layer: int) -> tuple[float, int, int]:
        without = mask.clone()
        without[layer] = False
        return _mean(run, without) - loss, layer, len(order)

    queue = [cost(layer) for layer in (~protected).nonzero()[:, 0].tolist()]
    heapq.heapify(queue)
    while len(order) < count and queue:
        delta, layer, when = heapq.heappop(queue)
        if when != len(order):
            heapq.heappush(queue, cost(layer))
            continue
        mask[layer] = False
        loss += delta
        order.append(layer)
        say(f"  without layer {layer}: {delta:+.3f}, now {loss:.3f}")
    return order


def _mean(run: Trial, mask: torch.Tensor) -> float:
    found = float(run(mask).mean())
    if not math.isfinite(found):
        raise InputError("the model gives values that are not finite; train without --bf16 or check its weights")
    return found


def nested(order: torch.Tensor, block_count: int) -> torch.Tensor:
    """Masks bool [K + 1, L] without the first 0, 1, ..., K layers of ``order``, int64 [K]."""
    masks = torch.ones(len(order) + 1, block_count, dtype=torch.bool)
    for depth, layer in enumerate(order.tolist(), 1):
        masks[depth:, layer] = False
    return masks


def allocate(curves: torch.Tensor, removals: int) -> list[int]:
    """How many layers each task leaves out, ``removals`` together, for the least sum of cross-entropies.

    Args:
        curves: float32 [G, K + 1], cross-entropy of each task without 0, 1, ..., K layers.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for curve in curves.tolist():
        longer: dict[int, tuple[float, list[int]]] = {}
        for spent, (loss, depths) in best.items():
            for depth, value in enumerate(curve):
                total = spent + depth
                if total <= removals and loss + value < longer.get(total, (math.inf, []))[0]:
                    longer[total] = (loss + value, [*depths, depth])
        best = longer
    return best[max(best)][1]


def targets_of(orders: torch.Tensor, curves: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """What routers are fitted to, float32 [G, L]: the higher, the more a layer is worth to the task.

    -SPREAD for the cheapest removal to -MARGIN for the dearest of those in ``masks``, bool [G, L]; MARGIN to SPREAD
    for the rest of ``orders``, int64 [G, K], by what ``curves``, [G, K + 1], says of it; SPREAD for all others.
    """
    targets = torch.full(masks.shape, SPREAD)
    costs = curves.diff(dim=1).cummax(1).values  # a layer never goes before one that precedes it in the order
    worth = torch.full(masks.shape, math.inf).scatter(1, orders, costs)
    for chosen, low, high in ((~masks, -SPREAD, -MARGIN), (masks & worth.isfinite(), MARGIN, SPREAD)):
        places = chosen.nonzero()
        ranked = places[worth[chosen].argsort(stable=True)]
        targets[ranked[:, 0], ranked[:, 1]] = torch.linspace(low, high, len(ranked))
    return targets


def removals_of(skip: float, block_count: int) -> int:
    """Number of layers that make up at least the share ``skip`` of all."""
    return math.ceil(skip * block_count - 1e-6)


def static_mask(kind: str, protected: torch.Tensor, removals: int, pooled: Trial, seed: int) -> torch.Tensor:
    """One mask bool [L] for every prompt.

    Args:
        kind: "greedy", without the first layers of their ``removal_order``; "loo", without the layers whose absence
            alone costs least; "even", without evenly spaced layers; "random"; or the layers to leave out,
            comma-separated.
        protected: bool [L].
        removals: number of layers to leave out.
        pooled: the trial over examples of all tasks.
        seed: of "random".

    Raises InputError for an unknown kind or layer.
    """
    free = (~protected).nonzero()[:, 0].tolist()
    mask = torch.ones_like(protected)
    if kind == "greedy":
        chosen = removal_order(pooled, protected, removals)
    elif kind == "loo":
        costs = []
        for layer in free:
            without = mask.clone()
            without[layer] = False
            costs.append(_mean(pooled, without))
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
    return mask.cpu()


def find_orders(
    model: FirstModel, examples: Sequence[Example], tasks: Sequence[str], skip: float, batch_size: int, say: Say
) -> torch.Tensor:
    """The layers each task can do without, int64 [G, K], the cheapest first; K is twice what ``skip`` asks of one."""
    count = min(2 * removals_of(skip, model.block_count), int((~model.protected).sum()))
    orders = []
    for task in tasks:
        say(f"{task}: leaving out layers")
        run = trial(model, [e for e in examples if e.task == task], batch_size)
        orders.append(removal_order(run, model.protected, count, say))
    return torch.tensor(orders, dtype=torch.long).reshape(len(tasks), count)


def settle(
    model: FirstModel,
    examples: Sequence[Example],
    tasks: Sequence[str],
    orders: torch.Tensor,
    skip: float,
    batch_size: int,
    say: Say,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks bool [G, L] and targets float32 [G, L] of the tasks, for what each depth costs the model as it is now."""
    ladders = [nested(order, model.block_count) for order in orders]
    rows = []
    for task, masks in zip(tasks, ladders, strict=True):
        run = trial(model, [e for e in examples if e.task == task], batch_size)
        rows.append([_mean(run, mask.to(model.protected.device)) for mask in masks])
        say(f"{task}: " + " ".join(f"{loss:.3f}" for loss in rows[-1]))
    curves = torch.tensor(rows)
    depths = allocate(curves, len(tasks) * removals_of(skip, model.block_count))
    chosen = torch.stack([masks[depth] for masks, depth in zip(ladders, depths, strict=True)])
    return chosen, targets_of(orders, curves, chosen)


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
        masks, targets: [G, L] from ``settle``.
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
