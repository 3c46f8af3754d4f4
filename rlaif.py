# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<=2.13.0", "transformers>=5.17,<5.40", "datasets>=4", "tyro>=1.0", "wandb", "matplotlib", "tqdm"]
# ///
"""Reinforcement learning from AI feedback: data sets labelled, rewritten, chosen or invented by language models, for every other script.

    P(a > b) = 1/2 [ P(A | a as A, b as B) + P(B | b as A, a as B) ],    P(letter) of a judge's reply, renormalised over the two letters
    RLAIF (Lee et al. 2023, arXiv 2309.00267): both orders, averaged, so that a taste for a position cancels; a soft label.

  label       Pairs, or K answers a prompt, given or sampled here, compared two by two: soft preferences (pairs.jsonl), or, of K > 2, each
              answer's mean P against the others (rankings.jsonl; Starling-7B, Zhu et al. 2024). A pair whose orders contradict each other, or
              near P = 1/2, is a tie. Principles are drawn at random for every judgement, and reasoning clamps P to 0.4 ... 0.6:
              Constitutional AI (Bai et al. 2022, arXiv 2212.08073), section 4.
  revise      Critique and revision of the policy's own answers by random principles, several rounds, each from the last one's revision:
              sft.jsonl. Constitutional AI, section 3.
  best-of-n   N answers a prompt, scored by reward models or by the judge: the best (sft.jsonl: rejection sampling of Llama 3, arXiv
              2407.21783), the best and the worst (pairs.jsonl: the online pairs of Qwen2, arXiv 2407.10671), all (rankings.jsonl), and the
              prompts whose scores differ by --min-spread (prompts.jsonl: ChatGLM-RLHF, arXiv 2404.00934). With the policy as its own judge
              and --scale points: Self-Rewarding Language Models (Yuan et al. 2024, arXiv 2401.10020).
  synthesise  Magpie (Xu et al. 2024, arXiv 2406.08464): an aligned model, given the chat template up to where a user speaks, invents
              the user's turn, then answers it: raw.jsonl, and what passes the filters, sft.jsonl and prompts.jsonl.
  compare     The win rate of policy A over policy B by the judge, in both orders, with its 95% interval (the automatic rater of Gemma).
  weigh       The rewards of a rubric's options, fitted so that reward model and rubric together put labelled answers in their order:
              Rule Based Rewards (Mu et al. 2024, arXiv 2411.01111). Writes the rubric.json of `ppo.py --judge --rubric` (GPT-4).
  audit       What a judge's labels are worth: agreement with given ones, position bias, length bias, consistency, calibration; by kind.

The judge's reward 1 to 10 while training (direct RLAIF) is --judge of ppo.py and grpo.py.

Departures
  1. A pair whose orders contradict each other, or nearer to 1/2 than --tie-margin, is a tie, counted and left out; --orders average
     --tie-margin 0 keeps all but P = 1/2, as Lee et al. In rankings every P counts, ties and contradictions too; Starling's were one reply a ranking.
  2. Answers that were cut off are not used as data: a model trained on them would learn to stop in the middle.
  3. Magpie: near repeats are found by the policy's own mean hidden states, not by an embedding model, and the earliest stays; ratings are
     1 to 10; the difference to the base model's reward is left out. ChatGLM drops prompts by the variance of their scores, here by the range.
  4. Self-rewarding: the additive prompt has the paper's parts in our words. Rule Based Rewards: one question with options, no propositions;
     all pairs are fitted, none is held out (the authors: 5 %).
  5. Nothing judges what stands inside <think>, and the judge sees no system prompts.

The judge is a checkpoint, asked through its own chat template and tokenizer (in float32, 4 bytes a parameter, whole on each GPU before it is
sharded); or, with --judge-url, any server that speaks OpenAI's protocol, to which alone the key of --judge-key goes. What it is asked stands below,
in REQUESTS; --requests FILE (JSON) replaces any of them: {talk} is the conversation, {a} and {b} or {answer} what is judged, {conversation} both in
one, and {principle} a line of --principles, worded to follow "Which answer", such as "is more honest". A model that thinks is best asked not to
(--judge-body).

Reads prompts, pairs (chosen, rejected) or K answers (completions), in any layout that the other scripts read; other columns are kept.
Writes the data sets above, report.json and, for audit, audit.png to --output-dir, args.json with all arguments, versions and fingerprints
of what was read. Every batch of rows is on disk (rows.part) before the next begins: with --resume no finished batch is lost or asked for again.

  python rlaif.py audit --dataset data/grid/test_preferences.jsonl --requests data/grid/requests.json              the grid world
  python rlaif.py label --model runs/sft --judge Qwen/Qwen3-8B --dataset trl-lib/ultrafeedback-prompt --rows 1000  one GPU
  torchrun --nproc-per-node 8 rlaif.py best-of-n --model Qwen/Qwen3-8B --reward-model runs/reward_model --dataset trl-lib/ultrafeedback-prompt   many

  Figure                 good               if not
  agreement              above 0.8          (of decided pairs) see report.json by kind, audit.png by gap; a larger judge, --reasoning, --requests
  same_position          below 0.2          the judge prefers a place: its pairs become ties; a larger judge, or --orders average
  first_position         about 0.5          of the pairs decided by the place, those that went to the first; near 0 or 1: one place is preferred
  agreement_by_mean      as agreement       the same by the mean P alone, ties included
  abstentions            0                  the judge does not reply with a letter: mend --requests; see --min-mass
  prefers_longer         as given_longer    above it: length bias; train the reward model with --length-buckets
  consistency            above 0.8          two judgements of a pair agree so often (chance: 0.5): other principles, other verdicts
"""

import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, NamedTuple

import tyro


@dataclass
class RunArgs:
    output_dir: str = "data/rlaif"
    """where data sets and report go"""
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
    """continue from the rows that are in --output-dir; a finished run of the same arguments is left as it is"""
    overwrite: bool = False
    """replace what is in --output-dir"""


@dataclass(kw_only=True)
class RowsArgs:
    dataset: str
    """hub id (name or name:config), .jsonl/.json/.parquet file (also .gz), or saved directory"""
    dataset_split: str = "train"
    """split, for hub data sets and saved directories"""
    rows: int = 0
    """rows of --dataset, drawn at random (0: all)"""


@dataclass(kw_only=True)
class PolicyArgs:
    model: str
    """policy that answers: hub id or directory"""
    temperature: float = 1.0
    """of its sampling"""
    top_p: float = 1.0
    """nucleus of its sampling"""
    max_new_tokens: int = 1024
    """tokens of an answer"""


@dataclass
class AnswerArgs(PolicyArgs):
    allow_special: bool = False
    """keep prompts whose text contains one of the tokenizer's special tokens (else dropped: a user must not be able to end a turn)"""


@dataclass
class JudgeArgs:
    judge: str = "runs/sft"
    """causal language model that judges: hub id or directory; with --judge-url the model's name there"""
    judge_url: str = ""
    """base address of a server with OpenAI's protocol, such as http://localhost:8000/v1 (empty: --judge is loaded here)"""
    judge_key: str = ""
    """name of the environment variable that holds the key for --judge-url, such as OPENAI_API_KEY (empty: no key is sent)"""
    judge_parallel: int = 8
    """requests to --judge-url at a time, by rank"""
    judge_body: str = ""
    """JSON object to merge into every request, e.g. {"chat_template_kwargs": {"enable_thinking": false}}; null takes a key out"""
    requests: str = ""
    """JSON file with requests to the judge in place of those in this script"""


@dataclass
class LetterArgs(JudgeArgs):
    min_mass: float = 0.01
    """the judge abstains where the replies it was given to choose from are together less likely than this"""


@dataclass
class PairArgs(LetterArgs):
    principles: str = ""
    """text file with a principle a line, one of which is drawn for every judgement (empty: the request `principle`)"""
    judgements: int = 1
    """judgements of each pair, averaged; each with a principle and a reasoning of its own (Lee et al.: more of them did not help)"""
    reasoning: bool = False
    """the judge reasons before it chooses (greedily; at temperature 1 with several --judgements)"""
    judge_max_tokens: int = 512
    """tokens of a reasoning"""
    orders: Literal["agree", "average"] = "agree"
    """a pair whose two orders prefer different answers is a tie (agree), or only if P is near 1/2 (average; Lee et al.)"""
    tie_margin: float = 0.01
    """P no further from 1/2 than this is a tie (0: only P = 1/2 itself)"""


@dataclass(kw_only=True)
class LabelArgs(RunArgs, RowsArgs, PairArgs, AnswerArgs):
    dataset: str
    """prompts; without --model, pairs or `completions`: hub id (name or name:config), file, or saved directory"""
    model: str = ""
    """policy that answers: hub id or directory (empty: the answers are in --dataset)"""
    k: int = 2
    """answers to each prompt that --model gives (Starling: 7)"""
    clamp: float = 0.4
    """with --reasoning, P stays between this and 1 less this (Constitutional AI: 0.4; 0: no clamp)"""
    output_dir: str = "data/label"
    """where pairs.jsonl or rankings.jsonl, and report.json, go"""


@dataclass
class ReviseArgs(RunArgs, RowsArgs, JudgeArgs, AnswerArgs):
    judge: str = ""
    """model that writes critiques and revisions: hub id or directory (empty: --model itself); with --judge-url the model's name there"""
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
class BestOfNArgs(RunArgs, RowsArgs, LetterArgs, AnswerArgs):
    model: str
    """policy that answers: hub id or directory (empty: the answers are the data set's `completions`)"""
    judge: str = ""
    """model that scores the answers: hub id or directory, may be --model (empty: --reward-model does); with --judge-url the model's name there"""
    scale: Literal["ten", "points"] = "ten"
    """what the judge gives: the expected score of 1 to 10, as -1 to 1 (Lee et al.), or 0 to 5 additive points, written (self-rewarding)"""
    judgements: int = 3
    """with --scale points: judgements of each answer, averaged (self-rewarding: 3)"""
    judge_max_tokens: int = 512
    """with --scale points: tokens of a judgement"""
    reward_model: tuple[str, ...] = ()
    """reward models; their scores add up (empty: --judge scores)"""
    condition: str = ""
    """JSON file {kind: system prompt} that the reward models see before prompts of that kind"""
    n: int = 8
    """answers to each prompt that --model gives (Llama 3: 10 to 30; self-rewarding: 4)"""
    min_spread: float = 0.0
    """prompts whose best and worst scores differ by less are left out of every file (ChatGLM: by the variance, of the prompts alone)"""
    output_dir: str = "data/best_of_n"
    """where sft.jsonl, pairs.jsonl, rankings.jsonl, prompts.jsonl and report.json go"""


@dataclass
class SynthesiseArgs(RunArgs, LetterArgs, PolicyArgs):
    judge: str = ""
    """model that rates quality and difficulty: hub id or directory, may be --model (empty: no ratings); with --judge-url the model's name there"""
    temperature: float = 1.0
    """of the user's turns (Magpie: 1 to 1.25)"""
    top_p: float = 1.0
    """nucleus of the user's turns (Magpie: 0.99 to 1)"""
    answer_temperature: float = 0.0
    """of the answers (Magpie: 0)"""
    max_new_tokens: int = 1024
    """tokens of a turn"""
    rows: int = 1000
    """conversations to write"""
    turns: int = 1
    """turns of the user in each"""
    system: str = ""
    """system prompt of the conversations: a domain, a language"""
    min_tokens: int = 1
    """filter: tokens of the user's first turn"""
    min_quality: float | None = None
    """filter: the judge's expected rating of the first turn, 1 to 10"""
    min_difficulty: float | None = None
    """filter: the same of how difficult it is"""
    reward_model: tuple[str, ...] = ()
    """reward models, for --min-reward; their scores add up"""
    min_reward: float | None = None
    """filter: the reward models' score of the last answer"""
    min_distance: float = 0.0
    """filter: squared distance of the first turn's mean hidden state, of length 1, to those of all kept before (0: only repeats go);
    small where a model's states lie close together: see median_distance in report.json"""
    output_dir: str = "data/magpie"
    """where raw.jsonl, sft.jsonl, prompts.jsonl and report.json go"""


@dataclass(kw_only=True)
class CompareArgs(RunArgs, RowsArgs, PairArgs, AnswerArgs):
    model: tyro.conf.Positional[str]
    """policy A: hub id or directory"""
    against: tyro.conf.Positional[str] = "runs/base"
    """policy B: hub id or directory"""
    output_dir: str = "runs/compare"
    """where comparisons.jsonl and report.json go"""


@dataclass(kw_only=True)
class AuditArgs(RunArgs, RowsArgs, PairArgs):
    dataset: str
    """pairs labelled by those who know: hub id (name or name:config), file, or saved directory"""
    by: Literal["letters", "scores"] = "letters"
    """what is audited: the judge's choice between two answers, or its scores of 1 to 10 for each (best-of-n and direct RLAIF live on these), which
    take no principle, order, reasoning or repetition"""
    min_gap: float = 0.0
    """only pairs whose better answer's score leads by so much (0: all but those whose scores contradict chosen and rejected)"""
    output_dir: str = "runs/audit"
    """where report.json and audit.png go"""


@dataclass(kw_only=True)
class WeighArgs(RunArgs, RowsArgs, LetterArgs):
    dataset: str
    """pairs or `completions` with scores, and a column kind: hub id (name or name:config), file, or saved directory"""
    rubric: str = "data/grid/rubric.json"
    """JSON {"question": text, "options": {"A": text, ...}, "reward": {kind: ...}}; kinds without a reward get none"""
    reward_model: tuple[str, ...] = ("runs/reward_model",)
    """reward models whose order of answers the rubric is to mend; their scores add up"""
    condition: str = ""
    """JSON file {kind: system prompt} that the reward models see before prompts of that kind"""
    margin: float = 1.0
    """by which the better answer's total reward shall lead"""
    output_dir: str = "data/rubric"
    """where rubric.json and report.json go"""


Args = (
    Annotated[LabelArgs, tyro.conf.subcommand("label", description="Answers compared by a judge: soft preferences, or rankings.")]
    | Annotated[ReviseArgs, tyro.conf.subcommand("revise", description="Critique and revision: demonstrations of better answers.")]
    | Annotated[BestOfNArgs, tyro.conf.subcommand("best-of-n", description="The best, and the worst, of N answers to each prompt.")]
    | Annotated[SynthesiseArgs, tyro.conf.subcommand("synthesise", description="Conversations that an aligned model invents.")]
    | Annotated[CompareArgs, tyro.conf.subcommand("compare", description="The win rate of one policy over another.")]
    | Annotated[WeighArgs, tyro.conf.subcommand("weigh", description="The rewards of a rubric's options that make a reward model right.")]
    | Annotated[AuditArgs, tyro.conf.subcommand("audit", description="What a judge's labels are worth.")]
)

if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)  # before the heavy imports, so that --help answers at once

import glob
import gzip
import hashlib
import http.client
import inspect
import json
import math
import os
import random
import re
import shutil
import time
import types
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import combinations, groupby, permutations
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

for library in (transformers.utils.logging, datasets.utils.logging):  # their bars and warnings would break up our own lines
    library.disable_progress_bar()
    library.set_verbosity_error()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---------------------------------------------------------------------------------------------------------------- the method


