# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11,<=2.13.0", "transformers>=5.17,<5.40", "datasets>=4", "tyro>=1.0", "wandb", "matplotlib", "tqdm"
# ]
# ///
"""Proximal policy optimisation: reinforcement learning of a language model from any reward of its answers.

    objective(pi) = E [ r(x, y) - beta log( pi(y|x) / ref(y|x) ) ] + gamma E_ptx [ log pi(x) ]        InstructGPT, eq. 2
    L(pi) = -E_t min( rho_t A_t, clip(rho_t, 1 - e, 1 + e) A_t ),  rho_t = pi(a_t|s_t) / pi_old(a_t|s_t)    PPO, eq. 7
    A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                   GAE, eq. 16

Ouyang et al. 2022, arXiv 2203.02155; Schulman et al. 2017, arXiv 1707.06347; Schulman et al. 2016, arXiv 1506.02438.
Every token of an answer is an action. Its reward r_t is -beta log(pi_old/ref), and for the last one also r(x, y), fixed
while the policy is updated. The value model V learns the returns. Eq. 2's gamma is --ptx-coef; eq. 16's is --gamma,
which is 1 in InstructGPT.

Departures from the paper
  1. InstructGPT states neither lambda nor a value clip. Lambda 0.95, the clipped value loss and whitened advantages are
     those of OpenAI's lm-human-preferences. The moving average of InstructGPT's weights is left out.
  2. An answer without a stop token is worth --missing-eos-score, whatever its reward.
  3. The temperature of sampling is part of every log-probability of an answer.

Options, all off by default
  4. --ptx-dataset, --ptx-coef: keeps up the likelihood of other text (PPO-ptx; with SFT data, ChatGLM's regulariser).
  5. --reference-baseline: r less the reward of the reference's own greedy answer (ChatGLM-RLHF, arXiv 2404.00934).
  6. --critic-warmup, --value-clip 0, --no-whiten-advantages, --lam 0.99, --condition: InternLM2 (arXiv 2403.17297).
  7. --reward-constant, --train-last-layers: Starling's length control, and its contrast to training all weights.

Reads prompts: a column prompt or question, or preferences, of which only the prompt is used. The rewards are reward
models, Python functions, answers to match, or a judge: with --rubric, GPT-4's rule-based reward model; without, direct
RLAIF (Lee et al. 2023, arXiv 2309.00267). Writes a Hugging Face directory, args.json, metrics.jsonl and curves.png to
the output directory, and the value model to value/ in it.

  python ppo.py --model runs/sft --dataset data/grid/prompts.jsonl --rewards runs/reward_model --learning-rate 1e-4 \\
    --value-learning-rate 1e-3 --kl-coef 0.2 --max-new-tokens 24                                        the grid world
  python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback-prompt --rewards runs/rm \\
    --max-new-tokens 512                                                                                one GPU
  torchrun --nproc-per-node 8 ppo.py --model Qwen/Qwen2.5-7B-Instruct --dataset trl-lib/ultrafeedback-prompt \\
    --rewards runs/rm --max-new-tokens 512 --gradient-checkpointing                                     many GPUs

  Metric                  at step 1  then           if not
  objective/scores        -          rises          flat: lower --kl-coef, or raise the learning rates
  objective/kl            0          levels off     above 10: the policy exploits the reward; raise --kl-coef
  policy/approxkl_avg     small      below 0.02     above 0.05: lower --learning-rate or --ppo-epochs
  policy/entropy_avg      1 to 2     falls slowly   near 0: collapsed; raise --kl-coef
  val/explained_variance  any        rises          below 0 for long: --critic-warmup, or raise --value-learning-rate
  val/share_eos           -          rises          falls: answers run into --max-new-tokens; lower --missing-eos-score
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
    """policy to start from: hub id or directory"""
    dataset: str
    """prompts: hub id (name, name:config, name:config:split or name::split), .jsonl/.json/.parquet file (also .gz), or
    directory"""
    rewards: tuple[str, ...]
    """SOURCE[=WEIGHT] ..., whose weighted sum is the reward; weight 0 only measures. SOURCE: a reward model (hub id or
    directory), file.py:function, match:number, match:boxed, match:hash, match:REGEX, format, or judge:MODEL"""
    rubric: str = ""
    """JSON file {"question": text, "options": {"A": text, ...}, "reward": {kind: {"A": number, ...}}} for the judge
    (empty, or a question alone: a score of 1 to 10)"""
    condition: str = ""
    """JSON file {kind: system prompt}; the reward models read it before the prompts of that kind (InternLM2)"""
    output_dir: str = "runs/ppo"
    """where the checkpoint, metrics and curves go"""
    # --- method
    kl_coef: float = 0.05
    """beta, strength of the pull to the reference (InstructGPT: 0.02; InternLM2: 0.01)"""
    max_kl: float = 0.0
    """end the run after the batch whose answers' KL to the reference exceeds this, and save the policy (0: never)"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """lambda of GAE (InternLM2: 0.99)"""
    clip: float = 0.2
    """epsilon of the policy's ratio"""
    value_clip: float = 0.2
    """largest change of a value from its old one that lowers its loss, in units of the reward (0: no clipping, as
    InternLM2)"""
    ppo_epochs: int = 4
    """passes over each batch of answers (InstructGPT: 1)"""
    num_minibatches: int = 1
    """optimiser steps per pass (InstructGPT: 8 of 64 answers)"""
    whiten_advantages: bool = True
    """give the advantages of a batch mean 0 and variance 1"""
    critic_warmup: int = 0
    """number of first batches that train the value model only (InternLM2: 50)"""
    reward_constant: float = 0.0
    """added to the reward of every answer that ends (Starling, which does not publish its value)"""
    reference_baseline: bool = False
    """subtract the reward of the reference's own greedy answer to the prompt (ChatGLM)"""
    missing_eos_score: float = -1.0
    """what an answer without a stop token is worth; choose it below the scores of answers that end"""
    train_last_layers: int = 0
    """train only this many last layers of policy and value model (0: all weights)"""
    reference: str = ""
    """the model that the KL is measured to (empty: --model)"""
    value_model: str = ""
    """value model to start from (empty: the first reward model of positive weight; without one, or if its tokenizer
    differs, --model with a head at zero)"""
    # --- other text (PPO-ptx)
    ptx_dataset: str = ""
    """text, messages, or prompt + completion, whose likelihood is kept up"""
    ptx_coef: float = 0.0
    """gamma of eq. 2, weight of its mean log-likelihood (InternLM2: 0.5; InstructGPT: 27.8, without saying whether of a
    mean or a sum)"""
    ptx_batch_size: int = 0
    """its rows per optimiser step (0: as many as answers; InstructGPT: 8 times as many)"""
    # --- data
    eval_dataset: str = ""
    """held-out prompts, from split test unless one is named (empty: a share of --dataset, --eval-fraction)"""
    eval_fraction: float = 0.02
    """share of the prompts of --dataset that is held out (0: no evaluation)"""
    max_length: int = 1024
    """tokens of prompt and answer: prompts that leave no room for --max-new-tokens are dropped"""
    # --- sampling
    num_generations: int = 1
    """answers to each prompt"""
    max_new_tokens: int = 128
    """tokens of an answer"""
    temperature: float = 1.0
    """of sampling, and of the answers' log-probabilities"""
    sample_tokens: int = 65536
    """memory knob of sampling: tokens in the key-value cache, per rank; changes the result by rounding only"""
    # --- optimisation
    epochs: int = 1
    """passes over the prompts"""
    max_steps: int = 0
    """stop after this many batches of prompts (0: only by epochs)"""
    batch_size: int = 64
    """prompts per batch, over all ranks (InstructGPT: 512)"""
    tokens_per_forward: int = 16384
    """memory knob: tokens per forward pass and rank; changes the result by rounding only"""
    learning_rate: float = 1e-6
    """peak, policy (InternLM2: 1e-6; small models want more)"""
    value_learning_rate: float = 5e-6
    """peak, value model (InternLM2: 5e-6; InstructGPT: 9e-6)"""
    lr_schedule: Literal["cosine", "linear", "constant"] = "constant"
    """after the warm-up: cosine to a tenth, linear to 0, or constant"""
    warmup_ratio: float = 0.03
    """share of the steps over which the learning rates rise; the steps of --critic-warmup count"""
    weight_decay: float = 0.0
    """of matrices; vectors (norms, biases) have none"""
    max_grad_norm: float = 1.0
    """gradient clipping, on the norm over all parameters of a model"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the computation; weights and optimiser are float32 (auto: bfloat16 on GPU, float32 on CPU)"""
    gradient_checkpointing: bool = False
    """recompute each layer's activations in the backward pass: less memory, a third more time"""
    # --- run
    seed: int = 0
    """of the held-out prompts, the data order, sampling and minibatches"""
    eval_every: int = 0
    """batches between evaluations (0: at the end only)"""
    save_every: int = 0
    """batches between resumable checkpoints, checkpoint-N/, all of which are kept (0: none)"""
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
import traceback
import types
from array import array
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
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
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.tensor import DTensor
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


