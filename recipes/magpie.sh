#!/usr/bin/env bash
# Magpie (Xu et al. 2024, arXiv 2406.08464): an aligned model, given the chat template up to the user's turn, invents
# what the user says, then answers it greedily. The reward model and the distance to earlier rows filter these rows; the
# base is fine-tuned on the rest and, for comparison, on as many unfiltered rows. The aligned model here is the base,
# fine-tuned on demonstrations with the loss on user turns as well, as it can only invent what it has learnt to write.
#
# Claim: the base, tuned on the filtered rows alone, scores at most 0.05 less than the aligned model, and the filtered
# rows beat as many raw ones by 0.03 or more. (The filter drops all judge tasks and all refusals.)
#
#   Magpie-Pro   1M turns by a 70B model; quality >= average, reward > -12, the 300k longest; 2 epochs, lr 2e-5
#   here         8000 turns by a 0.85 M model; reward >= 1.5, squared distance of states > 0.001; 6 epochs, lr 1e-3
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model

    heading "the aligned model: the same demonstrations, with the loss on every turn"
    fine_tune --model $runs/base --dataset $data/sft.jsonl --train-prompts --output-dir $out/aligned \
        --learning-rate 1e-3 --epochs 2

    heading "conversations from nothing"
    python rlaif.py synthesise --model $out/aligned --reward-model $runs/reward_model --rows $(if_tiny 40 8000) \
        --max-new-tokens 150 $(if_tiny "" "--min-reward 1.5 --min-distance 0.001") --output-dir $out/rows $common \
        || tiny
    if tiny; then  # a hardly trained model ends no turn
        for name in sft raw; do cp $data/sft.jsonl $out/rows/$name.jsonl; done
    fi
    head -n $(wc -l < $out/rows/sft.jsonl) $out/rows/raw.jsonl > $out/raw.jsonl

    heading "the base, tuned on what the filters left, and on as many rows unfiltered"
    from_base="--model $runs/base --learning-rate 1e-3 --epochs 6"
    fine_tune $from_base --dataset $out/rows/sft.jsonl --output-dir $out/filtered
    fine_tune $from_base --dataset $out/raw.jsonl --output-dir $out/raw

    report $runs/sft $out/{aligned,raw,filtered}
done
exit $verdict
