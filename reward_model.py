# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11,<=2.13.0", "transformers>=5.17,<5.40", "datasets>=4", "tyro>=1.0", "wandb", "matplotlib", "tqdm"
# ]
# ///
"""Reward model: learn from rankings which answer people prefer.

    loss(theta) = - 1/C(K,2)  E over prompts x  sum over pairs of its K answers  log sigmoid( r(x, y_w) - r(x, y_l) )

InstructGPT (Ouyang et al. 2022, arXiv 2203.02155), eq. 1. All pairs of a prompt are one element of the batch.

Departures from the paper
  1. The head starts at zero and has no bias. The score is read at the last token of the answer.
  2. The mean score of the answers in the last tenth of training is stored as score_shift in config.json. These scripts
     subtract it from every score; other libraries do not. InstructGPT centres the demonstrations.
  3. Tied answers form no pair; the mean is over the pairs that remain. Answers beyond --max-length are dropped, since
     the score of a cut answer says little about the whole one.

Options, all off by default
  4. --loss plackett-luce: the likelihood of the whole ranking (Starling, Zhu et al. 2024, who divide it by K - 1);
     focal: easy pairs count less (InternLM2, arXiv 2403.17297, eq. 1). --barrier: its log barrier at +-5 (eq. 2).
  5. --use-margin: subtracts a column `margin` from the gap (Llama 2, arXiv 2307.09288, eq. 2).
  6. --score-l2, --length-buckets: a prior on the scores, a balance of longer and shorter winners (ChatGLM-RLHF,
     arXiv 2404.00934).
  7. --condition FILE: a system prompt for each `kind` of row, which only the reward model sees (InternLM2).
  8. A column `probability` (that chosen is better) makes soft labels (Constitutional AI, arXiv 2212.08073).

Reads prompt + chosen + rejected, or chosen + rejected that both contain the prompt (HH-RLHF too), or prompt +
completions + scores; messages go through the chat template, text is used as it is. Writes a directory that loads as
AutoModelForSequenceClassification, args.json, metrics.jsonl, curves.png and report.json to --output-dir.

  python reward_model.py --model runs/sft --dataset data/grid/rankings.jsonl --learning-rate 1e-3       the grid world
  python reward_model.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized              one GPU
  torchrun --nproc-per-node 8 reward_model.py --model Qwen/Qwen3-8B --dataset trl-lib/ultrafeedback_binarized  many GPUs

  Metric          at step 1         then            if not
  loss            ln 2; PL: ln K!   0.4 to 0.65     flat: the labels are noise; below 0.3: the pairs are too easy
  accuracy        0 (all tied)      0.6 to 0.75     0.5: is `chosen` the better column? 1.0: a leak
  mean_reward     0                 drifts freely   far from 0 is harmless; --score-l2 and --barrier hold it
  max_reward      0                 grows           beyond 10: overconfident; fewer --epochs (InstructGPT: 1)
"""

import os
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import tyro


