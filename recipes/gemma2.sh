#!/usr/bin/env bash
# Gemma 2 (arXiv 2408.00118, section 4): PPO from a reward model ten times the policy's size, with its own tokenizer,
# trained on conversations of one and of several turns. A large model, as automatic rater of answers side by side, tunes
# a hyper-parameter and catches reward hacking (Gemma 1, arXiv 2403.08295).
#
# Claim: the larger reward model gives PPO a better gold score than one of the policy's size; on later turns it is right
# more often than one trained on single turns; of three KL coefficients the lowest lets PPO hack, and the rater chooses
# as gold does and puts the hacked run last. Only later turns and the hack hold. Gold: the annotators without noise.
#
#   Gemma   policies of 2.6 B to 27 B; a variant of REINFORCE with a KL term; all else undisclosed
#   here    policy 74,000 parameters, reward models and rater 845,000; PPO, lr 5e-4, critic 2e-3, 48 batches of 128
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft judge_model small_base small_sft

    heading "12000 pairs, half of them in a second turn; 12000 in the first turn; 500 held out, in a second turn"
    [ -e $out/later.jsonl ] || python - $data $out $(if_tiny 40 12000) <<'PY'
import json, random, sys
from gridworld import annotators_scores, as_preference, new_grid, preference_row
data, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
lines = (line for name in ("test", "test_preferences", "final") for line in open(f"{data}/{name}.jsonl"))
held_out = {json.loads(line)["prompt"][0]["content"] for line in lines}
rng, pairs, test = random.Random(7), {1: [], 3: []}, max(5, count // 24)  # by the number of messages in the prompt
while len(pairs[1]) < count or len(pairs[3]) < count // 2 + test:
    row = preference_row(rng, new_grid(rng, 3))
    if row and row["prompt"][0]["content"] not in held_out:
        # compared again: all annotators have gold's opinion, with noise
        prompt, answers = row["prompt"], [row[key][0]["content"] for key in ("chosen", "rejected")]
        if row := as_preference(prompt, answers, annotators_scores(rng, prompt, answers, "overall"), "overall"):
            pairs[len(prompt)].append(row)
mixed = [row for both in zip(pairs[1], pairs[3][test : test + count // 2]) for row in both]
for name, rows in dict(single=pairs[1][:count], mixed=mixed, later=pairs[3][:test]).items():
    with open(f"{out}/{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
PY

    heading "reward models: large, large on single turns, small"
    later="--eval-dataset $out/later.jsonl"
    learn_rewards $later --model $runs/sft --dataset $out/mixed.jsonl --output-dir $out/rm-large
    learn_rewards $later --model $runs/sft --dataset $out/single.jsonl --output-dir $out/rm-single
    learn_rewards $later --model $runs/small-sft --dataset $out/mixed.jsonl --output-dir $out/rm-small \
        --learning-rate 2e-3

    for size in large small; do  # the overall opinion, with weight 0, is only logged
        for coef in 0.4 0.1 0.03; do
            heading "PPO from the $size reward model, KL coefficient $coef"
            python ppo.py --model $runs/small-sft --rewards $out/rm-$size recipes/rewards.py:overall=0 \
                --value-model $runs/small-sft --dataset $out/mixed.jsonl --output-dir $out/$size-$coef \
                $common --kl-coef $coef --epochs 2 --learning-rate 5e-4 --value-learning-rate 2e-3 --warmup-ratio 0.1 \
                --batch-size $(if_tiny 8 128) --ppo-epochs 2 --max-new-tokens 24 --max-steps $(if_tiny 3 48)
        done
    done

    heading "the rater compares the runs from the large reward model with the SFT model"
    for coef in 0.4 0.1 0.03; do
        python rlaif.py compare $out/large-$coef $runs/small-sft --judge $runs/judge --requests $data/requests.json \
            --dataset $data/final.jsonl --max-new-tokens 24 --output-dir $out/compare-$coef $common \
            $(if_tiny "--min-mass 0")
    done

    report $runs/small-sft $out/large-{0.4,0.1,0.03}
done
exit $verdict
