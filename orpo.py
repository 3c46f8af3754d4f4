# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<=2.13.0", "transformers>=5.17", "datasets>=4", "tyro>=1.0", "wandb", "matplotlib", "tqdm"]
# ///
"""Odds ratio preference optimisation: fine-tuning and preferences in one stage, from a base model, without a reference.

    loss(pi) = E[ - log P(y_w|x)  +  lambda * - log sigmoid( log odds(y_w|x) - log odds(y_l|x) ) ],   odds = P / (1 - P)
    ORPO (Hong, Lee & Thorne 2024, arXiv 2403.07691), eqs. 4, 6 and 7; log P(y|x) is the mean over the answer's tokens, eq. 3. Fine-tuning
    alone raises the rejected answers with the chosen ones; the odds ratio parts them, more gently than a ratio of probabilities would.

Departures and options
  1. --odds-ratio-coef: lambda; TRL calls it beta. At 0 this is fine-tuning on the chosen answers, with the rejected ones watched.
  2. --nll-scope: the likelihood is that of the answer (the paper's eq. 2), or of prompt and answer (the authors' code, TRL). It is a mean
     over each answer's tokens, then over prompts; TRL's is one over all the batch's tokens.
  3. Where the authors' code errs: its likelihood leaves out the end of the answer, its odds take in one position too many, and its
     log(1 - e^x) is not finite at x = 0; here the end counts in both, the answer is exactly the answer, and x is kept below -1e-6.
  4. Zephyr-141B (alignment handbook): --odds-ratio-coef 0.05, the rest as the defaults here; its inverse square root schedule, and the
     load-balancing loss of its experts, are left out.
  5. A ranking of K answers gives all its pairs, and the likelihood of its best; each prompt counts once; ties say nothing. --max-length
     cuts answers, counted.

Reads prompt + chosen + rejected, chosen + rejected with the prompt inside (text or messages, HH-RLHF too), or prompt + completions +
scores. Writes a plain Hugging Face directory, args.json, metrics.jsonl and curves.png to --output-dir.

  python orpo.py --learning-rate 1e-3 --max-new-tokens 24                                                          the grid world
  python orpo.py --model Qwen/Qwen3-0.6B-Base --dataset trl-lib/ultrafeedback_binarized                            one GPU
  torchrun --nproc-per-node 8 orpo.py --model Qwen/Qwen3-8B-Base --gradient-checkpointing --dataset trl-lib/ultrafeedback_binarized  many

  Metric               at step 1      then           if not
  loss                 -              falls          flat: raise --learning-rate
  nll_loss             of the base    falls          flat: the same
  rewards/accuracies   about 0.5      rises          stays: raise --odds-ratio-coef or --learning-rate; 1.0: told apart by something trivial
  rewards/margins      about 0        rises first    the same; it is lambda times the difference of the two log P
  log_odds_ratio       about -0.7     rises          log sigmoid of the log odds ratio: the same as for the accuracy
  log_odds_chosen      about 0        rises          the log odds ratio itself (the names are TRL's)
  logps/chosen         -              rises          (means over tokens) falls: lambda too large (the paper: at 1.0 both fall)
  logps/rejected       -              rises less     as fast as logps/chosen: lambda too small (the paper: at 0.1 both rise, at 0.5 it falls)
  entropy              -              falls or stays to 0: collapsed; fewer epochs
"""

import sys
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import tyro


