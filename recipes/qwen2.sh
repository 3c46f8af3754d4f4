#!/usr/bin/env bash
# Qwen2 (arXiv 2407.10671, section 4): DPO on ready-made rankings, then three short rounds of online DPO: the reward
# model picks the best and the worst of 4 answers of the current policy, DPO on these pairs. The online merging
# optimiser (OnDARE, Lu et al. 2024, arXiv 2405.17931) is to forget less. Beside it the same rounds with AdamW, with
# AdamW at half the rate (OnDARE's mean step), and as many steps on the old rankings.
#
# Claim: online beats offline at equal steps; with OnDARE the tax (loss on pre-training text) is smaller than with AdamW
# at the same rate, at nearly the same score. Online wins on every seed; the tax is smaller on seed 0 only.
#
#   Lu et al.   beta 0.1, lr 1e-6, batch 128, about 960 steps; keeps 0.01, alpha 1e-7 to 1e-5 (Qwen2's are not given)
#   here        3 rounds of 2000 prompts x 4 and 20 steps of 64 pairs; beta 0.1, lr 2e-4; keeps 0.5, alpha 1e-4
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft

    heading "the offline stage, DPO on rankings; beside it a reward model on the same rankings"
    in_background $out/dpo.log dpo --output-dir $runs/dpo --nll-coef 1
    reward_model
    wait_for_background

    best_and_worst() {  # POLICY ROUND DIRECTORY
        python rlaif.py best-of-n --model $1 --reward-model $runs/reward_model --dataset $data/prompts.jsonl --n 4 \
            --output-dir $3 --seed $((10 * seed + $2)) --resume --rows $(if_tiny 60 2000) --max-new-tokens 24
    }
    heading "the first answers, the same for all: those of the offline policy"
    best_and_worst $runs/dpo 1 $out/answers-1

    rounds() {  # NAME OPTIONS...: rounds of 20 steps; the learning rate rises and falls in each
        local name=$1 policy=$runs/dpo round pairs
        for round in $(if_tiny 3 "1 2 3"); do
            heading "$name, round $round"
            pairs=$out/answers-1/pairs.jsonl
            if [ $name = offline ]; then
                pairs=$data/rankings.jsonl
            elif [ $round != 1 ]; then
                best_and_worst $policy $round $out/answers-$name-$round
                pairs=$out/answers-$name-$round/pairs.jsonl
            fi
            python dpo.py --model $policy --reference $runs/sft --dataset $pairs --output-dir $out/$name-$round \
                --seed $((10 * seed + round)) --resume --nll-coef 1 --max-steps $(if_tiny 3 20) "${@:2}"
            policy=$out/$name-$round
        done
    }
    adamw() {
        rounds adamw --learning-rate 2e-4
        rounds half --learning-rate 1e-4
    }
    heading "online with OnDARE, then the old rankings again; beside both AdamW, and AdamW at half the rate"
    in_background $out/adamw.log adamw
    rounds ondare --learning-rate 2e-4 --optimizer ondare --merge-base $runs/base --merge-keep 0.5 --merge-weight 1e-4
    rounds offline --learning-rate 2e-4
    wait_for_background

    report $runs/sft $runs/dpo $out/{offline,adamw,half,ondare}-3
done
exit $verdict
