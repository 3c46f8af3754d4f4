# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<=2.13.0", "transformers>=5.17,<5.40", "datasets>=4", "tyro>=1.0", "wandb", "matplotlib", "tqdm"]
# ///
"""Group relative policy optimisation: reinforcement learning without a critic; verifiable rewards, and thinking before the answer.

    J(pi) = E_{x, o_1..o_G ~ pi_old} (1/G) sum_i (1/|o_i|) sum_t [ min( rho_t A_i, clip(rho_t, 1 - e, 1 + e) A_i ) - beta KL_t ]
    rho_t = pi(o_t | x, o_<t) / pi_old(o_t | x, o_<t);
    A_i = (r_i - mean r) / std r over the G answers to one prompt;       KL_t = pi_ref / pi - log( pi_ref / pi ) - 1, per token
    GRPO (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300), eqs. 3 and 4. The mean of the group's rewards stands in for PPO's value model.

Departures and options
  1. The paper does not say which standard deviation: here the sample's, + 1e-4, as in TRL; --scale population, or none (Dr. GRPO).
  2. --normalise token: every token of an update counts the same (DAPO, arXiv 2503.14476, eq. 12, there over one prompt's group);
     constant: sums over tokens by --max-new-tokens (Dr. GRPO, arXiv 2503.20783, with --scale none).
  3. --clip-high 0.28: room for unlikely tokens to rise; --zero-spread resample: groups whose rewards are all equal, which teach nothing, are
     replaced by other prompts'; --mask-truncated: answers cut off do not count; --overlong-cache N: of an answer, the last N tokens
     before the limit cost up to 1 (all DAPO).
  4. --kl-coef 0: no KL and no reference in memory (DAPO, Dr. GRPO). --reference-every N: the reference becomes the policy every N batches
     (iterative GRPO, Algorithm 1; DeepSeek-R1: 400 updates). Its refreshing of the reward model, with 10% of old rows, is a round of
     sampling and reward_model.py.
  5. --step-separator: process supervision (4.1.3): every reward also scores the answer as it stands at the end of each step; step rewards are
     normalised over the whole group, and a token's advantage is the sum of those from its step on.
  6. Several rewards add up by weight: --match (against a column `answer`), --format-weight, --reward-model, --judge, --rule. None of them
     ever sees what stands between <think> and </think>, but the format, which looks at the tags alone; where thinking has not ended, the
     answer is empty. (DeepSeek-V2, arXiv 2405.04434: rules first, then helpful, safety and rule rewards, of unpublished weights.)
  7. --eval-samples, --thinking-budgets: accuracy against votes and against thinking tokens, the two axes of OpenAI's o1 post.
  8. Sampled and scored distributions are the same one: temperature and nucleus are part of every log-probability.

Reads prompts (column prompt, or question; instructions such as "put the answer in \\boxed{}" are the data's; a column chat_template_kwargs,
say {"enable_thinking": false}, goes to the template), other columns for the rewards, and a policy. Writes the policy, args.json,
metrics.jsonl, curves.png and, with --match or --rule, what the last evaluation found, report.json and test_time.png, to --output-dir.

  python grpo.py --model runs/sft --dataset data/grid/reasoning.jsonl --rule gridworld.py:walk_score --batch-size 16 --max-new-tokens 96 \\
    --learning-rate 1e-4                                                                                           the grid world
  python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k:main --match number                     one GPU
  torchrun --nproc-per-node 8 grpo.py --model Qwen/Qwen2.5-7B-Instruct --gradient-checkpointing --dataset openai/gsm8k:main --match number  many

  Metric                                   at step 1  then                 if not
  reward                                   -          rises                flat: see the next line; raise --learning-rate; look at the samples
  frac_reward_zero_std                     -          below 0.5            near 1: prompts too hard or too easy for any group to differ;
                                                                           --zero-spread resample
  reward_std                               -          falls slowly         0: the same
  kl                                       0          rises, levels off    beyond 0.1 a token or so: raise --kl-coef, lower --learning-rate
  entropy                                  -          falls slowly         to 0: collapsed; raise --clip-high or --kl-coef
  completions/mean_length                  -          rises if it pays     runs into --max-new-tokens: see the next line, --overlong-cache
  completions/clipped_ratio                -          falls to 0           rises, or near 1 at once: raise --max-new-tokens (a model that thinks
                                                                           needs thousands)
  clip_ratio/region_mean                   0          0.001 to 0.05        above 0.2: lower --learning-rate or --num-iterations (one update a
                                                                           batch: 0)
  sampling/sampling_logp_difference/mean   ~0         ~0                   above 0.05: sampler and trainer disagree: --dtype float32
  grad_norm                                -          -                    spikes: lower --learning-rate
"""

import sys
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import tyro


@dataclass
class Args:
    # --- required
    model: str
    """policy to start from: hub id or directory"""
    dataset: str
    """prompts: hub id (name or name:config), .jsonl/.json/.parquet file (also .gz), or saved directory"""
    # --- method
    num_generations: int = 8
    """G, answers to each prompt (DeepSeekMath: 64; DeepSeek-R1 and DAPO: 16)"""
    kl_coef: float = 0.04
    """beta, weight of the KL to the reference (DeepSeekMath: 0.04; R1: 0.001; 0: none, and no reference in memory)"""
    clip_low: float = 0.2
    """epsilon below 1 for the ratio"""
    clip_high: float = 0.2
    """epsilon above 1 (DAPO: 0.28)"""
    scale: Literal["sample", "population", "none"] = "sample"
    """what a group's centred rewards are divided by: its standard deviation, of either kind, or nothing (Dr. GRPO)"""
    normalise: Literal["response", "token", "constant"] = "response"
    """mean over each answer's tokens, then over answers (GRPO); over all tokens (DAPO); sum over tokens by --max-new-tokens (Dr. GRPO)"""
    num_iterations: int = 1
    """mu, passes over each batch of answers (DeepSeekMath: 1)"""
    num_minibatches: int = 1
    """optimiser steps per pass (DAPO and R1: 16); each takes whole groups"""
    zero_spread: Literal["keep", "skip", "resample"] = "keep"
    """groups with all rewards equal: keep (only their KL acts), skip, or replace by other random prompts', up to 4 times, then skip (DAPO)"""
    mask_truncated: bool = False
    """answers cut off at --max-new-tokens do not enter the loss (DAPO's overlong filtering)"""
    overlong_cache: int = 0
    """last tokens before --max-new-tokens over which an answer's reward loses up to 1 (DAPO: 4096 of 20480; 0: none)"""
    reference_every: int = 0
    """batches after which the reference becomes the policy as it is then (DeepSeek-R1: every 400 updates, 25 batches of 16; 0: never)"""
    max_kl: float = 0.0
    """stop, with what has been learnt, when the KL per token exceeds this (0: never)"""
    # --- rewards
    match: str = ""
    """1 for the right answer by the column `answer`, as a number or else as text: number (the last), boxed, hash (####), or an expression"""
    match_weight: float = 1.0
    """weight of --match"""
    format_weight: float = 0.0
    """weight of 1 for <think>...</think>, not empty and once, followed by an answer"""
    reward_model: tuple[str, ...] = ()
    """reward models; their weighted scores add up"""
    reward_weights: tuple[float, ...] = ()
    """one weight for each reward model (empty: 1 each)"""
    condition: str = ""
    """JSON file {kind: system prompt} that the reward models see before prompts of that kind"""
    rule: str = ""
    """file.py:name of a function (prompts, completions, **columns) -> list of rewards, None where it does not apply; 1 or more counts as right"""
    rule_weight: float = 1.0
    """weight of --rule"""
    judge: str = ""
    """causal language model that grades the answers: hub id or directory"""
    rubric: str = ""
    """JSON {"question": text, "options": {"A": text, ...}, "reward": {kind: {"A": number, ...}}}; with the question alone, a score of 1 to 10"""
    judge_weight: float = 1.0
    """weight of --judge"""
    step_separator: str = ""
    """process supervision: text that ends a step of an answer, e.g. a line break in bash $'\\n' (empty: one reward for the whole answer)"""
    # --- model
    reference: str = ""
    """what the KL is measured to (empty: --model)"""
    # --- data
    dataset_split: str = "train"
    """split, for hub data sets and saved directories"""
    eval_dataset: str = ""
    """held-out prompts; empty: a part of --dataset"""
    eval_split: str = "test"
    """split of --eval-dataset, for hub data sets and saved directories"""
    eval_fraction: float = 0.02
    """share of --dataset held out when there is no --eval-dataset (0: no evaluation)"""
    max_length: int = 2048
    """tokens of prompt and answer; prompts that leave no room for --max-new-tokens are dropped"""
    allow_special: bool = False
    """keep rows whose text contains one of the tokenizer's special tokens (else dropped: a user must not be able to end a turn)"""
    # --- sampling
    max_new_tokens: int = 256
    """tokens of an answer, its thinking included (DeepSeekMath: 1024)"""
    sample_tokens: int = 65536
    """memory knob of sampling: tokens in the key-value cache, by rank; changes the result by rounding only"""
    temperature: float = 1.0
    """of sampling and of every log-probability"""
    top_p: float = 1.0
    """nucleus of sampling and of every log-probability"""
    # --- optimisation
    epochs: int = 1
    """passes over the prompts"""
    max_steps: int = 0
    """stop after this many batches of prompts (0: only by epochs)"""
    batch_size: int = 32
    """prompts per batch, over all ranks (DeepSeekMath: 16 x 64 answers; R1: 512 x 16 in 16 minibatches)"""
    tokens_per_forward: int = 16384
    """memory knob: tokens per forward pass and rank (a longer row goes alone); changes the result by rounding only"""
    learning_rate: float = 1e-6
    """peak of AdamW's learning rate (DeepSeekMath: 1e-6; R1: 3e-6; small models want more)"""
    lr_schedule: Literal["cosine", "linear", "constant"] = "constant"
    """after the warm-up: cosine to a tenth, linear to 0, or constant"""
    warmup_ratio: float = 0.03
    """share of the steps over which the learning rate rises"""
    weight_decay: float = 0.0
    """of matrices; vectors (norms, biases) have none"""
    max_grad_norm: float = 1.0
    """gradient clipping, on the norm over all parameters"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the computation; weights and optimiser are float32 (auto: bfloat16 on GPU, float32 on CPU)"""
    gradient_checkpointing: bool = False
    """recompute each layer's activations in the backward pass: less memory, a third more time"""
    # --- run
    output_dir: str = "runs/grpo"
    """where checkpoint, metrics, report and curves go"""
    seed: int = 0
    """of prompt order, sampling and minibatches"""
    eval_every: int = 0
    """batches between evaluations (0: at the end only)"""
    eval_samples: int = 8
    """answers to each held-out prompt, for pass@k and majority@k"""
    thinking_budgets: tuple[int, ...] = ()
    """in the last evaluation, also accuracy when thinking is cut off after so many tokens, for each of these"""
    show_every: int = 10
    """batches between printed samples (0: never)"""
    save_every: int = 0
    """batches between resumable checkpoints, checkpoint-N/, all of which are kept (0: none)"""
    resume: bool = False
    """continue from the last checkpoint in --output-dir; a finished run of the same arguments is left as it is"""
    overwrite: bool = False
    """replace what is in --output-dir"""
    track: bool = False
    """also log to Weights & Biases (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "grpo"
    """project of --track"""
    run_name: str = ""
    """name of the run of --track (empty: the output directory)"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)  # before the heavy imports, so that --help answers at once

