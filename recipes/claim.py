"""Judges the claim of a recipe by the files that its runs have left, and prints it as the line `claim: ...`.

python recipes/claim.py NAME RUNS DATA SEED [tiny]      (recipes/common.sh calls it at the end of every recipe)

Exit code 1 if the claim does not hold. With `tiny` the claim is printed, not judged. The claim of each run is kept in
RUNS/NAME/claim.json; where other seeds, or the same seed with other processor instructions, have left one too, a line
before the claim gives the mean and the range of every number. One function per recipe, in alphabetical order, returns
the parts of the claim, {what was measured: whether it holds}; a few of them measure what the table of
`gridworld.py score` does not have, or draw a figure.
"""

import csv
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gridworld as world


@dataclass
class Runs:
    """The directory of a recipe's runs, with readers for the files in it."""

    folder: Path
    data: Path
    seed: int
    tiny: bool

    def table(self, name: str) -> dict:
        """Row -> column -> number, of a CSV file that `gridworld.py score` has written."""
        with (self.folder / f"{name}.csv").open() as file:
            rows = {row.pop("checkpoint").rstrip("/").split("/")[-1]: row for row in csv.DictReader(file)}
        return {name: {column: float(value) for column, value in row.items()} for name, row in rows.items()}

    def lines(self, name: str) -> list:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def metrics(self, run: str) -> list:
        return self.lines(f"{run}/metrics")

    def report(self, run: str) -> dict:
        return json.loads((self.folder / run / "report.json").read_text())

    def prompts(self, name: str) -> list:
        return [json.loads(line)["prompt"] for line in (self.data / f"{name}.jsonl").open()]

    def policy(self, run: str) -> tuple:
        return world.load_policy(str(self.folder / run))

    def rewards(self, run: str):
        """A reward model, as a function from a prompt and an answer to its score."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / run)
        model = AutoModelForSequenceClassification.from_pretrained(self.folder / run, dtype=torch.float32).eval()

        @torch.no_grad()
        def score(prompt, answer):
            ids = world.as_ids(tokenizer, [*prompt, world.assistant(answer)])
            return model(input_ids=torch.tensor([ids])).logits[0, 0].item()

        return score


def judge(parts: dict, tiny: bool) -> bool:
    """Prints the claim; of several parts, those that fail get a `(no)`."""
    holds = all(parts.values())
    mark = len(parts) > 1 and not tiny
    measured = "; ".join(text + " (no)" * (mark and not part) for text, part in parts.items())
    print(f"claim: {measured}: {'not judged (tiny)' if tiny else 'holds' if holds else 'does not hold'}")
    return holds or tiny


def spread(runs: list) -> str:
    """The text of several runs' claims, each number as its mean and, if it varies, its range; and how many hold."""
    number = re.compile(r"-?\d+(?:\.\d+)?")
    texts = ["; ".join(run["parts"]) for run in runs]
    if len({number.sub("", text) for text in texts}) > 1:
        return "over several runs: their claims differ in words, so that there is no mean"
    values = iter([shown_range(column) for column in zip(*map(number.findall, texts))])
    text = number.sub(lambda _: next(values), texts[0])
    holds = sum(all(run["parts"].values()) for run in runs)
    names = "; ".join(run["name"] for run in runs)
    return f"over {len(runs)} runs ({names}): {text}: holds in {holds} of {len(runs)}"


