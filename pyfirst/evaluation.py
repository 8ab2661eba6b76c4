"""What layers left out cost: GGUF files scored in the real runtime, against each other, with intervals.

A *system* is a file and a mode: dense, routed, or a fixed set of layers left out. All systems answer the same
examples, so differences are paired. Every score is a function of sums over examples, so that resampling the
examples (the bootstrap) gives the 95% interval of corpus scores too.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst.cpu import machine
from pyfirst.errors import InputError
from pyfirst.info import info
from pyfirst.layers import evenly
from pyfirst.llama import FirstLlama
from pyfirst.scores import (
    DEFAULT_METRICS,
    METRICS,
    RESAMPLES,
    Statistic,
    bertscorer,
    bleu,
    chrf,
    compare_tasks,
    draw,
    estimate,
    exact,
    final_answers,
    mean,
    need,
    rouge,
)
from pyfirst.tasks import Example, gather, read_examples

import llama_cpp  # isort: skip  (after pyfirst, which points it at our library)

MODES = "dense, routed, static:LAYERS, even:N, random:N"
_CHUNK = 128  # reference tokens whose logits are held at once


@dataclass(frozen=True)
class System:
    """A file and how to run it; ``mask``, bool [n_layer], is None where the routers decide."""

    name: str
    path: str
    mode: str
    n_layer: int
    mask: np.ndarray | None


def _count(mode: str, text: str, n_layer: int) -> int:
    most = max(n_layer - 2, 0)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise InputError(f"mode '{mode}': expected a number of layers from 1 to {most}; the first and last stay")
    return int(text)


def mode_mask(mode: str, n_layer: int, seed: int) -> np.ndarray | None:
    """The mask, bool [n_layer], that a mode stands for, None for "routed". Raises InputError.

    "even:N" and "random:N" never leave out the first or the last layer.
    """
    kind, _, rest = mode.partition(":")
    mask = np.ones(n_layer, bool)
    if mode == "routed":
        return None
    if mode == "dense":
        return mask
    if kind == "static":
        parts = [part.strip() for part in rest.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise InputError(f"mode '{mode}': expected layer numbers such as static:3,5,7")
        for layer in map(int, parts):
            if layer >= n_layer:
                raise InputError(f"mode '{mode}': layer {layer}, the model has layers 0 to {n_layer - 1}")
            mask[layer] = False
        return mask
    if kind == "even":
        mask[evenly(range(1, n_layer - 1), _count(mode, rest, n_layer))] = False
        return mask
    if kind == "random":
        mask[random.Random(seed).sample(range(1, n_layer - 1), _count(mode, rest, n_layer))] = False
        return mask
    raise InputError(f"unknown mode '{mode}' (known: {MODES})")


def _split(text: str) -> tuple[str, str | None]:
    """'file.gguf=mode' as (file, mode); a file whose name holds '=' is found as it is."""
    path, equals, mode = text.rpartition("=")
    if not equals or Path(text).is_file():
        return text, None
    return path, mode


def _pairs(models: Sequence[str], compare: Sequence[str]) -> list[tuple[str, str | None]]:
    """(file, mode) of each system, as in plan(); mode is None where none is given."""
    modes: list[str | None] = [item for item in compare if "=" not in item and not item.endswith(".gguf")]
    pairs: list[tuple[str, str | None]] = []
    for path, mode in map(_split, models):
        pairs += [(path, m) for m in ([mode] if mode is not None else modes or [None])]
    return pairs + [_split(item) for item in compare if item not in modes]


def model_files(models: Sequence[str], compare: Sequence[str] = ()) -> list[str]:
    """The files that plan() reads."""
    return list(dict.fromkeys(path for path, _ in _pairs(models, compare)))


def plan(models: Sequence[str], compare: Sequence[str] = (), seed: int = 0) -> list[System]:
    """The systems to compare, in order.

    Args:
        models: files, or "file=mode". A plain file takes all modes of ``compare``.
        compare: modes, and more "file=mode". Without a mode a file is routed if it can be, else dense.
        seed: draws the layers of "random:N".

    Raises:
        InputError: no such file, unknown mode, layer out of range, routed without routers, the same twice.
    """
    found = {path: info(path) for path in model_files(models, compare)}
    stems = Counter(Path(path).stem for path in found)
    systems: list[System] = []
    for path, mode in _pairs(models, compare):
        n_layer, routers = found[path]["layers"], found[path]["routers"]
        if n_layer is None:
            raise InputError(f"{path}: not a language model")
        if mode is None:
            mode = "routed" if routers else "dense"
        mask = mode_mask(mode, n_layer, seed)
        if mask is None and not routers:
            raise InputError(f"{path}: no routers in this file, so it cannot be 'routed'")
        name = mode
        if len(found) > 1:
            name = f"{Path(path).stem if stems[Path(path).stem] == 1 else path} {mode}"
        if name in (system.name for system in systems):
            raise InputError(f"'{name}' is named twice")
        systems.append(System(name, path, mode, n_layer, mask))
    return systems


class Scorer(FirstLlama):
    """FirstLlama that also gives prompts as tokens and the likelihood of a given continuation."""

    @property
    def has_template(self) -> bool:
        """Whether the file brings a chat template; without one prompts are plain text."""
        return bool(self.metadata.get("tokenizer.chat_template"))

    def end_of_turn(self) -> int:
        """The token that ends an answer, as in training: what the template puts there, else EOT, else EOS.

        Without a template it is EOS, as a base model has learned.
        """
        eot = llama_cpp.llama_vocab_eot(self._model.vocab)
        if self.has_template:
            question, reply = ({"role": role, "content": "x"} for role in ("user", "assistant"))
            try:
                answered = self.chat_tokens([question, reply])[len(self.chat_tokens([question])) :]
            except InputError:
                answered = []
            for token in answered:
                if self.is_eog(token):
                    return token
        elif self.token_eos() != -1:
            return self.token_eos()
        return eot if eot != -1 else self.token_eos()

    def prompt_tokens(self, prompt: str) -> list[int]:
        """A user's message in the model's chat template; where there is none, the text itself."""
        if self.has_template:
            return self.chat_tokens([{"role": "user", "content": prompt}])
        return self.tokenize(prompt.encode("utf-8"), add_bos=True, special=True)

    def answer_tokens(self, text: str, end: int) -> list[int]:
        """An answer as training counts it: behind a template stripped, then the end-of-turn token."""
        text = text.strip() if self.has_template else text
        return [*self.tokenize(text.encode("utf-8"), add_bos=False, special=False), end]

    def log_likelihood(self, answer: Sequence[int]) -> float:
        """Sum of log p(token) of a continuation, given what has just been read, under its mask.

        The continuation is fed at once. The object's own state stays where it was: what follows overwrites it.
        """
        total = _log_p(self.logits_of(self.n_tokens - 1)[None], answer[:1])
        fed, wanted, step = answer[:-1], answer[1:], min(_CHUNK, self.n_batch)
        for start in range(0, len(fed), step):
            part = fed[start : start + step]
            self._batch.set_batch(batch=part, n_past=self.n_tokens + start, logits_all=True)
            self._ctx.decode(self._batch)
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(part) * self._n_vocab,))
            total += _log_p(logits.reshape(len(part), -1), wanted[start : start + step])
        return total


def _log_p(logits: np.ndarray, tokens: Sequence[int]) -> float:
    """Sum of log softmax(logits)[i, tokens[i]]."""
    top = logits.max(-1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(-1, dtype=np.float64)) + top
    return float((logits[np.arange(len(tokens)), np.asarray(tokens)] - log_sum).sum())


@dataclass
class Answer:
    """What one system made of one example. Cross-entropy fields are 0 where it was not asked for.

    Attributes:
        mask: bool [n_layer], True = the layer is kept.
        log_likelihood: of the reference's n_reference tokens, a sum in nats.
        n_steps: decode steps that took ``seconds``; the first token, which the prompt's step gives, is not among them.
    """

    text: str
    mask: np.ndarray
    log_likelihood: float
    n_reference: int
    n_generated: int
    n_steps: int
    seconds: float


def answer(llm: Scorer, prompt: list[int], reference: list[int] | None, max_tokens: int) -> Answer:
    """Read a prompt; score ``reference`` under its mask; then answer greedily with ``max_tokens`` at most."""
    steps = llm.generate(prompt, temp=0.0)
    token = next(steps)
    assert llm.routing is not None
    mask = llm.routing.mask
    log_likelihood = llm.log_likelihood(reference) if reference else 0.0
    tokens: list[int] = []
    n_steps, seconds = 0, 0.0
    while len(tokens) < max_tokens and not llm.is_eog(token):
        tokens.append(token)
        if len(tokens) == max_tokens:
            break
        start = time.perf_counter()
        token = next(steps)
        seconds += time.perf_counter() - start
        n_steps += 1
    steps.close()
    text = llm.detokenize(tokens).decode("utf-8", errors="ignore") if tokens else ""
    return Answer(text, mask, log_likelihood, len(reference or ()), len(tokens), n_steps, seconds)


def _statistics(
    answers: list[Answer], examples: list[Example], metrics: Sequence[str], scorers: dict[str, Any], generated: bool
) -> dict[str, Statistic]:
    """Name -> statistic of one system's answers."""
    texts, references = [a.text for a in answers], [example.references for example in examples]
    result = {
        "layers": mean([a.mask.sum() for a in answers]),
        "kept": mean([a.mask.mean() for a in answers]),
    }
    if generated:
        result["tokens_per_s"] = Statistic(np.array([[a.n_steps, a.seconds] for a in answers]))
        result["length"] = mean([a.n_generated for a in answers])
    for name in metrics:
        if name == "ce":
            result[name] = Statistic(np.array([[-a.log_likelihood, a.n_reference] for a in answers]))
        else:
            result[name] = scorers[name](texts, references)
    return result