@dataclass
class Args:
    model: str
    """SFT checkpoint, or an earlier reward model: hub id or directory"""
    dataset: str
    """hub id (name, name:config, name:config:split or name::split), .jsonl/.json/.parquet file (also .gz), or
    directory"""
    output_dir: str = "runs/reward_model"
    """where the checkpoint, metrics, report and curves go"""
    # --- method
    loss: Literal["pairs", "plackett-luce", "focal"] = "pairs"
    """pairs: all C(K,2) pairs of a ranking (InstructGPT); plackett-luce: the whole ranking (Starling); focal:
    InternLM2"""
    barrier: float = 0.0
    """weight of the log barrier at +-5 (InternLM2: 0.02)"""
    score_l2: float = 0.0
    """weight of the squared scores (ChatGLM; its value is not published, 0.01 is a start)"""
    use_margin: bool = False
    """subtract the column `margin` from each pair's gap (Llama 2); with rankings, the difference of their scores"""
    length_buckets: tuple[int, ...] = ()
    """edges, in tokens of length difference, of buckets in which longer and shorter winners are balanced (ChatGLM);
    e.g. 4 10"""
    condition: str = ""
    """JSON file {kind: system prompt}; put before the prompts of that kind (InternLM2)"""
    # --- data
    eval_dataset: str = ""
    """held-out rankings, from split test unless one is named (empty: a share of --dataset, --eval-fraction)"""
    eval_fraction: float = 0.05
    """share of the prompts of --dataset that is held out (0: no evaluation)"""
    max_length: int = 1024
    """tokens of prompt and answer: longer answers are dropped"""
    # --- optimisation
    epochs: int = 1
    """passes over the data (InstructGPT: 1; more overfits)"""
    max_steps: int = 0
    """stop after this many optimiser steps (0: only by epochs)"""
    batch_size: int = 64
    """prompts per optimiser step, over all ranks (InstructGPT: 64, with up to 36 pairs each)"""
    tokens_per_forward: int = 16384
    """memory knob: tokens per forward pass and rank; changes the result by rounding only"""
    learning_rate: float = 9e-6
    """peak (InstructGPT 6B: 9e-6; small models want more)"""
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
    seed: int = 0
    """of the held-out rows, the data order and length balancing"""
    eval_every: int = 0
    """optimiser steps between evaluations (0: at the end only)"""
    save_every: int = 0
    """optimiser steps between resumable checkpoints, checkpoint-N/, all of which are kept (0: none)"""
    resume: bool = False
    """continue from the last checkpoint in --output-dir; a finished run is left as it is"""
    overwrite: bool = False
    """replace what a run wrote in --output-dir"""
    track: bool = False
    """also log to Weights & Biases (set WANDB_PROJECT, WANDB_NAME)"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)  # before the heavy imports, so that --help answers at once

    def interrupted(*_):
        """Ends the program on Ctrl-C, until training begins; libraries catch what an exception would say."""
        print("\ninterrupted before training", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

import contextlib
import glob
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import random
import re
import resource
import shutil
import tempfile
import time
import types
from collections import Counter
from datetime import datetime, timedelta
from functools import lru_cache, partial
from itertools import accumulate, groupby
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

# ------------------------------------------------------------------------------------------------------ the method


def pair_loss(better, worse, margin=0.0, p=1.0):
    """Bradley-Terry, InstructGPT eq. 1. Scores of the two answers of each pair [P]; returns [P].

    margin: Llama 2 eq. 2. p: the probability of the label, whose cross-entropy this is (Constitutional AI, section 4).
    """
    gap = better - worse - margin
    return -p * F.logsigmoid(gap) - (1 - p) * F.logsigmoid(-gap)


def focal_pair_loss(better, worse, gamma: float = 2.0):
    """Focal ranking loss, InternLM2 eq. 1: the more surely a pair is ranked correctly, the less it counts. Scores [P];
    returns [P]."""
    p = torch.sigmoid(better - worse)
    return -((1 - 2 * (p - 0.5).clamp(min=0)) ** gamma) * F.logsigmoid(better - worse)


def plackett_luce_loss(scores, ranks):
    """Negative log-likelihood of a ranking (Plackett-Luce; Starling): the best is chosen from all, the next from the
    rest, and so on.

    scores, ranks [K]; a higher rank is better. Equal ranks do not compete: each is chosen from itself and all below.
    Returns a scalar."""
    itself = torch.eye(len(ranks), dtype=torch.bool, device=ranks.device)
    competes = (ranks[:, None] > ranks[None, :]) | itself  # [K, K]
    log_sums = scores[None, :].masked_fill(~competes, -math.inf).logsumexp(-1)  # over those chosen from, [K]
    return (log_sums - scores).sum()


def log_barrier(scores, bound: float = 5.0):
    """InternLM2 eq. 2: rises as a score nears +-bound. Scores outside are clamped just inside, as in the authors' code,
    and get no gradient. scores [R]; returns [R]."""
    scores = scores.clamp(-bound + 1e-3, bound - 1e-3)
    return -(torch.log(scores + bound) + torch.log(bound - scores))


def ranking_loss(args, rows: list, scores) -> torch.Tensor:
    """The loss of B prompts, summed. scores [R]: of all answers of all rows, in order."""
    pairs = torch.tensor([pair for row in rows for pair in row.extra["pairs"]])  # of all rows, [P, 4]
    pairs = pairs.to(scores.device, non_blocking=True).split([len(row.extra["pairs"]) for row in rows])
    losses = []
    for row, s, own in zip(rows, scores.split([len(row.responses) for row in rows]), pairs):  # s [K], own [P, 4]
        (better, worse), (probability, margin) = own.T[:2].long(), own.T[2:]
        if args.loss == "plackett-luce":
            loss = plackett_luce_loss(s, torch.tensor(row.extra["ranks"]).to(s.device, non_blocking=True))
        elif args.loss == "focal":
            loss = focal_pair_loss(s[better], s[worse]).mean()
        else:
            loss = pair_loss(s[better], s[worse], margin if args.use_margin else 0.0, probability).mean()
        # the papers sum both terms over a pair's two scores: over all pairs of a ranking without ties, twice the mean
        losses.append(loss + 2 * args.barrier * log_barrier(s).mean() + 2 * args.score_l2 * s.square().mean())
    return torch.stack(losses).sum()


def ranking_batch(args, rows: list, scores) -> dict:
    """The loss (a sum over the prompts), accuracy and margin (over the pairs), and mean_reward (over the answers).
    scores [R]."""
    gaps = pair_gaps(rows, scores.detach())  # [P]
    loss = ranking_loss(args, rows, scores)
    return dict(loss=loss, accuracy=(gaps > 0).sum(), margin=gaps.sum(), mean_reward=scores.sum())


def pair_gaps(rows: list, scores):
    """The better answer's score less the worse one's, for the pairs of all rows in order [P]. scores [R]."""
    better, worse, first = [], [], 0
    for row in rows:
        better += [first + w for w, *_ in row.extra["pairs"]]
        worse += [first + l for _, l, *_ in row.extra["pairs"]]
        first += len(row.responses)
    better, worse = torch.tensor([better, worse]).to(scores.device, non_blocking=True)
    return scores[better] - scores[worse]


def balance_lengths(differences: list, edges: tuple, seed: int) -> list:
    """ChatGLM-RLHF's length balancing: in each bucket of |difference|, as many longer as shorter winners.

    differences: length of the winner less that of the loser, by pair. Returns the indices of the pairs to keep; all of
    equal length are."""
    bucket = [sum(abs(difference) >= edge for edge in edges) for difference in differences]
    kept = [i for i, difference in enumerate(differences) if difference == 0]
    for b in range(len(edges) + 1):
        longer = [i for i, difference in enumerate(differences) if difference > 0 and bucket[i] == b]
        shorter = [i for i, difference in enumerate(differences) if difference < 0 and bucket[i] == b]
        for side in (longer, shorter):
            kept += random.Random(f"{seed}-{b}").sample(side, min(len(longer), len(shorter)))
    return sorted(kept)


def main(args: Args):
    # 0. options, ranks, the output directory
    check_options(args)
    device, dtype = setup_distributed(args)
    out, last, signature = open_run(args, args.model, args.dataset, args.eval_dataset, args.condition)
    source, started = str(last or args.model), time.time()

    # 1. the model, its head at zero unless it is a reward model, and rows: a prompt, its answers, and how they rank
    tokenizer, conditions = load_tokenizer(source), load_conditions(args.condition)
    is_new = not is_reward_model(source)
    model = read_model(AutoModelForSequenceClassification, source, tokenizer, num_labels=1)
    add_padding(model, tokenizer)  # before the rows, in which its token is special
    check_score_head(model, source)
    if is_new:
        torch.nn.init.zeros_(model.score.weight)
    encode_row = partial(ranking_rows, args, tokenizer, fit_length(args, source), conditions)
    rows, held_out = prepare_split(args, tokenizer, encode_row)
    if args.length_buckets:
        rows = balance_rows(args, rows)
    steps_per_epoch = math.ceil(len(rows) / args.batch_size)
    steps = min(steps_per_epoch * args.epochs, args.max_steps or sys.maxsize)

    # 2. its optimiser, and the state of an interrupted run
    model = prepare_model(model, source, args, device, dtype, response_scores)
    optimizer = make_optimizer(model, args)
    models, optimizers = {"": (model, tokenizer)}, {"": optimizer}
    announce([model], args, f"{steps} steps of {args.batch_size} prompts", device, dtype)
    if last:
        state = load_checkpoint(last, models, optimizers)
    else:
        clear_run(args, out, signature)
        state = dict(step=0, num_tokens=0, seconds=0.0, late_scores=[0.0, 0])
    started -= state["seconds"]  # of all parts of a resumed run

    # 3. for each batch of prompts with their ranked answers
    catch_signals()
    for step in (bar := progress("reward model", state["step"], steps)):
        batch, sums, clock = batch_rows(rows, args, step), {}, time.time()
        prompts, answers = len(batch), sum(len(row.responses) for row in batch)
        pairs = sum(len(row.extra["pairs"]) for row in batch)
        extremes = torch.full((2,), -math.inf, device=device)  # of -score and of score
        # weight 0: a row that only keeps the ranks in step
        for group, weight, inputs, _ in forwards(batch[RANK::WORLD], args, model, device, spare=batch[0]):
            # 4. the score of every answer, its prompt computed once, and the loss, averaged over the step's prompts
            scores = model.response_scores(**inputs)
            logged = ranking_batch(args, group, scores)
            (logged["loss"] * weight * WORLD / prompts).backward()  # FSDP averages the gradients over the ranks
            add_scalars(sums, logged, weight)
            extremes = torch.maximum(extremes, torch.stack([-scores, scores]).detach().amax(1))
        # 5. one step of AdamW
        grad_norm, learning_rate = take_step(model, optimizer, args, step, steps)
        # 6. metrics, evaluation, checkpoint
        sums = sum_over_ranks(sums)
        counts = dict(loss=prompts, accuracy=pairs, margin=pairs, mean_reward=answers)
        metrics = dict(step=step + 1, epoch=(step + 1) / steps_per_epoch)
        metrics |= {name: sums[name] / count for name, count in counts.items()}
        lowest, highest = over_ranks(extremes, dist.ReduceOp.MAX).tolist()
        metrics |= dict(min_reward=-lowest, max_reward=highest)
        if step == 0 and is_new:  # all scores are 0: the loss is ln 2 for plain pairs, ln K! for Plackett-Luce
            theory = ranking_loss(args, batch, torch.zeros(answers)).item() / prompts
            check_first_step("the loss", metrics["loss"], theory, dtype, scale=max(1, abs(theory)))
        if step >= steps - max(1, steps // 10):
            state["late_scores"] = [state["late_scores"][0] + sums["mean_reward"], state["late_scores"][1] + answers]
        tokens = sum(map(count_tokens, batch))
        state |= dict(step=step + 1, num_tokens=state["num_tokens"] + tokens, seconds=time.time() - started)
        metrics |= dict(grad_norm=grad_norm, learning_rate=learning_rate, num_tokens=state["num_tokens"])
        metrics |= dict(tokens_per_second=tokens / (time.time() - clock))
        if held_out and is_due(args.eval_every, step + 1, steps):
            held_out_scores = score_rows(model, held_out, args, device)
            metrics |= held_out_metrics(args, held_out, held_out_scores)
        log_metrics(args, out, metrics | dict(seconds=state["seconds"], peak_memory_mb=peak_memory(device)), bar)
        if should_save(args, step + 1, steps, device):
            save_checkpoint(args, out / f"checkpoint-{step + 1}", models, optimizers, state)

    # 7. the shift to mean 0, a report on the held-out rankings, and a checkpoint that any library loads
    late_sum, late_count = state["late_scores"]
    model.config.score_shift = getattr(model.config, "score_shift", 0.0) + late_sum / late_count
    print0(f"scores are shifted by {-model.config.score_shift:+.3f}, to mean 0 over the last training answers")
    if held_out and RANK == 0:
        write_json(out / "report.json", print_report(held_out, held_out_scores, tokenizer))
    finish_run(out, models, ["loss", "accuracy", "margin", "mean_reward"])


# ----------------------------------------------------------------------------------------- reward_model.py alone


def check_options(args):
    """Fails on options that contradict each other, and on numbers that are out of range."""
    check_numbers(args)
    if args.loss != "pairs" and args.use_margin:
        fail(f"--loss {args.loss} takes no margin; leave out --use-margin or use --loss pairs")
    if args.loss == "plackett-luce" and args.length_buckets:
        fail("--loss plackett-luce ranks whole lists, from which --length-buckets would take pairs; use --loss pairs")


def ranking_rows(args, tokenizer, max_length: int, conditions: dict, row: dict, notes: Counter) -> list:
    """One Row: a prompt, its K answers, and the pairs (better, worse, probability, margin) of them."""
    probability, margin = row.get("probability"), row.get("margin")
    if row.get("completions") is not None:
        prompt, responses, ranks = as_prompt(row), row["completions"], row.get("scores") or []
        probability = None  # which is a pair's
        if len(responses) != len(ranks) or any(rank is None or math.isnan(rank) for rank in ranks):
            raise ValueError(f"{len(responses)} completions need as many scores, none missing; they are {ranks}")
    else:
        (prompt, responses), ranks = as_pair(row), [1, 0]
        score_chosen = row.get("score_chosen", row.get("chosen_reward"))
        score_rejected = row.get("score_rejected", row.get("rejected_reward"))
        if margin is None and None not in (score_chosen, score_rejected):
            margin = score_chosen - score_rejected
        if args.use_margin and margin is None:
            raise ValueError("--use-margin needs a column margin, or score_chosen and score_rejected")
    if probability is not None:
        if args.loss != "pairs" or args.use_margin:
            option = "--use-margin" if args.use_margin else f"--loss {args.loss}"
            raise ValueError(
                f"{option} takes no soft labels, which the column probability gives; leave one of them out"
            )
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, it is {probability}")
        if probability < 0.5:  # the better one first
            responses, probability = responses[::-1], 1 - probability
    if not prompt:
        raise Drop("empty prompt")
    filled = [i for i, response in enumerate(responses) if has_content(response)]
    notes["answers dropped: empty"] += len(responses) - len(filled)
    if len(filled) < 2:
        raise Drop("nothing to compare: fewer than two answers")
    kind = row.get("kind") or "all"
    prompt = with_condition(prompt, conditions.get(row.get("kind"), ""))
    prompt, encoded, trained = encode_scored(tokenizer, prompt, [responses[i] for i in filled], row, notes)
    room = max_length - len(prompt)
    answers = [(r, t, float(ranks[i])) for i, r, t in zip(filled, encoded, trained) if len(r) <= room]
    notes["answers dropped: beyond --max-length"] += len(encoded) - len(answers)
    responses, trained, ranks = ([answer[column] for answer in answers] for column in range(3))
    pairs = []
    for w in range(len(answers)):
        for l in range(len(answers)):
            if ranks[w] > ranks[l] and responses[w] != responses[l]:
                gap = ranks[w] - ranks[l] if margin is None else float(margin)
                pairs.append((w, l, 1.0 if probability is None else float(probability), gap))
    if not pairs:
        raise Drop("nothing to compare: fewer than two answers, all tied, or identical")
    notes["pairs"] += len(pairs)
    return [Row(prompt, responses, trained, dict(pairs=pairs, ranks=ranks, kind=kind))]


def balance_rows(args, rows: list) -> list:
    """The rows without the pairs that length balancing removes."""
    pairs = [(row, pair) for row in rows for pair in row.extra["pairs"]]
    differences = [len(row.responses[w]) - len(row.responses[l]) for row, (w, l, *_) in pairs]
    kept = balance_lengths(differences, args.length_buckets, args.seed)
    for row in rows:
        row.extra["pairs"] = []
    for i in kept:
        row, pair = pairs[i]
        row.extra["pairs"].append(pair)
    print0(f"length balancing: {len(kept)} of {len(pairs)} pairs kept")
    rows = [row for row in rows if row.extra["pairs"]]
    if not rows:
        fail("--length-buckets: no pair is left; use fewer edges")
    return rows


def add_padding(model, tokenizer):
    """Gives both a padding token that ends no answer, since transformers reads the score before the padding."""
    spare = [token for token in (tokenizer.pad_token, tokenizer.unk_token) if token]
    spare = [token for token in spare if tokenizer.convert_tokens_to_ids(token) not in stop_tokens(tokenizer)]
    if not spare:
        spare = ["<|pad|>"]
        tokenizer.add_special_tokens(dict(pad_token=spare[0]))
        special_tokens.cache_clear()
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    tokenizer.pad_token = spare[0]
    model.config.pad_token_id = tokenizer.pad_token_id


def held_out_metrics(args, rows: list, scores: list) -> dict:
    """Loss, accuracy and calibration on held-out rows, from their scores."""
    everything = torch.cat(scores)
    gaps = pair_gaps(rows, everything)
    return dict(
        eval_loss=ranking_loss(args, rows, everything).item() / len(rows),
        eval_accuracy=(gaps > 0).float().mean().item(),
        eval_margin=gaps.mean().item(),
        eval_calibration_error=calibration_error(gaps.tolist()),
        eval_length_correlation=length_correlation(rows, scores),
    )


def calibration_error(gaps: list, bins: int = 10) -> float:
    """Expected calibration error: |share that is right - confidence|, over bins of the confidence sigmoid(|gap|),
    weighted by their pairs."""
    groups = [[] for _ in range(bins)]
    for gap in gaps:
        confidence = 1 / (1 + math.exp(-min(abs(gap), 50)))
        groups[min(bins - 1, int((confidence - 0.5) * 2 * bins))].append((confidence, gap > 0))
    return sum(abs(sum(right - confidence for confidence, right in group)) for group in groups) / len(gaps)


def length_correlation(rows: list, scores: list) -> float:
    """Correlation of score and length among answers to the same prompt."""
    lengths = [torch.tensor([float(len(response)) for response in row.responses]) for row in rows]
    x, y = (torch.cat([values - values.mean() for values in column]) for column in (lengths, scores))
    norm = x.norm() * y.norm()
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def print_report(rows: list, scores: list, tokenizer) -> dict:
    """Prints and returns where the model is right: accuracy by kind, by labelled gap and by length, with the worst and
    best examples."""
    pairs = []
    for row, s in zip(rows, scores):
        for w, l, *_ in row.extra["pairs"]:
            pair = dict(gap=float(s[w] - s[l]), label=row.extra["ranks"][w] - row.extra["ranks"][l], row=row)
            pairs.append(pair | dict(better=row.responses[w], worse=row.responses[l]))
    labels, kinds = sorted(pair["label"] for pair in pairs), sorted({row.extra["kind"] for row in rows})
    low, high = labels[len(labels) // 3], labels[2 * len(labels) // 3]
    longer = lambda pair: len(pair["better"]) - len(pair["worse"])
    groups = {f"kind {kind}": [pair for pair in pairs if pair["row"].extra["kind"] == kind] for kind in kinds}
    if low < high:
        groups[f"labelled gap up to {low:.3g}"] = [pair for pair in pairs if pair["label"] <= low]
        groups[f"labelled gap from {high:.3g}"] = [pair for pair in pairs if pair["label"] >= high]
    groups["better is longer"] = [pair for pair in pairs if longer(pair) > 0]
    groups["better is shorter"] = [pair for pair in pairs if longer(pair) < 0]
    groups["equal length"] = [pair for pair in pairs if longer(pair) == 0]

    accuracy = lambda group: sum(pair["gap"] > 0 for pair in group) / len(group)
    error, correlation = calibration_error([pair["gap"] for pair in pairs]), length_correlation(rows, scores)
    report = dict(pairs=len(pairs), accuracy=accuracy(pairs), calibration_error=error, length_correlation=correlation)
    report |= dict(groups={}, examples=[])
    print(f"held out: {len(pairs)} pairs, accuracy {report['accuracy']:.3f}, calibration error {error:.3f},", end=" ")
    print(f"correlation of score with length {correlation:+.2f}")
    for name, group in groups.items():
        if group:
            report["groups"][name] = dict(pairs=len(group), accuracy=accuracy(group))
            print(f"  {name:<24} {len(group):>6} pairs   accuracy {accuracy(group):.3f}")
    by_gap = sorted(pairs, key=lambda pair: pair["gap"])
    for pair in (*by_gap[:2], *by_gap[-2:]):
        texts = {side: tokenizer.decode(pair[side])[:200] for side in ("better", "worse")}
        report["examples"].append(dict(gap=pair["gap"], prompt=tokenizer.decode(pair["row"].prompt)[-200:]) | texts)
        print(f"  gap {pair['gap']:+.2f}: better {texts['better'][:90]!r} worse {texts['worse'][:90]!r}")
    return report


# ============================== every block below stands word for word in all scripts that have it ================
# A parameter that this script never passes serves another one.
# ---- scores: what a reward model gives to answers


def response_scores(self, inputs, last, source=None):
    """The score of each response [R]: the head on the hidden state of its last token, less the shift to mean 0. A
    method of the model.

    inputs, last: as `pack` and `pad` return them."""
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
    """What the chat template writes after the token that ends an assistant's turn, as ids. A score is read at the last
    token of the rendering, as a server that renders the conversation does."""
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
    """A policy's text without what its reader would take for special tokens: an answer must not end its turn and write
    its judge's reply."""
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