import bisect
import glob
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import time
import traceback
import types
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate, groupby
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from jinja2 import TemplateError
from torch.distributed.checkpoint import state_dict as dcp
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

for library in (transformers.utils.logging, datasets.utils.logging):  # their bars and warnings would break up our own lines
    library.disable_progress_bar()
    library.set_verbosity_error()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STOP = dict(signal=0, agreed=False)  # the signal that asked this process to stop; whether all ranks know

# ---------------------------------------------------------------------------------------------------------------- the method


def group_advantages(rewards, scale: str = "sample", epsilon: float = 1e-4):
    """A_i of outcome supervision: a reward less its group's mean, by the group's standard deviation. rewards [P, G]: a row each prompt."""
    centred = rewards - rewards[:, :1]  # first less one of them: equal rewards become exact zeros; their mean may be off by rounding
    centred = centred - centred.mean(1, keepdim=True)
    if scale == "none":
        return centred  # Dr. GRPO: hard and easy prompts weigh as their rewards spread
    return centred / (rewards.std(1, correction=int(scale == "sample"), keepdim=True) + epsilon)


def step_advantages(rewards: list, scale: str = "sample", epsilon: float = 1e-4) -> list:
    """A_i of process supervision (DeepSeekMath 4.1.3), for one group. rewards: for each answer a tensor [steps].

    All step rewards of the group are normalised together; a step's advantage is the sum of its own and all later ones of its answer."""
    every = group_advantages(torch.cat(rewards)[None], scale, epsilon)[0]
    return [part.flip(0).cumsum(0).flip(0) for part in every.split([len(r) for r in rewards])]


def clipped_objective(logps, old_logps, advantages, clip_low: float, clip_high: float):
    """min( rho A, clip(rho, 1 - clip_low, 1 + clip_high) A ), eq. 3 without its KL, per token; any shape."""
    ratio = (logps - old_logps).exp()  # rho = pi / pi_old
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_estimate(logps, ref_logps):
    """KL_t, eq. 4 (k3), per token; any shape. Never negative, and unbiased as long as the tokens are pi's own: in a batch's first update."""
    log_ratio = ref_logps - logps  # log( pi_ref / pi )
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(logps, old_logps, ref_logps, advantages, weights, args):
    """Eq. 3, negated: the sum over tokens by their weights, which add up to the mean that --normalise asks for. All [N]; ref_logps or None."""
    objective = clipped_objective(logps, old_logps, advantages, args.clip_low, args.clip_high)
    if ref_logps is not None:
        objective = objective - args.kl_coef * kl_estimate(logps, ref_logps)
    return -(objective * weights).sum()


def answer_weights(lengths, counted, normalise: str, longest: int):
    """The weight of each token of each answer of an update. lengths, counted [answers]: tokens, and whether it counts, 1.0 or 0.0.

    With A answers that count, response: 1 / (A |o_i|), GRPO eq. 3; token: 1 / all their tokens (DAPO eq. 12, there over one prompt's group,
    here as in its code over the update's); constant: 1 / (A longest), Dr. GRPO."""
    answers, tokens = counted.sum().clamp(min=1), (lengths * counted).sum().clamp(min=1)
    if normalise == "response":
        return counted / (answers * lengths.clamp(min=1))
    return counted / tokens if normalise == "token" else counted / (answers * longest)


def overlong_penalty(lengths, longest: int, cache: int):
    """DAPO eq. 13: 0 up to longest - cache tokens, then falling to -1 at the longest. Any shape."""
    return ((longest - cache - lengths) / cache).clamp(-1, 0)


def pass_at_k(correct: int, n: int, k: int) -> float:
    """The chance that one of k answers drawn from n, of which so many are correct, is correct (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(votes: list, right: list, k: int) -> float:
    """How often the most frequent of k votes is right, over the n // k disjoint parts of n answers; a tie counts as its share of right ones.

    votes: what each answer says, None for nothing; right: whether that is right."""
    shares = []
    for i in range(0, len(votes) - k + 1, k):
        said = Counter(vote for vote in votes[i : i + k] if vote is not None)
        most = [vote for vote, count in said.items() if count == max(said.values())]
        good = {vote for vote, r in zip(votes[i : i + k], right[i : i + k]) if r}
        shares.append(sum(vote in good for vote in most) / max(1, len(most)))
    return sum(shares) / len(shares)


# ------------------------------------------------------------------------------------------------------- verifiable answers


def found_answer(text: str, how: str) -> str | None:
    """What a text gives as its answer: its last number, its last \\\\boxed{}, what follows its last ####, or the last match of an expression
    (its first group, if it has one); None where there is no such thing."""
    if how == "boxed":
        start = text.rfind("\\boxed{")
        depth, end = 1, start + len("\\boxed{")
        while start >= 0 and depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        return text[start + len("\\boxed{") : end - 1] if start >= 0 and not depth else None
    if how == "hash":
        return text.rpartition("####")[2].lstrip().partition("\n")[0] if "####" in text else None
    number = r"(?:(?<![\w)])[-−][$€£]?)?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
    expression = number if how == "number" else how
    matches = [m.group(1) if m.re.groups else m.group() for m in re.finditer(expression, text)]
    return matches[-1] if matches else None


def canonical(answer: str | None) -> str | None:
    """An answer in the form in which answers are compared: a number as an exact fraction, other text in lower case with single spaces."""
    if answer is None:
        return None
    text = " ".join(answer.replace("−", "-").split()).rstrip(" .").lower()
    number = re.sub(r"^(-?)\\?[$€£]|(?<=\d)[, ](?=\d{3}(?!\d))|(?<!\d) | (?!\d)|\\?%$", r"\1", text)
    if re.fullmatch(r"[-+]?[\d./]+(e[-+]?\d{1,3})?", number):  # a policy may write any exponent, and the number would be as long
        try:
            return str(Fraction(number))
        except (ValueError, ZeroDivisionError):
            pass
    return text or None


def true_answer(column) -> str | None:
    """The answer that a data set's column holds: after ####, in \\boxed{}, or the whole of it."""
    text = str(column)
    how = "hash" if "####" in text else "boxed" if "\\boxed{" in text else ""
    return canonical(found_answer(text, how) if how else text)


