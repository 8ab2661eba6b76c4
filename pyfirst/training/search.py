"""How many layers each task skips, found by trying, and routers that tell from the prompt which task it is.

The form of the routers is that of ``routers`` (after FiRST, https://arxiv.org/abs/2410.12513); only the way they
get their weights differs. With CE_g(M) the mean cross-entropy of the examples of task g under mask M,

    l(1), l(2), ... = all layers in the order in which leaving out one alone costs the mean of CE_g least
    train the LoRA with every example under some depth d: without l(1) ... l(d)
    choose d_g for the least sum of CE_g(without l(1) ... l(d_g)), the wanted share left out over all tasks together
    train the LoRA with these masks
    w_l, b_l = ridge regression of y_l(g) on the mean features of prompts of task g

where y_l(g) is negative if task g leaves out l, and the further from zero the less that costs. Layers go where they
are missed least once the LoRA has adapted, so an easy task skips more than a hard one. The tasks share one order
because they share one LoRA: what it learns about the absence of a layer serves them all.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence

import torch

from pyfirst.errors import InputError
from pyfirst.layers import evenly
from pyfirst.training import report
from pyfirst.training.data import Example, batches, collate
from pyfirst.training.objectives import leave_one_out, ridge
from pyfirst.training.routers import FirstModel, per_example

# Largest and smallest size of a router's logit on the prompts it is fitted to.
SPREAD = 1.5
MARGIN = 0.5
# A task leaves out at most this part of the layers, one at least, more or fewer than the target.
REACH = 15
# Without gradients more fits into memory than in training, and short responses want company.
TRIAL_BATCH = 6
NOT_FINITE = "the model gives values that are not finite; train without --bf16 or check its weights"

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


def find_order(model: FirstModel, examples: Sequence[Example], count: int, batch_size: int) -> torch.Tensor:
    """The ``count`` layers whose absence alone costs least, int64 [count], the cheapest first.

    Raises InputError if the model gives values that are not finite.
    """
    deltas, _ = leave_one_out(model, examples, max(batch_size, TRIAL_BATCH))
    costs = deltas.mean(0).masked_fill(model.protected, math.inf).cpu()
    if not torch.isfinite(costs[~model.protected.cpu()]).all():
        raise InputError(NOT_FINITE)
    return costs.argsort(stable=True)[:count]


def _mean(run: Trial, mask: torch.Tensor) -> float:
    found = float(run(mask).mean())
    if not math.isfinite(found):
        raise InputError(NOT_FINITE)
    return found


def nested(order: torch.Tensor, block_count: int, least: int = 0) -> torch.Tensor:
    """Masks bool [K + 1 - least, L] without the first ``least`` to K layers of ``order``, int64 [K]."""
    masks = torch.ones(len(order) + 1, block_count, dtype=torch.bool)
    for depth, layer in enumerate(order.tolist(), 1):
        masks[depth:, layer] = False
    return masks[least:]


def allocate(curves: torch.Tensor, total: int) -> list[int]:
    """A column for each row, with the least sum of their values among those whose numbers add up to ``total``.

    Args:
        curves: float32 [G, K + 1], cross-entropy of each task without 0, 1, ..., K further layers.
        total: of further layers.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for curve in curves.tolist():
        longer: dict[int, tuple[float, list[int]]] = {}
        for spent, (loss, depths) in best.items():
            for depth, value in enumerate(curve):
                now = spent + depth
                if now <= total and loss + value < longer.get(now, (math.inf, []))[0]:
                    longer[now] = (loss + value, [*depths, depth])
        best = longer
    return best[max(best)][1]


