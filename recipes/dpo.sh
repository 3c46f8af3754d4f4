#!/usr/bin/env bash
# DPO against PPO (Rafailov et al. 2023, arXiv 2305.18290) from the same SFT model and the same rankings: PPO by way of
# a reward model and sampling, DPO directly on the pairs, with and without the likelihood of the chosen answer in its
# loss.
#
# Claim: DPO scores at most 0.03 less than PPO, without a reward model and without sampling, in less time.
#
#   the paper   beta 0.1, batch 64, RMSprop 1e-6, warm-up 150 steps, 1 epoch; no likelihood term (Llama 3: 0.2)
#   here        beta 0.1, batch 64, AdamW 3e-4, cosine, 3 epochs; likelihood term 1: the pairs are other policies'
#               answers, and without the term the probability of both answers falls; PPO as in instructgpt.sh
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft

    heading "DPO with and without the likelihood term; beside it a reward model, then PPO"
    both() {
        dpo --output-dir $runs/dpo --nll-coef 1
        dpo --output-dir $runs/dpo-plain
    }
    in_background $runs/dpo.log both
    reward_model
    ppo --rewards $runs/reward_model --output-dir $runs/ppo
    wait_for_background

    report $runs/sft $runs/ppo $runs/dpo $runs/dpo-plain
done
exit $verdict
