"""Task files (JSONL with ``prompt``, ``response``, optional ``task``) as tokens, the prompt marked."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from pyfirst import tasks
from pyfirst.errors import InputError

# Batches are this many tokens long, or a multiple: on CPUs every new length leaves compiled kernels in memory.
STRIDE = 16


@dataclass
class Example:
    """One prompt and its response.

    Attributes:
        prompt: token ids as the runtime will feed them, chat template and generation prompt included.
        response: token ids, end-of-turn token included.
        task: the line's ``task``, or the file's name.
        text: the prompt's own text.
        weight: of the response's mean loss, see ``weigh``.
    """

    prompt: array[int]
    response: array[int]
    task: str
    text: str
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def read_rows(name: str) -> list[tasks.Example]:
    """Examples of a task file, or of a data set's split, ``owner/name[/configuration][:split]``, with the same columns.

    Raises InputError naming the line or row.
    """
    named = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::(.+))?", name)
    if Path(name).exists() or not named or name.endswith(".jsonl"):
        return tasks.read_examples(name)
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{name}: no such file; for data sets by name, pip install datasets") from None
    dataset, configuration, split = named.groups()
    try:
        table = load_dataset(dataset, configuration, split=split or "train")
        missing = {"prompt", "response"} - set(table.column_names)
    except Exception as error:  # network, name, split and format all fail in their own ways
        raise InputError(f"{name}: cannot be loaded as a data set ({error})") from error
    if missing:
        raise InputError(f"{name}: no column '{min(missing)}', found {', '.join(table.column_names)}")
    task = name.partition("/")[2].partition(":")[0]
    return [tasks.example(row, f"{name}: row {number}", task) for number, row in enumerate(table)]


def encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response, each tokenised by itself as at run time.

    With a chat template the prompt ends with the generation prompt and holds no BOS but the template's own;
    the response ends with what the template puts behind an answer. Without one, the tokenizer's own special
    tokens stand before the prompt and EOS behind the response. The name of a special token means the token in a
    prompt, but is plain text in a response. Raises InputError if the template refuses.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer names no eos_token, which must end an answer; see its tokenizer_config.json")

    def ids_of(text: str, special: bool = True) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]

    if not tokenizer.chat_template:
        ids = tokenizer(prompt)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids, [*ids_of(response, special=False), tokenizer.eos_token_id]
    # White space around an answer is not the model's to learn; what scores answers strips it too.
    user, response = {"role": "user", "content": prompt}, response.strip()
    try:
        head = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        answer = {"role": "assistant", "content": response}
        whole = tokenizer.apply_chat_template([user, answer], tokenize=False)
    except Exception as error:  # templates raise whatever they like
        raise InputError(f"the model's chat template refuses a user turn and an answer: {error}") from error
    tail = whole[len(head) :].rstrip() if whole.startswith(head) else ""
    if not tail.startswith(response) or tail == response:
        tail = response + tokenizer.eos_token
    plain = ids_of(response, special=False)
    if plain == ids_of(response):  # what follows may merge with it
        return ids_of(head), ids_of(tail)
    return ids_of(head), plain + ids_of(tail[len(response) :])


def load_examples(
    rows: Sequence[tasks.Example], tokenizer: Any, max_length: int
) -> tuple[list[Example], dict[str, int]]:
    """Encode rows; prompts that are too long lose their end, before the template closes around them.

    Returns the examples and counts of ``shortened`` prompts and ``dropped`` examples (those whose response
    leaves no room for a prompt within ``max_length`` tokens). Raises InputError for a prompt without a token.
    """
    examples, counts = [], {"shortened": 0, "dropped": 0}
    for row in rows:
        text, answer = row.prompt, row.references[0]
        prompt, response = encode(tokenizer, text, answer)
        if not prompt:
            raise InputError(
                f"{row.where}: no token is left of the prompt; look at the tokenizer and chat template of "
                f"{tokenizer.name_or_path}, which must render a user's turn"
            )
        excess = len(prompt) + len(response) - max_length
        if excess > 0:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            # Two to spare: cutting a token sequence can cost a token when the text is tokenised again.
            if len(ids) - excess - 2 < 4:
                counts["dropped"] += 1
                continue
            text = tokenizer.decode(ids[: len(ids) - excess - 2]).rstrip("\ufffd")  # a character that was cut in two
            prompt, response = encode(tokenizer, text, answer)
            counts["shortened"] += 1
            if len(prompt) + len(response) > max_length:
                counts["dropped"] += 1
                continue
        # Lists of ints take ten times the memory, and data sets are large.
        examples.append(Example(array("i", prompt), array("i", response), row.task, row.prompt))
    return examples, counts


def draw(examples: Sequence[Example], per_task: int, seed: int, part: int = 1) -> list[Example]:
    """``per_task`` examples of every task, no prompt twice; at most one in ``part`` of its prompts, at least one."""
    chooser = random.Random(seed)
    drawn = []
    for task in sorted({e.task for e in examples}):
        by_text: dict[str, Example] = {}
        for example in examples:
            if example.task == task:
                by_text.setdefault(example.text, example)
        chosen = chooser.sample(sorted(by_text), max(1, min(per_task, len(by_text) // part)))
        drawn += [by_text[text] for text in chosen]
    return drawn


def hold_back(examples: Sequence[Example], per_task: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Split off ``per_task`` examples of every task, at most a fifth of it; no prompt is in both parts."""
    kept_back = draw(examples, per_task, seed, part=5)
    held = {e.text for e in kept_back}
    return [e for e in examples if e.text not in held], kept_back


