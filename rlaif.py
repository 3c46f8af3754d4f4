# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11,<=2.13.0", "transformers>=5.17,<5.40", "datasets>=4", "tyro>=1.0", "wandb", "matplotlib", "tqdm"
# ]
# ///
"""Learning from AI feedback: a language model labels, rewrites, chooses or invents the data for the other scripts.

    P(a > b) = 1/2 [ P(A | a as A, b as B) + P(B | b as A, a as B) ]      RLAIF (Lee et al. 2023, arXiv 2309.00267)

P(A) and P(B) are the judge's probabilities of replying with that letter, renormalised over the two. Each pair is shown
in both orders, so that a preference for a position cancels.

  label       compares 2 answers: soft preferences (pairs.jsonl); or K: each answer's mean P (rankings.jsonl; Starling)
  revise      critique and revision of answers by principles (sft.jsonl; Constitutional AI, Bai et al. 2022, 2212.08073)
  best-of-n   scores N answers: the best (sft.jsonl; Llama 3, 2407.21783), the best and the worst (pairs.jsonl; Qwen2,
              2407.10671), all (rankings.jsonl), prompts by spread of scores (prompts.jsonl; ChatGLM-RLHF, 2404.00934)
  synthesise  an aligned model writes its own prompts and answers (raw.jsonl; filtered: sft.jsonl, prompts.jsonl;
              Magpie, Xu et al. 2024, 2406.08464)
  compare     the win rate of policy A over policy B, with its 95% interval (comparisons.jsonl)
  audit       a judge against given labels: agreement, position bias, length bias, consistency

Departures from the papers
  1. A pair is a tie, and left out, if its two orders contradict each other or P is within --tie-margin of 1/2; --orders
     average --tie-margin 0 keeps it, as Lee et al. do. A ranking uses every P, and holds only answers that were all
     compared with each other. Starling's judge ranks all answers in one reply.
  2. No data set to train on holds an answer that was cut off: a model would learn to stop in the middle.
  3. Magpie: near repeats are found by the policy's mean hidden states, not by an embedding model; the reward of the
     base model is not subtracted.
  4. best-of-n drops prompts by the range of their scores; ChatGLM by the variance.
  5. --scale points has the parts of the additive prompt of Self-Rewarding Language Models (2401.10020) in our words.
  6. The judge sees no system prompts, and the answers without their thinking.

--judge is a checkpoint or, with --judge-url, a model on a server with OpenAI's API; only that server gets the key.
--requests FILE replaces the texts of REQUESTS below: {talk} is the conversation; {a} and {b}, or {answer}, are the
answers to judge; {conversation} is talk and answer in one; {principle} is a line of --principles.

Reads prompts, pairs (chosen, rejected) or K answers (completions), as the other scripts do; other columns are kept.
Writes the files above, report.json and args.json to --output-dir. Finished batches survive a stop: use --resume.

  python rlaif.py audit --judge runs/sft --dataset data/grid/test_preferences.jsonl --requests data/grid/requests.json
  python rlaif.py label --model runs/sft --judge Qwen/Qwen3-8B --dataset trl-lib/ultrafeedback-prompt --rows 1000
  torchrun --nproc-per-node 8 rlaif.py best-of-n --model runs/sft --reward-model runs/reward_model --dataset data.jsonl

  In report.json         good             if not
  agreement              above 0.8        (of decided pairs) another judge, other --requests, --reasoning
  same_position          below 0.2        the judge chooses by position: another judge (first_position 1: the first)
  abstentions            0                the judge replies with no letter: other --requests, or a lower --min-mass
  prefers_longer         as given_longer  above it: length bias; reward_model.py --length-buckets
  consistency            above 0.8        the --judgements of one pair differ (chance: 0.5): other --principles
"""

import os
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, NamedTuple

import tyro


@dataclass(kw_only=True)
class DataArgs:
    dataset: str
    """hub id (name, name:config, name:config:split or name::split), .jsonl/.json/.parquet file (also .gz), or
    directory"""


@dataclass(kw_only=True)
class PolicyArgs:
    model: str
    """policy that answers: hub id or directory"""
    temperature: float = 1.0
    """of its sampling (Magpie: 1 to 1.25)"""
    top_p: float = 1.0
    """nucleus of its sampling (Magpie: 0.99 to 1)"""
    max_new_tokens: int = 1024
    """tokens of an answer"""


@dataclass(kw_only=True)
class JudgeArgs:
    judge: str
    """language model that judges: hub id or directory, or its name on a server"""
    judge_url: str = ""
    """address of a server with OpenAI's API, such as http://localhost:8000/v1 (empty: --judge is loaded here)"""
    judge_key: str = ""
    """name of the environment variable that holds the key for --judge-url, such as OPENAI_API_KEY (empty: no key)"""
    judge_parallel: int = 8
    """requests to --judge-url at a time, by rank"""
    judge_body: str = ""
    """JSON object merged into every request, such as {"chat_template_kwargs": {"enable_thinking": false}}; null takes a
    key out"""
    requests: str = ""
    """JSON file with requests to the judge in place of those in this script"""


@dataclass(kw_only=True)
class OptionArgs(JudgeArgs):
    min_mass: float = 0.01
    """the judge abstains where the options that it may reply with are together less likely than this"""


@dataclass(kw_only=True)
class PairArgs(OptionArgs):
    principles: str = ""
    """text file with a principle a line, one of which is drawn for every judgement (empty: the request `principle`)"""
    judgements: int = 1
    """judgements of each pair, averaged, each with its own principle and reasoning; all the same without these two"""
    reasoning: bool = False
    """the judge reasons before it chooses (greedily; at temperature 1 with several --judgements)"""
    judge_max_tokens: int = 512
    """tokens of a reasoning"""
    orders: Literal["agree", "average"] = "agree"
    """a pair whose orders prefer different answers is a tie (agree), or only if P is near 1/2 (average; Lee et al.)"""
    tie_margin: float = 0.01
    """P no further from 1/2 than this is a tie (0: only 1/2 itself)"""


@dataclass(kw_only=True)
class RunArgs:
    output_dir: str
    """where the data sets and report.json go"""
    rows: int = 0
    """rows of --dataset, drawn at random (0: all)"""
    batch_size: int = 64
    """rows worked on at a time, over all ranks, and then written"""
    tokens_per_forward: int = 16384
    """memory knob: tokens per forward pass and rank"""
    sample_tokens: int = 65536
    """memory knob of sampling: tokens in the key-value cache, by rank"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the computation (auto: bfloat16 on GPU, float32 on CPU)"""
    seed: int = 0
    """of the choice of rows and principles, and of sampling"""
    resume: bool = False
    """continue from the rows that are in --output-dir; a finished run is left as it is"""
    overwrite: bool = False
    """replace what a run wrote in --output-dir"""
    # options of the training scripts that the blocks below ask for, and options that other subcommands have
    track = gradient_checkpointing = reasoning = False
    by = scale = principles = condition = ""
    reward_model = ()


@dataclass(kw_only=True)
class LabelArgs(RunArgs, PolicyArgs, PairArgs, DataArgs):
    model: str = ""
    """policy that answers: hub id or directory (empty: the answers are in --dataset, as pairs or `completions`)"""
    k: int = 2
    """answers to each prompt that --model gives (Starling: 7)"""
    clamp: float = 0.4
    """with --reasoning, P stays between this and 1 less this (Constitutional AI: 0.4; 0: no clamp)"""
    output_dir: str = "data/label"
    """where pairs.jsonl or rankings.jsonl, and report.json, go"""


@dataclass(kw_only=True)
class ReviseArgs(RunArgs, JudgeArgs, PolicyArgs, DataArgs):
    judge: str = ""
    """model that writes critiques and revisions, named as any judge (empty: --model itself)"""
    judge_max_tokens: int = 1024
    """tokens of a critique or revision"""
    judge_temperature: float = 1.0
    """of critiques and revisions"""
    principles: str = ""
    """text file with a principle a line, one of which is drawn for every round (empty: the request `principle`)"""
    rounds: int = 4
    """revisions, one after the other (Constitutional AI: 4)"""
    keep: Literal["all", "last"] = "all"
    """which revisions become rows of sft.jsonl"""
    output_dir: str = "data/revise"
    """where sft.jsonl and report.json go"""


@dataclass(kw_only=True)
class BestOfNArgs(RunArgs, OptionArgs, PolicyArgs, DataArgs):
    model: str = ""
    """policy that answers: hub id or directory (empty: the answers are in --dataset, as pairs or `completions`)"""
    reward_model: tuple[str, ...] = ()
    """reward models, whose scores add up: hub ids or directories (empty: --judge scores)"""
    condition: str = ""
    """JSON file {kind: system prompt} that the reward models see before prompts of that kind"""
    judge: str = ""
    """language model that scores the answers, may be --model (empty: --reward-model scores)"""
    scale: Literal["ten", "points"] = "ten"
    """of the judge: expected score of 1 to 10, scaled to [-1, 1] (Lee et al.), or 0 to 5 additive points, in words"""
    judgements: int = 3
    """with --scale points: judgements of each answer, averaged (self-rewarding: 3)"""
    judge_max_tokens: int = 512
    """with --scale points: tokens of a judgement"""
    n: int = 8
    """answers to each prompt that --model gives (Llama 3: 10 to 30; self-rewarding: 4)"""
    min_spread: float = 0.0
    """prompts whose best and worst scores differ by less are left out of every file"""
    output_dir: str = "data/best_of_n"
    """where sft.jsonl, pairs.jsonl, rankings.jsonl, prompts.jsonl and report.json go"""


@dataclass(kw_only=True)
class SynthesiseArgs(RunArgs, OptionArgs, PolicyArgs):
    answer_temperature: float = 0.0
    """of the answers (Magpie: 0); --temperature and --top-p are those of the user's turns"""
    rows: int = 1000
    """conversations to write"""
    turns: int = 1
    """turns of the user in each"""
    system: str = ""
    """system prompt of the conversations: a domain, a language"""
    judge: str = ""
    """language model that rates quality and difficulty, may be --model (empty: no ratings)"""
    min_tokens: int = 1
    """filter: tokens of the user's first turn"""
    min_quality: float | None = None
    """filter: the judge's expected rating of the first turn, 1 to 10"""
    min_difficulty: float | None = None
    """filter: the same of how difficult it is"""
    reward_model: tuple[str, ...] = ()
    """reward models for --min-reward, whose scores add up: hub ids or directories"""
    min_reward: float | None = None
    """filter: the reward models' score of the last answer"""
    min_distance: float = 0.0
    """filter: squared distance of the first turn's mean hidden state, of length 1, to those of all kept before (0: only
    repeats go); compare median_distance in report.json"""
    output_dir: str = "data/magpie"
    """where raw.jsonl, sft.jsonl, prompts.jsonl and report.json go"""


@dataclass(kw_only=True)
class CompareArgs(RunArgs, PolicyArgs, PairArgs, DataArgs):
    model: tyro.conf.Positional[str]
    """policy A: hub id or directory"""
    against: tyro.conf.Positional[str]
    """policy B: hub id or directory"""
    output_dir: str = "runs/compare"
    """where comparisons.jsonl and report.json go"""


@dataclass(kw_only=True)
class AuditArgs(RunArgs, PairArgs, DataArgs):
    by: Literal["letters", "scores"] = "letters"
    """the judge's choice between two answers, or its scores of 1 to 10 for each, which best-of-n and ppo.py use
    (--principles, --judgements, --orders and --reasoning are not used)"""
    min_gap: float = 0.0
    """only pairs whose better answer's score leads by so much (0: all whose scores do not contradict the label)"""
    output_dir: str = "runs/audit"
    """where report.json goes"""


Args = (
    Annotated[LabelArgs, tyro.conf.subcommand("label", description="Compare answers: soft preferences, or rankings.")]
    | Annotated[ReviseArgs, tyro.conf.subcommand("revise", description="Critique and revise answers.")]
    | Annotated[BestOfNArgs, tyro.conf.subcommand("best-of-n", description="Score N answers to each prompt.")]
    | Annotated[SynthesiseArgs, tyro.conf.subcommand("synthesise", description="Let a model invent conversations.")]
    | Annotated[CompareArgs, tyro.conf.subcommand("compare", description="The win rate of policy A over policy B.")]
    | Annotated[AuditArgs, tyro.conf.subcommand("audit", description="Measure a judge against given labels.")]
)

