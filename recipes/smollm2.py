"""Data and results of smollm2.sh.

python recipes/smollm2.py data OUT INSTRUCTIONS PAIRS CONVERSATIONS RANKINGS PROBLEMS    short rows, split, to OUT
python recipes/smollm2.py results RUNS MODEL OUT       OUT/smollm2.csv and .png from the runs, and the tables

The data sets are named as in --dataset; RANKINGS may be empty. Of rows with the same prompt the first is kept, and
rows that are too long for a quick run are left out. `brevity` is the length rule of the PPO stage.
"""

import csv
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SIZES = dict(test=128, dev=64, train=640)  # settings are chosen on dev


def brevity(prompts, completions, **columns):
    """Up to 0 for an answer in few words, -1 for one of 50 words or more."""
    return [-min(1.0, len(completion[-1]["content"].split()) / 50) for completion in completions]


# ---------------------------------------------------------------------------------------------------------------- data


def write_data(out: str, instructions: str, pairs: str, conversations: str, rankings: str, problems: str):
    """NAME-test.jsonl, NAME-dev.jsonl and NAME-train.jsonl; no prompt is in two of them."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = dict(
        instructions=short_rows(instructions, 500),
        pairs=[as_preference(row, "pair") for row in short_rows(pairs, 900)],
        conversations=[as_preference(row, "conversation") for row in short_rows(conversations, 800)],
        rankings=[row for row in map(as_ranking, short_rows(rankings, 10_000)) if len(set(row["scores"])) > 1],
        problems=short_rows(problems, 800),
        sums=sums(),
    )
    splits = {name: split(found) for name, found in rows.items()}
    # what the reward model reads: pairs and rankings in one file
    shares = dict(pairs=192, conversations=256, rankings=192)
    splits["preferences"] = {
        part: [row for name, share in shares.items() for row in splits[name][part][:share]] for part in SIZES
    }
    trained = {row["prompt"][0]["content"] for row in splits["sums"]["train"]}
    splits["unmirrored"] = dict(test=[row for row in splits["sums"]["test"] if mirrored(row) not in trained])
    for name, parts in splits.items():
        for part, found in parts.items():
            (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        print(f"{name}: " + ", ".join(f"{len(found)} {part}" for part, found in parts.items()))


def short_rows(name: str, most: int) -> list:
    """The rows of a data set that have at most so many characters, one for each prompt, shuffled."""
    from sft import load_rows

    rows = {}
    for row in load_rows("--dataset", name, "train") if name else []:
        row = {key: value for key, value in row.items() if value is not None}
        prompt = row.get("prompt") or row.get("question") or row.get("messages") or row["chosen"][:-1]
        if len(json.dumps(row)) <= most:
            rows.setdefault(json.dumps(prompt), row)
    rows = list(rows.values())
    random.Random(0).shuffle(rows)
    return rows


def as_preference(row: dict, kind: str) -> dict:
    from reward_model import as_pair

    prompt, (chosen, rejected) = as_pair(row)
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, kind=row.get("kind", kind))


def as_ranking(row: dict) -> dict:
    """The answers of at most 700 characters. XSTest's label says whether the prompt is safe to answer."""
    kept = [(text, score) for text, score in zip(row["completions"], row["scores"]) if len(text) <= 700]
    completions, scores = [text for text, _ in kept], [score for _, score in kept]
    return dict(prompt=row["prompt"], completions=completions, scores=scores, kind=row.get("label", "ranking"))


def sums() -> list:
    """Every sum of two numbers from 1 to 20. A greedy SmolLM2 solves half of them when asked like this."""
    terms = [(a, b) for a in range(1, 21) for b in range(1, 21)]
    random.Random(0).shuffle(terms)
    return [
        dict(prompt=[dict(role="user", content=f"Calculate {a} + {b}. Reply with the number only.")], answer=str(a + b))
        for a, b in terms
    ]


def mirrored(row: dict) -> str:
    """The prompt with its two numbers exchanged."""
    return re.sub(r"(\d+) \+ (\d+)", r"\2 + \1", row["prompt"][0]["content"])


