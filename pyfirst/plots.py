"""Pictures of what was measured, with matplotlib (``pip install 'pyfirst[plot]'``)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from pyfirst.errors import InputError

FORMATS = (".png", ".svg", ".pdf")


def check(path: str | os.PathLike[str]) -> None:
    """Raise InputError where a picture cannot be drawn to ``path``, before anything is measured."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"--plot {path}: expected a name that ends with one of {', '.join(FORMATS)}")
    if not Path(path).parent.is_dir():
        raise InputError(f"--plot {path}: no folder {Path(path).parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs the package 'matplotlib': pip install 'pyfirst[plot]'")


def _figure(width: float, height: float) -> Any:
    """A figure that needs no display and no pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


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
    figure.savefig(path, dpi=120)
