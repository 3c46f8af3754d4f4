#!/usr/bin/env bash
# Starling-7B (Zhu et al. 2024, COLM, OpenReview GqDntYTTbk): a judge ranks 7 answers to each prompt, a reward model
# learns the likelihood of whole rankings (Plackett-Luce), PPO follows it. To PPO Starling adds: the critic is trained
# first, every answer that ends gets a constant reward, and all weights are trained instead of the last layers.
#
# Claim: no dip at the start; tokens within 10% and 0.98 of the answers end; the score rises and all weights beat the
# last layer; whole rankings make at least as good a reward model as all their pairs. On seed 2 the true score dips.
#
#   Starling-7B   GPT-4 ranks 182,954 prompts x 7 answers of many models; reward model lr 1e-5; PPO lr 2e-7
#   here          judge and policy are one checkpoint; 2500 prompts x 7 own answers; reward model lr 1e-3; PPO:
#                 lr 2e-4, KL 0.2, 31 batches of 128, 6 for the critic alone; constant 1
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft judge_model

    heading "an audit of the judge; then 7 answers to each prompt, compared two by two, in both orders"
    echo "pays more" > $out/principles.txt
    ask="--judge $runs/judge --requests $data/requests.json --principles $out/principles.txt $common"
    ask+=" $(if_tiny "--min-mass 0")"  # a hardly trained judge seldom says a letter
    python rlaif.py audit --dataset $data/test_preferences.jsonl --min-gap 0.5 --output-dir $out/audit $ask
    python rlaif.py label --model $runs/judge --k 7 --dataset $data/prompts.jsonl --rows $(if_tiny 40 2500) \
        --max-new-tokens 24 --output-dir $out/labels $ask

    heading "two reward models from the same rankings: whole rankings, and all their pairs"
    head -n 1000 $data/rankings.jsonl > $out/held-out.jsonl
    for loss in plackett-luce pairs; do
        learn_rewards --model $runs/judge --dataset $out/labels/rankings.jsonl --eval-dataset $out/held-out.jsonl \
            --loss $loss --output-dir $out/$loss --epochs 2
    done

    heading "PPO with critic training and constant: all weights, the last of four layers; without the two"
    starling_ppo() {  # walk_score, with weight 0, only logs the true score
        python ppo.py --model $runs/judge --rewards $out/plackett-luce gridworld.py:walk_score=0 \
            --dataset $data/prompts.jsonl $common $ppo_settings --kl-coef 0.2 --batch-size $(if_tiny 8 128) \
            $(max_steps 6) "$@"
    }
    additions="--critic-warmup $(if_tiny 2 6) --reward-constant 1"
    starling_ppo --output-dir $out/all-weights $additions
    starling_ppo --output-dir $out/last-layer $additions --train-last-layers 1
    starling_ppo --output-dir $out/plain

    report $runs/judge $out/{all-weights,last-layer,plain}
done
exit $verdict
