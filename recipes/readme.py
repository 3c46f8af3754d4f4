"""What README says that nobody writes by hand: the headline, every policy of the recipes on one scale, from recipes/results/*.csv, which
`gridworld.py score` has written, a file a seed; the metrics of the scripts' headers, with the values they had in recipes; the index of
equations with the lines where they stand.

    python recipes/readme.py         rewrites them in README.md and README.zh.md, each between its two marks, and results/headline.png
    python recipes/readme.py runs    the same, after the metrics of the recipes in runs/ are written to recipes/results/metrics.csv

After recipes of your own, copy runs/NAME.csv to recipes/results/NAME.csv (runs/seed-1/NAME.csv to NAME-seed1.csv), and see what differs.
"""

import ast
import csv
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = [HERE.parent / "README.md", HERE.parent / "README.zh.md"]
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
COLUMNS = dict(greedy="greedy", valid="valid", honest="honest", safe="safe", refused="right refusals", wrongly="wrong ones", diverse="diversity")
COLUMNS |= dict(thinking="with thinking", judge="judge", tax="tax", seconds="seconds", MB="MB")
METRICS = dict(sft="sft", reward_model="reward_model", ppo="ppo", dpo="dpo", orpo="orpo", rpo="nemotron/rpo-1", grpo="o1")  # script: a run of it
EQUATIONS = [  # paper, equation, what it is, script, function
    ("Sutton & Barto 2018", "4.10", "value iteration", "gridworld.py", "value_iteration"),
    ("Sutton & Barto 2018", "4.5", "policy evaluation", "gridworld.py", "policy_evaluation"),
    ("Sutton & Barto 2018", "6.8", "Q-learning", "gridworld.py", "q_learning"),
    ("Sutton & Barto 2018", "13.11", "REINFORCE with a baseline", "gridworld.py", "reinforce"),
    ("Sutton & Barto 2018", "13.14", "one-step actor-critic", "gridworld.py", "actor_critic"),
    ("InstructGPT 2203.02155", "1", "reward model on all pairs of K answers", "reward_model.py", "pair_loss"),
    ("Plackett-Luce; Starling-7B", "", "reward model on whole rankings", "reward_model.py", "plackett_luce_loss"),
    ("Constitutional AI 2212.08073", "section 4", "soft labels", "reward_model.py", "soft_pair_loss"),
    ("InternLM2 2403.17297", "1", "focal ranking loss", "reward_model.py", "focal_pair_loss"),
    ("InternLM2 2403.17297", "2", "log barrier", "reward_model.py", "log_barrier"),
    ("InstructGPT 2203.02155", "2", "reward per token: score less KL", "ppo.py", "shaped_rewards"),
    ("GAE 1506.02438", "16", "advantages", "ppo.py", "gae"),
    ("PPO 1707.06347", "7", "clipped surrogate", "ppo.py", "policy_loss"),
    ("PPO 1707.06347", "its code", "clipped value loss", "ppo.py", "value_loss"),
    ("DPO 2305.18290", "7", "DPO, and its conservative form", "dpo.py", "dpo_loss"),
    ("IPO 2310.12036", "17", "IPO", "dpo.py", "ipo_loss"),
    ("Online merging 2405.17931", "2 to 7", "OnDARE, OnTIES", "dpo.py", "merged"),
    ("ORPO 2403.07691", "4", "ratio of the log odds", "orpo.py", "log_odds_ratio"),
    ("ORPO 2403.07691", "7", "odds ratio loss", "orpo.py", "odds_ratio_loss"),
    ("ORPO 2403.07691", "6", "likelihood and odds ratio", "orpo.py", "orpo_terms"),
    ("Nemotron-4 2406.11704", "section 3.3.2", "RPO", "rpo.py", "rpo_loss"),
    ("DeepSeekMath 2402.03300", "3", "GRPO", "grpo.py", "grpo_loss"),
    ("DeepSeekMath 2402.03300", "4", "KL per token (k3)", "grpo.py", "kl_estimate"),
    ("DeepSeekMath 2402.03300", "section 4.1.3", "process supervision", "grpo.py", "step_advantages"),
    ("DAPO 2503.14476; Dr. GRPO 2503.20783", "12", "mean over tokens; constant length", "grpo.py", "answer_weights"),
    ("DAPO 2503.14476", "13", "soft penalty for length", "grpo.py", "overlong_penalty"),
    ("Chen et al. 2107.03374", "1", "pass@k", "grpo.py", "pass_at_k"),
    ("RLAIF 2309.00267", "section 2.1", "preference, both orders averaged", "rlaif.py", "preference"),
    ("RLAIF 2309.00267", "direct", "the judge's expected score", "rlaif.py", "expected_score"),
    ("Rule Based Rewards 2411.01111", "hinge", "weights of a rubric", "rlaif.py", "rubric_hinge"),
]


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


