#!/usr/bin/env bash
# A real model through every script: SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) with real
# conversations, preferences and problems. docs/real-model.md describes what it showed.
#
# Claim: after DPO, the implicit reward of the better answer is the higher one in at least 0.8 of held-out pairs; GRPO
# raises the share of held-out sums that greedy answers solve by at least 0.2.
#
#   bash recipes/smollm2.sh                       model and data sets from the hub
#   MODEL=DIR DATA=DIR bash recipes/smollm2.sh    offline; DATA holds the five files that are named below
#   DTYPE=bfloat16 bash recipes/smollm2.sh        faster on a CPU with instructions for bfloat16 matrices (AMX)
source "$(dirname "$0")/common.sh"
runs=runs common="--seed 0 --resume"
sources=(trl-lib/Capybara trl-lib/ultrafeedback_binarized trl-lib/hh-rlhf-helpful-base "" openai/gsm8k:main)
if [ -n "${DATA:-}" ]; then
    sources=($DATA/{sft_instruct.jsonl.gz,pref_polite.jsonl,hh_rlhf.jsonl.gz,kwise_xstest.jsonl,gsm8k.jsonl.gz})
fi
if tiny; then  # in place of the model and its data: those of the grid world
    start_seed 0 base sft
    MODEL=$runs/sft
    sources=($data/{sft,preferences,preferences,rankings,reasoning}.jsonl)
fi
model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
runs=$runs/smollm2
data=$runs/data
common="$common --dtype ${DTYPE:-auto}"
train="$common --max-length 256 $(max_steps 2)"
measure="$train --learning-rate 0 --max-steps 1"  # the model as it is

heading "data: short rows, split into test, dev and train"
python recipes/smollm2.py data $data "${sources[@]}"

heading "SFT on instructions"
instructions="--model $model --eval-dataset $data/instructions-test.jsonl"
python sft.py $instructions --dataset $data/instructions-dev.jsonl --output-dir $runs/sft-start $measure
python sft.py $instructions --dataset $data/instructions-train.jsonl --output-dir $runs/sft $train \
    --learning-rate 2e-5 --batch-size 16 --max-steps $(if_tiny 2 20)

heading "a reward model on pairs, HH-RLHF and XSTest's rankings: two passes, since the head starts at zero"
rank() {  # MODEL OUTPUT
    python reward_model.py --model $1 --dataset $data/preferences-train.jsonl $train --learning-rate 1e-4 \
        --batch-size 16 --eval-dataset $data/preferences-test.jsonl --output-dir $runs/$2
}
rank $model reward_model-1
rank $runs/reward_model-1 reward_model

heading "DPO, ORPO and RPO on pairs"
preferences() {  # SCRIPT OPTIONS...
    python $1.py --model $model --dataset $data/pairs-train.jsonl --eval-dataset $data/pairs-test.jsonl $train \
        --learning-rate 3e-5 --batch-size 16 --output-dir $runs/$1 "${@:2}"
}
preferences dpo
preferences orpo $measure --dataset $data/pairs-dev.jsonl --output-dir $runs/orpo-start
preferences orpo
preferences rpo --reward-model $runs/reward_model

heading "GRPO on sums and on word problems: the reward is a rule"
by_rule() {  # DATA OUTPUT OPTIONS...
    python grpo.py --dataset $data/$1.jsonl --eval-dataset $data/${1%-*}-test.jsonl --rewards match:number \
        --output-dir $runs/$2 $common --kl-coef 0 "${@:3}"
}
measure="--learning-rate 0 --batch-size 1 --max-steps 1"
greedy="$measure --temperature 0.01 --eval-samples 1"
sums="--max-new-tokens 12"
by_rule sums-dev sums-start $sums --model $model $measure
by_rule sums-dev sums-start-greedy $sums --model $model $greedy
by_rule sums-train sums $sums --model $model --learning-rate 2e-5 --batch-size 8 --epochs 2 $(max_steps 2)
by_rule sums-dev sums-greedy $sums --model $runs/sums $greedy
# sums a + b for which b + a was not trained on
unmirrored="$greedy --eval-dataset $data/unmirrored-test.jsonl"
by_rule sums-dev sums-start-unmirrored $sums --model $model $unmirrored
by_rule sums-dev sums-unmirrored $sums --model $runs/sums $unmirrored
problems="--model $model --max-new-tokens $(if_tiny 8 200) --tokens-per-forward 4096"
by_rule problems-dev problems-start $problems $measure
by_rule problems-train problems $problems --learning-rate 2e-5 --batch-size 8 --max-steps $(if_tiny 2 10)

heading "PPO on the reward model's score, without and with a rule that answers be short"
ppo() {
    python ppo.py --model $model --dataset $data/pairs-train.jsonl --eval-dataset $data/pairs-dev.jsonl $common \
        --learning-rate 2e-5 --value-learning-rate 5e-5 --batch-size 16 --ppo-epochs 2 \
        --max-new-tokens $(if_tiny 8 64) --max-steps $(if_tiny 2 10) "$@"
}
ppo --rewards $runs/reward_model --output-dir $runs/ppo
ppo --rewards $runs/reward_model recipes/smollm2.py:brevity=2 --output-dir $runs/ppo-short

sample="$common --max-new-tokens $(if_tiny 24 96)"
heading "the model as a judge, against people's labels"
for name in conversations rankings; do
    python rlaif.py audit --judge $model --dataset $data/$name-test.jsonl $common --output-dir $runs/audit-$name
done

heading "prompts and answers that the model invents"
python rlaif.py synthesise --model $model --rows $(if_tiny 4 32) $sample --output-dir $runs/magpie \
    || tiny  # a hardly trained model ends no turn

heading "answers of every policy to held-out prompts, scored by the reward model"
for policy in start sft dpo orpo rpo ppo ppo-short; do
    if [ $policy = start ]; then directory=$model; else directory=$runs/$policy; fi
    python rlaif.py best-of-n --model $directory --reward-model $runs/reward_model --dataset $data/pairs-test.jsonl \
        $sample --rows $(if_tiny 4 32) --n $(if_tiny 2 4) --output-dir $runs/answers-$policy || tiny
done

python recipes/smollm2.py results $runs $model $(if_tiny $runs recipes/results) ${STEPS:-} || verdict=1
exit $verdict