# ---- data: rows of published formats to token ids


class Row(NamedTuple):
    """A prompt and its K responses, as ids. trained: one bool per response token; extra: what else is known of the
    row."""

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
    """Reports what a library raises while it reads or writes something that the user named as an error of that, in one
    sentence."""
    try:
        yield
    except Exception as e:
        fail(f"{what} ({type(e).__name__}: {' '.join(str(e.__cause__ or e).split())[:300]})")


def split_name(name: str) -> tuple:
    """(source, config, split) of a data set's name; a path that exists is a source, whatever its colons."""
    return (name, "", "") if Path(name).exists() else (*name.split(":", 2), "", "")[:3]


def load_rows(option: str, name: str, default_split: str) -> Dataset:
    """A data set from a file, a directory (written by save_to_disk, or as downloaded from the hub), or the hub; see
    --dataset."""
    source, config, split = split_name(name)
    path = Path(source)
    with user_input(f"{option} {name}: cannot be read as a data set"):
        if path.suffix in (".json", ".jsonl", ".parquet", ".gz") and not path.is_dir():
            if not path.is_file() or not path.stat().st_size:
                raise ValueError("the file is empty" if path.is_file() else "the file does not exist")
            if config:
                raise ValueError(f"a file has no configuration {config}; a split is written {source}::{config}")
            kind = "parquet" if ".parquet" in path.suffixes else "json"
            options = dict(encoding="utf-8-sig") if kind == "json" else {}  # also drops a byte-order mark
            if kind == "json":
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
    """A conversation as clean messages: from a list of messages, of ShareGPT turns (from/value), or from the text of
    one turn."""
    if isinstance(value, str):
        return [dict(role=role, content=value)]
    names, messages = dict(human="user", gpt="assistant"), []
    for turn in without_none(value):
        if "from" in turn:
            turn = turn | dict(role=names.get(turn["from"], turn["from"]), content=turn["value"])
        if "tool_calls" in turn:
            turn.setdefault("content", "")
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise ValueError(f"a message needs a role and a text content, this one is {str(turn)[:80]}")
        messages.append({k: v for k, v in turn.items() if k not in ("from", "value")})
    return messages