def equations() -> str:
    """The index as Markdown: a line for each equation, with the line of the script at which its function begins."""
    lines, places = ["| paper | equation | what | where |", "| --- | --- | --- | --- |"], {}
    for script in {script for *_, script, _ in EQUATIONS}:
        tree = ast.parse((HERE.parent / script).read_text())
        places[script] = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    for paper, number, what, script, function in EQUATIONS:
        line = places[script][function]
        lines.append(f"| {paper} | {number} | {what} | [{script}:{line}]({script}#L{line}) `{function}` |")
    return "\n".join(lines)


def described_metrics(script: str) -> list:
    """The table of metrics in a script's header: (names, at step 1, then, if not) each; a line that begins with spaces goes on with the one above."""
    doc = ast.get_docstring(ast.parse((HERE.parent / f"{script}.py").read_text()), clean=False)
    head, *lines = doc[doc.index("  Metric ") :].rstrip().split("\n")
    starts = [head.index(title) for title in ("Metric", "at step 1", "then", "if not")]
    rows = []
    for line in lines:
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None])]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells)]
    return rows


def collect(runs: Path):
    """Writes results/metrics.csv: every described metric at the first step of a recipe's run, and as the mean over its last tenth."""
    with (HERE / "results" / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("script", "metric", "first", "last"))
        for script, run in METRICS.items():
            lines = [json.loads(line) for line in (runs / run / "metrics.jsonl").read_text().splitlines()]
            for names, *_ in described_metrics(script):
                for name in names.split(", "):
                    values = [line[name] for line in lines if name in line]
                    writer.writerow((script, name, f"{values[0]:.3g}", f"{mean(values[-math.ceil(len(values) / 10) :]):.3g}"))


def metrics() -> str:
    """The described metrics as Markdown, a table for each script."""
    with (HERE / "results" / "metrics.csv").open() as file:
        seen = {(row["script"], row["metric"]): (row["first"], row["last"]) for row in csv.DictReader(file)}
    lines = []
    for script in METRICS:
        lines += [f"\n**{script}.py**\n", "| metric | at step 1 | then | on the grid | if not |", "| --- " * 5 + "|"]
        for names, *described in described_metrics(script):
            first, then, remedy = ("" if cell == "-" else cell.replace("|", "\\|") for cell in described)
            names = names.split(", ")
            here = ", ".join(a if a == b else f"{a} to {b}" for a, b in (seen[script, name] for name in names))
            lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {first} | {then} | {here} | {remedy} |")
    return "\n".join(lines).strip("\n")


WRITTEN = dict(headline=table, metrics=metrics, equations=equations)


def marks(name: str) -> tuple:
    return f"<!-- {name}: written by recipes/readme.py -->", f"<!-- end of {name} -->"


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
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    for readme in PAGES:
        for name, write in WRITTEN.items():
            begin, end = marks(name)
            before, _, rest = readme.read_text().partition(begin)
            readme.write_text(f"{before}{begin}\n{write()}\n{end}{rest.partition(end)[2]}")
    draw(HERE / "results" / "headline.png")


if __name__ == "__main__":
    main()
