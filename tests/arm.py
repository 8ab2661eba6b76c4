"""The same models and prompts on two machines: `expect FOLDER` here, `check FOLDER` on the other (make test-arm).

expect needs torch and makes the models; check needs numpy and pyfirst only. Masks, greedy tokens and what a state
restores must be equal, scores and logits (float32, float32 KV) within 1e-4, also of torch's for the forced masks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ARCHITECTURES = ("llama", "qwen3")
PREFILLS = ("full", "skip")
PROMPTS = 50
MASKS = ((1, 1, 1, 1), (1, 0, 1, 1), (0, 1, 1, 0))
SHORT, LONG = list(range(40, 52)), list(range(60, 84))
NEXT = [11, 12, 13]
TOLERANCE = 1e-4


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


def measure(folder: Path) -> dict[str, np.ndarray]:
    """Everything that both machines compute."""
    from pyfirst import FirstLlama, native

    found: dict[str, np.ndarray] = {}
    for arch in ARCHITECTURES:
        for prefill in PREFILLS:
            name, path = f"{arch} {prefill}", folder / f"{arch}-{prefill}.gguf"
            for mask in MASKS:
                found[f"{name} logits {mask}"] = forced(path, mask, prefill)
            options = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
            llm = FirstLlama(path, **options)
            masks, scores, tokens = [], [], []
            for seed in range(PROMPTS):
                generated = llm.generate(prompt(seed), temp=0.0)
                tokens.append([next(generated) for _ in range(3)])
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
        found[f"{arch} mixed"] = mixed(folder / f"{arch}-skip.gguf")
    return found


def expect(folder: Path) -> None:
    """Make the models and write what this machine, and torch, computes."""
    import tiny

    from first_convert.convert import convert

    folder.mkdir(parents=True, exist_ok=True)
    gold = {}
    for arch in ARCHITECTURES:
        checkpoint = tiny.make(arch, folder / arch)
        base, net = tiny.gguf(checkpoint, folder / f"{arch}.gguf"), tiny.load(checkpoint)
        for prefill in PREFILLS:
            recipe = tiny.recipe(folder / f"{arch}-{prefill}", checkpoint, seed=3, prefill=prefill)
            convert(None, base_gguf=base, first=recipe, outfile=folder / f"{arch}-{prefill}.gguf", force=True)
            for mask in MASKS:
                gold[f"{arch} {prefill} logits {mask}"] = tiny.gold(net, mask, LONG, NEXT, prefill)
    np.savez(folder / "gold.npz", **gold)
    np.savez(folder / "expected.npz", **measure(folder))


def check(folder: Path) -> int:
    """Compare this machine with what expect() wrote; the number of differences."""
    found, failures = measure(folder), 0
    for reference in ("expected", "gold"):
        worst = 0.0
        with np.load(folder / f"{reference}.npz") as wanted:
            for name, value in wanted.items():
                same = found[name].shape == value.shape
                if same and name.endswith(("masks", "tokens")):
                    same = bool((found[name] == value).all())
                elif same:
                    difference = float(np.abs(found[name] - value).max())
                    worst, same = max(worst, difference), difference < TOLERANCE
                if not same:
                    failures += 1
                    print(f"{reference}: {name} differs")
            print(f"{reference}: {len(wanted)} arrays, largest difference of scores and logits {worst:.1e}")
    masks = [value for name, value in found.items() if name.endswith("masks")]
    kinds = len({mask.tobytes() for group in masks for mask in group})
    print(f"{sum(map(len, masks))} routed prompts with {kinds} different masks")
    return failures


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("expect", "check"):
        sys.exit("usage: arm.py expect|check FOLDER")
    sys.exit(min(1, {"expect": expect, "check": check}[sys.argv[1]](Path(sys.argv[2])) or 0))
