"""Pictures of the study. Matplotlib is imported when one is drawn."""

import numpy as np

from .run import EVERY


COLORS = {
    "SGD, momentum": "#9a9a9a",
    "Adam": "#d1702c",
    "Muon": "#3f9a63",
    "Muon, constant rate": "#b8dcc4",
    "Sophia": "#c9a227",
    "K-FAC, fixed rate": "#a05195",
    "kfac-jax": "#d6a3cc",
    "published diagonal": "#555555",
    "model step of Muon": "#8fb3e0",
    "model step of Muon, every 5": "#5b8fd6",
    "recommended": "#1f4e9e",
}


def middle(result: dict):
    """The run whose final loss is the median of three."""
    runs = sorted(result["runs"], key=lambda run: run.final)
    return runs[len(runs) // 2]


def curves(task: str, results: dict):
    """The training loss over steps and over seconds of the processor."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    for name, result in results.items():
        run = middle(result)
        if not np.isfinite(run.final):
            continue
        ours = name in (
            "recommended",
            "model step of Muon",
            "model step of Muon, every 5",
        )
        style = dict(color=COLORS.get(name), linewidth=2.2 if ours else 1.3, label=name)
        left.plot(EVERY * np.arange(len(run.losses)), run.losses, **style)
        right.plot(run.seconds, run.losses, **style)
    left.set(yscale="log", xlabel="steps", ylabel="training loss", title=task)
    right.set(xlabel="processor seconds")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside right upper", frameon=False
    )
    return figure


def bars(rows: list[dict]):
    """Scores of structures, on the own batch, on others, and of 16 batches."""
    from matplotlib import pyplot

    whens = list(dict.fromkeys(row["when"] for row in rows))
    columns = {
        "own batch": "#8fb3e0",
        "other batches": "#d1702c",
        "16 batches, full set": "#1f4e9e",
    }
    figure, axes = pyplot.subplots(
        1, len(whens), figsize=(11, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    for ax, when in zip(axes, whens):
        here = [row for row in rows if row["when"] == when]
        names = [row["structure"] for row in here]
        for i, (column, color) in enumerate(columns.items()):
            places = np.arange(len(here)) + 0.26 * (i - 1)
            values = np.clip([row[column] for row in here], -1, 1)
            ax.barh(places, values, 0.24, color=color, label=column)
        ax.set_yticks(range(len(names)), names)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set(
            title=when,
            xlim=(-1.02, 1.02),
            xlabel="share of the best decrease; below -1 cut off",
        )
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    return figure