def after_thinking(text: str) -> str:
    """What stands after the thinking, and before any that follows; nothing, where an answer begins with thinking that has not ended."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def well_formed(text: str) -> bool:
    """<think>...</think> once and not empty, then an answer."""
    return text.count("<think>") == text.count("</think>") == 1 and re.fullmatch(r"\s*<think>\s*\S.*</think>.*\S.*", text, re.DOTALL) is not None


def expected_score(probabilities):
    """The mean of the scores 1 to 10, scaled to [-1, 1] (Lee et al. 2023, direct RLAIF). probabilities [n, 10]; returns [n]."""
    return ((probabilities * torch.arange(1, 11, device=probabilities.device)).sum(-1) - 5.5) / 4.5


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


def report(option: str, tokenizer, rows: list, total: int, notes: Counter):
    """Print how many rows were kept, what was dropped and why, lengths, and one example whose trained tokens stand in double brackets."""
    prompts, answers = [len(row.prompt) for row in rows], [len(r) for row in rows for r in row.responses]
    quantiles = lambda values: "/".join(str(sorted(values)[int(q * (len(values) - 1))]) for q in (0.5, 0.95, 1))
    say(f"{option}: {len(rows)} rows from {total}; " + (", ".join(f"{n} {why}" for why, n in notes.items() if n) or "none dropped, none cut"))
    say(f"  tokens (median/95%/most): prompt {quantiles(prompts)}, response {quantiles(answers)}")
    shown, marks = tokenizer.decode(rows[0].prompt)[-200:], rows[0].trained[0] if rows[0].trained else [True] * len(rows[0].responses[0])
    for mark, part in groupby(zip(marks, rows[0].responses[0]), key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in part])
        shown += f"[[{text[:300]}]]" if mark else text[:100]
    say("  example: " + shown.replace("\n", "\n  | "))


class Drop(Exception):
    """A row that cannot be used; the message is the reason, under which it is counted."""


def prepare(option: str, data: Dataset, tokenizer, encode_row) -> list:
    """Rows for training, with a report of what they are. encode_row(row, notes) turns a row of data into a list of them."""
    rows, notes = [], Counter()
    for number, row in enumerate(tqdm(data, desc="tokenise", leave=False, disable=RANK > 0 or len(data) < 5000)):
        try:
            rows += encode_row(row, notes)
        except Drop as drop:
            notes[f"dropped: {drop}"] += 1
        except TemplateError as e:
            notes[f"dropped: refused by the chat template ({str(e)[:60]})"] += 1
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
            refuse(f"{option}, row {number}: not in a known format ({type(e).__name__}: {reason(e)}); see 'Reads' at the top of this script")
    if not rows:
        why = ", ".join(f"{n} {note}" for note, n in notes.items() if n)
        refuse(f"{option}: none of its {len(data)} rows can be used ({why}); its columns are {', '.join(data.column_names)}; see 'Reads' at the top")
    report(option, tokenizer, rows, len(data), notes)
    return rows


def template_options(row: dict) -> dict:
    """A row's own arguments for the chat template: its tools (a list, or JSON text) and chat_template_kwargs."""
    tools = row.get("tools")
    ours = ("chat_template", "tokenize", "return_dict", "return_tensors", "add_generation_prompt", "continue_final_message")  # no row's business
    options = {k: v for k, v in without_none(row.get("chat_template_kwargs") or {}).items() if k not in ours}
    return options | (dict(tools=json.loads(tools) if isinstance(tools, str) else without_none(tools)) if tools else {})


def questions(args, tokenizer, max_prompt: int):
    """The encode_row of prompts: extra holds the prompt as text or messages, and every column, for the rewards."""
    stops, special = stop_tokens(tokenizer), special_tokens(tokenizer).values()

    def encode_row(row, notes):
        prompt = row.get("prompt")
        prompt = [dict(role="user", content=row["question"])] if prompt is None and row.get("question") else prompt
        prompt = as_pair(prompt, row["chosen"], row["rejected"])[0] if "chosen" in row else prompt
        if not prompt:
            raise Drop("empty prompt")
        prompt = as_messages(prompt) if isinstance(prompt, list) else prompt
        options = template_options(row)
        if not args.allow_special and has_special(special, [prompt, options]):
            raise Drop("special token in the text (--allow-special keeps it)")
        # messages: up to where the assistant is to speak, as `generate` will be asked
        ids = encode(tokenizer, prompt, [" a"], stops)[0] if isinstance(prompt, str) else render(tokenizer, prompt, answer_next=True, **options)
        if len(ids) > max_prompt:
            raise Drop("prompt beyond --max-length less --max-new-tokens")
        return [Row(ids, [[]], None, dict(row, prompt=prompt, kind=row.get("kind") or ""))]

    return encode_row


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


# ------------------------------------------------------------------------------------------------------------------- rewards


SCORE_QUESTION = "Rate the last answer above from 1 (very bad) to 10 (very good). Reply with the number only."


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


def judge_probabilities(model, tokenizer, texts: list, options: list, args, device) -> torch.Tensor:
    """The judge's probabilities of replying with each option [B, K], renormalised over them."""
    return judge_logps(model, tokenizer, texts, options, args, device).softmax(-1)


def judge_scores(model, tokenizer, rubric: dict, args, device, rows: list, texts: list) -> torch.Tensor:
    """By rubric: sum of p(letter) x reward for the prompt's kind, NaN for kinds without one. Without options: the expected score. [B]"""
    texts, options = [without_special(tokenizer, text) for text in texts], rubric.get("options")
    talks = [conversation_text(row.extra["prompt"], text) for row, text in zip(rows, texts)]
    if not options:
        asked = [f"{talk}\n\n{rubric.get('question', SCORE_QUESTION)}" for talk in talks]
        return expected_score(judge_probabilities(model, tokenizer, asked, [str(i) for i in range(1, 11)], args, device))
    choices = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    asked = [f"{talk}\n\n{rubric['question']}\n{choices}" for talk in talks]
    table = [[rubric["reward"].get(row.extra["kind"], {}).get(letter, math.nan) for letter in options] for row in rows]
    probabilities = judge_probabilities(model, tokenizer, asked, list(options), args, device)
    return (probabilities * torch.tensor(table, device=device).view_as(probabilities)).sum(-1)