def split(rows: list) -> dict:
    """The first rows are for the test; a small data set keeps half of its rows for training."""
    test, dev = min(SIZES["test"], len(rows) // 4), min(SIZES["dev"], len(rows) // 8)
    train = rows[test + dev : test + dev + SIZES["train"]]
    return dict(test=rows[:test], dev=rows[test : test + dev], train=train)


# ------------------------------------------------------------------------------------------------------------- results

POLICIES = ("start", "sft", "dpo", "orpo", "rpo", "ppo", "ppo-short")
QUESTIONS = (  # answered greedily by every policy; in none of the data sets
    "Convert 750 grams to kilograms.",
    "Tell my neighbour that the music is too loud.",
    "What is the opposite of 'generous'?",
)
STAGES = {  # name: (runs before and after, what is measured on held-out rows)
    "sft.py": ("sft-start", "sft", "eval_loss"),
    "reward_model.py": ("", "reward_model-1", "eval_accuracy"),
    "reward_model.py, second pass": ("reward_model-1", "reward_model", "eval_accuracy"),
    "dpo.py": ("", "dpo", "eval_rewards/accuracies"),
    "orpo.py": ("orpo-start", "orpo", "eval_rewards/accuracies"),
    "rpo.py": ("", "rpo", "eval_rewards/accuracies"),
    "grpo.py, sums": ("sums-start", "sums", "eval_pass@1"),
    "grpo.py, sums, greedy": ("sums-start-greedy", "sums-greedy", "eval_pass@1"),
    "grpo.py, greedy, mirror not trained": ("sums-start-unmirrored", "sums-unmirrored", "eval_pass@1"),
    "grpo.py, sums, 8 votes": ("sums-start", "sums", "eval_majority@8"),
    "grpo.py, word problems": ("problems-start", "problems", "eval_pass@1"),
    "ppo.py": ("answers-start", "answers-ppo", "score_mean"),
    "ppo.py, short": ("answers-start", "answers-ppo-short", "score_mean"),
}
FIRST = ("reward", "entropy", "objective/scores", "response_length", "val/share_eos", "peak_memory_mb")
COSTS = {"steps": ("step", 1, 0), "minutes": ("seconds", 1 / 60, 1), "peak MB": ("peak_memory_mb", 1, 0)}
PREFERENCES = {
    "accuracy": ("eval_rewards/accuracies", 1, 2),
    "margin": ("eval_rewards/margins", 1, 2),
    "log pi(chosen)": ("eval_logps/chosen", 1, 1),
    "log pi(rejected)": ("eval_logps/rejected", 1, 1),
}
JUDGE = {
    "pairs": ("comparisons", 1, 0),
    "decided": ("decided", 1, 0),
    "agreement": ("agreement", 1, 2),
    "position decides": ("same_position", 1, 2),
    "then the first": ("first_position", 1, 2),
    "prefers the longer": ("prefers_longer", 1, 2),
    "abstentions": ("abstentions", 1, 0),
}
ANSWERS = {
    "mean score": ("score_mean", 1, 2),
    "best of 4": ("score_best", 1, 2),
    "worst of 4": ("score_worst", 1, 2),
    "words": ("words", 1, 0),
    "cut off": ("cut_off_or_empty", 1, 0),
}


def write_results(runs: str, model: str, out: str, tiny: str = ""):
    """smollm2.csv: the last value of every metric and report, and answers; smollm2.png; then the tables, and the
    claim."""
    folders = [path.parent for path in sorted(Path(runs).glob("*/args.json"))]
    values = {folder.name: last_values(folder) for folder in folders}
    with (Path(out) / "smollm2.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("run", "measure", "value"))
        for run, found in values.items():
            table.writerows((run, name, f"{value:.6g}") for name, value in found.items())
        for name in POLICIES:
            directory = Path(model if name == "start" else f"{runs}/{name}")
            if name == "start" or directory.exists():
                table.writerows((name, question, text) for question, text in zip(QUESTIONS, greedy(str(directory))))
    draw_training(Path(runs), Path(out) / "smollm2.png")
    print("\n".join(tables(Path(out) / "smollm2.csv")))
    right = values["dpo"]["eval_rewards/accuracies"]
    before, after = (values[run]["eval_pass@1"] for run in ("sums-start-greedy", "sums-greedy"))
    holds = right >= 0.8 and after - before >= 0.2
    judged = "not judged (tiny)" if tiny else "holds" if holds else "does not hold"
    print(f"claim: DPO is right on {right:.2f} of held-out pairs; greedy sums {before:.2f}, {after:.2f}: {judged}")
    return holds or bool(tiny)


def last_values(run: Path) -> dict:
    """The numbers of a run's first and last step and of its report.json, and the mean length of its answers."""
    values = {}
    if (run / "metrics.jsonl").exists():
        lines = (run / "metrics.jsonl").read_text().splitlines()
        first, last = json.loads(lines[0]), json.loads(lines[-1])
        values |= last | {f"step 1: {name}": first[name] for name in FIRST if name in first}
    if (run / "report.json").exists():
        values |= flattened(json.loads((run / "report.json").read_text()))
    if (run / "rankings.jsonl").exists():
        rankings = map(json.loads, (run / "rankings.jsonl").open())
        lengths = [len(answer[-1]["content"].split()) for row in rankings for answer in row["completions"]]
        values["words"] = sum(lengths) / max(1, len(lengths))
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def flattened(report: dict, prefix: str = "") -> dict:
    values = {}
    for name, value in report.items():
        values |= flattened(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return values


def greedy(directory: str) -> list:
    from transformers import pipeline

    chat = pipeline("text-generation", directory)
    options = dict(max_new_tokens=60, do_sample=False, return_full_text=False)
    return [chat([dict(role="user", content=text)], **options)[0]["generated_text"] for text in QUESTIONS]


def draw_training(runs: Path, path: Path):
    """What each method raises, over its steps."""
    from matplotlib.figure import Figure

    panels = {
        "accuracy on the batch's pairs": {run: "rewards/accuracies" for run in ("dpo", "orpo", "rpo")},
        "right answers to the batch's sums": dict(sums="reward"),
        "reward, -1 if cut off": {run: "objective/scores" for run in ("ppo", "ppo-short")},
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items()):
        for run, metric in lines.items():
            if (runs / run / "metrics.jsonl").exists():
                values = [json.loads(step)[metric] for step in (runs / run / "metrics.jsonl").open()]
                recent = [values[max(0, i - 4) : i + 1] for i in range(len(values))]
                axis.plot(range(1, len(values) + 1), [sum(part) / len(part) for part in recent], label=run)
        axis.set(title=title, xlabel="step (mean of the last 5)")
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=100)


def tables(results: Path) -> list:
    """The lines of the tables of docs/real-model.md. What was not run has no row."""
    values = {}
    for row in csv.DictReader(results.open()):
        values.setdefault(row["run"], {})[row["measure"]] = row["value"]

    def cells(run: str, columns: dict) -> list:
        found = values.get(run, {})
        columns = columns.values()
        return [
            f"{float(found[name]) * factor:.{digits}f}" if name in found else "-" for name, factor, digits in columns
        ]

    def block(first: str, columns: dict, runs: dict) -> list:
        rows = [[name, *cells(run, columns)] for name, run in runs.items() if run in values]
        return in_columns([first, *columns], rows)

    stages = []
    for name, (before, after, measure) in STAGES.items():
        if after in values:
            (start,), (end,) = (cells(run, {"": (measure, 1, 2)}) for run in (before, after))
            stages.append(
                [
                    name,
                    measure.removeprefix("eval_"),
                    start,
                    end,
                    *cells(after.removeprefix("answers-").removesuffix("-greedy").removesuffix("-unmirrored"), COSTS),
                ]
            )
    kinds = [name.split("/")[1] for name in values.get("reward_model", {}) if re.fullmatch("groups/.*/accuracy", name)]
    groups = []
    for kind in kinds:
        columns = {"pairs": (f"groups/{kind}/pairs", 1, 0), "accuracy": (f"groups/{kind}/accuracy", 1, 2)}
        groups.append([kind, *cells("reward_model", columns)])
    return [
        *in_columns(["stage", "measure", "before", "after", *COSTS], stages),
        *block("script", PREFERENCES, {f"{name}.py": name for name in ("dpo", "orpo", "rpo")}),
        *in_columns(["held-out pairs", "pairs", "accuracy"], groups),
        *block("labels", JUDGE, {name: f"audit-{name}" for name in ("conversations", "rankings")}),
        *block("policy", ANSWERS, {name: f"answers-{name}" for name in POLICIES}),
    ]


def in_columns(names: list, rows: list) -> list:
    lines = [names, ["---"] * len(names), *rows]
    return ["", *("| " + " | ".join(line) + " |" for line in lines)]


if __name__ == "__main__":
    done = dict(data=write_data, results=write_results)[sys.argv[1]](*sys.argv[2:])
    sys.exit(done is False)