def has_content(response) -> bool:
    """Whether a response, text or messages, says anything."""
    return any(m["content"].strip() or "tool_calls" in m for m in as_messages(response))


def as_prompt(row: dict):
    """A row's prompt, text or messages: prompt, question, or instruction with its input; after the system text, if the
    row has one."""
    prompt = row.get("prompt")
    if prompt is None:
        asked = row.get("question", row.get("instruction"))
        material = row.get("input") or row.get("context")
        if asked == "":
            raise Drop("empty prompt")
        if asked is not None:
            prompt = as_messages(f"{asked}\n\n{material}" if material else asked, "user")
    return with_system(row, as_messages(prompt, "user")) if prompt and row.get("system") else prompt


def with_system(row: dict, messages: list) -> list:
    """Messages after the row's column `system`, if it has one that they do not begin with."""
    if not row.get("system") or messages and messages[0]["role"] == "system":
        return messages
    return as_messages(row["system"], "system") + messages


def as_pair(row: dict):
    """(prompt, [chosen, rejected]) of any published layout: text or messages, the prompt apart or inside both (or, as
    messages, both)."""
    if row.get("chosen") is None or row.get("rejected") is None:
        raise ValueError("it needs chosen and rejected, or prompt, completions and scores")
    prompt, chosen, rejected = as_prompt(row), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and not isinstance(row.get("prompt"), list):  # a prompt in words is their first turn
        chosen, rejected = as_messages(chosen), as_messages(rejected)
        if not chosen or not rejected or "assistant" in (chosen[0]["role"], rejected[0]["role"]):
            return as_messages(prompt or [], "user"), [chosen, rejected]
        chosen, rejected = with_system(row, chosen), with_system(row, rejected)
        n = min(shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        # where they part at a user's turn, the answer before it belongs to both
        while n and chosen[n - 1]["role"] == "assistant":
            n -= 1
        return chosen[:n], [chosen[n:], rejected[n:]]
    if prompt and isinstance(prompt, list):
        prompt, talks = as_messages(prompt), [as_messages(chosen), as_messages(rejected)]
        own = as_messages(row["prompt"]) if isinstance(row.get("prompt"), list) else prompt
        is_given_twice = all(talk[: len(own)] == own and len(talk) > len(own) for talk in talks)
        return prompt, [talk[len(own) :] for talk in talks] if is_given_twice else talks
    if prompt:
        return prompt, [chosen, rejected]
    speaker = "\n\nAssistant:"  # HH-RLHF
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


def render_text(tokenizer, messages: list, answer_next: bool = False, **options) -> str:
    """A conversation under the chat template, with the generation prompt if answer_next. Raises Drop."""
    options["add_generation_prompt"] = answer_next
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    if "strftime_now" in template:  # the date of the run's start, also when it is resumed
        today = lambda match: repr(RUN_DATE[0].strftime(match[2]))
        call = r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)"""
        options["chat_template"] = re.sub(call, today, template)
    texts = [call["arguments"] for call in tool_calls(messages) if isinstance(call.get("arguments"), str)]
    quoted = [json.dumps(arguments, ensure_ascii=ascii) for arguments in texts for ascii in (True, False)]
    try:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            wants_objects = any(arguments in text for arguments in quoted)
        except Exception:
            if not texts:
                raise
            wants_objects = True
        if wants_objects:
            messages = json.loads(json.dumps(messages))
            for call in tool_calls(messages):
                if isinstance(call.get("arguments"), str):
                    call["arguments"] = json.loads(call["arguments"] or "{}")
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
    except Exception as e:
        raise Drop(f"refused by the chat template ({' '.join(str(e).split())[:60]})") from e


def tool_calls(messages: list) -> list:
    """The calls (name, arguments) of all messages."""
    return [call.get("function", call) for message in messages for call in message.get("tool_calls", ())]


def render(tokenizer, messages: list, answer_next: bool = False, **options) -> list:
    """Ids of `render_text`."""
    return text_ids(tokenizer, render_text(tokenizer, messages, answer_next, **options))


def text_ids(tokenizer, text: str) -> list:
    """Ids of a text that holds its special tokens already."""
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache
def turn_end(tokenizer) -> tuple:
    """The token that ends an assistant's turn, and how many tokens the template writes after it: the first special
    token after the content, found by rendering two answers; where the template marks no end, the end-of-sequence token
    and -1."""
    user, special = [dict(role="user", content="a")], special_tokens(tokenizer)
    one, other = (render(tokenizer, user + as_messages(answer)) for answer in ("b", "c"))
    tail = one[len(one) - shared_prefix(one[::-1], other[::-1]) :]
    ends = [(token, len(tail) - i - 1) for i, token in enumerate(tail) if token in special]
    return ends[0] if ends else (tokenizer.eos_token_id, -1)


def stop_tokens(tokenizer) -> list:
    """Ids that end an answer: the end of an assistant's turn, and the end-of-sequence token."""
    return sorted({turn_end(tokenizer)[0], tokenizer.eos_token_id})


def template_options(row: dict) -> dict:
    """A row's own arguments for the chat template: its tools (a list, or JSON text) and chat_template_kwargs."""
    reserved = {"chat_template", "tokenize", "return_dict", "return_tensors", "add_generation_prompt"}
    options = without_none(row.get("chat_template_kwargs") or {})
    options = {k: v for k, v in options.items() if k not in reserved | {"continue_final_message"}}
    if row.get("tools"):
        options["tools"] = json.loads(row["tools"]) if isinstance(row["tools"], str) else without_none(row["tools"])
    return options


def without_end(tokenizer, messages: list) -> list:
    """Messages less the end-of-sequence token that the assistant's texts may end with already."""
    eos, cut = tokenizer.eos_token, []
    for message in messages:
        is_answer = message["role"] == "assistant"
        cut.append(message | dict(content=message["content"].removesuffix(eos)) if is_answer else message)
    return cut


