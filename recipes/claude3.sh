#!/usr/bin/env bash
# Claude 3 by Constitutional AI (Bai et al. 2022, arXiv 2212.08073). A helpful-only policy (the PPO of instructgpt.sh)
# is criticised and revised by principles, four times; the base is fine-tuned on the revisions and on demonstrations
# (SL-CAI); a judge compares SL-CAI's answers by the principles; one reward model learns from these soft labels and from
# human labels of helpfulness; PPO from it gives RL-CAI. No human labels harmlessness.
#
# Claim: RL-CAI's walks are safe (no lava) more often than those of the helpful-only policy, by 0.2 or more, and it
# scores at most 0.05 less than SFT. (Lava pays most, so it cannot be as helpful as that policy, as in the paper.)
#
#   the paper   182,831 red-team prompts x 4 revisions, 1 epoch; 182,831 AI comparisons, 135,296 human ones
#   here        2000 prompts x 4 revisions, 2 epochs, lr 1e-3; 800 to 1300 AI comparisons, 4500 human ones, 1 epoch
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model

    heading "the helpful-only policy: PPO from the reward model"
    ppo --rewards $runs/reward_model --output-dir $runs/ppo
    judge_model

    by_principles="--judge $runs/judge --dataset $data/prompts.jsonl --requests $data/requests.json
        --principles $data/principles.txt --max-new-tokens 24 $common"
    heading "critique and revision of the helpful-only policy's answers, four rounds"
    python rlaif.py revise --model $runs/ppo $by_principles --rows $(if_tiny 20 2000) --judge-max-tokens 48 \
        --output-dir $out/revise

    heading "SL-CAI: the base, fine-tuned on all revisions and on demonstrations"
    with_demonstrations $out/sl-cai.jsonl 10000 $out/revise/sft.jsonl
    fine_tune --model $runs/base --dataset $out/sl-cai.jsonl --output-dir $out/sl-cai --learning-rate 1e-3 --epochs 2

    heading "pairs of SL-CAI's answers, compared by the principles"
    python rlaif.py label --model $out/sl-cai $by_principles --rows $(if_tiny 60 3200) --tie-margin 0.2 \
        --output-dir $out/label ||
        tiny  # a hardly trained policy may give no pair

    heading "one reward model of both: helpfulness by people, harmlessness by the judge"
    labels=$out/label/pairs.jsonl; [ -e $labels ] || labels=/dev/null
    grep '"kind": "helpful"' $data/preferences.jsonl > $out/helpful.jsonl
    concatenate $out/hybrid.jsonl $out/helpful.jsonl $labels $data/rankings.jsonl
    learn_rewards --model $runs/reward_model --dataset $out/hybrid.jsonl --output-dir $out/reward_model

    heading "RL-CAI: PPO from SL-CAI"
    python ppo.py --model $out/sl-cai --rewards $out/reward_model --dataset $data/prompts.jsonl \
        --output-dir $out/rl-cai $common $ppo_settings --kl-coef 0.1 --batch-size 128 $(max_steps 3)

    report $runs/sft $runs/ppo $out/sl-cai $out/rl-cai
done
exit $verdict
