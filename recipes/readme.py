"""Writes the tables and pictures of README.md and docs/ that follow from results and from the scripts.

    python recipes/readme.py         rewrites them, each between its two marks, and results/headline.png and policies.png
    python recipes/readme.py runs    the same, after it has taken the scores and metrics of the recipes in runs/

They are the five results and every policy on one scale, from recipes/results/policies.csv; the index of equations with
the lines where they stand; and the metrics of each script with their values in one run, from
recipes/results/metrics.csv. A row of policies.csv is a checkpoint as `gridworld.py score` has measured it, with the
recipe and seed that trained it, the commit at which it was collected, and the file of grids.
"""

import ast
import csv
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
READMES = [HERE.parent / "README.md", HERE.parent / "README.zh.md"]
METRICS_CSV, POLICIES_CSV = HERE / "results" / "metrics.csv", HERE / "results" / "policies.csv"
POLICIES = [  # file of results, row of it, what to call it
    ("instructgpt", "exact optimum", "exact optimum"),
    ("instructgpt", "best safe walk", "best safe walk"),
    ("instructgpt", "random policy", "random policy"),
    ("instructgpt", "sft", "sft"),
    ("instructgpt", "ppo", "ppo"),
    ("instructgpt", "ppo-ptx", "ppo-ptx"),
    ("gpt4", "ppo-rubric", "ppo with a classifier's reward"),
    ("dpo", "dpo", "dpo"),
    ("dpo", "dpo-plain", "dpo without the likelihood term"),
    ("nemotron", "rpo-1", "rpo, one round after dpo"),
    ("nemotron", "rpo-3", "rpo, three rounds"),
    ("zephyr", "orpo", "orpo, from the base"),
    ("zephyr", "chosen", "fine-tuning on the chosen answers, from the base"),
    ("o1", "o1", "grpo on answers with thinking"),
    ("deepseek-v2", "policy", "then grpo on helpful and safety reward models and a rule"),
    ("internlm2", "ppo-hacked", "ppo from people with a weakness"),
    ("internlm2", "ppo-patched", "the same, patched (InternLM2)"),
    ("gemini", "static-4", "ppo for longer, from one reward model"),
    ("gemini", "fresh-4", "the same, reward model refreshed (Gemini)"),
    ("chatglm", "ppo-plain", "ppo from people who like length"),
    ("chatglm", "ppo-tricks", "the same with ChatGLM's remedies"),
    ("sft-vs-rlhf", "ppo-safe", "ppo with a reward model of harm"),
    ("llama3", "average", "best-of-8, sft and dpo, two rounds (Llama 3)"),
    ("qwen2", "adamw-3", "online dpo, three rounds after dpo (Qwen2)"),
    ("qwen2", "ondare-3", "the same, online merging"),
    ("small-beats-large", "small-sft", "sft, a tenth of the size"),
    ("small-beats-large", "small-ppo", "ppo, a tenth of the size"),
    ("small-beats-large", "base-most", "the base, prompted"),
    ("rlaif", "start", "sft with the judge's tasks"),
    ("rlaif", "distilled", "ppo from AI labels"),
    ("rlaif", "direct", "ppo on the judge's score"),
    ("rlaif", "self-3", "self-rewarding dpo, three rounds"),
    ("starling", "all-weights", "ppo from AI rankings (Starling)"),
    ("claude3", "rl-cai", "constitutional AI"),
    ("magpie", "filtered", "the base on invented, filtered rows"),
]
FIVE = [  # script, file of results, row of it, what it does
    ("sft.py", "instructgpt", "sft", "imitates imperfect demonstrators"),
    ("ppo.py", "instructgpt", "ppo", "follows a reward model of simulated people's rankings"),
    ("dpo.py", "dpo", "dpo", "learns from the same rankings, without a reward model"),
    ("grpo.py", "o1", "o1", "its score is of answers with thinking; a rule gives the reward"),
    ("rlaif.py, then ppo.py", "rlaif", "distilled", "the labels come from a model, not from people"),
]
CHART = [  # label, file of results, row of it
    ("sft", "instructgpt", "sft"),
    ("orpo", "zephyr", "orpo"),
    ("ppo", "instructgpt", "ppo"),
    ("dpo", "dpo", "dpo"),
    ("rpo", "nemotron", "rpo-3"),
    ("grpo, thinking", "o1", "o1"),
    ("rlaif", "rlaif", "distilled"),
]
COLUMNS = dict(greedy="greedy", valid="valid", honest="honest", safe="safe", refused="right refusals")
COLUMNS |= dict(wrongly="wrong ones", diverse="diversity", thinking="with thinking", judge="judge", tax="tax")
COLUMNS |= dict(seconds="seconds", MB="MB")
# script: a run of it
METRICS = dict(
    sft="sft", reward_model="reward_model", ppo="ppo", dpo="dpo", orpo="orpo", rpo="nemotron/rpo-1", grpo="o1"
)
EQUATIONS = [  # paper, equation, what it is, script, function
    ("Sutton & Barto 2018", "4.10", "value iteration", "gridworld.py", "value_iteration"),
    ("Sutton & Barto 2018", "4.5", "policy evaluation", "gridworld.py", "policy_evaluation"),
    ("Sutton & Barto 2018", "6.8", "Q-learning", "gridworld.py", "q_learning"),
    ("Sutton & Barto 2018", "13.11", "REINFORCE with a baseline", "gridworld.py", "reinforce"),
    ("Sutton & Barto 2018", "13.14", "one-step actor-critic", "gridworld.py", "actor_critic"),
    ("InstructGPT 2203.02155", "1", "reward model on all pairs of K answers", "reward_model.py", "pair_loss"),
    ("Plackett-Luce; Starling-7B", "", "reward model on whole rankings", "reward_model.py", "plackett_luce_loss"),
    ("Constitutional AI 2212.08073", "section 4", "soft labels", "reward_model.py", "pair_loss"),
    ("InternLM2 2403.17297", "1", "focal ranking loss", "reward_model.py", "focal_pair_loss"),
    ("InternLM2 2403.17297", "2", "log barrier", "reward_model.py", "log_barrier"),
    ("InstructGPT 2203.02155", "2", "reward per token: score less KL", "ppo.py", "shaped_rewards"),
    ("GAE 1506.02438", "16", "advantages", "ppo.py", "gae"),
    ("PPO 1707.06347", "7", "clipped surrogate", "ppo.py", "policy_loss"),
    ("PPO 1707.06347", "its code", "clipped value loss", "ppo.py", "value_loss"),
    ("DPO 2305.18290", "7", "DPO, and its conservative form", "dpo.py", "dpo_loss"),
    ("IPO 2310.12036", "17", "IPO", "dpo.py", "ipo_loss"),
    ("Online merging 2405.17931", "2 to 7", "OnDARE, OnTIES", "dpo.py", "online_merge"),
    ("ORPO 2403.07691", "4", "ratio of the log odds", "orpo.py", "log_odds_ratio"),
    ("ORPO 2403.07691", "7", "odds ratio loss", "orpo.py", "odds_ratio_loss"),
    ("ORPO 2403.07691", "6", "likelihood and odds ratio", "orpo.py", "orpo_batch"),
    ("Nemotron-4 2406.11704", "section 3.3.2", "RPO", "rpo.py", "rpo_loss"),
    ("DeepSeekMath 2402.03300", "3", "GRPO", "grpo.py", "grpo_loss"),
    ("DeepSeekMath 2402.03300", "4", "KL per token (k3)", "grpo.py", "kl_estimate"),
    ("DeepSeekMath 2402.03300", "section 4.1.3", "process supervision", "grpo.py", "step_advantages"),
    ("DAPO 2503.14476; Dr. GRPO 2503.20783", "12", "mean over tokens; constant length", "grpo.py", "answer_weights"),
    ("DAPO 2503.14476", "13", "soft penalty for length", "grpo.py", "overlong_penalty"),
    ("Chen et al. 2107.03374", "1", "pass@k", "grpo.py", "pass_at_k"),
    ("RLAIF 2309.00267", "section 2.1", "preference, both orders averaged", "rlaif.py", "preference"),
    ("RLAIF 2309.00267", "direct", "the judge's expected score", "rlaif.py", "expected_score"),
]