def preference(first, second):
    """P(a > b) from a judge's log-probabilities [..., 2] of replying A and B: first with a as A, second with b as A. Lee et al., section 2.1."""
    return (first.softmax(-1)[..., 0] + second.softmax(-1)[..., 1]) / 2


def verdict(first: float, second: float, orders: str = "agree", margin: float = 0.01) -> str:
    """a, b, tie, or abstain. first, second: P(a > b) as each order has it; NaN where the judge gave no letter."""
    p = (first + second) / 2
    if math.isnan(p):
        return "abstain"
    contradict = orders == "agree" and (first - 0.5) * (second - 0.5) <= 0  # the position decided
    return "tie" if contradict or abs(p - 0.5) <= margin else "a" if p > 0.5 else "b"


def ranking_scores(wins) -> list:
    """Each answer's mean P against the others, from wins [K][K], P(i > j), NaN where nothing is known (and on the diagonal)."""
    known = [[p for p in row if not math.isnan(p)] for row in wins]
    return [sum(row) / len(row) if row else math.nan for row in known]


def points(text: str) -> float:
    """The sum that an additive judgement ends with, 0 to 5; NaN where there is none."""
    found = re.findall(r"score[^\w-]{0,12}(-?\d+(?:\.\d+)?)", after_thinking(text), re.IGNORECASE)
    return float(found[-1]) if found and 0 <= float(found[-1]) <= 5 else math.nan


