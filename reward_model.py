# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<=2.13.0", "transformers>=5.17", "datasets>=4", "tyro>=1.0", "wandb", "matplotlib", "tqdm"]
# ///
"""Reward model: learn from rankings which answer people prefer.

    loss(theta) = - 1/C(K,2)  E over prompts x  sum over pairs of its K answers  log sigmoid( r(x, y_w) - r(x, y_l) )
    InstructGPT (Ouyang et al. 2022, arXiv 2203.02155), eq. 1. All pairs of a prompt are one element: K answers, one pass each.

Departures and options
  1. --loss plackett-luce: the likelihood of the whole ranking (Starling, Zhu et al. 2024, which divides it by K - 1). --loss focal:
     easy pairs count less (InternLM2, arXiv 2403.17297, eq. 1); with --barrier 0.02, its log barrier (eq. 2) keeps scores from growing
     beyond (-5, 5).
  2. A column `probability` (that chosen is better) makes soft labels (Constitutional AI, Bai et al. 2022, arXiv 2212.08073); a column
     `margin` is taken off the gap (Llama 2, arXiv 2307.09288, eq. 2) with --use-margin.
  3. --score-l2 and --length-buckets: ChatGLM-RLHF's prior on scores and its balance of longer and shorter winners (arXiv 2404.00934).
  4. --condition FILE: a system prompt for each `kind` of row, seen by the reward model only (InternLM2's conditional reward model).
  5. The head starts at zero and has no bias; the score is read at the last token of the answer. After training, the mean score of the
     training answers (of at most 4096 prompts) is stored as score_shift in config.json and subtracted when these scripts load the model;
     other programs see all scores higher by that constant. InstructGPT takes the mean of the demonstrations.
  6. Ties say nothing and are left out; answers beyond --max-length are dropped, not cut: a cut answer has another worth.

Reads prompt + chosen + rejected, chosen + rejected with the prompt inside (text or messages, HH-RLHF too), or prompt + completions +
scores; optional columns kind, margin, probability. --model: an SFT checkpoint, or an earlier reward model to go on from.
Writes a directory that loads as AutoModelForSequenceClassification, args.json, metrics.jsonl, curves.png, report.json to --output-dir.

  python reward_model.py --learning-rate 1e-3                                       the grid world, after sft.py has made runs/sft
  python reward_model.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized            one GPU
  torchrun --nproc-per-node 8 reward_model.py --model Qwen/Qwen3-8B --gradient-checkpointing --dataset trl-lib/ultrafeedback_binarized  many

  Metric                  at step 1     then             if not
  loss                    ln 2 = 0.693  falls to         flat: learning rate too low, or labels are noise; far below 0.3: the pairs are told
                          (PL: ln K!)   0.4 to 0.65      apart by something trivial: see accuracy by length, correlation with length in the report
  accuracy                0 (all tied)  0.6 to 0.75 on   0.5: is chosen really the better column? 1.0: too easy, or a leak
                                        people's pairs
  margin                  0             rises            flat: as for the loss
  mean_reward             0             drifts freely    far from 0: harmless, the shift takes it off; --score-l2 or --barrier hold it
  min_reward, max_reward  0             spread grows     beyond +-10: overconfident; fewer epochs (InstructGPT: one)
  grad_norm               -             -                spikes: lower --learning-rate (InstructGPT: insensitive to it, very sensitive to epochs)
"""

import sys
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import tyro