def refuse_special(tokenizer, *values):
    """Drops a row that holds a special token in any of its texts: data must not be able to end a turn or to begin
    one."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    for token in special_tokens(tokenizer).values():
        if token in text:
            raise Drop(f"special token {token} in the text; write a conversation as messages")


def encode(tokenizer, prompt, responses: list, row: dict, notes: Counter) -> tuple:
    """A prompt and its responses (text or messages), tokenised together; their boundary is the longest prefix that all
    share.

    Returns prompt ids, response ids, and for each response token whether the assistant says it. row may hold tools and
    chat_template_kwargs. Raises Drop."""
    eos, options = tokenizer.eos_token, template_options(row)
    is_text = isinstance(prompt, str) and all(isinstance(r, str) for r in responses)
    replies = [without_end(tokenizer, as_messages(response)) for response in responses]
    refuse_special(tokenizer, prompt, replies, options)
    if not prompt:
        raise Drop("empty prompt")
    if is_text:
        texts = [prompt, *(prompt + reply[0]["content"] + eos for reply in replies)]
        head, *wholes = (plain_ids(tokenizer, text) for text in texts)
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
        # n is before this response's own start if another one's first token has merged with the prompt's last
        if reply[0]["role"] == "assistant" and True in marks:
            marks[n : marks.index(True)] = [True] * (marks.index(True) - n)
    return wholes[0][:n], [whole[n:] for whole in wholes], [marks[n:] for marks in trained]


def plain_ids(tokenizer, text: str) -> list:
    """Ids of a text without a chat template, with the special tokens that the tokenizer adds, but at most one end."""
    ids = tokenizer(text).input_ids
    while ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids.pop()
    return ids


def prompt_ids(tokenizer, prompt: list, options: dict) -> list:
    """Ids of messages up to where the assistant is to speak, or to continue if the last message is an answer that it
    has begun."""
    if prompt[-1]["role"] == "assistant":
        return text_ids(tokenizer, begun_text(tokenizer, prompt, options))
    return render(tokenizer, prompt, True, **options)


def begun_text(tokenizer, messages: list, options: dict) -> str:
    """The text of a conversation whose last message is the beginning of an answer.

    A template that writes something before the answer (an empty thinking block, say) would put it between prompt and
    beginning, where generation never has it; then the beginning follows the generation prompt directly."""
    text, begun = render_text(tokenizer, messages, continue_final_message=True, **options), messages[-1]["content"]
    opening = render_text(tokenizer, messages[:-1], True, **options)
    has_generation_prompt = opening != render_text(tokenizer, messages[:-1], **options)
    start = text.rfind(begun.strip())
    written = text[len(opening) : start] if text.startswith(opening) else "?"
    is_header = any(token in written for token in special_tokens(tokenizer).values())
    if not has_generation_prompt or not written.strip() or is_header:
        return text[:start] + begun.lstrip()  # which templates may trim
    overlap = max(n for n in range(len(begun) + 1) if opening.endswith(begun[:n]))  # both may open the thinking block
    return opening + begun[overlap:]


def encode_turns(tokenizer, messages: list, first: int, options: dict, notes: Counter) -> list:
    """A conversation with the assistant's turns from message `first` on to be trained, each with its end-of-turn token.

    Returns [(ids, trained)], trained one bool per id: one pair for the whole conversation, or one for each turn if the
    template rewrites earlier turns (drops their thinking, say). Raises Drop where generation would never see what
    training sees."""
    turns = []
    for i in range(max(first, 1), len(messages)):  # an assistant's turn that opens the conversation answers nothing
        if messages[i]["role"] == "assistant" and messages[i].get("weight") != 0:
            continues = i == first and messages[i - 1]["role"] == "assistant"
            turns.append((continue_turn if continues else encode_turn)(tokenizer, messages[: i + 1], options, notes))
    if turns and all(turns[-1][0][: len(ids)] == ids for ids, _ in turns):
        whole = turns[-1][0]
        return [(whole, [any(start <= t < len(ids) for ids, start in turns) for t in range(len(whole))])]
    return [(ids, [t >= start for t in range(len(ids))]) for ids, start in turns]


def continue_turn(tokenizer, messages: list, options: dict, notes: Counter) -> tuple:
    """`encode_turn` where the last message continues an answer that the message before it has begun."""
    head = begun_text(tokenizer, messages[:-1], options)
    ids = text_ids(tokenizer, head + messages[-1]["content"]) + [turn_end(tokenizer)[0]]
    return ids, shared_prefix(text_ids(tokenizer, head), ids)


def encode_turn(tokenizer, messages: list, options: dict, notes: Counter) -> tuple:
    """Ids of a conversation up to the end of its last turn, the assistant's, and where that turn begins. Raises
    Drop."""
    prompt, turn, special = messages[:-1], messages[-1], special_tokens(tokenizer)
    text, opening = render_text(tokenizer, messages, **options), render_text(tokenizer, prompt, **options).rstrip()
    # a template may close the prompt with tokens that it writes elsewhere once a reply follows
    while token := next((t for t in special.values() if opening.endswith(t)), ""):
        opening = opening.removesuffix(token).rstrip()
    if not text.startswith(opening):
        raise Drop("the chat template changes the prompt once a reply follows")
    whole, before, reply = ("".join(part.split()) for part in (text, opening, text[len(opening) :]))
    for content in ("".join(message["content"].split()) for message in prompt):
        if content in whole and content not in before:
            raise Drop("the chat template changes the prompt once a reply follows")
        notes["prompt messages that the chat template leaves out"] += content not in whole
    content = "".join(turn["content"].split())
    if content not in reply:
        raise Drop("the chat template leaves out part of the reply")
    if "".join(turn.get("reasoning_content", "").split()) not in reply:
        notes["replies whose reasoning_content the chat template leaves out"] += 1
    words_alone = {k: v for k, v in turn.items() if k != "tool_calls"}
    shows_calls = "tool_calls" in turn and render_text(tokenizer, [*prompt, words_alone], **options) != text
    notes["replies whose tool_calls the chat template leaves out"] += "tool_calls" in turn and not shows_calls
    if not content and not shows_calls:
        raise Drop("the reply is empty but for its end-of-turn token")
    ids, head = end_turn(tokenizer, text_ids(tokenizer, text)), render(tokenizer, prompt, True, **options)
    start = shared_prefix(head, ids)
    if len(ids) - start < 2:
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


def prepare(option: str, name: str, split: str, tokenizer, encode_row, add_columns=None) -> list:
    """All rows that encode_row(row, notes) makes of a data set, with a report: kept, dropped and why, lengths, an
    example.

    add_columns(option, data): the data set with columns that encode_row reads beside its own."""
    data, rows, notes = load_rows(option, name, split), [], Counter()
    data = add_columns(option, data) if add_columns else data
    for number, row in enumerate(tqdm(data, desc="tokenise", leave=False, disable=RANK > 0 or len(data) < 5000)):
        try:
            rows += encode_row(row, notes)
        except Drop as drop:
            notes[f"dropped: {drop}"] += 1
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
            what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            columns = ", ".join(data.column_names)
            hint = f"its columns are {columns}; see 'Reads' in --help"
            fail(f"{option} {name}, row {number} (from 0): not in a known format ({what}); {hint}")
    counts = ", ".join(f"{n} {note}" for note, n in notes.items() if n) or "none dropped, none cut"
    if not rows:
        columns = ", ".join(data.column_names)
        fail(f"{option} {name}: none of its {len(data)} rows can be used ({counts}); its columns are {columns}")
    print0(f"{option} {name}: {len(rows)} rows from {len(data)}; {counts}")
    prompts, responses = [len(row.prompt) for row in rows], [len(r) for row in rows for r in row.responses]
    quantiles = ["/".join(str(sorted(x)[int(q * (len(x) - 1))]) for q in (0.5, 0.95, 1)) for x in (prompts, responses)]
    print0("  tokens (median/95%/most): prompt {}, response {}".format(*quantiles))
    shown = tokenizer.decode(rows[0].prompt)[-200:]
    for is_trained, part in groupby(zip(rows[0].trained[0], rows[0].responses[0]), key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in part])
        shown += f"[[{text[:300]}]]" if is_trained else text[:100]
    print0("  example, [[trained]]: " + shown.replace("\n", "\n  | "))
    return rows


def prepare_split(args, tokenizer, encode_row, by_prompt: bool = True, add_columns=None) -> tuple:
    """Rows to train on, and held-out rows: from --eval-dataset, or a share of --dataset (of its prompts, or, if not
    by_prompt, its rows)."""
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


def count_tokens(row: Row) -> int:
    """Tokens of a row, its prompt counted once."""
    return len(row.prompt) + sum(map(len, row.responses))


def padded_width(row: Row) -> int:
    """Tokens of the longest response with its prompt."""
    return len(row.prompt) + max(map(len, row.responses))


def segment_lengths(row: Row) -> tuple:
    """(length of the first segment, lengths of those that see it): the prompt and its responses; a single response is
    one with its prompt."""
    lengths = [len(response) for response in row.responses]
    return (len(row.prompt) + lengths[0], ()) if len(lengths) == 1 else (len(row.prompt), tuple(lengths))


def pack(rows: list, device) -> tuple:
    """Rows end to end in one sequence. Returns (dict(inputs, source, last), target).

    inputs: of the model; source [N]: positions that predict the trained tokens; last [R]: position of each response's
    last token; target [N]: the trained tokens. inputs["rows"] is for `rows_attention`: the segments' lengths and, for
    FlashAttention, the keys that each segment sees."""
    ids, positions, source, last, target, keys, q_lengths, k_lengths = [], [], [], [], [], [], [], []
    for row in rows:
        start, length, (first, others) = len(ids), len(row.prompt), segment_lengths(row)
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
    tensor = partial(torch.tensor, dtype=torch.long, device=device)
    flash = dict(max_q=max(q_lengths), max_k=max(k_lengths), keys=tensor(keys))
    flash["cu_q"], flash["cu_k"] = (tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (q_lengths, k_lengths))
    attention = dict(segments=[segment_lengths(row) for row in rows], **flash)
    inputs = dict(input_ids=tensor(ids)[None], position_ids=tensor(positions)[None], rows=attention, use_cache=False)
    return dict(inputs=inputs, source=tensor(source), last=tensor(last)), tensor(target)


def pad(rows: list, device) -> tuple:
    """`pack` for a model whose attention cannot follow packed rows: each response with its prompt, padded on the
    right."""
    pairs = [(row.prompt, response, trained) for row in rows for response, trained in zip(row.responses, row.trained)]
    width, ids, mask, source, last, target = max(len(p) + len(r) for p, r, _ in pairs), [], [], [], [], []
    for i, (prompt, response, trained) in enumerate(pairs):
        length, first = len(prompt) + len(response), i * width + len(prompt)
        ids.append(prompt + response + [0] * (width - length))
        mask.append([1] * length + [0] * (width - length))
        source += [first + j - 1 for j, keep in enumerate(trained) if keep]
        target += [token for token, keep in zip(response, trained) if keep]
        last.append(i * width + length - 1)
    tensor = partial(torch.tensor, dtype=torch.long, device=device)
    inputs = dict(input_ids=tensor(ids), attention_mask=tensor(mask), use_cache=False)
    return dict(inputs=inputs, source=tensor(source), last=tensor(last)), tensor(target)


def rows_attention(
    module,
    q,
    k,
    v,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    rows=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Attention over packed rows: a response sees its own prompt and itself. q [1, H, T, D]; k, v [1, G, T, D].

    softcap: of Gemma 2's scores; s_aux [H]: GPT-OSS's sinks, a score beside those of the keys."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings may have promoted them
    options = dict(scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    is_plain = softcap is None and s_aux is None
    fits_flash = q.is_cuda and v.dtype != torch.float32 and q.shape[-1] == v.shape[-1]
    fits_flash = fits_flash and q.shape[-1] in range(8, 257, 8)
    if fits_flash and is_plain and not dropout:  # FlashAttention aligns its causal mask to a segment's last key
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
            options.pop("enable_gqa")  # torch 2.11 groups heads without being asked
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        k, v, lengths = k[rows["keys"]], v[rows["keys"]], [rows[name] for name in ("cu_q", "cu_k", "max_q", "max_k")]
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
    groups, layout, key, responses, tokens = [], pack, segment_lengths, 0, 0
    if not model.packs:
        layout, key = pad, padded_width
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
            values[torch.tensor(indices, device=device)] = found
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
        if tokenizer.eos_token is None:
            raise ValueError("it has no end-of-sequence token, so that no answer could ever end")
        if not tokenizer.chat_template:
            print0(f"note: {name} has no chat template; messages are written as 'role: content{tokenizer.eos_token}'")
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
            probes = [
                shown,
                "Hello,  world!\n 12 + 3 = 15. é 你好 <a>",
                "x<|y|>",
                f"a{tokenizer.eos_token}b {tokenizer.eos_token} c",
            ]
            if any(tokenizer(text).input_ids != reloaded(text).input_ids for text in probes):
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
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(x for x in ropes.values() if isinstance(x, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):  # their angles depend on the longest row of a forward
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", positions
            )
            if args.max_length > original:
                what = f"{name} changes its rotary embeddings beyond {original} tokens"
                fail(f"--max-length {args.max_length}: {what}; set at most {original}")
    for field in ("index_topk", "keep_window_size"):
        if getattr(config, field, None) and args.max_length > getattr(config, field):
            limit = getattr(config, field)  # beyond it transformers' own attention is not causal
            fail(f"--max-length {args.max_length}: {name} attends to {limit} tokens only; set at most {limit}")
    if positions < args.max_length:
        print0(f"note: --max-length {args.max_length} is lowered to the {positions} positions of {name}")
    return min(args.max_length, positions)


def read_model(auto, name: str, tokenizer, **options):
    """A checkpoint with float32 weights; model.stored_dtype is the dtype in which they were stored."""
    with user_input(f"{name}: no model can be loaded from it"):
        options |= dict(attn_implementation="eager", dtype=torch.float32)
        model = auto.from_pretrained(name, use_safetensors=True, **options)  # a pickle could run anything
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
    for method in methods:
        setattr(model, method.__name__, types.MethodType(method, model))
    check_model(model.to(device), name, device, dtype)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    if dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        policy = MixedPrecisionPolicy()
        if dtype == torch.bfloat16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        decoder = model.get_decoder() or model  # of a multimodal model, the part that reads text
        for layer in next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList)):
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for method in methods:
            register_fsdp_forward_method(model, method.__name__)
    return model.train()


@contextlib.contextmanager
def short_windows(model):
    """For the time of a short probe, sliding windows are four tokens long, so that a model that ignores them is found
    out."""
    holders, before = [model.config, model.config.get_text_config(), *model.modules()], []
    for holder in holders:
        for field in ("sliding_window", "attention_chunk_size"):
            if isinstance(vars(holder).get(field), int):
                before.append((holder, field, vars(holder)[field]))
                setattr(holder, field, 4)
    try:
        yield
    finally:
        for holder, field, value in before[::-1]:
            setattr(holder, field, value)


@torch.no_grad()
def check_model(model, name: str, device, dtype):
    """Sets model.packs: whether packed rows give the hidden states of the same rows padded, under the model's own
    attention, on random tokens. Fails where `token_logps` does not give the log-probabilities of the model's own
    logits."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (25,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        Row(ids[:5], [ids[5:9], ids[9:15]], [[True] * 4, [True] * 6], {}),
        Row(ids[15:18], [ids[18:]], [[True] * 7], {}),
    ]
    (padded, target), (packed, _) = pad(rows, device), pack(rows, device)

    def hidden_states(batch):
        return model.base_model(**batch["inputs"]).last_hidden_state.flatten(0, 1)[batch["source"]].float()

    model.eval()
    for kind in dict.fromkeys((torch.float32, dtype)):  # float32 shows small differences, bfloat16 has FlashAttention
        is_float32 = kind == torch.float32
        model.set_attn_implementation("eager")
        with torch.autocast(device.type, kind, enabled=not is_float32), short_windows(model):
            theirs = hidden_states(padded)
            if hasattr(model, "token_logps"):
                is_known = isinstance(model.get_output_embeddings(), torch.nn.Linear)
                if is_known:
                    logits = model(**padded["inputs"]).logits.flatten(0, 1)[padded["source"]].float()
                    own = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
                    gap = (model.token_logps(**padded, target=target)[0] - own).abs().max()
                if not is_known or not gap < (1e-3 if is_float32 else 0.1):
                    fail(f"{name}: the output layer of {type(model).__name__} does more than this script knows")
            try:
                model.set_attn_implementation("packed_rows")
                difference = (hidden_states(packed) - theirs).norm() / theirs.norm()
                model.packs, why = bool(difference < (1e-3 if is_float32 else 0.05)), f"difference {difference:.1g}"
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, TypeError, RuntimeError, ValueError) as e:
                model.packs, why = False, f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        if not model.packs:
            break
    if not model.packs:
        model.set_attn_implementation("eager")
        print0(f"note: {type(model).__name__} cannot follow packed rows ({why}); they are padded, which is slower")