def shaped_rewards(scores, logps, ref_logps, mask, kl_coef: float):
    """The reward of each token [B, T] (InstructGPT, eq. 2): -beta log(pi/ref), and for an answer's last token also its
    score. scores [B]; logps, ref_logps, mask [B, T], padded on the right."""
    # log(pi/ref) of a sampled token is an unbiased estimate of the KL
    rewards = -kl_coef * (logps - ref_logps) * mask
    last = mask.sum(1) - 1  # [B]
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), backwards in time.

    rewards, values, mask [B, T]; masked positions are skipped, as if they were not there. Returns advantages and
    returns [B, T]."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # the episode has ended
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # the one-step error, [B]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage * mask[:, t]
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
    return advantages, (advantages + values) * mask


def whiten(x, mask):
    """Mean 0 and variance 1 (the biased one) over the real tokens of all ranks. x, mask [B, T]."""
    n, total = over_ranks(torch.stack([mask.sum(), (x * mask).sum()]))
    mean = total / n
    variance = over_ranks(((x - mean).square() * mask).sum()) / n
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logps, old_logps, advantages, clip: float):
    """PPO's clipped surrogate objective (Schulman et al. 2017, eq. 7), negated, for each token; any shape."""
    ratio = (logps - old_logps).exp()  # pi / pi_old
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -objective


def value_loss(values, old_values, returns, clip: float):
    """Half the squared error; with clip > 0, at least that of the value held within clip of the old one. Any shape."""
    if not clip:
        return 0.5 * (values - returns).square()
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def add_advantages(args, answers: list, device):
    """Adds advantages and returns [T] to the extra of this rank's answers."""
    scores = to_device([row.extra["score"] for row in answers], device)  # [B]
    lengths = to_device([len(row.responses[0]) for row in answers], device)
    width = max((len(row.responses[0]) for row in answers), default=1)
    mask = torch.arange(width, device=device) < lengths[:, None]  # [B, T], as all of these
    empty = torch.zeros(mask.shape, device=device)
    names = ("old_logps", "ref_logps", "values")
    old_logps, ref_logps, values = (empty.masked_scatter(mask, joined(answers, name, device)) for name in names)
    rewards = shaped_rewards(scores, old_logps, ref_logps, mask, args.kl_coef)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask)
    for row, own_advantages, own_returns in zip(answers, advantages, returns):
        length = len(row.responses[0])
        row.extra.update(advantages=own_advantages[:length], returns=own_returns[:length])


def policy_batch(args, rows: list, logps) -> dict:
    """The policy's loss and the metrics beside it: scalars, each a sum over the answers' tokens. logps [N]."""
    old_logps, advantages = (joined(rows, name) for name in ("old_logps", "advantages"))  # [N]
    log_ratio = logps.detach() - old_logps
    ratio = log_ratio.exp()
    return {
        "loss/policy_avg": policy_loss(logps, old_logps, advantages, args.clip).sum(),
        "policy/approxkl_avg": 0.5 * log_ratio.square().sum(),
        "policy/clipfrac_avg": ((ratio - 1).abs() > args.clip).sum(),
        "val/ratio": ratio.sum(),
        "val/squared_ratio": ratio.square().sum(),
    }


def value_batch(args, rows: list, values) -> dict:
    """The value model's loss and the metric beside it, each a sum over the answers' tokens. values [N]."""
    old_values, returns = (joined(rows, name) for name in ("values", "returns"))  # [N]
    is_clipped = (values.detach() - old_values).abs() > (args.value_clip or math.inf)
    loss = value_loss(values, old_values, returns, args.value_clip).sum()
    return {"loss/value_avg": loss, "val/clipfrac_avg": is_clipped.sum()}


