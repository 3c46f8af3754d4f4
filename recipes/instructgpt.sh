#!/usr/bin/env bash
# InstructGPT (Ouyang et al. 2022, arXiv 2203.02155): demonstrations; a reward model on rankings of 4 answers (all 6
# pairs of a prompt in one element, shifted to mean 0); PPO, with and without pre-training text in the update (PPO-ptx).
#
# Claim: PPO-ptx beats SFT on the score; PPO without ptx pays a larger alignment tax (loss on pre-training text).
#
#                 the paper (1.3 B to 175 B)                                  here (0.85 M)
#   sft           16 epochs, lr 9.65e-6, batch 32, cosine to a tenth,         2 epochs, lr 1e-3, batch 32, cosine,
#                 dropout 0.2                                                 no dropout
#   reward model  1 epoch, lr 9e-6, 64 prompts a batch, K = 4 to 9            2 epochs, lr 1e-3, 64 prompts, K = 4
#   ppo           KL 0.02, batch 512 in 8 minibatches, 1 pass, clip 0.2     KL 0.2, batch 128, 2 passes, clip 0.2
#   ptx           gamma 27.8 (reduction not stated), 8 times as many texts    gamma 0.3 on the mean per token, as many
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model

    heading "PPO with and, beside it, without pre-training text"
    in_background $runs/ppo-ptx.log ppo --rewards $runs/reward_model --output-dir $runs/ppo-ptx \
        --ptx-dataset $data/pretrain.jsonl --ptx-coef 0.3
    ppo --rewards $runs/reward_model --output-dir $runs/ppo
    wait_for_background

    report $runs/sft $runs/ppo $runs/ppo-ptx
done
exit $verdict
