"""Scores as functions of sums over examples, with 95% intervals from resampling the examples (bootstrap).

Pure Python and numpy; the packages that define the scores are imported where they are asked for.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst.errors import InputError

METRICS = ("ce", "bleu", "chrf", "rouge1", "rougeL", "bertscore")
DEFAULT_METRICS = METRICS[:-1]
RESAMPLES = 1000
_INSTALL = "pip install '.[eval]' in a clone of pyfirst"


def _ratio(sums: np.ndarray) -> np.ndarray:
    """First sum by the second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


@dataclass
class Statistic:
    """A score as a function of sums over examples.

    Attributes:
        rows: float64 [n, k], what each example contributes.
        score: sums [R, k] -> scores [R]; NaN where there is nothing to score.
    """

    rows: np.ndarray
    score: Callable[[np.ndarray], np.ndarray] = _ratio

    def of(self, chosen: np.ndarray) -> float:
        """The score of some examples."""
        return float(self.score(self.rows[chosen].sum(0)[None])[0])

    def resampled(self, weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Scores [R] with the examples counted as often as ``weights`` [R, n] says."""
        return self.score(weights[:, chosen] @ self.rows[chosen])


def mean(values: Sequence[float] | np.ndarray) -> Statistic:
    """The mean over examples."""
    return Statistic(np.stack([np.asarray(values, np.float64), np.ones(len(values))], 1))


def draw(tasks: Sequence[str], seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each resample counts each example, float64 [resamples, n]; every task keeps its size."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(tasks)))
    for task in dict.fromkeys(tasks):
        chosen = np.flatnonzero([t == task for t in tasks])
        weights[:, chosen] = generator.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), resamples)
    return weights


def _interval(value: float, samples: np.ndarray, resampled: bool) -> dict[str, float | None]:
    finite = samples[np.isfinite(samples)]
    if not np.isfinite(value) or not len(finite):
        return {"value": None, "low": None, "high": None}
    if not resampled:
        return {"value": value, "low": None, "high": None}
    low, high = np.percentile(finite, (2.5, 97.5))
    return {"value": value, "low": float(low), "high": float(high)}


def estimate(
    statistic: Statistic, weights: np.ndarray, chosen: np.ndarray, first: Statistic | None = None
) -> dict[str, Any]:
    """{"value", "low", "high"} with the 95% interval, and "difference", the same against ``first``, paired.

    low and high are None where fewer than two examples that count were resampled: one example alone does not vary.
    """
    value, samples = statistic.of(chosen), statistic.resampled(weights, chosen)
    counts = statistic.rows[chosen].any(1) & (np.ptp(weights[:, chosen], 0) > 0)
    several = bool(counts.sum() > 1)
    result: dict[str, Any] = _interval(value, samples, several)
    result["difference"] = None
    if first is not None:
        result["difference"] = _interval(value - first.of(chosen), samples - first.resampled(weights, chosen), several)
    return result


def need(package: str, what: str, install: str = _INSTALL) -> Any:
    """Import a package. Raises InputError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{what} needs the package '{package.partition('.')[0]}': {install}") from None


def _sacrebleu(metric: Any, texts: list[str], references: list[list[str]]) -> Statistic:
    """A corpus score of sacrebleu, from its own statistics of each sentence."""
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    rows = np.array(metric._extract_corpus_statistics(texts, columns), np.float64)

    def score(sums: np.ndarray) -> np.ndarray:
        return np.array([metric._compute_score_from_stats(list(map(int, row))).score for row in sums.round()])

    return Statistic(rows, score)


def bleu(texts: list[str], references: list[list[str]]) -> Statistic:
    """Corpus BLEU of sacrebleu (13a, exponential smoothing), 0 to 100."""
    return _sacrebleu(need("sacrebleu.metrics", "bleu").BLEU(force=True), texts, references)


def chrf(texts: list[str], references: list[list[str]]) -> Statistic:
    """Corpus chrF2 of sacrebleu, 0 to 100."""
    return _sacrebleu(need("sacrebleu.metrics", "chrf").CHRF(), texts, references)


_CJK = r"\u3040-\u30ff\u3400-\u9fff"


class _Words:
    """Words of any script for rouge-score, whose own are ASCII letters and digits; Chinese, Japanese by character."""

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text.lower()).replace("_", " ")
        # Vowel signs and accents that are characters of their own: no letters to re, but part of the word before them.
        letters = "".join("_" if unicodedata.category(c).startswith("M") else c for c in text)
        found = re.finditer(rf"[{_CJK}]_*|[^\W_{_CJK}][^\W{_CJK}]*", letters)
        return [text[word.start() : word.end()] for word in found]


