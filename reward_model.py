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
import resource
import shutil
import tempfile
import time
import types
from array import array
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
from torch.nn.attention.varlen import varlen_attn
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
    pairs = to_device([pair for row in rows for pair in row.extra["pairs"]], scores.device)  # of all rows, [P, 4]
    pairs = pairs.split([len(row.extra["pairs"]) for row in rows])
    losses = []
    for row, s, own in zip(rows, scores.split([len(row.responses) for row in rows]), pairs):  # s [K], own [P, 4]
        (better, worse), (probability, margin) = own.T[:2].long(), own.T[2:]
        if args.loss == "plackett-luce":
            loss = plackett_luce_loss(s, to_device(row.extra["ranks"], s.device))
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
    better, worse = to_device([better, worse], scores.device)
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
        if should_save(args, step + 1, steps):
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
        texts = {side: tokenizer.decode([*pair[side]])[:200] for side in ("better", "worse")}
        report["examples"].append(dict(gap=pair["gap"], prompt=tokenizer.decode([*pair["row"].prompt])[-200:]) | texts)
        print(f"  gap {pair['gap']:+.2f}: better {texts['better'][:90]!r} worse {texts['worse'][:90]!r}")
    return report


# ============================== every block below stands word for word in all scripts that have it ================
# Functions and parameters that this script does not use are used by another one.
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


# ---- training: the optimiser's step, metrics, signals, checkpoints, the finished model

# signal: the one that asked this process to stop; agreed: whether all ranks know that one of them was asked
STOP = types.SimpleNamespace(signal=0, agreed=False)