def weigh(examples: Sequence[Example]) -> None:
    """Set each example's weight to the length of its response over the mean length in its task.

    The mean of weight * (mean loss of a response) then is the mean over the tokens of each task, and the mean over the
    tasks, in whatever batches they come. With equal weights the few tokens of short responses would count more than
    those of long ones, their end above all, and answers would become shorter than those that were learned from.
    """
    lengths: dict[str, list[int]] = {}
    for example in examples:
        lengths.setdefault(example.task, []).append(len(example.response))
    for example in examples:
        found = lengths[example.task]
        example.weight = len(example.response) * len(found) / sum(found)


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Padded on the right, int64 [B, T]: input_ids, attention_mask, prompt_mask and labels (-100: no loss).

    And weight float32 [B].
    """
    length = -(-max(map(len, examples)) // STRIDE) * STRIDE
    shape = (len(examples), length)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "prompt_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
        "weight": torch.tensor([e.weight for e in examples]),
    }
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        batch["input_ids"][row, :end] = torch.tensor(example.prompt + example.response)
        batch["attention_mask"][row, :end] = 1
        batch["prompt_mask"][row, :start] = 1
        batch["labels"][row, start:end] = torch.tensor(example.response)
    return batch


def batches(examples: Sequence[Example], size: int, device: Any) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Indices and tensors of batches of similar length."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, {k: v.to(device) for k, v in collate([examples[i] for i in chosen]).items()}


class MixedSampler(Sampler[int]):
    """Every task equally often in each optimizer step; within a step, batches of similar length.

    The small tasks repeat until the largest is through; the order is given by ``seed`` and the epoch.

    Args:
        examples: what to draw from.
        batch: examples a forward pass, accumulation: passes an optimizer step.
    """

    def __init__(self, examples: Sequence[Example], batch: int, accumulation: int, seed: int) -> None:
        self.lengths = [len(e) for e in examples]
        groups: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            groups.setdefault(example.task, []).append(index)
        self.tasks = [groups[task] for task in sorted(groups)]
        self.batch, self.step, self.seed = batch, batch * accumulation, seed
        size = max(map(len, self.tasks)) * len(self.tasks)
        self.size = max(1, size // self.step) * self.step
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        chooser = random.Random(f"{self.seed}/{self.epoch}")
        queues: list[list[int]] = [[] for _ in self.tasks]
        mixed = []
        for position in range(self.size):
            task = position % len(self.tasks)
            if not queues[task]:
                queues[task] = chooser.sample(self.tasks[task], len(self.tasks[task]))
            mixed.append(queues[task].pop())
        for start in range(0, self.size, self.step):
            window = sorted(mixed[start : start + self.step], key=lambda i: self.lengths[i])
            batches = [window[i : i + self.batch] for i in range(0, self.step, self.batch)]
            chooser.shuffle(batches)
            for batch in batches:
                yield from batch