@dataclass
class Args:
    # --- method
    loss: Literal["pairs", "plackett-luce", "focal"] = "pairs"
    """pairs: all C(K,2) pairs of a ranking (InstructGPT); plackett-luce: the whole ranking (Starling); focal: InternLM2"""
    barrier: float = 0.0
    """weight of the log barrier at +-5 (InternLM2: 0.02)"""
    score_l2: float = 0.0
    """weight of the squared scores (ChatGLM; its value is not published, 0.01 is a start)"""
    use_margin: bool = False
    """take the column `margin` off each pair's gap (Llama 2); with rankings, the difference of their scores"""
    length_buckets: tuple[int, ...] = ()
    """edges, in tokens of length difference, of buckets in which longer and shorter winners are balanced (ChatGLM); e.g. 4 10"""
    condition: str = ""
    """JSON file {kind: system prompt}; put before the prompts of that kind (InternLM2)"""
    # --- model
    model: str = "runs/sft"
    """SFT checkpoint, or an earlier reward model: hub id or directory"""
    # --- data
    dataset: str = "data/grid/rankings.jsonl"
    """hub id (name or name:config), .jsonl/.json/.parquet file (also .gz), or saved directory"""
    dataset_split: str = "train"
    """split, for hub data sets and saved directories"""
    eval_dataset: str = ""
    """held-out data set; empty: a part of --dataset"""
    eval_split: str = "test"
    """split of --eval-dataset, for hub data sets and saved directories"""
    eval_fraction: float = 0.05
    """share of --dataset held out when there is no --eval-dataset (0: no evaluation)"""
    max_length: int = 1024
    """tokens of prompt and answer; longer answers are dropped"""
    allow_special: bool = False
    """keep rows whose text contains one of the tokenizer's special tokens (else dropped: a user must not be able to end a turn)"""
    # --- optimisation
    epochs: int = 1
    """passes over the data (InstructGPT: 1; more overfits)"""
    max_steps: int = 0
    """stop after this many optimiser steps (0: only by epochs)"""
    batch_size: int = 64
    """prompts per optimiser step, over all ranks (InstructGPT: 64, with up to 36 pairs each)"""
    tokens_per_forward: int = 16384
    """memory knob: tokens per forward pass and rank (a longer row goes alone); changes the result by rounding only"""
    learning_rate: float = 9e-6
    """peak of AdamW's learning rate (InstructGPT 6B: 9e-6; small models want more)"""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
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
    output_dir: str = "runs/reward_model"
    """where checkpoint, metrics, report and curves go"""
    seed: int = 0
    """of data order and of length balancing"""
    eval_every: int = 0
    """optimiser steps between evaluations (0: at the end only)"""
    save_every: int = 0
    """optimiser steps between resumable checkpoints, checkpoint-N/, all of which are kept (0: none)"""
    resume: bool = False
    """continue from the last checkpoint in --output-dir; a finished run of the same arguments is left as it is"""
    overwrite: bool = False
    """replace what is in --output-dir"""
    track: bool = False
    """also log to Weights & Biases (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "reward_model"
    """project of --track"""
    run_name: str = ""
    """name of the run of --track (empty: the output directory)"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)  # before the heavy imports, so that --help answers at once

import glob
import gzip
import hashlib
import inspect
import json
import math
import os
import random
import resource
import shutil
import signal
import time
import types
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from itertools import groupby
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
from transformers import AttentionInterface, AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

for library in (transformers.utils.logging, datasets.utils.logging):  # their bars and warnings would break up our own lines
    library.disable_progress_bar()
    library.set_verbosity_error()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STOP = dict(signal=0, agreed=False)  # the signal that asked this process to stop; whether all ranks know

# ---------------------------------------------------------------------------------------------------------------- the method


def pair_loss(better, worse, margin=0.0):
    """Bradley-Terry, InstructGPT eq. 1 (margin: Llama 2 eq. 2). Scores of the two answers of each pair [P]; returns [P]."""
    objective = F.logsigmoid(better - worse - margin)
    return -objective


def soft_pair_loss(a, b, p):
    """Cross-entropy against the probability p that a is better (Constitutional AI, section 4). Scores [P], p [P]; returns [P]."""
    objective = p * F.logsigmoid(a - b) + (1 - p) * F.logsigmoid(b - a)
    return -objective


def focal_pair_loss(better, worse, gamma: float = 2.0):
    """Focal ranking loss, InternLM2 eq. 1: a pair ranked rightly counts less, the surer the less. Scores [P]; returns [P]."""
    p = torch.sigmoid(better - worse)
    objective = (1 - 2 * (p - 0.5).clamp(min=0)) ** gamma * F.logsigmoid(better - worse)
    return -objective