def rule_scores(rule, device, rows: list, texts: list) -> torch.Tensor:
    """A function's rewards [B], NaN where it returns None; it gets prompts, completions, and every other column as a list."""
    if not rows:
        return torch.zeros(0, device=device)
    columns = {
        k: [row.extra[k] for row in rows] for k in rows[0].extra if k not in ("prompt", "prompts", "completion", "completions", "chosen", "rejected")
    }
    prompts = [row.extra["prompt"] for row in rows]
    completions = [as_messages(text) if isinstance(prompt, list) else text for prompt, text in zip(prompts, texts)]
    try:
        rewards = rule(prompts=prompts, completions=completions, **columns)
    except Exception as e:  # the user's own code: say what it choked on
        where = traceback.extract_tb(e.__traceback__)[-1]
        print(file=sys.stderr)  # off the progress bar's line
        last = f"{Path(where.filename).name}, line {where.lineno}"
        refuse(f"--rule: {type(e).__name__}: {e} ({last}), on answers like {texts[0][-200:]!r}; it must return None for what it cannot judge")
    if not isinstance(rewards, (list, tuple)) or len(rewards) != len(rows):
        found = len(rewards) if isinstance(rewards, (list, tuple)) else f"a {type(rewards).__name__} instead of"
        print(file=sys.stderr)
        refuse(f"--rule: returned {found} rewards for {len(rows)} answers; it must return a list with one for each, None where it does not apply")
    for reward, text in zip(rewards, texts):
        try:
            good = reward is None or abs(float(reward)) < 1e18  # its square is a float32 too
        except (TypeError, ValueError):
            good = False
        if not good:
            print(file=sys.stderr)  # off the progress bar's line
            refuse(f"--rule: returned {reward!r} for {text[-200:]!r}; a reward must be a finite number, or None where the rule does not apply")
    return torch.tensor([math.nan if reward is None else float(reward) for reward in rewards], device=device)


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


def load_rule(name: str):
    """The function that file.py:name names."""
    path, _, function = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("user_rule", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and the like look their module up
        spec.loader.exec_module(module)
        return getattr(module, function)
    except (AttributeError, OSError, SyntaxError, ImportError) as e:
        refuse(f"--rule {name}: no such function can be loaded ({type(e).__name__}: {e}); it should read file.py:name")


def load_rewards(args, device, dtype) -> dict:
    """Every source of reward: name -> (weight, function of rows and answer texts that gives scores [B], NaN where it does not apply)."""
    conditions = load_conditions(args.condition)
    rewards, weights = {}, args.reward_weights or [1.0] * len(args.reward_model)
    for name, weight in zip(args.reward_model, weights):
        model, tokenizer = load_frozen(AutoModelForSequenceClassification, name, device, dtype, response_scores, num_labels=1)
        if not is_reward_model(name):
            refuse(f"--reward-model {name}: not a reward model (a sequence classifier with one label); make one with reward_model.py")
        key = name if Path(name).name in (*rewards, "rule", "judge", "match", "format") else Path(name).name
        rewards[key] = weight, partial(reward_scores, model, tokenizer, conditions, args, device)
    if args.rule:
        rewards["rule"] = args.rule_weight, partial(rule_scores, load_rule(args.rule), device)
    if args.judge:
        rubric = load_rubric(args.rubric) if args.rubric else {}
        judge = load_frozen(AutoModelForCausalLM, args.judge, device, dtype, token_logps)
        rewards["judge"] = args.judge_weight, partial(judge_scores, *judge, rubric, args, device)
    return rewards


def total_reward(rewards: dict, rows: list, texts: list):
    """The weighted sum [B] of all rewards, where one that does not apply adds nothing; and each by name."""
    named = {name: function(rows, texts) for name, (_, function) in rewards.items()}
    return sum(weight * named[name].nan_to_num(0.0) for name, (weight, _) in rewards.items()), named


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


def make_optimizer(model, learning_rate: float, weight_decay: float):
    """AdamW, decaying matrices only. Make it before the first forward, after which FSDP's root holds gathered weights in place of its own."""
    matrices, vectors = [[p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == wide] for wide in (True, False)]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=True)


def take_step(model, optimizer, learning_rate: float, max_grad_norm: float) -> float:
    """One step of AdamW on the gradients at hand, clipped; returns their norm."""
    if WORLD > 1 and not model.together:  # weights that FSDP does not hold: average the gradients here
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # experts that had no token on this rank
                dist.all_reduce(p.grad.div_(WORLD))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(getattr(norm, "full_tensor", lambda: norm)())
    if not math.isfinite(norm):  # the same on every rank
        print(file=sys.stderr)  # off the progress bar's line
        refuse(f"the norm of the gradients is {norm}, at a finite loss; lower the learning rate, or use --dtype float32")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def scheduled(args, step: int, steps: int) -> float:
    """The share of the peak learning rate at a step (counted from 0): linear warm-up, then cosine to a tenth, linear to 0, or constant."""
    warmup = max(1, round(args.warmup_ratio * steps))
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    after = dict(cosine=0.55 + 0.45 * math.cos(math.pi * done), linear=1 - done, constant=1.0)[args.lr_schedule]
    return min(1.0, (step + 1) / warmup) * after


@lru_cache(2)
def shuffled(n: int, epoch: int, seed: int) -> list:
    """The order of an epoch: a pure function of seed and epoch, so that a resumed run finds its place."""
    return random.Random(f"{seed}-{epoch}").sample(range(n), n)


def pick(n: int, size: int, step: int, seed: int) -> list:
    """The numbers of the rows of a step (counted from 0)."""
    epoch, at = divmod(step, math.ceil(n / size))
    return shuffled(n, epoch, seed)[at * size : (at + 1) * size]


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


def hold_out(rows: list, fraction: float, seed: int, by_prompt: bool = True) -> list:
    """Takes a random share of the prompts, with all their rows, out of the list and returns these; or of the rows, whatever their prompts."""
    keys = [tuple(row.prompt) if by_prompt else i for i, row in enumerate(rows)]
    every = list(dict.fromkeys(keys))
    held = {every[i] for i in random.Random(seed).sample(range(len(every)), min(len(every) - 1, round(fraction * len(every))))}
    out = [row for key, row in zip(keys, rows) if key in held]
    rows[:] = [row for key, row in zip(keys, rows) if key not in held]
    return out


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