@dataclass
class Args:
    # --- method
    odds_ratio_coef: float = 0.1
    """lambda (paper: 0.1 for Mistral, 0.2 for Llama 2, 0.25 for Phi-2; Zephyr-141B: 0.05; 0: fine-tuning on the chosen answers)"""
    nll_scope: Literal["response", "all"] = "response"
    """tokens of the likelihood term: the better answer's, or also the prompt's"""
    # --- model
    model: str = "runs/base"
    """base checkpoint to start from: hub id or directory"""
    # --- data
    dataset: str = "data/grid/preferences.jsonl"
    """hub id (name or name:config), .jsonl/.json/.parquet file (also .gz), or saved directory"""
    dataset_split: str = "train"
    """split, for hub data sets and saved directories"""
    eval_dataset: str = ""
    """held-out data set; empty: a part of --dataset"""
    eval_split: str = "test"
    """split of --eval-dataset, for hub data sets and saved directories"""
    eval_fraction: float = 0.05
    """share of --dataset held out when there is no --eval-dataset (0: no evaluation)"""
    max_length: int = 2048
    """tokens of prompt and answer; longer answers are cut, longer prompts dropped (paper: 1024 and 2048)"""
    allow_special: bool = False
    """keep rows whose text contains one of the tokenizer's special tokens (else dropped: a user must not be able to end a turn)"""
    # --- optimisation
    epochs: int = 3
    """passes over the data (paper: 5 for Mistral; Zephyr-141B: 3)"""
    max_steps: int = 0
    """stop after this many optimiser steps (0: only by epochs)"""
    batch_size: int = 32
    """pairs (or rankings) per optimiser step, over all ranks (Zephyr-141B: 32)"""
    tokens_per_forward: int = 16384
    """memory knob: tokens per forward pass and rank (a longer row goes alone); changes the result by rounding only"""
    learning_rate: float = 5e-6
    """peak of AdamW's learning rate (paper: 8e-6, for Mistral 5e-6; Zephyr-141B: 5e-6; small models want more)"""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """after the warm-up: cosine to a tenth, linear to 0, or constant"""
    warmup_ratio: float = 0.1
    """share of the steps over which the learning rate rises (Zephyr-141B: 100 steps)"""
    weight_decay: float = 0.0
    """of matrices; vectors (norms, biases) have none"""
    max_grad_norm: float = 1.0
    """gradient clipping, on the norm over all parameters"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the computation; weights and optimiser are float32 (auto: bfloat16 on GPU, float32 on CPU)"""
    gradient_checkpointing: bool = False
    """recompute each layer's activations in the backward pass: less memory, a third more time"""
    # --- run
    output_dir: str = "runs/orpo"
    """where checkpoint, metrics and curves go"""
    seed: int = 0
    """of what is held out, of data order"""
    eval_every: int = 0
    """optimiser steps between evaluations (0: at the end only)"""
    show: int = 3
    """held-out prompts whose likeliest answers are printed at each evaluation"""
    max_new_tokens: int = 128
    """tokens of such an answer"""
    save_every: int = 0
    """optimiser steps between resumable checkpoints, checkpoint-N/, all of which are kept (0: none)"""
    resume: bool = False
    """continue from the last checkpoint in --output-dir; a finished run of the same arguments is left as it is"""
    overwrite: bool = False
    """replace what is in --output-dir"""
    track: bool = False
    """also log to Weights & Biases (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "orpo"
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
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

for library in (transformers.utils.logging, datasets.utils.logging):  # their bars and warnings would break up our own lines
    library.disable_progress_bar()
    library.set_verbosity_error()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STOP = dict(signal=0, agreed=False)  # the signal that asked this process to stop; whether all ranks know

# ---------------------------------------------------------------------------------------------------------------- the method

LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "nll_loss")
LOGGED += ("log_odds_ratio", "log_odds_chosen", "entropy", "mean_token_accuracy")


def log1mexp(x):
    """log(1 - e^x) for x <= 0, finite up to 0 and accurate in both tails (Maechler 2012). Any shape.

    Its slope grows like 1 / x; above -1e-6, where x counts as -1e-6, there is none."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_odds_ratio(chosen_logp, rejected_logp):
    """log odds(y_w) - log odds(y_l), from mean log-probabilities [P] (eqs. 3 and 4); returns [P]."""
    return (chosen_logp - rejected_logp) - (log1mexp(chosen_logp) - log1mexp(rejected_logp))


def odds_ratio_loss(ratio):
    """L_OR, eq. 7. ratio: of the log odds [P]; returns [P]."""
    objective = F.logsigmoid(ratio)
    return -objective


def orpo_terms(args, rows: list, logps, entropy, top):
    """The loss of a batch (eq. 6), summed over its rows, and the sums of what is LOGGED. logps, entropy, top [N]: of all trained tokens in
    order their log-probability, the entropy, and whether the token was the likeliest."""
    better, worse, share, best = pairings(rows, logps.device)
    ones = torch.ones_like(logps)
    lengths, whole = counted_sums(ones, rows), response_sums(ones, rows)  # of the answers alone; with a trained prompt
    means = counted_sums(logps, rows) / lengths  # log P, eq. 3, [R]
    ratio = log_odds_ratio(means[better], means[worse])
    losses = odds_ratio_loss(ratio)
    nll = -(response_sums(logps, rows) / whole)[best]  # L_SFT, [B]
    loss = nll.sum() + args.odds_ratio_coef * (losses * share).sum()  # share: each prompt counts once, whatever its number of pairs
    with torch.no_grad():
        chosen, rejected = means[better], means[worse]
        by_pair = {"logps/chosen": chosen, "logps/rejected": rejected, "rewards/accuracies": (chosen > rejected).float()}
        by_pair |= {"rewards/chosen": args.odds_ratio_coef * chosen, "rewards/rejected": args.odds_ratio_coef * rejected}
        by_pair |= {"rewards/margins": args.odds_ratio_coef * (chosen - rejected), "log_odds_chosen": ratio, "log_odds_ratio": -losses}  # TRL's names
        by_pair |= {name: (counted_sums(x, rows) / lengths)[better] for name, x in (("entropy", entropy), ("mean_token_accuracy", top.float()))}
        seen = dict(loss=loss, nll_loss=nll.sum()) | {name: (x * share).sum() for name, x in by_pair.items()}
    return loss, torch.stack([seen[name] for name in LOGGED]).detach()


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


