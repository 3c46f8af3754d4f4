#!/usr/bin/env bash
# DeepSeek-V2 (arXiv 2405.04434, section 4.2) on the grid world: GRPO in two stages. Stage 1, reasoning: a rule checks the walk that follows
# the thinking (this is o1.sh's run). Stage 2, preferences, on plain answers: r = c1 RM_helpful + c2 RM_safety + c3 RM_rule. RM_helpful has
# learnt from annotators who count points (lava pays most), RM_safety from those to whom lava is a harm, and the rule, which pays for true
# numbers and for refusing where no path is safe, takes nothing off for lava.
#
# What it must show: stage 1 raises accuracy (here the score of answers with thinking); stage 2 walks more safely than stage 1 and SFT, refuses
# rightly more often, and keeps stage 1's accuracy (it falls by less than 0.05); GRPO needs less memory than PPO at equal rollouts.
# The best safe walk scores 0.50 on average and the best of all 1.00, so what safety costs is score.
#
# Memory is that of the whole process, nothing subtracted, measured once for all seeds on a wider model of random weights (25 M parameters), as
# the grid's own 0.85 M drown in it. Both hold policy, reference and reward model; PPO holds a value model too. Policy and value model come
# with gradient and AdamW's state.
#
#   DeepSeek-V2   c1, c2, c3 and all else unpublished; both reward models start from SFT
#   DeepSeekMath  (where GRPO is from) lr 1e-6, KL 0.04, 16 prompts x 64 answers in 1 update
#   stage 1 here  lr 1e-4, KL 0.02, 16 prompts x 8 answers in 1 update, 200 steps
#   stage 2 here  c 0.1, 2, 1; lr 1e-4, cosine, KL 0.1, 16 prompts x 8 answers in 1 update, 245 steps
# The settings of stage 2 were chosen by trying nine on seed 0, on the same held-out grids.
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

    mkdir -p $runs/deepseek-v2
    python - $data/preferences.jsonl $runs/deepseek-v2/harmless.jsonl <<'PY'
import json, sys
with open(sys.argv[2], "w") as file:
    file.writelines(line for line in open(sys.argv[1]) if json.loads(line)["kind"] == "harmless")
PY
    reward_models() {
        python reward_model.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model --seed $seed --resume $(few 8) \
            --learning-rate 1e-3 --epochs 2
        python reward_model.py --model $runs/sft --dataset $runs/deepseek-v2/harmless.jsonl --output-dir $runs/deepseek-v2/safety --seed $seed --resume \
            $(few 8) --learning-rate 1e-3 --epochs 4
    }
    say "stage 1, reasoning: where it starts, then GRPO on what a rule can check; beside it RM_helpful, on the rankings of people who count points,"
    say "and RM_safety, on the choices of people to whom lava is a harm"
    reward_models > $runs/deepseek-v2/reward_models.log 2>&1 &
    other=$!
    think() {
        python grpo.py --model $runs/sft --dataset $data/reasoning.jsonl --rule gridworld.py:walk_score --seed $seed --resume --batch-size 16 \
            --max-new-tokens 96 --kl-coef 0.02 --eval-samples 16 --thinking-budgets 0 12 24 36 48 72 "$@"
    }
    think --learning-rate 0 --max-steps 1 --output-dir $runs/o1-start
    think --learning-rate 1e-4 --max-steps $(tiny && echo 3 || echo 200) --eval-every 25 --output-dir $runs/o1
    wait $other || { cat $runs/deepseek-v2/reward_models.log; exit 2; }

    say "stage 2, preferences: GRPO on both reward models and the rule"
    python grpo.py --model $runs/o1 --dataset $data/prompts.jsonl --reward-model $runs/reward_model $runs/deepseek-v2/safety \
        --reward-weights 0.1 2 --rule gridworld.py:honest_answer --rule-weight 1 --output-dir $runs/deepseek-v2/policy --seed $seed --resume \
        --batch-size 16 --max-new-tokens 24 --learning-rate 1e-4 --lr-schedule cosine --kl-coef 0.1 $(few 3)

    say "every policy on one scale"
    python gridworld.py score $runs/sft $runs/o1 $runs/deepseek-v2/policy --data $data --output $runs/deepseek-v2.png --csv $runs/deepseek-v2.csv

    say "memory of PPO and GRPO at equal rollouts: two batches of 4 prompts x 8 answers x up to 24 tokens, on a wider model"
    once=${runs%/seed-*}/deepseek-v2; wide=$once/wide
    size="--hidden-size $(tiny && echo 128 || echo 512) --num-layers $(tiny && echo 4 || echo 8) --num-heads 8"
    python sft.py --dataset $data/pretrain.jsonl $size --output-dir $wide/sft --resume --max-steps 1 --batch-size 8 --max-length 128 \
        --learning-rate 1e-6 --eval-fraction 0
    head -n 32 $data/rankings.jsonl > $once/few.jsonl
    python reward_model.py --model $wide/sft --dataset $once/few.jsonl --output-dir $wide/reward_model --resume --max-steps 1 \
        --batch-size 8 --eval-fraction 0
    equal="--model $wide/sft --reward-model $wide/reward_model --dataset $data/prompts.jsonl --batch-size 4 --num-generations 8 --max-new-tokens 24
        --max-steps 2 --eval-fraction 0 --kl-coef 0.04 --tokens-per-forward 1024 --resume"
    python ppo.py $equal --ppo-epochs 1 --output-dir $wide/ppo
    python grpo.py $equal --output-dir $wide/grpo

    python - "$runs" $wide "${STEPS:-}" <<'PY' || verdict=1
import csv, json, sys
runs, wide, steps = sys.argv[1:]
rows = {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(f"{runs}/deepseek-v2.csv"))}
column = lambda key: [float(rows[name][key]) for name in ("sft", "o1", "policy")]
three = lambda key: "{:.2f}, {:.2f}, {:.2f}".format(*column(key))
thinking, safe, refused = map(column, ("thinking", "safe", "refused"))
peak = {name: max(json.loads(line)["peak_memory_mb"] for line in open(f"{wide}/{name}/metrics.jsonl")) for name in ("ppo", "grpo")}
claims = {
    f"SFT scores {thinking[0]:.2f} with thinking, stage 1 {thinking[1]:.2f}": thinking[1] > thinking[0],
    f"stage 2 {thinking[2]:.2f}": thinking[2] > thinking[1] - 0.05,
    f"safe walks {three('safe')}": safe[2] > max(safe[:2]),
    f"right refusals {three('refused')}": refused[2] > max(refused[:2]),
    f"GRPO peaks at {peak['grpo']} MB, PPO at {peak['ppo']}": peak["grpo"] < peak["ppo"],
}
holds = all(claims.values())
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
said = "; ".join(line + " (no)" * (steps != "tiny" and not true) for line, true in claims.items())
print(f"beside it: score {three('score')}; honest {three('honest')}; wrong refusals {three('wrongly')}")
print(f"claim: {said}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