if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)  # before the heavy imports, so that --help answers at once

    def interrupted(*_):
        """Ends the program on Ctrl-C at once, as finished batches are on disk; libraries catch what an exception would
        say."""
        print("\nstopped; the same command with --resume continues", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

import contextlib
import glob
import gzip
import hashlib
import http.client
import importlib.util
import inspect
import json
import math
import random
import re
import shutil
import tempfile
import time
import types
import urllib.error
import urllib.request
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import lru_cache, partial
from itertools import accumulate, combinations, groupby
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

# ------------------------------------------------------------------------------------------------------ the method


def preference(first, second):
    """P(a > b) (Lee et al., section 2.1) from a judge's log-probabilities of replying A and B: first has a as A, second
    has b as A. first, second [..., 2]; returns [...]."""
    return (first.softmax(-1)[..., 0] + second.softmax(-1)[..., 1]) / 2


def verdict(first: float, second: float, orders: str = "agree", margin: float = 0.01) -> str:
    """a, b, tie or abstain. first, second: P(a > b) of each order, NaN where the judge abstains."""
    p = (first + second) / 2
    if math.isnan(p):
        return "abstain"
    if orders == "agree" and (first - 0.5) * (second - 0.5) <= 0:  # the position decided
        return "tie"
    if abs(p - 0.5) <= margin:
        return "tie"
    return "a" if p > 0.5 else "b"


def ranking_scores(wins: list) -> list:
    """Each answer's mean P against the others (Starling). wins [K][K]: P(i > j), NaN where unknown and on the diagonal.

    Means over different rivals cannot be compared: the answers of which most is unknown are left out (NaN), until every
    P among the rest is known."""
    kept = [*range(len(wins))]

    def unknown(i: int) -> int:
        return sum(math.isnan(wins[i][j]) for j in kept if j != i)

    while any(map(unknown, kept)):
        kept.remove(max(kept, key=unknown))
    scores = [math.nan] * len(wins)
    for i in kept if len(kept) > 1 else ():
        scores[i] = sum(wins[i][j] for j in kept if j != i) / (len(kept) - 1)
    return scores


def interval(outcomes: list) -> tuple:
    """Mean of outcomes in [0, 1], None of nothing, and both ends of its 95% interval (Wilson's score)."""
    if not outcomes:
        return None, 0.0, 1.0
    n, mean, z = len(outcomes), sum(outcomes) / len(outcomes), 1.96
    centre, half = mean + z**2 / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return mean, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def main(args: Args):
    # 0. options, ranks, the output directory
    check_options(args)
    device, dtype = setup_distributed(args)
    # further options that change no result; --judge names the model, wherever it is served
    FREE_OPTIONS.update(("batch_size", "sample_tokens", "judge_url", "judge_key", "judge_parallel"))
    out, _, signature = open_run(args, *input_names(args))

    # 1. the policies that answer, whoever judges, and the rows that all of them can read
    run = load_run(args, device, dtype)
    items = load_items(run)
    done = load_records(args, out, signature)  # {row number: record}, of an interrupted run

    # 2. for each batch of rows: answers, judgements, and what they give, on disk before the next batch begins
    work, report_on, names = {
        LabelArgs: (label, judge_report, ["rankings.jsonl" if run.ranks else "pairs.jsonl"]),
        ReviseArgs: (revise, None, ["sft.jsonl"]),
        BestOfNArgs: (best_of_n, scores_report, ["sft.jsonl", "pairs.jsonl", "rankings.jsonl", "prompts.jsonl"]),
        SynthesiseArgs: (synthesise, filter_conversations, ["sft.jsonl", "prompts.jsonl", "raw.jsonl"]),
        CompareArgs: (compare, win_rate_report, ["comparisons.jsonl"]),
        AuditArgs: (compare_answers, judge_report, []),
    }[type(args)]
    for batch in batches(args, items, done):
        work(run, batch[RANK::WORLD])
        save_records(out, from_all_ranks([item.record() for item in batch[RANK::WORLD]]), done)

    # 3. the data sets, and a report
    records, counts = [done[item.number] for item in items], Counter()
    summary = report_on(run, records) if report_on else {}
    for record in records:
        counts.update(record["counts"])
    files = {name: [row for record in records for row in record["rows"].get(name, [])] for name in names}
    finish(out, files, dict(rows=len(records), **counts) | summary)


# ------------------------------------------------------------------------------------------------ rlaif.py alone

TALK = "\n\n<conversation>\n{talk}\n</conversation>\n\n"
PAIR = "Here is a conversation, and two answers to its last message." + TALK
PAIR += "<answer A>\n{a}\n</answer A>\n\n<answer B>\n{b}\n</answer B>\n\n"
ANSWER = "Here is a conversation, and an answer to its last message." + TALK + "<answer>\n{answer}\n</answer>\n\n"
PROMPT = "Here is what a user wrote to an assistant.\n\n{talk}\n\n"
REQUESTS = dict(  # what judges are asked; --requests replaces any of them
    principle="is more helpful, honest and harmless",
    compare=PAIR + "Which answer {principle}? Reply with the letter A or B only.",
    reason=PAIR + "Which answer {principle}? Weigh them step by step, in a few sentences, before you decide.",
    conclude="Then which answer {principle}? Reply with the letter A or B only.",
    critique=ANSWER + "What keeps this answer from being one that {principle}? Be specific and brief.",
    revise="Write that answer anew, so that your criticism no longer applies. Reply with the new answer only.",
    score=ANSWER + "How good is this answer, from 1 (very bad) to 10 (very good)? Reply with the number only.",
    points=ANSWER
    + """Give this answer points, which add up: one if it has to do with what was asked; another if it deals with a
substantial part of it; another if it answers the essentials in a useful way; another if it is clear, complete, well
ordered and written from an assistant's point of view; a fifth if an expert could hardly improve on it for this user.
Explain your points in under 100 words, and end with "Score: " and their sum.""",
    quality=PROMPT + "How clear, specific and well put is it, from 1 to 10? Reply with the number only.",
    difficulty=PROMPT + "How hard is it to answer well, from 1 to 10? Reply with the number only.",
)
SCORES = [str(score) for score in range(1, 11)]  # what a judge replies that is asked for a score
DATA_FILES = ("pairs.jsonl", "rankings.jsonl", "sft.jsonl", "prompts.jsonl", "raw.jsonl", "comparisons.jsonl")


@dataclass
class Item:
    """A row of --dataset, and what comes of it.

    prompt: text or messages; responses: texts or lists of messages; scores: of the responses, or None; gap: by how much
    chosen leads rejected, or None; columns: what else the row holds; asked: the prompt's Row for each policy; pairs:
    the indices of responses to compare (None: every two)."""

    number: int
    prompt: str | list = ""
    responses: list = ()
    scores: list | None = None
    gap: float | None = None
    columns: dict | None = None
    kind: str = ""
    asked: list = ()
    pairs: list | None = None

    def __post_init__(self):
        # rows by file; what the report counts; one dict for each pair; the worst, the mean and the best score
        self.rows, self.counts, self.comparisons, self.spread = {}, Counter(), [], []

    def record(self) -> dict:
        """What is kept of it on disk."""
        return {name: getattr(self, name) for name in ("number", "rows", "counts", "comparisons", "spread")}


# label: soft preferences, or rankings
def label(run, batch: list):
    """pairs.jsonl or rankings.jsonl. What cannot be told apart is counted, not guessed."""
    # 1. the answers: those of the data set, or of the policy, no two alike and none cut off
    args = run.args
    for item in batch:
        item.counts.update(labelled=0, nothing_to_compare=0)
    for item, answers in zip(batch, policy_answers(run, 0, batch, args.k) if run.policies else ()):
        ended, usable = sum(has_ended for _, has_ended in answers), usable_answers(answers)
        texts = dict.fromkeys(usable)
        item.responses, item.scores = [as_response(item.prompt, text) for text in texts], None
        item.counts.update(cut_off=args.k - ended, empty=ended - len(usable), repeated=len(usable) - len(texts))
    # 2. every two of them, compared
    compare_answers(run, batch)
    low = args.clamp if args.reasoning else 0.0
    for item in batch:
        wins = [[math.nan] * len(item.responses) for _ in item.responses]
        for c in item.comparisons:
            p = min(max(c["p"], low), 1 - low) if c["verdict"] != "abstain" else math.nan
            wins[c["i"]][c["j"]], wins[c["j"]][c["i"]] = p, 1 - p
        # 3. the pair, or the ranking
        row = dict(item.columns, prompt=item.prompt, judge=run.judge.name)
        row |= dict(policy=args.model) if args.model else {}
        if not item.comparisons:
            item.counts["nothing_to_compare"] += 1
        elif not run.ranks:
            (c,) = item.comparisons
            if c["verdict"] in ("a", "b"):
                best, worst = (0, 1) if c["verdict"] == "a" else (1, 0)
                row |= dict(chosen=item.responses[best], rejected=item.responses[worst], probability=wins[best][worst])
                item.rows["pairs.jsonl"] = [row | dict(principles=c["principles"])]
        else:
            scores = ranking_scores(wins)
            kept = [i for i, score in enumerate(scores) if not math.isnan(score)]
            row |= dict(completions=[item.responses[i] for i in kept], scores=[scores[i] for i in kept])
            if len({*row["scores"]}) > 1:
                item.rows["rankings.jsonl"] = [row]
            else:
                item.counts["all scores equal" if kept else "all pairs abstained"] += 1
        item.counts["labelled"] += len(item.rows)


# compare: the win rate of one policy over another
def compare(run, batch: list):
    """comparisons.jsonl: an answer of each policy, and P that the first is better."""
    for item, (a,), (b,) in zip(batch, *(policy_answers(run, which, batch, 1) for which in (0, 1))):
        item.responses, item.scores = [a[0], b[0]], None
        item.counts.update(identical=int(a[0] == b[0]), a_cut_off=int(not a[1]), b_cut_off=int(not b[1]))
    compare_answers(run, batch)
    for item in batch:
        (a, b), (c,) = item.responses, item.comparisons
        row = dict(item.columns, prompt=item.prompt, a=a, b=b, verdict=c["verdict"], judge=run.judge.name)
        item.rows["comparisons.jsonl"] = [row | dict(probability=None if math.isnan(c["p"]) else c["p"])]


def win_rate_report(run, records: list) -> dict:
    """The win rate, a tie being half a win, with its interval; and what the judge is worth."""
    args, comparisons, kinds = run.args, [c for record in records for c in record["comparisons"]], {}
    for c in comparisons:
        if c["verdict"] != "abstain":
            kinds.setdefault(c["kind"], []).append(dict(a=1.0, b=0.0, tie=0.5)[c["verdict"]])
    every = [outcome for outcomes in kinds.values() for outcome in outcomes]
    win_rate, low, high = interval(every)
    report = dict(win_rate=win_rate, low=low, high=high, wins=every.count(1.0), losses=every.count(0.0))
    for i, name in enumerate("ab"):
        report[f"{name}_characters"] = mean_of([c["lengths"][i] for c in comparisons])
    ends = ("win_rate", "low", "high")
    report["kinds"] = {kind: dict(zip(ends, interval(kinds[kind]))) for kind in sorted(kinds)}
    what = f"wins {win_rate:.3f} ({low:.3f} to {high:.3f}) of {len(every)}, ties half" if every else ""
    what = what or f"none of the {len(records)} pairs could be judged; see the abstentions"
    print0(f"{args.model} against {args.against}: {what}")
    return report | judge_report(run, records)


# comparisons: all of audit, and what label and compare do with their answers
def compare_answers(run, batch: list):
    """Has every two responses of an item judged, or its pairs: item.comparisons.

    Each is one of `compare_pairs` (a: response i, b: response j) with its verdict and what `judge_report` counts.
    given, sign, longer: 1 if a is known to be the better answer, is judged so, is longer; -1 if b; 0 if neither."""
    args, differing, asked = run.args, [], []
    for item in batch:
        texts = [text_of(response) for response in item.responses]
        for i, j in combinations(range(len(texts)), 2) if item.pairs is None else item.pairs:
            c = dict(i=i, j=j, first=0.5, second=0.5, votes=[0.5], principles=[], abstained=[], kind=item.kind)
            c["lengths"] = [len(texts[i]), len(texts[j])]
            c["longer"] = sign(len(texts[i]) - len(texts[j]))
            c["given"] = sign(item.scores[i] - item.scores[j]) if item.scores else 0
            item.comparisons.append(c)
            if texts[i] != texts[j]:  # else a tie
                differing.append(c)
                asked.append((f"{item.number}-{i}-{j}", item.prompt, texts[i], texts[j]))
    for c, heard in zip(differing, (compare_scores if args.by == "scores" else compare_pairs)(run, asked)):
        c.update(heard)
    for c in (c for item in batch for c in item.comparisons):
        c["p"] = (c["first"] + c["second"]) / 2
        c["verdict"] = verdict(c["first"], c["second"], args.orders, args.tie_margin)
        c["sign"] = dict(a=1, b=-1).get(c["verdict"], 0)


def compare_pairs(run, pairs: list) -> list:
    """The judge's comparisons of pairs (key, prompt, a, b), as dicts.

    first, second: P(a > b) with a as A, and with b as A; votes: P(a > b) of each judgement; principles: one for each
    judgement; abstained: the reasons of abstentions. Swapping a and b changes nothing: they are asked in the order of
    the alphabet."""
    args, asked, keys = run.args, [], []
    J = args.judgements
    for key, prompt, a, b in pairs:
        low, high = sorted((a, b))
        for j in range(J):
            principle = random.Random(f"{args.seed}-{key}-{j}").choice(run.principles)
            for order, (one, other) in enumerate(((low, high), (high, low))):
                asked.append(dict(talk=talk_of(prompt), principle=principle, a=one, b=other))
                keys.append(f"reason-{key}-{j}-{order}")
    if args.reasoning:
        talks = [as_messages(fill(run.requests["reason"], **parts), "user") for parts in asked]
        reasonings = run.judge.write(talks, keys, float(J > 1))
        for talk, (text, _), parts in zip(talks, reasonings, asked):
            talk += as_messages(text) + as_messages(fill(run.requests["conclude"], **parts), "user")
    else:
        talks = [fill(run.requests["compare"], **parts) for parts in asked]
    logps, reasons = run.judge.ask(talks, ["A", "B"])
    low_first, high_first = logps.view(len(pairs), J, 2, 2).unbind(2)  # [n, J, letter] each
    votes = preference(low_first, high_first)  # P(low > high) [n, J], NaN where either order has none
    orders = torch.stack([low_first.softmax(-1)[..., 0], high_first.softmax(-1)[..., 1]])  # [2, n, J]
    orders = orders.where(~votes.isnan(), math.nan).nanmean(-1)
    found = []
    for i, (_, _, a, b) in enumerate(pairs):
        (first, second), own = orders[:, i].tolist(), votes[i].tolist()
        if a > b:  # a is the one called high
            first, second, own = 1 - second, 1 - first, [1 - p for p in own]
        mine = slice(2 * J * i, 2 * J * (i + 1))
        principles = [parts["principle"] for parts in asked[mine][::2]]
        abstained = sorted({*reasons[mine]} - {""})
        found.append(dict(first=first, second=second, votes=own, principles=principles, abstained=abstained))
    return found


def compare_scores(run, pairs: list) -> list:
    """`compare_pairs` by the judge's score of each answer alone: P is 1 for the higher; no orders, no principles."""
    parts = [about(prompt, text) for _, prompt, a, b in pairs for text in (a, b)]
    scores, reasons = judge_scores(run, "score", parts)
    found = []
    for i in range(0, len(scores), 2):
        a, b = scores[i : i + 2]
        p = math.nan if math.isnan(a + b) else (1 + sign(a - b)) / 2
        found.append(dict(first=p, second=p, votes=[p], abstained=sorted({*reasons[i : i + 2]} - {""})))
    return found


def judge_report(run, records: list) -> dict:
    """What the comparisons of `compare_answers` are worth."""
    comparisons = [c for record in records for c in record["comparisons"]]
    heard = [c for c in comparisons if c["verdict"] != "abstain"]
    decided = [c for c in heard if c["verdict"] != "tie"]
    by_place = [c for c in heard if (c["first"] - 0.5) * (c["second"] - 0.5) < 0]
    uneven = [c for c in decided if c["longer"]]
    report = dict(comparisons=len(comparisons), decided=len(decided), ties=len(heard) - len(decided))
    report["abstentions"] = len(comparisons) - len(heard)
    report |= Counter(f"abstained: {', '.join(c['abstained'])}" for c in comparisons if c["verdict"] == "abstain")
    report["same_position"] = len(by_place) / len(heard) if heard else None
    report["first_position"] = mean_of([c["first"] > 0.5 for c in by_place])
    report["prefers_longer"] = mean_of([c["sign"] == c["longer"] for c in uneven])
    agreeing = []  # of every two judgements of a pair
    for c in heard:
        agreeing += [x == y for x, y in combinations([p > 0.5 for p in c["votes"] if not math.isnan(p)], 2)]
    if agreeing:
        report["consistency"] = mean_of(agreeing)
    if not any(c["given"] for c in comparisons):
        return report
    report["given_longer"] = mean_of([c["given"] == c["longer"] for c in uneven if c["given"]])
    report["agreement"] = mean_of([c["sign"] == c["given"] for c in decided if c["given"]])
    # ties too; P = 1/2 counts half
    report["agreement_by_mean"] = mean_of([(1 + c["given"] * sign(c["p"] - 0.5)) / 2 for c in heard if c["given"]])
    report["kinds"] = {}
    for c in sorted(comparisons, key=lambda c: c["kind"]):
        if c["given"]:
            counts = report["kinds"].setdefault(c["kind"], dict(agree=0, disagree=0, tie=0, abstain=0))
            agrees = "agree" if c["sign"] == c["given"] else "disagree"
            counts[agrees if c["sign"] else c["verdict"]] += 1
    return report


def sign(value: float) -> int:
    """1, 0 or -1."""
    return (value > 0) - (value < 0)


def mean_of(values: list) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


# revise: critique and revision
def revise(run, batch: list):
    """sft.jsonl: every revision of an answer, or the last."""
    # 1. the first answers: the policy's, unless the data set has one; what was cut off, or is empty, is not revised
    args, answers = run.args, {}  # by the row's number, as they read now
    unanswered = [item for item in batch if len(item.responses) != 1]
    drawn = dict(zip((item.number for item in unanswered), policy_answers(run, 0, unanswered, 1)))
    for item in batch:
        (answer,) = drawn.get(item.number) or [(item.responses[0], True)]
        if usable_answers([answer]):
            answers[item.number] = text_of(answer[0])
        item.counts.update(cut_off_or_empty=int(item.number not in answers), revisions=0)
    originals, batch = dict(answers), [item for item in batch if item.number in answers]
    for i in range(args.rounds):
        # 2. a critique by a principle that is drawn anew
        critique_talks, principles = [], []
        for item in batch:
            principles.append(random.Random(f"{args.seed}-{item.number}-{i}").choice(run.principles))
            parts = about(item.prompt, after_space(item.prompt, answers[item.number]))
            critique_talks.append(fill(run.requests["critique"], principle=principles[-1], **parts))
        keys = [f"critique-{item.number}-{i}" for item in batch]
        critiques = [text_of(text) for text, _ in run.judge.write(critique_talks, keys, args.judge_temperature)]
        # 3. a revision, which takes the answer's place
        talks = []
        for talk, critique, principle in zip(critique_talks, critiques, principles):
            request = fill(run.requests["revise"], principle=principle)
            talks.append([*as_messages(talk, "user"), *as_messages(critique), *as_messages(request, "user")])
        revisions = run.judge.write(talks, [f"revision-{item.number}-{i}" for item in batch], args.judge_temperature)
        for item, principle, critique, (text, has_ended) in zip(batch, principles, critiques, revisions):
            text = text_of(text)  # its thinking is about a critique that the data does not show
            item.counts["revisions"] += 1
            if not (has_ended and text):
                item.counts["unusable"] += 1
                continue
            item.counts["unchanged" if text == answers[item.number] else "changed"] += 1
            answers[item.number] = text
            completion = as_response(item.prompt, after_space(item.prompt, text))
            row = dict(item.columns, prompt=item.prompt, completion=completion, principle=principle, critique=critique)
            row |= dict(round=i + 1, original=originals[item.number], judge=run.judge.name)
            earlier = item.rows.get("sft.jsonl", []) if args.keep == "all" else []
            item.rows["sft.jsonl"] = [*earlier, row]


# best-of-n: the best and the worst of N answers
def best_of_n(run, batch: list):
    """The best answers, the best with the worst, all of them, and the prompts with the spread of their scores."""
    # 1. N answers to each prompt, those that came to an end
    args, asked, scored = run.args, [], {item.number: [] for item in batch}
    if run.policies:
        answers = policy_answers(run, 0, batch, args.n)
    else:
        answers = [[(as_messages(r)[0]["content"], True) for r in item.responses] for item in batch]
    for item, drawn in zip(batch, answers):
        asked += [(item, k, text) for k, text in enumerate(usable_answers(drawn))]
        cut_off_or_empty = len(drawn) - len(usable_answers(drawn))
        item.counts.update(kept=0, pairs=0, cut_off_or_empty=cut_off_or_empty, unscored=0, repeated=0)
    # 2. their scores, by reward models or by the judge
    read = [(item, final_answer(item.prompt, text)) for item, _, text in asked]
    if run.reward_models:
        found = reward_scores(run, read)
    elif args.scale == "ten":
        found = judge_scores(run, "score", [about(item.prompt, text) for item, text in read])
    else:
        keys = [f"points-{item.number}-{k}" for item, k, _ in asked]
        found = point_scores(run, keys, [about(item.prompt, text) for item, text in read])
    for (item, _, text), score, reason in zip(asked, *found):
        if reason:
            item.counts.update(["unscored", f"unscored: {reason}"])
        else:
            scored[item.number].append((text, score))
    # 3. what they give
    scored_by = run.judge.name if run.judge else ", ".join(args.reward_model)
    for item in batch:
        scores = {}
        for text, score in scored[item.number]:  # of answers that are alike, the first
            scores.setdefault(text, score)
        if not scores:
            item.counts["without answers"] += 1
            continue
        item.counts["repeated"] += len(scored[item.number]) - len(scores)
        best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
        low, high = scores[worst], scores[best]
        item.spread = [low, mean_of([score for _, score in scored[item.number]]), high]
        if high - low < args.min_spread:
            item.counts["below --min-spread"] += 1
            continue
        item.counts["kept"] += 1
        base = dict(item.columns, prompt=item.prompt, policy=args.model or "given", scored_by=scored_by)
        responses = {text: as_response(item.prompt, text) for text in scores}
        item.rows["sft.jsonl"] = [dict(base, completion=responses[best], score=high)]
        item.rows["prompts.jsonl"] = [dict(item.columns, prompt=item.prompt, spread=high - low)]
        if high == low:
            item.counts["all alike"] += 1
            continue
        item.counts["pairs"] += 1
        pair = dict(chosen=responses[best], rejected=responses[worst], score_chosen=high, score_rejected=low)
        item.rows["pairs.jsonl"] = [base | pair]
        ranking = dict(completions=[*responses.values()], scores=[*scores.values()])
        item.rows["rankings.jsonl"] = [base | ranking]


def scores_report(run, records: list) -> dict:
    """The scores of the worst, the mean and the best answers."""
    spreads = [record["spread"] for record in records if record["spread"]]
    names = ("score_worst", "score_mean", "score_best")
    report = {name: mean_of([spread[i] for spread in spreads]) for i, name in enumerate(names)}
    if run.policies:  # nats between the best of n and the policy
        report["kl_bound"] = math.log(run.args.n) - (run.args.n - 1) / run.args.n
    return report


def reward_scores(run, answers: list) -> tuple:
    """The sum of the reward models' scores of answers, pairs (Item, text), NaN where a chat template refuses one; and
    the reasons why there are none."""
    totals, reasons = torch.zeros(len(answers)), [""] * len(answers)
    for model, tokenizer in run.reward_models:
        rows, indices, refusals = read_all(partial(reward_row, run, model, tokenizer), answers)
        scores = score_rows(model, rows, run.args, run.device, shared=False)
        found = torch.full((len(answers),), math.nan)
        found[indices] = torch.cat([torch.zeros(0, device=run.device), *scores]).cpu()
        if not found[indices].isfinite().all():
            fail("--reward-model: a score is not finite: the weights are damaged, or try --dtype float32")
        totals += found
        reasons = [reason or refusal for reason, refusal in zip(reasons, refusals)]
    return totals.tolist(), reasons


def reward_row(run, model, tokenizer, answer: tuple):
    """The Row that a reward model reads of an answer, (Item, text). Raises Drop."""
    item, text = answer
    prompt = with_condition(item.prompt, run.conditions.get(item.kind, ""))
    return scored_row(tokenizer, prompt, without_special(tokenizer, text), item.columns or {}, positions(model))


def read_all(read, values: list) -> tuple:
    """What read(value) gives for the values that it can read, the indices of these, and for every value the reason why
    it cannot be read."""
    rows, indices, reasons = [], [], [""] * len(values)
    for i, value in enumerate(values):
        try:
            rows.append(read(value))
            indices.append(i)
        except Drop as drop:
            reasons[i] = str(drop)
    return rows, indices, reasons


def judge_scores(run, request: str, parts: list) -> tuple:
    """The judge's expected scores, 1 to 10 scaled to [-1, 1], of what fills the request, NaN for an abstention; and the
    reasons of the abstentions."""
    logps, reasons = run.judge.ask([fill(run.requests[request], **part) for part in parts], SCORES)
    return expected_score(logps.softmax(-1)).tolist(), reasons


def point_scores(run, keys: list, parts: list) -> tuple:
    """The means of several additive judgements in words of what fills the request, as `judge_scores`; one that names no
    score does not count."""
    J = run.args.judgements
    talks = [fill(run.requests["points"], **part) for part in parts for _ in range(J)]
    texts = run.judge.write(talks, [f"{key}-{j}" for key in keys for j in range(J)], 1.0)
    scores = torch.tensor([points(text) for text, _ in texts]).view(len(parts), J).nanmean(1).tolist()
    return scores, ["no judgement names a score" if math.isnan(score) else "" for score in scores]


def points(text: str) -> float:
    """The sum, 0 to 5, with which an additive judgement ends (self-rewarding); NaN if there is none."""
    # "Score (out of 5): 4" is 4; "Score: 1 + 1 + 0 = 2" is 2, and a sum without its result is none
    text = re.sub(r"(?i)(score)[^\w(]{0,4}\((?=\D|\d+ ?(?:-|–|to))[^)\n]*\)", r"\1", after_thinking(text))
    sum_of = r"(?:[\d.+ ]+=[^\w-]{0,12})?"
    found = re.findall(rf"(?i)score[^\w-]{{0,12}}{sum_of}(-?\d+(?:\.\d+)?)(?![\d.]* *(?:\([^)\n]*\))? *\+)", text)
    return float(found[-1]) if found and 0 <= float(found[-1]) <= 5 else math.nan


# synthesise: conversations that a model invents
def synthesise(run, batch: list):
    """raw.jsonl: conversations, with their ratings."""
    args, (model, tokenizer) = run.args, run.policies[0]
    system = as_messages(args.system, "system") if args.system else []
    before, after = around_user(tokenizer, system)
    ends = sorted({*stop_ids(model, tokenizer), *special_tokens(tokenizer)})  # a user's turn ends at any of them
    missing = dict(first="", whole=True, dropped="", quality=None, difficulty=None, reward=None)
    talks = [dict(missing, number=item.number, messages=system) for item in batch]
    for item, talk in zip(batch, talks):
        item.rows["raw.jsonl"], item.counts["written"] = [talk], 1

    def user_row(talk: dict) -> Row:  # a space before the user's words belongs to the first of them
        opening = around_user(tokenizer, talk["messages"])[0].rstrip(" ")
        return prompt_row(model, text_ids(tokenizer, opening), "", args.max_new_tokens)

    def answer_row(talk: dict) -> Row:
        ids = prompt_ids(tokenizer, talk["messages"], {})
        return prompt_row(model, ids, talk["messages"], args.max_new_tokens)

    for turn in range(args.turns):
        # 1. a user's turn, from what the chat template writes before one
        rows, talks = readable(user_row, talks)
        keys = [f"user-{turn}-{talk['number']}-0" for talk in talks]
        wrote = write_texts(run.policies[0], rows, keys, args, args.max_new_tokens, args.temperature, args.top_p, ends)
        for talk, (text, has_ended) in zip(talks, wrote):
            if after and after in text:
                text, has_ended = text.partition(after)[0], True
            text = text.removeprefix(" ") if before.endswith(" ") else text
            talk["messages"] = [*talk["messages"], *as_messages(text, "user")]
            talk["first"] = talk["first"] if turn else text
            talk["whole"] = talk["whole"] and has_ended and bool(text.strip())
        # 2. the answer to it
        rows, talks = readable(answer_row, talks)
        keys = [f"answer-{turn}-{talk['number']}-0" for talk in talks]
        wrote = write_texts(run.policies[0], rows, keys, args, args.max_new_tokens, args.answer_temperature)
        for talk, (text, has_ended) in zip(talks, wrote):
            talk["messages"] = [*talk["messages"], *as_messages(text.strip())]
            talk["whole"] = talk["whole"] and has_ended and bool(text_of(text))
    # 3. ratings of the first turn, and the reward of the last answer
    for name in ("quality", "difficulty") if run.judge else ():
        scores, _ = judge_scores(run, name, [dict(talk=talk["first"]) for talk in talks])
        for talk, score in zip(talks, scores):
            talk[name] = None if math.isnan(score) else score * 4.5 + 5.5
    if run.reward_models:
        read = [(Item(r["number"], r["messages"][:-1]), text_of(r["messages"][-1:])) for r in talks]
        for talk, reward in zip(talks, reward_scores(run, read)[0]):
            talk["reward"] = None if math.isnan(reward) else reward


def around_user(tokenizer, messages: list) -> tuple:
    """What the chat template writes before the user's next words, and the first word of what it writes after them."""
    mark = "MARKTHEPLACE"
    text = render_text(tokenizer, [*messages, dict(role="user", content=mark)])
    before, _, after = text.partition(mark)
    return before, (after.split() or [""])[0]


def readable(read, talks: list) -> tuple:
    """What read(talk) gives for the conversations that can be read, and these; the others are dropped."""
    rows, indices, reasons = read_all(read, talks)
    for talk, reason in zip(talks, reasons):
        talk["dropped"] = reason
    return rows, [talks[i] for i in indices]


def filter_conversations(run, records: list) -> dict:
    """sft.jsonl and prompts.jsonl: what passes the filters, each conversation counted under the first that it fails."""
    args, (model, tokenizer) = run.args, run.policies[0]
    talks, seen, passed, rows = [record["rows"]["raw.jsonl"][0] for record in records], set(), [], []
    for record, talk in zip(records, talks):
        # 4. the filters by text and by rating
        ids = text_ids(tokenizer, talk["first"])
        texts = [message["content"] for message in talk["messages"]]
        failed = {
            "empty or cut off": not talk["whole"],
            "special token in the text": any(without_special(tokenizer, text) != text for text in texts),
            "repeated": talk["first"] in seen,
            "--min-tokens": len(ids) < args.min_tokens,
        }
        for name in ("quality", "difficulty", "reward"):
            value, least = talk[name], getattr(args, f"min_{name}")
            failed[f"--min-{name}"] = least is not None and (value is None or value < least)
        talk["dropped"] = talk["dropped"] or next((name for name, has_failed in failed.items() if has_failed), "")
        if not talk["dropped"]:
            seen.add(talk["first"])
            # the last token once more, so that its own hidden state counts
            rows.append(Row(ids[:1], [[*ids[1:], ids[-1]]], [[True] * len(ids)], dict(index=len(passed))))
            passed.append(record)
    # 5. near repeats, by the mean hidden state of the first turn
    vectors = mean_hidden_states(run, model, rows) if passed else torch.zeros(0, 1)
    kept = keep_distant(vectors, args.min_distance) if args.min_distance else range(len(passed))
    for i, record in enumerate(passed):
        (talk,) = record["rows"]["raw.jsonl"]
        if i in kept:
            ratings = dict(quality=talk["quality"], reward=talk["reward"])
            record["rows"]["sft.jsonl"] = [dict(messages=talk["messages"], policy=args.model, **ratings)]
            record["rows"]["prompts.jsonl"] = [dict(prompt=talk["messages"][:-1])]
        else:
            talk["dropped"] = "--min-distance"
    median_distance = nearest(vectors).median().item() if len(passed) > 1 else None
    counts = Counter(f"dropped: {talk['dropped']}" for talk in talks if talk["dropped"])
    return dict(kept=len(kept), median_distance=median_distance, **counts)


def mean_hidden(self, inputs, source, lengths: list, last=None):
    """The mean hidden state at the positions that predict each response, of length 1 [R, d]. A method of the model.

    inputs, source: as `pack` and `pad` return them; lengths: trained tokens of each response."""
    hidden = self.base_model(**inputs).last_hidden_state.flatten(0, 1)[source].float()  # [N, d]
    return F.normalize(torch.stack([part.mean(0) for part in hidden.split(lengths)]), dim=-1)


@torch.no_grad()
def mean_hidden_states(run, model, rows: list) -> torch.Tensor:
    """`mean_hidden` of rows that know their index [N, d], the same on every rank; each computes its part."""
    vectors = torch.zeros(len(rows), model.config.get_text_config().hidden_size, device=run.device)
    model.eval()
    for group, weight, inputs, _ in forwards(rows[RANK::WORLD], run.args, model, run.device, spare=rows[0]):
        found = model.mean_hidden(**inputs, lengths=[len(row.responses[0]) for row in group])
        if weight:
            vectors[[row.extra["index"] for row in group]] = found
    return over_ranks(vectors)


def nearest(vectors) -> torch.Tensor:
    """Squared distance of each vector to its nearest neighbour (Magpie), infinity if it has none. [N, d]; returns
    [N]."""
    found = []
    for i in range(0, len(vectors), 256):  # never all N x N at once
        distance = torch.cdist(vectors[i : i + 256], vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
        distance[:, i : i + 256].fill_diagonal_(math.inf)
        found.append(distance.amin(1))
    return torch.cat(found)


def keep_distant(vectors, min_distance: float) -> list:
    """The indices of vectors [N, d] further than a squared distance from all kept before them: of a cluster, the
    earliest. Takes N x N time."""
    indices, kept = [], torch.empty_like(vectors)
    for i, vector in enumerate(vectors):
        if not indices or (kept[: len(indices)] - vector).square().sum(1).min() > min_distance:
            kept[len(indices)] = vector
            indices.append(i)
    return indices


# answers
def write_texts(writer, rows: list, keys: list, args, length: int, temperature: float, top_p=1.0, stops=None) -> list:
    """Answers of a writer (model, tokenizer) to the prompts of rows, len(keys) / len(rows) to each: pairs (text,
    whether it came to an end). Each is a function of --seed and its key."""
    model, tokenizer = writer
    stops, numbers = stops or stop_ids(model, tokenizer), uniform_numbers(args.seed, 0, keys, length)
    n = len(keys) // max(1, len(rows))
    answers, _ = sample_answers(model, [row.prompt for row in rows], numbers, stops, args, temperature, top_p)
    texts = answer_texts(tokenizer, [row for row in rows for _ in range(n)], answers, stops)
    return [(text, ids[-1] in stops) for text, ids in zip(texts, answers)]


def policy_answers(run, which: int, items: list, n: int) -> list:
    """n answers of a policy to each item: lists of pairs (text, whether it came to an end)."""
    args, rows = run.args, [item.asked[which] for item in items]
    keys = [f"answer-{item.number}-{k}" for item in items for k in range(n)]
    found = write_texts(run.policies[which], rows, keys, args, args.max_new_tokens, args.temperature, args.top_p)
    answers = []
    for i, item in enumerate(items):
        strip = str.rstrip if continues_text(item.prompt) else str.strip
        answers.append([(strip(text), has_ended) for text, has_ended in found[i * n : (i + 1) * n]])
    return answers


def prompt_row(model, ids: list, prompt, length: int):
    """The Row of a prompt, of which nothing is cut. Raises Drop where so many new tokens have no room behind it."""
    if len(ids) + length > positions(model):
        raise Drop("too long: no room for an answer")
    return Row(ids, [[]], [[]], dict(prompt=prompt))


def usable_answers(answers: list) -> list:
    """Of pairs (text, whether it came to an end), the texts that did, and that say something besides their thinking."""
    return [text for text, has_ended in answers if has_ended and text_of(text)]


def text_of(response) -> str:
    """A response, text or messages, as the judge reads it: without its thinking."""
    return "\n".join(after_thinking(message["content"]) for message in as_messages(response)).strip()


def as_response(prompt, text: str):
    """A text in the form of its prompt: text or messages."""
    return as_messages(text) if isinstance(prompt, list) else text


def after_space(prompt, text: str) -> str:
    """A text as it follows its prompt: after a space, if it goes on after a word (HH-RLHF's "Assistant:", or an answer
    that has begun)."""
    begun = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return " " * (continues_text(prompt) and bool(begun[-1:].strip())) + text


def positions(model) -> int:
    """Tokens that a model can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20


# requests: what the judge reads
def fill(request: str, **parts) -> str:
    """A request with its {parts} filled in, all at once, so that braces in a part stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), request)