# ---- runs: ranks, the output directory, checkpoints, metrics

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RECEIVED = []  # the signals that asked this process to stop
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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif torch.version.cuda:
        print0("note: this build of torch has CUDA but finds no device (is the driver too old?); training on the CPU")
    is_bfloat16 = args.dtype == "bfloat16" or args.dtype == "auto" and device.type == "cuda"
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    if WORLD > 1 or dtype == torch.bfloat16:  # FSDP's mixed precision, for one rank as for many
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if WORLD == 1 else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2), **alone)
    torch.manual_seed(args.seed)
    return device, dtype


def over_ranks(values, op=dist.ReduceOp.SUM):
    """The sum (or maximum) over all ranks."""
    if WORLD > 1:
        dist.all_reduce(values, op)
    return values


def add_scalars(sums: dict, logged: dict, weight: float):
    """Adds weighted scalars to running sums, by name; they stay on the device."""
    for name, value in logged.items():
        sums[name] = sums.get(name, 0) + weight * value.detach()


def sum_over_ranks(sums: dict) -> dict:
    """The sums over all ranks as numbers, with one synchronisation for all."""
    return dict(zip(sums, over_ranks(torch.stack([*sums.values()])).tolist()))


def check_numbers(args, above_zero: tuple = (), at_most_one: tuple = (), signed: tuple = ()):
    """Fails on a number that is out of range. Counts are at least 1, shares at most 1, others at least 0 unless they
    are signed."""
    counts = {"epochs", "batch_size", "tokens_per_forward", "max_length"}
    counts |= {"vocab_size", "hidden_size", "num_layers", "num_heads"}  # sft.py --from-scratch
    for name, value in asdict(args).items():
        needed = ""
        if isinstance(value, float) and not math.isfinite(value):
            needed = "a finite number"
        elif name in counts and value < 1:
            needed = "1 or more"
        elif name in ("max_grad_norm", *above_zero) and value <= 0:
            needed = "above 0"
        elif name in ("warmup_ratio", *at_most_one) and value > 1:
            needed = "at most 1"
        elif name == "eval_fraction" and value >= 1:
            needed = "below 1"
        elif isinstance(value, (int, float)) and value < 0 and name not in signed:
            needed = "0 or more"
        if needed:
            fail(f"--{name.replace('_', '-')} {value}: must be {needed}")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs wandb, which is not installed (pip install wandb)")


