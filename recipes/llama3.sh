#!/usr/bin/env bash
# Llama 3 (arXiv 2407.21783, section 4), two rounds. In each, a reward model learns from all human rankings so far and
# picks the best of 8 answers of the current policy (rejection sampling); the base is fine-tuned anew on these and on
# demonstrations; DPO on the newest rankings, with format tokens masked and a likelihood term. The weights of the last
# round's three DPO runs are averaged.
#
# Claim: the score rises by rounds; answers still stop where they should (at most 0.02 less often than SFT's); the
# average scores at least the mean of its parts. DPO without the mask is printed beside it.
#
#   Llama 3   six rounds; best of 10 to 30; SFT lr 1e-5; DPO lr 1e-5, beta 0.1, likelihood term 0.2; averages everywhere
#   here      two rounds; best of 8, 2000 prompts; SFT lr 2e-3, 3 epochs; DPO lr 3e-5 to 2e-4, the same beta and term
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model

    dpo_round() {  # ROUND LEARNING_RATE DIRECTORY OPTIONS...: every rate has its own seed
        python dpo.py --model $out/sft-$1 --dataset $newest --output-dir $3 --learning-rate $2 \
            --seed $((10 * seed + ${2%e-*})) --resume --nll-coef 0.2 $(max_steps 3) "${@:4}"
    }
    policy=$runs/sft rewards=$runs/reward_model newest=$data/rankings.jsonl rate=2e-4
    for round in 1 2; do
        draw="--rows $(if_tiny 60 2000) --max-new-tokens 24 --seed $((10 * seed + round))"
        if [ $round = 2 ]; then
            heading "round 2: new rankings, of the policy and the model before DPO; a reward model on all so far"
            newest=$out/rankings.jsonl rewards=$out/reward_model rate=5e-5
            [ -e $newest ] || python gridworld.py annotate --model $policy $out/sft-1 --prompts $data/prompts.jsonl \
                --output $newest --k 4 --kind helpful $draw
            concatenate $out/all.jsonl $data/rankings.jsonl $newest
            learn_rewards --model $runs/sft --dataset $out/all.jsonl --output-dir $rewards
        fi

        heading "round $round: the best of 8 answers; the base, fine-tuned on all of these and on demonstrations"
        python rlaif.py best-of-n --model $policy --reward-model $rewards --dataset $data/prompts.jsonl --n 8 \
            --output-dir $out/best-$round --resume $draw
        with_demonstrations $out/sft-$round.jsonl 4000 $out/best-[1-$round]/sft.jsonl
        fine_tune --model $runs/base --dataset $out/sft-$round.jsonl --output-dir $out/sft-$round --learning-rate 2e-3 \
            --epochs 3

        heading "round $round: DPO on the newest rankings"
        dpo_round $round $rate $out/dpo-$round --mask-format-tokens
        policy=$out/dpo-$round
    done

    heading "round 2: two more DPO runs, the average of the three; for comparison, DPO with format tokens not masked"
    dpo_round 2 3e-5 $out/slower --mask-format-tokens
    dpo_round 2 1e-4 $out/faster --mask-format-tokens
    python recipes/average.py $out/average $out/dpo-2 $out/slower $out/faster
    dpo_round 2 5e-5 $out/unmasked

    report $runs/sft $out/{sft-1,dpo-1,sft-2,dpo-2,slower,faster,average,unmasked}
done
exit $verdict
