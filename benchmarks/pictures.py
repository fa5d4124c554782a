"""Pictures of the results. Matplotlib is imported when one is drawn."""

import pathlib

import numpy


OURS, PLAIN = "diffprog", "diffprog, plain loops"
COLORS = {
    OURS: "#1f4e9e",
    PLAIN: "#8fb3e0",
    "Crocoddyl FDDP, C++": "#d1702c",
    "Crocoddyl FDDP, Python model": "#d1702c",
    "Fatrop": "#b8dcc4",
    "Fatrop, expanded": "#3f9a63",
    "Ipopt, expanded": "#9a9a9a",
}


def names(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def label(solver: str) -> str:
    """Our methods under one name: the better one is drawn."""
    if not solver.startswith("diffprog"):
        return solver
    return PLAIN if solver.endswith("plain loops") else OURS


def tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def single(rows: list[dict]):
    """Bars of the times of every solver that converged, problem by problem."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    good = [row | {"label": label(row["solver"])} for row in rows if row["converged"]]
    problems, labels = names(good, "problem"), names(good, "label")
    width = 0.8 / len(labels)
    for i, one in enumerate(labels):
        times = {}
        for row in (row for row in good if row["label"] == one):
            found = times.get(row["problem"], row["ms"])
            times[row["problem"]] = min(found, row["ms"])
        middle = width * (i - (len(labels) - 1) / 2)
        places = [problems.index(name) + middle for name in times]
        axes.bar(places, times.values(), 0.92 * width, label=one, color=COLORS[one])
    axes.set(yscale="log", ylabel="ms per solve", xticks=range(len(problems)))
    tilted = dict(rotation=25, ha="right", rotation_mode="anchor")
    axes.set_xticklabels(problems, **(tilted if len(problems) > 8 else {}))
    axes.set_ylim(bottom=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    tidy(axes)
    return figure


def batch(rows: list[dict]):
    """Solves per second and core against the size of the batch."""
    from matplotlib import pyplot

    problems = names(rows, "problem")
    figure, every = pyplot.subplots(
        ncols=len(problems), sharey=True, squeeze=False, figsize=(9, 3.4),
        layout="constrained",
    )  # fmt: skip
    for axes, problem in zip(every[0], problems):
        mine = [row for row in rows if row["problem"] == problem]
        for solver in names(mine, "solver"):
            line = [row for row in mine if row["solver"] == solver]
            sizes = [row["batch"] for row in line]
            rates = [row["solves / s / core"] for row in line]
            one = label(solver)
            axes.plot(sizes, rates, "o-", label=one, color=COLORS[one])
        ticks = names(mine, "batch")
        axes.set(title=problem, xscale="log", yscale="log", xlabel="batch")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(pyplot.NullLocator())
        tidy(axes)
    first = every[0][0]
    first.set_ylabel("solves per second and core")
    first.set_ylim(bottom=10)
    first.yaxis.set_major_formatter("{x:g}")
    first.legend(frameon=False, fontsize="small", loc="lower left")
    return figure


def scaling(rows: list[dict]):
    """Times against the horizon, with the straight lines that fit them."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    colors = (COLORS[OURS], COLORS["Crocoddyl FDDP, C++"])
    for what, color in zip(names(rows, "what"), colors):
        line = [row for row in rows if row["what"] == what]
        horizons = [row["T"] for row in line]
        every = numpy.geomspace(horizons[0], horizons[-1])
        fit = numpy.interp(every, horizons, [row["line ms"] for row in line])
        axes.plot(every, fit, color=color, alpha=0.5)
        axes.plot(horizons, [row["ms"] for row in line], "o", color=color, label=what)
    axes.set(xscale="log", yscale="log", xlabel="T", ylabel="ms")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    tidy(axes)
    return figure


DRAW = {"single": single, "large": single, "batch": batch, "scaling": scaling}


def save(name: str, rows: list[dict], path: pathlib.Path):
    import matplotlib

    matplotlib.use("Agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    DRAW[name](rows).savefig(path, dpi=110)
