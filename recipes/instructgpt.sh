#!/usr/bin/env bash
# InstructGPT (Ouyang et al. 2022, arXiv 2203.02155) on the grid world: demonstrations, a reward model on rankings of 4 answers (all
# 6 pairs of a prompt in one element, shifted to mean 0), PPO from it, with and without pre-training text in the update (PPO-ptx).
#
# What it must show: PPO-ptx beats SFT on the score, and PPO without ptx pays a larger alignment tax (loss on pre-training text).
#
# The paper's settings beside ours (its sizes 1.3 B to 175 B, ours 0.85 M):
#   sft           16 epochs, lr 9.65e-6, batch 32, cosine to a tenth, dropout 0.2         here 2 epochs, lr 1e-3, batch 32, no dropout
#   reward model  1 epoch, lr 9e-6, 64 prompts a batch, K = 4 to 9                       here 2 epochs, lr 1e-3, 64 prompts, K = 4
#   ppo           beta 0.02, batch 512 in 8 minibatches, 1 inner epoch, clip 0.2, T 1    here beta 0.2, batch 128, 2 passes, clip 0.2, T 1
#   ptx           gamma 27.8 (its reduction is not stated), 8 times as many texts        here gamma 0.3 on the mean per token, as many texts
#
# SEEDS="0 1 2" runs three seeds; STEPS=tiny shrinks every stage to a few steps and prints the claim without judging it.
set -euo pipefail
cd "$(dirname "$0")/.."
tiny() { [ "${STEPS:-}" = tiny ]; }
verdict=0
for seed in ${SEEDS:-0}; do
    runs=runs; [ "$seed" = 0 ] || runs=runs/seed-$seed
    data=data/grid; tiny && data=data/tiny && runs=runs/tiny${runs#runs}
    say() { printf '\n== %s\n' "$*"; }
    few() { if tiny; then echo "--max-steps $1"; fi; }
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # such small matrices gain little from a second core, and lose much when it is busy

    say "the world, as text"
    [ -e $data/principles.txt ] || python gridworld.py data --output-dir $data $(tiny && echo --rows 400 --test-rows 40)

    say "a base model, from nothing: truthful text about grids"
    python sft.py --dataset $data/pretrain.jsonl --output-dir $runs/base --seed $seed --resume $(few 8) \
        --learning-rate 2e-3 --batch-size 32 --weight-decay 0.01

    say "stage 1, supervised fine-tuning on demonstrations"
    python sft.py --model $runs/base --dataset $data/sft.jsonl --output-dir $runs/sft --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --epochs 2 --weight-decay 0.01

    say "stage 2, a reward model on rankings"
    python reward_model.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --epochs 2

    say "stage 3, PPO, without and with pre-training text; side by side, one core each"
    ppo() {
        OMP_NUM_THREADS=1 python ppo.py --model $runs/sft --reward-model $runs/reward_model --dataset $data/prompts.jsonl --seed $seed --resume \
            --learning-rate 2e-4 --value-learning-rate 1e-3 --warmup-ratio 0.1 --kl-coef 0.2 --batch-size 128 --ppo-epochs 2 --max-new-tokens 24 \
            $(few 3) "$@"
    }
    ppo --output-dir $runs/ppo &
    first=$!
    ppo --output-dir $runs/ppo-ptx --ptx-dataset $data/pretrain.jsonl --ptx-coef 0.3 > $runs/ppo-ptx.log 2>&1 || { cat $runs/ppo-ptx.log; exit 2; }
    wait $first

    say "every policy on one scale"
    python gridworld.py score $runs/sft $runs/ppo $runs/ppo-ptx --data $data --output $runs/score.png --csv $runs/score.csv

    python - "$runs/score.csv" "${STEPS:-}" <<'PY' || verdict=1
import csv, sys
rows = {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(sys.argv[1]))}
score = {name: float(rows[name]["score"]) for name in ("sft", "ppo", "ppo-ptx")}
tax = {name: float(rows[name]["tax"]) for name in ("sft", "ppo", "ppo-ptx")}
holds = score["ppo-ptx"] > score["sft"] and tax["ppo"] > tax["ppo-ptx"]
text = "not judged (tiny)" if sys.argv[2] == "tiny" else "holds" if holds else "does not hold"
print(f"claim: PPO-ptx scores {score['ppo-ptx']:.2f}, SFT {score['sft']:.2f} (PPO {score['ppo']:.2f}); "
      f"loss on pre-training text: PPO {tax['ppo']:.2f}, PPO-ptx {tax['ppo-ptx']:.2f}: {text}")
sys.exit(0 if holds or sys.argv[2] == "tiny" else 1)
PY
done
exit $verdict
