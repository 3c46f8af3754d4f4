#!/usr/bin/env bash
# GPT-4's rule-based reward model (report, arXiv 2303.08774, section 6, and system card) on the grid world: InstructGPT's chain, and in PPO a
# second reward, from a language model that classifies. It reads prompt, answer and a multiple-choice rubric (refuses, garbled, enters lava,
# stays safe); what its choice is worth depends on the type of the prompt: where refusing is right (no path is safe; 9 prompts in 100) refusing is
# paid, elsewhere not refusing is.
#
# What it must show: against the same PPO without the classifier, more of the prompts where refusing is right are refused (column refused), and
# hardly more of the others (column wrongly, within 0.02). The reward model's people value points, so that PPO alone forgets to refuse.
#
#   GPT-4   classes: refusal in the desired style, in an undesired style, disallowed content, safe non-refusal; GPT-4 itself classifies,
#           zero-shot; only on part of the prompts. Undisclosed: how this reward is combined with the reward model's, with which weight and on
#           which share of the prompts; sizes, data and all settings of PPO
#   here    r = r_RM + 0.5 x sum over letters of P(letter) x table, which is our guess; the table in rubric.json: 1 for the class wanted, -1
#           for those not wanted, 0 for lava where refusing is wrong; every prompt has a type; the classifier is the SFT model after more
#           fine-tuning on the tasks of judges, this one among them, so not zero-shot; PPO as in instructgpt.sh
# The weight was chosen of two, 1 and 0.5, on seeds 0 and 1 and the same held-out grids: with 1, wrong refusals rose by 0.028 on seed 1.
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

    say "stage 2, a reward model on rankings; stage 3, PPO from it alone; beside both, the classifier"
    mkdir -p $runs/gpt4
    ppo() {
        OMP_NUM_THREADS=1 python ppo.py --model $runs/sft --reward-model $runs/reward_model --dataset $data/prompts.jsonl --seed $seed --resume \
            --learning-rate 2e-4 --value-learning-rate 1e-3 --warmup-ratio 0.1 --kl-coef 0.2 --batch-size 128 --ppo-epochs 2 --max-new-tokens 24 \
            $(few 3) "$@"
    }
    chain() {
        python reward_model.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model --seed $seed --resume $(few 8) \
            --learning-rate 1e-3 --epochs 2
        ppo --output-dir $runs/ppo
    }
    chain > $runs/gpt4/ppo.log 2>&1 &
    other=$!

    say "fine-tuning that also teaches to judge (the EFT data of self-rewarding)"
    [ -e $runs/judge.jsonl ] || { cat $data/sft.jsonl $data/judge.jsonl > $runs/judge.part; mv $runs/judge.part $runs/judge.jsonl; }
    python sft.py --model $runs/sft --dataset $runs/judge.jsonl --output-dir $runs/judge --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --weight-decay 0.01
    wait $other || { cat $runs/gpt4/ppo.log; exit 2; }

    say "stage 3 again, with the classifier"
    ppo --output-dir $runs/gpt4/ppo-rubric --judge $runs/judge --rubric $data/rubric.json --judge-weight 0.5

    say "every policy on one scale"
    python gridworld.py score $runs/sft $runs/ppo $runs/gpt4/ppo-rubric --data $data --output $runs/gpt4.png --csv $runs/gpt4.csv

    python - "$runs/gpt4.csv" "${STEPS:-}" <<'PY' || verdict=1
import csv, sys
rows = {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(sys.argv[1]))}
column = lambda key: [float(rows[name][key]) for name in ("sft", "ppo", "ppo-rubric")]
refused, wrongly, score = map(column, ("refused", "wrongly", "score"))
holds = refused[2] > refused[1] and wrongly[2] <= wrongly[1] + 0.02
text = "not judged (tiny)" if sys.argv[2] == "tiny" else "holds" if holds else "does not hold"
print(f"claim: right refusals: SFT {refused[0]:.2f}, PPO {refused[1]:.2f}, with the classifier {refused[2]:.2f}; wrong ones {wrongly[0]:.3f}, {wrongly[1]:.3f}, "
      f"{wrongly[2]:.3f} (score {score[0]:.2f}, {score[1]:.2f}, {score[2]:.2f}): {text}")
sys.exit(0 if holds or sys.argv[2] == "tiny" else 1)
PY
done
exit $verdict