def encode_turns(tokenizer, messages: list, first: int, stops: list, **options) -> list:
    """A conversation with every assistant turn from message `first` on to be trained, its end-of-turn token included.

    The turns are found by rendering prefixes, so that any chat template will do. Returns [(ids, trained)], trained one bool per id: one
    pair for the whole conversation, or, where the template rewrites earlier turns (drops their thinking, say), one for each turn."""
    turns = []
    for i in range(max(first, 1), len(messages)):  # an opening assistant turn answers nothing
        if messages[i]["role"] == "assistant":
            head = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False, **options)
            ids = end_turn(tokenizer, render(tokenizer, messages[: i + 1], **options), stops)
            turns.append((ids, shared(head, ids)))
    if turns and all(turns[-1][0][: len(ids)] == ids for ids, _ in turns):
        whole = turns[-1][0]
        return [(whole, [any(start <= t < len(ids) for ids, start in turns) for t in range(len(whole))])]
    return [(ids, [t >= start for t in range(len(ids))]) for ids, start in turns]


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


def as_answers(row: dict):
    """(prompt, responses, scores) of a ranking, or of a pair, whose scores are 1 and 0."""
    if row.get("completions") is None:
        return *as_pair(row.get("prompt"), row["chosen"], row["rejected"]), [1.0, 0.0]
    prompt, responses, scores = row["prompt"], row["completions"], row.get("scores")
    scores = [0.0] * len(responses) if scores is None else scores  # without scores all are tied
    if len(responses) != len(scores) or any(s is None or math.isnan(s) for s in scores):
        raise ValueError(f"{len(responses)} completions need as many scores, none missing; they are {scores}")
    return as_messages(prompt) if isinstance(prompt, list) else prompt, responses, scores


def preferences(args, tokenizer, max_length: int, rewards=None):
    """The encode_row of preference optimisation: a prompt, its K answers, and all pairs (better, worse) of them.

    rewards(row, scores) -> the answers' scores in place of the labels; given that, ties are pairs too."""
    stops, special = stop_tokens(tokenizer), special_tokens(tokenizer).values()

    def encode_row(row, notes):
        prompt, responses, scores = as_answers(row)
        scores = rewards(row, scores) if rewards else scores
        if not prompt:
            raise Drop("empty prompt")
        said = [m | dict(content=m["content"].removesuffix(tokenizer.eos_token)) for r in responses for m in as_messages(r)]
        if not args.allow_special and has_special(special, [prompt, said, template_options(row)]):
            raise Drop("special token in the text (--allow-special keeps it)")
        some = [i for i, r in enumerate(responses) if any(m["content"].strip() or "tool_calls" in m for m in as_messages(r))]
        notes["answers dropped: empty"] += len(responses) - len(some)
        if len(some) < 2:
            raise Drop("nothing to compare: fewer than two answers")
        responses, scores = [responses[i] for i in some], [float(scores[i]) for i in some]
        prompt_ids, ids = encode(tokenizer, prompt, responses, stops, **template_options(row))
        room = max_length - len(prompt_ids)
        if not prompt_ids or room < 1:
            raise Drop("prompt beyond --max-length" if prompt_ids else "prompt and answers share no token boundary")
        trained = [[True] * len(r) for r in ids]
        for i, r in enumerate(responses):  # of an answer of several turns, only the assistant's are trained
            if isinstance(r, list) and len(r) > 1:
                whole, marks = encode_turns(tokenizer, prompt + as_messages(r), len(prompt), stops, **template_options(row))[-1]
                if whole != prompt_ids + ids[i]:
                    raise Drop("an answer of several turns that goes on from one begun, or under a chat template that rewrites the earlier ones")
                trained[i] = marks[len(prompt_ids) :]
        notes["answers cut at --max-length"] += sum(len(r) > room for r in ids)
        ids, trained = [r[:room] for r in ids], [t[:room] for t in trained]
        some = [i for i, t in enumerate(trained) if any(t)]  # an answer of several turns may be cut before its first of the assistant's
        ids, trained, scores = ([x[i] for i in some] for x in (ids, trained, scores))
        places = [(i, j) for i in range(len(ids)) for j in range(len(ids)) if ids[i] != ids[j]]
        pairs = [(i, j) for i, j in places if scores[i] > scores[j] or rewards and scores[i] == scores[j] and i < j]
        if not pairs:
            raise Drop("nothing to compare: answers tied, identical, or cut before they differ")
        notes["pairs"] += len(pairs)
        return [Row(prompt_ids, ids, trained, dict(pairs=pairs, scores=scores))]

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


