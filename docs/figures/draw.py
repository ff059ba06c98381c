"""Draw the README's picture from the measured figures: `python docs/figures/draw.py` (needs the extra dqrm[docs]).

Reads results.json, which says for every panel the settings, the machine and the command, and writes results.svg beside
it. The same figures give the same bytes.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
GRAY, BLUE, LIGHT = "#8a929c", "#3f51b5", "#c9ced6"
STYLE = {
    "svg.hashsalt": "dqrm",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(figures: dict, output: Path) -> None:
    """Three panels: test AUC, size, and the time of one table."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(9.6, 3.0), width_ratios=(1, 1, 1.3), layout="constrained"
        )
        figure.patch.set_facecolor("white")
        figure.get_layout_engine().set(w_pad=0.12)

        quality = figures["quality"]["rows"]
        for at, row in enumerate(quality):
            color = _color(row["name"])
            left.errorbar(at, row["mean"], yerr=row["std"], fmt="o", color=color, capsize=4, markersize=6)
            top = (at, row["mean"] + row["std"])
            label = f"{row['mean']:.4f}\n± {row['std']:.4f}"
            left.annotate(label, top, (0, 6), textcoords="offset points", ha="center", fontsize=8)
        left.set_xticks(range(len(quality)), [row["name"] for row in quality])
        left.set_xlim(-0.6, len(quality) - 0.4)
        middle_of_all = sum(row["mean"] for row in quality) / len(quality)
        left.set_ylim(middle_of_all - 0.004, middle_of_all + 0.004)

        size = figures["size"]["rows"]
        bars = middle.bar([row["name"] for row in size], [row["value"] for row in size], width=0.55)
        for bar, row in zip(bars, size, strict=True):
            bar.set_color(_color(row["name"]))
        middle.bar_label(bars, [f"{row['value']:g}" for row in size], padding=2)
        middle.set_yticks([])
        middle.spines["left"].set_visible(False)
        middle.margins(y=0.15)

        table = figures["table"]["rows"][::-1]
        bars = right.barh([row["name"] for row in table], [row["value"] for row in table], height=0.6)
        for bar, row in zip(bars, table, strict=True):
            bar.set_color(_color(row["name"]))
        right.bar_label(bars, [f"{row['value']:.3g}" for row in table], padding=3)
        right.set_xscale("log")
        right.set_xlim(0.05, 2000)
        right.set_xticks([])
        right.minorticks_off()
        right.spines["bottom"].set_visible(False)

        for axes, name in ((left, "quality"), (middle, "size")):
            axes.set_title(figures[name]["title"], fontsize=10, loc="left")
        right.set_title(f"{figures['table']['title']} (log)", fontsize=10, loc="right")
        note = (
            "Left and middle: MovieLens-1M with six crosses, seeds 1 to 3, mean and standard deviation.\n"
            f"Right: {figures['table']['settings']}; {figures['table']['machine']}."
        )
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="#555555")
        figure.savefig(output, format="svg", metadata={"Date": None})
        plt.close(figure)


def _color(name: str) -> str:
    return BLUE if name == "INT4" or "dqrm" in name else GRAY if "FP32" in name else LIGHT


if __name__ == "__main__":
    draw(json.loads((FOLDER / "results.json").read_text()), FOLDER / "results.svg")