def make_optimizer(model, args):
    """AdamW; vectors (norms, biases) do not decay. Make it while the weights are sharded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def announce(models: list, args, work: str, device, dtype):
    """Prints the run in two lines. A trained parameter takes 16 bytes (weight, gradient, AdamW's two moments), a frozen
    one 4."""
    parameters, limit = [p for model in models for p in model.parameters()], args.tokens_per_forward
    count, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    names = " and ".join(type(model).__name__ for model in models)
    print0(f"model: {names}, {count / 1e6:.2f} M parameters, {4 * count + 12 * trained >> 20} MB with AdamW")
    print0(f"training: {work}, at most {limit} tokens a forward, on {WORLD} x {device.type} in {str(dtype)[6:]}")


@lru_cache(4)
def epoch_order(n: int, epoch: int, seed: int) -> list:
    """The order of an epoch: a pure function of seed and epoch, so that a resumed run finds its place."""
    return random.Random(f"{seed}-{epoch}").sample(range(n), n)


def batch_rows(rows: list, args, step: int, size: int = 0) -> list:
    """The rows of a step, counted from 0: --batch-size of them unless a size is given."""
    size = size or args.batch_size
    epoch, at = divmod(step, math.ceil(len(rows) / size))
    return [rows[i] for i in epoch_order(len(rows), epoch, args.seed)[at * size : (at + 1) * size]]


def take_step(model, optimizer, args, step: int, steps: int, peak_rate: float | None = None) -> tuple:
    """One clipped step; returns the gradients' norm and the scheduled learning rate (peak: --learning-rate if None)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        fail(f"step {step + 1}: the norm of the gradients is {norm}; lower the learning rate, or try --dtype float32")
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


def add_scalars(sums: dict, logged: dict, weight: float):
    """Adds weighted scalars to running sums, by name; they stay on the device."""
    for name, value in logged.items():
        sums[name] = sums.get(name, 0) + weight * value.detach()


def sum_over_ranks(sums: dict) -> dict:
    """The sums over all ranks as numbers, in one transfer, which also tells whether a signal asked any rank to stop."""
    values = torch.stack([*sums.values()])
    *values, stop = over_ranks(torch.cat([values, values.new_full((1,), STOP.signal)])).tolist()
    STOP.agreed = stop > 0
    return dict(zip(sums, values))


def check_first_step(name: str, value: float, theory: float, dtype, scale: float):
    """Fails where a value is not what theory says before the first update: then two forward passes differ."""
    if not abs(value - theory) < (1e-4 if dtype == torch.float32 else 0.05) * scale:
        fail(f"{name} is {value:.4f} before the first update, not {theory:.4f}: this model's forward pass is wrong")


def peak_memory(device) -> int:
    """Peak memory of this process in MB: the device's, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def progress(name: str, first: int, steps: int):
    """The steps of the training loop, with a progress bar on a terminal; elsewhere `log_metrics` prints lines."""
    disable = RANK > 0 or not sys.stderr.isatty()
    return tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=disable)


def log_metrics(args, out: Path, metrics: dict, bar):
    """Writes a line of metrics.jsonl; shows progress on the bar or, without a terminal, as a line every half minute."""
    if RANK > 0:
        return
    names = "loss reward objective/scores kl objective/kl rewards/accuracies accuracy mean_token_accuracy".split()
    if metrics["step"] == 1:
        names = [name for name in names if "accura" not in name]  # as yet all answers may be tied
    if metrics["step"] == min(2, bar.total):  # the second step is the first with the optimiser's state
        bar.write(f"memory: {metrics['peak_memory_mb']} MB at the peak so far")
    # three significant digits
    shown = {k: f"{float(f'{metrics[k]:.3g}'):g}" for k in (*names, "tokens_per_second") if k in metrics}
    bar.set_postfix(shown, refresh=False)
    if bar.disable and metrics["seconds"] - getattr(bar, "printed_at", 0.0) > 30:
        bar.printed_at = metrics["seconds"]
        print0(f"step {metrics['step']} of {bar.total}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    with user_input(f"{out}/metrics.jsonl: cannot be written"), (out / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(metrics) + "\n")
    if args.track:
        import wandb

        if wandb.run is None:
            wandb.init(name=os.environ.get("WANDB_NAME", args.output_dir), config=asdict(args), dir=str(out))
        wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])


def catch_signals():
    """From now on SIGTERM and Ctrl-C let the step end, save and stop; a second one ends the program at once."""

    def note(number, frame):
        STOP.signal = number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    if __name__ == "__main__":  # a program that imports the script handles its own signals
        signal.signal(signal.SIGTERM, note)
        signal.signal(signal.SIGINT, note)


def is_due(every: int, done: int, steps: int) -> bool:
    """Whether something that happens every so many steps (0: only at the end) happens after this one."""
    return done == steps or every > 0 and done % every == 0


def should_save(args, done: int, steps: int) -> bool:
    """Whether to save after so many steps: because of --save-every, or because a signal asked to stop."""
    return done < steps and (STOP.agreed or is_due(args.save_every, done, steps))


def save_model(directory: Path, model, tokenizer, dtype):
    """A Hugging Face directory: config, safetensors, tokenizer and template, generation_config with all stop tokens."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options) if dist.is_initialized() else model.state_dict()
    for tied in model.all_tied_weights_keys:  # without those that the parent stores apart
        weights.pop(tied, None)
    if RANK > 0:
        return
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        known = [token for token in known if token is not None and token < len(tokenizer)]
        generation.eos_token_id = sorted({*stop_tokens(tokenizer), *known})
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
        if generation.temperature == 0:  # greedy, which transformers writes as do_sample false alone
            generation.temperature = None
        try:
            generation.validate(strict=True)
        except ValueError:  # save_pretrained refuses sampling options without do_sample
            generation.do_sample = True
    weights = {name: w.to("cpu", dtype) if w.is_floating_point() else w for name, w in weights.items()}
    model.save_pretrained(directory, state_dict=weights)
    # save_pretrained has written the dtype of the training
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | dict(dtype=str(dtype)[6:]))
    save_tokenizer(tokenizer, directory)


def save_models(directory: Path, models: dict, dtype=None):
    """All models of a run in their subdirectories, in the dtype of each one's parent unless another is given."""
    if RANK == 0:
        shutil.rmtree(directory, ignore_errors=True)  # what a killed save left
    for name, (model, tokenizer) in models.items():
        save_model(directory / name, model, tokenizer, dtype or model.stored_dtype)