def response_sums(values, rows: list):
    """Sums of per-token values [N] over each response's trained tokens [R]."""
    return torch.stack([part.sum() for part in values.split([sum(trained) for row in rows for trained in row.trained])])


def counted_sums(values, rows: list):
    """`response_sums` over the trained tokens that row.extra["content"] marks 1.0, the others 0.0; over all, where rows have no such marks."""
    if "content" in rows[0].extra:
        values = values * torch.tensor([c for row in rows for part in row.extra["content"] for c in part], device=values.device)
    return response_sums(values, rows)


def pairings(rows: list, device):
    """Where the answers of a batch's pairs stand among its R responses: better [P], worse [P]; each pair's share of its prompt [P]; and the
    best answer of each prompt [B]."""
    better, worse, share, best, first = [], [], [], [], 0
    for row in rows:
        pairs, scores = row.extra["pairs"], row.extra["scores"]
        better += [first + i for i, _ in pairs]
        worse += [first + j for _, j in pairs]
        share += [1 / len(pairs)] * len(pairs)
        best.append(first + scores.index(max(scores)))
        first += len(row.responses)
    return tuple(torch.tensor(column, device=device) for column in (better, worse, share, best))


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
def evaluate_pairs(terms, names: tuple, model, rows: list, args, device) -> dict:
    """The logged terms on held-out rows, as metrics."""
    model.eval()
    mine, sums = rows[RANK::WORLD], torch.zeros(len(names), device=device)
    for group, forwards, target in packed(mine, args.tokens_per_forward, device, model.together):
        logps = model.token_logps(forwards, target)
        if group:
            sums += terms(args, [mine[i] for i in group], *logps)[1]
    model.train()
    return {f"eval_{name}": value / len(rows) for name, value in zip(names, over_ranks(sums).tolist())}


@torch.no_grad()
def show_answers(model, tokenizer, rows: list, stops: list, limit: int):
    """Print the model's likeliest answers to a few prompts. Every rank makes the same ones, since weights may be spread over all."""
    model.eval()
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", 2**20)
    options = dict(do_sample=False, eos_token_id=stops, pad_token_id=stops[0])
    for row in rows:
        ids = torch.tensor([row.prompt], device=next(model.parameters()).device)
        options["max_new_tokens"] = max(1, min(limit, longest - len(row.prompt)))
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        if RANK == 0:
            tqdm.write(f"  {tokenizer.decode(row.prompt)[-200:]!r}\n    -> {tokenizer.decode(answer)[:300]!r}")
    model.train()


def with_prompt(row: Row) -> Row:
    """The row with its prompt moved from the shared part into every answer (but for the first token, which nothing predicts): so it is run K
    times, and its tokens can be trained once, with the best. extra["content"] marks the answers among the trained tokens."""
    first, head, best = row.prompt[:1], row.prompt[1:], row.extra["scores"].index(max(row.extra["scores"]))
    trained = [[i == best] * len(head) + t for i, t in enumerate(row.trained)]
    content = [[0.0] * (len(head) * (i == best)) + [1.0] * sum(t) for i, t in enumerate(row.trained)]
    return Row(first, [head + r for r in row.responses], trained, dict(row.extra, content=content))