def write_model(directory: Path, model, tokenizer, dtype):
    """A plain Hugging Face directory: config, safetensors, tokenizer with its template, generation_config with every stop token."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options) if dist.is_initialized() else model.state_dict()
    for tied in (model._tied_weights_keys or ()) if model.config.tie_word_embeddings else ():
        weights.pop(tied, None)
    if RANK == 0:
        config, before = model.config, (model.config.dtype, model.config._attn_implementation)
        config.dtype, config._attn_implementation = dtype, None
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
            generation.eos_token_id = sorted({*stop_tokens(tokenizer), *(i for i in known if i is not None and i < len(tokenizer))})
            generation.pad_token_id = tokenizer.pad_token_id if generation.pad_token_id is None else generation.pad_token_id
            generation.do_sample = True  # without it, a temperature or top-p that the parent stored would be refused
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        with writing(directory):
            model.save_pretrained(directory, state_dict=weights)
            tokenizer.save_pretrained(directory)
            saved = json.loads((directory / "config.json").read_text())  # where save_pretrained has written the dtype of the training
            (directory / "config.json").write_text(json.dumps(saved | dict(dtype=str(dtype).removeprefix("torch.")), indent=2) + "\n")
        config.dtype, config._attn_implementation = before


def catch_signals():
    """From now on SIGTERM and Ctrl-C let the step come to its end, save and stop; a second one ends the program at once."""

    def note(number, frame):
        STOP["signal"] = number
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT) if __name__ == "__main__" else ():  # imported, the script leaves them alone
        signal.signal(number, note)


def due(args, done: int, steps: int, device) -> bool:
    """Whether to save after so many steps of all: because of --save-every, or because a signal asks any rank to stop."""
    STOP["agreed"] = bool(over_ranks(torch.tensor(float(STOP["signal"] > 0), device=device)))
    return done < steps and (STOP["agreed"] or args.save_every > 0 and done % args.save_every == 0)


def save_checkpoint(out: Path, step: int, models: dict, optimizers: dict, **state):
    """checkpoint-N/: loadable models and the training state beside them, written elsewhere, synced, and then given its name.

    models: subdirectory ("" for the main one) -> (model, tokenizer); optimizers: by the same keys; state: numbers and lists."""
    part = out / f"saving-{step}"
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    for model, _ in models.values():
        getattr(model, "reshard", lambda: None)()  # a forward without a backward, as in an evaluation, leaves FSDP's root gathered
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)  # what a killed save left
    # an optimiser that has made no step has no state, and to be asked for it would make it take one
    moments = {k: dcp.get_optimizer_state_dict(models[k][0], o, options=options) for k, o in optimizers.items() if o.state}
    rng = [dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)]
    if WORLD > 1:
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, rng[0])
        rng = everyone
    for name, (model, tokenizer) in models.items():
        write_model(part / name, model, tokenizer, torch.float32)
    if RANK == 0:
        stored = {name: str(model.stored).removeprefix("torch.") for name, (model, _) in models.items()}  # for the final save; here all is float32
        with writing(part):
            torch.save(dict(state, step=step, optimizers=moments, rng=rng, stored=stored), part / "state.pt")
            for file in (*part.rglob("*"), part):  # directories hold the names, so they are synced too
                number = os.open(file, os.O_RDONLY)
                os.fsync(number)
                os.close(number)
            os.replace(part, out / f"checkpoint-{step}")
    if WORLD > 1:
        dist.barrier()
    if STOP["agreed"]:
        say(f"stopped after step {step}, as asked; the same command with --resume goes on")
        sys.exit(128 + (STOP["signal"] or signal.SIGTERM))


def load_checkpoint(directory: Path, models: dict, optimizers: dict) -> dict:
    """The training state of a checkpoint whose models are loaded already; cuts metrics.jsonl back to its step."""
    state = torch.load(directory / "state.pt", weights_only=True, mmap=True)
    for name, moments in state["optimizers"].items():
        dcp.set_optimizer_state_dict(models[name][0], optimizers[name], moments, options=dcp.StateDictOptions(full_state_dict=True))
    for name, stored in state["stored"].items():
        models[name][0].stored = getattr(torch, stored)
    rng = state["rng"][RANK % len(state["rng"])]
    torch.set_rng_state(rng["cpu"])
    if rng["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    if RANK == 0:
        log = directory.parent / "metrics.jsonl"
        lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        log.with_suffix(".part").write_text("".join(lines))
        os.replace(log.with_suffix(".part"), log)
    say(f"resuming {directory.parent} after step {state['step']}")
    return state


def finish(out: Path, models: dict, curves: list):
    """The models in their places, each file renamed into it whole; the picture; then args.json says that the run is finished."""
    part = out / "saving"
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)  # what a killed save left
    for name, (model, tokenizer) in models.items():
        write_model(part / name, model, tokenizer, model.stored)
    if RANK == 0:
        for name in sorted(models, reverse=True):  # subdirectories first
            (out / name).mkdir(exist_ok=True)
            written = [file for file in (part / name).iterdir() if file.is_file()]
            for file in written:
                os.replace(file, out / name / file.name)
            for stale in {*(out / name).glob("*.safetensors*")} - {out / name / file.name for file in written}:
                stale.unlink()
        shutil.rmtree(part)
        if curves:
            draw(out, curves)
        write_json(out / "args.json", json.loads((out / "args.json").read_text()) | dict(finished=True))


def refuse_unless_finite(loss, step: int, look_at: str):
    """A loss that is not a number ends the run."""
    if not torch.isfinite(loss):
        print(file=sys.stderr)  # off the progress bar's line
        refuse(f"step {step + 1}: the loss is {loss.item()}; lower the learning rate, or look at {look_at}")


def announce(models: list, source: str, device, dtype, work: str):
    """The run in two lines: what is trained, and how. A parameter takes 16 bytes: weight, gradient, two moments."""
    parameters = sum(p.numel() for model in models for p in model.parameters())
    say(f"model: {type(models[0]).__name__} from {source}, {parameters / 1e6:.2f} M parameters, {16 * parameters >> 20} MB with AdamW over all ranks")
    say(f"training: {work}, on {WORLD} x {device.type} in {dtype}".replace("torch.", ""))


def log(args, out: Path, metrics: dict):
    """One flushed line of metrics.jsonl, and wandb."""
    if RANK == 0:
        with writing(out / "metrics.jsonl"), (out / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(metrics) + "\n")
        if args.track:
            import wandb

            if wandb.run is None:
                wandb.init(project=args.wandb_project, name=args.run_name or args.output_dir, config=asdict(args), dir=str(out))
            wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])


def peak_memory(device) -> int:
    """Peak memory of this process in MB: the device's, or on CPU the resident set."""
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) >> 20


def draw(out: Path, keys: list):
    """curves.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    figure, axes = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys):
        for name, style in ((key, "-"), (f"eval_{key}", "o")):
            points = [(m["step"], m[name]) for m in lines if m.get(name) is not None]
            if points:
                axis.plot(*zip(*points), style, label=name)
        axis.set(title=key, xlabel="step")
        axis.legend()
    figure.savefig(out / "curves.part.png", dpi=120)
    os.replace(out / "curves.part.png", out / "curves.png")
    plt.close(figure)


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


def response_logps(model, rows: list, kept: list, args, device):
    """Log-probabilities and entropies of the answers' tokens, by row, under the distribution that was sampled from."""
    logps, entropies = [None] * len(rows), [None] * len(rows)
    for group, forwards, target in packed(rows, args.tokens_per_forward, device, model.together):
        parts = model.token_logps(forwards, target, args.temperature, nuclei(kept, group))
        lengths = [sum(map(len, rows[i].responses)) for i in group] or [len(target)]
        for i, logp, entropy in zip(group, parts[0].split(lengths), parts[1].split(lengths)):
            logps[i], entropies[i] = logp, entropy
    return logps, entropies


def nuclei(kept: list, numbers: list):
    """The kept ids of every token of these rows, one after the other, or None where sampling kept everything."""
    return [ids for i in numbers for ids in kept[i]] if numbers and kept[numbers[0]] is not None else None


def minibatches(n: int, passes: int, parts: int, step: int, seed: int):
    """The places, of n, of each update: every pass over the batch in an order of its own, cut into parts of nearly equal size."""
    parts = max(1, min(parts, n))  # none is empty
    for i in range(passes):
        order = shuffled(n, step * passes + i, seed)
        cuts = [round(k * n / parts) for k in range(parts + 1)]
        yield from (order[a:b] for a, b in zip(cuts, cuts[1:]))


def show(rows: list, texts: list, named: dict, count: int = 3):
    """A small table of samples and their rewards."""
    for i in range(min(count, len(rows))):
        prompt = rows[i].extra["prompt"]
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        rewards = ", ".join(f"{k} {float(v[i]):+.2f}" for k, v in named.items() if not math.isnan(v[i]))
        text = texts[i] if len(texts[i]) <= 140 else f"{texts[i][:60]} ... {texts[i][-80:]}"
        tqdm.write(f"  {prompt[-60:]!r} -> {text!r}   {rewards}")


# --------------------------------------------------------------------------------------------------- this script's own plumbing


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


def match_scores(how: str, device, rows: list, texts: list) -> torch.Tensor:
    """1 for the answer that the column `answer` holds, else 0 [B]; NaN where it holds none."""
    true = [None if row.extra.get("answer") is None else true_answer(row.extra["answer"]) for row in rows]
    return torch.tensor([math.nan if t is None else float(canonical(found_answer(x, how)) == t) for t, x in zip(true, texts)], device=device)


def all_rewards(rewards: dict, args, rows: list, texts: list, device):
    """The weighted sum [B] of all rewards, and each by name. Only the format is judged with the thinking; all else reads what comes after."""
    answers = []
    for row, text in zip(rows, texts):
        prompt, answer = row.extra["prompt"], after_thinking(text).rstrip()
        goes_on = isinstance(prompt, str) or prompt[-1]["role"] == "assistant"  # then the space before its first word is part of it
        answers.append(answer if goes_on else answer.lstrip())
    named = total_reward(rewards, rows, answers)[1] if rewards else {}
    weights = {name: weight for name, (weight, _) in rewards.items()}
    if args.format_weight:
        named["format"], weights["format"] = torch.tensor([float(well_formed(text)) for text in texts], device=device), args.format_weight
    return sum(weights[name] * x.nan_to_num(0.0) for name, x in named.items()), named