def _encode(llm: Scorer, examples: list[Example], max_tokens: int, ctx: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and first reference of each example as tokens. Raises InputError for one that does not fit."""
    end = llm.end_of_turn()
    result = []
    for example in examples:
        prompt = llm.prompt_tokens(example.prompt)
        reference = llm.answer_tokens(example.references[0], end)
        wanted = len(prompt) + max(len(reference), max_tokens)
        if wanted > ctx:
            raise InputError(
                f"{example.where}: prompt ({len(prompt)} tokens) and answer ({wanted - len(prompt)}) need "
                f"{wanted} tokens, the context of {llm.model_path} holds {ctx}; see -c and -n"
            )
        result.append((prompt, reference))
    return result


def _check(
    max_tokens: int, limit: int | None, threads: int | None, ctx: int, seed: int, metrics: Sequence[str]
) -> None:
    """Refuse impossible options before anything is loaded. Raises InputError."""
    for option, value in (("-n", max_tokens), ("--limit", limit), ("-t", threads)):
        if value is not None and value < 1:
            raise InputError(f"{option} is {value}, expected at least 1")
    if ctx < 2:
        raise InputError(f"-c is {ctx}, expected at least 2 tokens")
    if seed < 0:
        raise InputError(f"--seed is {seed}, expected 0 or more")
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"unknown metric '{name}' (known: {', '.join(METRICS)})")


def evaluate(
    models: Sequence[str],
    data: Sequence[str | os.PathLike[str]],
    *,
    compare: Sequence[str] = (),
    max_tokens: int = 128,
    limit: int | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    match: bool = False,
    ctx: int = 2048,
    threads: int | None = None,
    threshold: float | None = None,
    skip: float | None = None,
    prefill: str | None = None,
    seed: int = 0,
    bertscore_model: str | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    on_answer: Callable[[dict[str, Any]], None] = lambda row: None,
    **llama: Any,
) -> dict[str, Any]:
    """Score systems on the same examples; what --format json prints.

    Args:
        models, compare, seed: as in plan(); the seed also draws the resamples.
        data: JSONL files as read_examples() takes them.
        max_tokens: of an answer. Nothing is generated if "ce" is the only metric.
        limit: examples of each file.
        metrics: some of METRICS. "ce" is the cross-entropy in nats a token of the first reference and its
            end-of-turn token.
        match: also exact matches, and right numbers behind '####'.
        ctx, threads, threshold, skip, prefill: as in first-run; threshold and skip mean the routed systems.
        bertscore_model: folder or name of the model that "bertscore" compares texts with; default: for English.
        on_progress: called with answers done, answers in all, and the system at work.
        on_answer: called with each answer: {"system", "task", "prompt", "references", "text", ...}.
        **llama: more arguments of FirstLlama.

    Returns:
        {"machine", "settings", "tasks": {name: examples}, "systems": [...]}. A system holds "name", "model",
        "mode", "n_layer", "prefill", "threshold", "skip_layers", "total" and "by_task" (examples, distinct masks
        and an estimate() of each score) and "masks", see compare_tasks(). The difference to the first system is None
        for "tokens_per_s" of another file, and for "ce" where the references are another number of tokens. Where one
        context serves several systems and the prompt runs all layers ("full"), they share its keys and values: a prompt
        is read once, its last token by each.

    Raises:
        InputError: wrong file, line, mode, option, or a package that is missing.
    """
    _check(max_tokens, limit, threads, ctx, seed, metrics)
    metrics = list(dict.fromkeys(metrics))
    scorers: dict[str, Any] = {"exact": exact, "answer": final_answers, "bleu": bleu, "chrf": chrf}
    for name in ("rouge1", "rougeL"):
        scorers[name] = lambda texts, references, kind=name: rouge(texts, references, kind)
    if "bertscore" in metrics:
        scorers["bertscore"] = bertscorer(bertscore_model)
    metrics += ["exact", "answer"] if match else []
    for name in metrics:
        if name not in ("ce", "exact", "answer", "bertscore"):
            need("rouge_score.rouge_scorer" if name.startswith("rouge") else "sacrebleu.metrics", name)
    generated = metrics != ["ce"]
    examples = gather(data, lambda path: read_examples(path, limit))
    tasks = [example.task for example in examples]
    systems = plan(models, compare, seed)
    paths = list(dict.fromkeys(system.path for system in systems))
    if (threshold is not None or skip is not None) and all(system.mask is not None for system in systems):
        raise InputError("--threshold and --skip decide nothing: no system is routed")

    def open_model(path: str) -> tuple[Scorer, bool, int]:
        """(model, whether it routes, tokens it holds)."""
        routes = any(system.path == path and system.mask is None for system in systems)
        held = min(ctx, info(path)["context_length"] or ctx)
        llm = Scorer(
            path,
            routing=routes,
            threshold=threshold if routes else None,
            skip=skip if routes else None,
            prefill=prefill,
            n_ctx=held,
            n_threads=threads,
            n_threads_batch=threads,
            **llama,
        )
        return llm, routes, held

    # All files are opened, and all examples tokenised, before the long work begins.
    encoded = {}
    for path in paths:
        llm, _, held = open_model(path)
        encoded[path] = _encode(llm, examples, max_tokens if generated else 0, held)
        llm.close()

    answers: dict[str, list[Answer]] = {system.name: [] for system in systems}
    facts: dict[str, dict[str, Any]] = {}
    total, done = len(systems) * len(examples), 0
    for path in paths:
        llm, routes, _ = open_model(path)
        # Routed first: its prompt must be scored, the others reuse what it has read.
        own = sorted((s for s in systems if s.path == path), key=lambda s: s.mask is not None)
        for system in own:
            facts[system.name] = {"prefill": llm.prefill, "threshold": llm.threshold if system.mask is None else None}
        for example, (prompt, reference) in zip(examples, encoded[path], strict=True):
            for system in own:
                on_progress(done, total, system.name)
                # Without routers nothing need be forced to run dense, at the full speed of the plain graph.
                dense = system.mask is not None and system.mask.all()
                with llm.forcing(None if dense and not routes else system.mask):
                    # Each system reads the prompt in batches of the same sizes, or equal masks would differ a little.
                    if len(systems) > 1 and llm.prefill == "skip":
                        llm.reset()
                    elif len(systems) > 1 and system is own[0]:
                        answer(llm, prompt, None, 0)  # and again, as the others do: the last token alone
                    found = answer(llm, prompt, reference if "ce" in metrics else None, max_tokens if generated else 0)
                answers[system.name].append(found)
                on_answer(_row(system, example, found))
                done += 1
        llm.close()
    on_progress(total, total, "")

    measured = {
        system.name: _statistics(answers[system.name], examples, metrics, scorers, generated) for system in systems
    }
    weights = draw(tasks, seed)

    def comparable(system: System) -> dict[str, Statistic]:
        """The first system's statistics that this one's can be compared with."""
        if system is systems[0]:
            return {}
        of_first = dict(measured[systems[0].name])
        if system.path != systems[0].path:  # not measured in turns, so the machine may have changed its speed
            of_first.pop("tokens_per_s", None)
        own, wanted = ([found.n_reference for found in answers[s.name]] for s in (system, systems[0]))
        if own != wanted:  # nats a token of another tokenizer
            of_first.pop("ce", None)
        return of_first

    return {
        "machine": machine(threads or llm.n_threads),
        "settings": {
            "data": [os.fspath(path) for path in data],
            "limit": limit,
            "max_tokens": max_tokens,
            "metrics": metrics,
            "ctx": ctx,
            "seed": seed,
            "resamples": RESAMPLES,
        },
        "tasks": dict(Counter(tasks)),
        "systems": [
            {
                "name": system.name,
                "model": system.path,
                "mode": system.mode,
                "n_layer": system.n_layer,
                **facts[system.name],
                "skip_layers": None if system.mask is None else np.flatnonzero(~system.mask).tolist(),
                **_report(
                    np.stack([found.mask for found in answers[system.name]]),
                    tasks,
                    measured[system.name],
                    comparable(system),
                    weights,
                ),
            }
            for system in systems
        ],
    }


def _report(
    masks: np.ndarray,
    tasks: list[str],
    statistics: dict[str, Statistic],
    first: dict[str, Statistic],
    weights: np.ndarray,
) -> dict[str, Any]:
    """ "total", "by_task" and "masks" of one system; ``first`` holds the statistics it is compared with."""

    def group(chosen: np.ndarray) -> dict[str, Any]:
        return {
            "examples": len(chosen),
            "distinct_masks": len(np.unique(masks[chosen], axis=0)),
            **{name: estimate(found, weights, chosen, first.get(name)) for name, found in statistics.items()},
        }

    return {
        "total": group(np.arange(len(tasks))),
        "by_task": {name: group(np.flatnonzero([task == name for task in tasks])) for name in dict.fromkeys(tasks)},
        "masks": compare_tasks(masks, tasks, weights),
    }


def _row(system: System, example: Example, found: Answer) -> dict[str, Any]:
    return {
        "system": system.name,
        "where": example.where,
        "task": example.task,
        "prompt": example.prompt,
        "references": example.references,
        "text": found.text,
        "skipped": np.flatnonzero(~found.mask).tolist(),
        "log_likelihood": found.log_likelihood,
        "reference_tokens": found.n_reference,
        "tokens": found.n_generated,
    }