def plackett_luce_loss(scores, ranks):
    """Negative log-likelihood of a ranking (Plackett-Luce; Starling): the best is chosen from all, the next from the rest, and so on.

    scores, ranks [K], the higher rank the better. Equal ranks do not compete with each other: each is chosen from itself and all below."""
    below = (ranks[:, None] > ranks[None, :]) | torch.eye(len(ranks), dtype=torch.bool, device=ranks.device)  # [K, K]
    objective = scores - scores[None, :].masked_fill(~below, -math.inf).logsumexp(-1)  # log-probability of each choice, [K]
    return -objective.sum()


def log_barrier(scores, bound: float = 5.0):
    """InternLM2 eq. 2: rises as a score nears +-bound. Scores beyond are clamped just inside, as in its code, and feel no pull. Returns [R]."""
    scores = scores.clamp(-bound + 1e-3, bound - 1e-3)
    return -(torch.log(scores + bound) + torch.log(bound - scores))


def ranking_loss(args, scores, rows) -> torch.Tensor:
    """The loss of a batch, summed over its prompts. scores [R]: of all answers of all rows, in order."""
    losses, device, first = [], scores.device, 0
    for row in rows:
        own, pairs = scores[first : first + len(row.responses)], row.extra["pairs"]
        w, l, probability, margin = (torch.tensor(column, device=device) for column in zip(*pairs))  # [P] each
        better, worse = own[w], own[l]
        if args.loss == "plackett-luce":
            loss = plackett_luce_loss(own, torch.tensor(row.extra["ranks"], device=device))
        elif args.loss == "focal":
            loss = focal_pair_loss(better, worse).mean()
        elif row.extra["soft"]:
            loss = soft_pair_loss(better, worse, probability).mean()
        else:
            loss = pair_loss(better, worse, margin if args.use_margin else 0.0).mean()
        # the papers write both terms for a pair, summed over its two scores: on average over a ranking's pairs, twice the mean
        losses.append(loss + 2 * args.barrier * log_barrier(own).mean() + 2 * args.score_l2 * own.square().mean())
        first += len(row.responses)
    return torch.stack(losses).sum()


def balance_lengths(differences: list, edges: tuple, seed: int) -> list:
    """ChatGLM-RLHF's length balancing: in each bucket of |difference|, as many longer as shorter winners.

    differences: length of the winner minus that of the loser, by pair. Returns the numbers of the pairs kept; equal lengths all are."""
    bucket = lambda d: sum(abs(d) >= edge for edge in edges)
    kept = [i for i, d in enumerate(differences) if d == 0]
    for b in range(len(edges) + 1):
        longer, shorter = ([i for i, d in enumerate(differences) if d * sign > 0 and bucket(d) == b] for sign in (1, -1))
        n = min(len(longer), len(shorter))
        for side in (longer, shorter):
            kept += random.Random(f"{seed}-{b}").sample(side, n)
    return sorted(kept)


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


def check_pairs(name: str, data: Dataset):
    """Refuse a data set that holds neither pairs nor rankings."""
    columns = set(data.column_names)
    if not ({"prompt", "completions", "scores"} <= columns or {"chosen", "rejected"} <= columns):
        refuse(f"{name}: needs columns chosen and rejected, or prompt, completions and scores; it has {', '.join(data.column_names)}")


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


