"""One training phase on transformers' Trainer: what is trained, how the gates act, when to give up."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from pyfirst import fit
from pyfirst.errors import InputError
from pyfirst.recipe import read_json
from pyfirst.training import checkpoints, report
from pyfirst.training.data import Example, MixedSampler, collate
from pyfirst.training.objectives import distillation, hard_gate_loss, paper_loss, router_parameters, steer
from pyfirst.training.routers import FirstModel, per_example

# Non-finite steps in a row after which training is given up.
BAD_STEPS = 5
# Steps after which memory that lies about in pieces goes back to the system.
TRIM = 5
# Blocks of at least this many bytes go back to the system as soon as they are freed. A quarter of it halves the memory,
# but takes 1.5 times as long.
OWN_MAP = 1 << 20
# With this many times the weights' size to take, memory is not what is scarce.
PLENTY = 16
# Masks remembered to tell whether routing has collapsed.
MEMORY = 500


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of the C library that only glibc has."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None)[function](*arguments)


def keep_heap_small(weights: int) -> None:
    """Give large blocks mappings of their own where memory is scarce for a model of ``weights`` bytes.

    Batches whose lengths keep changing fragment glibc's heap, but every new mapping has to be cleared page by page.
    """
    if min((room.size for room in fit.rooms()), default=0) < PLENTY * weights:
        m_mmap_threshold = -3  # as malloc.h has it
        _glibc("mallopt", m_mmap_threshold, OWN_MAP)


@dataclass
class Phase:
    """What a phase trains.

    Attributes:
        name, steps: of the phase; optimizer steps.
        routers, lora: which parameters learn.
        dense: every layer runs.
        soft: the paper's token-level gates and loss.
        steer: the threshold follows the scores, which move with a LoRA even if the routers are frozen.
        masks: "chosen", every example gets the mask of its task; "depths", one of several of its task.
        last: the learning rate falls to zero.
    """

    name: str
    steps: int
    routers: bool = False
    lora: bool = False
    dense: bool = False
    soft: bool = False
    steer: bool = False
    masks: str = ""
    last: bool = True


def plan(phase: str, objective: str, steps: int, routed: bool = True) -> list[Phase]:
    """The phases of ``--phase`` and ``--objective``, at least one step each; ``routed``: each task has its own mask."""
    if phase == "lora":
        return [Phase("lora", steps, lora=True)]
    if objective == "search":
        if phase == "routers":
            return []
        warm = max(1, steps // 5)
        between = max(1, steps // 4) if routed else 0
        phases = [Phase("warm-up", warm, lora=True, dense=True, last=False)]
        if routed:
            phases.append(Phase("depths", between, lora=True, masks="depths", last=False))
        return [*phases, Phase("lora", max(1, steps - warm - between), lora=True, masks="chosen")]
    if objective == "paper":
        first = steps if phase == "routers" else max(1, steps // 2)
        routers = Phase("routers", first, routers=True, soft=True)
        return [routers] if phase == "routers" else [routers, Phase("lora", max(1, steps - first), lora=True)]
    if phase == "routers":
        return [Phase("routers", steps, routers=True, steer=True)]
    warm, joint = max(1, steps // 5), max(1, 2 * steps // 5)
    return [
        Phase("warm-up", warm, lora=True, dense=True, last=False),
        Phase("joint", joint, routers=True, lora=True, steer=True),
        Phase("lora", max(1, steps - warm - joint), lora=True, steer=True),
    ]


class PhaseTrainer(Trainer):
    """Trainer with the losses of ``objectives`` and batches of ``MixedSampler``."""

    def __init__(
        self,
        model: FirstModel,
        phase: Phase,
        options: argparse.Namespace,
        target: float,
        teacher: Mapping[str, torch.Tensor] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        self.first, self.phase, self.options, self.target, self.teacher = model, phase, options, target, teacher
        self.kept: list[float] = []
        self.losses: list[float] = []
        self.scores: list[torch.Tensor] = []
        self.masks: deque[tuple[bool, ...]] = deque(maxlen=MEMORY)
        self.bad = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> MixedSampler:
        args = self.args
        return MixedSampler(
            self.train_dataset,  # type: ignore[arg-type]
            args.per_device_train_batch_size * args.world_size,
            args.gradient_accumulation_steps,
            args.seed,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = []
        if self.phase.routers:
            groups += router_parameters(self.first, self.options.router_lr)
        if self.phase.lora:
            groups.append({"params": list(self.first.lora().values()), "lr": self.options.lr, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        first = self.first
        teacher_logits = None
        if self.teacher is not None and not self.phase.dense and not self.phase.soft:
            first.eval()  # a teacher without dropout
            with first.with_lora(self.teacher):
                teacher_logits = first(**inputs, dense=True)["token_logits"]
            first.train()
        output = model(**inputs, dense=self.phase.dense)
        loss = output["loss"]
        free = ~first.protected
        if not self.phase.dense:
            keep = output["keep"][:, free]
            self.kept.append(float(keep.float().mean()))
            if not self.phase.masks:
                self.scores.append(output["scores"][:, free].detach())
            self.masks.extend(map(tuple, output["keep"].tolist()))
            if self.phase.soft:
                loss = paper_loss(loss, output["scores"][:, free], self.options.penalty)
            elif teacher_logits is not None:
                share = self.options.distill
                divergence = distillation(output["token_logits"], teacher_logits)
                by_example = per_example({**output, "token_loss": divergence}, len(keep))
                loss = (1 - share) * loss + share * (by_example * inputs["weight"]).mean()
            if self.phase.routers and not self.phase.soft:
                loss = hard_gate_loss(loss, output["scores"][:, free], self.target, weight=10.0)
        self.losses.append(float(output["loss"].detach()))
        return (loss, output) if return_outputs else loss


class Watch(TrainerCallback):
    """Steers the threshold, guards against values that are not finite, and tells how it goes."""

    def __init__(self) -> None:
        self.trainer: PhaseTrainer
        self.started = time.monotonic()
        self.log: list[dict[str, float]] = []
        self.recent: list[tuple[float, float]] = []

    def recall(self, stored: Mapping[str, Any]) -> None:
        """Take log and masks from what a checkpoint has ``stored`` of callbacks, if it has."""
        if before := stored.get("Watch"):
            self.log = before["log"]
            self.trainer.masks.extend(tuple(kept == "#" for kept in mask) for mask in before["masks"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recall(state.stateful_callbacks)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        parameters = [p for p in trainer.first.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            for parameter in parameters:
                parameter.grad = None  # the optimizer passes over it
            trainer.bad += 1
            report.say(f"step {state.global_step + 1}: gradients are not finite, step left out")
            if trainer.bad >= min(BAD_STEPS, max(2, trainer.phase.steps)):
                raise InputError(
                    f"loss or gradients were not finite in {trainer.bad} steps in a row; nothing was written, "
                    "try a lower --lr or --router-lr, or train without --bf16"
                )
            return
        trainer.bad = 0
        # The routers' gradients have another scale; together they would drown the LoRA's.
        lora = [p for p in trainer.first.lora().values() if p.grad is not None]
        if lora:
            torch.nn.utils.clip_grad_norm_(lora, 1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        first, phase = trainer.first, trainer.phase
        if state.global_step % TRIM == 0:
            _glibc("malloc_trim", 0)
        steered = float(first.threshold)
        if phase.steer and not bool(first.protected.all()):
            steered = steer(steered, torch.cat(trainer.scores), trainer.target)
        means = [sum(x) / max(len(x), 1) for x in (trainer.losses, trainer.kept or [1.0])]
        numbers = torch.tensor([*means, steered], device=args.device)
        loss, kept, steered = trainer.accelerator.reduce(numbers, "mean").tolist()
        first.threshold.fill_(steered)
        for values in (trainer.losses, trainer.kept, trainer.scores):
            values.clear()
        self.recent.append((loss, kept))
        if state.global_step % max(1, min(10, phase.steps // 5)) == 0 or state.global_step == phase.steps:
            loss = sum(x for x, _ in self.recent) / len(self.recent)
            share = sum(x for _, x in self.recent) / len(self.recent)
            share = 1 - (1 - share) * float((~first.protected).float().mean())
            self.recent.clear()
            seconds = time.monotonic() - self.started
            entry = {"step": state.global_step, "loss": round(loss, 4), "kept": round(share, 4)}
            entry["seconds"] = round(seconds, 1)
            line = f"{phase.name} {state.global_step}/{phase.steps}  loss {loss:.3f}"
            if not phase.dense:
                entry["threshold"] = round(float(first.threshold), 4)
                line += f"  kept {share:.0%}"
                line += "" if phase.masks else f"  threshold {entry['threshold']:.3f}"
                line += f"  masks {len(set(trainer.masks))} of {len(trainer.masks)}"
            self.log.append(entry)
            report.say(f"{line}  {seconds:.0f} s")
        report.progress(f"{phase.name} {state.global_step}/{phase.steps}")
        masks = ["".join("#" if kept else "." for kept in mask) for mask in trainer.masks]
        state.stateful_callbacks["Watch"] = {"log": self.log, "masks": masks}  # goes into every checkpoint


def run_phase(
    model: FirstModel,
    phase: Phase,
    examples: Sequence[Example],
    options: argparse.Namespace,
    target: float,
    seed: int,
    prepare: Callable[[], None] | None,
    work: Path,
    masks: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Train one phase in place; ``prepare`` runs before it, unless it resumes.

    Finished phases, their records and checkpoints lie under ``work``. ``target`` is the share of unprotected
    layers to keep, ``masks`` holds for each task bool [K, L], masks to force; an example always draws the same
    one. ``teacher`` holds the LoRA that, with all layers, is distilled from.
    Returns a record: name, steps, log lines, per-layer share kept near the end and warnings.
    """
    done = work / f"{phase.name}.safetensors"
    folder = work / phase.name
    told = done.with_suffix(".json")
    checkpoint = get_last_checkpoint(str(folder)) if options.resume and folder.is_dir() else None
    if options.resume and done.is_file():
        model.load_state_dict(load_file(done))
        report.say(f"{phase.name}: done before")
        return read_json(told) if told.is_file() else {"name": phase.name, "steps": phase.steps, "warnings": []}
    if checkpoint is None and prepare:
        prepare()
    model.gate = "soft" if phase.soft else "hard"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase.routers if name.startswith("routers.") else phase.lora and "lora_" in name)

    def collate_forced(chosen: Sequence[Example]) -> dict[str, torch.Tensor]:
        drawn = [random.Random(f"{seed}/{e.text}").choice(masks[e.task]) for e in chosen]
        return {**collate(chosen), "keep": torch.stack(drawn)}

    watch = Watch()
    trainer = PhaseTrainer(
        model,
        phase,
        options,
        target,
        teacher,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.grad_accum,
            max_steps=phase.steps,
            learning_rate=options.lr,
            lr_scheduler_type="cosine" if phase.last else "constant_with_warmup",
            warmup_steps=min(10, phase.steps // 10),
            max_grad_norm=0,
            logging_strategy="no",
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 500,
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=True,
            seed=seed,
        ),
        train_dataset=list(examples),
        data_collator=collate_forced if phase.masks else collate,
        callbacks=[watch],
    )
    watch.trainer = trainer
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(type(callback))
    if checkpoint and checkpoint.endswith(f"-{phase.steps}"):  # Trainer would take one more step from here
        model.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME))
        watch.recall(read_json(Path(checkpoint) / "trainer_state.json")["stateful_callbacks"])
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    model.gate = "hard"
    warnings = collapse(trainer.masks, model) if phase.routers and not phase.soft else []
    record: dict[str, Any] = {
        "name": phase.name,
        "steps": phase.steps,
        "log": watch.log,
        "warnings": warnings,
    }
    if trainer.masks:
        shares = torch.tensor(list(trainer.masks)).float().mean(0)
        record["layer_kept"] = [round(x, 3) for x in shares.tolist()]
    if trainer.args.should_save:
        told.write_text(json.dumps(record) + "\n", encoding="utf-8")  # before what says that the phase is done
        checkpoints.save(done, model.state_dict())
    return record


def collapse(masks: Sequence[tuple[bool, ...]], model: FirstModel) -> list[str]:
    """What is wrong with the masks of the last steps, in words."""
    if len(masks) < 20:
        return []
    free = torch.tensor(list(masks))[:, ~model.protected.cpu()]
    if bool(free.all()):
        return ["routing collapsed: no layer was skipped in the last steps"]
    if not bool(free.any()):
        return ["routing collapsed: every unprotected layer was skipped in the last steps"]
    if len(set(masks)) == 1:
        return ["routing collapsed: every prompt got the same mask in the last steps"]
    return []