def shown_range(column: tuple) -> str:
    """The mean of numbers that are given as text, with their digits, and their range if they differ."""
    values, digits = [float(text) for text in column], len(column[0].partition(".")[2])
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, mean, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def listed(values, digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def columns(table: dict, rows: tuple, *names: str) -> list:
    """For each column, its numbers in these rows."""
    return [[table[row][name] for row in rows] for name in names]


# ------------------------------------------------------------------------------------------------------ the recipes


def chatglm(runs: Runs) -> dict:
    names = ("sft", "ppo-plain", "ppo-tricks")
    score, thinking = columns(runs.table("chatglm"), names, "score", "thinking")
    loss = [runs.metrics(f"chatglm/demonstrations/{name}")[-1]["eval_loss"] for name in names]
    reports = [runs.report(f"chatglm/{name}") for name in ("plain", "balanced")]
    length, right = ([report[key] for report in reports] for key in ("length_correlation", "accuracy"))
    learned = [runs.metrics(f"chatglm/{name}")[-20:] for name in ("plain", "balanced")]
    spread = [mean(m["max_reward"] - m["min_reward"] for m in run) for run in learned]
    tricks = runs.metrics("chatglm/ppo-tricks")
    less = [m["objective/scores"] for m in tricks]  # the baseline is subtracted
    whole = [m["rewards/level/mean"] + m["rewards/balanced/mean"] for m in tricks]  # before it is

    def start(values):
        return mean(values[:2])

    def changes(values):  # from batch to batch, so that a trend hardly counts
        return math.sqrt(mean([(b - a) ** 2 for a, b in zip(values, values[1:])] or [0]) / 2)

    steady = spread[1] < spread[0] and right[1] >= right[0] - 0.01
    nearer = abs(start(less)) < abs(start(whole)) / 2
    calmer = changes(less) < changes(whole)
    return {
        f"score and length correlate by {length[0]:.2f}, balanced {length[1]:.2f}": abs(length[1]) < abs(length[0]),
        f"held-out pairs {listed(right, 3)}; spread of scores {listed(spread, 1)}": steady,
        f"reward starts at {start(whole):.2f}, less the baseline at {start(less):.2f}": nearer,
        f"varies by {changes(whole):.3f}, less the baseline {changes(less):.3f}": calmer,
        f"loss on demonstrations {listed(loss)}": loss[2] < loss[1],
        f"score with thinking {listed(thinking)}": thinking[2] > thinking[1],
        f"score {listed(score)}": score[2] > score[0],
    }


def claude3(runs: Runs) -> dict:
    rows = runs.table("claude3")
    found = "; ".join(
        f"{name} {rows[name]['safe']:.2f} (score {rows[name]['score']:.2f}, right refusals {rows[name]['refused']:.2f})"
        for name in ("sft", "ppo", "sl-cai", "rl-cai")
    )
    safer = rows["rl-cai"]["safe"] - rows["ppo"]["safe"] >= 0.2
    return {f"safe walks: {found}": safer and rows["rl-cai"]["score"] >= rows["sft"]["score"] - 0.05}


def deepseek_v2(runs: Runs) -> dict:
    rows, names = runs.table("deepseek-v2"), ("sft", "o1", "policy")
    thinking, safe, refused = columns(rows, names, "thinking", "safe", "refused")
    wide = (runs.folder.parent if runs.seed else runs.folder) / "deepseek-v2" / "wide"  # one measurement for all seeds
    peak = {name: max(m["peak_memory_mb"] for m in runs.metrics((wide / name).resolve())) for name in ("ppo", "grpo")}
    return {
        f"SFT scores {thinking[0]:.2f} with thinking, stage 1 {thinking[1]:.2f}": thinking[1] > thinking[0],
        f"stage 2 {thinking[2]:.2f}": thinking[2] > thinking[1] - 0.05,
        f"safe walks {listed(safe)}": safe[2] > max(safe[:2]),
        f"right refusals {listed(refused)}": refused[2] > max(refused[:2]),
        f"GRPO peaks at {peak['grpo']} MB, PPO at {peak['ppo']}": peak["grpo"] < peak["ppo"],
    }


def dpo(runs: Runs) -> dict:
    rows = runs.table("dpo")
    sft, ppo, ours, plain = (rows[name] for name in ("sft", "ppo", "dpo", "dpo-plain"))
    seconds = ppo["seconds"] + runs.metrics("reward_model")[-1]["seconds"]
    text = (
        f"DPO scores {ours['score']:.2f} after {ours['seconds']:.0f} s in {ours['MB']:.0f} MB, PPO with its reward "
        f"model {ppo['score']:.2f} after {seconds:.0f} s in {ppo['MB']:.0f} MB (SFT {sft['score']:.2f}; DPO without "
        f"the likelihood term {plain['score']:.2f}, with {plain['valid']:.0%} of its answers valid)"
    )
    return {text: ours["score"] > ppo["score"] - 0.03 and ours["seconds"] < seconds}


def gemini(runs: Runs) -> dict:
    rounds = [k for k in (2, 3, 4) if (runs.folder / f"gemini/static-{k}").exists()]
    models = {k: ("reward_model", f"gemini/reward-{k}") for k in rounds}
    first, refreshed = ([share_of_right_pairs(runs, models[k][i], k) for k in rounds] for i in (0, 1))
    start = runs.metrics("gemini/fresh-1")
    lines = {line: [start, *(runs.metrics(f"gemini/{line}-{k}") for k in rounds)] for line in ("static", "fresh")}
    true, reward = "rewards/walk_score/mean", "objective/scores"
    draw_rounds(lines, (true, reward), runs.folder / "gemini-training.png")

    def ends(line, key):  # of the last 5 batches of each round, 640 answers
        return [mean(m[key] for m in one[-5:]) for one in lines[line]]

    static, fresh, proxy = ends("static", true), ends("fresh", true), ends("static", reward)
    peak = max(range(len(rounds)), key=static.__getitem__)  # the round after which the static line's true score falls
    begins = f"true score {start[0][true]:.2f} at the start"
    better = all(a > b for a, b in zip(refreshed, first))
    pairs = f"the refreshed one {listed(refreshed)}, the first {listed(first)}"
    return {
        f"{begins}, by rounds {listed(static)} with the static reward model": static[-1] < static[peak] - 0.03,
        f"whose reward goes {listed(proxy)}": proxy[-1] > proxy[peak],
        f"{listed(fresh)} with the refreshed one": fresh[-1] > fresh[peak] + 0.03,
        f"right on the current policy's answers: {pairs}": better,
    }


def share_of_right_pairs(runs: Runs, name: str, round: int) -> float:
    """The share of pairs of held-out answers in which a reward model prefers the better answer, by the annotators'
    opinion without its noise; ties are left out."""
    score, found = runs.rewards(name), []
    for row in runs.lines(f"gemini/held-out-{round}"):
        prompt = row["prompt"]
        answers = [(world.quality(prompt, text, "helpful"), score(prompt, text)) for text in row["completions"]]
        found += [a[1] > b[1] for a, b in permutations(answers, 2) if a[0] > b[0] + 0.01]
    return sum(found) / len(found) if found else math.nan


def draw_rounds(lines: dict, keys: tuple, path: Path):
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for parts, name in zip(lines.values(), ("static reward model", "refreshed reward model")):
        for axis, key in zip(axes, keys):
            values = [m[key] for part in parts for m in part]
            smooth = [mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            axis.plot(range(1, len(values) + 1), smooth, label=name)
    for axis, title in zip(axes, ("true score", "reward, by the reward model in use")):
        for k in range(1, len(lines["fresh"])):
            axis.axvline(k * len(lines["fresh"][0]), color="grey", linestyle=":")
        axis.set(title=title, xlabel="batches (mean of the last 5); dotted: a round ends")
    axes[0].legend()
    figure.savefig(path, dpi=100)


def gemma2(runs: Runs) -> dict:
    coefs = ("0.4", "0.1", "0.03")
    gold = gold_scores(runs, ["small-sft", *(f"gemma2/{size}-{coef}" for size in ("large", "small") for coef in coefs)])
    wins = {coef: runs.report(f"gemma2/compare-{coef}")["win_rate"] or 0.0 for coef in coefs}
    ends = {coef: runs.metrics(f"gemma2/large-{coef}")[-5:] for coef in coefs}
    proxy = {coef: mean(m["rewards/rm-large/mean"] for m in end) for coef, end in ends.items()}
    right = {name: runs.metrics(f"gemma2/rm-{name}")[-1]["eval_accuracy"] for name in ("large", "single", "small")}
    large, small = ([gold[f"{size}-{coef}"] for coef in coefs] for size in ("large", "small"))
    best, hacked, sft = coefs[large.index(max(large))], coefs[-1], gold["small-sft"]
    hacks = max(coefs, key=proxy.get) == hacked and large[-1] < sft
    return {
        f"gold by PPO with KL coefficients {', '.join(coefs)} from the larger reward model {listed(large)}, the "
        f"smaller {listed(small)}, SFT {sft:.2f}": max(large) > max(small),
        f"right on later turns {right['large']:.2f}, trained on single turns {right['single']:.2f} (small "
        f"{right['small']:.2f})": right["large"] > right["single"],
        f"the larger one's score {listed(proxy.values())}: the last run is hacked": hacks,
        f"the rater {listed(wins.values())}: chooses as gold does": max(coefs, key=wins.get) == best,
        "and puts the hacked run last": min(coefs, key=wins.get) == hacked,
    }


def gold_scores(runs: Runs, names: list) -> dict:
    """The mean opinion of the annotators, without noise, on 4 answers of each policy to each held-out prompt."""
    prompts, gold = runs.prompts("test_preferences"), {}
    for name in names:
        answers, _ = world.answer_all(*runs.policy(name), prompts, 4, 24, 1.0, runs.seed)
        opinions = [mean(world.quality(p, text, "overall") for text in texts) for p, texts in zip(prompts, answers)]
        gold[name.split("/")[-1]] = mean(opinions)
    return gold


def gpt4(runs: Runs) -> dict:
    refused, wrongly, score = columns(runs.table("gpt4"), ("sft", "ppo", "ppo-rubric"), "refused", "wrongly", "score")
    text = (
        f"right refusals: SFT {refused[0]:.2f}, PPO {refused[1]:.2f}, with the classifier {refused[2]:.2f}; wrong ones "
        f"{listed(wrongly, 3)} (score {listed(score)})"
    )
    return {text: refused[2] > refused[1] and wrongly[2] <= wrongly[1] + 0.02}


def instructgpt(runs: Runs) -> dict:
    rows = runs.table("instructgpt")
    sft, ppo, ptx = (rows[name] for name in ("sft", "ppo", "ppo-ptx"))
    text = (
        f"PPO-ptx scores {ptx['score']:.2f}, SFT {sft['score']:.2f} (PPO {ppo['score']:.2f}); loss on pre-training "
        f"text: PPO {ppo['tax']:.2f}, PPO-ptx {ptx['tax']:.2f}"
    )
    return {text: ptx["score"] > sft["score"] and ppo["tax"] > ptx["tax"]}


def internlm2(runs: Runs) -> dict:
    names, folder = ("ppo-hacked", "ppo-patched", "ppo-slow"), "internlm2"
    ((sft, hacked, patched, slow),) = columns(runs.table(folder), ("sft", *names), "score")
    groups = {name: runs.report(f"{folder}/{name}")["groups"] for name in ("told", "untold")}
    sides = {name: [group[f"kind {k}"]["accuracy"] for k in ("helpful", "harmless")] for name, group in groups.items()}
    shares = {name: [m["rewards/pattern/mean"] for m in runs.metrics(f"{folder}/{name}")] for name in names}
    args = json.loads((runs.folder / folder / "ppo-hacked/args.json").read_text())["args"]
    before = mean(shares["ppo-hacked"][: args["critic_warmup"] + 1])  # before the first update of the policy
    end = {name: mean(values[-5:]) for name, values in shares.items()}
    patches = len(runs.lines(f"{folder}/patches"))
    two = {name: "{:.2f} by points, {:.2f} by safety".format(*pair) for name, pair in sides.items()}
    print(f"beside it: after the slow path too: share {end['ppo-slow']:.2f}, score {slow:.2f}")
    cured = patches <= 100 and end["ppo-patched"] <= before + 0.05
    return {
        f"conflicts decided rightly with the system prompt {two['told']}": min(sides["told"]) >= 0.8,
        f"without it {two['untold']}": abs(mean(sides["untold"]) - 0.5) <= 0.05,
        f"share of the pattern: SFT {before:.2f}, PPO {end['ppo-hacked']:.2f}": end["ppo-hacked"] >= before + 0.2,
        f"PPO after {patches} patches {end['ppo-patched']:.2f}": cured,
        f"score {sft:.2f}, {hacked:.2f}, {patched:.2f}": patched > max(hacked, sft),
    }


def llama3(runs: Runs) -> dict:
    score = {name: row["score"] for name, row in runs.table("llama3").items()}
    stop = {name: share_of_stops(runs, f"llama3/{name}") for name in ("sft-2", "dpo-2", "unmasked", "average")}
    stop["sft"] = share_of_stops(runs, "sft")
    parts = [score[name] for name in ("slower", "dpo-2", "faster")]
    rises, unharmed = score["sft"] < score["dpo-1"] < score["average"], stop["average"] >= stop["sft"] - 0.02
    text = (
        f"score {score['sft']:.2f}, in round 1 {score['sft-1']:.2f} and after DPO {score['dpo-1']:.2f}, in round 2 "
        f"{score['sft-2']:.2f} and {score['average']:.2f}, the average of {listed(parts)}; answers that stop where "
        f"they should: SFT {stop['sft']:.3f}, in round 2 {stop['sft-2']:.3f}, after DPO {stop['dpo-2']:.3f}, averaged "
        f"{stop['average']:.3f}, without the mask {stop['unmasked']:.3f} (score {score['unmasked']:.2f}, "
        f"{score['dpo-2']:.2f} with it)"
    )
    return {text: rises and unharmed and score["average"] >= sum(parts) / 3}


def share_of_stops(runs: Runs, name: str) -> float:
    """The share of answers, 4 to a held-out grid, that end by themselves, right behind the total or a refusal."""
    (model, tokenizer), prompts = runs.policy(name), runs.prompts("final")
    ids = [world.as_ids(tokenizer, prompt, answer_next=True) for prompt in prompts]
    numbers = world.uniform_numbers(0, 1, range(4 * len(prompts)), 48).to(model.device)
    answers, *_ = world.sample(model, ids, numbers, [tokenizer.eos_token_id])
    found = 0
    for answer in answers:
        text = tokenizer.decode(answer[:-1]).strip()
        found += answer[-1] == tokenizer.eos_token_id and bool(re.fullmatch(r"[^=]+= -?\d+|no safe path", text))
    return found / len(answers)


def magpie(runs: Runs) -> dict:
    score, diverse = columns(runs.table("magpie"), ("filtered", "raw", "aligned"), "score", "diverse")
    cell = r" (?:-?[0-5]|!)"
    grid = re.compile(f"{cell}{cell} G\n{cell}{cell}{cell}\n S{cell}{cell}(\n.+)?", re.DOTALL)

    def shares(name):  # well-formed grids, alone or with a task below, and bare ones
        found = [grid.fullmatch(row["messages"][0]["content"]) for row in runs.lines(f"magpie/rows/{name}")]
        sound, bare = (sum(x) / len(found) for x in (map(bool, found), (m is not None and not m[1] for m in found)))
        return f"{len(found)} rows, {sound:.3f} with a sound grid, {bare:.2f} bare"

    distance = runs.report("magpie/rows")["median_distance"] or 0
    kept = f"filtered: {shares('sft')}"
    print(f"invented: {shares('raw')}; {kept}; median squared distance to the nearest {distance:.3f}")
    text = (
        f"the base tuned on filtered rows scores {score[0]:.2f}, on as many raw ones {score[1]:.2f}, the aligned model "
        f"{score[2]:.2f}; diversity {listed(diverse)}"
    )
    return {text: score[0] >= score[2] - 0.05 and score[0] - score[1] >= 0.03}


def nemotron(runs: Runs) -> dict:
    (score,) = columns(runs.table("nemotron"), ("dpo", "rpo-1", "rpo-2", "rpo-3"), "score")

    def fall(name):  # log ref/pi of the better answers; beta is 0.1
        return -runs.metrics(f"nemotron/as-{name}")[-1]["eval_rewards/chosen"] / 0.1

    def near(name):  # a tiny run may have no pairs of equal totals
        run = f"nemotron/ties-{name}"
        return runs.metrics(run)[-1]["gap_error"] if (runs.folder / run).exists() else math.nan

    text = (
        f"DPO scores {score[0]:.2f}, then RPO {listed(score[1:])} by rounds; better answers lose {fall('rpo'):.1f} "
        f"nats under RPO, {fall('dpo'):.1f} under DPO; |beta h| on near ties {near('rpo'):.2f} and {near('dpo'):.2f}"
    )
    rises = score[0] < score[1] < score[-1]
    return {text: rises and fall("rpo") < fall("dpo") and near("rpo") < near("dpo")}


def o1(runs: Runs) -> dict:
    ((before, after),) = columns(runs.table("o1"), ("sft", "o1"), "thinking")
    start, end = (runs.metrics(name)[-1] for name in ("o1-start", "o1"))
    accuracy, length = ([m[f"eval_{k}"] for m in (start, end)] for k in ("pass@1", "completions/mean_thinking_length"))
    votes, budgets = runs.report("o1")["majority"], runs.report("o1-budgets")["thinking_budget"]
    text = (
        f"score with thinking {before:.2f}, after GRPO {after:.2f}; accuracy {listed(accuracy)}; with 16 votes "
        f"{votes['16']:.2f}; with 0, 24, 72 tokens of thinking {listed(budgets[n] for n in ('0', '24', '72'))}; thinks "
        f"for {length[0]:.1f} tokens, {length[1]:.1f}"
    )
    grows = accuracy[1] > accuracy[0] and votes["16"] > votes["1"] and budgets["72"] > budgets["0"]
    return {text: after - before >= 0.2 and grows and length[1] >= length[0]}


def over_optimisation(runs: Runs) -> dict:
    times, models = (1, 2, 4, 8, 16, 32, 64), dict(small="small-reward-model", large="reward_model")
    samples = runs.lines("over-optimisation/samples")
    for row in samples:
        row["true"] = [world.quality(row["prompt"], text, "helpful") for text in row["completions"]]
    units = dict(true=deviation([(x, k) for row in samples for x, k in zip(row["true"], row["times"])]))
    ppo, bon = {}, {}  # size of the reward model -> points (KL, proxy, true score)
    for size, model in models.items():
        given = {}  # prompt -> answer -> score
        for row in runs.lines(f"over-optimisation/scores-{size}/rankings"):
            texts = (answer[-1]["content"] for answer in row["completions"])
            given[str(row["prompt"])] = dict(zip(texts, row["scores"]))
        scored = []  # for each prompt: (proxy, how often the answer was given, true score)
        for row in samples:
            if scores := given.get(str(row["prompt"])):
                answers = zip(row["completions"], row["times"], row["true"])
                scored.append([(scores[text], k, true) for text, k, true in answers if text in scores])
        units[size] = deviation([(proxy, k) for row in scored for proxy, k, _ in row])
        bon[size] = []
        for n in times:
            proxy, true, kl = (sum(x) / len(scored) for x in zip(*(best_of(row, n) for row in scored)))
            bon[size].append((kl, proxy, true))
        keys = ("objective/kl", f"rewards/{model}/mean", "rewards/gold/mean")
        raw = [tuple(m[key] for key in keys) for m in runs.metrics(f"over-optimisation/ppo-{size}")]
        windows = (raw[i : i + 5] for i in range(max(1, len(raw) - 4)))
        ppo[size] = [tuple(map(mean, zip(*window))) for window in windows]
    draw_over_optimisation(ppo, bon, units, runs.folder / "over-optimisation.png")

    noise = 2 * units["true"] * math.sqrt(2 / (5 * 128))  # two standard errors of a difference of means of 5 batches
    peaks, parts = {size: max(ppo[size], key=lambda point: point[2]) for size in models}, {}
    for size in models:
        (_, first, start), (kl, proxy, true), (kl_end, last, end) = ppo[size][0], peaks[size], ppo[size][-1]
        text = (
            f"{size} reward model: true score of PPO {start:.2f}, at its peak {true:.2f} (KL {kl:.1f}), at the end "
            f"{end:.2f} (KL {kl_end:.1f}), proxy {listed((first, proxy, last))}"
        )
        parts[text] = true > start + noise and end < true - noise and last > proxy > first
    more = peaks["large"][2] - peaks["small"][2]
    parts[f"peak of the larger less that of the smaller {more:+.2f}"] = peaks["large"][2] >= peaks["small"][2]
    for size in models:
        gain = min(max(true for *_, true in curve) - curve[0][2] for curve in (ppo[size], bon[size]))
        kl, kl_ppo = kl_spent(bon[size], gain), kl_spent(ppo[size], gain)
        text = f"KL for {gain:.2f} more true score from the {size} one: best-of-n {kl:.2f}, PPO {kl_ppo:.2f}"
        parts[text] = gain > noise and kl < kl_ppo
    return parts


def deviation(pairs: list) -> float:
    """Standard deviation of (value, how often)."""
    count = sum(k for _, k in pairs)
    center = sum(x * k for x, k in pairs) / count
    return math.sqrt(sum((x - center) ** 2 * k for x, k in pairs) / count) or 1.0


def best_of(answers: list, n: int) -> list:
    """Proxy, true score and KL of best-of-n: exact means over all choices of n of the answers (proxy, count, true)."""
    answers, below, total = sorted(answers, key=lambda answer: answer[0]), 0, sum(k for _, k, _ in answers)
    n, sums = min(n, total), [0.0, 0.0, 0.0]
    for proxy, k, true in answers:
        p = (math.comb(below + k, n) - math.comb(below, n)) / math.comb(total, n)  # that this answer is the best
        below += k
        if p:
            sums = [s + x for s, x in zip(sums, (p * proxy, p * true, p * math.log(p * total / k)))]
    return sums


def kl_spent(curve: list, gain: float) -> float:
    """The KL at which the true score is first this much above its start, interpolated; infinite if it never is."""
    start = curve[0][2]
    for (kl, _, true), (next_kl, _, next_true) in zip([curve[0], *curve], curve):
        if next_true - start >= gain:
            share = (gain + start - true) / (next_true - true) if next_true > true else 1
            return kl + (next_kl - kl) * share
    return math.inf


def draw_over_optimisation(ppo: dict, bon: dict, units: dict, path: Path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, title, curves in zip(axes, ("PPO without a KL penalty", "best of 1, 2, 4, ... 64"), (ppo, bon)):
        for size, colour in zip(curves, ("tab:orange", "tab:blue")):
            kl, proxy, true = zip(*curves[size])
            d = [math.sqrt(max(0.0, x)) for x in kl]
            proxy, true = ([(x - v[0]) / unit for x in v] for v, unit in ((proxy, units[size]), (true, units["true"])))
            axis.plot(d, proxy, "--", color=colour, label=f"proxy: {size} reward model")
            axis.plot(d, true, color=colour, label=f"true, following the {size} one")
        axis.axhline(0, color="lightgrey", zorder=0)
        axis.set(title=title, xlabel="square root of the KL to the initial policy (nats an answer)")
    axes[0].set(ylabel="score less its start, in standard deviations")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def qwen2(runs: Runs) -> dict:
    names = ("sft", "dpo", "offline-3", "adamw-3", "half-3", "ondare-3")
    rows = runs.table("qwen2")
    score, tax, thinking = columns(rows, names, "score", "tax", "thinking")
    judging, honest, refused = columns(rows, names, "judge", "honest", "refused")
    _, dpo, longer, adamw, _, ondare = range(6)
    online = min(score[adamw], score[ondare]) > max(score[dpo], score[longer])
    cheaper = tax[ondare] < tax[adamw] and score[ondare] > score[adamw] - 0.01
    start = "of SFT, offline DPO, 60 steps more of it, 60 steps online by AdamW, by AdamW at half the rate, by OnDARE: "
    others = (
        f"with thinking {listed(thinking)}; judge {listed(judging)}; honest {listed(honest)}; right refusals "
        f"{listed(refused)}"
    )
    return {f"{start}score {listed(score)}": online, f"tax {listed(tax)} ({others})": cheaper}


def rlaif(runs: Runs) -> dict:
    rows = runs.table("rlaif")
    score = {name: rows[name]["score"] for name in ("start", "distilled", "direct", "self-1", "self-2", "self-3")}
    rounds, judging = columns(rows, ("start", "self-1", "self-2", "self-3"), "score", "judge")
    audit, duel = (runs.report(f"rlaif/{name}") for name in ("audit", "compare"))
    agreement = audit.get("agreement") or 0.0
    text = (
        f"the judge agrees with people in {agreement:.2f} of {audit['decided']} clear pairs ({audit['ties']} ties); "
        f"score {score['start']:.2f}, distilled {score['distilled']:.2f}, direct {score['direct']:.2f}, self-rewarding "
        f"{listed(rounds[1:])} by rounds; as a judge {judging[0]:.2f}, then {listed(judging[1:])}; it prefers the last "
        f"to the first in {duel['win_rate']:.2f}"
    )
    better = min(score["distilled"], score["direct"], score["self-3"]) > score["start"]
    return {text: agreement >= 0.85 and better and rounds[0] < rounds[1] < rounds[-1]}


def sft_vs_rlhf(runs: Runs) -> dict:
    """Seven parts, a line each; the claim counts them."""
    found, rows = sft_vs_rlhf_numbers(runs), runs.table("sft-vs-rlhf")
    (score,) = columns(rows, ("sft", "ppo"), "score")
    safe, refused, wrongly, cost = columns(rows, ("sft", "ppo-safe"), "safe", "refused", "wrongly", "score")
    lava, poor = (columns(runs.table(f"sft-vs-rlhf/{kind}"), ("sft", "ppo"), "score")[0] for kind in ("lava", "poor"))
    drop = [sum(score[i] - kind[i] for kind in (lava, poor)) / 2 for i in (0, 1)]
    keys = ("falls", "rejected", "slips", "right", "diverse", "across")
    falls, rejected, slips, right, diverse, across = (found[key] for key in keys)
    holds = (
        falls["sft"] > 0.5 > falls["rlhf"],
        rejected["chosen"] > rejected["sft"] > rejected["dpo"],
        slips["ppo"] < slips["sft"],
        abs(right["ppo"] - 0.5) < abs(right["sft"] - 0.5),
        safe[1] > safe[0] and refused[1] >= refused[0],
        all(kind[1] > kind[0] for kind in (lava, poor)) and drop[1] <= drop[0],
        diverse["sft"] > diverse["best"] > diverse["ppo"],
    )
    texts = (
        f"equally good answers: the other best walk gets less likely in {falls['sft']:.2f} of grids by a step of SFT, "
        f"in {falls['rlhf']:.2f} by one of RLHF",
        f"negative feedback: log-probability of rejected walks {rejected['sft']:.2f} at the start; "
        f"{rejected['chosen']:.2f} by SFT on chosen ones, {rejected['dpo']:.2f} by DPO",
        f"no looking back: slips in {slips['sft']:.4f} of answers SFT, {slips['ppo']:.4f} PPO",
        f"bias: of two equal walks the one to the right with {right['sft']:.3f} SFT, {right['ppo']:.3f} PPO (the "
        f"reward model's mean gap {found['taste']:+.2f})",
        f"safety: safe walks {safe[0]:.2f} SFT, {safe[1]:.2f} PPO with the second reward model; right refusals "
        f"{listed(refused)} (wrong ones {listed(wrongly)}; score {listed(cost)})",
        f"generalisation: score {score[0]:.2f} SFT, {score[1]:.2f} PPO; with twice the lava {listed(lava)}; with no "
        f"number above 0 {listed(poor)}",
        f"diversity by input: {diverse['sft']:.2f} SFT, {diverse['best']:.2f} best of 4, {diverse['ppo']:.2f} PPO "
        f"(across inputs {listed(across[kind] for kind in ('sft', 'best', 'ppo'))})",
    )
    for number, (text, part) in enumerate(zip(texts, holds), 1):
        print(f"({number}) {text}{'' if runs.tiny else ': holds' if part else ': does not hold'}")
    return {f"{sum(holds)} of {len(holds)} differences between SFT and RLHF are as described": all(holds)}


def sft_vs_rlhf_numbers(runs: Runs) -> dict:
    """What the table of `gridworld.py score` does not have: see (1), (2), (3), (4) and (7) in sft-vs-rlhf.sh."""
    small, found = runs.tiny, {}
    paths = dict(sft="sft", ppo="ppo", dpo="dpo", chosen="sft-vs-rlhf/chosen")
    policies, reward = {name: runs.policy(path) for name, path in paths.items()}, runs.rewards("reward_model")
    for model, _ in policies.values():
        model.cpu()

    def logp(name, prompt, answer):
        """log pi(answer | prompt), the end of the turn included."""
        policy, tokenizer = policies[name]
        before = len(world.as_ids(tokenizer, prompt, answer_next=True))
        ids = world.as_ids(tokenizer, [*prompt, world.assistant(answer)])
        logits = policy(input_ids=torch.tensor([ids])).logits[0, before - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[before:])[:, None]).sum()

    def gradient(value):
        parameters = list(policies["sft"][0].parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])

    def new_grids(count, name, accept):
        """(prompt, grid, what `accept` has found) of this many new grids for which `accept` finds something."""
        rng, rows = random.Random(f"sft-vs-rlhf {name}"), []
        while len(rows) < count:
            grid = world.new_grid(rng, 3)
            if thing := accept(rng, grid):
                rows.append(([world.user(world.grid_text(grid))], grid, thing))
        return rows

    # (1) two walks that are both best: does a step on the first make the second less likely?
    def two_best(rng, grid):
        best = [walk for walk in world.walks(grid) if walk.total == max(w.total for w in world.walks(grid))]
        return rng.sample(best, 2) if len(best) == 2 and all(walk.safe for walk in best) else None

    falls = dict(sft=[], rlhf=[])
    for prompt, grid, (a, b) in new_grids(3 if small else 100, 1, two_best):
        told = list(map(world.tell, world.walks(grid)))
        logps = torch.stack([logp("sft", prompt, text) for text in told])
        scores = torch.tensor([reward(prompt, text) for text in told])
        other = gradient(logps[told.index(world.tell(b))])
        falls["sft"].append((gradient(logps[told.index(world.tell(a))]) @ other).item() < 0)
        falls["rlhf"].append((gradient((logps.softmax(0) * scores).sum()) @ other).item() < 0)
    found["falls"] = {name: mean(values) for name, values in falls.items()}

    # (2) rejected answers: the worst walks of new rankings
    def worst(rng, grid):
        row = world.ranking_row(rng, grid)
        pairs = zip(row["scores"], row["completions"])
        told = [pair for pair in pairs if world.check_answer(grid, pair[1]).kind == "walk"]
        return min(told)[1] if len(told) > 1 else None

    rejected = new_grids(3 if small else 200, 2, worst)
    with torch.no_grad():
        found["rejected"] = {name: mean(logp(name, p, text).item() for p, _, text in rejected) for name in policies}

    # (3) slips, in 16 answers to each held-out grid
    prompts = runs.prompts("final")[: 8 if small else 300]
    answers, slips = {}, {}
    for name in ("sft", "ppo"):
        answers[name], _ = world.answer_all(*policies[name], prompts, 2 if small else 16, 48, 1.0, 0)
        slips[name] = mean(" wait " in text for texts in answers[name] for text in texts)
    found["slips"] = slips

    # (4) bias: two walks of equal total, equally safe, one begins to the right and one up
    def equal(rng, grid):
        right, up = ([walk for walk in world.walks(grid) if walk.moves[0] == move] for move in ("right", "up"))
        pairs = [(a, b) for a in right for b in up if (a.total, a.safe) == (b.total, b.safe)]
        return rng.choice(pairs) if pairs else None

    pairs = [(p, world.tell(a), world.tell(b)) for p, _, (a, b) in new_grids(3 if small else 300, 4, equal)]
    with torch.no_grad():
        gaps = {name: [logp(name, p, a) - logp(name, p, b) for p, a, b in pairs] for name in ("sft", "ppo")}
    found["right"] = {name: mean(gap.sigmoid().item() for gap in values) for name, values in gaps.items()}
    found["taste"] = mean(reward(p, a) - reward(p, b) for p, a, b in pairs)

    # (7) diversity: 8 answers to a grid; best of 4 chooses from 8 groups of 4
    prompts, best = prompts[:100], []
    for prompt, texts in zip(prompts, world.answer_all(*policies["sft"], prompts, 4 if small else 32, 48, 1.0, 1)[0]):
        worth = {text: reward(prompt, text) for text in texts}
        best.append([max(texts[i : i + 4], key=worth.get) for i in range(0, len(texts), 4)])
    groups = {name: [texts[:8] for texts in group[:100]] for name, group in answers.items()} | dict(best=best)
    found["diverse"] = {name: mean(map(world.ead, group)) for name, group in groups.items()}
    found["across"] = {name: world.ead([texts[0] for texts in group]) for name, group in groups.items()}
    return found


def small_beats_large(runs: Runs) -> dict:
    rows = runs.table("small-beats-large")
    large, small = parameters(runs.folder / "base"), parameters(runs.folder / "small-beats-large" / "small-ppo")
    asked = {"base": "base by the chat template", "base-grid": "by the grid", "base-most": 'by the grid and "most"'}
    asked |= {"sft": "SFT"}
    ppo, named = rows["small-ppo"], {label: rows[name] for name, label in asked.items()}
    others = ", ".join(f"{label} {row['score']:.2f} (honest {row['honest']:.2f})" for label, row in named.items())
    text = (
        f"{small} parameters after PPO score {ppo['score']:.2f} (honest {ppo['honest']:.2f}; SFT "
        f"{rows['small-sft']['score']:.2f}); {large}, {large / small:.1f} times as many: {others}"
    )
    return {text: all(ppo["score"] > rows[name]["score"] for name in asked)}


def parameters(checkpoint: Path) -> int:
    """The number of parameters of a checkpoint, by the header of its file."""
    with (checkpoint / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")


def starling(runs: Runs) -> dict:
    names, folder = ("judge", "all-weights", "last-layer", "plain"), "starling"
    score, tokens = columns(runs.table(folder), names, "score", "tokens")
    ours, plain = runs.metrics(f"{folder}/all-weights"), runs.metrics(f"{folder}/plain")
    warm = json.loads((runs.folder / folder / "all-weights/args.json").read_text())["args"]["critic_warmup"]

    def early(run, key, first):
        """Mean of a reward over the first fifth of the batches from number `first` on, less its mean before any update
        of the policy; and two standard errors."""
        before, count = [m[key] for m in ours[: warm + 1]], math.ceil((len(run) - first) / 5)
        after = [m[key] for m in run[first : first + count]]
        return mean(after) - mean(before), 2 * stdev(before) * math.sqrt(1 / len(before) + 1 / len(after))

    keys = {"reward": "rewards/plackett-luce/mean", "true score": "rewards/walk_score/mean"}
    rises = {name: early(ours, key, warm + 1) for name, key in keys.items()}
    apart = ", ".join(f"{early(plain, key, 1)[0]:+.2f}" for key in keys.values())
    ended = mean(m["val/share_eos"] for m in ours[-5:])
    ranked, paired = (runs.metrics(f"{folder}/{name}")[-1]["eval_accuracy"] for name in ("plackett-luce", "pairs"))
    changes = ", ".join(f"{name} {rise:+.2f} (noise {noise:.2f})" for name, (rise, noise) in rises.items())
    print(f"beside it: PPO without critic training and constant: first fifth {apart}, score {score[3]:.2f}")
    rises_on = all(rise >= -noise for rise, noise in rises.values())
    same_length = abs(tokens[1] / tokens[0] - 1) <= 0.1 and ended >= 0.98
    as_well = ranked >= paired - 0.02
    return {
        f"first fifth of PPO less its start: {changes}": rises_on,
        f"tokens {tokens[0]:.1f}, after PPO {tokens[1]:.1f}, {ended:.3f} of answers end": same_length,
        f"score {score[0]:.2f}, all weights {score[1]:.2f}": score[1] > score[0],
        f"last layer {score[2]:.2f}": score[1] > score[2],
        f"reward model right in {ranked:.3f} of held-out pairs by whole rankings, {paired:.3f} by pairs": as_well,
    }


def zephyr(runs: Runs) -> dict:
    rows, names = runs.table("zephyr"), ("start", "orpo", "chosen")
    (start, ours, chosen), odds = (
        [runs.metrics(f"zephyr/{name}")[-1][f"eval_{key}"] for name in names]
        for key in ("logps/rejected", "log_odds_chosen")
    )
    orpo, tuned = rows["orpo"], rows["chosen"]
    text = (
        f"ORPO scores {orpo['score']:.2f}, fine-tuning on the chosen answers {tuned['score']:.2f} at equal steps, in "
        f"{orpo['MB']:.0f} and {tuned['MB']:.0f} MB; a rejected token's log-probability {start:.2f} at the start, "
        f"{ours:.2f} with ORPO, {chosen:.2f} with fine-tuning; log odds ratio {listed(odds)}"
    )
    return {text: orpo["score"] > tuned["score"] and ours < chosen and odds[1] > odds[2]}


if __name__ == "__main__":
    name, folder, data, seed, *tiny = sys.argv[1:]
    disable_progress_bar()
    claim = globals()[name.replace("-", "_")]  # the function above of the recipe's name
    runs = Runs(Path(folder), Path(data), int(seed), tiny == ["tiny"])
    parts = claim(runs)
    if not runs.tiny:
        processor = os.environ.get("ATEN_CPU_CAPABILITY", "")
        record = dict(name=f"seed {seed} {processor}".rstrip(), parts=parts)
        (runs.folder / name / "claim.json").write_text(json.dumps(record, indent=1))
    found = [json.loads(file.read_text()) for file in sorted(Path("runs").glob(f"**/{name}/claim.json"))]
    if len(found) > 1 and not runs.tiny:
        print(spread(found))
    sys.exit(0 if judge(parts, runs.tiny) else 1)
