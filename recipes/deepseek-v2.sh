#!/usr/bin/env bash
# DeepSeek-V2 (arXiv 2405.04434, section 4.2): GRPO in two stages. Stage 1, reasoning: a function checks the walk after
# the thinking (the run of o1.sh). Stage 2, preferences: r = c1 RM_helpful + c2 RM_safety + c3 RM_rule. RM_helpful
# learns from annotators who count points, RM_safety from those who mind lava; RM_rule is a function.
#
# Claim: stage 1 raises the score of answers with thinking; stage 2 is safer than stage 1 and SFT, refuses rightly more
# often and loses less than 0.05 of that score; GRPO needs less memory than PPO at equal rollouts (the whole process, on
# a wider model with random weights, measured once for all seeds).
#
#   DeepSeek-V2   c1, c2, c3 and all else unpublished (DeepSeekMath: lr 1e-6, KL 0.04, 16 prompts x 64 answers)
#   here          lr 1e-4, 16 prompts x 8 answers; stage 1: KL 0.02, 200 steps; stage 2: c 0.1, 2, 1, KL 0.1, 245 steps
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft

    heading "stage 1, reasoning; beside it RM_helpful and RM_safety"
    grep '"kind": "harmless"' $data/preferences.jsonl > $out/harmless.jsonl
    reward_models() {
        reward_model
        learn_rewards --model $runs/sft --dataset $out/harmless.jsonl --output-dir $out/safety --epochs 4
    }
    in_background $out/reward_models.log reward_models
    reasoning
    wait_for_background

    heading "stage 2, preferences: GRPO on both reward models and the rule"
    python grpo.py --model $runs/o1 --dataset $data/prompts.jsonl --output-dir $out/policy $common \
        --rewards $runs/reward_model=0.1 $out/safety=2 gridworld.py:honest_answer --batch-size 16 \
        --max-new-tokens 24 --learning-rate 1e-4 --lr-schedule cosine --kl-coef 0.1 $(max_steps 3)

    heading "memory of PPO and GRPO at equal rollouts, on a wider model: two batches of 4 prompts x 8 answers"
    once=${runs%/seed-*}/deepseek-v2 wide=${runs%/seed-*}/deepseek-v2/wide
    mkdir -p $once
    python sft.py --from-scratch --dataset $data/pretrain.jsonl --output-dir $wide/sft --resume \
        --hidden-size $(if_tiny 128 512) --num-layers $(if_tiny 4 8) --num-heads 8 --max-steps 1 --batch-size 8 \
        --max-length 128 --learning-rate 1e-6 --eval-fraction 0
    head -n 32 $data/rankings.jsonl > $once/few.jsonl
    python reward_model.py --model $wide/sft --dataset $once/few.jsonl --output-dir $wide/reward_model --resume \
        --max-steps 1 --batch-size 8 --eval-fraction 0
    equal="--model $wide/sft --rewards $wide/reward_model --dataset $data/prompts.jsonl --batch-size 4 --resume
        --num-generations 8 --max-new-tokens 24 --max-steps 2 --eval-fraction 0 --kl-coef 0.04
        --tokens-per-forward 1024"
    python ppo.py $equal --ppo-epochs 1 --output-dir $wide/ppo
    python grpo.py $equal --output-dir $wide/grpo

    report $runs/sft $runs/o1 $out/policy
done
exit $verdict