def save_checkpoint(args, directory: Path, models: dict, optimizers: dict, state: dict):
    """checkpoint-N/: loadable models with the training state beside them, written elsewhere and then renamed.

    models: subdirectory ("" for the main one) -> (model, tokenizer); optimizers: by the same keys."""
    part, options = directory.with_name("saving"), dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    for model, _ in models.values():
        if hasattr(model, "reshard"):  # a forward without a backward, as in an evaluation, leaves FSDP's root gathered
            model.reshard()
    state = state | dict(optimizers={}, dtypes={name: model.stored_dtype for name, (model, _) in models.items()})
    for name, optimizer in optimizers.items():
        if optimizer.state:  # one that has made no step would make one to get a state
            moments = dcp.get_optimizer_state_dict(models[name][0], optimizer, options=options)
            state["optimizers"][name] = moments
    with user_input(f"{directory}: cannot be written; make room, then continue with --resume"):
        save_models(part, models, torch.float32)
        if RANK == 0:
            torch.save(state, part / "state.pt")
            os.replace(part, directory)
    if WORLD > 1:
        dist.barrier()
    if STOP.agreed:
        print0(f"\nstopped after step {state['step']}, as asked; the same command with --resume continues")
        sys.exit(128 + (STOP.signal or signal.SIGTERM))


def load_checkpoint(directory: Path, models: dict, optimizers: dict) -> dict:
    """The training state of a checkpoint whose models are loaded already; cuts metrics.jsonl back to its step."""
    with user_input(f"--resume: {directory / 'state.pt'}: cannot be read"):
        state = torch.load(directory / "state.pt", weights_only=True, mmap=True)
    for name, moments in state.pop("optimizers").items():
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_optimizer_state_dict(models[name][0], optimizers[name], moments, options=options)
    for name, dtype in state.pop("dtypes").items():
        models[name][0].stored_dtype = dtype
    if RANK == 0:
        log, part = (directory.with_name(f"metrics.{suffix}") for suffix in ("jsonl", "part"))
        part.write_text("".join(log.read_text().splitlines(True)[: state["step"]]))  # a line for each step
        os.replace(part, log)
    print0(f"resuming {directory.parent} after step {state['step']}")
    return state


def finish_run(out: Path, models: dict, curves: list):
    """Writes the models into their places and curves.png, then says in args.json that the run is finished."""
    part = out / "saving"
    with user_input(f"{out}: cannot be written; make room, then continue with --resume"):
        save_models(part, models)
        if RANK == 0:
            for name in models:
                (out / name).mkdir(exist_ok=True)
                for stale in (out / name).glob("*.safetensors*"):  # of an older model, which may have other shards
                    stale.unlink()
            for file in [file for file in part.rglob("*") if file.is_file()]:
                place = out / file.relative_to(part)
                place.parent.mkdir(exist_ok=True)  # a tokenizer's folder of further chat templates
                os.replace(file, place)
            shutil.rmtree(part)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
            draw_curves(out / "curves.png", lines, curves)
            write_json(out / "args.json", json.loads((out / "args.json").read_text()) | dict(finished=True))
            held_out = [f"{name[5:]} {value:.4g}" for name, value in lines[-1].items() if name.startswith("eval_")]
            results = f"; held out: {', '.join(held_out)}" if held_out else ""
            print(f"done: {out} after {lines[-1]['seconds']:.0f} s{results}")
    if dist.is_initialized():
        dist.destroy_process_group()


def draw_curves(path: Path, lines: list, names: list):
    """A picture of the metrics that change: each as a light line under its running mean, held-out values as dots."""
    from matplotlib.figure import Figure

    logged = [name for name in names if any(name in line for line in lines)]
    names = [name for name in logged if len({line[name] for line in lines if name in line}) > 1] or logged
    columns = math.ceil(len(names) / 2)
    figure = Figure(figsize=(3.6 * columns, 5), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for axis, name in zip(axes.flat, names):
        steps, values = zip(*[(line["step"], line[name]) for line in lines if name in line])
        totals, starts = [0.0, *accumulate(values)], [max(0, i - len(values) // 20) for i in range(len(values))]
        means = [(totals[i + 1] - totals[start]) / (i + 1 - start) for i, start in enumerate(starts)]
        axis.plot(steps, values, color="tab:blue", alpha=0.3, marker="." if len(values) < 20 else "")
        axis.plot(steps, means, color="tab:blue", label="training")
        held_out = [(line["step"], line[f"eval_{name}"]) for line in lines if f"eval_{name}" in line]
        if held_out:
            axis.plot(*zip(*held_out), "o", color="tab:orange", label="held out")
            axis.legend()
        axis.ticklabel_format(useOffset=False)
        axis.set(xlabel="step", ylabel=name)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main(args)
    except torch.OutOfMemoryError as e:
        fail(f"out of memory; --help lists the options that save memory ({str(e)[:150]})")
