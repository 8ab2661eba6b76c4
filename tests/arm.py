"""The same models and prompts on two machines: `expect FOLDER` here, `check FOLDER` on the other (make test-arm).

expect needs torch and makes the models; check needs numpy and pyfirst only. Masks, greedy tokens and what a state
restores must be equal, scores and logits (float32 KV) within TOLERANCE, for float32 also of torch's for the forced
masks. In quantised types one bit in a float32 moves an input that is rounded to 8 bits, so there a token may
differ where the two likeliest are closer than two tolerances.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

MODELS = (("llama", "f32"), ("qwen3", "f32"), ("llama", "q8_0"), ("llama", "q4_0"))
PREFILLS = ("full", "skip")
PROMPTS = 50
MASKS = ((1, 1, 1, 1), (1, 0, 1, 1), (0, 1, 1, 0))
SHORT, LONG = list(range(40, 52)), list(range(60, 84))
NEXT = [11, 12, 13]
TOLERANCE = {"f32": 1e-4, "q8_0": 5e-2, "q4_0": 5e-2}


def forced(path: Path, mask: tuple[int, ...], prefill: str) -> np.ndarray:
    """Logits [prompt + next, vocab] under a mask; in "full" it holds behind the prompt only."""
    from native_model import opened

    with opened(path, n_threads=1) as model:
        if prefill == "skip":
            model.set_mask(mask)
        rows = [model.feed(LONG)]
        if prefill == "full":
            model.set_mask(mask)
        rows += [model.feed([token], len(LONG) + i) for i, token in enumerate(NEXT)]
    return np.concatenate(rows)


def mixed(path: Path) -> np.ndarray:
    """Logits of one batch that holds a sequence under each mask."""
    from native_model import opened

    with opened(path, n_threads=1, n_seq=len(MASKS)) as model:
        for seq, mask in enumerate(MASKS):
            model.set_mask(mask, seq)
        return model.decode([(token, i, seq) for seq in range(len(MASKS)) for i, token in enumerate(SHORT)])


def prompt(seed: int) -> list[int]:
    """Random tokens, none of them special."""
    return np.random.default_rng(seed).integers(3, 250, 8 + seed).tolist()


def margin(llm: Any) -> float:
    """How much likelier the likeliest next token is than the second, as a difference of logits."""
    second, first = np.sort(llm.logits_of(llm.n_tokens - 1))[-2:]
    return float(first - second)


def same_tokens(found: np.ndarray, wanted: np.ndarray, tie: float) -> bool:
    """[prompt, step, (token, margin)]: equal up to the first choice between two that are closer than ``tie``."""
    for ours, theirs in zip(found, wanted, strict=True):
        for (token, _), (other, apart) in zip(ours, theirs, strict=True):
            if token != other:
                if apart >= tie:
                    return False
                break
    return True


def measure(folder: Path) -> dict[str, np.ndarray]:
    """Everything that both machines compute."""
    from pyfirst import FirstLlama, native

    found: dict[str, np.ndarray] = {}
    for arch, kind in MODELS:
        for prefill in PREFILLS:
            name, path = f"{arch} {kind} {prefill}", folder / f"{arch}-{kind}-{prefill}.gguf"
            for mask in MASKS:
                found[f"{name} logits {mask}"] = forced(path, mask, prefill)
            options = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
            llm = FirstLlama(path, **options)
            masks, scores, tokens = [], [], []
            for seed in range(PROMPTS):
                generated = llm.generate(prompt(seed), temp=0.0)
                tokens.append([(next(generated), margin(llm)) for _ in range(3)])
                assert llm.routing is not None and llm.routing.scores is not None
                masks.append(llm.routing.mask)
                scores.append(llm.routing.scores)
            found[f"{name} masks"], found[f"{name} tokens"] = np.array(masks), np.array(tokens)
            found[f"{name} scores"] = np.array(scores)
            state = llm.save_state()
            restored = FirstLlama(path, **options)
            restored.load_state(state)
            assert (native.get_mask(restored.ctx, 4) == masks[-1]).all()
            rows = []
            for one in (llm, restored):
                one.eval(NEXT)
                rows.append(np.array(one.logits_of(one.n_tokens - 1)))
            assert (rows[0] == rows[1]).all(), f"{name}: a restored state goes on differently"
            found[f"{name} restored"] = rows[1]
        found[f"{arch} {kind} mixed"] = mixed(path)
    return found


def expect(folder: Path) -> None:
    """Make the models and write what this machine, and torch, computes."""
    import tiny

    from first_convert.convert import convert
    from first_convert.quantize import quantize

    folder.mkdir(parents=True, exist_ok=True)
    gold = {}
    for arch, kind in MODELS:
        checkpoint = tiny.make(arch, folder / arch)
        base, net = tiny.gguf(checkpoint, folder / f"{arch}.gguf"), tiny.load(checkpoint)
        if kind != "f32":
            quantize(base, folder / f"{arch}-{kind}.gguf", kind, threads=1)
            base = folder / f"{arch}-{kind}.gguf"
        for prefill in PREFILLS:
            recipe = tiny.recipe(folder / f"{arch}-{prefill}", checkpoint, seed=3, prefill=prefill)
            out = folder / f"{arch}-{kind}-{prefill}.gguf"
            convert(None, base_gguf=base, first=recipe, outfile=out, force=True)
            if kind == "f32":
                for mask in MASKS:
                    gold[f"{arch} {kind} {prefill} logits {mask}"] = tiny.gold(net, mask, LONG, NEXT, prefill)
    np.savez(folder / "gold.npz", **gold)
    np.savez(folder / "expected.npz", **measure(folder))


def check(folder: Path) -> int:
    """Compare this machine with what expect() wrote; the number of differences."""
    found, failures = measure(folder), 0
    for reference in ("expected", "gold"):
        worst, equal, answers = dict.fromkeys(TOLERANCE, 0.0), 0, 0
        with np.load(folder / f"{reference}.npz") as wanted:
            for name, value in wanted.items():
                same = found[name].shape == value.shape
                kind = name.split()[1]
                if same and name.endswith("masks"):
                    same = bool((found[name] == value).all())
                elif same and name.endswith("tokens"):
                    equal += int((found[name][..., 0] == value[..., 0]).all(1).sum())
                    answers += len(value)
                    same = same_tokens(found[name], value, 0.0 if kind == "f32" else 2 * TOLERANCE[kind])
                elif same:
                    difference = float(np.abs(found[name] - value).max())
                    worst[kind], same = max(worst[kind], difference), difference < TOLERANCE[kind]
                if not same:
                    failures += 1
                    print(f"{reference}: {name} differs")
            differences = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items() if value)
            print(f"{reference}: {len(wanted)} arrays, largest differences of scores and logits: {differences}")
            if answers:
                print(f"{reference}: {equal} of {answers} answers equal, the others from a tie on")
    masks = [value for name, value in found.items() if name.endswith("masks")]
    kinds = len({mask.tobytes() for group in masks for mask in group})
    print(f"{sum(map(len, masks))} routed prompts with {kinds} different masks")
    return failures


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("expect", "check"):
        sys.exit("usage: arm.py expect|check FOLDER")
    sys.exit(min(1, {"expect": expect, "check": check}[sys.argv[1]](Path(sys.argv[2])) or 0))
