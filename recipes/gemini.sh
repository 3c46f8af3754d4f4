#!/usr/bin/env bash
# Gemini's data flywheel (arXiv 2312.11805, section 6.3 and figure 7), in its spirit: RL exploits the weaknesses of a
# reward model, and feedback on the policy's current answers repairs it. Four rounds of PPO; before each but the first,
# annotators rank current answers, and the reward model is trained further on these and on older rankings. The static
# line runs the same four rounds on the first reward model.
#
# Claim: the true score of the static line falls from its best round to the last, though its reward rises; that of the
# refreshed line rises over the same rounds; the refreshed reward model is right more often than the first one on pairs
# of current answers. It holds on seed 0 only.
#
#   Gemini   stages as here; feedback by preferences and ratings; no equation, algorithm, size or setting is published
#   here     rounds of 20 batches of 128, KL 0.1; between rounds 1500 prompts x 8 answers and 1000 older rankings
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model

    ppo_round() {  # ROUND MODEL REWARD_MODEL NAME OPTIONS...; walk_score, with weight 0, only logs the true score
        python ppo.py --model $2 --reference $runs/sft --rewards $3 gridworld.py:walk_score=0 \
            --dataset $data/prompts.jsonl --output-dir $out/$4 --eval-fraction 0 --seed $((10 * seed + $1)) --resume \
            $ppo_settings --kl-coef 0.1 --batch-size 128 --max-steps $(if_tiny 2 20) "${@:5}"
    }
    rank() {  # FILE MODEL PROMPTS ROWS OPTIONS...: annotators rank answers, unless the file exists
        [ -e $1 ] || python gridworld.py annotate --model $2 --prompts $3 --rows $4 --output $1 \
            --seed $((10 * seed + round)) --kind helpful --max-new-tokens 24 "${@:5}"
    }
    heading "round 1, for both lines"
    ppo_round 1 $runs/sft $runs/reward_model fresh-1
    refreshed=$runs/reward_model static=$out/fresh-1 older=$data/rankings.jsonl
    for round in $(if_tiny 2 "2 3 4"); do
        last=$out/fresh-$((round - 1))
        heading "round $round: annotators rank current answers to training prompts and to held-out grids"
        rank $out/rankings-$round.jsonl $last $data/prompts.jsonl $(if_tiny 60 1500) --k 8 --temperature 1.3
        rank $out/held-out-$round.jsonl $last $data/final.jsonl $(if_tiny 60 300)
        head -qn $((1000 / (round - 1))) $older > $out/older-$round.jsonl
        concatenate $out/mix-$round.jsonl $out/older-$round.jsonl $out/rankings-$round.jsonl
        older+=" $out/rankings-$round.jsonl"

        heading "round $round: the reward model, trained further"
        learn_rewards --model $refreshed --dataset $out/mix-$round.jsonl --eval-dataset $out/held-out-$round.jsonl \
            --output-dir $out/reward-$round
        refreshed=$out/reward-$round

        heading "round $round: PPO, with the refreshed reward model and with the first one"
        ppo_round $round $last $refreshed fresh-$round --value-model $last/value
        ppo_round $round $static $runs/reward_model static-$round --value-model $static/value
        static=$out/static-$round
    done

    report $runs/sft $out/fresh-? $out/static-?
done
exit $verdict
