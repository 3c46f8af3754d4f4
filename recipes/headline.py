"""The headline of README: every policy of the recipes on one scale, from recipes/results/*.csv, which `gridworld.py score` has written, a file a seed.

    python recipes/headline.py         rewrites the table in README.md between its two marks, and recipes/results/headline.png

After recipes of your own, copy runs/NAME.csv to recipes/results/NAME.csv (runs/seed-1/NAME.csv to NAME-seed1.csv), and see what differs.
"""

import csv
import math
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARKS = "<!-- headline: written by recipes/headline.py -->", "<!-- end of headline -->"
POLICIES = [  # file of results, row of it, what to call it
    ("instructgpt", "exact optimum", "exact optimum"),
    ("instructgpt", "best safe walk", "best safe walk"),
    ("instructgpt", "random policy", "random policy"),
    ("instructgpt", "sft", "sft"),
    ("instructgpt", "ppo", "ppo"),
    ("instructgpt", "ppo-ptx", "ppo-ptx"),
    ("dpo", "dpo", "dpo"),
    ("dpo", "dpo-plain", "dpo without the likelihood term"),
    ("nemotron", "rpo-1", "rpo, one round after dpo"),
    ("nemotron", "rpo-3", "rpo, three rounds"),
    ("zephyr", "orpo", "orpo, from the base"),
    ("zephyr", "chosen", "fine-tuning on the chosen answers, from the base"),
    ("o1", "o1", "grpo on answers with thinking"),
]
COLUMNS = dict(greedy="greedy", valid="valid", honest="honest", safe="safe", refused="right refusals", wrongly="wrong ones", diverse="diversity")
COLUMNS |= dict(thinking="with thinking", judge="judge", tax="tax", seconds="seconds", MB="MB")


def results(name: str) -> list:
    """One dict for each seed of a recipe: row name -> {column: number}."""
    files = [HERE / "results" / f"{name}.csv", *sorted((HERE / "results").glob(f"{name}-seed*.csv"))]
    seeds = []
    for file in files:
        with file.open() as f:
            rows = {row.pop("checkpoint").rstrip("/").split("/")[-1]: row for row in csv.DictReader(f)}
        seeds.append({key: {column: float(value) for column, value in row.items()} for key, row in rows.items()})
    return seeds


def mean(values: list) -> float:
    return sum(values) / len(values)


def shown(column: str, value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}" if column in ("seconds", "MB") else f"{value:.2f}"


def table() -> str:
    """The table as Markdown: means over the seeds, and of the score the range."""
    lines = ["| policy | score | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (2 + len(COLUMNS)) + "|"]
    for name, row, label in POLICIES:
        seeds = [seed[row] for seed in results(name)]
        scores = [seed["score"] for seed in seeds]
        spread = f" ({min(scores):.2f} to {max(scores):.2f})" if max(scores) > min(scores) else ""
        cells = [shown(column, mean([seed[column] for seed in seeds])) for column in COLUMNS]
        lines.append(f"| {label} | {mean(scores):.2f}{spread} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path):
    """The table as a picture: a bar for each policy and measure, with the range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = dict(score="score", honest="honest", safe="safe", refused="right refusals", diverse="diversity", tax="tax (nats a token)")
    figure, axes = plt.subplots(1, len(measures), figsize=(3 * len(measures), 0.3 * len(POLICIES) + 1), sharey=True, layout="constrained")
    for axis, (column, title) in zip(axes, measures.items()):
        for at, (name, row, _) in enumerate(POLICIES):
            values = [seed[row][column] for seed in results(name) if not math.isnan(seed[row][column])]
            if values:
                spread = [[max(0.0, mean(values) - min(values))], [max(0.0, max(values) - mean(values))]]  # rounding
                axis.barh(at, mean(values), xerr=spread, color="tab:gray" if at < 3 else "tab:blue", capsize=2)
        axis.set(title=title)
    axes[0].set_yticks(range(len(POLICIES)), [label for *_, label in POLICIES])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}")
    draw(HERE / "results" / "headline.png")


if __name__ == "__main__":
    main()