def nearest(vectors) -> torch.Tensor:
    """Squared distance of each vector [N, d] to its nearest neighbour [N]; infinity where there is no other."""
    found = []
    for i in range(0, len(vectors), 256):  # never all N x N at once
        distance = torch.cdist(vectors[i : i + 256], vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
        distance[:, i : i + 256].fill_diagonal_(math.inf)
        found.append(distance.amin(1))
    return torch.cat(found)


def keep_distant(vectors, least: float) -> list:
    """The numbers of the vectors [N, d] that keep more than a squared distance from all kept before them: of a cluster, the earliest.

    Takes time as N x N."""
    kept, held = [], torch.empty_like(vectors)
    for i, vector in enumerate(vectors):
        if not kept or (held[: len(kept)] - vector).square().sum(1).min() > least:
            held[len(kept)] = vector
            kept.append(i)
    return kept


def rubric_hinge(weights, better, worse, better_features, worse_features, margin: float = 1.0):
    """Mean of max(0, margin + R(worse) - R(better)), R = r + w . phi (Rule Based Rewards, Mu et al. 2024).

    better, worse [N]: the reward model's scores; features [N, L]: the judge's probabilities of the options; weights [L] or, by pair, [N, L]."""
    total = lambda scores, features: scores + (weights * features).sum(-1)
    return (margin + total(worse, worse_features) - total(better, better_features)).clamp(min=0).mean()


def interval(outcomes: list) -> tuple:
    """Mean of outcomes in [0, 1], and the ends of its 95% interval (Wilson's score)."""
    n, mean, z = len(outcomes), sum(outcomes) / max(1, len(outcomes)), 1.96
    if not n:
        return math.nan, 0.0, 1.0
    centre, half = mean + z**2 / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return mean, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def after_thinking(text: str) -> str:
    """What stands after the thinking, and before any that follows; nothing, where an answer begins with thinking that has not ended."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def expected_score(probabilities):
    """The mean of the scores 1 to 10, scaled to [-1, 1] (Lee et al. 2023, direct RLAIF). probabilities [n, 10]; returns [n]."""
    return ((probabilities * torch.arange(1, 11, device=probabilities.device)).sum(-1) - 5.5) / 4.5


# -------------------------------------------------------------------------------------------------------- what judges are asked

REQUESTS = dict(  # --requests replaces any of them
    principle="is more helpful, honest and harmless",
    compare="""Here is a conversation, and two answers to its last message.

<conversation>
{talk}
</conversation>

<answer A>
{a}
</answer A>

<answer B>
{b}
</answer B>

Which answer {principle}? Reply with the letter A or B only.""",
    reason="""Here is a conversation, and two answers to its last message.

<conversation>
{talk}
</conversation>

<answer A>
{a}
</answer A>

<answer B>
{b}
</answer B>

Which answer {principle}? Weigh them step by step, in a few sentences, before you decide.""",
    conclude="Then which answer {principle}? Reply with the letter A or B only.",
    critique="""Here is a conversation, and an answer to its last message.

<conversation>
{talk}
</conversation>

<answer>
{answer}
</answer>

What keeps this answer from being one that {principle}? Be specific and brief.""",
    revise="Write that answer anew, so that your criticism no longer applies. Reply with the new answer only.",
    score="""Here is a conversation, and an answer to its last message.

<conversation>
{talk}
</conversation>

<answer>
{answer}
</answer>

How good is this answer, from 1 (very bad) to 10 (very good)? Reply with the number only.""",
    points="""Here is a conversation, and an answer to its last message.

<conversation>
{talk}
</conversation>

<answer>
{answer}
</answer>

Give this answer points, which add up: one if it has to do with what was asked; another if it deals with a substantial part of it; another
if it answers the essentials in a useful way; another if it is clear, complete, well ordered and written from an assistant's point of view; a
fifth if an expert could hardly improve on it for this user. Explain your points in under 100 words, and end with "Score: " and their sum.""",
    quality="""Here is what a user wrote to an assistant.

{talk}

How clear, specific and well put is it, from 1 to 10? Reply with the number only.""",
    difficulty="""Here is what a user wrote to an assistant.

{talk}

How hard is it to answer well, from 1 to 10? Reply with the number only.""",
)

# ---------------------------------------------------------------------------------------------------------------------- data

CHAT_TEMPLATE = (  # for tokenizers that come without one; the end-of-sequence token ends every turn
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


class Row(NamedTuple):
    """A prompt and its K responses, as ids. trained: one bool per response token, or None for all; extra: what else is known of it."""

    prompt: list
    responses: list
    trained: list | None = None
    extra: dict | None = None


def refuse(message: str):
    """Bad input ends here: one sentence, exit code 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # the first rank mostly says the same, and then torchrun stops the others before they do
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def reason(e: Exception) -> str:
    """The first line of what an exception says."""
    return (str(e.__cause__ or e).splitlines() or [type(e).__name__])[0][:200]


def say(*text):
    """Print on the first rank."""
    if RANK == 0:
        print(*text, flush=True)


def check_json(path: Path):
    """Raises ValueError where the reader of JSON would notice too late, or crash: bytes that are no text, and what is no list of objects."""
    begun = False
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
                raise ValueError(f"line {number} is not UTF-8") from None
            if not begun and text and text[0] not in "{[":
                raise ValueError(f"it begins with {text[:20]!r}, not with {{ or [")
            begun = begun or bool(text)


def load_rows(option: str, name: str, split: str = "train") -> Dataset:
    """A data set from a file, a saved directory, or the hub (name or name:config)."""
    path, (hub, *config) = Path(name), name.split(":")
    try:
        if path.is_dir():
            data = load_from_disk(name)
            data = data[split] if isinstance(data, DatasetDict) else data
        elif path.is_file() and path.stat().st_size == 0:
            refuse(f"{option} {name}: is an empty file; make it again, or correct the path")
        elif path.is_file() and ".parquet" in path.suffixes:
            data = load_dataset("parquet", data_files=glob.escape(name), split="train")
        elif path.is_file():
            check_json(path)
            data = load_dataset("json", data_files=glob.escape(name), split="train")
        elif path.suffix in (".jsonl", ".json", ".parquet", ".gz"):
            refuse(f"{option} {name}: there is no such file; make it first (python gridworld.py data writes data/grid) or correct the path")
        else:
            data = load_dataset(hub, *config, split=split)
    except Exception as e:  # whatever the readers raise, the user needs to know which file it was
        refuse(f"{option} {name}: cannot be read as a data set ({type(e).__name__}: {reason(e)})")
    if len(data) == 0:
        refuse(f"{option} {name}: has no rows")
    return data


def shared(a, b) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def without_none(value):
    """A nested value less the None that readers of JSON and Parquet fill in for absent keys."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


def as_messages(value, role: str = "assistant") -> list:
    """A conversation as clean messages: from a list of messages, of ShareGPT turns (from/value), or from the text of one turn."""
    if isinstance(value, str):
        return [dict(role=role, content=value)]
    names = dict(human="user", gpt="assistant")
    messages = []
    for turn in value:
        turn = without_none(turn)
        if "from" in turn:
            turn = dict(role=names.get(turn["from"], turn["from"]), content=turn["value"])
        turn.setdefault("content", "" if "tool_calls" in turn else None)
        if not isinstance(turn["content"], str) or not isinstance(turn.get("role"), str):
            raise ValueError(f"a message needs a role and a text content, this one is {str(turn)[:80]}")
        messages.append(turn)
    return messages


def special_tokens(tokenizer) -> dict:
    """Id and text of every special token."""
    return {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def has_special(special, values) -> bool:
    """Whether a special token stands in any text of these values, however nested: in a role, say, or in what a tool is told."""
    if isinstance(values, str):
        return any(token in values for token in special)
    parts = values.items() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ()
    return any(has_special(special, part) for part in parts)


def render(tokenizer, messages: list, answer_next: bool = False, **options) -> list:
    """Ids of a conversation under the chat template, up to where the assistant is to speak if answer_next."""
    if answer_next and messages and messages[-1]["role"] == "assistant":  # an answer already begun
        return tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False, **options)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, return_dict=False, **options)


def stop_tokens(tokenizer) -> list:
    """Ids that end an answer: the end-of-sequence token, and what the chat template puts at the end of an assistant's turn."""
    ids = render(tokenizer, [dict(role="user", content="a"), dict(role="assistant", content="b")])
    special = special_tokens(tokenizer)
    while ids[-1] not in special and not tokenizer.decode(ids[-1]).strip():  # the line break after the end-of-turn token
        ids.pop()
    return sorted({tokenizer.eos_token_id} | (set(ids[-1:]) & set(special)))


def end_turn(tokenizer, ids: list, stops: list) -> list:
    """An answer's ids up to its end-of-turn token, and no further; where the template marks no end of turn, the end-of-sequence token."""
    end = len(ids)
    while end and ids[end - 1] not in stops and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1
    if not end or ids[end - 1] not in stops:
        return ids + [tokenizer.eos_token_id]
    while end > 1 and ids[end - 2] == ids[end - 1]:  # a tokenizer that adds a second end-of-sequence token of its own
        end -= 1
    return ids[:end]


def encode(tokenizer, prompt, responses: list, stops: list, **options):
    """Ids of the prompt and of each response, tokenised together; the boundary is their longest common token prefix.

    prompt: text or messages; responses: texts or messages. Returns (prompt ids, [response ids, ...]), every response with its end."""
    if isinstance(prompt, str):
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        ids = lambda text: tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids  # one BOS, never two
        head, whole = ids(prompt), [ids(prompt + r.removesuffix(eos) + eos) for r in responses]
    else:
        answers = [as_messages(r) for r in responses]
        head = render(tokenizer, prompt, answer_next=True, **options)
        if prompt[-1]["role"] == "assistant":  # the responses continue an answer already begun
            begun, prompt = prompt[-1], prompt[:-1]
            answers = [[dict(begun, content=begun["content"] + a[0]["content"]), *a[1:]] for a in answers]
        whole = [render(tokenizer, prompt + a, **options) for a in answers]
    whole = [end_turn(tokenizer, w, stops) for w in whole]
    n = min(shared(head, w) for w in whole)
    return whole[0][:n], [w[n:] for w in whole]


def as_pair(prompt, chosen, rejected):
    """(prompt, [chosen, rejected]) from any published layout: the prompt apart, or inside both; text or messages."""
    if isinstance(chosen, list) and (not isinstance(prompt, list) or not prompt):  # a prompt in words is inside the messages, or their first turn
        chosen, rejected = as_messages(chosen), as_messages(rejected)
        if not chosen or not rejected or chosen[0]["role"] == "assistant":
            return as_messages(prompt, "user") if prompt else [], [chosen, rejected]
        n = min(shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        while n and chosen[n - 1]["role"] == "assistant":  # two talks that part at a user's turn: the answer before it belongs to both
            n -= 1
        return chosen[:n], [chosen[n:], rejected[n:]]
    if prompt and isinstance(prompt, list):
        prompt, whole = as_messages(prompt), [as_messages(chosen), as_messages(rejected)]
        if all(talk[: len(prompt)] == prompt and len(talk) > len(prompt) for talk in whole):  # the prompt is given apart and again in both
            return prompt, [talk[len(prompt) :] for talk in whole]
        return prompt, [chosen, rejected]
    if prompt:
        return prompt, [chosen, rejected]
    n = shared(chosen, rejected)
    speaker = chosen.rfind("\n\nAssistant:", 0, n)  # HH-RLHF: back to the last turn that both share; else to the last whole word
    n = speaker + len("\n\nAssistant:") if speaker >= 0 else max(0, chosen.rfind(" ", 0, min(n, len(chosen) - 1, len(rejected) - 1) + 1))
    return chosen[:n], [chosen[n:], rejected[n:]]


def load_json(option: str, name: str):
    """The content of a JSON file."""
    try:
        content = json.loads(Path(name).read_text())
    except (OSError, ValueError) as e:
        refuse(f"{option} {name}: cannot be read as JSON ({reason(e)})")
    if not isinstance(content, dict):
        refuse(f"{option} {name}: must be a JSON object, it is a {type(content).__name__}")
    return content


def load_conditions(name: str) -> dict:
    """The system prompts by kind, {} where no file is given."""
    conditions = load_json("--condition", name) if name else {}
    for kind, text in conditions.items():
        if not isinstance(text, str):
            refuse(f"--condition {name}: the system prompt of {kind} must be text, it is {text!r}")
    return conditions


def with_condition(prompt, condition: str):
    """The prompt behind a system prompt that only the reward model sees (InternLM2)."""
    if not condition:
        return prompt
    if isinstance(prompt, str):
        return f"{condition}\n\n{prompt}"
    if prompt and prompt[0]["role"] == "system":
        return [dict(role="system", content=f"{condition}\n\n{prompt[0]['content']}"), *prompt[1:]]
    return [dict(role="system", content=condition), *prompt]


def template_options(row: dict) -> dict:
    """A row's own arguments for the chat template: its tools (a list, or JSON text) and chat_template_kwargs."""
    tools = row.get("tools")
    ours = ("chat_template", "tokenize", "return_dict", "return_tensors", "add_generation_prompt", "continue_final_message")  # no row's business
    options = {k: v for k, v in without_none(row.get("chat_template_kwargs") or {}).items() if k not in ours}
    return options | (dict(tools=json.loads(tools) if isinstance(tools, str) else without_none(tools)) if tools else {})


# --------------------------------------------------------------------------------------------------------------------- model


def rows_attention(module, q, k, v, attention_mask, dropout=0.0, scaling=None, sliding_window=None, rows=None, softcap=None, **kwargs):
    """Attention over rows laid end to end: a response sees its own prompt and itself. q, k, v [1, H, T, D]."""
    if softcap is not None:
        raise NotImplementedError("soft-capped attention scores (Gemma 2) need the model's own attention")
    if rows is None:  # sampling: the ordinary path
        return sdpa_attention_forward(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings may have promoted them
    options = dict(scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    flash = q.is_cuda and v.dtype != torch.float32 and q.shape[-1] == v.shape[-1] and q.shape[-1] in range(8, 257, 8) and not dropout
    if flash:  # FlashAttention over segments: its causal mask is aligned to the last key, as a response needs it
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
            options.pop("enable_gqa")  # torch 2.11 groups heads without being asked
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        k, v, window = k[rows["index"]], v[rows["index"]], (sliding_window - 1 if sliding_window else -1, 0)
        return varlen_attn(q, k, v, rows["cu_q"], rows["cu_k"], rows["max_q"], rows["max_k"], window_size=window, **options)[None], None

    def attend(q, k, v):  # [n, H, Q, D], [n, H, K, D]: the queries are the last Q of the K positions
        Q, K = q.shape[2], k.shape[2]
        if Q == K and not (sliding_window and sliding_window < K):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, **options)
        i, j = torch.arange(K - Q, K, device=q.device)[:, None], torch.arange(K, device=q.device)
        seen = (j <= i) & (j > i - (sliding_window or K))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, **options)

    groups, out = [(form, len(list(same))) for form, same in groupby(rows["layout"])], []  # neighbours of equal shape are one batch
    sizes = [n * (P + sum(R)) for (P, R), n in groups]
    for ((P, R), n), *qkv in zip(groups, *(x[0].split(sizes, 1) for x in (q, k, v))):
        (q0, *qs), (k0, *ks), (v0, *vs) = (x.unflatten(1, (n, -1)).transpose(0, 1).split([P, *R], 2) for x in qkv)
        parts = [attend(q0, k0, v0), *(attend(q, torch.cat([k0, k], 2), torch.cat([v0, v], 2)) for q, k, v in zip(qs, ks, vs))]
        out.append(torch.cat(parts, 2).transpose(0, 1).flatten(1, 2))
    return torch.cat(out, 1).transpose(0, 1)[None], None  # [1, T, H, D]


def rows_mask(*args, attention_mask=None, **kwargs):
    """No mask where rows are given; elsewhere the ordinary one, from the attention_mask, without which a sliding window would be lost."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("rows", rows_attention)
AttentionMaskInterface.register("rows", rows_mask)


def shape(row: Row) -> tuple:
    """(prompt length, response lengths); a single response is one piece with its prompt, since nothing is shared."""
    prompt, responses = len(row.prompt), tuple(map(len, row.responses))
    return (prompt + responses[0], ()) if len(responses) == 1 else (prompt, responses)


def pack(rows: list, device, together: bool = True):
    """Rows end to end in one sequence, nothing padded; or, if not together, one sequence for each response.

    Returns forwards, a list of (model inputs, positions that predict the trained tokens, positions of the responses' last tokens),
    and the trained tokens in order [N]."""
    if not together:
        forwards, targets = [], []
        for row in rows:
            for i, response in enumerate(row.responses):
                (forward,), target = pack([Row(row.prompt, [response], row.trained and [row.trained[i]])], device)
                inputs, *at = forward
                inputs = {k: v for k, v in inputs.items() if k != "rows"} | dict(attention_mask=torch.ones_like(inputs["input_ids"]))
                forwards.append((inputs, *at))
                targets.append(target)
        return forwards, torch.cat(targets)
    ids, position, source, last, target, layout, index, q_lens, k_lens = [], [], [], [], [], [], [], [], []
    for row in rows:
        start, end, (head, tails) = len(ids), len(ids) + len(row.prompt), shape(row)
        ids += row.prompt
        position += range(end - start)
        index += range(start, start + head)  # the keys of each segment, prompt or response, one after the other
        for i, response in enumerate(row.responses):
            t = len(ids)
            ids += response
            position += range(end - start, end - start + len(response))
            before = [end - 1, *range(t, t + len(response) - 1)]  # the prompt's last token predicts every response's first
            keep = row.trained[i] if row.trained else [True] * len(response)
            source += [s for s, k in zip(before, keep) if k]
            target += [token for token, k in zip(response, keep) if k]
            last.append(len(ids) - 1)
            index += [*range(start, end), *range(t, t + len(response))] if tails else []
        layout.append((head, tails))
        q_lens += [head, *tails]
        k_lens += [head, *(head + r for r in tails)]
    tensor = lambda x: torch.tensor(x, device=device)
    cumulative = lambda x: tensor([0, *x]).cumsum(0, dtype=torch.int32)
    plan = dict(layout=layout, index=tensor(index), cu_q=cumulative(q_lens), cu_k=cumulative(k_lens), max_q=max(q_lens), max_k=max(k_lens))
    inputs = dict(input_ids=tensor(ids)[None], position_ids=tensor(position)[None], rows=plan, use_cache=False)
    return [(inputs, tensor(source), tensor(last))], tensor(target)


class TargetLogps(torch.autograd.Function):
    """The log-probability of each target token, the entropy of its distribution, and whether the token is the likeliest; each [N].

    hidden [N, d], head [V, d], bias [V] or None, target [N]; adjust(logits, at): what follows the output layer, for the tokens of slice at.
    Of the logits [N, V] no more than a chunk of tokens ever stands in memory; the backward pass computes it again, with
    d log pi(y) / d logits = 1[y] - pi. The gradient of the head is summed over chunks in float32."""

    @staticmethod
    def forward(ctx, hidden, head, bias, target, adjust):
        size = max(256, 2**23 // len(head))  # tokens of a chunk: 32 MB of logits; at least 256, as each adds a whole [V, d] to the head's gradient
        ctx.save_for_backward(hidden, head, bias, target)
        ctx.chunks, ctx.adjust, parts = [slice(i, i + size) for i in range(0, len(target), size)], adjust, []
        for at in ctx.chunks:
            logits = adjust(F.linear(hidden[at], head, bias).float(), at)  # [n, V]
            logps = logits.log_softmax(-1)
            logp = logps.gather(-1, target[at, None])[:, 0]
            top = logp == logps.amax(-1)  # amax is several times faster than argmax
            parts.append((logp, -torch.exp(logps, out=logits).mul_(logps).sum(-1), top))  # in the room of the logits
        logp, entropy, top = (torch.cat(x) for x in zip(*parts))
        ctx.mark_non_differentiable(entropy, top)
        return logp, entropy, top

    @staticmethod
    def backward(ctx, g, *_):
        hidden, head, bias, target = ctx.saved_tensors
        d_hidden, wanted = torch.empty_like(hidden), zip((head, bias), ctx.needs_input_grad[1:3])  # the head may be frozen
        d_head, d_bias = (torch.zeros_like(w, dtype=torch.float32) if needed else None for w, needed in wanted)
        for at in ctx.chunks:
            raw = F.linear(hidden[at], head, bias).float().requires_grad_()
            with torch.enable_grad():  # through what adjust does
                logits = ctx.adjust(raw, at)
            d = logits.detach().softmax(-1).mul_(-g[at, None])
            d[torch.arange(len(d), device=d.device), target[at]] += g[at]
            (d,) = torch.autograd.grad(logits, raw, d)
            d = d.to(head.dtype)  # [n, V]
            d_hidden[at] = d @ head
            if d_head is not None:
                d_head += d.T @ hidden[at]
            if d_bias is not None:
                d_bias += d.sum(0)
        return d_hidden, *(x if x is None else x.to(head.dtype) for x in (d_head, d_bias)), None, None


def token_logps(self, forwards, target, temperature: float = 1.0, kept=None):
    """Log-probability of each target token, the distribution's entropy, and whether the token is the likeliest; each [N].

    kept: for each token the ids that nucleus sampling kept, a tensor each; the distribution is renormalised over them."""
    hidden = torch.cat([self.base_model(**inputs).last_hidden_state[0, source] for inputs, source, _ in forwards])  # [N, d]
    head, config = self.get_output_embeddings(), self.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)  # Cohere, Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def adjust(logits, at):
        logits = logits if scale == 1 else logits * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        logits = logits if temperature == 1 else logits / temperature
        if kept is not None:
            count = torch.tensor([len(k) for k in kept[at]], device=logits.device)
            allowed = torch.zeros_like(logits, dtype=torch.bool)
            allowed[torch.arange(len(count), device=logits.device).repeat_interleave(count), torch.cat(kept[at])] = True
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)  # finite, so that p log p is 0 there
        return logits

    return TargetLogps.apply(hidden, head.weight, head.bias, target, adjust)


def response_scores(self, forwards):
    """The score of each response [R]: the head on the hidden state of its last token, less the shift to mean 0."""
    hidden = torch.cat([self.base_model(**inputs).last_hidden_state[0, last] for inputs, _, last in forwards])  # [R, d]
    return F.linear(hidden.float(), self.score.weight.float())[:, 0] - getattr(self.config, "score_shift", 0.0)


def load_tokenizer(name: str):
    """A checkpoint's tokenizer; without a chat template it gets a plain one."""
    if not Path(name).exists() and (name.startswith(("runs/", "./", "../", "/")) or not name):
        refuse(f"{name or 'the empty path'}: there is no such checkpoint directory; make it first (see README: python sft.py writes runs/base)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as e:
        refuse(f"{name}: no tokenizer can be loaded from it ({reason(e)})")
    if tokenizer.eos_token is None:
        refuse(f"{name}: its tokenizer has no end-of-sequence token, so that no answer could ever end; give it one (eos_token)")
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    try:
        talk = tokenizer.apply_chat_template([dict(role="user", content="one"), dict(role="assistant", content="two")], tokenize=False)
    except Exception as e:
        refuse(f"{name}: its chat template cannot be used ({reason(e)}); correct chat_template.jinja")
    if "one" not in talk or "two" not in talk:
        refuse(f"{name}: its chat template shows {talk[:100]!r} in place of what is said; correct chat_template.jinja")
    return tokenizer


def load_config(name: str):
    """A checkpoint's config."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as e:
        refuse(f"{name}: no model's config can be loaded from it ({reason(e)})")


def load_model(auto, name: str, tokenizer, device, dtype, dropout: bool = False, **options):
    """A checkpoint with float32 weights, its attention replaced by `rows_attention`.

    Where that gives other results (found by trying), the model keeps its own and gets one sequence a forward: slow and right, with a notice."""
    stored = load_config(name).dtype
    try:
        # safetensors only: a pickle could run anything
        options |= dict(trust_remote_code=False, use_safetensors=True)
        model = auto.from_pretrained(name, attn_implementation="eager", dtype=torch.float32, **options)
    except Exception as e:
        refuse(f"{name}: no model can be loaded from it ({reason(e)}); it takes config.json and safetensors, as save_pretrained writes them")
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            refuse(f"{name}: its weights are damaged: {weight} holds numbers that are not finite")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        refuse(f"{name}: its tokenizer has {len(tokenizer)} tokens, its model only {model.get_input_embeddings().num_embeddings}; resize it")
    if model.base_model is model:
        refuse(f"{name}: {type(model).__name__} does not name its base model, which this script needs")
    model = ready(model, device, stored or torch.float32, dropout)
    model.together = rows_agree(model, device, dtype)
    if not model.together:
        model.set_attn_implementation("eager")
        say(f"note: the attention of {type(model).__name__} does not follow rows: one sequence a forward in float32, right but slow")
    return model


def ready(model, device, stored=torch.float32, dropout: bool = False):
    """The model on its device, in training mode, without dropout unless asked; stored: the dtype in which it will be saved."""
    for module in model.modules() if not dropout else ():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "p" and isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    model.together, model.stored = True, stored
    return model.to(device).train()


@torch.no_grad()
def rows_agree(model, device, dtype) -> bool:
    """Whether rows in one sequence under our attention give what each response alone gives under the model's own, on random tokens."""
    generator, hidden = torch.Generator().manual_seed(0), []
    tokens = torch.randint(min(1000, model.config.get_text_config().vocab_size), (25,), generator=generator).tolist()
    rows = [Row(tokens[:5], [tokens[5:9], tokens[9:15]]), Row(tokens[15:18], [tokens[18:]])]
    model.eval()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for together, attention in ((False, "eager"), (True, "rows")):
                model.set_attn_implementation(attention)
                forwards, *_ = pack(rows, device, together)
                hidden.append(torch.cat([model.base_model(**inputs).last_hidden_state[0, at].float() for inputs, at, _ in forwards]))
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, TypeError, RuntimeError):
        return False
    finally:
        model.train()
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    return bool((hidden[0] - hidden[1]).norm() <= tolerance * hidden[1].norm())


@torch.no_grad()
def check_head(model, name: str, device):
    """Refuse a model whose output layer does more than token_logps does."""
    ids = list(range(3, 15))
    forwards, target = pack([Row(ids[:4], [ids[4:]])], device, model.together)
    inputs = torch.tensor([ids], device=device)
    model.eval()
    whole = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, 3:-1].float().log_softmax(-1)
    known = isinstance(model.get_output_embeddings(), torch.nn.Linear)
    off = (token_logps(model, forwards, target)[0] - whole.gather(-1, target[:, None])[:, 0]).abs().max() if known else None
    model.train()
    if not known or not off < 0.01:
        refuse(f"{name}: the output layer of {type(model).__name__} does more than this script knows; its log-probabilities would be wrong")


def is_reward_model(name: str) -> bool:
    """Whether a checkpoint that loads has a trained head with one score."""
    config = load_config(name)
    return "SequenceClassification" in "".join(config.architectures or []) and config.num_labels == 1


def all_stops(model, tokenizer) -> list:
    """`stop_tokens`, and the further ones that a chat model's generation_config may know."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known] if known is not None else []
    return sorted({*stop_tokens(tokenizer), *(i for i in known if i < len(tokenizer))})  # a config's default may lie beyond a small vocabulary


# ------------------------------------------------------------------------------------------------------------------ sampling


def uniform_numbers(seed: int, step: int, answers: list, length: int) -> torch.Tensor:
    """The randomness of sampling [len(answers), length]: a function of (seed, step, answer, position) and of nothing else."""
    key = lambda answer: int.from_bytes(hashlib.sha256(f"{seed}-{step}-{answer}".encode()).digest()[:8], "little") >> 1
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(key(answer))) for answer in answers]
    return torch.stack(rows) if rows else torch.zeros(0, length)


@contextmanager
def gathered(model):
    """Whole weights on every rank, so that ranks need not sample in step with each other."""
    from torch.distributed.fsdp import FSDPModule

    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)  # the root's weights stay, as FSDP has it
        part.reshard()


class RoomyLayer(DynamicLayer):
    """A layer's keys and values [B, H, T, D], growing within room kept for them: DynamicLayer copies them all to add those of one token."""

    room = ()  # two tensors [B, H, T + free places, D], of which `keys` and `values` are views; none while the model skips the layer

    def update(self, keys, values, *args, **kwargs):
        start, self.is_initialized = self.get_seq_length(), True
        end = start + keys.shape[-2]
        if not start or self.room[0].shape[-2] < end:
            room = [new.new_empty(*new.shape[:-2], end + 32, new.shape[-1]) for new in (keys, values)]
            for whole, old in zip(room, (self.keys, self.values) if start else ()):
                whole[..., :start, :] = old
            self.room = room
        for whole, new in zip(self.room, (keys, values)):
            whole[..., start:end, :] = new
        self.keys, self.values = (whole[..., :end, :] for whole in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if self.room:
            length, self.room = self.get_seq_length(), [whole[indices] for whole in self.room]
            self.keys, self.values = (whole[..., :length, :] for whole in self.room)

    def batch_repeat_interleave(self, repeats):
        if self.room:
            self.batch_select_indices(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))


@torch.no_grad()
def sample(model, prompts: list, numbers, stops: list, temperature: float = 1.0, top_p: float = 1.0):
    """Answers to prompts (lists of ids): n = len(numbers) / len(prompts) to each, one after the other, the prompt computed once for them.

    numbers [answers, max_new_tokens], uniform in [0, 1), are all the randomness there is; temperature 0 takes the likeliest token.
    Returns for each answer its ids (the stop token included), the log-probability of each in the very distribution it was drawn from,
    and, with top_p < 1, the ids that the nucleus kept at each position, else None."""
    device, count, longest = numbers.device, len(numbers), numbers.shape[1]
    n = count // max(1, len(prompts))
    tokens, logps, kept = [[] for _ in range(count)], [[] for _ in range(count)], [[] for _ in range(count)] if top_p < 1 else None
    if not count:
        return tokens, logps, kept
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + longest) for p in prompts], device=device)
    position = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    cache.layer_class_to_replicate = RoomyLayer
    call = dict(past_key_values=cache, use_cache=True)
    logits = model(input_ids=ids, attention_mask=mask[:, :width], position_ids=position, logits_to_keep=1, **call).logits[:, -1]
    cache.batch_repeat_interleave(n)
    logits, mask, position = (x.repeat_interleave(n, 0) for x in (logits, mask, position[:, -1:]))
    alive, ends = torch.arange(count, device=device), torch.tensor(stops, device=device)
    for t in range(longest):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [alive, V]
        if top_p < 1:
            ordered, order = logp.sort(-1, descending=True)
            keep = ordered.exp().cumsum(-1) - ordered.exp() < top_p  # the smallest set that reaches top_p
            logp = logp.masked_fill(~torch.zeros_like(keep).scatter(1, order, keep), -math.inf).log_softmax(-1)
            for answer, nucleus in zip(alive.tolist(), order[keep].split(keep.sum(-1).tolist())):
                kept[answer].append(nucleus)
        if temperature == 0:
            token = logp.argmax(-1)
        else:  # the first token at which the cumulative probability exceeds the number
            cumulative = logp.exp().cumsum(-1)
            token = torch.searchsorted(cumulative, numbers[alive, t, None] * cumulative[:, -1:], right=True)[:, 0]
            token = token.clamp(max=logp.shape[-1] - 1)
        for answer, i, p in zip(alive.tolist(), token.tolist(), logp.gather(1, token[:, None])[:, 0].tolist()):
            tokens[answer].append(i)
            logps[answer].append(p)
        going = (~torch.isin(token, ends)).nonzero()[:, 0]
        if t + 1 == longest or not len(going):
            break
        if len(going) < len(alive):  # finished answers leave the batch
            cache.batch_select_indices(going)
            alive, token, mask, position = alive[going], token[going], mask[going], position[going]
        position = position + 1
        logits = model(input_ids=token[:, None], attention_mask=mask[:, : width + t + 1], position_ids=position, **call).logits[:, -1]
    return tokens, logps, kept