def main(args: Args):
    # 0. ranks, output, seed
    device, dtype = start_ranks(args.dtype)
    out, last, plan = begin(args, model=args.model, dataset=args.dataset, eval_dataset=args.eval_dataset)
    started = time.time()
    torch.manual_seed(args.seed)

    # 1. pairs of a better and a worse answer
    data = load_rows("--dataset", args.dataset, args.dataset_split)
    check_pairs(f"--dataset {args.dataset}", data)
    source = str(last or args.model)
    tokenizer = load_tokenizer(source)
    stops = stop_tokens(tokenizer)
    max_length = min(args.max_length, getattr(load_config(source).get_text_config(), "max_position_embeddings", args.max_length))
    encode_row = preferences(args, tokenizer, max_length)
    rows, held_out = prepare(f"--dataset {args.dataset}", data, tokenizer, encode_row), []
    if args.eval_dataset:
        other = load_rows("--eval-dataset", args.eval_dataset, args.eval_split)
        check_pairs(f"--eval-dataset {args.eval_dataset}", other)
        held_out = prepare(f"--eval-dataset {args.eval_dataset}", other, tokenizer, encode_row)
    elif len(rows) > 1:
        held_out = hold_out(rows, args.eval_fraction, args.seed)
    shown = held_out[: args.show]
    if args.nll_scope == "all":
        rows, held_out = [with_prompt(row) for row in rows], [with_prompt(row) for row in held_out]
    steps = math.ceil(len(rows) / args.batch_size) * args.epochs
    steps = min(steps, args.max_steps or steps)

    # 2. the policy, its optimiser, and where an earlier run stopped
    policy = load_model(AutoModelForCausalLM, source, tokenizer, device, dtype)
    check_head(policy, args.model, device)
    work = f"{steps} steps of {args.batch_size} prompts, at most {args.tokens_per_forward} tokens a forward"
    announce([policy], args.model, device, dtype, work)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(dict(use_reentrant=False))
    policy = shard(policy, dtype, token_logps)
    optimizer = make_optimizer(policy, args.learning_rate, args.weight_decay)
    models, optimizers = {"": (policy, tokenizer)}, {"": optimizer}
    state = dict(step=0, num_tokens=0, seconds=0.0)
    if last:
        state = load_checkpoint(last, models, optimizers)
    else:
        claim(args, out, plan)
    started -= state["seconds"]
    num_tokens = state["num_tokens"]

    # 3. for each batch of pairs
    catch_signals()
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc="orpo", disable=RANK > 0)
    for step in bar:
        clock = time.time()
        numbers = pick(len(rows), args.batch_size, step, args.seed)
        batch = [rows[i] for i in numbers]
        mine, sums = batch[RANK::WORLD], torch.zeros(len(LOGGED), device=device)
        for group, forwards, target in packed(mine, args.tokens_per_forward, device, policy.together):
            # 4. log pi of every token of both answers, their prompt computed once
            logps, entropy, top = policy.token_logps(forwards, target)
            # 5. the loss, averaged over the step's prompts; a rank without rows goes along with weight zero; FSDP averages over the ranks
            loss, seen = orpo_terms(args, [mine[i] for i in group], logps, entropy, top) if group else (logps.sum() * 0, 0 * sums)
            loss = loss / len(batch)
            refuse_unless_finite(loss, step, f"the kept rows {[numbers[RANK + WORLD * i] for i in group][:8]}")
            (loss * WORLD).backward()
            sums += seen
        # 6. one step of AdamW
        learning_rate = args.learning_rate * scheduled(args, step, steps)
        grad_norm = take_step(policy, optimizer, learning_rate, args.max_grad_norm)
        # 7. what happened
        metrics = dict(step=step + 1, **{k: v / len(batch) for k, v in zip(LOGGED, over_ranks(sums).tolist())})
        tokens = sum(len(row.prompt) + sum(map(len, row.responses)) for row in batch)
        num_tokens += tokens
        metrics |= dict(grad_norm=grad_norm, learning_rate=learning_rate, epoch=(step + 1) / math.ceil(len(rows) / args.batch_size))
        metrics |= dict(num_tokens=num_tokens)
        took = time.time() - clock
        evaluating = step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0
        if held_out and evaluating:
            metrics |= evaluate_pairs(orpo_terms, LOGGED, policy, held_out, args, device)
        now = time.time()
        metrics |= dict(tokens_per_second=tokens / took, seconds=now - started, peak_memory_mb=peak_memory(device))
        log(args, out, metrics)
        bar.set_postfix(
            loss=f"{metrics['loss']:.3f}", acc=f"{metrics['rewards/accuracies']:.2f}", margin=f"{metrics['rewards/margins']:.2f}", refresh=False
        )
        if step == state["step"] and RANK == 0:
            bar.write(f"memory: {metrics['peak_memory_mb']} MB at the peak of the first step")
        if evaluating:
            show_answers(policy, tokenizer, shown, stops, args.max_new_tokens)
        if due(args, step + 1, steps, device):
            save_checkpoint(out, step + 1, models, optimizers, num_tokens=num_tokens, seconds=now - started)

    # 8. a checkpoint that anything loads
    finish(out, models, ["loss", "nll_loss", "rewards/accuracies", "logps/chosen", "logps/rejected"])
    if held_out:
        say("held out: " + ", ".join(f"{k[5:]} {v:.4g}" for k, v in metrics.items() if k.startswith("eval_")))
    say(f"done: {out} after {time.time() - started:.0f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(args)