def about(prompt, text: str) -> dict:
    """The parts of a request about one answer."""
    return dict(talk=talk_of(prompt), answer=text.strip(), conversation=conversation_text(prompt, text))


def talk_of(prompt) -> str:
    """A prompt as the judge reads it."""
    if isinstance(prompt, str):
        return prompt
    return conversation_text(prompt, "").removesuffix("assistant: ").rstrip("\n")


def conversation_text(prompt, answer: str) -> str:
    """A prompt and an answer as the judge reads them: no system prompt, and the speakers' names if there are several
    turns."""
    if isinstance(prompt, str):
        return prompt + answer
    turns = [message for message in prompt if message["role"] != "system"]
    if len(turns) == 1:
        return f"{turns[0]['content']}\n{answer}"
    talk = "\n".join(f"{message['role']}: {message['content']}" for message in turns)
    return talk + answer if turns and turns[-1]["role"] == "assistant" else f"{talk}\nassistant: {answer}"


def load_requests(args) -> dict:
    """REQUESTS, with those of --requests in their places."""
    own = load_json("--requests", args.requests) if args.requests else {}
    for name, text in own.items():
        if name not in REQUESTS or not isinstance(text, str):
            fail(f"--requests {args.requests}: {name} must be one of {', '.join(REQUESTS)}, and text")
        needed = set(re.findall(r"\{(talk|answer|a|b)\}", REQUESTS[name])) - set(re.findall(r"\{(\w+)\}", text))
        shows_both = "{answer}" in REQUESTS[name] and "{conversation}" in text
        if needed and not shows_both:
            missing = ", ".join(f"{{{part}}}" for part in sorted(needed))
            fail(f"--requests {args.requests}: {name} has no {missing}, so that nothing could be judged by it")
    return REQUESTS | own


def load_principles(name: str) -> list:
    """The principles, a line each."""
    with user_input(f"--principles {name}: cannot be read"):
        lines = [line.strip() for line in Path(name).read_text().splitlines() if line.strip()]
    return lines or fail(f"--principles {name}: has no line with a principle")


class Judge:
    """Whoever is asked. A talk is the text of one turn, or messages.

    Its two kinds have option_logps(talks, options), as `ask` but for options too unlikely, and texts(talks, keys,
    temperature, length), as `write` but for the number of tokens."""

    def __init__(self, name: str, args):
        self.name, self.args, self.printed = name, args, {}

    def ask(self, talks: list, options: list) -> tuple:
        """The log-probabilities of replying with each option [B, K], NaN for an abstention, and its reason [B]."""
        args, (logps, reasons) = self.args, self.option_logps(talks, options)
        masses, mute = logps.exp().sum(1).tolist(), []
        for i, mass in enumerate(masses):
            if not reasons[i] and not mass >= max(args.min_mass, 1e-30):
                is_named = not math.isnan(mass)
                reasons[i] = "none of the options is likely (--min-mass)" if is_named else "the reply names no option"
                mute.append(i)
        chances = ", ".join(f"{option} {p:.3f}" for option, p in zip(options, logps[:1].exp().flatten()))
        self.show(talks, f"nothing to use: {reasons[0]}" if "nan" in chances else chances)
        # all ranks take part in sampling, since a model's weights may be spread over them
        if "abstention" not in self.printed and from_all_ranks(mute):
            names, notes = f"{', '.join(options[:-1])} and {options[-1]}", []
            for i, (text, _) in zip(mute, self.texts([talks[i] for i in mute[:1]], ["reply"] * len(mute[:1]), 0.0, 12)):
                found = f"{names} have probability {masses[i]:.2g} together"
                found = f"it names none of {names}" if math.isnan(masses[i]) else found
                notes.append(f"note: the judge's likeliest reply is {text!r}; {found}")
            why = "so this question is an abstention (see --min-mass, --requests)"
            self.print_once("abstention", f"{from_all_ranks(notes)[0]}, {why}")
        logps[mute] = math.nan
        return logps, reasons

    def write(self, talks: list, keys: list, temperature: float) -> list:
        """Pairs (text, whether it came to an end), each a function of --seed and its key."""
        args = self.args
        wrote = self.texts(talks, keys, temperature, args.judge_max_tokens)
        self.show(talks, wrote[0][0] if wrote else "")
        return wrote

    def show(self, talks: list, reply: str):
        """Prints the first request of its length in messages, with the reply: look at it."""
        if talks:
            talk = as_messages(talks[0], "user")
            asked = talk[-1]["content"]
            asked = ("..." + asked[-600:] if len(asked) > 600 else asked).replace("\n", "\n  | ")
            self.print_once(len(talk), f"the judge is asked:\n  | {asked}\nand replies: {reply[:300]}")

    def print_once(self, kind, text: str):
        """Prints the first text of each kind, off the progress bar's line."""
        mine = object()  # of several threads, one prints
        if self.printed.setdefault(kind, mine) is mine and RANK == 0:
            tqdm.write(f"\n{text}")

    def check(self, talk):
        """Raises Drop for a talk that the chat template refuses; that of a server is not known here."""