def rankings(args, tokenizer, max_length: int, conditions: dict):
    """The encode_row of reward modelling: a prompt, its K answers, and the pairs of which one is better."""
    stops, special = stop_tokens(tokenizer), special_tokens(tokenizer).values()

    def encode_row(row, notes):
        p, margin = row.get("probability"), row.get("margin")
        if row.get("completions") is not None:
            prompt, responses, ranks = row["prompt"], row["completions"], row["scores"]
            prompt = as_messages(prompt) if isinstance(prompt, list) else prompt
            if len(responses) != len(ranks) or any(s is None or math.isnan(s) for s in ranks):
                raise ValueError(f"{len(responses)} completions need as many scores, none missing; they are {ranks}")
        else:
            prompt, responses = as_pair(row.get("prompt"), row["chosen"], row["rejected"])
            ranks = [1, 0]
            gap = [row.get("score_chosen", row.get("chosen_reward")), row.get("score_rejected", row.get("rejected_reward"))]
            margin = gap[0] - gap[1] if margin is None and None not in gap else margin
            if args.use_margin and margin is None:
                raise ValueError("--use-margin needs a column margin, or score_chosen and score_rejected")
            if p is not None and not 0 <= p <= 1:
                raise ValueError(f"probability must lie between 0 and 1, it is {p}")
            if p is not None and p < 0.5:  # the better one first
                responses, p, margin = responses[::-1], 1 - p, None if margin is None else -margin
        if not prompt:
            raise Drop("empty prompt")
        if not responses:
            raise Drop("nothing to compare: no answers")
        said = [m | dict(content=m["content"].removesuffix(tokenizer.eos_token)) for r in responses for m in as_messages(r)]
        if not args.allow_special and has_special(special, [prompt, said, template_options(row)]):
            raise Drop("special token in the text (--allow-special keeps it)")
        kind = row.get("kind") or ""
        options = template_options(row)
        prompt_ids, ids = encode(tokenizer, with_condition(prompt, conditions.get(kind, "")), responses, stops, **options)
        if not prompt_ids:
            raise Drop("prompt and answers share no token boundary")
        empty = [not any(m["content"].strip() or "tool_calls" in m for m in as_messages(r)) for r in responses]
        fits = [i for i, r in enumerate(ids) if len(prompt_ids) + len(r) <= max_length and not empty[i]]
        notes["answers dropped: empty"] += sum(empty)
        notes["answers dropped: beyond --max-length"] += len(ids) - sum(empty) - len(fits)
        ids, ranks = [ids[i] for i in fits], [ranks[i] for i in fits]
        pairs = [
            (w, l, 1.0 if p is None else float(p), float(ranks[w] - ranks[l] if margin is None else margin))
            for w in range(len(ids)) for l in range(len(ids)) if ranks[w] > ranks[l] and ids[w] != ids[l]
        ]  # fmt: skip
        if not pairs:
            raise Drop("nothing to compare: fewer than two answers, all tied, or identical")
        notes["pairs"] += len(pairs)
        return [Row(prompt_ids, ids, None, dict(pairs=pairs, ranks=[float(r) for r in ranks], kind=kind, soft=p is not None))]

    return encode_row


def balanced(args, rows: list) -> list:
    """The rows less the pairs that length balancing takes out."""
    pairs = [(row, pair) for row in rows for pair in row.extra["pairs"]]
    kept = balance_lengths([len(row.responses[w]) - len(row.responses[l]) for row, (w, l, *_) in pairs], args.length_buckets, args.seed)
    for row in rows:
        row.extra["pairs"] = []
    for i in kept:
        pairs[i][0].extra["pairs"].append(pairs[i][1])
    say(f"length balancing: {len(kept)} of {len(pairs)} pairs kept")
    return [row for row in rows if row.extra["pairs"]]


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


def is_reward_model(name: str) -> bool:
    """Whether a checkpoint that loads has a trained head with one score."""
    config = load_config(name)
    return "SequenceClassification" in "".join(config.architectures or []) and config.num_labels == 1


def load_reward_model(name: str, device, dtype):
    """A reward model to train, its tokenizer, and whether the head is new, in which case it starts at zero."""
    tokenizer, config = load_tokenizer(name), load_config(name)
    if "SequenceClassification" in "".join(config.architectures or []) and config.num_labels != 1:
        refuse(f"{name}: a classifier of {config.num_labels} labels; a reward model has one label, its score")
    model = load_model(AutoModelForSequenceClassification, name, tokenizer, device, dtype, num_labels=1)
    if not hasattr(model, "score"):
        refuse(f"{name}: {type(model).__name__} keeps its head elsewhere than in `score`; only decoder models are supported")
    new = not is_reward_model(name)
    if new:
        torch.nn.init.zeros_(model.score.weight)
    # Hugging Face reads the score before the padding: no id that ends an answer may be the padding
    spare = [tokenizer.pad_token, tokenizer.unk_token]
    pad = next((t for t in spare if t and tokenizer.convert_tokens_to_ids(t) not in stop_tokens(tokenizer)), None)
    if pad is None:
        pad = "<|pad|>"
        tokenizer.add_special_tokens(dict(pad_token=pad))
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    tokenizer.pad_token = pad
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, new


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