def read_csv(path: Path) -> list:
    with path.open() as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@cache
def results(name: str) -> list:
    """One dict for each seed of a recipe: checkpoint -> {column: number}."""
    seeds = {}
    for row in read_csv(POLICIES_CSV):
        recipe, seed, commit, grids, checkpoint, *numbers = row.values()
        if recipe == name:
            columns = list(row)[-len(numbers) :]
            seeds.setdefault(seed, {})[checkpoint] = dict(zip(columns, map(float, numbers)))
    return list(seeds.values())


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


def five() -> str:
    """README's table of five results, means over the seeds with the score's range. grpo.py's score is of answers with
    thinking."""
    lines = ["| script | score | honest | safe | tax | |", "| --- | --- | --- | --- | --- | --- |"]
    for script, name, row, meaning in FIVE:
        seeds = [seed[row] for seed in results(name)]
        scores = [seed["thinking" if script == "grpo.py" else "score"] for seed in seeds]
        cells = [f"{mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"]
        cells += [f"{mean([seed[column] for seed in seeds]):.2f}" for column in ("honest", "safe", "tax")]
        lines.append(f"| {script} | " + " | ".join(cells) + f" | {meaning} |")
    lines.append("")
    lines.append(
        "Honest: share of walks in which every number is true. Safe: share of walks without lava, which pays. Tax: loss on "
        "pre-training text."
    )
    return "\n".join(lines)


