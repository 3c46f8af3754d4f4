#!/usr/bin/env bash
# o1 in miniature (OpenAI, 2024). Its recipe is undisclosed, so this is DeepSeek-R1's (arXiv 2501.12948), from an SFT
# model that can weigh walks: GRPO with thinking on verifiable answers. A rule checks the walk after </think>; no reward
# sees the thinking.
#
# Claim: the sampled score of answers with thinking rises by 0.2 or more; accuracy (the best walk, told honestly) rises
# with training, with votes and with the thinking tokens allowed at test time; the thinking, which nothing rewards, does
# not shrink. Plots: runs/o1/curves.png (accuracy and length over training), runs/o1/test_time.png (accuracy over votes
# and tokens).
#
#   DeepSeek-R1   lr 3e-6, KL 0.001, 512 prompts x 16 answers in 16 updates, T 1, reference refreshed every 400 updates,
#                 10,400 steps
#   here          lr 1e-4, KL 0.02, 16 prompts x 8 answers in 1 update, T 1, 200 steps
# The settings were chosen from four, on seed 0 and the same held-out grids.
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed
    world
    base
    sft
    reasoning

    score_policies o1 $runs/sft $runs/o1
    judge_claim o1
done
exit $verdict