@torch.no_grad()
def score_rows(model, rows: list, args, device) -> list:
    """The scores of every row's responses, a list of tensors [K] on every rank."""
    model.eval()
    first = [0]
    for row in rows:
        first.append(first[-1] + len(row.responses))
    mine, scores = range(RANK, len(rows), WORLD), torch.zeros(first[-1], device=device)
    for group, forwards, _ in packed([rows[i] for i in mine], args.tokens_per_forward, device, model.together):
        part = model.response_scores(forwards)
        if group:
            scores[[j for i in group for j in range(first[mine[i]], first[mine[i] + 1])]] = part
    model.train()
    scores = over_ranks(scores).cpu()
    return [scores[a:b] for a, b in zip(first, first[1:])]


def compare(rows: list, scores: list) -> list:
    """One record for each pair: the gap in score, and what is known of the two answers."""
    return [
        dict(gap=float(s[w] - s[l]), label=row.extra["ranks"][w] - row.extra["ranks"][l], kind=row.extra["kind"] or "all",
             length=len(row.responses[w]) - len(row.responses[l]), row=i, better=w, worse=l)
        for i, (row, s) in enumerate(zip(rows, scores)) for w, l, *_ in row.extra["pairs"]
    ]  # fmt: skip


def accuracy(pairs: list) -> float:
    """Share of pairs whose better answer scores strictly higher."""
    return sum(pair["gap"] > 0 for pair in pairs) / len(pairs) if pairs else math.nan


def calibration_error(gaps: list, bins: int = 10) -> float:
    """Expected calibration error: |how often right - how sure|, over bins of sureness sigmoid(|gap|), weighted by their pairs."""
    groups = [[] for _ in range(bins)]
    for gap in gaps:
        sure = 1 / (1 + math.exp(-min(abs(gap), 50)))
        groups[min(bins - 1, int((sure - 0.5) * 2 * bins))].append((sure, gap > 0))
    return sum(abs(sum(right - sure for sure, right in group)) for group in groups) / len(gaps)


def length_correlation(rows: list, scores: list) -> float:
    """Correlation of score with length among answers to the same prompt."""
    x = torch.cat([torch.tensor([float(len(r)) for r in row.responses]) - sum(map(len, row.responses)) / len(row.responses) for row in rows])
    y = torch.cat([s - s.mean() for s in scores])
    norm = x.norm() * y.norm()
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def evaluate_rewards(model, rows: list, args, device) -> dict:
    """Held-out loss, accuracy and calibration, as metrics."""
    scores = score_rows(model, rows, args, device)
    pairs, everything = compare(rows, scores), torch.cat(scores)
    return dict(
        eval_loss=ranking_loss(args, everything, rows).item() / len(rows), eval_accuracy=accuracy(pairs),
        eval_margin=sum(p["gap"] for p in pairs) / len(pairs), eval_calibration_error=calibration_error([p["gap"] for p in pairs]),
        eval_length_correlation=length_correlation(rows, scores),
    )  # fmt: skip