def rouge(texts: list[str], references: list[list[str]], kind: str) -> Statistic:
    """Mean ROUGE F of rouge-score without stemming, the best over the references, 0 to 100.

    Where most letters of an example's references are not ASCII, its words are those of Unicode.
    """
    package = need("rouge_score.rouge_scorer", kind)
    scorers = [package.RougeScorer([kind], tokenizer=words) for words in (None, _Words())]
    values = []
    for targets, text in zip(references, texts, strict=True):
        letters = [c for target in targets for c in target if c.isalpha()]
        foreign = 2 * sum(map(str.isascii, letters)) < len(letters)
        values.append(100 * scorers[foreign].score_multi(targets, text)[kind].fmeasure)
    return mean(values)


def exact(texts: list[str], references: list[list[str]]) -> Statistic:
    """Share of texts that equal a reference but for white space."""
    pairs = zip(references, texts, strict=True)
    return mean([" ".join(text.split()) in [" ".join(r.split()) for r in targets] for targets, text in pairs])


def final_number(text: str) -> str | None:
    """The number behind the last '####', commas and trailing zeros gone; None where there is none."""
    found = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def final_answers(texts: list[str], references: list[list[str]]) -> Statistic:
    """Share of right numbers behind '####', among the examples whose reference has one."""
    rows = []
    for targets, text in zip(references, texts, strict=True):
        wanted = {final_number(target) for target in targets} - {None}
        rows.append([final_number(text) in wanted, bool(wanted)])
    return Statistic(np.array(rows, np.float64))


def bertscorer(model: str | None) -> Callable[[list[str], list[list[str]]], Statistic]:
    """A function to the mean F1 of BERTScore, the best over the references, 0 to 100; ``model`` None: for English.

    The layer that is compared is the one that bert-score found best for a model of that name, otherwise the last.
    """
    package = need("bert_score", "bertscore", "pip install bert-score")
    if model is None:
        scorer = package.BERTScorer(lang="en")
    else:
        best = {name.rpartition("/")[2]: layer for name, layer in package.utils.model2layers.items()}
        layer = best.get(Path(model).name)
        if layer is None:
            from transformers import AutoConfig

            layer = AutoConfig.from_pretrained(model).num_hidden_layers
        scorer = package.BERTScorer(model_type=model, num_layers=layer)

    def score(texts: list[str], references: list[list[str]]) -> Statistic:
        return mean(100 * np.asarray(scorer.score(texts, references)[2], np.float64))

    return score


def guess_tasks(masks: np.ndarray, tasks: Sequence[str], modal: bool = False) -> np.ndarray:
    """Credit [n] for guessing each example's task from the nearest mask among the tasks, leaving it out.

    Args:
        masks: bool [n, n_layer].
        tasks: task of each example.
        modal: compare with each task's most frequent mask instead of its mean mask.

    k tasks that are equally near share the credit. The task of an example that is alone in it cannot be guessed.
    """
    names, labels = np.unique(np.asarray(tasks), return_inverse=True)
    credit = np.zeros(len(tasks))
    values = masks.astype(np.float64)
    centres = [_centre(values[labels == k], modal) for k in range(len(names))]
    for i, own in enumerate(labels):
        others = (labels == own) & (np.arange(len(labels)) != i)
        distances = np.array([np.abs(centre - values[i]).sum() for centre in centres])
        distances[own] = np.abs(_centre(values[others], modal) - values[i]).sum() if others.any() else np.inf
        nearest = distances <= distances.min() + 1e-9
        credit[i] = nearest[own] / nearest.sum()
    return credit


def _centre(values: np.ndarray, modal: bool) -> np.ndarray:
    return modal_mask(values > 0.5).astype(np.float64) if modal else values.mean(0)


def modal_mask(masks: np.ndarray) -> np.ndarray:
    """The most frequent row of bool [n, n_layer]; among equally frequent ones the nearest to their mean."""
    rows, counts = np.unique(masks, axis=0, return_counts=True)
    rows = rows[counts == counts.max()]
    return rows[np.abs(rows - masks.mean(0)).sum(1).argmin()]


def compare_tasks(masks: np.ndarray, tasks: Sequence[str], weights: np.ndarray) -> dict[str, Any] | None:
    """How masks, bool [n, n_layer], tell tasks apart; None for a single task.

    "modal" names the layers that each task's most frequent mask leaves out, "differ" is the share of layers on
    which two tasks' modal masks differ, "guess" the accuracy of guess_tasks(), None where every task has one example;
    by chance it is "chance".
    """
    names = list(dict.fromkeys(tasks))
    if len(names) < 2:
        return None
    modal = {name: modal_mask(masks[[task == name for task in tasks]]) for name in names}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    in_company = np.array([i for i, task in enumerate(tasks) if tasks.count(task) > 1])
    guesses = {}
    for kind in ("mean", "modal") if len(in_company) else ():
        guesses[kind] = estimate(mean(guess_tasks(masks, tasks, kind == "modal")), weights, in_company)
        del guesses[kind]["difference"]
    return {
        "modal": {name: np.flatnonzero(~mask).tolist() for name, mask in modal.items()},
        "differ": {f"{a} / {b}": float((modal[a] != modal[b]).mean()) for a, b in pairs},
        "guess": guesses or None,
        "chance": 1 / len(names),
    }