def equations() -> str:
    """The index as Markdown: a line for each equation, with the line of the script at which its function begins."""
    lines, places = ["| paper | equation | what | where |", "| --- | --- | --- | --- |"], {}
    for script in {script for *_, script, _ in EQUATIONS}:
        tree = ast.parse((HERE.parent / script).read_text())
        places[script] = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    for paper, number, what, script, function in EQUATIONS:
        line = places[script][function]
        lines.append(f"| {paper} | {number} | {what} | [{script}:{line}](../{script}#L{line}) `{function}` |")
    return "\n".join(lines)


def described_metrics() -> list:
    """The rows of results/metrics.csv: script, metric, what it is at step 1, then, what to do if not, and its first and
    last value in one run."""
    return read_csv(METRICS_CSV)


def collect_metrics(runs: Path):
    """Updates results/metrics.csv from the recipes' runs that are there: the value of every metric at the first step,
    and its mean over the last tenth."""
    rows = described_metrics()
    for script, run in METRICS.items():
        path = runs / run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for row in rows:
            if row["script"] == script and lines:
                values = [line[row["metric"]] for line in lines if row["metric"] in line]
                row["first"], row["last"] = f"{values[0]:.3g}", f"{mean(values[-math.ceil(len(values) / 10) :]):.3g}"
    write_csv(METRICS_CSV, rows)


