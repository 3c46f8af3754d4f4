#!/usr/bin/env bash
# o1 in miniature (OpenAI, 2024). Its recipe is undisclosed, so this is DeepSeek-R1's (arXiv 2501.12948), from an SFT
# model that can weigh walks: GRPO with thinking on verifiable answers. A rule checks the walk after </think>.
#
# Claim: the sampled score of answers with thinking rises by 0.2 or more; accuracy (the best walk, told honestly) rises
# with training, with votes and with the thinking tokens allowed at test time; the thinking, which nothing rewards, does
# not shrink. Plots: test_time.png in runs/o1 (training, votes) and in runs/o1-budgets (tokens of thinking).
#
#   DeepSeek-R1   lr 3e-6, KL 0.001, 512 prompts x 16 answers in 16 updates, T 1, new reference every 400 updates
#   here          lr 1e-4, KL 0.02, 16 prompts x 8 answers in 1 update, T 1, 200 steps
# The settings were chosen from four, on seed 0 and the grids of test.jsonl. The score is measured on final.jsonl, the
# accuracy on rows held out of reasoning.jsonl and on test_reasoning.jsonl.
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reasoning

    heading "test time: accuracy when the thinking is cut off"
    python recipes/thinking_budgets.py --model $runs/o1 --dataset $data/test_reasoning.jsonl \
        --reward gridworld.py:best_walk --max-new-tokens 96 --budgets 0 12 24 36 48 72 --seed $seed \
        --output-dir $runs/o1-budgets

    report $runs/sft $runs/o1
done
exit $verdict