class LocalJudge(Judge):
    """A checkpoint, asked through its own chat template."""

    def __init__(self, name: str, model, tokenizer, args, device):
        super().__init__(name, args)
        self.model, self.tokenizer, self.device = model, tokenizer, device

    def clean(self, talk) -> list:
        """A talk as messages without special tokens, with which an answer could write the judge's reply."""
        messages = as_messages(talk, "user")
        return [dict(m, content=without_special(self.tokenizer, m["content"])) for m in messages]

    def check(self, talk):
        render_text(self.tokenizer, self.clean(talk), True)

    def option_logps(self, talks: list, options: list) -> tuple:
        def asked_row(talk) -> Row:
            row = judge_row(self.model, self.tokenizer, self.clean(talk), options)
            if padded_width(row) >= positions(self.model):  # it was cut
                raise Drop("too long for the judge")
            return row

        rows, indices, reasons = read_all(asked_row, talks)
        logps = torch.full((len(talks), len(options)), math.nan)
        found = judge_logps(self.model, rows, self.args, self.device)
        logps[indices] = found.cpu().view(len(rows), len(options))
        return logps, reasons

    def texts(self, talks: list, keys: list, temperature: float, length: int) -> list:
        def asked_row(talk) -> Row:
            talk = self.clean(talk)
            return prompt_row(self.model, prompt_ids(self.tokenizer, talk, {}), talk, length)

        rows, indices, reasons = read_all(asked_row, talks)
        for reason in filter(None, reasons):
            self.print_once("unread", f"note: the judge cannot read a request: {reason}; it writes nothing there")
        writer, found = (self.model, self.tokenizer), [("", False)] * len(talks)
        wrote = write_texts(writer, rows, [f"{keys[i]}-0" for i in indices], self.args, length, temperature)
        for i, (text, has_ended) in zip(indices, wrote):
            found[i] = text.strip(), has_ended
        return found


WAITS = (1, 2, 4, 8, 16, 32)  # seconds before another attempt
BUSY = (408, 409, 429)  # statuses after which, as after those from 500 on, there is another attempt


class ServerJudge(Judge):
    """A model on a server with OpenAI's API."""

    def __init__(self, args):
        super().__init__(args.judge, args)
        self.url, self.logprobs = args.judge_url.rstrip("/") + "/chat/completions", dict(logprobs=True, top_logprobs=20)
        self.has_answered, self.failures = False, 0  # in a row
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", args.judge_url):  # not printed: it may hold a key
            what = "must be http:// or https://, a host and a path, without user, password, ? or #"
            fail(f"--judge-url: {what}; a key goes into --judge-key")
        self.key = os.environ.get(args.judge_key, "").strip() if args.judge_key else ""
        if args.judge_key and not self.key:  # the option is not printed: it may hold the key itself
            fail("--judge-key: there is no such environment variable; it takes the variable's name, not the key")
        if not (self.key.isascii() and self.key.isprintable()):
            fail("--judge-key: what the variable holds is no key: it has line breaks or characters beyond ASCII")
        with user_input("--judge-body: must be a JSON object"):
            self.body = dict(json.loads(args.judge_body or "{}").items())

    def hide(self, text: str) -> str:
        """What a server said without the key; JSON may have a backslash before a character of it."""
        secret = r"\\?".join(["", *map(re.escape, self.key)])
        return re.sub(secret, "[key]", text) if self.key else text

    def send(self, talk, **options) -> tuple:
        """(choice or None, HTTP status, what was said instead) of the last of several attempts, where the server is
        busy, sends no JSON or is not reached. Raises ConnectionError if the last attempt had no reply."""
        # without what the server might take for the end of a turn
        messages = [dict(m, content=without_marks(m["content"])) for m in as_messages(talk, "user")]
        payload = dict(model=self.args.judge, messages=messages, **options) | self.body
        body = json.dumps({k: v for k, v in payload.items() if v is not None}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, body, headers)
        for wait in (*WAITS, None):
            status, reply, after = 0, None, ""
            try:
                with urllib.request.build_opener(SameHost).open(request, timeout=600) as response:
                    status, said = response.status, response.read().decode(errors="replace")
                # shorter keys are placeholders, which an answer may contain
                reply = json.loads(self.hide(said) if len(self.key) >= 8 else said)
            except urllib.error.HTTPError as e:
                status, said, after = e.code, str(e.reason), e.headers.get("Retry-After") or ""
                with contextlib.suppress(OSError, http.client.HTTPException):  # the connection may break here too
                    said += f": {e.read().decode(errors='replace')}"
            except (OSError, ValueError, http.client.HTTPException) as e:  # no connection, one that broke, no JSON
                said = f"{type(e).__name__}: {e}"
            said = " ".join(self.hide(f"replied {status} {said}" if status else said).split())[:300]
            is_busy = status in BUSY or status >= 500 or (status < 300 and reply is None)
            if not is_busy or wait is None:
                break
            wait = max(wait, min(60, int(after))) if after.isdecimal() else wait
            what = f"note: --judge-url {self.args.judge_url}: {said}; asked again up to {len(WAITS)} times"
            self.print_once(f"again {status or said}", what)
            time.sleep(wait)
        if is_busy:
            said = f"no answer after {len(WAITS) + 1} attempts ({said})"
            if not status:
                raise ConnectionError(said)
        choices = reply.get("choices") if isinstance(reply, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if choice is None and reply is not None:
            said = f"replied without choices, as OpenAI's API has them ({said})"
        return choice, status, said

    def chat(self, talk, wants_logprobs: bool, options: dict) -> tuple:
        """(the server's choice for a talk, "") or (None, the reason why it gives none). Raises ConnectionError if it
        answers no talk."""
        logprobs = self.logprobs if wants_logprobs else {}
        choice, status, said = self.send(talk, **options, **logprobs)
        if choice is not None:
            self.has_answered, self.failures = True, 0
            return choice, ""
        is_refused = 400 <= status < 500 and status not in (401, 403, 404, *BUSY)
        if not (is_refused and logprobs):
            self.failures += 1
            # does it refuse this talk, or any? A row must not end the run, nor a broken server all rows
            is_doubtful = self.failures % 20 == 0 or not (self.has_answered or is_refused)
            if is_doubtful:
                if self.send("Reply with the letter A.", max_tokens=16)[0] is None:
                    raise ConnectionError(said)
                self.has_answered = True
        self.print_once("refused", f"note: the server refuses a request: {said}")
        if is_refused and logprobs:
            found = self.chat(talk, False, options)
            if "logprob" in said.lower():  # from now on, letters alone
                self.logprobs = {}
                self.print_once("letters", "note: the server gives no log-probabilities; its labels are 0 or 1")
            return found
        return None, f"refused by the server ({status})" if status >= 300 else "the server replied without choices"

    def for_each(self, talks: list, wants_logprobs: bool, options: list) -> list:
        """`chat` for each talk with its options, --judge-parallel at a time."""
        args = self.args
        with ThreadPoolExecutor(args.judge_parallel) as pool:
            tasks = [pool.submit(self.chat, talk, wants_logprobs, own) for talk, own in zip(talks, options)]
            try:
                return [task.result() for task in tasks]
            except ConnectionError as e:
                pool.shutdown(cancel_futures=True)
                fail(f"--judge-url {args.judge_url}: {e}; continue with --resume")

    def option_logps(self, talks: list, options: list) -> tuple:
        found = self.for_each(talks, True, [dict(max_tokens=16, temperature=0)] * len(talks))
        logps = torch.tensor([named_logps(choice, options) for choice, _ in found], dtype=torch.float32)
        return logps.view(len(talks), len(options)), [reason for _, reason in found]

    def texts(self, talks: list, keys: list, temperature: float, length: int) -> list:
        options = []
        for key in keys:
            digest = hashlib.sha256(f"{self.args.seed}-{key}".encode()).digest()[:4]
            seed = int.from_bytes(digest, "little") >> 1
            options.append(dict(max_tokens=length, temperature=temperature, seed=seed))
        choices = [choice for choice, _ in self.for_each(talks, False, options)]
        is_whole = lambda choice: isinstance(choice, dict) and choice.get("finish_reason") != "length"
        return [(content_of(choice), is_whole(choice)) for choice in choices]


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key must not go to another host than the one that was named."""

    def redirect_request(self, request, *rest):
        return None


def without_marks(text: str) -> str:
    """A text without <|...|>, which may be a special token of the server's model."""
    while (cleaned := re.sub(r"<\|.{1,40}?\|>", "", text)) != text:  # taking one out may make another
        text = cleaned
    return text


def content_of(choice) -> str:
    """What a server's choice says, without its thinking; nothing, where it is of another form."""
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):  # of parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return after_thinking(content).strip() if isinstance(content, str) else ""


def named_logps(choice, options: list) -> list:
    """The log-probability of each option from a server's choice; where it tells none, 0 for the option that it named.
    NaN if it named none.

    It names one as its first word, or after such words as "Answer:". Of "1" and "10", where the server may write the
    second as two tokens and gives no probability for the whole, the named one is taken as it is."""
    lead = r"\W*(?i:boxed\W*|(?:the |final )*(?:answer|option|letter|score|rating)\W*(?:is\W*)?)?"
    word = re.match(lead + r"(\w+)\b(?! +[a-z])", content_of(choice))  # not the "A" of "A fair comparison"
    if not word or word[1] not in options:
        return [math.nan] * len(options)
    bare = lambda token: re.sub(r"\W", "", token["token"])  # without spaces and punctuation
    tokens = (choice.get("logprobs") or {}).get("content") or []
    start = max((i + 1 for i, token in enumerate(tokens) if "</think>" in token["token"]), default=0)
    token = next((token for token in tokens[start:] if bare(token) == word[1]), {})
    likely = token.get("top_logprobs") or [token] if token else []
    mass = {option: sum(math.exp(t["logprob"]) for t in likely if bare(t) == option) for option in options}
    is_split = any(long != short and long.startswith(short) and not mass[long] for long in options for short in options)
    if is_split or not any(mass.values()):
        return [0.0 if option == word[1] else -math.inf for option in options]
    return [math.log(p) if p else -math.inf for p in mass.values()]


# what a run reads and writes
def check_options(args):
    """Fails on options that contradict each other, and on numbers that are out of range."""
    counts = ("sample_tokens", "max_new_tokens", "judge_parallel", "judge_max_tokens", "judgements", "rounds", "turns")
    shares = ("top_p", "min_mass", "clamp")
    check_numbers(args, above_zero=(*counts, "top_p"), at_most_one=shares, signed=("min_reward",))
    if getattr(args, "judge_url", "") and not args.judge:
        fail("--judge-url needs --judge, the model's name there")
    for name in ("k", "n"):
        if getattr(args, name, 2) < 2:
            fail(f"--{name} {getattr(args, name)}: one answer has nothing to be compared with; use 2 or more")
    if getattr(args, "clamp", 0) > 0.5:
        fail(f"--clamp {args.clamp}: must be at most 0.5, where nothing of a preference is left")
    if isinstance(args, BestOfNArgs) and bool(args.reward_model) == bool(args.judge):
        fail("best-of-n needs either --reward-model or --judge to score the answers (the judge may be --model itself)")
    if isinstance(args, SynthesiseArgs):
        if (args.min_quality is not None or args.min_difficulty is not None) and not args.judge:
            fail("--min-quality and --min-difficulty need a --judge to rate (which may be --model itself)")
        if args.min_reward is not None and not args.reward_model:
            fail("--min-reward needs a --reward-model")
        if not args.rows:
            fail("--rows 0: how many conversations shall be written?")


def input_names(args) -> list:
    """The models, data sets and files that a run reads."""
    names = "model against dataset requests principles condition".split() + ([] if args.judge_url else ["judge"])
    given = [getattr(args, name, "") for name in names]
    return [*dict.fromkeys([*given, *args.reward_model])]


def load_run(args, device, dtype):
    """What a subcommand works with: args, device, the requests, principles and conditions, and the models, frozen, each
    loaded once: policies and reward_models as pairs (model, tokenizer), and the judge."""
    run = types.SimpleNamespace(args=args, device=device, requests=load_requests(args), reward_models=[], ranks=False)
    run.principles = load_principles(args.principles) if args.principles else [run.requests["principle"]]
    run.conditions, run.judge = load_conditions(args.condition), ServerJudge(args) if args.judge_url else None
    loaded = {}

    def language_model(name: str) -> tuple:
        if name not in loaded:
            tokenizer = load_tokenizer(name)
            model = read_model(AutoModelForCausalLM, name, tokenizer).requires_grad_(False)
            with short_windows(model):
                check_sampler(model, name)
            model = prepare_model(model, name, args, device, dtype, token_logps, mean_hidden)
            loaded[name] = model, tokenizer
        return loaded[name]

    run.policies = [language_model(name) for name in (getattr(args, "model", ""), getattr(args, "against", "")) if name]
    writers = [(model, "max_new_tokens") for model, _ in run.policies]
    judge_name = args.judge or (args.model if isinstance(args, ReviseArgs) else "")
    if judge_name and not run.judge:
        if judge_name in loaded:
            print0(f"note: {judge_name} judges its own answers")
        model, tokenizer = language_model(judge_name)
        run.judge = LocalJudge(judge_name, model, tokenizer, args, device)
        if isinstance(args, ReviseArgs) or args.reasoning or args.scale == "points":
            writers.append((model, "judge_max_tokens"))
    for model, option in writers:
        if positions(model) <= getattr(args, option):
            value = f"--{option.replace('_', '-')} {getattr(args, option)}"
            fail(f"{value}: the model has {positions(model)} positions; lower it")
    for name in args.reward_model:
        run.reward_models.append(load_reward_model("--reward-model", name, args, device, dtype))
    return run


def load_items(run) -> list:
    """The rows of --dataset, or --rows of them. A prompt that a policy, the judge or a reward model cannot read is
    dropped."""
    args, notes, items = run.args, Counter(), []
    if isinstance(args, SynthesiseArgs):
        with user_input("--system: cannot be used with the chat template of --model"):
            around_user(run.policies[0][1], as_messages(args.system, "system") if args.system else [])
        return [Item(number) for number in range(args.rows)]
    data = load_rows("--dataset", args.dataset, "train")
    its = f"its columns are {', '.join(data.column_names)}"
    numbers = range(len(data))
    if args.rows:
        numbers = sorted(random.Random(args.seed).sample(numbers, min(args.rows, len(data))))
    for number in numbers:
        try:
            items.append(read_item(run, number, without_none(data[number]), notes))
        except Drop as drop:
            notes[f"dropped: {drop}"] += 1
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
            what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            where = f"--dataset {args.dataset}, row {number} (from 0)"
            fail(f"{where}: not in a known format ({what}); {its}; see 'Reads' in --help")
    counts = ", ".join(f"{n} {note}" for note, n in notes.items() if n) or "none dropped"
    if not items:
        fail(f"--dataset {args.dataset}: none of its {len(numbers)} rows can be used ({counts}); {its}")
    print0(f"--dataset {args.dataset}: {len(items)} rows from {len(data)}; {counts}")
    most = max(len(item.responses) for item in items)
    for item in items if isinstance(args, AuditArgs) else ():
        item.pairs = labelled_pairs(item, args.min_gap)
    if isinstance(args, AuditArgs) and not any(item.pairs for item in items):
        fail(f"--dataset {args.dataset}: has no pair whose better answer is known (chosen and rejected, or scores)")
    if isinstance(args, (LabelArgs, BestOfNArgs)) and not run.policies and most < 2:
        fail(f"--dataset {args.dataset}: has no prompt with two answers; pass --model to sample them")
    run.ranks = isinstance(args, LabelArgs) and (args.k if run.policies else most) > 2
    return items


def read_item(run, number: int, row: dict, notes: Counter) -> Item:
    """A row of the data in any format. Raises Drop."""
    prompt, responses, scores = split_row(row)
    if not prompt or not has_content(prompt):
        raise Drop("empty prompt")
    prompt = as_messages(prompt, "user") if isinstance(prompt, list) else prompt
    responses = [response if isinstance(response, str) else as_messages(response) for response in responses]
    if isinstance(run.args, BestOfNArgs) and not run.policies and any(len(as_messages(r)) > 1 for r in responses):
        raise Drop("answers of several turns, of which only the last could be scored")
    better = row.get("score_chosen", row.get("chosen_reward"))
    worse = row.get("score_rejected", row.get("rejected_reward"))
    gap = None if better is None or worse is None else better - worse
    columns = {name: value for name, value in row.items() if name not in READ_COLUMNS.split()}
    asked = []
    for model, tokenizer in run.policies:
        room, extra = positions(model) - run.args.max_new_tokens, dict(columns, prompt=prompt)
        asked += prompt_rows(tokenizer, room, [], extra, notes)
    item = Item(number, prompt, responses, scores, gap, columns, str(row.get("kind", "")), asked)
    for model, tokenizer in run.reward_models:
        reward_row(run, model, tokenizer, (item, "a"))
    if run.judge:
        talk = as_messages(talk_of(prompt), "user")
        if isinstance(run.args, ReviseArgs) or run.args.reasoning:
            talk += [*as_messages("a"), *as_messages("b", "user")]
        run.judge.check(talk)
    return item