def fingerprint(path: Path) -> str:
    """Names and sizes of a file, or of a directory's files without those of the run that wrote it, and a hash of both
    ends of each."""
    digest, files = hashlib.sha256(), [path]
    if path.is_dir():
        parts = lambda file: file.relative_to(path).parts
        is_input = lambda file: (
            not RUN_FILES & {*parts(file)} and not parts(file)[0].startswith(("checkpoint-", "saving"))
        )
        files = sorted(file for file in path.rglob("*") if file.is_file() and is_input(file))
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as f:
            digest.update(f"{file.name} {size}".encode() + f.read(2**24))
            f.seek(max(f.tell(), size - 2**24))
            digest.update(f.read())
    return digest.hexdigest()[:16]


RUN_FILES = {"args.json", "metrics.jsonl", "curves.png", "report.json", "test_time.png", "value", "wandb"}
# options that change no result
FREE_OPTIONS = {
    "resume",
    "overwrite",
    "track",
    "output_dir",
    "save_every",
    "tokens_per_forward",
    "sample_tokens",
    "gradient_checkpointing",
}


def open_run(args, *inputs) -> tuple:
    """The output directory, the checkpoint to resume from or None, and the run's signature: its arguments and
    fingerprints of its inputs.

    Ends the program where a finished run of the same arguments stands. Two runs, or a run and its inputs, are never
    mixed in a directory."""
    out, error, last, signature, date = Path(args.output_dir), None, None, None, RUN_DATE[0]
    if RANK == 0:  # one rank looks, so that all do the same
        with user_input(f"--output-dir {out}: cannot be used"):
            paths = [Path(split_name(name)[0]) for name in inputs if name]
            files = [path for path in paths if path.exists()]
            signature = {k: v for k, v in asdict(args).items() if k not in FREE_OPTIONS}
            signature |= {f"content of {file}": fingerprint(file) for file in files}
            signature = json.loads(json.dumps(signature))  # tuples become lists, as in the file
            record = out / "args.json"
            before = json.loads(record.read_text()) if args.resume and record.exists() else None
            is_used = out.exists() and any(file.suffix != ".part" for file in out.iterdir())  # a write that was killed
        checkpoints = [d for d in out.glob("checkpoint-*") if d.name[11:].isdigit()]
        if any(out.resolve() in (file.resolve(), *file.resolve().parents) for file in files):
            error = f"--output-dir {out}: holds what the run reads; choose another"
        elif before:
            old = before.get("signature", {})
            names = sorted(name for name in {*old, *signature} if old.get(name) != signature.get(name))
            changed = "; ".join(f"{name} was {old.get(name)!r} and is {signature.get(name)!r}" for name in names)
            if changed:
                error = f"--resume: {out} holds another run ({changed[:500]}); choose another --output-dir"
            date = datetime.fromisoformat(before.get("date", date.isoformat()))
            last = str(max(checkpoints, key=lambda d: int(d.name[11:]))) if checkpoints else None
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
    return out, Path(last) if last else None, signature


def clear_run(args, out: Path, signature: dict):
    """Removes what an earlier run wrote and writes args.json. Call it when all input has been read. An older model
    stays until the new one is saved."""
    if RANK == 0:
        with user_input(f"--output-dir {out}: cannot be written"):
            out.mkdir(parents=True, exist_ok=True)
            for stale in (*out.glob("checkpoint-*"), *out.glob("saving*")):
                shutil.rmtree(stale)
            for stale in ("metrics.jsonl", "report.json", "test_time.png"):
                (out / stale).unlink(missing_ok=True)
            versions = dict(torch=torch.__version__, transformers=transformers.__version__, ranks=WORLD)
            record = dict(
                script=Path(__file__).name, finished=False, date=RUN_DATE[0].isoformat(), args=asdict(args), **versions
            )
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


def peak_memory(device) -> int:
    """Peak memory of this process in MB: the device's, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


# ---- training: the optimiser's step, signals, checkpoints, metrics, the finished model


def make_optimizer(model, args):
    """AdamW; matrices decay, vectors (norms, biases) do not. Make it before the first forward, after which FSDP's root
    holds gathered weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def check_first_step(name: str, value: float, theory: float, dtype, scale: float):
    """Fails where a value is not what theory says before the first update: then two forward passes differ."""
    if not abs(value - theory) < (1e-4 if dtype == torch.float32 else 0.05) * scale:
        fail(f"{name} is {value:.4f} before the first update, not {theory:.4f}: this model's forward pass is wrong")


def take_step(model, optimizer, args, step: int, steps: int, peak_rate: float | None = None) -> tuple:
    """One clipped step on the gradients at hand; returns the gradients' norm, and the learning rate that the schedule
    makes of its peak (--learning-rate unless another one is given)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        fail(f"step {step + 1}: the norm of the gradients is {norm}; lower --learning-rate, or try --dtype float32")
    warmup = max(1, round(args.warmup_ratio * steps))
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    # the cosine falls from 1 to 0.1
    decay = dict(cosine=0.55 + 0.45 * math.cos(math.pi * done), linear=1 - done, constant=1.0)[args.lr_schedule]
    peak_rate = args.learning_rate if peak_rate is None else peak_rate
    learning_rate = peak_rate * (min(1.0, (step + 1) / warmup) * decay)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm, learning_rate


def announce(models: list, args, work: str, device, dtype):
    """Prints the run in two lines. A parameter takes 16 bytes: weight, gradient, and AdamW's two moments."""
    count, limit = sum(p.numel() for model in models for p in model.parameters()), args.tokens_per_forward
    names = " and ".join(type(model).__name__ for model in models)
    print0(f"model: {names}, {count / 1e6:.2f} M parameters, {16 * count >> 20} MB with AdamW")
    print0(f"training: {work}, at most {limit} tokens a forward, on {WORLD} x {device.type} in {str(dtype)[6:]}")


def catch_signals():
    """From now on SIGTERM and Ctrl-C let the step end, save and stop; a second one ends the program at once."""

    def note(number, frame):
        RECEIVED.append(number)
        signal.signal(number, signal.SIG_DFL)

    if __name__ == "__main__":  # a program that imports the script handles its own signals
        signal.signal(signal.SIGTERM, note)
        signal.signal(signal.SIGINT, note)


def is_due(every: int, done: int, steps: int) -> bool:
    """Whether something that happens every so many steps (0: only at the end) happens after this one."""
    return done == steps or every > 0 and done % every == 0