def main(args: Args):
    # 0. options, ranks, the output directory
    check_options(args)
    device, dtype = setup_distributed(args)
    read = (args.model, args.reference, args.value_model, args.dataset, args.eval_dataset, args.ptx_dataset)
    out, last, signature = open_run(args, *read, *reward_files(args))
    source, started = str(last or args.model), time.time()

    # 1. what rewards the policy, and rows: prompts, and other text
    tokenizer, rewards = load_tokenizer(source), load_rewards(args, device, dtype)
    value_source = str(last / "value") if last else choose_value_model(args, rewards, tokenizer)
    max_length = min(fit_length(args, name) for name in (source, value_source, args.reference) if name)
    checks = [reward.check for reward in rewards if reward.check]
    encode_row = partial(prompt_rows, tokenizer, max_length - args.max_new_tokens, checks)
    rows, held_out = prepare_split(args, tokenizer, encode_row)
    ptx_rows = []
    if args.ptx_dataset:
        encode_text = partial(demonstration_rows, tokenizer, max_length, False)
        ptx_rows = prepare("--ptx-dataset", args.ptx_dataset, "train", tokenizer, encode_text)
    n = args.num_generations
    ptx_size = args.ptx_batch_size or math.ceil(args.batch_size * n / args.num_minibatches)
    steps_per_epoch = math.ceil(len(rows) / args.batch_size)
    steps = min(steps_per_epoch * args.epochs, args.max_steps or sys.maxsize)

    # 2. policy, reference and value model, the optimisers, and the state of an interrupted run
    policy = read_model(AutoModelForCausalLM, source, tokenizer)
    with short_windows(policy):
        check_sampler(policy, source)
    freeze_layers(policy, args.train_last_layers)
    policy = prepare_model(policy, source, args, device, dtype, token_logps)
    name = args.reference or args.model
    reference = load_reference(name, tokenizer, args, device, dtype, samples=args.reference_baseline)
    value = load_value_model(value_source, tokenizer, args, device, dtype)
    use_one_layout(policy, value)
    models = {"": (policy, tokenizer), "value": (value, tokenizer)}
    optimizers = {"": make_optimizer(policy, args), "value": make_optimizer(value, args)}
    num_minibatches = min(args.num_minibatches, args.batch_size * n)
    work = f"{steps} batches of {args.batch_size} x {n} answers, {args.ppo_epochs} x {num_minibatches} updates each"
    announce([policy, value], args, work, device, dtype)
    stops = stop_ids(policy, tokenizer)
    print0(f"value model: from {value_source}; answers end at {' or '.join(tokenizer.convert_ids_to_tokens(stops))}")
    if last:
        state = load_checkpoint(last, models, optimizers)
    else:
        clear_run(args, out, signature)
        # updates: steps of the policy's optimiser; baselines: index of a prompt -> reward
        state = dict(step=0, episode=0, seconds=0.0, updates=0, baselines={})
    started -= state["seconds"]  # of all parts of a resumed run
    if args.critic_warmup >= steps:
        print0(f"note: --critic-warmup {args.critic_warmup} takes all {steps} batches; the policy is not trained")
    sample_and_score = partial(scored_rollout, args, policy, reference, rewards, tokenizer, stops, device)
    # for a rank that has no answer of a minibatch; its weight is 0
    names = ("old_logps", "advantages", "values", "returns")
    spare = SPARE._replace(extra=dict.fromkeys(names, torch.zeros(1, device=device)))

    # 3. for each batch of prompts
    catch_signals()
    for step in (bar := progress("ppo", state["step"], steps)):
        indices = batch_rows(range(len(rows)), args, step)  # of prompts
        sums, clock = {}, time.time()
        # 4. answers y ~ pi, their scores, and the log-probabilities of their tokens under pi_old and the reference
        offsets = [args.reward_constant] * len(indices)  # added to the reward of an answer that ends
        if args.reference_baseline:  # less the reward of the reference's answer
            add_baselines(args, reference, rewards, tokenizer, stops, device, rows, indices, state["baselines"])
            offsets = [args.reward_constant - state["baselines"][i] for i in indices]
        answers = sample_and_score([rows[i] for i in indices], n, step, offsets)
        # 5. the values of the states before their tokens, and from all of these advantages and returns
        add_values(("values",), value.state_values, value, answers, args, device)
        add_advantages(args, answers, device)
        metrics = dict(step=step + 1, epoch=(step + 1) / steps_per_epoch)
        num_answers = len(indices) * n  # of all ranks
        metrics |= rollout_metrics(args, answers, rewards, num_answers, device)
        if step == 0:
            warn_if_cut(metrics["val/share_eos"], args)
            if not args.reference:
                length = max(1.0, metrics["response_length"])
                check_first_step("the KL to the reference", metrics["objective/kl"], 0.0, dtype, scale=length)

        # 6. several passes over the answers, in minibatches; during the warm-up only the value model is trained
        is_warming_up = step < args.critic_warmup
        num_updates = args.ppo_epochs * min(args.num_minibatches, num_answers)
        norms, learning_rate = dict(grad_norm=0.0, value_grad_norm=0.0), 0.0
        for slots in minibatches(num_answers, args.ppo_epochs, args.num_minibatches, step, args.seed):
            mine = [row for row in answers if row.extra["slot"] in slots]  # this rank's part of the minibatch
            # tokens of the minibatch, over all ranks
            total = over_ranks(to_device(sum(len(row.responses[0]) for row in mine), device))
            for group, weight, inputs, target in forwards(mine, args, policy, device, spare):
                # a weight of 0 only keeps ranks in step; FSDP averages their gradients
                scale = weight * WORLD / total
                # 7. the policy's clipped loss, averaged over the minibatch's tokens
                if is_warming_up:  # the policy does not change: pi is pi_old
                    logged = policy_batch(args, group, joined(group, "old_logps"))
                else:
                    logps, *_ = policy.token_logps(**inputs, target=target, temperature=args.temperature)
                    logged = policy_batch(args, group, logps)
                    (logged["loss/policy_avg"] * scale).backward()
                # 8. the value model's clipped loss
                (values,) = value.state_values(**inputs)
                logged |= value_batch(args, group, values)
                (logged["loss/value_avg"] * scale).backward()
                add_scalars(sums, logged, weight / total / num_updates)
            if not is_warming_up:
                if state["updates"] == 0:  # pi is pi_old; the sums hold this minibatch alone, divided by num_updates
                    approx_kl = over_ranks(sums["policy/approxkl_avg"] * num_updates).item()
                    check_first_step("the approximate KL", approx_kl, 0.0, dtype, scale=1.0)
                # 9. the likelihood of other text
                if ptx_rows:
                    texts = batch_rows(ptx_rows, args, state["updates"], ptx_size)
                    trained = sum(sum(row.trained[0]) for row in texts)
                    for _, weight, inputs, target in forwards(texts[RANK::WORLD], args, policy, device):
                        nll = -policy.token_logps(**inputs, target=target)[0].sum()
                        (args.ptx_coef * nll * weight * WORLD / trained).backward()
                        add_scalars(sums, {"loss/ptx": nll}, weight / trained / num_updates)
                norm, learning_rate = take_step(policy, optimizers[""], args, step, steps)
                norms["grad_norm"] += norm / num_updates
                state["updates"] += 1
            norm, _ = take_step(value, optimizers["value"], args, step, steps, args.value_learning_rate)
            norms["value_grad_norm"] += norm / num_updates

        # 10. metrics, samples, evaluation, checkpoint
        metrics |= sum_over_ranks(sums) | norms | dict(lr=learning_rate)
        metrics["val/ratio_var"] = max(0.0, metrics.pop("val/squared_ratio") - metrics["val/ratio"] ** 2)
        rate = num_answers / (time.time() - clock)
        metrics |= dict(eps=rate, tokens_per_second=rate * metrics["response_length"])
        is_too_far = 0 < args.max_kl < metrics["objective/kl"]
        if is_too_far:
            steps = step + 1  # this one is the last
        if step == 0 or is_due(max(1, steps // 10), step + 1, steps):
            show_samples(f"step {step + 1}", answers, rewards, "score")
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= evaluate_policy(sample_and_score, held_out, rewards, device)
        state |= dict(step=step + 1, episode=state["episode"] + num_answers, seconds=time.time() - started)
        metrics |= dict(episode=state["episode"], seconds=state["seconds"], peak_memory_mb=peak_memory(device))
        log_metrics(args, out, metrics, bar)
        if should_save(args, step + 1, steps):
            save_checkpoint(args, out / f"checkpoint-{step + 1}", models, optimizers, state)
        if is_too_far:
            kl = f"the KL to the reference, {metrics['objective/kl']:.3f}, is beyond --max-kl {args.max_kl}"
            print0(f"stopped after step {step + 1}: {kl}")
            break

    # 11. a checkpoint that any library loads
    curves = ["objective/scores", "objective/kl", "policy/entropy_avg", "response_length", "val/explained_variance"]
    finish_run(out, models, curves)


# -------------------------------------------------------------------------------------------------- ppo.py alone


def check_options(args):
    """Fails on options that contradict each other, and on numbers that are out of range."""
    counts = ("num_generations", "max_new_tokens", "sample_tokens", "ppo_epochs", "num_minibatches")
    shares, signed = ("gamma", "lam"), ("missing_eos_score", "reward_constant")
    check_numbers(args, above_zero=("temperature", *counts), at_most_one=shares, signed=signed)
    if bool(args.ptx_coef) != bool(args.ptx_dataset) or args.ptx_batch_size and not args.ptx_dataset:
        fail("--ptx-dataset and --ptx-coef go together, and --ptx-batch-size with them: give both or none")


def freeze_layers(model, count: int):
    """Leaves only the last `count` layers trainable, and a value model's head; 0: all weights."""
    if count:
        decoder = model.requires_grad_(False).get_decoder() or model
        layers = next(module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList))
        if count > len(layers):
            fail(f"--train-last-layers {count}: {type(model).__name__} has {len(layers)} layers")
        heads = [model.score] if hasattr(model, "score") else []
        for module in [*layers[-count:], *heads]:
            module.requires_grad_(True)


def choose_value_model(args, rewards: list, tokenizer) -> str:
    """The checkpoint that the value model starts from; see --value-model."""
    reward_models = [reward.path for reward in rewards if reward.path and reward.weight > 0]
    name = args.value_model or next(iter(reward_models), args.model)
    # it may have further tokens, such as one for padding
    reads_same_tokens = tokenizer.get_vocab().items() <= load_tokenizer(name).get_vocab().items()
    if args.value_model and not reads_same_tokens:
        fail(f"--value-model {name}: its tokenizer differs from that of --model")
    return name if reads_same_tokens else args.model


def load_value_model(name: str, tokenizer, args, device, dtype):
    """The value model; its head starts at zero unless the checkpoint is a reward or value model."""
    value = read_model(AutoModelForSequenceClassification, name, tokenizer, num_labels=1)
    check_score_head(value, name)
    if not is_reward_model(name):
        torch.nn.init.zeros_(value.score.weight)
    freeze_layers(value, args.train_last_layers)
    return prepare_model(value, name, args, device, dtype, state_values)


def state_values(self, inputs, source, **unused):
    """The value of the state before each token of the answers [N], in a tuple: the head on the hidden state that
    predicts the token. A method of the model; inputs, source: as `pack` and `pad` return them."""
    return (response_scores(self, inputs, last=source),)


def use_one_layout(policy, value):
    """Policy and value model read the same inputs: padded ones, unless both can follow packed rows."""
    if policy.packs != value.packs:
        for model in (policy, value):
            model.packs = False
            model.set_attn_implementation("eager")


def scored_rollout(
    args, policy, reference, rewards: list, tokenizer, stops: list, device, prompts: list, n: int, step: int, offsets
) -> list:
    """This rank's share of `rollout`, with scores and with the tokens' log-probabilities before any update.

    offsets: for each prompt, added to the reward of an answer that ends. Adds to extra: score, a number; old_logps,
    ref_logps and entropy [T]."""
    places = range(RANK, len(prompts), WORLD)
    answers = rollout(policy, tokenizer, rewards, prompts, places, n, step, stops, args, device)
    for row in answers:
        score = row.extra["reward"] + offsets[row.extra["place"]]
        row.extra["score"] = score if row.extra["has_ended"] else args.missing_eos_score
    for names, model in ((("old_logps", "entropy"), policy), (("ref_logps",), reference)):
        add_values(names, model.token_logps, model, answers, args, device)
    return answers


def add_baselines(
    args, reference, rewards: list, tokenizer, stops: list, device, rows: list, indices: list, known: dict
):
    """Adds to `known`, by the index of a prompt, the reward of the reference's greedy answer where it is missing."""
    new = [i for i in indices if i not in known]
    if new:
        prompts = [rows[i] for i in new[RANK::WORLD]]
        zeros = torch.zeros(len(prompts), args.max_new_tokens)
        tokens, _ = sample_answers(reference, [row.prompt for row in prompts], zeros, stops, args, temperature=0.0)
        found = torch.zeros(len(new), device=device)
        found[RANK::WORLD] = total_reward(rewards, prompts, answer_texts(tokenizer, prompts, tokens, stops), tokens)[0]
        known |= zip(new, over_ranks(found).tolist())


def rollout_metrics(args, answers: list, rewards: list, count: int, device) -> dict:
    """Metrics of the `count` answers of all ranks before the update: means over answers or tokens."""
    found = of_all_ranks(answers, rewards, (count,), device, "score")  # {name: [count]}
    names = ("sampled_logps", "old_logps", "ref_logps", "entropy", "values", "returns")
    sampled_logps, old_logps, ref_logps, entropy, values, returns = (joined(answers, name, device) for name in names)
    sums = {
        "kl": (old_logps - ref_logps).sum(),
        "entropy": entropy.sum(),
        "logp_difference": (sampled_logps - old_logps).abs().sum(),
        "squared_error": (returns - values).square().sum(),
        "returns": returns.sum(),
        "squared_returns": returns.square().sum(),
    }
    sums, tokens = sum_over_ranks(sums), found["length"].sum().item()
    per_token = {name: value / tokens for name, value in sums.items()}
    score, kl, ended = found["score"].mean().item(), sums["kl"] / count, found["has_ended"].sum().item()
    variance = per_token["squared_returns"] - per_token["returns"] ** 2
    metrics = {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/non_score_reward": -args.kl_coef * kl,
        "objective/rlhf_reward": score - args.kl_coef * kl,
        "objective/entropy": sums["entropy"] / count,
        "response_length": tokens / count,
        "policy/entropy_avg": per_token["entropy"],
        "val/num_eos_tokens": ended,
        "val/share_eos": ended / count,
        # an offset of the values lowers it too
        "val/explained_variance": 1 - per_token["squared_error"] / variance if variance > 1e-8 else 0.0,
        "sampling/logp_difference": per_token["logp_difference"],
    }
    for name in found:
        if name.startswith("rewards/"):  # over the answers that it applies to
            metrics[f"{name}/mean"] = found[name].nanmean().nan_to_num().item()
    return metrics


def evaluate_policy(sample_and_score, held_out: list, rewards: list, device) -> dict:
    """Score, KL and length of one sampled answer to each held-out prompt, each time from the same random numbers.

    The score is without --reward-constant and --reference-baseline."""
    answers = sample_and_score(held_out, 1, -1, [0.0] * len(held_out))
    show_samples("held out", answers, rewards, "score")
    found = of_all_ranks(answers, rewards, (len(held_out),), device, "score")
    kl = over_ranks((joined(answers, "old_logps", device) - joined(answers, "ref_logps", device)).sum())
    return {
        "eval_objective/scores": found["score"].mean().item(),
        "eval_objective/kl": kl.item() / len(held_out),
        "eval_response_length": found["length"].mean().item(),
    }


# ============================== every block below stands word for word in all scripts that have it ================
# Functions and parameters that this script does not use are used by another one.
# ---- demonstrations: text, and conversations whose assistant's turns are trained


def demonstration_rows(tokenizer, max_length: int, train_all: bool, row: dict, notes: Counter) -> list:
    """One Row, or one for each turn of the assistant where the chat template rewrites earlier turns. train_all: prompts
    are trained too."""
    talk, prompt, options = row.get("messages") or row.get("conversations"), as_prompt(row), template_options(row)
    columns = ("completion", "answer", "output", "response")
    answer = next((row[column] for column in columns if row.get(column) is not None), None)
    if talk or isinstance(prompt, list) or isinstance(answer, list):
        before = [] if talk else as_messages(prompt or [], "user")
        after = with_system(row, as_messages(talk)) if talk else as_messages(answer or [])
        messages = without_end(tokenizer, before + after)
        refuse_special(tokenizer, messages, options)
        if not after or not has_content(after[-1:]):
            raise Drop("empty answer")
        found = encode_turns(tokenizer, messages, len(before), options, notes)
        if not found:
            raise Drop("no assistant turn to train on")
    else:
        text = row.get("text") if answer is None else answer
        if text is None:
            raise Drop("neither text, nor messages, nor an answer to a prompt")
        if not text.strip():
            raise Drop("empty answer")
        if prompt:
            head, (tail,), (trained,) = encode(tokenizer, prompt, [text], row, notes)
            found = [(head + tail, [False] * len(head) + trained)]
        else:
            text = text.removesuffix(tokenizer.eos_token)
            refuse_special(tokenizer, text)
            ids = plain_ids(tokenizer, text + tokenizer.eos_token)
            found = [(ids, [True] * len(ids))]
    rows = []
    for ids, trained in found:
        prompt = ids[: trained.index(True)] or ids[:1]  # for show_answers
        trained = [True] * len(ids) if train_all else trained
        if any(trained[1:max_length]):  # the first token has nothing to be predicted from
            start = trained.index(True, 1)
            notes["rows cut at --max-length"] += len(ids) > max_length
            rows.append(Row(ids[:start], [ids[start:max_length]], [trained[start:max_length]], dict(prompt=prompt)))
    if not rows:
        raise Drop("prompt beyond --max-length")
    return rows


# ---- rewards: what --rewards names
#
#      SOURCE[=WEIGHT]     SOURCE: a reward model; file.py:function; match:number|boxed|hash|REGEX; format; judge:MODEL

SCORE_QUESTION = "Rate the last answer above from 1 (very bad) to 10 (very good). Reply with the number only."


class Reward(NamedTuple):
    """A source of reward.

    score(rows, texts, ids): a number for each answer [B], NaN where it does not apply; check(extra): raises Drop for a
    prompt that it cannot read; path: of a reward model, else empty; sees_thinking: whether texts have the thinking."""

    name: str
    weight: float
    score: Callable
    check: Callable | None = None
    path: str = ""
    sees_thinking: bool = False


def split_source(value: str) -> tuple:
    """(source, weight) of SOURCE[=WEIGHT]."""
    source, _, weight = value.rpartition("=")
    try:
        weight = float(weight)
    except ValueError:
        return value, 1.0
    if not source or not math.isfinite(weight):
        fail(f"--rewards {value}: must be SOURCE or SOURCE=WEIGHT, with a finite number")
    return source, weight


def reward_files(args) -> list:
    """The files and directories that the rewards are made of."""
    sources = [split_source(value)[0] for value in args.rewards]
    files = [re.sub(r"^judge:|(?<=\.py):\w+$", "", s) for s in sources if not s.startswith("match:") and s != "format"]
    return [*files, args.rubric, args.condition]


def load_rewards(args, device, dtype) -> list:
    """Every source that --rewards names, under the name of its metric: numbered where two are equal."""
    sources = [split_source(value) for value in args.rewards]
    judges = sum(source.startswith("judge:") for source, _ in sources)
    if not sources:
        fail("--rewards: names nothing; give a reward model, file.py:function, match:number, format, or judge:MODEL")
    if judges > 1:
        fail("--rewards: takes one judge")
    if args.rubric and not judges:
        fail("--rubric: needs a judge that applies it; add judge:MODEL to --rewards")
    rewards, names, conditions = [], Counter(), load_conditions(args.condition)
    for source, weight in sources:
        check, path = None, ""
        if source == "format":
            name, score = "format", partial(format_scores, device)
        elif source.startswith("match:"):
            how = source.removeprefix("match:")
            with user_input(f"--rewards {source}: needs number, boxed, hash, or a regular expression"):
                if not re.compile(how).pattern:
                    raise ValueError("nothing is named")
            name, score, check = "match", partial(match_scores, how, device), partial(check_true_answer, how)
        elif source.startswith("judge:"):
            rubric = load_rubric(args.rubric) if args.rubric else {}
            judge = load_judge_model(source.removeprefix("judge:"), args, device, dtype)
            name, score = "judge", partial(judge_scores, *judge, rubric, args, device)
            check = partial(judged_row, *judge, rubric)
        elif re.search(r"\.py:\w+$", source):
            name, score = source.rpartition(":")[2], partial(function_scores, source, load_function(source), device)
        else:
            name, path = Path(source).name, source
            model = load_reward_model("--rewards", source, args, device, dtype)
            score = partial(model_scores, *model, conditions, args, device)
            check = partial(answered_row, *model, conditions)
        names[name] += 1
        name = name if names[name] == 1 else f"{name}-{names[name]}"
        rewards.append(Reward(name, weight, score, check, path, source == "format"))
    if args.condition and not any(reward.path for reward in rewards):
        fail("--condition: is for reward models; name one in --rewards, or leave it out")
    return rewards


def total_reward(rewards: list, rows: list, texts: list, ids: list) -> tuple:
    """The weighted sum of all rewards [B], in which NaN counts as 0; and each by name. rows: each answer's prompt."""
    answers, named = [final_answer(row.extra["prompt"], text) for row, text in zip(rows, texts)], {}
    for reward in rewards:
        named[reward.name] = reward.score(rows, texts if reward.sees_thinking else answers, ids)
    return sum(reward.weight * named[reward.name].nan_to_num(0.0) for reward in rewards), named


def answered_row(model, tokenizer, conditions: dict, extra: dict, text: str = "a"):
    """The prompt and an answer as the reward model reads them. Raises Drop."""
    prompt = with_condition(extra["prompt"], conditions.get(extra["kind"], ""))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    return scored_row(tokenizer, prompt, without_special(tokenizer, text), extra, positions)


def model_scores(model, tokenizer, conditions: dict, args, device, rows: list, texts: list, ids: list):
    """A reward model's scores [B], NaN for an answer that its chat template refuses."""
    read, scores = {}, torch.full((len(rows),), math.nan, device=device)
    for i, (row, text) in enumerate(zip(rows, texts)):
        with contextlib.suppress(Drop):
            read[i] = answered_row(model, tokenizer, conditions, row.extra, text)
    if found := score_rows(model, list(read.values()), args, device, shared=False):
        scores[list(read)] = torch.cat(found)
    if not scores[list(read)].isfinite().all():
        fail("--rewards: a reward model's score is not finite: its weights are damaged, or try --dtype float32")
    return scores


def load_judge_model(name: str, args, device, dtype) -> tuple:
    """A frozen language model and its tokenizer."""
    tokenizer = load_tokenizer(name)
    model = read_model(AutoModelForCausalLM, name, tokenizer).requires_grad_(False)
    return prepare_model(model, name, args, device, dtype, token_logps), tokenizer


def judged_row(model, tokenizer, rubric: dict, extra: dict, text: str = "a"):
    """The conversation and the question that the judge is asked: the rubric's, or for a score. Raises Drop."""
    prompt = extra["prompt"]
    refuse_special(tokenizer, prompt)
    turns = [] if isinstance(prompt, str) else [turn for turn in prompt if turn["role"] != "system"]
    if isinstance(prompt, str):
        talk = prompt + text
    elif len(turns) == 1 and not continues_text(prompt):
        talk = f"{turns[0]['content']}\n{text}"
    else:
        talk = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        talk += text if continues_text(prompt) else f"\nassistant: {text}"
    talk = without_special(tokenizer, talk)
    question, options = rubric.get("question", SCORE_QUESTION), rubric.get("options", {})
    choices = "".join(f"\n{letter}. {meaning}" for letter, meaning in options.items())
    return judge_row(model, tokenizer, f"{talk}\n\n{question}{choices}", list(options) or [*map(str, range(1, 11))])


def judge_scores(model, tokenizer, rubric: dict, args, device, rows: list, texts: list, ids: list):
    """With a rubric: sum of p(letter) x its reward for the prompt's kind, NaN for kinds without one (the rule-based
    reward model of GPT-4). Without: the expected score. [B]"""
    read = [judged_row(model, tokenizer, rubric, row.extra, text) for row, text in zip(rows, texts)]
    probabilities = judge_logps(model, read, args, device).softmax(-1)
    if not rubric.get("options"):
        return expected_score(probabilities)
    tables = [rubric["reward"].get(row.extra["kind"], {}) for row in rows]
    values = [[table.get(letter, math.nan) for letter in rubric["options"]] for table in tables]
    return (probabilities * to_device(values, device).view_as(probabilities)).sum(-1)


def load_rubric(name: str) -> dict:
    """A question, and either nothing else or options and, for every kind, a reward for each of them."""
    rubric = load_json("--rubric", name)
    options, rewards = rubric.get("options", {}), rubric.get("reward", {})
    with user_input(f"--rubric {name}: needs a question; and options and, by kind, a reward for each, or neither"):
        if not isinstance(rubric.get("question"), str) or bool(options) != bool(rewards):
            raise ValueError(f"it has {', '.join(rubric)}")
        for kind, table in rewards.items():
            if table.keys() != options.keys() or not all(map(math.isfinite, table.values())):
                raise ValueError(f"its options are {', '.join(options)}, its rewards for {kind} are {table}")
    return rubric


def load_function(source: str):
    """The function that file.py:name names."""
    path, _, name = source.rpartition(":")
    with user_input(f"--rewards {source}: no such function can be loaded"):
        spec = importlib.util.spec_from_file_location(f"rewards_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look their module up
        spec.loader.exec_module(module)
        return getattr(module, name)


def function_scores(source: str, function, device, rows: list, texts: list, ids: list):
    """A function's rewards [B], NaN where it returns None. It gets every column, and the answers, as lists."""
    if not rows:
        return torch.zeros(0, device=device)
    reserved = ("prompt", "prompts", "completion", "completions", "completion_ids", "chosen", "rejected")
    columns = {name: [row.extra[name] for row in rows] for name in rows[0].extra if name not in reserved}
    prompts = [row.extra["prompt"] for row in rows]
    completions = [t if isinstance(prompt, str) else as_messages(t) for prompt, t in zip(prompts, texts)]
    try:
        rewards = function(prompts=prompts, completions=completions, completion_ids=ids, **columns)
    except Exception as e:  # the user's own code: say what it choked on
        last = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}, on answers like {texts[0][-200:]!r}"
        given = ", ".join(["prompts", "completions", "completion_ids", *columns])
        fail(f"--rewards {source}: {type(e).__name__}: {e} ({where}); it is called with {given}")
    if not isinstance(rewards, (list, tuple)) or len(rewards) != len(rows):
        found = len(rewards) if isinstance(rewards, (list, tuple)) else f"a {type(rewards).__name__} instead of"
        fail(f"--rewards {source}: returned {found} rewards for {len(rows)} answers; it must return one for each")
    for reward, text in zip(rewards, texts):
        try:
            is_number = reward is None or abs(float(reward)) < 1e18  # its square is a float32 too
        except (TypeError, ValueError):
            is_number = False
        if not is_number:
            what = f"returned {reward!r} for {text[-200:]!r}"
            fail(f"--rewards {source}: {what}; it must be a finite number, or None where the rule does not apply")
    return to_device([math.nan if reward is None else float(reward) for reward in rewards], device)


def format_scores(device, rows: list, texts: list, ids: list):
    """1 for <think>...</think>, once and not empty, then an answer; else 0. [B]"""
    scores = []
    for text in texts:
        has_one = text.count("<think>") == text.count("</think>") == 1
        scores.append(float(has_one and bool(re.fullmatch(r"\s*<think>\s*\S.*</think>.*\S.*", text, re.DOTALL))))
    return to_device(scores, device)


def match_scores(how: str, device, rows: list, texts: list, ids: list):
    """1 for an answer that equals one in the column `answer`, else 0; NaN where the column is empty. [B]"""
    scores = []
    for row, text in zip(rows, texts):
        right = true_answers(row.extra.get("answer"))
        scores.append(float(canonical(found_answer(text, how)) in right) if right else math.nan)
    return to_device(scores, device)


def check_true_answer(how: str, extra: dict):
    """Fails if the column `answer` is missing or of a wrong type; raises Drop if no answer can ever match it."""
    if "answer" not in extra:
        raise ValueError(f"match:{how} compares with a column answer, which is missing")
    right = true_answers(extra["answer"])
    if how == "number" and right and not any(canonical(found_answer(answer, how)) == answer for answer in right):
        raise Drop(f"its answer {sorted(right)[0][:40]!r} is not a number, so that match:number can never be right")


NUMBER = (
    r"(?:(?<![\w)])[-−][$€£]?)?"  # a sign, but not the minus of a difference
    r"(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?|(?<![\w.])\.\d+)"  # 1,234.5, 2/3, .5
    r"(?:[eE][-+]?\d{1,3}(?!\w))?"
)


def found_answer(text: str, how: str) -> str | None:
    """What a text gives as its answer: its last number, its last \\boxed{}, what follows its last ####, or the last
    match of an expression (its first group, if it has one); None where there is no such thing."""
    if how == "boxed":
        start = text.rfind("\\boxed{")
        depth, end = 1, start + len("\\boxed{")
        while start >= 0 and depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        return text[start + len("\\boxed{") : end - 1] if start >= 0 and not depth else None
    if how == "hash":
        return text.rpartition("####")[2].lstrip().partition("\n")[0] if "####" in text else None
    expression = NUMBER if how == "number" else how
    matches = [m.group(1) if m.re.groups else m.group() for m in re.finditer(expression, text)]
    return matches[-1] if matches else None


def canonical(answer: str | None) -> str | None:
    """The form in which answers are compared: an exact fraction, or text in lower case with single spaces."""
    if answer is None:
        return None
    text = " ".join(answer.replace("−", "-").split()).rstrip(" .").lower()
    if text[:1] == text[-1:] == "$" or text[:2] + text[-2:] in (r"\(\)", r"\[\]"):  # TeX's delimiters
        text = text.strip("$ ") if text[0] == "$" else text[2:-2].strip()
    number = re.sub(r"^(-?)\\?[$€£]|(?<=\d)[, ](?=\d{3}(?!\d))|(?<!\d) | (?!\d)|\\?%$", r"\1", text)
    if re.fullmatch(r"[-+]?[\d./]+(e[-+]?\d{1,3})?", number):  # a policy may write any exponent
        try:
            return str(Fraction(number))
        except (ValueError, ZeroDivisionError):
            pass
    return text or None


def true_answers(column) -> set:
    """The answers that a column holds, canonical: a text or a number, or a list of alternatives; of a text what stands
    after ####, in \\boxed{}, or the whole."""
    if column is None:
        return set()
    if isinstance(column, list):
        return set().union(*map(true_answers, column))
    if isinstance(column, bool) or not isinstance(column, (str, int, float)):
        raise ValueError(f"answer must be a text, a number, or a list of them, not {column!r}")
    text = str(column)
    how = "hash" if "####" in text else "boxed" if "\\boxed{" in text else ""
    answer = canonical(found_answer(text, how) if how else text)
    return {answer} if answer is not None else set()


# ---- rollouts: sampled answers, their rewards, and what models say of their tokens


@torch.no_grad()
def rollout(
    policy, tokenizer, rewards: list, prompts: list, places, n: int, step: int, stops: list, args, device, attempt=0
) -> list:
    """n sampled answers to each of the prompts at this rank's places, with their rewards: Rows of one response.
    attempt: other random numbers at the same step.

    extra: place; slot, the answer's number among those of all ranks; prompt_row; text; slots and sampled_logps [T]; and
    as numbers reward, rewards/NAME, length, thinking_length, has_ended."""
    slots = [place * n + k for place in places for k in range(n)]
    rows = [prompts[slot // n] for slot in slots]
    numbers = [attempt * len(prompts) * n + slot for slot in slots]
    numbers = uniform_numbers(args.seed, step, numbers, args.max_new_tokens)
    ids, logps = sample_answers(policy, [row.prompt for row in rows], numbers, stops, args, args.temperature)
    texts = answer_texts(tokenizer, rows, ids, stops)
    total, named = total_reward(rewards, rows, texts, ids)
    names, answers = ["reward", *(f"rewards/{name}" for name in named)], []
    for i, found in enumerate(torch.stack([total, *named.values()], 1).tolist()):
        extra = dict(place=slots[i] // n, slot=slots[i], prompt_row=rows[i], text=texts[i], length=len(ids[i]))
        extra |= zip(names, found)
        extra["thinking_length"] = thinking_length(tokenizer, texts[i], len(ids[i]))
        extra["has_ended"] = float(ids[i][-1] in stops)
        answers.append(Row(rows[i].prompt, [ids[i]], [[True] * len(ids[i])], extra))
    of_tokens = lambda values, dtype: to_device(torch.tensor([x for own in values for x in own], dtype=dtype), device)
    set_token_values(answers, "sampled_logps", of_tokens(logps, torch.float32))
    set_token_values(answers, "slots", of_tokens([[slot] * len(own) for slot, own in zip(slots, ids)], torch.long))
    return answers


def thinking_length(tokenizer, text: str, tokens: int) -> float:
    """About how many of an answer's tokens are thinking."""
    if "<think>" not in text:
        return 0.0
    return max(0.0, tokens - len(tokenizer(after_thinking(text), add_special_tokens=False).input_ids))


def of_all_ranks(answers: list, rewards: list, shape: tuple, device, *more) -> dict:
    """Numbers from the extra of all ranks' answers, {name: tensor of `shape`}, in the order of slots, on the CPU. more:
    further names."""
    names = ["reward", "length", "thinking_length", "has_ended", *more]
    names += [f"rewards/{reward.name}" for reward in rewards]
    values = torch.zeros(len(names), math.prod(shape))
    for row in answers:
        values[:, row.extra["slot"]] = torch.tensor([row.extra[name] for name in names])
    return dict(zip(names, over_ranks(values.to(device)).cpu().unflatten(1, shape)))


def set_token_values(rows: list, name: str, values):
    """Gives each row its part of values [N], one for each of its trained tokens."""
    for row, part in zip(rows, values.split([sum(map(sum, row.trained)) for row in rows])):
        row.extra[name] = part


def joined(rows: list, name: str, device=None):
    """What rows hold for their tokens, end to end [N]. device: of the result, needed where rows may be empty."""
    return torch.cat([row.extra[name] for row in rows] or [torch.zeros(0, device=device)])


@torch.no_grad()
def add_values(names: tuple, values_of, model, rows: list, args, device):
    """Gives rows a value for each trained token under each of the names. values_of: a method of the model that takes
    what `token_logps` takes, and returns that many tensors [N] or more."""
    model.eval()
    for group, weight, inputs, target in forwards(rows, args, model, device):
        found = values_of(**inputs, target=target, temperature=args.temperature)
        if weight:  # else the row is a repeated one, which keeps the ranks in step
            for name, values in zip(names, found):
                set_token_values(group, name, values)
    model.train()


def load_reference(name: str, tokenizer, args, device, dtype, samples: bool = False):
    """The frozen model that the KL is measured to. samples: whether it gives answers too."""
    if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        fail(f"--reference {name}: its tokenizer differs from that of --model")
    reference = read_model(AutoModelForCausalLM, name, tokenizer).requires_grad_(False)
    if samples:
        with short_windows(reference):
            check_sampler(reference, name)
    return prepare_model(reference, name, args, device, dtype, token_logps)


def minibatches(n: int, passes: int, parts: int, step: int, seed: int):
    """Yields the indices of each minibatch: `passes` shuffles of range(n), each cut into `parts` of like size."""
    parts = max(1, min(parts, n))
    for i in range(passes):
        order = random.Random(f"{seed}-{step * passes + i}").sample(range(n), n)
        cuts = [round(k * n / parts) for k in range(parts + 1)]
        yield from (order[start:end] for start, end in zip(cuts, cuts[1:]))


def show_samples(title: str, answers: list, rewards: list, total: str):
    """Prints the first answers with their rewards and what they have under the name total."""
    if RANK > 0:
        return
    tqdm.write(f"{title}:")
    for row in answers[:3]:
        prompt, text = row.extra["prompt_row"].extra["prompt"], row.extra["text"]
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        values = {reward.name: row.extra[f"rewards/{reward.name}"] for reward in rewards} | {total: row.extra[total]}
        shown = ", ".join(f"{name} {value:+.2f}" for name, value in values.items() if not math.isnan(value))
        text = text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"
        cut = "" if row.extra["has_ended"] else " (cut off)"
        tqdm.write(f"  {prompt[-200:]!r}\n    -> {text!r}{cut}   {shown}")


def warn_if_cut(share_ended: float, args):
    """Prints a note if half of the answers or more do not end."""
    if share_ended <= 0.5:
        share = f"{1 - share_ended:.0%} of the answers run into --max-new-tokens {args.max_new_tokens}"
        print0(f"note: {share}; raise that, or start from a model that ends its answers")


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
