#!/usr/bin/env bash
# Three ways of RL from AI feedback, from one start. After fine-tuning no human labels anything: the judge is the
# policy's own checkpoint, before (for pairs) and after (for scores) more practice in giving scores.
#   distilled        the judge's rankings, a reward model on them, PPO (Lee et al. 2023, arXiv 2309.00267)
#   direct           PPO on the expected score of 1 to 10 that the judge gives, without a reward model (same paper)
#   self-rewarding   3 rounds of DPO on best and worst of 4 by the policy's own scores (Yuan et al., arXiv 2401.10020)
#
# Claim: the judge agrees with annotators in 85% or more of the clear pairs in which its two orders agree; each way
# beats its start on the true score; self-rewarding rises in its first round and over all rounds (not on seed 1).
#
#   the papers   a larger judge, REINFORCE, KL 0.05, batch 128; Llama 2 70B, 3 judgements, 2 rounds of DPO
#   here         2,000 prompts x 4 answers each time; PPO as in instructgpt.sh, KL 0.2, direct 0.05; DPO lr 1e-4
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft judge_model

    heading "practice in giving scores"
    start=$out/start
    { head -n 6000 $data/sft.jsonl; grep 'score 1 to 10' $data/judge.jsonl; } > $out/scores.jsonl
    fine_tune --model $runs/judge --dataset $out/scores.jsonl --output-dir $start --learning-rate 1e-3 --epochs 4

    heading "what its judgements are worth, against the annotators'"
    # a hardly trained judge seldom says a letter
    ask="--requests $data/requests.json --resume $(if_tiny "--min-mass 0")"
    python rlaif.py audit --judge $runs/judge --dataset $data/test_preferences.jsonl --min-gap 0.5 --seed $seed \
        --output-dir $out/audit $ask

    answer="--dataset $data/prompts.jsonl --rows $(if_tiny 60 2000) --max-new-tokens 24"
    self_rewarding() {
        policy=$start
        for round in 1 2 3; do
            heading "self-rewarding, round $round: the policy scores its own answers, DPO on the best and the worst"
            python rlaif.py best-of-n --model $policy --judge $policy --n 4 --output-dir $out/answers-$round \
                --seed $((10 * seed + round)) $answer $ask
            python dpo.py --model $policy --dataset $out/answers-$round/pairs.jsonl --output-dir $out/self-$round \
                $common --learning-rate 1e-4 --nll-coef 1 $(max_steps 3)
            policy=$out/self-$round
        done
    }
    in_background $out/self-rewarding.log self_rewarding

    ppo_from_start="--model $start --dataset $data/prompts.jsonl $common $ppo_settings --batch-size 128 $(max_steps 3)"
    heading "distilled (beside self-rewarding): the judge's rankings of answers, a reward model, PPO"
    python rlaif.py label --model $start --judge $runs/judge --k 4 --orders average --output-dir $out/labels \
        --seed $seed $answer $ask
    learn_rewards --model $start --dataset $out/labels/rankings.jsonl --output-dir $out/reward_model --epochs 2
    python ppo.py $ppo_from_start --rewards $out/reward_model --kl-coef 0.2 --output-dir $out/distilled

    heading "direct: PPO on the judge's score"
    python ppo.py $ppo_from_start --rewards judge:$start --rubric $data/score.json --kl-coef 0.05 \
        --output-dir $out/direct
    wait_for_background

    heading "the judge's own view: the last round against the start"
    python rlaif.py compare $out/self-3 $start --judge $runs/judge --dataset $data/final.jsonl --max-new-tokens 24 \
        --seed $seed --output-dir $out/compare $ask

    report $start $out/{distilled,direct,self-1,self-2,self-3}
done
exit $verdict