def should_save(args, done: int, steps: int, device) -> bool:
    """Whether to save after so many steps: because of --save-every, or because a signal asked any rank to stop
    (args.stopping)."""
    args.stopping = bool(over_ranks(torch.tensor(len(RECEIVED), device=device)))
    return done < steps and (args.stopping or args.save_every > 0 and done % args.save_every == 0)


def save_model(directory: Path, model, tokenizer, dtype):
    """A plain Hugging Face directory: config, safetensors, tokenizer with its template, generation_config with every
    stop token."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options) if dist.is_initialized() else model.state_dict()
    for tied in (model._tied_weights_keys or ()) if model.config.tie_word_embeddings else ():
        weights.pop(tied, None)
    if RANK > 0:
        return
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        generation.eos_token_id = sorted(
            {*stop_tokens(tokenizer), *(i for i in known if i is not None and i < len(tokenizer))}
        )
        generation.pad_token_id = tokenizer.pad_token_id if generation.pad_token_id is None else generation.pad_token_id
        if generation.temperature == 0:  # greedy, which transformers writes as do_sample false alone
            generation.temperature = None
        sampling = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
        if any(getattr(generation, field, None) is not None for field in sampling):
            generation.do_sample = True  # without it save_pretrained refuses such a setting
    config, before = model.config, (model.config.dtype, model.config._attn_implementation)
    config.dtype, config._attn_implementation = dtype, None
    model.save_pretrained(
        directory, state_dict={k: v.to("cpu", dtype) if v.is_floating_point() else v for k, v in weights.items()}
    )
    config.dtype, config._attn_implementation = before
    # save_pretrained has written the dtype of the training there
    saved = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", saved | dict(dtype=str(dtype).removeprefix("torch.")))
    save_tokenizer(tokenizer, directory)


def save_checkpoint(args, directory: Path, models: dict, optimizers: dict, state: dict):
    """checkpoint-N/: loadable models with the training state beside them, written elsewhere and then renamed.

    models: subdirectory ("" for the main one) -> (model, tokenizer); optimizers: by the same keys; state: numbers,
    lists, tensors."""
    part, options = directory.with_name("saving"), dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    for model, _ in models.values():
        if hasattr(model, "reshard"):  # a forward without a backward, as in an evaluation, leaves FSDP's root gathered
            model.reshard()
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)  # what a killed save left
    # an optimiser that has made no step has no state, and would make a step to get one
    moments = {
        k: dcp.get_optimizer_state_dict(models[k][0], o, options=options) for k, o in optimizers.items() if o.state
    }
    with user_input(
        f"{directory}: cannot be written; what was saved before stands; make room, then continue with --resume"
    ):
        for name, (model, tokenizer) in models.items():
            save_model(part / name, model, tokenizer, torch.float32)
        if RANK == 0:
            dtypes = {name: str(model.stored_dtype).removeprefix("torch.") for name, (model, _) in models.items()}
            torch.save(state | dict(optimizers=moments, dtypes=dtypes), part / "state.pt")
            os.replace(part, directory)
    if WORLD > 1:
        dist.barrier()
    if args.stopping:
        print0(f"\nstopped after step {state['step']}, as asked; the same command with --resume continues")
        sys.exit(128 + (RECEIVED or [signal.SIGTERM])[0])


def load_checkpoint(directory: Path, models: dict, optimizers: dict) -> dict:
    """The training state of a checkpoint whose models are loaded already; cuts metrics.jsonl back to its step."""
    state = torch.load(directory / "state.pt", weights_only=True, mmap=True)
    for name, moments in state.pop("optimizers").items():
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_optimizer_state_dict(models[name][0], optimizers[name], moments, options=options)
    for name, dtype in state.pop("dtypes").items():
        models[name][0].stored_dtype = getattr(torch, dtype)
    if RANK == 0:
        log = directory.parent / "metrics.jsonl"
        lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]
        log.with_suffix(".part").write_text(
            "".join(line for line in lines if json.loads(line)["step"] <= state["step"])
        )
        os.replace(log.with_suffix(".part"), log)
    print0(f"resuming {directory.parent} after step {state['step']}")
    return state


@lru_cache(4)
def epoch_order(n: int, epoch: int, seed: int) -> list:
    """The order of an epoch: a pure function of seed and epoch, so that a resumed run finds its place."""
    return random.Random(f"{seed}-{epoch}").sample(range(n), n)


def batch_rows(rows: list, args, step: int, size: int = 0) -> list:
    """The rows of a step, counted from 0: --batch-size of them unless a size is given."""
    size = size or args.batch_size
    epoch, at = divmod(step, math.ceil(len(rows) / size))
    return [rows[i] for i in epoch_order(len(rows), epoch, args.seed)[at * size : (at + 1) * size]]


def progress(name: str, first: int, steps: int):
    """The steps of the training loop, with a progress bar on a terminal; elsewhere `log_metrics` prints lines."""
    disable = RANK > 0 or not sys.stderr.isatty()
    return tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=disable)


def log_metrics(args, out: Path, metrics: dict, bar):
    """Writes a line of metrics.jsonl and shows progress: on the bar, or, where there is no terminal, as a line every
    half minute."""
    if RANK > 0:
        return
    names = ("loss", "reward", "objective/scores", "kl", "objective/kl", "rewards/accuracies", "accuracy")
    names += ("mean_token_accuracy", "tokens_per_second")
    shown = {
        name: f"{metrics[name]:.3g}" for name in names if name in metrics and (metrics["step"] > 1 or name == "loss")
    }
    bar.set_postfix(shown, refresh=False)
    if metrics["step"] == 1:
        bar.write(f"memory: {metrics['peak_memory_mb']} MB at the peak of the first step")
    if bar.disable and metrics["seconds"] - getattr(bar, "printed_at", 0.0) > 30:
        bar.printed_at = metrics["seconds"]
        print(f"step {metrics['step']} of {bar.total}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    with user_input(f"{out}/metrics.jsonl: cannot be written"), (out / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(metrics) + "\n")
    if args.track:
        import wandb

        if wandb.run is None:
            wandb.init(name=os.environ.get("WANDB_NAME", args.output_dir), config=asdict(args), dir=str(out))
        wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])


def finish_run(out: Path, models: dict, curves: list):
    """Writes the models into their places and curves.png, then says in args.json that the run is finished."""
    with user_input(f"{out}: cannot be written; make room, then continue with --resume"):
        part = out / "saving"
        if RANK == 0:
            shutil.rmtree(part, ignore_errors=True)  # what a killed save left
        for name, (model, tokenizer) in models.items():
            save_model(part / name, model, tokenizer, model.stored_dtype)
        if RANK == 0:
            for name in models:
                (out / name).mkdir(exist_ok=True)
                files = [file for file in (part / name).iterdir() if file.is_file()]
                for file in files:
                    os.replace(file, out / name / file.name)
                for stale in {*(out / name).glob("*.safetensors*")} - {out / name / file.name for file in files}:
                    stale.unlink()  # of an older model in other shards
            shutil.rmtree(part)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
            draw_curves(out / "curves.png", lines, curves)
            write_json(out / "args.json", json.loads((out / "args.json").read_text()) | dict(finished=True))
            held_out = ", ".join(
                f"{name[5:]} {value:.4g}" for name, value in lines[-1].items() if name.startswith("eval_")
            )
            print(f"done: {out} after {lines[-1]['seconds']:.0f} s" + (f"; held out: {held_out}" if held_out else ""))
    if dist.is_initialized():
        dist.destroy_process_group()


def draw_curves(path: Path, lines: list, names: list):
    """A picture of metrics over steps: each as a light line under its running mean, held-out values as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in names if any(name in line for line in lines)]
    columns = math.ceil(len(names) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 5), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names):
        steps, values = zip(*[(line["step"], line[name]) for line in lines if name in line])
        window = max(1, len(values) // 20)
        means = [sum(values[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(values))]
        axis.plot(steps, values, color="tab:blue", alpha=0.3)
        axis.plot(steps, means, color="tab:blue", label="training")
        held_out = [(line["step"], line[f"eval_{name}"]) for line in lines if f"eval_{name}" in line]
        if held_out:
            axis.plot(*zip(*held_out), "o", color="tab:orange", label="held out")
            axis.legend()
        axis.ticklabel_format(useOffset=False)
        axis.set(title=name, xlabel="optimiser step")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(args)
    except torch.OutOfMemoryError as e:
        fail(f"out of memory; --help lists the options that save memory ({str(e)[:150]})")