def cut_into_steps(tokenizer, row: Row, ids: list, stops: list, separator: str):
    """The texts of an answer as it stands at the end of each step, its thinking being part of the first; and the tokens of each step."""
    write = lambda n: as_written(tokenizer, [row], [ids[:n]], stops)[0]
    whole = write(len(ids))
    ends = [m.end() for m in re.finditer(f"(?:{re.escape(separator)})+", whole) if after_thinking(whole[: m.end()]).strip()]
    ends = [end for end in ends if whole[end:].strip()] + [len(whole)]
    body = ids[:-1] if ids and ids[-1] in stops else ids  # the stop token is not in the text
    sizes = list(accumulate(map(len, tokenizer.batch_decode([[token] for token in body]))))  # of most tokenizers' texts, token by token
    if sizes[-1:] != [len(whole)]:  # characters of several tokens, a tag opened by the template: decode every beginning
        sizes = [len(write(n)) for n in range(1, len(body) + 1)]
    cuts = [bisect.bisect_left(sizes, end) + 1 for end in ends[:-1]] + [len(ids)]
    return [whole[:end] for end in ends], [b - a for a, b in zip([0, *cuts], cuts)]


def process_advantages(rewards: dict, tokenizer, rows: list, stops: list, args, device) -> list:
    """Process supervision: for each row, which is a group, the advantages of its tokens [T], answer after answer.

    The steps of all groups are scored at once: ranks may have unequally many groups, and must call a sharded reward model equally often."""
    groups = [[cut_into_steps(tokenizer, row, ids, stops, args.step_separator) for ids in row.responses] for row in rows]
    counts = [[len(texts) for texts, _ in steps] for steps in groups]
    asked = [row for row, own in zip(rows, counts) for _ in range(sum(own))]
    total, _ = all_rewards(rewards, args, asked, [text for steps in groups for texts, _ in steps for text in texts], device)
    advantages = []
    for steps, own, scores in zip(groups, counts, total.split(list(map(sum, counts)))):
        by_step = torch.cat(step_advantages(list(scores.split(own)), args.scale))
        advantages.append(by_step.repeat_interleave(torch.tensor([n for _, lengths in steps for n in lengths], device=device)))
    return advantages


def fitting(row: Row, answers: list, limit: int) -> list:
    """Some answers of a group, in lists that fit one forward of so many tokens with their prompt (a longer answer goes alone)."""
    lists, size = [], 0
    for k in answers:
        if not lists or size + len(row.responses[k]) > limit:
            lists.append([])
            size = len(row.prompt)
        lists[-1].append(k)
        size += len(row.responses[k])
    return lists


def thinking_length(tokenizer, text: str, tokens: int) -> int:
    """About how many of an answer's tokens are thinking."""
    return max(0, tokens - len(tokenizer(after_thinking(text), add_special_tokens=False).input_ids)) if "<think>" in text else 0


def correctness(args, named: dict):
    """Which answers are right, 1 or 0, NaN where nothing says so: by --match, else by --rule (1 or more is right); None if there is neither."""
    scores = named.get("match" if args.match else "rule")
    return None if scores is None else torch.where(scores.isnan(), scores, (scores >= 1).float())


@torch.no_grad()
def evaluate_answers(policy, rewards: dict, held_out: list, tokenizer, stops: list, args, device) -> dict:
    """Reward and length of --eval-samples answers to each held-out prompt; pass@k and majority@k for the powers of 2 up to so many."""
    n, places = args.eval_samples, range(RANK, len(held_out), WORLD)
    asked, ks = [held_out[p] for p in places], [2**i for i in range(n.bit_length())]
    numbers = uniform_numbers(args.seed, -1, [p * n + k for p in places for k in range(n)], args.max_new_tokens)
    tokens, *_ = sample_answers(policy, asked, numbers, stops, args.sample_tokens, args.temperature, args.top_p)
    answered = [row for row in asked for _ in range(n)]
    texts = as_written(tokenizer, answered, tokens, stops)
    total, named = all_rewards(rewards, args, answered, texts, device)
    right = correctness(args, named)
    lengths = [[len(ids), thinking_length(tokenizer, text, len(ids))] for ids, text in zip(tokens, texts)]
    sums = torch.cat([total.sum()[None], torch.tensor(lengths or [[0.0, 0.0]], device=device).sum(0)])
    reward, length, thinking = (over_ranks(sums) / (len(held_out) * n)).tolist()
    metrics = {"eval_reward": reward, "eval_completions/mean_length": length, "eval_completions/mean_thinking_length": thinking}
    if right is None:
        return metrics
    counts = torch.zeros(1 + 2 * len(ks), device=device)
    for i in range(len(asked)):
        own = right[i * n : (i + 1) * n].tolist()
        if not any(map(math.isnan, own)):
            votes = [canonical(found_answer(t, args.match) if args.match else t) for t in map(after_thinking, texts[i * n : (i + 1) * n])]
            found = [pass_at_k(int(sum(own)), n, k) for k in ks] + [majority_at_k(votes, own, k) for k in ks]
            counts += torch.tensor([1.0, *found], device=device)
    count, *shares = over_ranks(counts).tolist()
    names = [f"eval_pass@{k}" for k in ks] + [f"eval_majority@{k}" for k in ks]
    return metrics | {name: share / count for name, share in zip(names, shares) if count}


@torch.no_grad()
def accuracy_by_budget(policy, rewards: dict, held_out: list, tokenizer, stops: list, args, device) -> dict:
    """Accuracy on held-out prompts when thinking is closed after so many tokens, if it has not ended by then, for each --thinking-budgets."""
    places, accuracies = range(RANK, len(held_out), WORLD), {}
    if not args.thinking_budgets:
        return accuracies
    asked = [held_out[p] for p in places]
    numbers = uniform_numbers(args.seed, -2, list(places), args.max_new_tokens)
    some = partial(sample_answers, policy, stops=stops, limit=args.sample_tokens, temperature=args.temperature, top_p=args.top_p)
    whole = some(asked, numbers)[0]
    for budget in args.thinking_budgets:
        begun = [ids[:budget] for ids in whole]
        texts = as_written(tokenizer, asked, begun, stops)
        cut = [i for i, text in enumerate(texts) if "</think>" not in text and ("<think>" in text or not budget) and len(whole[i]) > budget]
        for i in cut:
            close = "</think>" if texts[i].endswith("<think>") else " </think>" if "<think>" in texts[i] else "<think> </think>"
            begun[i] = begun[i] + tokenizer(close, add_special_tokens=False).input_ids
        ends = some([asked[i]._replace(prompt=asked[i].prompt + begun[i]) for i in cut], numbers[cut, budget:])[0]
        begun = [begun[i] + ends[cut.index(i)] if i in cut else whole[i] for i in range(len(asked))]
        right = correctness(args, all_rewards(rewards, args, asked, as_written(tokenizer, asked, begun, stops), device)[1])
        counts = torch.stack([right.nan_to_num(0.0).sum(), (~right.isnan()).sum().float()])
        good, count = over_ranks(counts).tolist()
        accuracies[budget] = good / max(1.0, count)
    return accuracies


def draw_test_time(out: Path, metrics: dict, budgets: dict):
    """report.json and test_time.png: accuracy against votes and against thinking tokens."""
    shares = {kind: {int(k.partition("@")[2]): v for k, v in metrics.items() if k.startswith(f"eval_{kind}@")} for kind in ("pass", "majority")}
    if RANK > 0 or not shares["pass"]:
        return
    write_json(out / "report.json", dict(shares, thinking_budget=budgets))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(shares, "answers")] + ([({"accuracy": budgets}, "thinking tokens allowed")] if budgets else [])
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (lines, label) in zip(axes[0], panels):
        for name, points in lines.items():
            axis.plot(list(points), list(points.values()), "o-", label=name)
        axis.set(xlabel=label, ylabel="accuracy on held-out prompts")
        axis.legend()
    figure.savefig(out / "test_time.part.png", dpi=120)
    os.replace(out / "test_time.part.png", out / "test_time.png")
    plt.close(figure)