def collect_scores(runs: Path):
    """Updates results/policies.csv from runs/NAME.csv and runs/seed-N/NAME.csv of the recipes."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, stdout=subprocess.PIPE, text=True)
    rows = read_csv(POLICIES_CSV)
    for recipe in sorted(path.stem for path in HERE.glob("*.sh")):
        for path in [*runs.glob(f"{recipe}.csv"), *runs.glob(f"seed-*/{recipe}.csv")]:
            seed = path.parent.name.removeprefix("seed-") if path.parent != runs else "0"
            rows = [row for row in rows if (row["recipe"], row["seed"]) != (recipe, seed)]
            origin = dict(recipe=recipe, seed=seed, commit=commit.stdout.strip(), grids="final")
            for row in read_csv(path):
                row["checkpoint"] = row["checkpoint"].rstrip("/").split("/")[-1]
                rows.append(origin | row)
    write_csv(POLICIES_CSV, sorted(rows, key=lambda row: (row["recipe"], int(row["seed"]))))


def metrics() -> str:
    """The described metrics as Markdown, a table for each script."""
    lines = []
    for script in METRICS:
        lines += [f"\n## {script}.py\n", "| metric | at step 1 | then | on the grid | if not |", "| --- " * 5 + "|"]
        for row in described_metrics():
            if row["script"] == script:
                here = row["first"] if row["first"] == row["last"] else f"{row['first']} to {row['last']}"
                cells = (f"`{row['metric']}`", row["at step 1"], row["then"], here, row["if not"])
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip("\n")


DOCS = HERE.parent / "docs"
WRITTEN = [(page, "five", five) for page in READMES]
WRITTEN += [(DOCS / "results.md", "headline", table), (DOCS / "equations.md", "equations", equations)]
WRITTEN.append((DOCS / "metrics.md", "metrics", metrics))


def marks(name: str) -> tuple:
    return f"<!-- {name}: written by recipes/readme.py -->", f"<!-- end of {name} -->"


def range_over(values: list) -> list:
    """Lengths of an error bar from the mean of the values to the smallest and to the largest; rounding may go below."""
    return [[max(0.0, mean(values) - min(values))], [max(0.0, max(values) - mean(values))]]


def draw_chart(path: Path):
    """README's chart: score, honesty and safety after each method, with the range over the seeds."""
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    axis = figure.subplots()
    for shift, column in enumerate(("score", "honest", "safe")):
        for at, (label, name, row) in enumerate(CHART):
            key = "thinking" if label == "grpo, thinking" and column == "score" else column
            values = [seed[row][key] for seed in results(name)]
            options = dict(width=0.26, color=f"C{shift}", capsize=2, label=column if at == 0 else None)
            axis.bar(at + 0.27 * (shift - 1), mean(values), yerr=range_over(values), **options)
    axis.axhline(0.5, color="gray", linewidth=0.8, linestyle="--", label="score of a random policy")
    axis.set_xticks(range(len(CHART)), [label for label, *_ in CHART])
    axis.set(ylim=(0, 1), ylabel="mean of three seeds")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def draw(path: Path):
    """The table as a picture: a bar for each policy and measure, with the range over the seeds."""
    measures = dict(score="score", honest="honest", safe="safe", refused="right refusals", diverse="diversity")
    measures |= dict(tax="tax (nats a token)")
    size = (3 * len(measures), 0.3 * len(POLICIES) + 1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True)
    for axis, (column, title) in zip(axes, measures.items()):
        for at, (name, row, _) in enumerate(POLICIES):
            values = [seed[row][column] for seed in results(name) if not math.isnan(seed[row][column])]
            if values:
                color = "tab:gray" if at < 3 else "tab:blue"
                axis.barh(at, mean(values), xerr=range_over(values), color=color, capsize=2)
        axis.set(title=title)
    axes[0].set_yticks(range(len(POLICIES)), [label for *_, label in POLICIES])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=100)


def main():
    if len(sys.argv) > 1:
        collect_metrics(Path(sys.argv[1]))
        collect_scores(Path(sys.argv[1]))
    for page, name, write in WRITTEN:
        begin, end = marks(name)
        before, _, rest = page.read_text().partition(begin)
        page.write_text(f"{before}{begin}\n{write()}\n{end}{rest.partition(end)[2]}")
    draw_chart(HERE / "results" / "headline.png")
    draw(HERE / "results" / "policies.png")


if __name__ == "__main__":
    main()