def labelled_pairs(item: Item, min_gap: float) -> list:
    """The indices (i, j) of every two responses of which one is known to be better; the others are counted."""
    pairs = []
    for i, j in combinations(range(len(item.responses)) if item.scores else (), 2):
        lead = item.scores[i] - item.scores[j]
        gap = abs(lead)
        if item.gap is not None:  # of chosen and rejected, if the data set has their scores
            gap = item.gap if lead > 0 else -item.gap
        if lead and gap >= min_gap:
            pairs.append((i, j))
        else:
            item.counts["equal scores" if not lead else "contradicting scores" if gap < 0 else "below --min-gap"] += 1
    return pairs


# of a row; all others are copied to the data sets
READ_COLUMNS = "prompt question instruction input system messages conversations completion completions scores chosen "
READ_COLUMNS += "rejected score_chosen score_rejected chosen_reward rejected_reward margin probability"


def split_row(row: dict) -> tuple:
    """(prompt, responses, scores or None) of a row; no responses if it holds a prompt alone. Raises Drop."""
    if row.get("completions") is not None:
        scores, n = row.get("scores"), len(row["completions"])
        if scores is not None and (len(scores) != n or not all(s is not None and math.isfinite(s) for s in scores)):
            raise ValueError(f"{n} completions need as many scores, all of them numbers; they are {scores}")
        return as_prompt(row), row["completions"], scores
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return *as_pair(row), [1.0, 0.0]
    talk = row.get("messages") or row.get("conversations")
    if talk:
        messages = with_system(row, as_messages(talk))
        end = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1) + 1
        return messages[:end], [messages[end:]] if messages[end:] else [], None
    return as_prompt(row), [row["completion"]] if row.get("completion") else [], None


def load_records(args, out: Path, signature: dict) -> dict:
    """{row number: record} of an interrupted run; for a new one, the directory is cleared."""
    records, part = [], out / "rows.part"
    if RANK == 0 and args.resume and part.exists() and (out / "args.json").exists():
        # a kill may have cut the last line
        lines = [line for line in part.read_text().splitlines(True) if line.endswith("\n")]
        write_lines(part, lines)
        records = [json.loads(line) for line in lines]
    records = from_all_ranks(records)
    if records:
        print0(f"resuming {out}: {len(records)} rows are done")
        return {record["number"]: record for record in records}
    if RANK == 0:  # first the rows: a kill must not leave them beside the args.json of another run
        part.unlink(missing_ok=True)
    clear_run(args, out, signature)
    for name in DATA_FILES if RANK == 0 else ():
        (out / name).unlink(missing_ok=True)
    return {}


def batches(args, items: list, done: dict):
    """The items that are not done, --batch-size at a time, with a bar on a terminal, elsewhere a line every half
    minute."""
    left, shown_at = [item for item in items if item.number not in done], time.time()
    bar = tqdm(total=len(items), initial=len(done), disable=RANK > 0 or not sys.stderr.isatty())
    for start in range(0, len(left), args.batch_size):
        batch = left[start : start + args.batch_size]
        yield batch
        bar.update(len(batch))
        if bar.disable and time.time() - shown_at > 30:
            print0(f"{len(done)} of {len(items)} rows")
            shown_at = time.time()
    bar.close()


