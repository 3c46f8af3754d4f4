# Sourced by every recipe: one seed's directories, the stages that recipes share, and the verdict.
#
#   bash recipes/NAME.sh                    trains what the recipe needs in runs/, and prints `claim: ...`
#   SEEDS="0 1 2" bash recipes/NAME.sh      three seeds; those after 0 go to runs/seed-N/
#   ATEN_CPU_CAPABILITY=avx2 bash recipes/NAME.sh     other roundings, as on another processor, in runs/avx2/
#   STEPS=tiny bash recipes/NAME.sh         a few steps of every stage, in runs/tiny/; the claim is not judged
#
# Exit code 0: every claim holds. Other codes: a claim does not hold, or a command failed and the recipe stopped there.
# A stage that is already in runs/ with the same arguments is reused (--resume). The table of a recipe is measured on
# the grids of final.jsonl; test.jsonl is for choosing settings. The base model has 0.85 M parameters, the small one
# 74,000.
set -euo pipefail
recipe=$(basename "$0" .sh)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # matrices this small gain little from a second core
verdict=0

heading() { printf '\n== %s\n' "$*"; }
tiny() { [ "${STEPS:-}" = tiny ]; }
if_tiny() { if tiny; then echo "$1"; else echo "${2:-}"; fi; }  # TINY [FULL]: prints one of the two
max_steps() { if_tiny "--max-steps $1"; }                       # the option, where tiny

start_seed() {  # SEED STAGE...: sets the directories, writes the data, and runs these stages
    seed=$1 runs=runs data=data/grid
    if tiny; then runs=runs/tiny data=data/tiny; fi
    runs=$runs${ATEN_CPU_CAPABILITY:+/$ATEN_CPU_CAPABILITY}
    if [ $seed != 0 ]; then runs=$runs/seed-$seed; fi
    out=$runs/$recipe common="--seed $seed --resume"
    mkdir -p $out
    heading "the world, as text"
    [ -e $data/final.jsonl ] || python gridworld.py data --output-dir $data $(if_tiny "--rows 400 --test-rows 40")
    local stage
    for stage in "${@:2}"; do $stage; done
}

in_background() {  # LOG COMMAND...: runs the command beside the next ones, its output goes to the log
    background_log=$1
    "${@:2}" > $background_log 2>&1 &
    background=$!
}
wait_for_background() { wait $background || { cat $background_log; exit 2; }; }

# ------------------------------------------------------------------------------ stages

fine_tune() { python sft.py $common $(max_steps 8) --batch-size 32 --weight-decay 0.01 "$@"; }
learn_rewards() { python reward_model.py $common $(max_steps 8) --learning-rate 1e-3 "$@"; }

base() {
    heading "a base model, from scratch: truthful text about grids"
    fine_tune --from-scratch --dataset $data/pretrain.jsonl --output-dir $runs/base --learning-rate 2e-3
}

sft() {
    heading "supervised fine-tuning on demonstrations"
    fine_tune --model $runs/base --dataset $data/sft.jsonl --output-dir $runs/sft --learning-rate 1e-3 --epochs 2
}

reward_model() {
    heading "a reward model on rankings"
    learn_rewards --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model --epochs 2
}

small_base() {
    heading "a small base model, from scratch"
    fine_tune --from-scratch --dataset $data/pretrain.jsonl --output-dir $runs/small-base --learning-rate 5e-3 \
        --hidden-size 48 --num-layers 2 --vocab-size 384
}

small_sft() {
    heading "supervised fine-tuning of the small model"
    fine_tune --model $runs/small-base --dataset $data/sft.jsonl --output-dir $runs/small-sft --learning-rate 2e-3 \
        --epochs 2
}

judge_model() {
    heading "fine-tuning that also teaches to judge (the EFT data of self-rewarding)"
    concatenate $runs/judge.jsonl $data/sft.jsonl $data/judge.jsonl
    fine_tune --model $runs/sft --dataset $runs/judge.jsonl --output-dir $runs/judge --learning-rate 1e-3
}

ppo_settings="--learning-rate 2e-4 --value-learning-rate 1e-3 --warmup-ratio 0.1 --ppo-epochs 2 --max-new-tokens 24"
ppo() {  # OPTIONS...: PPO from the SFT model, as in instructgpt.sh
    python ppo.py --model $runs/sft --dataset $data/prompts.jsonl $common $ppo_settings --kl-coef 0.2 --batch-size 128 \
        $(max_steps 3) "$@"
}

dpo() {  # OPTIONS...: DPO from the SFT model on the rankings, as in dpo.sh
    python dpo.py --model $runs/sft --dataset $data/rankings.jsonl $common --learning-rate 3e-4 --epochs 3 \
        $(max_steps 3) "$@"
}

reasoning() {
    heading "GRPO on what a rule can check: the start (learning rate 0), then the run"
    local settings="--model $runs/sft --dataset $data/reasoning.jsonl $common --batch-size 16 --max-new-tokens 96
        --rewards gridworld.py:best_walk=0 gridworld.py:walk_score --kl-coef 0.02 --eval-samples 16"
    python grpo.py $settings --learning-rate 0 --max-steps 1 --output-dir $runs/o1-start
    python grpo.py $settings --learning-rate 1e-4 --max-steps $(if_tiny 3 200) --eval-every 25 --output-dir $runs/o1
}

score_policies() {  # TABLE DATA CHECKPOINT...: the table $runs/TABLE.csv and the picture $runs/TABLE.png
    python gridworld.py score "${@:3}" --data $2 --output $runs/$1.png --csv $runs/$1.csv $(if_tiny "--samples 1")
}

report() {  # CHECKPOINT...: the table of these policies, and the claim
    heading "every policy on one scale"
    score_policies $recipe $data/final.jsonl "$@"
    python recipes/claim.py $recipe $runs $data $seed ${STEPS:-} || verdict=1
}

# -------------------------------------------------------------------------------- data

concatenate() {  # OUT FILE...
    cat "${@:2}" > $1.part
    mv $1.part $1
}

with_demonstrations() {  # OUT COUNT FILE...: COUNT demonstrations, then the prompt-completion rows of the files
    python - $data/sft.jsonl "$@" <<'PY'
import json, os, sys
demonstrations, *others = ([json.loads(line) for line in open(name)] for name in (sys.argv[1], *sys.argv[4:]))
conversations = (dict(messages=row["prompt"] + row["completion"]) for rows in others for row in rows)
rows = [*demonstrations[: int(sys.argv[3])], *conversations]
with open(sys.argv[2] + ".part", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
os.replace(sys.argv[2] + ".part", sys.argv[2])
PY
}