def load_frozen(auto, name: str, device, dtype, method, **options):
    """A frozen model and its tokenizer."""
    tokenizer = load_tokenizer(name)
    model = load_model(auto, name, tokenizer, device, dtype, **options)
    if method is token_logps:
        check_head(model, name, device)
    return shard(model.requires_grad_(False), dtype, method), tokenizer


@torch.no_grad()
def reward_scores(model, tokenizer, conditions: dict, args, device, rows: list, texts: list) -> torch.Tensor:
    """The reward model's scores [B] of answers, given as texts, rendered and tokenised as in its training."""
    stops, longest = stop_tokens(tokenizer), getattr(model.config, "max_position_embeddings", 2**20)
    asked, scores = [], torch.zeros(len(rows), device=device)
    for row, text in zip(rows, texts):
        prompt = with_condition(row.extra["prompt"], conditions.get(row.extra["kind"], ""))
        text = without_special(tokenizer, text)
        prompt, (answer,) = encode(tokenizer, prompt, [text], stops, **template_options(row.extra))
        asked.append(Row(prompt[-max(1, longest - len(answer)) :], [answer[: longest - 1]]))
    for group, forwards, _ in packed(asked, args.tokens_per_forward, device, model.together):
        scores[group] = model.response_scores(forwards)[: len(group)]
    if not scores.isfinite().all():
        print(file=sys.stderr)  # off the progress bar's line
        refuse(f"a reward model's score is {scores[~scores.isfinite()][0].item()}: its weights are damaged")
    return scores


def without_special(tokenizer, text: str) -> str:
    """A policy's text less what its reader would take for special tokens: it must not end its turn and write the judge's reply."""
    specials = list(special_tokens(tokenizer).values())
    while any(special in text for special in specials):  # taking one out may make another
        for special in specials:
            text = text.replace(special, "")
    return text


def conversation_text(prompt, answer: str) -> str:
    """What the judge reads: the prompt and the answer, with the speakers' names where there are several turns."""
    if isinstance(prompt, str):
        return prompt + answer
    turns = [m for m in prompt if m["role"] != "system"]
    if len(turns) == 1:
        return f"{turns[0]['content']}\n{answer}"
    talk = "\n".join(f"{m['role']}: {m['content']}" for m in turns)
    return talk + answer if turns and turns[-1]["role"] == "assistant" else f"{talk}\nassistant: {answer}"  # an answer already begun goes on


@torch.no_grad()
def judge_logps(model, tokenizer, talks: list, options: list, args, device) -> torch.Tensor:
    """The judge's log-probabilities of replying with each option [B, K]: of every token, the end included, from where the replies differ.

    talks: what the judge is asked, as the text of one turn or as messages."""
    stops, logps = stop_tokens(tokenizer), torch.zeros(len(talks), len(options), device=device)
    asked = []
    for talk in talks:
        prompt, replies = encode(tokenizer, as_messages(talk, "user"), options, stops)
        n = min(min(shared(replies[0], reply), len(reply) - 1) for reply in replies)  # what all begin with, such as an empty thought
        rest = [reply[n:] for reply in replies]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", 2**20) - max(map(len, rest))
        asked.append(Row((prompt + replies[0][:n])[-max(1, longest) :], rest))
    for group, forwards, target in packed(asked, args.tokens_per_forward, device, model.together):
        token_logp = model.token_logps(forwards, target)[0]
        lengths = [len(reply) for i in group for reply in asked[i].responses]
        if group:
            logps[group] = torch.stack([part.sum() for part in token_logp.split(lengths)]).view(len(group), -1)
    return logps


def load_rubric(name: str) -> dict:
    """A rubric, checked: a question, and either nothing else or options and, for every kind, a reward for each of them."""
    rubric = load_json("--rubric", name)
    options, rewards = rubric.get("options", {}), rubric.get("reward", {})
    if not isinstance(rubric.get("question"), str) or bool(options) != bool(rewards):
        refuse(f"--rubric {name}: needs a question, and options and reward together or neither; it has {', '.join(rubric)}")
    for kind, table in rewards.items():
        if set(table) != set(options):
            refuse(f"--rubric {name}: its rewards for {kind} are for {', '.join(table)}, its options are {', '.join(options)}; give one for each")
    return rubric


# ----------------------------------------------------------------------------------------------------------------------- run


def start_ranks(dtype: str):
    """This rank's device and the dtype of the computation; joins the other ranks."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    compute = torch.bfloat16 if dtype == "bfloat16" or dtype == "auto" and device.type == "cuda" else torch.float32
    backend = "nccl" if device.type == "cuda" else "gloo"
    if WORLD > 1:
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # the others wait while the first rank writes a checkpoint
    elif compute != torch.float32:  # FSDP's mixed precision, for one rank as for many
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, compute


def shard(model, dtype, *methods):
    """Bind the methods to the model; with several ranks or in bfloat16, give each rank its part of every weight (FSDP2)."""
    for method in methods:
        setattr(model, method.__name__, types.MethodType(method, model))
    if dist.is_initialized() and model.together:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == torch.bfloat16 else MixedPrecisionPolicy()
        for layer in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for method in methods:
            register_fsdp_forward_method(model, method.__name__)
    return model


def micro_batches(rows: list, limit: int, device, together: bool = True) -> list:
    """This rank's rows, neighbours of one shape, in forwards of at most `limit` tokens (a longer row goes alone): lists of row numbers,
    equally many on every rank."""
    groups, total = [], limit  # full, so that the first row opens a group
    for i in sorted(range(len(rows)), key=lambda i: shape(rows[i])):
        size = len(rows[i].prompt) + sum(map(len, rows[i].responses))
        if total + size > limit or not together:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += size
    if WORLD > 1:
        most = torch.tensor(len(groups), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        groups += [[] for _ in range(int(most) - len(groups))]
    return groups


def packed(rows: list, limit: int, device, together: bool = True):
    """For each forward: the row numbers, and the forwards and targets of `pack`. A rank that has no rows left gets a spare row and no
    numbers, so that all ranks make equally many forwards."""
    for group in micro_batches(rows, limit, device, together):
        yield group, *pack([rows[i] for i in group] or [Row([0], [[0]])], device, together)


def over_ranks(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum (or maximum) over all ranks."""
    if WORLD > 1:
        dist.all_reduce(values, op)
    return values


