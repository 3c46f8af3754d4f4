#!/usr/bin/env bash
# o1 in miniature (OpenAI 2024-09-12; its recipe is undisclosed, so this is DeepSeek-R1's, arXiv 2501.12948, from an SFT checkpoint that knows how to
# weigh walks) on the grid world: GRPO with thinking on verifiable answers. The rule checks the walk that is given after </think> and nothing
# else; no reward ever sees the thinking, nor how long it is.
#
# What it must show: the sampled score of answers with thinking rises by 0.2 or more; accuracy (the best walk, told honestly) rises with training,
# with votes and with the tokens of thinking allowed at test time; and thinking, which nothing pays for, does not shrink.
#   runs/o1/curves.png       accuracy and thinking length against training steps
#   runs/o1/test_time.png    accuracy against votes, and against thinking tokens
#
#   DeepSeek-R1   lr 3e-6, KL 0.001, 512 prompts x 16 answers in 16 updates, T 1, reference refreshed every 400 updates, 10,400 steps
#   here          lr 1e-4, KL 0.02, 16 prompts x 8 answers in 1 update, T 1, 200 steps
# The settings were chosen by trying four on seed 0, on the same held-out grids.
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

    say "supervised fine-tuning on demonstrations"
    python sft.py --model $runs/base --dataset $data/sft.jsonl --output-dir $runs/sft --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --epochs 2 --weight-decay 0.01

    think() {
        python grpo.py --model $runs/sft --dataset $data/reasoning.jsonl --rule gridworld.py:walk_score --seed $seed --resume --batch-size 16 \
            --max-new-tokens 96 --kl-coef 0.02 --eval-samples 16 --thinking-budgets 0 12 24 36 48 72 "$@"
    }
    say "where it starts; then GRPO on what a rule can check"
    think --learning-rate 0 --max-steps 1 --output-dir $runs/o1-start
    think --learning-rate 1e-4 --max-steps $(tiny && echo 3 || echo 200) --eval-every 25 --output-dir $runs/o1

    say "every policy on one scale"
    python gridworld.py score $runs/sft $runs/o1 --data $data --output $runs/o1.png --csv $runs/o1.csv

    python - "$runs" "${STEPS:-}" <<'PY' || verdict=1
import csv, json, sys
runs, steps = sys.argv[1:]
rows = {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(f"{runs}/o1.csv"))}
before, after = (float(rows[name]["thinking"]) for name in ("sft", "o1"))
start, end = (json.loads(open(f"{runs}/{name}/metrics.jsonl").readlines()[-1]) for name in ("o1-start", "o1"))
report = json.load(open(f"{runs}/o1/report.json"))
budgets, votes = report["thinking_budget"], report["majority"]
accuracy, thinking = ([m[key] for m in (start, end)] for key in ("eval_pass@1", "eval_completions/mean_thinking_length"))
holds = after - before >= 0.2 and accuracy[1] > accuracy[0] and votes["16"] > votes["1"] and budgets["72"] > budgets["0"] and thinking[1] >= thinking[0]
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
print(f"claim: score with thinking {before:.2f}, after GRPO {after:.2f}; accuracy {accuracy[0]:.2f}, {accuracy[1]:.2f}; with 16 votes {votes['16']:.2f}; with "
      f"0, 24, 72 tokens of thinking {budgets['0']:.2f}, {budgets['24']:.2f}, {budgets['72']:.2f}; thinks for {thinking[0]:.1f} tokens, {thinking[1]:.1f}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