def check_grpo(args):
    """Contradictions, refused before anything is read."""
    if args.reward_weights and len(args.reward_weights) != len(args.reward_model):
        refuse(f"--reward-weights: {len(args.reward_weights)} weights for {len(args.reward_model)} reward models; give one for each")
    if not (args.reward_model or args.rule or args.judge or args.match or args.format_weight):
        refuse("nothing gives a reward: pass --match, --rule, --reward-model, --judge or --format-weight")
    if args.rubric and not args.judge:
        refuse("--rubric needs a --judge to apply it")
    if args.num_generations < 2:
        refuse("--num-generations 1: a group of one has no other answer to be compared with; use 2 or more")
    if args.max_new_tokens >= args.max_length:
        refuse(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in --max-length {args.max_length}; lower it")
    if args.overlong_cache > args.max_new_tokens:
        refuse(f"--overlong-cache {args.overlong_cache}: must be at most --max-new-tokens, {args.max_new_tokens}")
    if args.overlong_cache and args.step_separator:
        refuse("--overlong-cache is a reward of whole answers, --step-separator gives one to each step; use one of the two")
    budgets = args.thinking_budgets
    if budgets and (min(budgets) < 0 or max(budgets) >= args.max_new_tokens or not (args.match or args.rule)):
        refuse("--thinking-budgets: each must be from 0 to below --max-new-tokens, and --match or --rule must say which answers are right")
    if (args.reference or args.reference_every or args.max_kl) and not args.kl_coef:
        refuse("--kl-coef 0 has no reference, so that no KL is known; leave out --reference, --reference-every and --max-kl")
    if args.match and args.match not in ("number", "boxed", "hash"):
        try:
            re.compile(args.match)
        except re.error as e:
            refuse(f"--match {args.match}: must be number, boxed, hash or a regular expression; as one it fails ({e})")


def main(args: Args):
    # 0. ranks, output, seed
    check_grpo(args)
    device, dtype = start_ranks(args.dtype)
    reads = dict(model=args.model, reference=args.reference, dataset=args.dataset, eval_dataset=args.eval_dataset, condition=args.condition)
    reads |= dict(judge=args.judge, rubric=args.rubric, rule=args.rule.rpartition(":")[0])
    out, last, plan = begin(args, **reads, **{f"reward_model {i}": name for i, name in enumerate(args.reward_model)})
    started = time.time()
    torch.manual_seed(args.seed)

    # 1. policy, reference (none without a KL), what rewards the policy, and prompts
    source = str(last or args.model)
    tokenizer = load_tokenizer(source)
    policy = load_model(AutoModelForCausalLM, source, tokenizer, device, dtype)
    check_head(policy, source, device)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(dict(use_reentrant=False))
    policy = shard(policy, dtype, token_logps)
    stops = all_stops(policy, tokenizer)
    reference, its_tokenizer = None, tokenizer
    if args.kl_coef:
        refreshed = str(last / "reference") if last and (last / "reference").exists() else ""
        reference, its_tokenizer = load_frozen(AutoModelForCausalLM, refreshed or args.reference or args.model, device, dtype, token_logps)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        refuse(f"--reference {args.reference}: reads other tokens than --model, so that there is no KL between them")
    if args.reference_every and [p.shape for p in reference.parameters()] != [p.shape for p in policy.parameters()]:
        refuse(f"--reference-every: --reference {args.reference} is built otherwise than --model, and cannot become it")
    rewards = load_rewards(args, device, dtype)
    if args.match:
        rewards["match"] = args.match_weight, partial(match_scores, args.match, device)
    max_length = min(args.max_length, getattr(policy.config, "max_position_embeddings", args.max_length))
    tags = tokenizer("<think> </think>", add_special_tokens=False).input_ids if args.thinking_budgets else []  # they end a thought that is cut off
    encode_row = questions(args, tokenizer, max_length - args.max_new_tokens - len(tags))
    data = load_rows("--dataset", args.dataset, args.dataset_split)
    other = load_rows("--eval-dataset", args.eval_dataset, args.eval_split) if args.eval_dataset else data
    for option, name, columns in (("dataset", args.dataset, data.column_names), ("eval-dataset", args.eval_dataset, other.column_names)):
        if args.match and "answer" not in columns:
            refuse(f"--match: --{option} {name} has no column answer to compare with; it has {', '.join(columns)}")
    rows, held_out = prepare(f"--dataset {args.dataset}", data, tokenizer, encode_row), []
    if args.eval_dataset:
        held_out = prepare(f"--eval-dataset {args.eval_dataset}", other, tokenizer, encode_row)
    elif len(rows) > 1:
        held_out = hold_out(rows, args.eval_fraction, args.seed)
    steps = math.ceil(len(rows) / args.batch_size) * args.epochs
    steps = min(steps, args.max_steps or steps)
    G, updates = args.num_generations, args.num_iterations * args.num_minibatches
    work = f"{steps} batches of {args.batch_size} x {G} answers, {args.num_iterations} x {args.num_minibatches} updates each"
    announce([policy], args.model, device, dtype, work)
    sources = [*rewards, *["format"] * bool(args.format_weight)]
    say(f"rewards: {', '.join(sources)}; answers end at {' or '.join(tokenizer.convert_ids_to_tokens(stops))}")

    # 2. the optimiser, and where an earlier run stopped
    optimizer = make_optimizer(policy, args.learning_rate, args.weight_decay)
    models, optimizers = {"": (policy, tokenizer)} | ({"reference": (reference, tokenizer)} if args.reference_every else {}), {"": optimizer}
    state = dict(step=0, num_tokens=0, seconds=0.0)
    if last:
        state = load_checkpoint(last, models, optimizers)
    else:
        claim(args, out, plan)
    started -= state["seconds"]
    num_tokens = state["num_tokens"]

    # 3. for each batch of prompts
    catch_signals()
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc="grpo", disable=RANK > 0)
    for step in bar:
        clock = time.time()
        batch = pick(len(rows), args.batch_size, step, args.seed)
        B, places, groups = len(batch), range(RANK, len(batch), WORLD), {}  # prompts of all ranks; this rank's; its groups by place
        first_rewards, redrawn = None, 0
        for attempt in range(5 if args.zero_spread == "resample" else 1):
            # 4. G answers o ~ pi to each prompt, each with randomness of its own, and their rewards
            new = [place for place in places if place not in groups]
            asked = [rows[batch[place]] for place in new]
            slots = [(attempt * B + place) * G + k for place in new for k in range(G)]  # no two attempts share randomness
            numbers = uniform_numbers(args.seed, step, slots, args.max_new_tokens)
            tokens, sampled, kept = sample_answers(policy, asked, numbers, stops, args.sample_tokens, args.temperature, args.top_p)
            answered = [row for row in asked for _ in range(G)]
            texts = as_written(tokenizer, answered, tokens, stops)
            total, named = all_rewards(rewards, args, answered, texts, device)
            if args.overlong_cache:
                total = total + overlong_penalty(torch.tensor([len(ids) for ids in tokens], device=device), args.max_new_tokens, args.overlong_cache)
            for i, place in enumerate(new):
                own = slice(i * G, (i + 1) * G)
                groups[place] = dict(row=asked[i]._replace(responses=tokens[own]), texts=texts[own], rewards=total[own])
                groups[place] |= dict(named={name: x[own] for name, x in named.items()}, sampled=sampled[own], kept=kept[own])
            # 5. groups whose rewards are all equal say nothing: other prompts take their places
            every = torch.zeros(B, G, device=device)
            for place, group in groups.items():
                every[place] = group["rewards"]
            every = over_ranks(every)
            differ = (every.amax(1) > every.amin(1)).tolist()  # by place, on every rank
            first_rewards = every if first_rewards is None else first_rewards  # what is logged: of prompts as they came
            if all(differ) or attempt == 4 or args.zero_spread != "resample":
                break
            redrawn += B - sum(differ)
            other = random.Random(f"{args.seed}-{step}-{attempt}")
            batch = [i if differ[place] else other.randrange(len(rows)) for place, i in enumerate(batch)]
            groups = {place: group for place, group in groups.items() if differ[place]}
        groups = {place: groups[place] for place in places}
        # 6. advantages, by the group: one for all tokens of an answer, or by steps
        if args.step_separator:
            found = process_advantages(rewards, tokenizer, [group["row"] for group in groups.values()], stops, args, device)
            for group, flat in zip(groups.values(), found):
                group["advantages"] = flat.split([len(ids) for ids in group["row"].responses])
        else:
            for group in groups.values():
                group["advantages"] = group_advantages(group["rewards"][None], args.scale)[0]  # one number for each answer
        # 7. which answers count, and how long they are, over all ranks
        lengths, ended = torch.zeros(2, B * G, device=device)
        for place, group in groups.items():
            own = slice(place * G, (place + 1) * G)
            lengths[own] = torch.tensor([float(len(ids)) for ids in group["row"].responses], device=device)
            ended[own] = torch.tensor([float(ids[-1] in stops) for ids in group["row"].responses], device=device)
        lengths, ended = over_ranks(lengths), over_ranks(ended)
        counted = ended.clone() if args.mask_truncated else torch.ones_like(lengths)
        if args.zero_spread != "keep":
            counted *= torch.tensor(differ, device=device).repeat_interleave(G)
        # 8. these, in pieces of groups that fit a forward; log pi_old and log pi_ref of every token, before any update
        pieces, slots_of, advantages, drawn, nucleus = [], [], [], [], []  # by piece: its row, its places among the B G answers, its tokens' values
        for place, group in groups.items():
            row = group["row"]
            for ks in fitting(row, [k for k in range(G) if counted[place * G + k]], args.tokens_per_forward):
                pieces.append(row._replace(responses=[row.responses[k] for k in ks]))
                slots_of.append([place * G + k for k in ks])
                advantages.append(torch.cat([group["advantages"][k].expand(len(row.responses[k])) for k in ks]))
                drawn.append(torch.tensor([logp for k in ks for logp in group["sampled"][k]], device=device))
                nucleus.append(None if group["kept"][0] is None else [ids for k in ks for ids in group["kept"][k]])
        with torch.no_grad():  # with a single update, pi_old is pi
            old_logps = response_logps(policy, pieces, nucleus, args, device)[0] if updates > 1 else None
            ref_logps = response_logps(reference, pieces, nucleus, args, device)[0] if reference is not None else None
        # 9. several passes of minibatches over the same answers
        learning_rate = args.learning_rate * scheduled(args, step, steps)
        sums, worst, norms = torch.zeros(7, device=device), torch.zeros(1, device=device), []
        for minibatch in minibatches(B, args.num_iterations, args.num_minibatches, step, args.seed):
            slots = [place * G + k for place in minibatch for k in range(G)]
            weights = torch.zeros(B * G, device=device)
            weights[slots] = answer_weights(lengths[slots], counted[slots], args.normalise, args.max_new_tokens)
            if not weights.any():
                continue  # nothing to learn from, on any rank
            chosen = set(minibatch)
            part = [i for i, own in enumerate(slots_of) if own[0] // G in chosen]
            for group, forwards, target in packed([pieces[i] for i in part], args.tokens_per_forward, device, policy.together):
                group = [part[i] for i in group]
                logps, entropy, _ = policy.token_logps(forwards, target, args.temperature, nuclei(nucleus, group))
                if not group:  # a rank that has run out of groups goes along with weight zero
                    (logps.sum() * 0).backward()
                    continue
                # 10. the loss, eq. 3; FSDP averages over the ranks
                flat = lambda x: torch.cat([x[i] for i in group])
                old, ref = flat(old_logps) if old_logps else logps.detach(), flat(ref_logps) if ref_logps else None
                own = [slot for i in group for slot in slots_of[i]]
                by_token = weights[own].repeat_interleave(lengths[own].long())
                loss = grpo_loss(logps, old, ref, flat(advantages), by_token, args)
                refuse_unless_finite(loss, step, f"the rewards {every[own[0] // G].tolist()[:8]}")
                (loss * WORLD).backward()
                with torch.no_grad():
                    ratio, A, gap = (logps - old).exp(), flat(advantages), (old - flat(drawn)).abs()
                    low, high = (ratio < 1 - args.clip_low) & (A < 0), (ratio > 1 + args.clip_high) & (A > 0)
                    kl = kl_estimate(logps, ref) if ref is not None else torch.zeros_like(logps)
                    sums += torch.stack([loss / updates, *(x.sum() for x in (entropy, kl, low, high, low | high, gap))])
                    worst = torch.maximum(worst, gap.max())
            # 11. one step of AdamW
            norms.append(take_step(policy, optimizer, learning_rate, args.max_grad_norm))
        # 12. what happened
        loss, *seen = over_ranks(sums).tolist()
        entropy, kl, low, high, region, gap = (x / max(1.0, (lengths * counted).sum().item() * args.num_iterations) for x in seen)
        worst = over_ranks(worst, dist.ReduceOp.MAX).item()
        if step == 0 and reference is not None and not args.reference and updates == 1:
            assert kl < (1e-3 if dtype == torch.float32 else 0.05), f"KL {kl} to the reference before the first update: the two differ"
        tokens = lengths.sum().item() + sum(len(rows[i].prompt) for i in batch)
        num_tokens += tokens
        thinking = [thinking_length(tokenizer, t, len(ids)) for g in groups.values() for t, ids in zip(g["texts"], g["row"].responses)]
        metrics = {
            "step": step + 1, "loss": loss, "reward": first_rewards.mean().item(), "reward_std": first_rewards.std(1).mean().item(),
            "frac_reward_zero_std": (first_rewards.amax(1) == first_rewards.amin(1)).float().mean().item(), "resampled": redrawn / B,
            "entropy": entropy, "kl": kl, "num_tokens": num_tokens,
            "completions/mean_length": lengths.mean().item(), "completions/min_length": lengths.min().item(),
            "completions/max_length": lengths.max().item(), "completions/clipped_ratio": 1 - ended.mean().item(),
            "completions/mean_thinking_length": over_ranks(torch.tensor(float(sum(thinking)), device=device)).item() / (B * G),
            "clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": region,
            "sampling/sampling_logp_difference/mean": gap, "sampling/sampling_logp_difference/max": worst,
            "grad_norm": sum(norms) / max(1, len(norms)), "learning_rate": learning_rate,
            "epoch": (step + 1) / math.ceil(len(rows) / args.batch_size),
        }  # fmt: skip
        for name in sources:
            x = torch.cat([group["named"][name] for group in groups.values()]) if groups else torch.zeros(0, device=device)
            known = x[~x.isnan()]
            total, square, applies = over_ranks(
                torch.stack([known.sum(), known.square().sum(), torch.tensor(float(len(known)), device=device)])
            ).tolist()
            mean = total / max(1.0, applies)
            metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": math.sqrt(max(0.0, square / max(1.0, applies) - mean**2))}
        too_far = bool(args.max_kl and kl > args.max_kl)
        took = time.time() - clock
        if held_out and (too_far or step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0):
            metrics |= evaluate_answers(policy, rewards, held_out, tokenizer, stops, args, device)
        now = time.time()
        metrics |= dict(step_time=took, tokens_per_second=tokens / took, seconds=now - started, peak_memory_mb=peak_memory(device))
        log(args, out, metrics)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", length=f"{metrics['completions/mean_length']:.1f}", kl=f"{kl:.4f}", refresh=False)
        if step == state["step"] and RANK == 0:
            bar.write(f"memory: {metrics['peak_memory_mb']} MB at the peak of the first step")
        if args.show_every and step % args.show_every == 0 and RANK == 0:
            group = groups[0]
            show([group["row"]] * G, group["texts"], group["named"] | dict(total=group["rewards"]))
        # 13. iterative GRPO: the reference follows; a policy gone too far ends the run
        if args.reference_every and (step + 1) % args.reference_every == 0:
            for model in (reference, policy):
                getattr(model, "reshard", lambda: None)()  # forwards without a backward leave FSDP's root gathered
            with torch.no_grad():
                for theirs, ours in zip(reference.parameters(), policy.parameters()):
                    theirs.copy_(ours)
        if due(args, step + 1, steps, device) and not too_far:
            save_checkpoint(out, step + 1, models, optimizers, num_tokens=num_tokens, seconds=now - started)
        if too_far:
            say(f"stopped after step {step + 1}: the KL to the reference is {kl:.4f} a token, beyond --max-kl {args.max_kl}; it is saved as it is")
            break

    # 14. what more votes and more thinking are worth; a checkpoint that anything loads
    if held_out:
        draw_test_time(out, metrics, accuracy_by_budget(policy, rewards, held_out, tokenizer, stops, args, device))
    curves = ["reward", *["pass@1"] * ("eval_pass@1" in metrics), "kl", "entropy", "completions/mean_length", "completions/mean_thinking_length"]
    finish(out, {"": models[""]}, curves)
    if held_out:
        say("held out: " + ", ".join(f"{k[5:]} {v:.4g}" for k, v in metrics.items() if k.startswith("eval_")))
    say(f"done: {out} after {time.time() - started:.0f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(args)
