"""Pictures of what was measured, with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from pyfirst.errors import InputError

FORMATS = (".png", ".svg", ".pdf")
_FEW_TASKS = 8


def check(path: str | os.PathLike[str]) -> None:
    """Raise InputError where a picture cannot be drawn to ``path``, before anything is measured."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"--plot {path}: expected a name that ends with one of {', '.join(FORMATS)}")
    if Path(path).is_dir():
        raise InputError(f"--plot {path}: a folder, expected a file")
    if not Path(path).parent.is_dir():
        raise InputError(f"--plot {path}: no folder {Path(path).parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs the package 'matplotlib': pip install '.[plot]' in a clone of pyfirst")


def _figure(width: float, height: float) -> Any:
    """A figure that needs no display and no pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Write the picture under another name first, so that a full disk leaves the old one."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        figure.savefig(part, dpi=120)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def bench(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw speedup over the share of layers skipped, measured and ideal, from what first-bench returns."""
    figure = _figure(9, 4)
    lengths = result["settings"]["prompt_lengths"]
    for panel, phase in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        for number, length in enumerate(lengths):
            rows = [run for run in result["runs"] if (run["phase"], run["prompt"]) == (phase, length)]
            colour = f"C{number}"
            forced = [run for run in rows if run["mode"] == "forced"]
            shares = [100 * run["skipped"] for run in forced]
            panel.plot(shares, [run["ideal"] for run in forced], "--", color=colour, linewidth=1)
            panel.plot(shares, [run["speedup"] for run in forced], "o-", color=colour, label=f"prompt {length}")
            for mode, marker in (("pruned", "x"), ("routed", "*")):
                own = [run for run in rows if run["mode"] == mode]
                panel.plot(
                    [100 * r["skipped"] for r in own], [r["speedup"] for r in own], marker, color=colour, markersize=9
                )
        panel.set(title=phase, xlabel="layers skipped (%)")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left")
    figure.axes[0].set_ylabel("speedup over dense")
    machine, model = result["machine"], result["model"]
    figure.suptitle(
        f"{Path(model['path']).name}, {machine['cpu']}, {machine['threads']} thread(s)\n"
        "points measured, dashed ideal, x pruned file, * routed",
        fontsize=9,
    )
    _save(figure, Path(path))


def masks(seen: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw what pyfirst.masks.observe() returns: scores of layers x prompts, keep rates, and kept shares.

    Red is below the threshold, blue reaches it, with a step of colour between them; grey is kept all the same.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, TwoSlopeNorm

    rows, threshold, n_layer = seen["prompts"], seen["threshold"], seen["layers"]
    values, keep = (np.array([row[name] for row in rows]).T for name in ("scores", "mask"))
    scores = np.ma.masked_array(values, keep & (values < threshold))  # protected layers
    tasks = [row["task"] for row in rows]
    names = list(dict.fromkeys(tasks))
    more = max(len(names) - _FEW_TASKS, 0)  # their names then stand upright, and the key is taller
    figure = _figure(11 + 0.2 * more, 3.5 + 0.16 * n_layer + 0.2 * more)
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(4, 1 + 0.2 * more))
    heat = figure.add_subplot(grid[0, 0])
    low, high = colormaps["Reds_r"](np.linspace(0.1, 0.7, 128)), colormaps["Blues"](np.linspace(0.35, 1, 128))
    lowest, highest = (
        values.min(where=values < threshold, initial=threshold - 0.01),
        max(values.max(), threshold + 0.01),
    )
    norm = TwoSlopeNorm(threshold, lowest, highest)
    colours = ListedColormap(np.concatenate([low, high])).with_extremes(bad="0.8")
    image = heat.imshow(scores, aspect="auto", interpolation="nearest", origin="lower", cmap=colours, norm=norm)
    bar = figure.colorbar(image, ax=heat, location="left", fraction=0.03, ticks=[norm.vmin, threshold, norm.vmax])
    bar.ax.set_yticklabels([f"{norm.vmin:.2f}", f"threshold {threshold:.3g}", f"{norm.vmax:.2f}"])
    edges = [i for i in range(1, len(tasks)) if tasks[i] != tasks[i - 1]]
    for edge in edges:
        heat.axvline(edge - 0.5, color="white", linewidth=3)
    starts = [0, *edges]
    heat.set_xticks([(a + b - 1) / 2 for a, b in zip(starts, [*edges, len(tasks)], strict=True)])
    heat.set_xticklabels(
        [f"{tasks[a]} ({tasks.count(tasks[a])})" for a in starts], rotation="vertical" if more else "horizontal"
    )
    heat.set(
        ylabel="layer", title=f"mean router score of each prompt (prompts: {len(rows)}, masks: {seen['distinct']})"
    )
    heat.yaxis.get_major_locator().set_params(integer=True)

    rates = figure.add_subplot(grid[0, 1], sharey=heat)
    kept = figure.add_subplot(grid[1, 0])
    rates.barh(range(n_layer), [100 * rate for rate in seen["keep_rate"]], color="0.85", label="all")
    for name in names:
        rates.plot([100 * r for r in seen["task_keep_rate"][name]], range(n_layer), "o-", ms=3, lw=1, label=name)
    rates.set(xlabel="kept (% of prompts)", title="keep rate")
    key = figure.add_subplot(grid[1, 1])  # beside the rates it would hide some
    key.axis("off")
    key.legend(*rates.get_legend_handles_labels(), loc="upper left", fontsize=7)
    counts = [[sum(row["mask"]) for row in rows if row["task"] == name] for name in names]
    kept.hist(counts, bins=np.arange(-0.5, n_layer + 1), stacked=True, color=[f"C{i}" for i in range(len(names))])
    kept.set(xlabel=f"layers kept of {n_layer}", ylabel="prompts")
    kept.yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(Path(seen["model"]).name)
    _save(figure, Path(path))