def fingerprint(name: str) -> str:
    """Of a file or directory: names, sizes, and the content (of large files: both ends); a hub id stands for itself."""
    path, digest, kinds = Path(name), hashlib.sha256(), (".json", ".jinja", ".safetensors", ".arrow", ".parquet")
    inside = [f for f in path.rglob("*") if f.suffix in kinds and not f.relative_to(path).parts[0].startswith(("checkpoint-", "saving", "value"))]
    for file in [path] if path.is_file() else sorted(inside):
        if file.name not in ("args.json", "report.json"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as f:
                digest.update(f.read(2**24))
                f.seek(max(f.tell(), size - 2**24))
                digest.update(f.read())
    return digest.hexdigest()[:16] if path.exists() else "hub"


def check_numbers(args):
    """Numbers out of range are refused before anything is read."""
    counts = ("epochs", "batch_size", "tokens_per_forward", "max_length", "vocab_size", "hidden_size", "num_layers", "num_heads")
    counts += ("num_generations", "max_new_tokens", "ppo_epochs", "num_minibatches", "kl_horizon", "num_iterations", "eval_samples", "sample_tokens")
    counts += ("n", "judgements", "rounds", "turns", "judge_parallel", "judge_max_tokens")
    shares = ("eval_fraction", "top_p", "warmup_ratio", "gamma", "lam", "merge_keep", "merge_weight", "clamp", "min_mass")
    signed = ("missing_eos_score", "reward_constant", "rule_weight", "judge_weight", "min_reward")
    trains = hasattr(args, "learning_rate")  # a policy to be trained needs a chance for every token
    for name, value in asdict(args).items():
        needed = ""
        if isinstance(value, float) and not math.isfinite(value):
            needed = "a number"
        elif name in counts and value < 1:
            needed = "1 or more"
        elif name in ("top_p", "beta", "merge_keep", "max_grad_norm") and value <= 0 or name == "temperature" and value == 0 and trains:
            needed = "above 0"
        elif name in shares and value > 1 or name == "eval_fraction" and value == 1:
            needed = "at most 1" if value > 1 else "below 1"
        elif isinstance(value, (int, float)) and value < 0 and name not in signed:
            needed = "0 or more"
        if needed:
            refuse(f"--{name.replace('_', '-')} {value}: must be {needed}")


def begin(args, *more_free, **inputs):
    """The output directory, the checkpoint to continue from or None, and what identifies the run. inputs: by option, all that is read;
    more_free: options beyond the usual that do not change the result.

    Ends the program where a finished run of the same arguments stands, and refuses to mix two runs in one directory."""
    check_numbers(args)
    if asdict(args).get("track"):
        try:
            import wandb  # noqa: F401
        except ImportError:
            refuse("--track: needs wandb, which is not installed (pip install wandb)")
    out, free = Path(args.output_dir), ("resume", "overwrite", "track", "wandb_project", "run_name", "output_dir", "tokens_per_forward", "save_every")
    free += ("gradient_checkpointing", "show", "show_every", "sample_tokens", *more_free)
    plan = {k: v for k, v in asdict(args).items() if k not in free} | {f"content of {k}": fingerprint(v) for k, v in inputs.items() if v}
    plan, error, finished, last = json.loads(json.dumps(plan)), None, False, None
    if RANK == 0:  # one rank looks, so that all see the same
        file, before = out / "args.json", None
        steps = [int(d.name.split("-")[1]) for d in out.glob("checkpoint-*") if d.name.split("-")[1].isdigit()]
        try:
            before = json.loads(file.read_text()) if args.resume and file.exists() else None
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            error = f"--output-dir {out}: cannot be used ({e.strerror}); choose another"
        except ValueError:
            error = f"{file}: is damaged, so that nothing can be resumed; choose another --output-dir, or --overwrite without --resume"
        inside = [k for k, v in inputs.items() if v and (out.resolve() == Path(v).resolve() or out.resolve() in Path(v).resolve().parents)]
        if inside and not error:
            error = f"--output-dir {out}: holds what --{inside[0].split()[0].replace('_', '-')} reads; choose another"
        elif args.resume and before and not error:
            old = {k: v for k, v in before.get("plan", {}).items() if k not in free}
            changed = [f"{k} was {old.get(k)!r} and is {plan.get(k)!r}" for k in sorted({*old, *plan}) if old.get(k) != plan.get(k)]
            if changed:
                changed = "; ".join(changed)[:500]
                error = f"--resume: {out} holds another run ({changed}); choose another --output-dir, or --overwrite without --resume"
            finished = before["finished"]
            last = str(out / f"checkpoint-{max(steps)}") if steps else None
        elif not error and not args.overwrite and any(f.suffix != ".part" for f in out.iterdir()):  # .part: a write that was killed
            error = f"--output-dir {out}: not empty; choose another, --resume a run that stands there, or --overwrite it"
    if WORLD > 1:
        error, finished, last = broadcast([error, finished, last])
        if not error and not out.exists():
            error = f"--output-dir {out}: rank {RANK} does not see it; choose one on a disk that all nodes share"
    if error:
        refuse(error)
    if finished:
        say(f"{out}: finished already with the same arguments and data; nothing to do")
        sys.exit(0)
    return out, Path(last) if last else None, plan


def broadcast(values: list) -> list:
    """The first rank's values, on every rank."""
    dist.broadcast_object_list(values)
    return values


def claim(args, out: Path, plan: dict):
    """Clear the output directory for a new run and leave args.json there: enough to say where a checkpoint comes from and to run it again.

    Called when all input has been read and found good. An older model stays until the new one takes its place."""
    if RANK == 0:
        for stale in (*out.glob("checkpoint-*"), *out.glob("saving*")):
            shutil.rmtree(stale)
        for stale in ("metrics.jsonl", "report.json", "test_time.png"):  # of whichever script ran here before
            (out / stale).unlink(missing_ok=True)
        machine = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
        machine |= dict(ranks=WORLD, threads=torch.get_num_threads())
        write_json(out / "args.json", dict(script=Path(__file__).name, finished=False, args=asdict(args), plan=plan) | machine)


@contextmanager
def writing(path: Path):
    """What the disk does not take ends the run in one sentence."""
    try:
        yield
    except Exception as e:  # safetensors, torch and the system each have their own
        print(file=sys.stderr)  # off the progress bar's line
        refuse(f"{path}: cannot be written ({reason(e)}); what was saved before stands; mend that (is the disk full?), then go on with --resume")


def write_json(path: Path, value):
    """Written beside and renamed, so that the file is never half there."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        part.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(part, path)


def sample_answers(model, rows: list, numbers, stops: list, limit: int, temperature: float, top_p: float):
    """`sample` for rows, neighbours in length together, at most `limit` tokens in the cache at a time. Returns its three lists; with top_p 1
    the third holds None for each answer."""
    n, device = len(numbers) // max(1, len(rows)), model.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    longest = max((len(row.prompt) for row in rows), default=0) + numbers.shape[1]
    room, found = max(1, limit // (longest or 1)), [None] * len(numbers)  # answers at a time
    size, few = max(1, room // (n or 1)), min(n, room)  # prompts, and answers to each
    model.eval()
    with gathered(model):
        for part in (order[i : i + size] for i in range(0, len(order), size)):
            for first in range(0, n, few):
                slots = [i * n + k for i in part for k in range(first, min(n, first + few))]
                tokens, logps, kept = sample(model, [rows[i].prompt for i in part], numbers[slots].to(device), stops, temperature, top_p)
                for slot, *answer in zip(slots, tokens, logps, kept or [None] * len(slots)):
                    found[slot] = answer
    model.train()
    return [list(x) for x in zip(*found)] or [[], [], []]


def as_written(tokenizer, rows: list, answers: list, stops: list) -> list:
    """Answers as text, with the tags of the thinking (also one that the chat template has opened), without stop and other special tokens."""
    others, texts = [t for t in special_tokens(tokenizer).values() if t not in ("<think>", "</think>")], []
    for row, ids in zip(rows, answers):
        goes_on = isinstance(row.extra["prompt"], str) or row.extra["prompt"][-1]["role"] == "assistant"
        before = row.prompt[-1:] if goes_on else []  # SentencePiece drops the space before a text's first word
        text = tokenizer.decode(before + (ids[:-1] if ids and ids[-1] in stops else ids))[len(tokenizer.decode(before)) :]
        for other in others:
            text = text.replace(other, "")
        opened = tokenizer.decode(row.prompt[-16:]).rstrip().endswith("<think>")
        texts.append("<think>" * opened + text)
    return texts


# ---------------------------------------------------------------------------------------------------------- what goes in and out


def text_of(response) -> str:
    """A response, text or messages, as the text that a judge reads, without its thinking."""
    return "\n".join(after_thinking(m["content"]) for m in as_messages(response)).strip()


def going_on(prompt, text: str) -> str:
    """An answer's text as it stands after its prompt: behind a space, where that ends in a word (HH-RLHF's "Assistant:", or an answer begun)."""
    begun = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    return " " * bool(begun[-1:].strip()) + text


def as_response(prompt, text: str):
    """A text in the form of its prompt: one message, or text."""
    return [dict(role="assistant", content=text)] if isinstance(prompt, list) else text


def answers_of(row: dict) -> tuple:
    """(prompt, responses, scores or None) of a row in any known layout; no responses where it holds a prompt alone."""
    if row.get("completions") is not None:
        scores = row.get("scores")
        if scores is not None and (len(scores) != len(row["completions"]) or not all(s is not None and math.isfinite(s) for s in scores)):
            raise ValueError(f"{len(row['completions'])} completions need as many scores, all of them numbers, they are {scores}")
        return row["prompt"], row["completions"], scores
    if "chosen" in row:
        return *as_pair(row.get("prompt"), row["chosen"], row["rejected"]), [1.0, 0.0]
    if row.get("messages") is not None:
        messages = as_messages(row["messages"])
        end = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1) + 1
        return messages[:end], [messages[end:]] if messages[end:] else [], None
    prompt = row.get("prompt")
    prompt = [dict(role="user", content=row["question"])] if prompt is None and row.get("question") else prompt
    return prompt, [row["completion"]] if row.get("completion") else [], None


def load_items(args, *policies) -> list:
    """The rows of --dataset as dicts: number, prompt, responses, scores, kind, and columns, all else that the row holds.

    Prompts that one of the policies (model, tokenizer) cannot answer, for their length, special tokens or template, are dropped."""
    data, notes, items = load_rows("--dataset", args.dataset, args.dataset_split), Counter(), []
    numbers = sorted(random.Random(args.seed).sample(range(len(data)), min(args.rows, len(data)))) if args.rows else range(len(data))
    readers = [(tokenizer, set(special_tokens(tokenizer).values()), room(model, args.max_new_tokens)) for model, tokenizer in policies]
    for number in numbers:
        row = without_none(data[number])
        try:
            prompt, responses, scores = answers_of(row)
            prompt = as_messages(prompt) if isinstance(prompt, list) else prompt
            responses = [as_messages(r) if isinstance(r, list) else r for r in responses]
            texts = [m["content"] for m in as_messages(prompt or "", "user")]
            if not any(text.strip() for text in texts):
                notes["dropped: no prompt, or an empty one"] += 1
                continue
            if readers and not args.allow_special and any(has_special(special, [prompt, template_options(row)]) for _, special, _ in readers):
                notes["dropped: special token in the text (--allow-special keeps it)"] += 1
                continue
            if any(len(prompt_ids(tokenizer, prompt, **template_options(row))) > longest for tokenizer, _, longest in readers):
                notes["dropped: prompt too long for the model and --max-new-tokens"] += 1
                continue
        except TemplateError as e:
            notes[f"dropped: refused by the chat template ({str(e)[:60]})"] += 1
            continue
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
            refuse(f"--dataset {args.dataset}, row {number}: not in a known format ({type(e).__name__}: {reason(e)}); see 'Reads' at the top")
        used = ("prompt", "question", "messages", "completion", "completions", "scores", "chosen", "rejected", "score_chosen", "score_rejected")
        columns = {k: v for k, v in row.items() if k not in (*used, "chosen_reward", "rejected_reward", "margin", "probability")}
        gap = [row.get("score_chosen", row.get("chosen_reward")), row.get("score_rejected", row.get("rejected_reward"))]
        item = dict(number=number, prompt=prompt, responses=responses, scores=scores, kind=row.get("kind") or "", columns=columns)
        item |= dict(gap=None if None in gap else gap[0] - gap[1], chat_template_kwargs=row.get("chat_template_kwargs"), tools=row.get("tools"))
        items.append(item)
    why = ", ".join(f"{n} {note}" for note, n in notes.items())
    if not items:
        refuse(f"--dataset {args.dataset}: none of its {len(numbers)} rows can be used ({why}); its columns are {', '.join(data.column_names)}")
    say(f"--dataset {args.dataset}: {len(items)} rows from {len(data)}; {why or 'none dropped'}")
    return items


def begin_rows(args) -> tuple:
    """Device and dtype; the output directory and what identifies the run; and the records that stand there, by row number."""
    device, dtype = start_ranks(args.dtype)
    options = ("model", "against", "judge", "dataset", "requests", "principles", "condition", "rubric")  # what may be read
    reads = {name: getattr(args, name) for name in options if hasattr(args, name)} | (dict(judge="") if args.judge_url else {})
    reads |= {f"reward_model {i}": name for i, name in enumerate(getattr(args, "reward_model", ()))}
    out, _, plan = begin(args, "judge_url", "judge_parallel", "judge_key", "batch_size", **reads)
    part, done = out / "rows.part", []
    if RANK == 0 and args.resume and part.exists() and (out / "args.json").exists():
        whole = [line for line in part.read_text().splitlines(True) if line.endswith("\n")]  # a kill may have cut the last one
        rewrite(part, whole)
        done = [json.loads(line) for line in whole]
    if WORLD > 1:
        (done,) = broadcast([done])
    return device, dtype, out, plan, {record["number"]: record for record in done}


def batches(args, out: Path, plan: dict, items: list, done: dict, name: str):
    """This rank's share of each batch of the items that are not done, behind a progress bar. All input has been read by now."""
    left = [item for item in items if item["number"] not in done]
    if done:
        say(f"resuming {out}: {len(done)} rows are done")
    elif RANK == 0:
        claim(args, out, plan)
        (out / "rows.part").unlink(missing_ok=True)
    bar = tqdm(total=len(items), initial=len(items) - len(left), desc=name, disable=RANK > 0)
    for i in range(0, len(left), args.batch_size):
        yield left[i : i + args.batch_size][RANK::WORLD]
        bar.update(len(left[i : i + args.batch_size]))
    bar.close()


def keep(out: Path, records: list, done: dict):
    """What all ranks found out about a batch: on disk, and in done."""
    if WORLD > 1:
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, records)
        records = sorted((record for part in everyone for record in part), key=lambda record: record["number"])
    if RANK == 0:
        with writing(out / "rows.part"), (out / "rows.part").open("a") as f:
            f.writelines(json.dumps(record, default=str) + "\n" for record in records)
            f.flush()
            os.fsync(f.fileno())
    done.update((record["number"], record) for record in records)


def rewrite(path: Path, lines: list):
    """Written beside and renamed, so that the file is never half there."""
    beside = path.with_name(path.name + ".new")
    with writing(path):
        beside.write_text("".join(lines))
        os.replace(beside, path)


def complete(args, out: Path, files: dict, report: dict, judge=None):
    """The data sets, by file name, and the report; then args.json says that the run is finished, and the report is printed."""
    clean = lambda x: {k: clean(v) for k, v in x.items()} if isinstance(x, dict) else None if isinstance(x, float) and not math.isfinite(x) else x
    if RANK == 0:
        for name, rows in files.items():
            rewrite(out / name, [json.dumps(row, default=str) + "\n" for row in rows])
        write_json(out / "report.json", clean(report))
        for name, value in report.items():
            if isinstance(value, dict):
                for kind, counts in value.items():
                    say(
                        f"  {name} {kind or '(none)'}: "
                        + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in counts.items())
                    )
            elif value is not None:
                say(f"  {name}: {value:.3f}" if isinstance(value, float) else f"  {name}: {value}")
        if judge and judge.spent:
            say(
                f"  since this process began{', on the first rank alone' * (WORLD > 1)}: "
                + ", ".join(f"{n} {name}" for name, n in judge.spent.items())
            )
        say(f"{out}: " + ", ".join([*(f"{name} ({len(rows)} rows)" for name, rows in files.items()), "report.json"]))
        if files and not any(rows for name, rows in files.items() if name != "raw.jsonl"):
            refuse(f"{out}: no row is left; report.json there says what became of them")
        write_json(out / "args.json", json.loads((out / "args.json").read_text()) | dict(finished=True))
        (out / "rows.part").unlink(missing_ok=True)
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- policies and judges


class Judge(NamedTuple):
    """Whoever is asked. ask(talks, options) gives the log-probabilities of replying with each option [B, K], NaN for an abstention;
    write(talks, keys, temperature) a list of (text, whether it came to an end), each sampled as its key and the seed say."""

    name: str
    ask: Callable
    write: Callable
    spent: Counter  # questions, texts, and the tokens of a server, since this process began


def prompt_ids(tokenizer, prompt, **options) -> list:
    """Ids of a prompt, text or messages, up to where the assistant is to speak."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, [" a"], stop_tokens(tokenizer))[0]
    return render(tokenizer, prompt, answer_next=True, **options)


def asked_row(ids: list, prompt) -> Row:
    """A prompt, as ids and as text or messages, to be answered."""
    return Row(ids, [[]], None, dict(prompt=prompt))


def write_texts(model, tokenizer, rows: list, keys: list, args, longest: int, temperature: float, top_p: float = 1.0, n: int = 1, stops=None) -> list:
    """n answers to each row's prompt, each a pair: its text, and whether it came to an end. What is sampled is a function of seed and keys."""
    stops = stops or all_stops(model, tokenizer)
    numbers = uniform_numbers(args.seed, 0, [f"{key}-{k}" for key in keys for k in range(n)], longest)
    tokens, *_ = sample_answers(model, rows, numbers, stops, args.sample_tokens, temperature, top_p)
    texts = as_written(tokenizer, [row for row in rows for _ in range(n)], tokens, stops)
    return [(text, ids[-1] in stops) for text, ids in zip(texts, tokens)]


def stripped(prompt, text: str) -> str:
    """An answer without the spaces around it; where it goes on in the middle of a text, with the one before it."""
    goes_on = isinstance(prompt, str) or prompt[-1]["role"] == "assistant"
    return text.rstrip() if goes_on else text.strip()