def targets_of(order: torch.Tensor, curves: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """What routers are fitted to, float32 [G, L]: the higher, the more a layer is worth to the task.

    -SPREAD for the cheapest removal to -MARGIN for the dearest of those in ``masks``, bool [G, L]; MARGIN to SPREAD
    for the rest of ``order``, int64 [K]; SPREAD for all others. The last columns of ``curves``, float32 [G, D], say
    what the last D - 1 layers of the order cost a task; those before, which every task leaves out, are cheaper.
    """
    targets = torch.full(masks.shape, SPREAD)
    known = curves.diff(dim=1).cummax(1).values  # a layer never goes before one that precedes it in the order
    before = torch.arange(len(order) - known.shape[1]) - curves.abs().max() * len(order)
    costs = torch.cat([before.expand(len(curves), -1), known], 1)
    for chosen, low, high in ((~masks[:, order], -SPREAD, -MARGIN), (masks[:, order], MARGIN, SPREAD)):
        task, place = chosen.nonzero(as_tuple=True)
        ranked = costs[chosen].argsort(stable=True)
        targets[task[ranked], order[place[ranked]]] = torch.linspace(low, high, len(ranked))
    return targets


def removals_of(skip: float, block_count: int) -> int:
    """Number of layers that make up at least the share ``skip`` of all."""
    return math.ceil(skip * block_count - 1e-6)


def reach(removals: int, block_count: int) -> tuple[int, int]:
    """How many layers the hardest and the easiest task leave out, where all together leave out ``removals`` each.

    Sums of cross-entropy go further, to 11 or 12 layers of 30 at a target of 8, but gain nothing by it once the LoRA
    has adapted.
    """
    spread = min(removals - removals // 2, max(1, block_count // REACH))
    return removals - spread, removals + spread


def static_mask(kind: str, protected: torch.Tensor, removals: int, seed: int) -> torch.Tensor:
    """One mask bool [L] for every prompt.

    Args:
        kind: "even", without evenly spaced layers; "random"; or the layers to leave out, comma-separated.
        protected: bool [L].
        removals: number of layers to leave out.
        seed: of "random".

    Raises InputError for an unknown kind or layer.
    """
    free = (~protected).nonzero()[:, 0].tolist()
    if kind == "even":
        chosen = evenly(free, removals)
    elif kind == "random":
        chosen = random.Random(seed).sample(free, removals)
    elif re.fullmatch(r"\d+(,\d+)*", kind):
        chosen = [int(part) for part in kind.split(",")]
        bad = [layer for layer in chosen if layer not in free]
        if bad:
            raise InputError(f"--static names layer {bad[0]}, which does not exist or is protected")
    else:
        raise InputError(f"--static '{kind}': expected loo, even, random or layer numbers")
    mask = torch.ones(len(protected), dtype=torch.bool)
    mask[chosen] = False
    return mask


def settle(
    model: FirstModel,
    examples: Sequence[Example],
    tasks: Sequence[str],
    ladder: torch.Tensor,
    removals: int,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the tasks bool [G, L], for what each depth costs the model as it is now, and these costs [G, D].

    Args:
        examples: some of every task.
        ladder: bool [D, L] from ``nested``, what a task can get.
        removals: of layers, over all tasks together.
    """

    def curve(task: str) -> list[float]:  # its own scope: the prompts of one task at a time stay in memory
        run = trial(model, [e for e in examples if e.task == task], batch_size)
        losses = []
        for mask in ladder:
            losses.append(_mean(run, mask.to(model.protected.device)))
            report.progress(f"{task}: {len(losses)} of {len(ladder)} depths")
        report.say(f"{task}: " + " ".join(f"{loss:.3f}" for loss in losses))
        return losses

    curves = torch.tensor([curve(task) for task in tasks])
    least = int((~ladder[0]).sum())
    return ladder[allocate(curves, removals - least * len(tasks))], curves


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
        masks, targets: [G, L] from ``settle`` and ``targets_of``.
    """
    device = model.routers.weight.device
    features = torch.empty(len(examples), *model.routers.weight.shape, device=device)
    done = 0
    for chosen, batch in batches(examples, batch_size, device):
        with model.features(model.deciding(batch["prompt_mask"].bool())) as means:
            model(**batch, keep=masks[groups[chosen]])
        features[chosen] = torch.stack(means, 1)
        done += len(chosen)
        report.progress(f"{done} of {len(examples)} prompts")
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