def full_report(rows: list, scores: list, tokenizer) -> dict:
    """Where the model is right and where not: accuracy by kind, by labelled margin and by length, and the best and worst examples."""
    pairs = compare(rows, scores)
    labels = sorted(p["label"] for p in pairs)
    low, high = labels[len(labels) // 3], labels[2 * len(labels) // 3]
    groups = {f"kind {k}": [p for p in pairs if p["kind"] == k] for k in sorted({p["kind"] for p in pairs})}
    if low < high:
        groups[f"labelled gap up to {low:.3g}"] = [p for p in pairs if p["label"] <= low]
        groups[f"labelled gap from {high:.3g}"] = [p for p in pairs if p["label"] >= high]
    for name, sign in (("better is longer", 1), ("better is shorter", -1), ("equal length", 0)):
        groups[name] = [p for p in pairs if (p["length"] > 0) - (p["length"] < 0) == sign]
    result = dict(pairs=len(pairs), accuracy=accuracy(pairs), calibration_error=calibration_error([p["gap"] for p in pairs]))
    result["length_correlation"] = length_correlation(rows, scores)
    result["groups"] = {name: dict(pairs=len(group), accuracy=accuracy(group)) for name, group in groups.items() if group}
    result["examples"], worst_first = [], sorted(pairs, key=lambda p: p["gap"])
    for p in (*worst_first[:2], *worst_first[-2:]):
        row = rows[p["row"]]
        better, worse = (tokenizer.decode(row.responses[p[side]])[:200] for side in ("better", "worse"))
        result["examples"].append(dict(gap=p["gap"], prompt=tokenizer.decode(row.prompt)[-200:], better=better, worse=worse))
    say(
        f"held out: {len(pairs)} pairs, accuracy {result['accuracy']:.3f}, calibration error {result['calibration_error']:.3f}, "
        f"correlation of score with length {result['length_correlation']:+.2f}"
    )
    for name, group in result["groups"].items():
        say(f"  {name:<24} {group['pairs']:>6} pairs   accuracy {group['accuracy']:.3f}")
    for e in result["examples"]:
        say(f"  gap {e['gap']:+.2f}: better {e['better'][:90]!r} worse {e['worse'][:90]!r}")
    return result


def main(args: Args):
    # 0. ranks, output, seed
    if args.loss != "pairs" and args.use_margin:
        refuse(f"--loss {args.loss} takes no margin; leave out --use-margin or use --loss pairs")
    if args.loss == "plackett-luce" and args.length_buckets:
        refuse("--loss plackett-luce ranks whole lists, out of which --length-buckets would take pairs; use --loss pairs")
    device, dtype = start_ranks(args.dtype)
    out, last, plan = begin(args, model=args.model, dataset=args.dataset, eval_dataset=args.eval_dataset, condition=args.condition)
    started = time.time()
    torch.manual_seed(args.seed)

    # 1. the model, its head at zero unless it is a reward model already, and the rankings
    data = load_rows("--dataset", args.dataset, args.dataset_split)
    check_pairs(f"--dataset {args.dataset}", data)
    conditions = load_conditions(args.condition)
    model, tokenizer, new = load_reward_model(str(last or args.model), device, dtype)
    max_length = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
    encode_row = rankings(args, tokenizer, max_length, conditions)
    rows, held_out = prepare(f"--dataset {args.dataset}", data, tokenizer, encode_row), []
    if args.eval_dataset:
        other = load_rows("--eval-dataset", args.eval_dataset, args.eval_split)
        check_pairs(f"--eval-dataset {args.eval_dataset}", other)
        held_out = prepare(f"--eval-dataset {args.eval_dataset}", other, tokenizer, encode_row)
    elif len(rows) > 1:
        held_out = hold_out(rows, args.eval_fraction, args.seed)
    if (args.loss != "pairs" or args.use_margin) and any(row.extra["soft"] for row in [*rows, *held_out]):
        option = "--use-margin" if args.use_margin else f"--loss {args.loss}"
        refuse(f"{option} takes no soft labels, but a data set has a column probability; leave that option out, or remove the column")
    if args.length_buckets:
        rows = balanced(args, rows)
        if not rows:
            refuse("--length-buckets: no pair is left; use fewer edges")
    steps = math.ceil(len(rows) / args.batch_size) * args.epochs
    steps = min(steps, args.max_steps or steps)
    work = f"{steps} steps of {args.batch_size} prompts, at most {args.tokens_per_forward} tokens a forward"
    announce([model], args.model, device, dtype, work)

    # 2. the optimiser, and where an earlier run stopped
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model = shard(model, dtype, response_scores)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    models, optimizers = {"": (model, tokenizer)}, {"": optimizer}
    state = dict(step=0, num_tokens=0, seconds=0.0)
    if last:
        state = load_checkpoint(last, models, optimizers)
    else:
        claim(args, out, plan)
    started -= state["seconds"]
    num_tokens = state["num_tokens"]

    # 3. for each batch of prompts with their ranked answers
    catch_signals()
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc="reward model", disable=RANK > 0)
    for step in bar:
        clock = time.time()
        numbers = pick(len(rows), args.batch_size, step, args.seed)
        batch = [rows[i] for i in numbers]
        pairs, answers = sum(len(row.extra["pairs"]) for row in batch), sum(len(row.responses) for row in batch)
        mine, sums, lowest, highest = batch[RANK::WORLD], torch.zeros(4, device=device), math.inf, -math.inf
        for group, forwards, _ in packed(mine, args.tokens_per_forward, device, model.together):
            part = [mine[i] for i in group]
            # 4. the score of every answer, its prompt computed once
            scores = model.response_scores(forwards)
            # 5. the loss, averaged over the step's prompts; a rank without rows goes along with weight zero; FSDP averages over the ranks
            loss = ranking_loss(args, scores, part) / len(batch) if part else scores.sum() * 0
            refuse_unless_finite(loss, step, f"the kept rows {[numbers[RANK + WORLD * i] for i in group][:8]}")
            (loss * WORLD).backward()
            if group:
                scores = scores.detach().cpu()
                gaps = [p["gap"] for p in compare(part, scores.split([len(row.responses) for row in part]))]
                sums += torch.tensor([loss.item(), sum(gap > 0 for gap in gaps), sum(gaps), scores.sum().item()], device=device)
                lowest, highest = min(lowest, scores.min().item()), max(highest, scores.max().item())
        # 6. one step of AdamW
        learning_rate = args.learning_rate * scheduled(args, step, steps)
        grad_norm = take_step(model, optimizer, learning_rate, args.max_grad_norm)
        # 7. what happened
        loss, right, gap, total = over_ranks(sums).tolist()
        if step == 0 and new:
            at_zero = ranking_loss(args, torch.zeros(answers), batch).item() / len(batch)  # ln 2 for pairs, ln K! for Plackett-Luce
            near = (1e-4 if dtype == torch.float32 else 0.05) * max(1, abs(at_zero))
            assert abs(loss - at_zero) < near, f"the first loss is {loss}, not {at_zero}: is the head at zero?"
        tokens = sum(len(row.prompt) + sum(map(len, row.responses)) for row in batch)
        num_tokens += tokens
        metrics = dict(step=step + 1, loss=loss, accuracy=right / pairs, margin=gap / pairs, mean_reward=total / answers)
        lowest, highest = over_ranks(torch.tensor([-lowest, highest], device=device), dist.ReduceOp.MAX).tolist()
        metrics |= dict(min_reward=-lowest, max_reward=highest, grad_norm=grad_norm)
        metrics |= dict(learning_rate=learning_rate, epoch=(step + 1) / math.ceil(len(rows) / args.batch_size), num_tokens=num_tokens)
        took = time.time() - clock
        if held_out and (step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0):
            metrics |= evaluate_rewards(model, held_out, args, device)
        now = time.time()
        metrics |= dict(tokens_per_second=tokens / took, seconds=now - started, peak_memory_mb=peak_memory(device))
        log(args, out, metrics)
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{metrics['accuracy']:.2f}", margin=f"{metrics['margin']:.2f}", refresh=False)
        if step == state["step"] and RANK == 0:
            bar.write(f"memory: {metrics['peak_memory_mb']} MB at the peak of the first step")
        if due(args, step + 1, steps, device):
            save_checkpoint(out, step + 1, models, optimizers, num_tokens=num_tokens, seconds=now - started)

    # 8. the shift to mean 0 on the training set (at most 4096 prompts of it), and a report on what was held out
    some = random.Random(args.seed).sample(rows, min(len(rows), 4096))
    model.config.score_shift = getattr(model.config, "score_shift", 0.0) + torch.cat(score_rows(model, some, args, device)).mean().item()
    say(f"scores shifted by {-model.config.score_shift:+.3f} to mean 0 on the training set")
    if held_out:
        result = full_report(held_out, score_rows(model, held_out, args, device), tokenizer)
        if RANK == 0:
            write_json(out / "report.json", result)

    # 9. a checkpoint that anything loads
    finish(out, models, ["loss", "accuracy", "margin", "mean_reward"])
    say(f"done: {out} after {time.time() - started:.0f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(args)