def policy_answers(policy, tokenizer, items: list, n: int, args) -> list:
    """n answers of the policy to each item: a list of (text, whether it came to an end) for each."""
    rows = [asked_row(prompt_ids(tokenizer, item["prompt"], **template_options(item)), item["prompt"]) for item in items]
    keys = [f"answer-{item['number']}" for item in items]
    texts = write_texts(policy, tokenizer, rows, keys, args, args.max_new_tokens, args.temperature, args.top_p, n)
    texts = [(stripped(items[i // n]["prompt"], text), ended) for i, (text, ended) in enumerate(texts)]
    return [texts[i * n : (i + 1) * n] for i in range(len(items))]


def mean_hidden(self, forwards, lengths: list):
    """The mean hidden state of the tokens from the prompt's last one to each response's last but one, of length 1 [R, d].

    lengths: tokens of the responses."""
    hidden = torch.cat([self.base_model(**inputs).last_hidden_state[0, source] for inputs, source, _ in forwards]).float()  # [N, d]
    return F.normalize(torch.stack([part.mean(0) for part in hidden.split(lengths)]), dim=-1)


def usable(texts: list) -> list:
    """Of (text, whether it came to an end), the texts that did and that say something besides their thinking."""
    return [text for text, ended in texts if ended and text_of(text)]


def given_text(response) -> str:
    """A response of the data set, text or one message, as text."""
    if not isinstance(response, str) and len(response) > 1:
        refuse("--dataset: has an answer of several turns, of which only the last could be scored; give answers of one message")
    return response if isinstance(response, str) else response[0]["content"]


def room(model, tokens: int) -> int:
    """Tokens of a prompt that leave room for so many more in what the model can read."""
    return getattr(model.config, "max_position_embeddings", 2**30) - tokens


def load_answerer(name: str, args, device, dtype) -> tuple:
    """A policy and its tokenizer."""
    tokenizer = load_tokenizer(name)
    policy = load_model(AutoModelForCausalLM, name, tokenizer, device, dtype)
    check_head(policy, name, device)
    policy = shard(policy.requires_grad_(False), dtype, token_logps, mean_hidden)
    if room(policy, args.max_new_tokens) < 1:
        refuse(f"--max-new-tokens {args.max_new_tokens}: {name} reads {policy.config.max_position_embeddings} tokens in all; lower it")
    return policy, tokenizer


def count(spent: Counter, kind: str, talks: list, reply: Callable):
    """Counts questions or texts, and prints the first of its kind with the judge's reply: look at it."""
    if talks and not spent[kind] and RANK == 0:
        asked = as_messages(talks[0], "user")[-1]["content"]
        tqdm.write("the judge is asked:\n  | " + asked[-600:].replace("\n", "\n  | ") + f"\nand replies: {reply()[:300]}")
    spent[kind] += len(talks)


def chances(options: list, logps) -> str:
    """The probabilities [K] of the options, to be read."""
    return ", ".join(f"{option} {p:.3f}" for option, p in zip(options, logps.exp().tolist()))


def local_judge(name: str, model, tokenizer, args, device) -> Judge:
    """A checkpoint as judge, asked through its own chat template. What it cannot read in one go, it abstains from."""
    clean = lambda talk: [dict(m, content=without_special(tokenizer, m["content"])) for m in as_messages(talk, "user")]
    spent = Counter()

    def ask(talks: list, options: list):
        talks, replies = [clean(talk) for talk in talks], max(len(tokenizer(option).input_ids) for option in options) + 8
        fits = [i for i, talk in enumerate(talks) if len(render(tokenizer, talk, answer_next=True)) <= room(model, replies)]
        logps = torch.full((len(talks), len(options)), math.nan)
        found = judge_logps(model, tokenizer, [talks[i] for i in fits], options, args, device).cpu()
        logps[fits] = found.where(found.exp().sum(1, keepdim=True) >= args.min_mass, math.nan)
        count(spent, "questions", talks, lambda: chances(options, logps[0]))
        return logps

    def write(talks: list, keys: list, temperature: float):
        last = max(1, room(model, args.judge_max_tokens))  # tokens that can be read, of a talk that is too long
        rows = [asked_row(render(tokenizer, clean(talk), answer_next=True)[-last:], clean(talk)) for talk in talks]
        wrote = write_texts(model, tokenizer, rows, keys, args, args.judge_max_tokens, temperature)
        count(spent, "texts", talks, lambda: wrote[0][0])
        return [(text.strip(), ended) for text, ended in wrote]

    return Judge(name, ask, write, spent)


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key must not go to another host than the one that was named."""

    def redirect_request(self, request, *rest):
        return None


TEN = [str(i) for i in range(1, 11)]  # the replies of whoever gives 1 to 10

WAITS = (1, 2, 4, 8, 16, 32)  # seconds before another attempt


def post(url: str, key: str, payload: dict) -> dict:
    """The server's reply to a request, as JSON; after several attempts where the server is busy or not to be reached.

    Raises HTTPError for a request that the server refuses, ConnectionError where it never replied."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
    for wait in (*WAITS, None):
        try:
            with urllib.request.build_opener(SameHost).open(request, timeout=600) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as e:
            if e.code not in (408, 409, 429) and e.code < 500:
                raise
            why, after = f"it replied {e.code} {e.reason}", e.headers.get("Retry-After") or ""
            wait = max(wait, min(60, int(after))) if wait is not None and after.isdigit() else wait
        except (OSError, ValueError, http.client.HTTPException) as e:  # no connection, a connection that broke, no JSON
            why = f"{type(e).__name__}: {reason(e)}"
        if wait is None:
            raise ConnectionError(f"no answer after {len(WAITS) + 1} attempts ({why}); what is done is kept, continue with --resume")
        time.sleep(wait)


def content_of(choice) -> str:
    """What a server's choice says, without its thinking; nothing, where it is of another form."""
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    return after_thinking(content).strip() if isinstance(content, str) else ""


def option_logps(choice: dict, options: list) -> list:
    """The log-probability of each option from a server's reply; where it tells none, 0 for the option that it named. NaN if it named none.

    It names one as its first word, or after such words as "Answer:". Of "1" and "10", where the server may write the second as two tokens and
    gives no probability for the whole, the named one is taken as it is."""
    lead = r"\W*(?i:boxed\W*|(?:the |final )*(?:answer|option|letter|score|rating)\W*(?:is\W*)?)?"
    word = re.match(lead + r"(\w+)\b(?! +[a-z])", content_of(choice))  # not the "A" of "A fair comparison", nor of "As an AI"
    if not word or word[1] not in options:
        return [math.nan] * len(options)
    named = [0.0 if option == word[1] else -math.inf for option in options]
    bare = lambda token: re.sub(r"\W", "", token)
    tokens = (choice.get("logprobs") or {}).get("content") or []
    begin = max((i + 1 for i, token in enumerate(tokens) if "</think>" in token["token"]), default=0)
    token = next((token for token in tokens[begin:] if bare(token["token"]) == word[1]), None)
    if token is None:
        return named
    likely = token.get("top_logprobs") or [token]
    mass = {option: sum(math.exp(t["logprob"]) for t in likely if bare(t["token"]) == option) for option in options}
    split = any(long != short and long.startswith(short) and not mass[long] for long in options for short in options)
    return named if split or not any(mass.values()) else [math.log(m) if m else -math.inf for m in mass.values()]


def url_judge(args) -> Judge:
    """A server with OpenAI's protocol as judge. A request that it refuses as such (400) is an abstention."""
    url, extras, spent = args.judge_url.rstrip("/") + "/chat/completions", dict(logprobs=True, top_logprobs=20), Counter()
    if args.judge_key and not os.environ.get(args.judge_key, "").strip():
        refuse("--judge-key: the environment has no variable of that name, or it is empty; the option takes the variable's name, not the key")
    key = os.environ[args.judge_key].strip() if args.judge_key else ""
    try:
        body = json.loads(args.judge_body or "{}")
    except ValueError as e:
        refuse(f"--judge-body: is no JSON ({e})")
    if not isinstance(body, dict):
        refuse(f"--judge-body: must be a JSON object, it is {args.judge_body}")
    clean = lambda m: dict(m, content=re.sub(r"<\|.{1,40}?\|>", "", m["content"]))  # what a server might take for the end of a turn

    def chat(talk, **options) -> dict:
        payload = dict(model=args.judge, messages=list(map(clean, as_messages(talk, "user"))), **options) | body
        try:
            reply = post(url, key, {k: v for k, v in payload.items() if v is not None})
        except urllib.error.HTTPError as e:
            said = e.read()[:300].decode(errors="replace")
            if e.code == 400 and "logprobs" in options:
                choice = chat(talk, **{k: v for k, v in options.items() if "logprobs" not in k})
                if choice and extras:  # it was the log-probabilities: from now on, letters alone
                    extras.clear()
                    say(f"note: {args.judge_url} gives no log-probabilities; its labels are 0 or 1")
                return choice
            if e.code != 400:
                raise ConnectionError(f"replied {e.code} {e.reason}: {said}") from e
            if not spent["refused"]:
                say(f"note: {args.judge_url} refused a request, which counts as an abstention: {said}")
            spent["refused"] += 1
            return {}
        usage = reply.get("usage") if isinstance(reply, dict) else None
        for name in ("prompt_tokens", "completion_tokens") if isinstance(usage, dict) else ():
            spent[name] += usage.get(name) or 0
        if not isinstance(reply, dict) or not reply.get("choices"):
            raise ConnectionError(f"replied without choices, as OpenAI's protocol has them: {json.dumps(reply)[:300]}")
        return reply["choices"][0]

    def several(function, *lists) -> list:
        with ThreadPoolExecutor(args.judge_parallel) as pool:
            tasks = [pool.submit(function, *each) for each in zip(*lists)]
            try:
                return [task.result() for task in tasks]
            except ConnectionError as e:
                pool.shutdown(cancel_futures=True)
                refuse(f"--judge-url {args.judge_url}: {e}")

    def ask(talks: list, options: list):
        found = several(lambda talk: option_logps(chat(talk, max_tokens=16, temperature=0, **extras), options), talks)
        logps = torch.tensor(found, dtype=torch.float32).view(len(talks), len(options))
        count(spent, "questions", talks, lambda: chances(options, logps[0]))
        return logps.where(logps.exp().sum(1, keepdim=True) >= args.min_mass, math.nan)

    def write(talks: list, keys: list, temperature: float):
        number = lambda name: int.from_bytes(hashlib.sha256(f"{args.seed}-{name}".encode()).digest()[:4], "little") >> 1
        found = several(lambda talk, name: chat(talk, max_tokens=args.judge_max_tokens, temperature=temperature, seed=number(name)), talks, keys)
        wrote = [(content_of(choice), bool(choice) and choice.get("finish_reason") != "length") for choice in found]
        count(spent, "texts", talks, lambda: wrote[0][0])
        return wrote

    return Judge(f"{args.judge} at {args.judge_url}", ask, write, spent)


def load_judge(args, device, dtype, loaded: dict) -> Judge:
    """The judge that --judge names; loaded: models that are here already, by name."""
    if args.judge_url:
        if not re.match(r"https?://[^/]", args.judge_url):
            refuse(f"--judge-url {args.judge_url}: must begin with http:// or https:// and a host")
        return url_judge(args)
    if args.judge in loaded:
        say(f"note: {args.judge} judges its own answers")
    model, tokenizer = loaded.get(args.judge) or load_frozen(AutoModelForCausalLM, args.judge, device, dtype, token_logps)
    return local_judge(args.judge, model, tokenizer, args, device)


def load_requests(args) -> dict:
    """What judges are asked: REQUESTS, with those of --requests in their places."""
    own = load_json("--requests", args.requests) if args.requests else {}
    for name, text in own.items():
        if name not in REQUESTS or not isinstance(text, str):
            refuse(f"--requests {args.requests}: {name} must be one of {', '.join(REQUESTS)}, and text")
        needed = set(re.findall(r"\{(talk|answer|a|b)\}", REQUESTS[name])) - set(re.findall(r"\{(\w+)\}", text))
        if needed and not ("{answer}" in REQUESTS[name] and "{conversation}" in text):
            refuse(f"--requests {args.requests}: {name} has no {{{'}, {'.join(sorted(needed))}}}, so that nothing could be judged by it")
    return REQUESTS | own


def load_principles(args, requests: dict) -> list:
    """The principles, a line each."""
    if not args.principles:
        return [requests["principle"]]
    try:
        lines = [line.strip() for line in Path(args.principles).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        refuse(f"--principles {args.principles}: cannot be read ({reason(e)})")
    return lines or refuse(f"--principles {args.principles}: has no line with a principle")


def fill(prompt: str, **parts) -> str:
    """A prompt with its {parts} filled in, all at once, so that braces in a part stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda m: parts.get(m[1], m[0]), prompt)


def talk_of(prompt) -> str:
    """A prompt as the judge reads it."""
    return prompt if isinstance(prompt, str) else conversation_text(prompt, "").removesuffix("assistant: ").rstrip("\n")


def about(prompt, text: str) -> dict:
    """The parts of a request about one answer."""
    return dict(talk=talk_of(prompt), answer=text.strip(), conversation=conversation_text(prompt, text))


def compare_pairs(judge: Judge, requests: dict, principles: list, args, pairs: list) -> list:
    """P(a > b) of pairs (key, prompt, a, b): dicts with its value with a as A, first, and as B, second; of each judgement, votes; principles.

    The order in which a pair is given changes nothing: its answers are first put in the order of the alphabet."""
    asked, keys = [], []
    for key, prompt, *answers in pairs:
        low, high = sorted(answers)
        for j in range(args.judgements):
            principle = random.Random(f"{args.seed}-{key}-{j}").choice(principles)
            asked += [dict(talk=talk_of(prompt), principle=principle, a=a, b=b) for a, b in ((low, high), (high, low))]
            keys += [f"reason-{key}-{j}-{order}" for order in range(2)]
    if args.reasoning:
        talks = [as_messages(fill(requests["reason"], **parts), "user") for parts in asked]
        reasons = judge.write(talks, keys, float(args.judgements > 1))
        ends = [as_messages(fill(requests["conclude"], **parts), "user") for parts in asked]
        talks = [talk + as_messages(text) + end for talk, (text, _), end in zip(talks, reasons, ends)]
    else:
        talks = [fill(requests["compare"], **parts) for parts in asked]
    first, second = judge.ask(talks, ["A", "B"]).view(len(pairs), args.judgements, 2, 2).unbind(2)  # [n, J, letter] each
    votes = preference(first, second)  # P(low > high) [n, J], NaN where either order has none
    orders = torch.stack([first.softmax(-1)[..., 0], second.softmax(-1)[..., 1]]).where(~votes.isnan(), math.nan).nanmean(-1)  # [2, n]
    drawn, found = iter([parts["principle"] for parts in asked[::2]]), []
    for (_, _, a, b), (one, two), own in zip(pairs, orders.T.tolist(), votes.tolist()):
        if a > b:  # a was the one called high: its first place is the other order's
            one, two, own = 1 - two, 1 - one, [1 - p for p in own]
        found.append(dict(first=one, second=two, votes=own, principles=[next(drawn) for _ in own]))
    return found


def judge_report(found: list) -> dict:
    """What comparisons are worth. Each is a dict: first, second and votes of `compare_pairs`, verdict, the lengths of both answers, kind,
    and given: 1 if a is known to be the better one, -1 if b is, 0 if that is not known."""
    mean = lambda values: sum(values) / len(values) if values else math.nan
    heard = [c for c in found if c["verdict"] != "abstain"]
    decided = [c | dict(sign=1 if c["verdict"] == "a" else -1) for c in heard if c["verdict"] != "tie"]
    places = [c for c in heard if (c["first"] - 0.5) * (c["second"] - 0.5) < 0]
    uneven = [c | dict(longer=1 if c["lengths"][0] > c["lengths"][1] else -1) for c in decided if c["lengths"][0] != c["lengths"][1]]
    votes = [combinations([p > 0.5 for p in c["votes"] if not math.isnan(p)], 2) for c in heard]
    same = [x == y for two in votes for x, y in two]
    report = dict(comparisons=len(found), decided=len(decided), ties=len(heard) - len(decided), abstentions=len(found) - len(heard))
    report |= dict(
        same_position=len(places) / len(heard) if heard else math.nan,
        first_position=mean([c["first"] > 0.5 for c in places]),
        prefers_longer=mean([c["sign"] == c["longer"] for c in uneven]),
    )
    report |= dict(consistency=mean(same)) if same else {}
    known = [c for c in found if c["given"]]
    if known:
        report["given_longer"] = mean([c["given"] == c["longer"] for c in uneven if c["given"]])
        report["agreement"] = mean([c["sign"] == c["given"] for c in decided if c["given"]])
        means = [(c["given"], (c["first"] + c["second"]) / 2) for c in heard if c["given"]]
        report["agreement_by_mean"] = mean([(1 + given * ((p > 0.5) - (p < 0.5))) / 2 for given, p in means])  # ties too; 1/2 counts half
        said = lambda c: {"a": 1, "b": -1}.get(c["verdict"], c["verdict"])
        names = lambda c: said(c) if isinstance(said(c), str) else "agree" if said(c) == c["given"] else "disagree"
        counts = {kind: Counter(names(c) for c in known if c["kind"] == kind) for kind in sorted({c["kind"] for c in known})}
        report["kinds"] = {kind: {name: own[name] for name in ("agree", "disagree", "tie", "abstain")} for kind, own in counts.items()}
    return report


# --------------------------------------------------------------------------------------------------------------- subcommands


def label(args: LabelArgs):
    """Preferences from AI feedback."""
    # 1. the policy if it is to answer, the judge, and the rows
    if args.model and args.k < 2:
        refuse(f"--k {args.k}: one answer has nothing to be compared with; use 2 or more")
    if args.clamp > 0.5:
        refuse(f"--clamp {args.clamp}: must be at most 0.5, where nothing of a preference is left")
    device, dtype, out, plan, done = begin_rows(args)
    policies = {args.model: load_answerer(args.model, args, device, dtype)} if args.model else {}
    judge, requests = load_judge(args, device, dtype, policies), load_requests(args)
    principles, items = load_principles(args, requests), load_items(args, *policies.values())
    for item in items if policies else ():  # answers that the data set has do not count
        item |= dict(responses=[], scores=None)
    if not policies and max(len(item["responses"]) for item in items) < 2:
        refuse(f"--dataset {args.dataset}: has no two answers to compare; pass --model to sample them")

    for batch in batches(args, out, plan, items, done, "label"):
        # 2. the answers, no two alike, none cut off
        for item, texts in zip(batch, policy_answers(*policies[args.model], batch, args.k, args) if policies else []):
            item["cut"] = sum(not ended for _, ended in texts)
            item["responses"] = [as_response(item["prompt"], text) for text in dict.fromkeys(usable(texts))]
        # 3. every two of them, in both orders
        pairs = [(item, i, j) for item in batch for i, j in combinations(range(len(item["responses"])), 2)]
        found = compare_pairs(judge, requests, principles, args, [
            (f"{item['number']}-{i}-{j}", item["prompt"], text_of(item["responses"][i]), text_of(item["responses"][j])) for item, i, j in pairs
        ])  # fmt: skip
        # 4. on disk
        records = {item["number"]: dict(number=item["number"], responses=item["responses"], cut=item.get("cut", 0), pairs=[]) for item in batch}
        for (item, i, j), comparison in zip(pairs, found):
            records[item["number"]]["pairs"].append(dict(comparison, i=i, j=j))
        keep(out, list(records.values()), done)

    # 5. soft preferences of pairs, or scores of K answers; what cannot be told apart is counted, not guessed
    ranked, rows, found = (args.k if policies else max(len(item["responses"]) for item in items)) > 2, [], []
    for item in items:
        record, base = done[item["number"]], dict(item["columns"], prompt=item["prompt"], judge=judge.name)
        base |= dict(policy=args.model) if policies else {}
        responses, wins = record["responses"], {}
        for c in record["pairs"]:
            said, (i, j) = verdict(c["first"], c["second"], args.orders, args.tie_margin), (c["i"], c["j"])
            given = item["scores"][i] - item["scores"][j] if item["scores"] else 0
            lengths = [len(text_of(responses[k])) for k in (i, j)]
            found.append(dict(c, verdict=said, given=(given > 0) - (given < 0), kind=item["kind"], lengths=lengths))
            low = args.clamp if args.reasoning else 0.0
            p = min(max((c["first"] + c["second"]) / 2, low), 1 - low) if said != "abstain" else math.nan
            wins[i, j], wins[j, i] = p, 1 - p
            if not ranked and said in "ab":
                i, j, p = (i, j, p) if said == "a" else (j, i, 1 - p)
                rows.append(dict(base, chosen=responses[i], rejected=responses[j], probability=p, principles=c["principles"]))
        if ranked:
            scores = ranking_scores([[wins.get((i, j), math.nan) for j in range(len(responses))] for i in range(len(responses))])
            kept = [i for i, score in enumerate(scores) if not math.isnan(score)]
            if len({scores[i] for i in kept}) > 1:
                rows.append(dict(base, completions=[responses[i] for i in kept], scores=[scores[i] for i in kept]))
    report = dict(rows=len(items), labelled=len(rows), cut_off=sum(done[item["number"]]["cut"] for item in items))
    report |= dict(nothing_to_compare=sum(not done[item["number"]]["pairs"] for item in items), **judge_report(found))
    if RANK == 0:
        (out / ("pairs.jsonl" if ranked else "rankings.jsonl")).unlink(missing_ok=True)  # of a run that this one replaces
    complete(args, out, {"rankings.jsonl" if ranked else "pairs.jsonl": rows}, report, judge)


def revise(args: ReviseArgs):
    """Critique and revision."""
    # 1. the policy, the critic, and the rows
    args.judge = args.judge or args.model
    device, dtype, out, plan, done = begin_rows(args)
    policies = {args.model: load_answerer(args.model, args, device, dtype)}
    critic, requests = load_judge(args, device, dtype, policies), load_requests(args)
    principles, items = load_principles(args, requests), load_items(args, *policies.values())

    for batch in batches(args, out, plan, items, done, "revise"):
        # 2. the policy's first answers, unless the data set has one
        asked = [item for item in batch if len(item["responses"]) != 1]
        texts = {item["number"]: text_of(item["responses"][0]) for item in batch if len(item["responses"]) == 1}
        texts |= {item["number"]: text_of(found[0][0]) for item, found in zip(asked, policy_answers(*policies[args.model], asked, 1, args))}
        records = {item["number"]: dict(number=item["number"], original=texts[item["number"]], revisions=[]) for item in batch}
        for i in range(args.rounds):
            # 3. a critique by a principle drawn anew, and a revision that takes the answer's place
            drawn = [random.Random(f"{args.seed}-{item['number']}-{i}").choice(principles) for item in batch]
            keys = [f"{item['number']}-{i}" for item in batch]
            parts = [about(item["prompt"], going_on(item["prompt"], texts[item["number"]])) for item in batch]
            asks, ends = ([fill(requests[name], principle=p, **part) for p, part in zip(drawn, parts)] for name in ("critique", "revise"))
            wrote = critic.write(asks, [f"critique-{key}" for key in keys], args.judge_temperature)
            critiques = [text_of(text) for text, _ in wrote]
            talks = [as_messages(ask, "user") + as_messages(text) + as_messages(end, "user") for ask, text, end in zip(asks, critiques, ends)]
            revised = critic.write(talks, [f"revision-{key}" for key in keys], args.judge_temperature)
            for item, principle, critique, (text, ended) in zip(batch, drawn, critiques, revised):
                text = text_of(text)  # its thinking is about a critique that the data will not show
                step = dict(round=i + 1, principle=principle, critique=critique, revision=text, used=bool(ended and text))
                records[item["number"]]["revisions"].append(step)
                texts[item["number"]] = text if step["used"] else texts[item["number"]]
        # 4. on disk
        keep(out, list(records.values()), done)

    # 5. every revision, or the last, as a demonstration
    rows, counts = [], Counter()
    for item in items:
        record, before, made = done[item["number"]], done[item["number"]]["original"], []
        for step in record["revisions"]:
            counts["unusable" if not step["used"] else "unchanged" if step["revision"] == before else "changed"] += 1
            if step["used"]:
                before = step["revision"]
                row = dict(item["columns"], prompt=item["prompt"], completion=as_response(item["prompt"], going_on(item["prompt"], before)))
                row |= {name: step[name] for name in ("principle", "critique", "round")} | dict(original=record["original"], judge=critic.name)
                made.append(row)
        rows += made if args.keep == "all" else made[-1:]
    complete(args, out, {"sft.jsonl": rows}, dict(rows=len(items), revisions=len(items) * args.rounds, **counts), critic)


def best_of_n(args: BestOfNArgs):
    """The best and the worst of N answers."""
    # 1. the policy, whoever scores its answers, and the rows
    if bool(args.reward_model) == bool(args.judge):
        refuse("best-of-n needs somebody to score the answers: either --reward-model or --judge (which may be --model itself)")
    if args.n < 2:
        refuse(f"--n {args.n}: the best of one answer is no choice; use 2 or more")
    device, dtype, out, plan, done = begin_rows(args)
    policies = {args.model: load_answerer(args.model, args, device, dtype)} if args.model else {}
    requests, conditions = load_requests(args), load_conditions(args.condition)
    judge = load_judge(args, device, dtype, policies) if args.judge else None
    models, items = load_reward_models(args, device, dtype), load_items(args, *policies.values())
    if not policies and max(len(item["responses"]) for item in items) < 2:
        refuse(f"--dataset {args.dataset}: has no two answers to choose from; pass --model to sample them")
    given = {} if policies else {item["number"]: [(given_text(r), True) for r in item["responses"]] for item in items}

    for batch in batches(args, out, plan, items, done, "best of n"):
        # 2. N answers to each prompt, those that came to an end
        answers = policy_answers(*policies[args.model], batch, args.n, args) if policies else [given[item["number"]] for item in batch]
        asked = [(item, k, text) for item, texts in zip(batch, answers) for k, text in enumerate(usable(texts))]
        read = [stripped(item["prompt"], after_thinking(text)) for item, _, text in asked]  # what a judge or reward model sees
        # 3. their scores
        parts = [about(item["prompt"], text) for (item, *_), text in zip(asked, read)]
        if models:
            rows = [Row([], [[]], None, item) for item, *_ in asked]
            scores = sum(reward_scores(*model, conditions, args, device, rows, read) for model in models).tolist()
        elif args.scale == "ten":
            logps = judge.ask([fill(requests["score"], **part) for part in parts], TEN)
            scores = expected_score(logps.softmax(-1)).tolist()
        else:
            J = args.judgements
            keys = [f"points-{item['number']}-{k}-{j}" for item, k, _ in asked for j in range(J)]
            texts = judge.write([fill(requests["points"], **part) for part in parts for _ in range(J)], keys, 1.0)
            scores = torch.tensor([points(text) for text, _ in texts]).view(-1, J).nanmean(1).tolist()  # what cannot be read does not count
        # 4. on disk
        records = {item["number"]: dict(number=item["number"], answers=[]) for item in batch}
        for (item, _, text), score in zip(asked, scores):
            records[item["number"]]["answers"].append([text, score])
        keep(out, list(records.values()), done)

    # 5. the best, the best and the worst, all; and the prompts that tell answers apart
    files, counts, means = {name: [] for name in ("sft.jsonl", "pairs.jsonl", "rankings.jsonl", "prompts.jsonl")}, Counter(), []
    for item in items:
        every = [score for _, score in done[item["number"]]["answers"]]
        answers = {}
        for text, score in done[item["number"]]["answers"]:
            if not math.isnan(score):
                answers.setdefault(text, score)
        counts["cut_off_or_empty"] += (args.n if policies else len(item["responses"])) - len(every)
        counts["unscored"] += sum(map(math.isnan, every))
        if not answers:
            counts["without answers"] += 1
            continue
        (worst, low), (best, high) = (pick(answers.items(), key=lambda pair: pair[1]) for pick in (min, max))
        means.append((low, sum(s for s in every if not math.isnan(s)) / sum(not math.isnan(s) for s in every), high))
        if high - low < args.min_spread:
            counts["below --min-spread"] += 1
            continue
        base = dict(
            item["columns"], prompt=item["prompt"], policy=args.model or "given", scored_by=judge.name if judge else ", ".join(args.reward_model)
        )
        respond = lambda text: as_response(item["prompt"], text)
        files["sft.jsonl"].append(dict(base, completion=respond(best), score=high))
        files["prompts.jsonl"].append(dict(item["columns"], prompt=item["prompt"], spread=high - low))
        if high > low:
            files["pairs.jsonl"].append(dict(base, chosen=respond(best), rejected=respond(worst), score_chosen=high, score_rejected=low))
            files["rankings.jsonl"].append(dict(base, completions=list(map(respond, answers)), scores=list(answers.values())))
        else:
            counts["all alike"] += 1
    low, mean, high = (sum(column) / max(1, len(means)) for column in zip(*means)) if means else (math.nan,) * 3
    report = dict(rows=len(items), kept=len(files["sft.jsonl"]), pairs=len(files["pairs.jsonl"]), score_worst=low, score_mean=mean, score_best=high)
    report |= dict(kl_bound=math.log(args.n) - (args.n - 1) / args.n) if policies else {}  # nats, of the best from the policy
    complete(args, out, files, report | counts, judge)


def load_reward_models(args, device, dtype) -> list:
    """The reward models, each with its tokenizer."""
    for name in args.reward_model:
        load_tokenizer(name)
        if not is_reward_model(name):
            refuse(f"--reward-model {name}: not a reward model (a sequence classifier with one label); make one with reward_model.py")
    return [load_frozen(AutoModelForSequenceClassification, name, device, dtype, response_scores, num_labels=1) for name in args.reward_model]


def around_user(tokenizer, messages: list) -> tuple:
    """The text of a conversation up to where the user's next words begin, and the first word of what follows these."""
    mark = "MARKTHEPLACE"
    text = tokenizer.apply_chat_template([*messages, dict(role="user", content=mark)], tokenize=False)
    if mark not in text:
        refuse("the chat template hides what a user says, so that no turn can be invented; use another model")
    before, _, after = text.partition(mark)
    return before, (after.split() or [""])[0]


def before_user(tokenizer, messages: list) -> list:
    """Ids of a conversation up to where the user's next words begin; a space there belongs to the first of these."""
    return tokenizer(around_user(tokenizer, messages)[0].rstrip(" "), add_special_tokens=False).input_ids


def synthesise(args: SynthesiseArgs):
    """Conversations from nothing."""
    # 1. the policy, and whoever rates what it writes
    if (args.min_quality is not None or args.min_difficulty is not None) and not args.judge:
        refuse("--min-quality and --min-difficulty need a --judge to rate (which may be --model itself)")
    if args.min_reward is not None and not args.reward_model:
        refuse("--min-reward needs a --reward-model")
    if not args.rows:
        refuse("--rows 0: how many conversations shall be written?")
    device, dtype, out, plan, done = begin_rows(args)
    policy, tokenizer = load_answerer(args.model, args, device, dtype)
    requests, special = load_requests(args), special_tokens(tokenizer)
    judge = load_judge(args, device, dtype, {args.model: (policy, tokenizer)}) if args.judge else None
    models, longest = load_reward_models(args, device, dtype), room(policy, args.max_new_tokens)
    ends = sorted({*all_stops(policy, tokenizer), *special})  # a user's turn ends at any of them
    opening = [dict(role="system", content=args.system)] if args.system else []
    before, mark = around_user(tokenizer, opening)
    items = [dict(number=number) for number in range(args.rows)]

    for batch in batches(args, out, plan, items, done, "synthesise"):
        talks = [opening for _ in batch]
        whole = [True] * len(batch)
        for turn in range(args.turns):
            # 2. the user's turn, from the template alone
            asked = [asked_row(before_user(tokenizer, talk)[-longest:], "") for talk in talks]
            keys = [f"user-{turn}-{item['number']}" for item in batch]
            said = write_texts(policy, tokenizer, asked, keys, args, args.max_new_tokens, args.temperature, args.top_p, stops=ends)
            said = [(text.partition(mark)[0], ended or mark in text) if mark else (text, ended) for text, ended in said]
            said = [(text.removeprefix(" ") if before.endswith(" ") else text, ended) for text, ended in said]
            talks = [[*talk, dict(role="user", content=text)] for talk, (text, _) in zip(talks, said)]
            # 3. the answer to it
            asked = [asked_row(render(tokenizer, talk, answer_next=True)[-longest:], talk) for talk in talks]
            keys = [f"answer-{turn}-{item['number']}" for item in batch]
            answers = write_texts(policy, tokenizer, asked, keys, args, args.max_new_tokens, args.answer_temperature)
            talks = [[*talk, dict(role="assistant", content=text.strip())] for talk, (text, _) in zip(talks, answers)]
            whole = [w and a.strip() != "" and b and x.strip() != "" and y for w, (a, b), (x, y) in zip(whole, said, answers)]
        # 4. ratings of the first turn, and the reward of the last answer
        first = [next(m["content"] for m in talk if m["role"] == "user") for talk in talks]
        rated = dict(quality=[None] * len(batch), difficulty=[None] * len(batch), reward=[None] * len(batch))
        for name in ("quality", "difficulty") if judge else ():
            logps = judge.ask([fill(requests[name], talk=text) for text in first], TEN)
            rated[name] = [None if math.isnan(score) else score * 4.5 + 5.5 for score in expected_score(logps.softmax(-1)).tolist()]
        if models:
            rows = [Row([], [[]], None, dict(prompt=talk[:-1], kind="")) for talk in talks]
            rated["reward"] = sum(reward_scores(*model, {}, args, device, rows, [text_of(t[-1:]) for t in talks]) for model in models).tolist()
        # 5. on disk
        records = [dict(number=item["number"], messages=talk, first=text, whole=w) for item, talk, text, w in zip(batch, talks, first, whole)]
        keep(out, [record | {k: v[i] for k, v in rated.items()} for i, record in enumerate(records)], done)

    # 6. filters, one after the other; a conversation is counted under the first that it fails
    seen, survivors = set(), []
    below = lambda value, least: least is not None and not (value is not None and value >= least)
    for number in range(args.rows):
        record = done[number]
        ids = tokenizer(record["first"], add_special_tokens=False).input_ids
        fails = {
            "empty or cut off": not record["whole"],
            "special token in the text": any(s in m["content"] for m in record["messages"] for s in special.values()),
            "repeated": record["first"] in seen,
            "--min-tokens": len(ids) < args.min_tokens,
            "--min-quality": below(record["quality"], args.min_quality),
            "--min-difficulty": below(record["difficulty"], args.min_difficulty),
            "--min-reward": below(record["reward"], args.min_reward),
        }
        record["dropped"] = next((why for why, failed in fails.items() if failed), "")
        if not record["dropped"]:
            seen.add(record["first"])
            survivors.append((record, Row(ids[:1], [[*ids[1:], ids[-1]]])))  # the last token once more, for its own hidden state to count
    # 7. near repeats, by the mean hidden state of the first turn; every rank computes its part
    distances = math.nan
    if survivors:
        mine, vectors = range(RANK, len(survivors), WORLD), torch.zeros(len(survivors), policy.config.get_text_config().hidden_size, device=device)
        rows = [survivors[i][1] for i in mine]
        with torch.no_grad():
            for group, forwards, target in packed(rows, args.tokens_per_forward, device, policy.together):
                found = policy.mean_hidden(forwards, [len(rows[i].responses[0]) for i in group] or [len(target)])
                if group:
                    vectors[[mine[i] for i in group]] = found
        vectors = over_ranks(vectors)
        kept = set(keep_distant(vectors, args.min_distance)) if args.min_distance else range(len(survivors))
        distances = nearest(vectors).median().item()
        for i, (record, _) in enumerate(survivors):
            record["dropped"] = "" if i in kept else "--min-distance"
    raw, counts = [done[number] for number in range(args.rows)], Counter(done[number]["dropped"] for number in range(args.rows))
    good = [dict(messages=r["messages"], policy=args.model, quality=r["quality"], reward=r["reward"]) for r in raw if not r["dropped"]]
    files = {"sft.jsonl": good, "prompts.jsonl": [dict(prompt=row["messages"][:-1]) for row in good], "raw.jsonl": raw}
    report = dict(written=args.rows, kept=len(good), median_distance=distances, **{f"dropped: {why}": n for why, n in counts.items() if why})
    complete(args, out, files, report, judge)


def compare_policies(args: CompareArgs):
    """The win rate of A over B."""
    # 1. two policies, the judge, and the rows
    device, dtype, out, plan, done = begin_rows(args)
    policies = {name: load_answerer(name, args, device, dtype) for name in dict.fromkeys((args.model, args.against))}
    judge, requests = load_judge(args, device, dtype, policies), load_requests(args)
    principles, items = load_principles(args, requests), load_items(args, *policies.values())

    for batch in batches(args, out, plan, items, done, "compare"):
        # 2. an answer of each
        answers = [[texts[0] for texts in policy_answers(*policies[name], batch, 1, args)] for name in (args.model, args.against)]
        # 3. which is better, in both orders; two that are alike tie
        pairs = [(item, a, b) for item, (a, _), (b, _) in zip(batch, *answers)]
        asked = [(f"{item['number']}", item["prompt"], text_of(a), text_of(b)) for item, a, b in pairs if a != b]
        found = iter(compare_pairs(judge, requests, principles, args, asked))
        records = []
        for (item, a, b), (_, ended), (_, other) in zip(pairs, *answers):
            c = next(found) if a != b else dict(first=0.5, second=0.5, votes=[0.5], principles=[])
            records.append(dict(c, number=item["number"], a=a, b=b, ended=[ended, other]))
        # 4. on disk
        keep(out, records, done)

    # 5. the share of wins, a tie being half of one
    rows, found, outcomes, identical = [], [], [], 0
    for item in items:
        record = done[item["number"]]
        said = verdict(record["first"], record["second"], args.orders, args.tie_margin)
        found.append(dict(record, verdict=said, given=0, kind=item["kind"], lengths=[len(text_of(record[k])) for k in "ab"]))
        identical += record["a"] == record["b"]
        if said != "abstain":
            outcomes.append((item["kind"], dict(a=1.0, b=0.0, tie=0.5)[said]))
        p = (record["first"] + record["second"]) / 2
        row = dict(item["columns"], prompt=item["prompt"], a=record["a"], b=record["b"], verdict=said, judge=judge.name)
        rows.append(row | dict(probability=None if math.isnan(p) else p))
    mean, low, high = interval([outcome for _, outcome in outcomes])
    report = dict(win_rate=mean, low=low, high=high, wins=sum(o == 1 for _, o in outcomes), losses=sum(o == 0 for _, o in outcomes))
    report["identical"] = identical  # both draw by the same numbers; these count as ties
    for i, name in enumerate("ab"):
        report[f"{name}_characters"] = sum(c["lengths"][i] for c in found) / len(found)
        report[f"{name}_cut_off"] = sum(not c["ended"][i] for c in found)
    kinds = {kind: interval([o for k, o in outcomes if k == kind]) for kind in sorted({kind for kind, _ in outcomes})}
    report["kinds"] = {kind: dict(zip(("win_rate", "low", "high"), ends)) for kind, ends in kinds.items()}
    complete(args, out, {"comparisons.jsonl": rows}, report | judge_report(found), judge)
    say(f"{args.model} against {args.against}: wins {mean:.3f} ({low:.3f} to {high:.3f}) of {len(outcomes)}, ties half")


def audit(args: AuditArgs):
    """What labels are worth."""
    # 1. the judge, and pairs whose better answer is known
    device, dtype, out, plan, done = begin_rows(args)
    judge, requests = load_judge(args, device, dtype, {}), load_requests(args)
    principles, pairs = load_principles(args, requests), []
    for item in load_items(args):
        for i, j in combinations(range(len(item["responses"])), 2):
            known = item["scores"][i] - item["scores"][j] if item["scores"] else 0
            gap = known if item["gap"] is None else item["gap"]  # of chosen and rejected, where the data set has their scores
            if known and gap * (1 if known > 0 else -1) >= args.min_gap:
                pairs.append((item | dict(gap=abs(gap)), i, j))
    items = [dict(number=number, item=item, i=i, j=j) for number, (item, i, j) in enumerate(pairs)]
    if not items:
        refuse(f"--dataset {args.dataset}: has no pair whose better answer is known (chosen and rejected, or completions and scores)")

    for batch in batches(args, out, plan, items, done, "audit"):
        # 2. each of them, in both orders
        asked = [(f"{p['number']}", p["item"]["prompt"], *(text_of(p["item"]["responses"][p[k]]) for k in "ij")) for p in batch]
        if args.by == "letters":
            found = compare_pairs(judge, requests, principles, args, asked)
        else:  # P is 1 where a has the higher score; no order, no principle
            logps = judge.ask([fill(requests["score"], **about(prompt, text)) for _, prompt, *pair in asked for text in pair], TEN)
            a, b = expected_score(logps.softmax(-1)).view(-1, 2).T
            wins = ((a > b).float() + 0.5 * (a == b)).where(~(a + b).isnan(), math.nan).tolist()
            found = [dict(first=p, second=p, votes=[p], principles=[]) for p in wins]
        # 3. on disk
        keep(out, [dict(c, number=p["number"]) for p, c in zip(batch, found)], done)

    # 4. the labels against the truth
    found = []
    for p in items:
        item, c = p["item"], done[p["number"]]
        known = item["scores"][p["i"]] - item["scores"][p["j"]]
        lengths = [len(text_of(item["responses"][p[k]])) for k in "ij"]
        said = verdict(c["first"], c["second"], args.orders, args.tie_margin)
        found.append(dict(c, verdict=said, given=1 if known > 0 else -1, kind=item["kind"], lengths=lengths, gap=item["gap"]))
    report = judge_report(found)
    if RANK == 0:
        draw_audit(out, found, report)
    complete(args, out, {}, report, judge)


def weigh(args: WeighArgs):
    """A rubric's rewards, fitted."""
    # 1. the judge, the reward models, and answers whose order is known
    device, dtype, out, plan, done = begin_rows(args)
    judge, models, conditions = load_judge(args, device, dtype, {}), load_reward_models(args, device, dtype), load_conditions(args.condition)
    rubric = load_rubric(args.rubric)
    options, kinds = list(rubric.get("options", {})), list(rubric.get("reward", {}))
    if not options or not models:
        refuse("weigh needs a --rubric with options, and at least one --reward-model")
    items = [item for item in load_items(args) if item["kind"] in kinds and item["scores"] and len(item["responses"]) > 1]
    kinds = [kind for kind in kinds if any(item["kind"] == kind for item in items)]  # the others get no reward
    if not items:
        refuse(f"--dataset {args.dataset}: has no labelled answers whose kind is one of the rubric's: {', '.join(rubric['reward'])}")
    given = {item["number"]: [after_thinking(given_text(response)) for response in item["responses"]] for item in items}

    for batch in batches(args, out, plan, items, done, "weigh"):
        # 2. the reward models' scores and the probabilities of the rubric's options, by answer
        asked = [(item, stripped(item["prompt"], text)) for item in batch for text in given[item["number"]]]
        scores = sum(
            reward_scores(*m, conditions, args, device, [Row([], [[]], None, i) for i, _ in asked], [text for _, text in asked]) for m in models
        )
        question = f"{rubric['question']}\n" + "\n".join(f"{letter}. {text}" for letter, text in rubric["options"].items())
        logps = judge.ask([f"{conversation_text(item['prompt'], text)}\n\n{question}" for item, text in asked], options)
        found = list(zip(scores.tolist(), logps.softmax(-1).tolist()))
        records = []
        for item in batch:  # 3. on disk
            records.append(dict(number=item["number"], answers=found[: len(item["responses"])]))
            found = found[len(item["responses"]) :]
        keep(out, records, done)

    # 4. every pair of which one is better; a weight for each kind and option, from 0, by AdamW on all pairs at once
    pairs = []
    for item in items:
        answers = done[item["number"]]["answers"]
        for i, j in permutations(range(len(answers)), 2):
            if item["scores"][i] > item["scores"][j]:
                (r, phi), (q, psi) = answers[i], answers[j]
                pairs.append((kinds.index(item["kind"]), r, q, phi, psi))
    skipped, pairs = len(pairs), [pair for pair in pairs if not math.isnan(sum(pair[3]) + sum(pair[4]))]
    if not pairs:
        refuse(f"--dataset {args.dataset}: the judge replied to none of its pairs with a letter; see --min-mass")
    kind, *columns = (torch.tensor(column) for column in zip(*pairs))
    weights = torch.zeros(len(kinds), len(options), requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=0.01, weight_decay=0.0)
    wrong = lambda: (rubric_hinge(weights[kind], *columns, margin=args.margin).item(), misordered(weights[kind], *columns))
    before = wrong()
    for _ in range(1000):
        optimizer.zero_grad()
        rubric_hinge(weights[kind], *columns, margin=args.margin).backward()
        optimizer.step()
    after = wrong()
    centred = weights - weights.mean(1, keepdim=True)  # an answer's probabilities sum to 1, so that a constant says nothing
    table = {k: {o: round(w, 4) for o, w in zip(options, row)} for k, row in zip(kinds, centred.tolist())}
    if RANK == 0:
        write_json(out / "rubric.json", rubric | dict(reward=table))
    report = dict(pairs=len(pairs), abstentions=skipped - len(pairs), hinge_before=before[0], hinge_after=after[0])
    complete(args, out, {}, report | dict(misordered_before=before[1], misordered_after=after[1], reward=table), judge)


def misordered(weights, better, worse, better_features, worse_features) -> float:
    """The share of pairs in which the better answer does not have the larger total reward."""
    return (better + (weights * better_features).sum(-1) <= worse + (weights * worse_features).sum(-1)).float().mean().item()


def draw_audit(out: Path, found: list, report: dict):
    """audit.png: agreement by kind, by how clear the case is, and by how sure the judge is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
    kinds, floor = list(report.get("kinds", {})), [0] * len(report.get("kinds", {}))
    for name in ("agree", "tie", "abstain", "disagree"):
        counts = [report["kinds"][kind][name] for kind in kinds]
        axes[0].bar([kind or "all" for kind in kinds], counts, bottom=floor, label=name)
        floor = [a + b for a, b in zip(floor, counts)]
    axes[0].set(title="verdicts by kind", ylabel="pairs", ylim=(0, 1.2 * max([1, *floor])))
    axes[0].legend(loc="upper center", ncols=4, fontsize="small")
    for axis, key, title in (
        (axes[1], lambda c: c["gap"], "agreement by the gap between the given scores"),
        (axes[2], lambda c: 0.5 + abs((c["first"] + c["second"]) / 2 - 0.5), "agreement by the judge's certainty"),
    ):
        decided = sorted((c for c in found if c["verdict"] in "ab"), key=key)
        cuts = [round(i * len(decided) / 8) for i in range(9)]
        parts = [decided[a:b] for a, b in zip(cuts, cuts[1:]) if b > a]  # eight parts of equal size
        middles = [sum(map(key, part)) / len(part) for part in parts]
        shares = [interval([float((c["verdict"] == "a") == (c["given"] > 0)) for c in part]) for part in parts]
        if parts:
            spread = [[max(0.0, mean - low) for mean, low, _ in shares], [max(0.0, high - mean) for mean, _, high in shares]]
            axis.errorbar(middles, [mean for mean, *_ in shares], spread, fmt="o-", capsize=3)
        axis.set(title=title, ylim=(0, 1.02))
    axes[2].plot([0.5, 1], [0.5, 1], ":", color="grey")
    figure.savefig(out / "audit.part.png", dpi=120)
    os.replace(out / "audit.part.png", out / "audit.png")
    plt.close(figure)


def main(args: Args):
    check_numbers(args)
    commands = {
        LabelArgs: label,
        ReviseArgs: revise,
        BestOfNArgs: best_of_n,
        SynthesiseArgs: synthesise,
        CompareArgs: compare_policies,
        AuditArgs: audit,
        WeighArgs: weigh,
    }
    if args.judge_url and not args.judge:
        refuse("--judge-url needs --judge, the model's name there")
    try:
        commands[type(args)](args)
    except KeyboardInterrupt:
        say("\nstopped; finished batches are kept, the same command with --resume goes on")
        sys.exit(130)
    except TemplateError as e:
        refuse(f"a chat template refuses a conversation that it was given ({e}); leave out --system or --condition, or use another model")


if __name__ == "__main__":
    main(args)
