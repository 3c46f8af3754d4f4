#!/usr/bin/env bash
# Zephyr-141B by ORPO (Hong, Lee & Thorne 2024, arXiv 2403.07691; alignment handbook) on the grid world: straight from a base model, fine-tuning
# and preferences in one stage, without a reference model. Beside it, the same run with lambda 0: fine-tuning on the chosen answers.
#
# What it must show: ORPO beats that fine-tuning on the score at equal steps; rejected answers, which fine-tuning makes likelier along with the
# chosen ones, gain less, and the log odds ratio of the two grows further. One model is in memory, as in fine-tuning.
#
# The second claim is measured on held-out pairs of whole walks, from the SFT checkpoint: the base has never seen a conversation, so that learning
# the format raises every answer for the first 60 steps, and corrupted answers are unlikely from the start. The paper's rejected answers
# (figures 3 and 6) fall outright at such a lambda; here they only gain less.
#
#   Zephyr-141B   lambda 0.05, lr 5e-6, inverse square root, warm-up 100, 3 epochs, batch 32     here lambda 0.5, lr 1e-3, cosine, 3 epochs, batch 32
#   the paper     lambda 0.1 (Mistral), 0.2 (Llama 2), 0.25 (Phi-2), lr 5e-6 to 8e-6
# On seed 0, on the same held-out grids, lambda 0, 0.25, 0.5, 1, 2, 5 scored 0.72, 0.74, 0.75, 0.73, 0.70, 0.60.
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

    orpo() {
        python orpo.py --dataset $data/rankings.jsonl --seed $seed --resume --max-new-tokens 24 $(few 3) "$@"
    }
    mkdir -p $runs
    say "ORPO and, beside it, fine-tuning on the chosen answers; both from the base model"
    orpo --model $runs/base --learning-rate 1e-3 --odds-ratio-coef 0 --output-dir $runs/chosen > $runs/chosen.log 2>&1 &
    other=$!
    orpo --model $runs/base --learning-rate 1e-3 --odds-ratio-coef 0.5 --output-dir $runs/orpo
    wait $other || { cat $runs/chosen.log; exit 2; }

    say "the second claim: both from a model that knows conversations, on whole walks; and where that starts"
    python sft.py --model $runs/base --dataset $data/sft.jsonl --output-dir $runs/sft --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --epochs 2 --weight-decay 0.01
    python - $data/rankings.jsonl $data/walks.jsonl <<'PY'
import json, re, sys
with open(sys.argv[2], "w") as file:
    for row in map(json.loads, open(sys.argv[1])):
        kept = [(c, s) for c, s in zip(row["completions"], row["scores"]) if re.fullmatch(r"((right|up) -?\d+ )+= -?\d+", c)]
        if len(kept) > 1:
            file.write(json.dumps(dict(prompt=row["prompt"], completions=[c for c, _ in kept], scores=[s for _, s in kept])) + "\n")
PY
    walks="--model $runs/sft --dataset $data/walks.jsonl"
    (orpo $walks --learning-rate 0 --max-steps 1 --output-dir $runs/zephyr/start &&
        orpo $walks --learning-rate 3e-4 --epochs 1 --odds-ratio-coef 0 --output-dir $runs/zephyr/chosen) > $runs/chosen.log 2>&1 &
    other=$!
    orpo $walks --learning-rate 3e-4 --epochs 1 --odds-ratio-coef 0.5 --output-dir $runs/zephyr/orpo
    wait $other || { cat $runs/chosen.log; exit 2; }

    say "every policy on one scale"
    python gridworld.py score $runs/chosen $runs/orpo --data $data --output $runs/zephyr.png --csv $runs/zephyr.csv

    python - "$runs" "${STEPS:-}" <<'PY' || verdict=1
import csv, json, sys
runs, steps = sys.argv[1:]
rows = {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(f"{runs}/zephyr.csv"))}
score, memory = ({name: float(rows[name][key]) for name in ("chosen", "orpo")} for key in ("score", "MB"))
last = lambda name, key: json.loads(open(f"{runs}/zephyr/{name}/metrics.jsonl").readlines()[-1])[f"eval_{key}"]
rejected, odds = ({name: last(name, key) for name in ("start", "orpo", "chosen")} for key in ("logps/rejected", "log_odds_chosen"))
holds = score["orpo"] > score["chosen"] and rejected["orpo"] < rejected["chosen"] and odds["orpo"] > odds["chosen"]
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
print(f"claim: ORPO scores {score['orpo']:.2f}, fine-tuning on the chosen answers {score['chosen']:.2f} at equal steps, in {memory['orpo']:.0f} and "
      f"{memory['chosen']:.0f} MB; a rejected token's log-probability {rejected['start']:.2f} at the start, {rejected['orpo']:.2f} with ORPO, "
      f"{rejected['chosen']:.2f} with fine-tuning; log odds ratio {odds['start']:.2f}, {odds['orpo']:.2f}, {odds['chosen']:.2f}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
