"""What is minimised, and how routers are started and steered. Equations use the notation of ``routers``.

Everywhere the cross-entropy is the mean over the examples i of the mean over the n_i tokens of a response,

    CE = 1/B sum_i 1/n_i sum_t CE_i(t)

so that passes of B examples add up to one large batch, whatever their lengths, and long answers do not drown others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pyfirst.training import report
from pyfirst.training.data import Example, collate
from pyfirst.training.routers import FirstModel, per_example


def paper_loss(cross_entropy: torch.Tensor, scores: torch.Tensor, weight: float) -> torch.Tensor:
    """The objective of FiRST's phase 1 (arXiv 2410.12513), with token-level soft gates in the forward pass.

        h_(l+1)(t) = h_l(t) + score_l(t) * (layer_l(h_l)(t) - h_l(t))
        loss       = CE + lambda * sum_l mean_t score_l(t)

    Args:
        cross_entropy: scalar.
        scores: mean scores float32 [B, L] of the routed layers.
        weight: lambda, 0.01 in the paper.
    """
    return cross_entropy + weight * scores.sum(1).mean()


def hard_gate_loss(cross_entropy: torch.Tensor, scores: torch.Tensor, target: float, weight: float) -> torch.Tensor:
    """Cross-entropy under the hard masks, the routers reached by a straight-through gradient.

        h_(l+1) = keep_l ? layer_l(h_l) : h_l        d keep_l / d mean score_l := 1
        loss    = CE + weight * (mean_l mean score_l - target)^2

    Under hard masks alone every score would only ever be told to rise. The budget itself is held by
    ``steer``; the second term keeps scores and threshold from wandering off together into saturation.

    Args:
        cross_entropy: scalar.
        scores: mean scores float32 [B, L] of the unprotected layers.
        target: share of those layers to keep.
        weight: of the second term.
    """
    return cross_entropy + weight * (scores.mean() - target).square()


def steer(threshold: float, scores: torch.Tensor, target: float, rate: float = 0.5) -> float:
    """threshold + rate * (q - threshold), q being the score that the share ``target`` of ``scores`` reaches.

    A budget held by a penalty oscillates, and one held by threshold += rate * (kept - target) lags behind
    routers that learn fast. The quantile is where the threshold has to go; the rate smooths over steps.
    Scores that are not finite, of a step that is left out, move nothing.
    """
    quantile = float(scores.float().flatten().quantile(1 - target))
    return threshold + rate * (quantile - threshold) if math.isfinite(quantile) else threshold


def distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, float32 [N], of each row of logits [N, V] (Hinton et al. 2015, temperature 1)."""
    return torch.nn.functional.kl_div(
        student.float().log_softmax(-1),
        teacher.float().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)


@torch.no_grad()
def leave_one_out(model: FirstModel, examples: Sequence[Example], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each layer is worth to each example.

    Returns:
        deltas: float32 [N, L], cross-entropy (nats per response token) without layer l minus with all layers;
            protected layers hold infinity.
        features: float32 [N, L, D], mean over the deciding tokens of n(h_l) when every layer runs.
    """
    device = model.routers.weight.device
    deltas, features = [], []
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].response))
    for start in range(0, len(order), batch_size):
        chosen = [examples[i] for i in order[start : start + batch_size]]
        batch = {k: v.to(device) for k, v in collate(chosen).items()}
        with model.features(model.deciding(batch["prompt_mask"].bool())) as means:
            whole = per_example(model(**batch, dense=True), len(chosen))
        features.append(torch.stack(means, 1))
        cached = model.after_prompt(chosen) if model.prefill == "full" else None
        delta = torch.full((len(chosen), model.block_count), torch.inf, device=device)
        for layer in range(model.block_count):
            if not model.protected[layer]:
                keep = torch.ones(model.block_count, dtype=torch.bool, device=device)
                keep[layer] = False
                loss = cached(keep) if cached else per_example(model(**batch, keep=keep), len(chosen))
                delta[:, layer] = loss - whole
                report.progress(f"{start} of {len(order)} examples, layer {layer}")
        deltas.append(delta)
    back = torch.tensor(order).argsort()
    return torch.cat(deltas)[back], torch.cat(features)[back]


@torch.no_grad()
def start_from(
    model: FirstModel, deltas: torch.Tensor, features: torch.Tensor, keep: float, spread: float = 1.5
) -> None:
    """Start the routers from leave-one-out: the dearer a layer, the higher its score, per kind of prompt.

        y_l(x) = clip((delta_l(x) - q(x)) / s(x), -spread, spread)
        w_l, b_l = ridge regression of y_l(x) on the mean features of x

    q(x) is the ``1 - keep`` quantile of the deltas of x and s(x) the median distance to it, so that at a
    threshold of 0.5 every prompt keeps about the wanted share of layers. With a single kind of prompt this is
    a prior in the biases; with several, the part of a layer's worth that the prompt foretells goes into the
    weights.

    Args:
        deltas, features: from ``leave_one_out``.
        keep: share of the unprotected layers to keep.
        spread: largest logit, small enough that training can still change every decision.
    """
    open_layers = (~model.protected).nonzero()[:, 0]
    y = deltas[:, open_layers]
    y = y - y.quantile(1 - keep, 1, keepdim=True)
    y = (y / y.abs().median(1, keepdim=True).values.clamp(min=1e-6)).clamp(-spread, spread)
    for column, layer in enumerate(open_layers):
        x, target = features[:, layer], y[:, column]
        weight, centre = ridge(x, target)
        model.routers.weight[layer] = weight
        model.routers.bias[layer] = target.mean() - weight @ centre


def ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [D] of the ridge regression of y [N] on x [N, D], both centred, and the mean [D] of x."""
    centre = x.mean(0)
    gram = (x - centre) @ (x - centre).T
    penalty = 0.1 * gram.diagonal().mean().clamp(min=1e-6)
    dual = torch.linalg.solve(gram + penalty * torch.eye(len(x), device=x.device), y - y.mean())
    return (x - centre).T @ dual, centre


def router_parameters(model: FirstModel, rate: float) -> list[dict[str, Any]]:
    """Optimizer groups for the routers, the weights' rate divided by sqrt(D).

    Adam moves every weight by about its learning rate a step, so on normalised input of width D one step at
    rate r moves a logit by up to r * D. Dividing the rate is the same as training v with
    score = sigmoid(v . n(h) / sqrt(D) + b), while what is stored stays the plain w.
    """
    width = model.routers.weight.shape[1]
    return [
        {"params": [model.routers.weight], "lr": rate / width**0.5, "weight_decay": 0.0},
        {"params": [model.routers.bias], "lr": rate, "weight_decay": 0.0},
    ]