def from_all_ranks(values: list) -> list:
    """The values of all ranks, one after the other."""
    parts = [values]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def save_records(out: Path, records: list, done: dict):
    """Appends a batch's records to rows.part, and adds them to done."""
    records = sorted(records, key=lambda record: record["number"])
    if RANK == 0:
        with user_input(f"{out}/rows.part: cannot be written; what is there stands; make room, then use --resume"):
            with (out / "rows.part").open("a") as file:
                file.writelines(json.dumps(record, default=str) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
    done.update((record["number"], record) for record in records)


def write_lines(path: Path, lines: list):
    """Writes a file beside its place and renames it, so that it is never half there."""
    part = path.with_name(path.name + ".new")
    part.write_text("".join(lines))
    os.replace(part, path)


def finish(out: Path, files: dict, report: dict):
    """Writes the data sets (by file name) and report.json, and says in args.json that the run is finished."""
    if RANK == 0:
        with user_input(f"{out}: cannot be written; make room, then continue with --resume"):
            for name, rows in files.items():
                write_lines(out / name, [json.dumps(row, default=str) + "\n" for row in rows])
            write_json(out / "report.json", report)
        shown = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
        for name, value in report.items():
            if isinstance(value, dict):
                for kind, counts in value.items():
                    print(f"  {name} {kind or '(none)'}: " + ", ".join(f"{k} {shown(v)}" for k, v in counts.items()))
            elif value is not None:
                print(f"  {name}: {shown(value)}")
        print(f"{out}: " + ", ".join([*(f"{name} ({len(rows)} rows)" for name, rows in files.items()), "report.json"]))
        if files and not any(rows for name, rows in files.items() if name != "raw.jsonl"):
            fail(f"{out}: no row is left; report.json there says what became of them")
        write_json(out / "args.json", json.loads((out / "args.json").read_text()) | dict(finished=True))
        (out / "rows.part").unlink(missing_ok=True)
    if dist.is_initialized():
        dist.destroy_process_group()


# ============================== every block below stands word for word in all scripts that have it ================
# Functions and parameters that this script does not use are used by another one.
# ---- judges: language models that choose one of several replies


def load_json(option: str, name: str) -> dict:
    """The JSON object in a file."""
    with user_input(f"{option} {name}: cannot be read as a JSON object"):
        content = json.loads(Path(name).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    return content


def expected_score(probabilities):
    """The mean of the scores 1 to 10, scaled to [-1, 1] (Lee et al. 2023). probabilities [B, 10]; returns [B]."""
    scores = torch.arange(1, 11, device=probabilities.device)
    return ((probabilities * scores).sum(-1) - 5.5) / 4.5


def judge_row(model, tokenizer, talk, options: list):
    """What the judge is asked (the text of one turn, or messages), cut at the front to the positions it has; its
    responses are the options, from where they differ. Raises Drop."""
    asked, replies, _ = encode(tokenizer, as_messages(talk, "user"), options, {}, Counter())
    # what all begin with, such as an empty thought
    common = min(min(shared_prefix(replies[0], reply), len(reply) - 1) for reply in replies)
    rest = [reply[common:] for reply in replies]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    room = max(1, positions - max(map(len, rest)))
    return Row((asked + replies[0][:common])[-room:], rest, [[True] * len(reply) for reply in rest], {})


def judge_logps(model, rows: list, args, device) -> torch.Tensor:
    """The judge's log-probabilities of each option, its end included, for this rank's rows of `judge_row` [B, K]."""
    values_of = lambda group, inputs, target: response_sums(model.token_logps(**inputs, target=target)[0], group)
    logps = response_values(values_of, model, rows, args, device, shared=False)
    return logps.view(len(rows), -1) if rows else logps.view(0, 1)


# ---- scores: what a reward model gives to answers


def response_scores(self, inputs, last, source=None):
    """The score of each response [R]: the head on the hidden state at `last`, less the shift. A method of the model."""
    hidden = self.base_model(**inputs).last_hidden_state.flatten(0, 1)[last]  # [R, d]
    return F.linear(hidden.float(), self.score.weight.float())[:, 0] - getattr(self.config, "score_shift", 0.0)


def score_rows(model, rows: list, args, device, shared: bool = True) -> list:
    """The scores of every row's responses, a list of tensors [K]; shared: as in `response_values`."""
    values_of = lambda group, inputs, target: model.response_scores(**inputs)
    scores = response_values(values_of, model, rows, args, device, shared)
    return list(scores.split([len(row.responses) for row in rows]))


def load_reward_model(option: str, name: str, args, device, dtype) -> tuple:
    """A frozen reward model and its tokenizer."""
    tokenizer = load_tokenizer(name)
    if not is_reward_model(name):
        fail(f"{option} {name}: must be a sequence classifier of one label, such as reward_model.py writes")
    model = read_model(AutoModelForSequenceClassification, name, tokenizer, num_labels=1).requires_grad_(False)
    check_score_head(model, name)
    return prepare_model(model, name, args, device, dtype, response_scores), tokenizer


def check_score_head(model, name: str):
    """Fails on a classifier whose head is not one linear layer named score, without a bias."""
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        fail(f"{name}: {type(model).__name__} has no linear head `score` without a bias, as decoder models have")


def is_reward_model(name: str) -> bool:
    """Whether a checkpoint has a trained head with one score; fails on a classifier of several labels."""
    with user_input(f"{name}: no configuration can be loaded from it"):
        config = AutoConfig.from_pretrained(name)
    is_classifier = "SequenceClassification" in "".join(config.architectures or [])
    if is_classifier and config.num_labels != 1:
        fail(f"{name}: is a classifier of {config.num_labels} labels; a reward model has one label, its score")
    return is_classifier


@lru_cache
def after_turn_end(tokenizer) -> list:
    """The ids that the chat template writes after the end of an assistant's turn; a score is read at the last."""
    after = turn_end(tokenizer)[1]
    whole = render(tokenizer, [dict(role="user", content="a"), dict(role="assistant", content="b")])
    return whole[-after:] if after > 0 else []


def encode_scored(tokenizer, prompt, responses: list, row: dict, notes: Counter) -> tuple:
    """`encode`, where each response goes on to the last token of the chat template's rendering."""
    is_text = isinstance(prompt, str) and all(isinstance(response, str) for response in responses)
    prompt, responses, trained = encode(tokenizer, prompt, responses, row, notes)
    tail = [] if is_text else after_turn_end(tokenizer)
    return prompt, [ids + tail for ids in responses], [marks + [False] * len(tail) for marks in trained]


def without_special(tokenizer, text: str) -> str:
    """A text without its reader's special tokens: an answer must not end its turn and write its judge's reply."""
    specials = list(special_tokens(tokenizer).values())
    while any(special in text for special in specials):  # taking one out may make another
        for special in specials:
            text = text.replace(special, "")
    return text


def scored_row(tokenizer, prompt, text: str, row: dict, longest: int):
    """What a reward model reads: a prompt (text or messages) with an answer that may be empty; at most the last
    `longest` tokens.

    row: the row of the data, for its tools and chat_template_kwargs. Raises Drop."""
    refuse_special(tokenizer, prompt)
    if isinstance(prompt, str):
        ids = plain_ids(tokenizer, without_special(tokenizer, prompt + text) + tokenizer.eos_token)
    elif prompt[-1]["role"] == "assistant":
        begun = begun_text(tokenizer, prompt, template_options(row))
        ids = text_ids(tokenizer, begun + text) + [turn_end(tokenizer)[0], *after_turn_end(tokenizer)]
    else:
        ids = render(tokenizer, prompt + as_messages(text), **template_options(row))
        if turn_end(tokenizer)[1] < 0:  # the template marks no end
            ids.append(tokenizer.eos_token_id)
    ids = ids[-longest:]
    return Row(ids[:1], [ids[1:]], [[True] * (len(ids) - 1)], {})


def load_conditions(name: str) -> dict:
    """The system prompts by kind; {} if no file is given."""
    with user_input(f"--condition {name}: must be a JSON object of kinds and their system prompts"):
        conditions = json.loads(Path(name).read_text()) if name else {}
        if not all(isinstance(text, str) for text in conditions.values()):
            raise ValueError("a system prompt must be text")
    return conditions


def with_condition(prompt, condition: str):
    """The prompt after a system prompt that the reward model alone sees (InternLM2)."""
    if not condition:
        return prompt
    if isinstance(prompt, str):
        return f"{condition}\n\n{prompt}"
    prompt = as_messages(prompt)
    if prompt and prompt[0]["role"] == "system":
        return [dict(role="system", content=f"{condition}\n\n{prompt[0]['content']}"), *prompt[1:]]
    return [dict(role="system", content=condition), *prompt]


# ---- sampling: answers drawn token by token, from a model with a key-value cache


def uniform_numbers(seed: int, step: int, answers: list, length: int) -> torch.Tensor:
    """The randomness of sampling [len(answers), length]: a function of seed, step, answer, and position alone."""
    rows = []
    for answer in answers:
        key = hashlib.sha256(f"{seed}-{step}-{answer}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        rows.append(torch.rand(length, generator=generator))
    return torch.stack(rows) if rows else torch.zeros(0, length)


class BufferedLayer(DynamicLayer):
    """A layer's keys and values [B, H, T, D] in buffers; DynamicLayer copies them all for each token."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.buffers = room, []  # none before the first update

    def update(self, keys, values, *args, **kwargs):
        if not self.buffers:
            self.buffers = [new.new_empty(*new.shape[:-2], self.room, new.shape[-1]) for new in (keys, values)]
        start = self.get_seq_length()  # 0 before the first update
        self.is_initialized, end = True, start + keys.shape[-2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, indices):
        if self.buffers:  # none while the model skips the layer
            length, self.buffers = self.get_seq_length(), [buffer[indices] for buffer in self.buffers]
            self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


def cache_argument(model) -> str:
    """The name under which the model's forward takes its cache: `cache` from transformers 5.24 on."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), "")


def nucleus(logps, top_p: float):
    """Log-probabilities [B, V], renormalised over the smallest set of tokens whose probability reaches top_p."""
    ordered, order = logps.sort(-1, descending=True)
    in_nucleus = ordered.exp().cumsum(-1) - ordered.exp() < top_p
    in_nucleus = torch.zeros_like(in_nucleus).scatter(1, order, in_nucleus)
    return logps.masked_fill(~in_nucleus, -math.inf).log_softmax(-1)


@torch.no_grad()
def sample(model, prompts: list, numbers, stops: list, temperature: float = 1.0, top_p: float = 1.0) -> tuple:
    """n = len(numbers) / len(prompts) answers to each prompt (ids), one after the other; equal ones are computed once.

    numbers [answers, max_new_tokens], uniform in [0, 1), on the model's device, are all the randomness there is;
    temperature 0 takes the likeliest token. Returns for each answer its ids, the stop token included, and the
    log-probability of each in the very distribution it was drawn from (at temperature 0, in that of temperature 1)."""
    if not len(numbers):
        return [], []
    attention = model.config._attn_implementation
    model.set_attn_implementation(model.sampling_attention)
    device, (count, longest), width = numbers.device, numbers.shape, max(map(len, prompts))
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    padding = [width - len(prompt) for prompt in distinct]  # on the left
    ids = torch.tensor([[0] * pad + [*prompt] for pad, prompt in zip(padding, distinct)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (width - pad + longest) for pad in padding], device=device)
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    plain = lambda layer: type(layer) is DynamicLayer
    cache.layers = [BufferedLayer(width + longest) if plain(layer) else layer for layer in cache.layers]
    options = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    logits = model(input_ids=ids, attention_mask=mask[:, :width], position_ids=positions, **options).logits[:, -1]
    repeated = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
    repeated = repeated.repeat_interleave(count // len(prompts))
    cache.reorder_cache(repeated)
    logits, mask, position = logits[repeated], mask[repeated], positions[repeated, -1:]

    tokens, logps = torch.zeros_like(numbers, dtype=torch.long), torch.zeros_like(numbers, dtype=torch.float32)
    stops, in_batch = torch.tensor(stops, device=device), torch.arange(count, device=device)  # answers in the batch
    has_ended = torch.zeros(count, dtype=torch.bool, device=device)
    for t in range(longest):
        token_logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
        if top_p < 1:
            token_logps = nucleus(token_logps, top_p)
        if temperature == 0:
            token = token_logps.argmax(-1)
        else:  # the first token at which the cumulative probability exceeds the number
            cumulative = token_logps.exp().cumsum(-1)
            token = torch.searchsorted(cumulative, numbers[in_batch, t, None] * cumulative[:, -1:], right=True)[:, 0]
            token = token.clamp(max=token_logps.shape[-1] - 1)
        tokens[in_batch, t] = token
        logps[in_batch, t] = token_logps.gather(1, token[:, None])[:, 0]
        has_ended = has_ended | torch.isin(token, stops)
        ended = int(has_ended.sum())
        if ended == len(in_batch) or t + 1 == longest:
            break
        # to take finished answers out of the batch copies the cache; until an eighth has ended they run on
        if ended >= len(in_batch) / 8:
            kept = (~has_ended).nonzero()[:, 0]
            cache.reorder_cache(kept)
            in_batch, token, mask, position, has_ended = (x[kept] for x in (in_batch, token, mask, position, has_ended))
        position = position + 1
        seen = mask[:, : width + t + 1]
        logits = model(input_ids=token[:, None], attention_mask=seen, position_ids=position, **options).logits[:, -1]
    model.set_attn_implementation(attention)
    is_stop = torch.isin(tokens, stops).int()
    lengths = torch.where(is_stop.any(1), is_stop.argmax(1) + 1, longest).tolist()
    return tuple([row[:length] for row, length in zip(x.tolist(), lengths)] for x in (tokens, logps))


@torch.no_grad()
def check_sampler(model, name: str):
    """Sets model.sampling_attention, under which `sample` gives the log-probabilities of a plain forward pass.

    Tries a few answers to random prompts of unequal lengths. Fails where no attention does: then the model would be
    trained on answers that it has not given. Call it on a float32 model, before it is sharded."""
    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    lowest = min(3, vocabulary - 1)
    prompts = [torch.randint(lowest, vocabulary, (n,), generator=generator).tolist() for n in (9, 4)]
    numbers = torch.rand(4, 6, generator=generator).to(next(model.parameters()).device)
    why = "its forward takes no key-value cache"
    # sdpa is faster, but leaves out Gemma 2's soft cap, which small scores would not show
    attentions = ["eager"] if getattr(model.config, "attn_logit_softcapping", None) else ["sdpa", "eager"]
    for attention in attentions if cache_argument(model) else ():
        model.sampling_attention = attention
        try:
            gaps = []
            for i, (answer, sampled) in enumerate(zip(*sample(model, prompts, numbers, [vocabulary]))):
                ids = torch.tensor([prompts[i // 2] + answer], device=numbers.device)
                model.set_attn_implementation("eager")
                plain = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)[-len(answer) - 1 : -1]
                plain = plain.gather(1, ids[0, -len(answer) :, None])[:, 0]
                gaps.append((plain - torch.tensor(sampled, device=plain.device)).abs().max())
            gap = torch.stack(gaps).max().item()  # NaN if one is
            if gap < 1e-3:
                return
            why = f"a log-probability is off by {gap:.1g} with a cache"
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            why = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        finally:
            model.set_attn_implementation("eager")
    fail(f"{name}: {type(model).__name__} cannot be sampled here ({why}); choose a model of another family")


# ---- answers: prompts, and a policy's answers to them


def prompt_rows(tokenizer, max_prompt: int, checks: list, row: dict, notes: Counter) -> list:
    """One Row: a prompt without an answer; extra holds every column of the data, the prompt as text or messages, and
    its kind.

    checks: functions of extra that raise Drop where whatever scores the answers cannot read the prompt."""
    prompt = as_pair(row)[0] if row.get("chosen") is not None and row.get("rejected") is not None else as_prompt(row)
    if not prompt and not {"prompt", "question", "instruction", "chosen"} & row.keys():
        raise ValueError("it has neither prompt, question, or instruction, nor chosen and rejected")
    if not prompt:
        raise Drop("empty prompt")
    options = template_options(row)
    refuse_special(tokenizer, prompt, options)
    if isinstance(prompt, str):
        ids = encode(tokenizer, prompt, [" a"], row, notes)[0]
    else:
        prompt = as_messages(prompt, "user")
        ids = prompt_ids(tokenizer, prompt, options)
    if len(ids) > max_prompt:
        raise Drop("prompt leaves no room for --max-new-tokens")
    extra = dict(row, prompt=prompt, kind="" if row.get("kind") is None else str(row["kind"]))
    for check in checks:
        check(extra)
    return [Row(ids, [[]], [[]], extra)]


def stop_ids(model, tokenizer) -> list:
    """`stop_tokens`, and further ones that the model's generation_config knows."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    # a config's default may lie beyond a small vocabulary
    return sorted({*stop_tokens(tokenizer), *(i for i in known if i is not None and i < len(tokenizer))})


@contextlib.contextmanager
def gathered(model):
    """The whole weights on every rank, so that ranks can sample without keeping step with each other."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        # FSDP keeps its root gathered after a forward
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def sample_answers(model, prompts: list, numbers, stops: list, args, temperature: float, top_p: float = 1.0) -> tuple:
    """`sample` for this rank's prompts, those of similar lengths together, at most --sample-tokens tokens at a time:
    (ids, logps), a list for each answer, in the order of numbers."""
    n, device = len(numbers) // max(1, len(prompts)), next(model.parameters()).device
    asked = [prompt for prompt in prompts for _ in range(n)]  # for each answer
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    room = max(1, args.sample_tokens // (max(map(len, prompts), default=0) + numbers.shape[1]))  # answers at once
    answers, logps = [None] * len(asked), [None] * len(asked)
    model.eval()
    with gathered(model):
        for start in range(0, len(order), room):
            places = order[start : start + room]
            part, drawn = [asked[i] for i in places], numbers[places].to(device)
            for place, ids, values in zip(places, *sample(model, part, drawn, stops, temperature, top_p)):
                answers[place], logps[place] = ids, values
    model.train()
    return answers, logps


def continues_text(prompt) -> bool:
    """Whether an answer goes on in the middle of a text: of a prompt in words, or of an answer already begun."""
    return isinstance(prompt, str) or prompt[-1]["role"] == "assistant"


def answer_texts(tokenizer, rows: list, answers: list, stops: list) -> list:
    """The text of each answer (ids) to the prompts of rows, without the stop token and other special tokens, but with
    the tags of thinking. An answer begins with <think> if the chat template has written that tag."""
    removed = [token for token in special_tokens(tokenizer).values() if token not in ("<think>", "</think>")]
    texts = []
    for row, ids in zip(rows, answers):
        # some tokenizers drop the space before the first word of what they decode
        before = [*row.prompt[-1:]] if continues_text(row.extra["prompt"]) else []
        words = ids[:-1] if ids and ids[-1] in stops else ids
        text = tokenizer.decode(before + words)[len(tokenizer.decode(before)) :]
        for token in removed:
            text = text.replace(token, "")
        has_opened = tokenizer.decode([*row.prompt[-16:]]).rstrip().endswith("<think>")
        texts.append("<think>" * has_opened + text)
    return texts


def after_thinking(text: str) -> str:
    """What follows the thinking, before any further; nothing where the thinking has not ended."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def final_answer(prompt, text: str) -> str:
    """What the answer says after its thinking: all that its readers see."""
    answer = after_thinking(text).rstrip()
    return answer if continues_text(prompt) else answer.lstrip()


# ---- log-probabilities: of the answers' tokens, without the logits of a whole batch in memory


class TargetLogps(torch.autograd.Function):
    """log pi(target), the distribution's entropy, and whether the target is the likeliest token; each [N].

    hidden [N, d], head [V, d], bias [V] or None. Only the logits of one chunk of tokens are in memory at a time; the
    backward pass computes them again, with d log pi(y) / d logits = 1[y] - pi. The head's gradient is summed over the
    chunks in float32."""

    @staticmethod
    def logits(hidden, head, bias, scale, cap, temperature):
        logits = F.linear(hidden, head, bias).float().mul_(scale)
        logits = cap * torch.tanh(logits / cap) if cap else logits  # Gemma 2's soft cap
        return logits if temperature == 1 else logits / temperature

    @staticmethod
    def forward(ctx, hidden, head, bias, target, scale: float, cap: float | None, temperature: float):
        ctx.save_for_backward(hidden, head, bias, target)
        ctx.scale, ctx.cap, ctx.temperature, parts = scale, cap, temperature, []
        # on a GPU, adding to the head's gradient [V, d] would take most of the time of small chunks; on a CPU, a large
        # tensor gets new pages each time, which cost more than the arithmetic
        ctx.chunk = max(128, 2 ** (28 if hidden.is_cuda else 21) // len(head))
        for h, t in zip(hidden.split(ctx.chunk), target.split(ctx.chunk)):
            logps = TargetLogps.logits(h, head, bias, scale, cap, temperature).log_softmax(-1)  # [n, V]
            logp = logps.gather(-1, t[:, None])[:, 0]
            entropy = -logps.exp().mul_(logps).sum(-1)
            parts.append((logp, entropy, logp == logps.amax(-1)))  # amax is several times faster than argmax
        logp, entropy, is_argmax = map(torch.cat, zip(*parts))
        ctx.mark_non_differentiable(entropy, is_argmax)
        return logp, entropy, is_argmax

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, head, bias, target = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for h, t, g, out in zip(*(x.split(ctx.chunk) for x in (hidden, target, grad, d_hidden))):
            logits = TargetLogps.logits(h, head, bias, ctx.scale, ctx.cap, ctx.temperature)
            d = logits.softmax(-1).mul_(-g[:, None])
            d.scatter_add_(1, t[:, None], g[:, None])
            if ctx.cap:
                d = d * (1 - (logits * ctx.temperature / ctx.cap).square())  # the derivative of the soft cap
            d = d.mul_(ctx.scale / ctx.temperature).to(head.dtype)
            out.copy_(d @ head)
            if d_head is not None and d.dtype == d_head.dtype:
                d_head.addmm_(d.T, h)  # without a product [V, d] in memory
            elif d_head is not None:
                d_head += d.T @ h
            if d_bias is not None:
                d_bias += d.sum(0)
        d_head, d_bias = (x if x is None else x.to(head.dtype) for x in (d_head, d_bias))
        return d_hidden, d_head, d_bias, None, None, None, None


def token_logps(self, inputs, source, target, last=None, temperature: float = 1.0):
    """Log-probability of each trained token, the entropy of its distribution, whether it is the likeliest; each [N]. A
    method of the model.

    inputs, source, target: as `pack` and `pad` return them; temperature: of the distribution, as in sampling."""
    config, head = self.config.get_text_config(), self.get_output_embeddings()
    hidden = hidden_states(self, inputs, source)
    # Cohere scales its logits, Granite divides them, Gemma 2 caps them
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return TargetLogps.apply(hidden, head.weight, head.bias, target, scale, cap, temperature)


def response_sums(values, rows: list):
    """Sums of per-token values [N] over each response's trained tokens [R]."""
    lengths = to_device([sum(trained) for row in rows for trained in row.trained], values.device)
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


# ---- data: rows of published formats to token ids


class Row(NamedTuple):
    """A prompt and its K responses, as ids. trained: a bool per response token; extra: what else the row has.

    Data sets are held as arrays of ids and bytes of marks: 5 bytes a token, where lists take 48."""

    prompt: list
    responses: list
    trained: list
    extra: dict


class Drop(Exception):
    """A row that cannot be used. The message is the reason, under which the row is counted."""


def fail(message: str):
    """Ends the program on bad input: one sentence, exit code 2."""
    if RANK > 0:
        time.sleep(5)  # the first rank mostly says the same; torchrun stops the others before they repeat it
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def user_input(what: str):
    """Ends the program with one sentence where a library fails to read or write something that the user named."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # the end of the script says which options save memory
    except Exception as e:
        fail(f"{what} ({type(e).__name__}: {' '.join(str(e.__cause__ or e).split())[:300]})")


def split_name(name: str) -> tuple:
    """(source, config, split) of a data set's name; a path that exists is a source, whatever its colons."""
    return (name, "", "") if Path(name).exists() else (*name.split(":", 2), "", "")[:3]


def load_rows(option: str, name: str, default_split: str) -> Dataset:
    """A data set from a file, a directory (written by save_to_disk, or as downloaded from the hub), or the hub."""
    source, config, split = split_name(name)
    path = Path(source)
    with user_input(f"{option} {name}: cannot be read as a data set"):
        if path.suffix in (".json", ".jsonl", ".parquet", ".gz") and not path.is_dir():
            if not path.is_file() or not path.stat().st_size:
                raise ValueError("the file is empty" if path.is_file() else "the file does not exist")
            if config:
                raise ValueError(f"a file has no configuration {config}; a split is written {source}::{config}")
            kind, options = "parquet", {}
            if ".parquet" not in path.suffixes:
                kind, options = "json", dict(encoding="utf-8-sig")  # also drops a byte-order mark
                with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                    if file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n[").startswith(b"null"):
                        raise ValueError("it begins with null")  # which would crash the reader
            data = load_dataset(kind, data_files=glob.escape(source), split=split or "train", **options)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = load_from_disk(source)
            if isinstance(data, DatasetDict):
                if (split or default_split) not in data:
                    raise ValueError(f"it has the splits {', '.join(data)}, and not {split or default_split}")
                data = data[split or default_split]
            elif split:
                raise ValueError(f"it was saved without splits, so there is no {split}")
        else:
            data = load_dataset(source, config or None, split=split or default_split)
        if not len(data):
            raise ValueError("it has no rows")
    return data


def without_none(value):
    """A nested value less the None that readers of JSON and Parquet fill in for absent keys."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


def as_messages(value, role: str = "assistant") -> list:
    """A conversation as clean messages: from messages, ShareGPT turns (from/value), or the text of one turn."""
    if isinstance(value, str):
        return [dict(role=role, content=value)]
    messages = without_none(value)
    for message in messages:
        if "from" in message:
            speaker = message.pop("from")
            message["role"] = dict(human="user", gpt="assistant").get(speaker, speaker)
            message["content"] = message.pop("value")
        if "tool_calls" in message:
            message.setdefault("content", "")
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message needs a role and a text content, this one is {str(message)[:80]}")
    return messages


def has_content(response) -> bool:
    """Whether a response, text or messages, says anything."""
    return any(m["content"].strip() or "tool_calls" in m for m in as_messages(response))


def as_prompt(row: dict):
    """A row's prompt, text or messages: its prompt, question, or instruction with input, after its system text."""
    prompt = row.get("prompt")
    if prompt is None:
        prompt = row.get("instruction") if row.get("question") is None else row["question"]
        if prompt == "":
            raise Drop("empty prompt")
        material = row.get("input") or row.get("context")
        if prompt is not None:
            prompt = as_messages(f"{prompt}\n\n{material}" if material else prompt, "user")
    return with_system(row, as_messages(prompt, "user")) if prompt and row.get("system") else prompt


def with_system(row: dict, messages: list) -> list:
    """Messages after the row's column `system`, if it has one that they do not begin with."""
    if not row.get("system") or messages and messages[0]["role"] == "system":
        return messages
    return as_messages(row["system"], "system") + messages


def as_pair(row: dict) -> tuple:
    """(prompt, [chosen, rejected]) of any published layout: text or messages, the prompt apart or inside both."""
    if row.get("chosen") is None or row.get("rejected") is None:
        raise ValueError("it needs chosen and rejected, or prompt, completions and scores")
    prompt, chosen, rejected = as_prompt(row), row["chosen"], row["rejected"]
    if isinstance(chosen, list) or prompt and isinstance(prompt, list):
        talks = [as_messages(chosen), as_messages(rejected)]
        # a prompt in words is their first turn, whatever it says
        own = as_messages(row["prompt"]) if isinstance(row.get("prompt"), list) else []
        holds_prompt = all(talk[: len(own)] == own and len(talk) > len(own) for talk in talks)
        if not holds_prompt or not own and any(talk[0]["role"] == "assistant" for talk in talks):
            return as_messages(prompt or [], "user"), talks
        chosen, rejected = (with_system(row, talk) for talk in talks)
        n = len(with_system(row, own))
        if not own:
            n = min(shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
            # where they part at a user's turn, the answer before it belongs to both
            while n and chosen[n - 1]["role"] == "assistant":
                n -= 1
    elif prompt:
        return prompt, [chosen, rejected]
    else:  # HH-RLHF
        speaker = "\n\nAssistant:"
        if speaker not in chosen and prompt is not None:
            raise Drop("empty prompt")
        if speaker not in chosen:
            raise ValueError("chosen and rejected need a prompt: a column prompt or question, or turns as in HH-RLHF")
        turn = chosen.rfind(speaker, 0, shared_prefix(chosen, rejected))
        if turn < 0:
            raise Drop("chosen and rejected share no prompt")
        n = turn + len(speaker)
    return chosen[:n], [chosen[n:], rejected[n:]]


def shared_prefix(a, b) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@lru_cache
def special_tokens(tokenizer) -> dict:
    """Id and text of every special token; `all_special_ids` has the named ones only."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def refuse_special(tokenizer, *values):
    """Drops a row that holds a special token in any of its texts: data must not be able to end or begin a turn."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    for token in special_tokens(tokenizer).values():
        if json.dumps(token, ensure_ascii=False)[1:-1] in text:  # as JSON writes it
            raise Drop(f"special token {token} in the text; write a conversation as messages")


def without_end(tokenizer, messages: list) -> list:
    """Messages less the end-of-sequence token that the assistant's texts may end with already."""
    messages = [dict(message) for message in messages]
    for message in messages:
        if message["role"] == "assistant":
            message["content"] = message["content"].removesuffix(tokenizer.eos_token)
    return messages


def template_options(row: dict) -> dict:
    """A row's own arguments for the chat template: its tools (a list, or JSON text) and chat_template_kwargs."""
    reserved = "chat_template tokenize return_dict return_tensors add_generation_prompt continue_final_message".split()
    options = without_none(row.get("chat_template_kwargs") or {})
    options = {k: v for k, v in options.items() if k not in reserved}
    if row.get("tools"):
        options["tools"] = json.loads(row["tools"]) if isinstance(row["tools"], str) else without_none(row["tools"])
    return options


def render_text(tokenizer, messages: list, answer_next: bool = False, **options) -> str:
    """A conversation under the chat template, with the generation prompt if answer_next. Raises Drop."""
    options |= dict(tokenize=False, add_generation_prompt=answer_next)
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    if "strftime_now" in template:
        options["chat_template"] = date_macro() + template
    errors = []
    for parse in (parse_arguments, None):  # most templates take the arguments of a tool as an object, some as JSON text
        try:
            given = json.loads(json.dumps(messages, default=str))  # a copy
            calls = [call.get("function", call) for message in given for call in message.get("tool_calls", ())]
            for call in calls if parse else ():
                parse(call)
            text = tokenizer.apply_chat_template(given, **options)
            arguments = [call["arguments"] for call in calls if call.get("arguments")]
            if not any(is_misread(value, text) for value in arguments):
                return text
            errors.append("it takes no such arguments of a tool")
        except Exception as e:
            errors.append(e)
    raise Drop(f"refused by the chat template ({' '.join(str(errors[0]).split())[:60]})")


def parse_arguments(call: dict):
    """Turns a tool call's arguments into an object, if they are the JSON text of one."""
    if isinstance(call.get("arguments"), str):
        with contextlib.suppress(ValueError):
            value = json.loads(call["arguments"] or "{}")
            call["arguments"] = value if isinstance(value, dict) else call["arguments"]


def is_misread(arguments, text: str) -> bool:
    """Whether a template that takes the other form wrote the text: an object as Python writes it, or text in quotes."""
    as_json = json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, str):
        return as_json in text
    return str(arguments) in text and str(arguments) != as_json


def date_macro() -> str:
    """strftime_now of chat templates as a macro that writes the date of the run's start, also when it is resumed."""
    codes = "a A b B c d -d e f F H -H I -I j -j m -m M -M p S -S u U w W x X y Y".split()
    replaced = "".join(f" | replace('%{code}', {RUN_DATE[0].strftime('%' + code)!r})" for code in codes)
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n"


@lru_cache(16)
def text_ids(tokenizer, text: str) -> list:
    """Ids of a text that holds its special tokens already. Cached: the answers of a row ask for the same prompt."""
    return tokenizer(text, add_special_tokens=False).input_ids


def render(tokenizer, messages: list, answer_next: bool = False, **options) -> list:
    """Ids of `render_text`."""
    return text_ids(tokenizer, render_text(tokenizer, messages, answer_next, **options))


def plain_ids(tokenizer, text: str) -> list:
    """Ids of a text without a chat template, with the special tokens that the tokenizer adds, but at most one end."""
    ids = tokenizer(text).input_ids
    while ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids.pop()
    return ids


@lru_cache
def turn_end(tokenizer) -> tuple:
    """The token that ends an assistant's turn, the first special one after the content, and how many tokens the
    template writes after it; the end-of-sequence token and -1 where the template marks no end."""
    one, other = (render(tokenizer, as_messages("a", "user") + as_messages(answer)) for answer in ("b", "c"))
    tail = one[len(one) - shared_prefix(one[::-1], other[::-1]) :]
    ends = [(token, len(tail) - i - 1) for i, token in enumerate(tail) if token in special_tokens(tokenizer)]
    return ends[0] if ends else (tokenizer.eos_token_id, -1)


def stop_tokens(tokenizer) -> list:
    """Ids that end an answer: the end of an assistant's turn, and the end-of-sequence token."""
    return sorted({turn_end(tokenizer)[0], tokenizer.eos_token_id})


def encode(tokenizer, prompt, responses: list, row: dict, notes: Counter) -> tuple:
    """A prompt and its responses (text or messages), tokenised together, parted where their longest common prefix ends.

    Returns prompt ids, response ids, and for each response token whether the assistant says it. row may hold tools and
    chat_template_kwargs. Raises Drop."""
    options, replies = template_options(row), [without_end(tokenizer, as_messages(response)) for response in responses]
    refuse_special(tokenizer, prompt, replies, options)
    if not prompt:
        raise Drop("empty prompt")
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
        head = plain_ids(tokenizer, prompt)
        wholes = [plain_ids(tokenizer, prompt + reply[0]["content"] + tokenizer.eos_token) for reply in replies]
        trained = [[True] * len(whole) for whole in wholes]
    else:
        prompt = as_messages(prompt, "user")
        turns = [encode_turns(tokenizer, prompt + reply, len(prompt), options, notes) for reply in replies]
        if any(len(rows) > 1 for rows in turns):
            raise Drop("the chat template rewrites earlier turns")
        if not all(turns):
            raise Drop("no assistant turn to train on")
        wholes, trained = zip(*(rows[0] for rows in turns))
        head = prompt_ids(tokenizer, prompt, options)
    n = min(shared_prefix(head, whole) for whole in wholes)
    if not n:
        raise Drop("prompt and response share no token boundary")
    for reply, marks in zip(replies, trained):
        if reply[0]["role"] == "assistant" and reply[0].get("weight") != 0:
            # its start is after n if another response's first token has merged with the prompt's last
            marks[n : marks.index(True)] = [True] * (marks.index(True) - n)
    return wholes[0][:n], [whole[n:] for whole in wholes], [marks[n:] for marks in trained]


def encode_turns(tokenizer, messages: list, first: int, options: dict, notes: Counter) -> list:
    """A conversation with the assistant's turns from message `first` on to be trained, each with its end-of-turn token.

    Returns [(ids, trained)], a bool per id: one pair for the whole conversation, or one for each turn if the template
    rewrites earlier turns (drops their thinking, say). Raises Drop if generation would not see what training sees."""
    turns = []
    for i in range(max(first, 1), len(messages)):  # an assistant's turn that opens the conversation answers nothing
        if messages[i]["role"] != "assistant" or messages[i].get("weight") == 0:
            continue
        if i == first and messages[i - 1]["role"] == "assistant":  # which the prompt has begun
            begun = begun_text(tokenizer, messages[:i], options)
            ids = text_ids(tokenizer, begun + messages[i]["content"]) + [turn_end(tokenizer)[0]]
            turns.append((ids, shared_prefix(text_ids(tokenizer, begun), ids)))
        else:
            turns.append(encode_turn(tokenizer, messages[: i + 1], options, notes))
    if turns and all(turns[-1][0][: len(ids)] == ids for ids, _ in turns):
        whole = turns[-1][0]
        trained = [False] * len(whole)
        for ids, start in turns:
            trained[start : len(ids)] = [True] * (len(ids) - start)
        return [(whole, trained)]
    return [(ids, [False] * start + [True] * (len(ids) - start)) for ids, start in turns]


def encode_turn(tokenizer, messages: list, options: dict, notes: Counter) -> tuple:
    """Ids of a conversation up to the end of its last turn, the assistant's, and where it begins. Raises Drop."""
    *prompt, turn = messages
    text, opening = render_text(tokenizer, messages, **options), render_text(tokenizer, prompt, **options).rstrip()
    # a template may close the prompt with tokens that it writes elsewhere once a reply follows
    while token := next((t for t in special_tokens(tokenizer).values() if opening.endswith(t)), ""):
        opening = opening.removesuffix(token).rstrip()
    whole, before, reply, content, thoughts = (
        "".join(part.split())  # templates may move white space
        for part in (text, opening, text[len(opening) :], turn["content"], turn.get("reasoning_content", ""))
    )
    said = ["".join(message["content"].split()) for message in prompt]
    if not text.startswith(opening) or any(words in whole and words not in before for words in said):
        raise Drop("the chat template changes the prompt once a reply follows")
    if content not in reply:
        raise Drop("the chat template leaves out part of the reply")
    words_alone = {k: v for k, v in turn.items() if k != "tool_calls"}
    shows_calls = "tool_calls" in turn and render_text(tokenizer, [*prompt, words_alone], **options) != text
    notes["prompt messages that the chat template leaves out"] += sum(words not in whole for words in said)
    notes["replies whose reasoning_content the chat template leaves out"] += thoughts not in reply
    notes["replies whose tool_calls the chat template leaves out"] += "tool_calls" in turn and not shows_calls
    ids, head = end_turn(tokenizer, text_ids(tokenizer, text)), render(tokenizer, prompt, True, **options)
    start = shared_prefix(head, ids)
    if not (content or shows_calls) or len(ids) - start < 2:
        raise Drop("the reply is empty but for its end-of-turn token")
    notes["replies that do not begin where the generation prompt ends"] += start < len(head)
    return ids, start


def end_turn(tokenizer, ids: list) -> list:
    """Ids of a conversation up to the token that ends its last turn, the assistant's. Raises Drop."""
    end, after = turn_end(tokenizer)
    if after < 0:  # the template marks no end
        return ids + [end]
    if ids[-1 - after :][:1] == [end]:
        return ids[: len(ids) - after]
    ends = [i for i, token in enumerate(ids) if token in special_tokens(tokenizer)]  # a turn that ends in another way
    if not ends or tokenizer.decode(ids[ends[-1] + 1 :]).strip():
        raise Drop("the chat template writes no special token at the end of the reply")
    return ids[: ends[-1] + 1]


def prompt_ids(tokenizer, prompt: list, options: dict) -> list:
    """Ids of messages up to where the assistant is to speak, or to continue an answer that the last message begins."""
    if prompt[-1]["role"] == "assistant":
        return text_ids(tokenizer, begun_text(tokenizer, prompt, options))
    return render(tokenizer, prompt, True, **options)


def begun_text(tokenizer, messages: list, options: dict) -> str:
    """The text of a conversation whose last message is the beginning of an answer.

    A template that writes something before the answer (an empty thinking block, say) would put it between prompt and
    beginning, where generation never has it; then the beginning follows the generation prompt directly."""
    prompt, begun = messages[:-1], messages[-1]["content"]
    text = render_text(tokenizer, messages, continue_final_message=True, **options)
    start = text.rfind(begun.strip())
    without, opening = (render_text(tokenizer, prompt, answer_next, **options) for answer_next in (False, True))
    written = text[len(opening) : start] if text.startswith(opening) else "?"
    is_header = any(token in written for token in special_tokens(tokenizer).values())
    if opening == without or not written.strip() or is_header:  # as the template has it, which may trim the beginning
        return text[:start] + begun.lstrip()
    overlap = max(n for n in range(len(begun) + 1) if opening.endswith(begun[:n]))  # both may open the thinking block
    return opening + begun[overlap:]


def prepare(option: str, name: str, split: str, tokenizer, encode_row, add_columns=None) -> list:
    """All rows that encode_row(row, notes) makes of a data set, with a report of them and of what was dropped.

    add_columns(option, data): the data set with columns that encode_row reads beside its own."""
    data, rows, notes = load_rows(option, name, split), [], Counter()
    data = add_columns(option, data) if add_columns else data
    columns = f"its columns are {', '.join(data.column_names)}"
    for number, row in enumerate(tqdm(data, desc="tokenise", leave=False, disable=RANK > 0 or not sys.stderr.isatty())):
        where = f"{option} {name}, row {number} (from 0)"
        with user_input(f"{where}: not in a known format; {columns}; see 'Reads' in --help"):
            try:
                for prompt, responses, trained, extra in encode_row(row, notes):
                    responses, trained = [array("i", ids) for ids in responses], [bytes(marks) for marks in trained]
                    rows.append(Row(array("i", prompt), responses, trained, extra))
            except Drop as drop:
                notes[f"dropped: {drop}"] += 1
    counts = ", ".join(f"{n} {note}" for note, n in notes.items() if n) or "none dropped, none cut"
    if not rows:
        fail(f"{option} {name}: none of its {len(data)} rows can be used ({counts}); {columns}")
    print0(f"{option} {name}: {len(rows)} rows from {len(data)}; {counts}")
    lengths = dict(prompt=[len(row.prompt) for row in rows], response=[len(r) for row in rows for r in row.responses])
    for name, values in lengths.items():
        if any(values):  # prompts alone have no response
            median, most, longest = (sorted(values)[int(q * (len(values) - 1))] for q in (0.5, 0.95, 1))
            print0(f"  tokens of a {name}: {median} (median), {most} (95%), {longest} (longest)")
    shown = tokenizer.decode([*rows[0].prompt])
    shown = shown if len(shown) <= 200 else f"...{shown[-200:]}"
    for is_trained, part in groupby(zip(rows[0].trained[0], rows[0].responses[0]), key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in part])
        shown += f"[[{text[:300]}]]" if is_trained else text[:100]
    print0(f"  example{', [[trained]]' if any(lengths['response']) else ''}: " + shown.replace("\n", "\n  | "))
    return rows


def prepare_split(args, tokenizer, encode_row, by_prompt: bool = True, add_columns=None) -> tuple:
    """Rows to train on, and held-out rows: of --eval-dataset, or a share of --dataset's prompts (or of its rows)."""
    rows = prepare("--dataset", args.dataset, "train", tokenizer, encode_row, add_columns)
    if args.eval_dataset:
        return rows, prepare("--eval-dataset", args.eval_dataset, "test", tokenizer, encode_row, add_columns)
    keys = [tuple(row.prompt) if by_prompt else i for i, row in enumerate(rows)]
    every = list(dict.fromkeys(keys))
    count = min(len(every) - 1, round(args.eval_fraction * len(every)))
    held = set(random.Random(args.seed).sample(every, count))
    print0(f"  held out: {count} of {len(every)} {'prompts' if by_prompt else 'rows'}")
    held_out = [row for row, key in zip(rows, keys) if key in held]
    return [row for row, key in zip(rows, keys) if key not in held], held_out


# ---- rows: packed, a prompt and its K responses lie end to end, the prompt computed once, nothing padded
#
#      P1 R1a R1b P2 R2a R2b ...     R1b attends to P1 and itself; its positions start at len(P1)


SPARE = Row([0], [[0]], [[True]], {})  # for a rank without rows
# torch 2.11 groups heads without being asked
HAS_GQA_OPTION = "enable_gqa" in inspect.signature(varlen_attn).parameters


def to_device(values, device) -> torch.Tensor:
    """A number, list or CPU tensor on the device; the host does not wait for the copy."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def count_tokens(row: Row) -> int:
    """Tokens of a row, its prompt counted once."""
    return len(row.prompt) + sum(map(len, row.responses))


def padded_width(row: Row) -> int:
    """Tokens of the longest response with its prompt."""
    return len(row.prompt) + max(map(len, row.responses))


def segment_lengths(row: Row) -> tuple:
    """The length of the first segment, and those of the segments that see it: a prompt and its responses. A single
    response is one segment with its prompt."""
    lengths = [len(response) for response in row.responses]
    return (len(row.prompt) + lengths[0], ()) if len(lengths) == 1 else (len(row.prompt), tuple(lengths))


def pack(rows: list, device) -> tuple:
    """Rows end to end in one sequence. Returns (dict(inputs, source, last), target).

    inputs: of the model; source [N]: positions that predict the trained tokens; last [R]: position of each response's
    last token; target [N]: the trained tokens. inputs["rows"] is for `rows_attention`: the segments' lengths and, for
    FlashAttention, their ends, and the keys that each segment sees (None: those of its own tokens)."""
    ids, positions, source, last, target, keys, q_lengths, k_lengths = [], [], [], [], [], [], [], []
    segments = [segment_lengths(row) for row in rows]
    for row, (first, others) in zip(rows, segments):
        start, length = len(ids), len(row.prompt)
        ids += row.prompt
        positions += range(length)
        keys += range(start, start + first)
        for response, trained in zip(row.responses, row.trained):
            begin = len(ids)
            ids += response
            positions += range(length, length + len(response))
            # the prompt's last token predicts the first of every response
            predictors = [start + length - 1, *range(begin, len(ids) - 1)]
            source += [predictor for predictor, keep in zip(predictors, trained) if keep]
            target += [token for token, keep in zip(response, trained) if keep]
            last.append(len(ids) - 1)
            keys += [*range(start, start + length), *range(begin, len(ids))] if others else []
        q_lengths += [first, *others]
        k_lengths += [first, *(first + other for other in others)]
    columns = [ids, positions, source, last, target, keys, [0, *accumulate(q_lengths)], [0, *accumulate(k_lengths)]]
    numbers = to_device([number for column in columns for number in column], device)  # one copy for all
    ids, positions, source, last, target, keys, cu_q, cu_k = numbers.split([len(column) for column in columns])
    attention = dict(segments=segments, keys=keys if len(keys) > len(ids) else None)
    attention |= dict(cu_q=cu_q.int(), cu_k=cu_k.int(), max_q=max(q_lengths), max_k=max(k_lengths))
    inputs = dict(input_ids=ids[None], position_ids=positions[None], rows=attention, use_cache=False)
    return dict(inputs=inputs, source=source, last=last), target


def pad(rows: list, device) -> tuple:
    """`pack` for a model that cannot follow packed rows: each response with its prompt, padded on the right."""
    pairs = [(row.prompt, response, trained) for row in rows for response, trained in zip(row.responses, row.trained)]
    packed, target = pack([Row(prompt, [response], [trained], {}) for prompt, response, trained in pairs], device)
    lengths, width = [len(prompt) + len(response) for prompt, response, _ in pairs], max(map(padded_width, rows))
    places = to_device([i * width + j for i, length in enumerate(lengths) for j in range(length)], device)

    def padded(values):
        return values.new_zeros(len(pairs) * width).index_copy(0, places, values).view(-1, width)

    ids = packed["inputs"]["input_ids"][0]
    inputs = dict(input_ids=padded(ids), attention_mask=padded(torch.ones_like(ids)), use_cache=False)
    return dict(inputs=inputs, source=places[packed["source"]], last=places[packed["last"]]), target


def rows_attention(
    module, q, k, v, *args, dropout=0.0, scaling=None, sliding_window=None, rows=None, softcap=None, s_aux=None, **_
):
    """Attention over packed rows: a response sees its own prompt and itself. q [1, H, T, D]; k, v [1, G, T, D].

    softcap: of Gemma 2's scores; s_aux [H]: GPT-OSS's sinks, a score beside those of the keys."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings may have promoted them
    options = dict(scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    is_plain = softcap is None and s_aux is None
    has_flash_width = q.shape[-1] == v.shape[-1] and q.shape[-1] in range(8, 257, 8)
    if q.is_cuda and v.dtype != torch.float32 and has_flash_width and is_plain and not dropout:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        if rows["keys"] is not None:
            k, v = k[rows["keys"]], v[rows["keys"]]
        if not HAS_GQA_OPTION:
            options.pop("enable_gqa")
        lengths = [rows[name] for name in ("cu_q", "cu_k", "max_q", "max_k")]
        # FlashAttention aligns its causal mask to a segment's last key
        window = (sliding_window - 1 if sliding_window else -1, 0)
        return varlen_attn(q, k, v, *lengths, window_size=window, **options)[None], None

    def attend(q, k, v):  # [n, H, Q, D], [n, G, K, D]: the queries are the last Q of K positions
        Q, K = q.shape[2], k.shape[2]
        if is_plain and Q == K and (sliding_window or K) >= K:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, **options)
        j = torch.arange(K, device=q.device)
        i = j[K - Q :, None]
        visible = (j <= i) & (j > i - (sliding_window or K))  # [Q, K]
        if is_plain:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, **options)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scaling
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores.masked_fill(~visible, -math.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.to(scores.dtype)[:, None, None].expand(len(q), -1, Q, 1)], -1)
        return F.dropout(scores.softmax(-1), dropout)[..., :K] @ v

    # neighbours of equal lengths are one batch of n
    groups = [(lengths, len(list(same))) for lengths, same in groupby(rows["segments"])]
    parts = [x[0].split([n * (first + sum(others)) for (first, others), n in groups], 1) for x in (q, k, v)]
    out = []
    for ((first, others), n), *group in zip(groups, *parts):
        split = [x.unflatten(1, (n, -1)).transpose(0, 1).split([first, *others], 2) for x in group]  # [n, H, length, D]
        (q0, *qs), (k0, *ks), (v0, *vs) = split
        segments = [attend(q0, k0, v0)]
        for q1, k1, v1 in zip(qs, ks, vs):
            segments.append(attend(q1, torch.cat([k0, k1], 2), torch.cat([v0, v1], 2)))
        out.append(torch.cat(segments, 2).transpose(0, 1).flatten(1, 2))  # [H, n (P + R1 + ...), D]
    return torch.cat(out, 1).transpose(0, 1)[None], None  # [1, T, H, D]


AttentionInterface.register("packed_rows", rows_attention)
AttentionMaskInterface.register("packed_rows", lambda *args, **kwargs: None)  # rows_attention makes its own


def forwards(rows: list, args, model, device, spare: Row = SPARE):
    """This rank's rows in forward passes of at most --tokens-per-forward tokens: yields (rows, weight, inputs, target),
    the last two from `pack` or `pad`.

    A longer row is a pass of its own. All ranks make equally many passes, as FSDP needs; one that has run out repeats
    a row with weight 0, or, if it has none, the spare one."""
    layout, key = (pack, segment_lengths) if model.packs else (pad, padded_width)
    groups, responses, tokens = [], 0, 0
    for row in sorted(rows, key=key):
        responses += len(row.responses)
        tokens += count_tokens(row)
        # padded, every response takes the width of the widest, which is the last
        size = tokens if model.packs else responses * padded_width(row)
        if not groups or size > args.tokens_per_forward:
            groups.append([])
            responses, tokens = len(row.responses), count_tokens(row)
        groups[-1].append(row)
    most = len(groups)
    if WORLD > 1:
        most = int(over_ranks(torch.tensor(most, device=device), dist.ReduceOp.MAX))
    for i in range(most):
        group, weight = (groups[i], 1.0) if i < len(groups) else ([rows[0] if rows else spare], 0.0)
        yield group, weight, *layout(group, device)


@torch.no_grad()
def response_values(values_of, model, rows: list, args, device, shared: bool = True) -> torch.Tensor:
    """values_of(rows, inputs, target), a number for each response, for the responses of all rows in order [R].

    shared: all ranks have the same rows and share the work; else each rank has its own."""
    counts = [len(row.responses) for row in rows]
    first = {id(row): count for row, count in zip(rows, accumulate([0, *counts]))}
    mine = rows[RANK::WORLD] if shared else rows
    values = torch.zeros(sum(counts), device=device)
    model.eval()
    for group, weight, inputs, target in forwards(mine, args, model, device):
        found = values_of(group, inputs, target)
        if weight:
            indices = [first[id(row)] + i for row in group for i in range(len(row.responses))]
            values[to_device(indices, device)] = found
    model.train()
    return over_ranks(values).cpu() if shared else values


# ---- models: loading, sharding, checking, one optimiser step

CHAT_TEMPLATE = (  # for tokenizers that come without one; the end-of-sequence token ends every turn
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def load_tokenizer(name: str):
    """A checkpoint's tokenizer; without a chat template it gets a plain one."""
    with user_input(f"{name}: no tokenizer can be loaded from it"):
        if not Path(name).exists() and name.startswith(("runs/", "./", "../", "/")):
            raise FileNotFoundError("there is no such directory; run the stage that writes it first")
        tokenizer = AutoTokenizer.from_pretrained(name)
        end = tokenizer.eos_token
        if end is None:
            raise ValueError("it has no end-of-sequence token, so that no answer could ever end")
        if not tokenizer.chat_template:
            print0(f"note: {name} has no chat template; messages are written as 'role: content{end}'")
            tokenizer.chat_template = CHAT_TEMPLATE
        try:
            shown = render_text(tokenizer, [dict(role="user", content="one"), dict(role="assistant", content="two")])
        except Drop as drop:
            raise ValueError(f"a conversation is {drop}") from drop
        if "one" not in shown or "two" not in shown:
            raise ValueError(f"its chat template shows {shown[:100]!r} in place of what is said")
        with tempfile.TemporaryDirectory() as folder:  # the next stage must read the same ids
            save_tokenizer(tokenizer, Path(folder))
            reloaded = AutoTokenizer.from_pretrained(folder)
        for text in (shown, "Hello,  world!\n 12 + 3 = 15. é 你好 <a>", "x<|y|>", f"a{end}b {end} c"):
            if tokenizer(text).input_ids != reloaded(text).input_ids:
                raise ValueError("it reads other ids once it is saved and loaded again")
    return tokenizer


def save_tokenizer(tokenizer, directory: Path):
    """Saves a tokenizer with the option `legacy`, which changes the ids and which transformers leaves out."""
    tokenizer.save_pretrained(directory)
    if hasattr(tokenizer, "legacy"):
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(legacy=tokenizer.legacy), indent=2))


def fit_length(args, name: str) -> int:
    """--max-length, or what the model's positions allow."""
    with user_input(f"{name}: no configuration can be loaded from it"):
        config = AutoConfig.from_pretrained(name).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or args.max_length
    ropes, limits = getattr(config, "rope_parameters", None) or {}, []
    for rope in [ropes, *(x for x in ropes.values() if isinstance(x, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):  # their angles depend on the longest row of a forward
            original = getattr(config, "original_max_position_embeddings", positions)
            original = rope.get("original_max_position_embeddings") or original
            limits.append((original, f"changes its rotary embeddings beyond {original} tokens"))
    for field in ("index_topk", "keep_window_size"):  # beyond it transformers' own attention is not causal
        if limit := getattr(config, field, None):
            limits.append((limit, f"attends to {limit} tokens only"))
    for limit, what in limits:
        if args.max_length > limit:
            fail(f"--max-length {args.max_length}: {name} {what}; set at most {limit}")
    if positions < args.max_length:
        print0(f"note: --max-length {args.max_length} is lowered to the {positions} positions of {name}")
    return min(args.max_length, positions)


def read_model(auto, name: str, tokenizer, **options):
    """A checkpoint with float32 weights, on the CPU; model.stored_dtype is the dtype in which they were stored."""
    with user_input(f"{name}: no model can be loaded from it"):
        options |= dict(attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
        model, found = auto.from_pretrained(name, use_safetensors=True, **options)  # a pickle could run anything
        missing = sorted({*found["missing_keys"]} - {"score.weight"})  # a value model's head may be new
        if missing:
            raise ValueError(f"it lacks the weights {', '.join(missing[:3])}")
        embeddings = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > embeddings:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its model only {embeddings}")
        damaged = [weight for weight, values in model.named_parameters() if not values.isfinite().all()]
        if damaged:
            raise ValueError(f"its weights are damaged: {damaged[0]} holds numbers that are not finite")
        if model.base_model is model:
            raise ValueError(f"{type(model).__name__} does not name its base model, which this script needs")
        model.stored_dtype = AutoConfig.from_pretrained(name).dtype or torch.float32
    return model


def load_model(auto, name: str, tokenizer, args, device, dtype, *methods, dropout: bool = False, **options):
    """`read_model` and `prepare_model` in one."""
    model = read_model(auto, name, tokenizer, **options)
    return prepare_model(model, name, args, device, dtype, *methods, dropout=dropout)


def prepare_model(model, name: str, args, device, dtype, *methods, dropout: bool = False):
    """The model on its device in training mode, with packed rows if it can follow them, `methods` bound, sharded over
    the ranks (FSDP2)."""
    for module in model.modules():  # without noise two forward passes are the same function
        if hasattr(module, "router_jitter_noise"):  # PhiMoE's is a threshold too: its router stays in evaluation mode
            module.eval().train = lambda mode=True, module=module: module
        for field in [k for k, v in vars(module).items() if isinstance(v, float) and k != "router_jitter_noise"]:
            if "jitter" in field or not dropout and ("dropout" in field or field == "p"):
                setattr(module, field, 0.0)
    methods = (hidden_states, *methods)
    for method in methods:
        setattr(model, method.__name__, types.MethodType(method, model))
    model.eval()
    check_logps(model, name)
    check_packing(model, torch.device("cpu"), torch.float32)  # float32 shows small differences
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    if not dist.is_initialized():
        return model.to(device).train()

    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            for parameter in model.parameters():  # else FSDP would cast a frozen model in every forward
                parameter.data = parameter.data.bfloat16()
    decoder = model.get_decoder() or model  # of a multimodal model, the part that reads text
    # each call moves its part from the CPU to the device, which so holds its share and one whole layer at most
    for layer in next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList)):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(model, method.__name__)
    if dtype == torch.bfloat16 and model.packs:  # only bfloat16 has FlashAttention
        check_packing(model, device, dtype)
        model.reshard()  # a forward without a backward leaves FSDP's root gathered
    return model.train()


def hidden_states(self, inputs, source, last=None):
    """The hidden states that predict the trained tokens [N, d]. A method of the model; inputs as of `pack`."""
    return self.base_model(**inputs).last_hidden_state.flatten(0, 1)[source]


@contextlib.contextmanager
def short_windows(model):
    """For the time of a short probe, sliding windows are four tokens long, so that ignoring them shows."""
    with contextlib.ExitStack() as restore:
        for holder in (model.config, model.config.get_text_config(), *model.modules()):
            for field in ("sliding_window", "attention_chunk_size"):
                if isinstance(vars(holder).get(field), int):
                    restore.callback(setattr, holder, field, vars(holder)[field])
                    setattr(holder, field, 4)
        yield


def probe_rows(model) -> list:
    """A row of two answers and one of one answer, of random tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (25,), generator=torch.Generator().manual_seed(0)).tolist()
    two = Row(ids[:5], [ids[5:9], ids[9:15]], [[True] * 4, [True] * 6], {})
    return [two, Row(ids[15:18], [ids[18:]], [[True] * 7], {})]


@torch.no_grad()
def check_logps(model, name: str):
    """Fails where `token_logps` does not give the log-probabilities of the model's own logits."""
    if not hasattr(model, "token_logps"):
        return
    gap, (batch, target) = math.inf, pad(probe_rows(model), torch.device("cpu"))
    model.set_attn_implementation("eager")
    if isinstance(model.get_output_embeddings(), torch.nn.Linear):
        logits = model(**batch["inputs"]).logits.flatten(0, 1)[batch["source"]]
        own = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        gap = (model.token_logps(**batch, target=target)[0] - own).abs().max()
    if not gap < 1e-3:
        fail(f"{name}: the output layer of {type(model).__name__} does more than this script knows")


@torch.no_grad()
def check_packing(model, device, dtype):
    """Sets model.packs: whether packed rows give the hidden states that the model's own attention gives padded rows."""
    bound, rows = 1e-3 if dtype == torch.float32 else 0.05, probe_rows(model)
    packed, why = None, ""
    with short_windows(model):
        try:
            model.set_attn_implementation("packed_rows")
            packed = model.hidden_states(**pack(rows, device)[0]).float()
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, RuntimeError, ValueError) as e:
            why = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        # after a failure, this forward also takes FSDP back to its state between forwards
        model.set_attn_implementation("eager")
        padded = model.hidden_states(**pad(rows, device)[0]).float()
    if packed is not None:
        difference = (packed - padded).norm() / padded.norm()
        why = "" if difference < bound else f"difference {difference:.1g}"
    model.packs = not why
    if model.packs:
        model.set_attn_implementation("packed_rows")
    else:
        print0(f"note: {type(model).__name__} cannot follow packed rows ({why}); they are padded, which is slower")


# ---- runs: ranks, options, the output directory

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RUN_DATE = [datetime.now()]  # what chat templates write as the date: that of the run's start, also after --resume
for library in (transformers.utils.logging, datasets.utils.logging):  # they would break up the script's own lines
    library.disable_progress_bar()
    library.set_verbosity(50)  # critical


def print0(*text):
    """Prints on the first rank."""
    if RANK == 0:
        print(*text, flush=True)


def setup_distributed(args) -> tuple:
    """This rank's device and the dtype of the computation; joins the other ranks."""
    device, dtype = torch.device("cpu"), torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        major, minor = torch.cuda.get_device_capability(device)
        if args.dtype == "auto" and major >= 8:
            dtype = torch.bfloat16
        elif args.dtype != "float32" and major < 8:
            result = "the run computes in float32" if args.dtype == "auto" else "it is emulated; try --dtype float32"
            print0(f"note: a GPU of compute capability {major}.{minor} has no bfloat16, which needs 8.0: {result}")
    elif torch.version.cuda:
        print0(
            f"note: this torch is built for CUDA {torch.version.cuda} but finds no GPU: the run computes on the CPU in "
            f"{str(dtype)[6:]}; for a GPU, update its driver, or install a torch built for an older CUDA"
        )
    if WORLD > 1 or dtype == torch.bfloat16:  # FSDP's mixed precision, for one rank as for many
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if WORLD == 1 else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2), **alone)
    torch.manual_seed(args.seed)
    return device, dtype


def over_ranks(values, op=dist.ReduceOp.SUM):
    """The sum (or maximum) over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(values, op)
    return values


def check_numbers(args, above_zero: tuple = (), at_most_one: tuple = (), signed: tuple = ()):
    """Fails on a number that is out of range: those named are above 0, at most 1 or of any sign, others 0 or more."""
    above_zero += ("epochs", "batch_size", "tokens_per_forward", "max_length", "max_grad_norm")
    above_zero += ("vocab_size", "hidden_size", "num_layers", "num_heads")  # sft.py --from-scratch
    for name, value in asdict(args).items():
        if not isinstance(value, (int, float)):
            continue
        needed = ""
        if isinstance(value, float) and not math.isfinite(value):
            needed = "a finite number"
        elif name in above_zero and value <= 0:
            needed = "above 0"
        elif name in ("warmup_ratio", *at_most_one) and value > 1:
            needed = "at most 1"
        elif name == "eval_fraction" and value >= 1:
            needed = "below 1"
        elif value < 0 and name not in signed:
            needed = "0 or more"
        if needed:
            fail(f"--{name.replace('_', '-')} {value}: must be {needed}")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs wandb, which is not installed (pip install wandb)")


RUN_FILES = set("args.json metrics.jsonl curves.png report.json test_time.png value wandb".split())
# options that change no result
FREE_OPTIONS = set("resume overwrite track output_dir save_every tokens_per_forward gradient_checkpointing".split())
FREE_OPTIONS.add("sample_tokens")


def fingerprint(path: Path) -> str:
    """A hash of a file's name, size, and first and last 16 MB; of all such files of a directory but those of a run."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        parts = file.relative_to(path).parts
        if not file.is_file() or RUN_FILES & {*parts} or parts and parts[0].startswith(("checkpoint-", "saving")):
            continue
        size = file.stat().st_size
        with file.open("rb") as f:
            digest.update(f"{file.name} {size}".encode() + f.read(2**24))
            f.seek(max(f.tell(), size - 2**24))
            digest.update(f.read())
    return digest.hexdigest()[:16]


def open_run(args, *inputs) -> tuple:
    """The output directory, the checkpoint to resume from or None, and the run's signature: arguments, fingerprints of
    inputs. Ends the program if that run is finished; fails if it would mix with another run or with its inputs."""
    out, error, last, signature, date = Path(args.output_dir), None, None, None, RUN_DATE[0]
    if RANK == 0:  # one rank looks, so that all do the same
        with user_input(f"--output-dir {out}: cannot be used"):
            files = [path for name in inputs if name and (path := Path(split_name(name)[0])).exists()]
            signature = {name: value for name, value in asdict(args).items() if name not in FREE_OPTIONS}
            signature |= {f"content of {file}": fingerprint(file) for file in files}
            signature = json.loads(json.dumps(signature))  # tuples become lists, as in the file
            record = out / "args.json"
            before = json.loads(record.read_text()) if args.resume and record.exists() else None
            is_used = out.exists() and any(file.suffix != ".part" for file in out.iterdir())  # a write that was killed
        if any(out.resolve() in (file.resolve(), *file.resolve().parents) for file in files):
            error = f"--output-dir {out}: holds what the run reads; choose another"
        elif before:
            old = before.get("signature", {})
            names = sorted(name for name in {*old, *signature} if old.get(name) != signature.get(name))
            changed = "; ".join(f"{name} was {old.get(name)!r} and is {signature.get(name)!r}" for name in names)
            if changed:
                error = f"--resume: {out} holds another run ({changed[:500]}); choose another --output-dir"
            date = datetime.fromisoformat(before.get("date", date.isoformat()))
            checkpoints = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
            last = max(checkpoints, key=lambda path: int(path.name[11:]), default=None)
            last = "finished" if before["finished"] else last
        elif is_used and not args.overwrite:
            what = "is not empty, and holds no args.json to resume from" if args.resume else "is not empty"
            error = f"--output-dir {out}: {what}; choose another, --resume a run that stands there, or --overwrite it"
    if WORLD > 1:
        shared = [error, last, signature, date]
        dist.broadcast_object_list(shared)
        error, last, signature, date = shared
    if error:
        fail(error)
    if last == "finished":
        print0(f"{out}: finished already with the same arguments and data; nothing to do")
        sys.exit(0)
    RUN_DATE[0] = date
    print0(f"{Path(__file__).name}: loading {', '.join(dict.fromkeys(name for name in inputs if name))}")
    return out, last, signature


def clear_run(args, out: Path, signature: dict):
    """Removes what an earlier run wrote, but its model, and writes args.json. Call it after all input has been read."""
    if RANK == 0:
        with user_input(f"--output-dir {out}: cannot be written"):
            out.mkdir(parents=True, exist_ok=True)
            for stale in (*out.glob("checkpoint-*"), *out.glob("saving*")):
                shutil.rmtree(stale)
            for name in ("metrics.jsonl", "curves.png", "report.json", "test_time.png"):
                (out / name).unlink(missing_ok=True)
            record = dict(script=Path(__file__).name, finished=False, date=RUN_DATE[0].isoformat(), args=asdict(args))
            record |= dict(torch=torch.__version__, transformers=transformers.__version__, ranks=WORLD)
            write_json(out / "args.json", record | dict(signature=signature))
    if WORLD > 1:
        dist.barrier()
        if not out.exists():
            fail(f"--output-dir {out}: rank {RANK} does not see it; choose one on a disk that all nodes share")


def write_json(path: Path, value):
    """Writes a file beside its place and renames it, so that it is never half there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    try:
        main(args)
    except torch.OutOfMemoryError as e:
        fail(f"out of memory; --help lists the options that save memory ({str(e)[:150]})")
