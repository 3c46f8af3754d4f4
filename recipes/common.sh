# Sourced by every recipe: one seed's directories, the stages that recipes share, and the verdict.
#
#   bash recipes/NAME.sh                    trains what the recipe needs in runs/, and prints `claim: ...`
#   SEEDS="0 1 2" bash recipes/NAME.sh      three seeds; those after 0 go to runs/seed-N/
#   STEPS=tiny bash recipes/NAME.sh         a few steps of every stage, in runs/tiny/; the claim is not judged
#
# Exit code 1 after the last claim: one of them does not hold. If a command fails, the recipe stops there with a code
# other than 0. A stage that is already in runs/ with the same arguments is reused (--resume).
# The base model has 0.85 M parameters, the small one 74,000.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # matrices this small gain little from a second core
verdict=0

heading() { printf '\n== %s\n' "$*"; }
tiny() { [ "${STEPS:-}" = tiny ]; }
if_tiny() { if tiny; then echo "$1"; else echo "${2:-}"; fi; }  # TINY [FULL]: prints one of the two
max_steps() { if_tiny "--max-steps $1"; }                       # the option, where tiny

start_seed() {
    seed=$1 runs=runs data=data/grid
    if tiny; then runs=runs/tiny data=data/tiny; fi
    if [ $seed != 0 ]; then runs=$runs/seed-$seed; fi
    mkdir -p $runs
    common="--seed $seed --resume"
}

in_background() {  # LOG COMMAND...: runs the command beside the next ones, its output goes to the log
    background_log=$1
    "${@:2}" > $background_log 2>&1 &
    background=$!
}
wait_for_background() { wait $background || { cat $background_log; exit 2; }; }

# ------------------------------------------------------------------------------ stages

world() {
    heading "the world, as text"
    [ -e $data/principles.txt ] || python gridworld.py data --output-dir $data $(if_tiny "--rows 400 --test-rows 40")
}

base() {
    heading "a base model, from scratch: truthful text about grids"
    python sft.py --from-scratch --dataset $data/pretrain.jsonl --output-dir $runs/base $common $(max_steps 8) \
        --learning-rate 2e-3 --batch-size 32 --weight-decay 0.01
}

sft() {
    heading "supervised fine-tuning on demonstrations"
    python sft.py --model $runs/base --dataset $data/sft.jsonl --output-dir $runs/sft $common $(max_steps 8) \
        --learning-rate 1e-3 --batch-size 32 --epochs 2 --weight-decay 0.01
}

reward_model() {
    heading "a reward model on rankings"
    python reward_model.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model $common \
        $(max_steps 8) --learning-rate 1e-3 --epochs 2
}

small_base() {
    heading "a small base model, from scratch"
    python sft.py --from-scratch --dataset $data/pretrain.jsonl --output-dir $runs/small-base $common $(max_steps 8) \
        --hidden-size 48 --num-layers 2 --vocab-size 384 --learning-rate 5e-3 --batch-size 32 --weight-decay 0.01
}

small_sft() {
    heading "supervised fine-tuning of the small model"
    python sft.py --model $runs/small-base --dataset $data/sft.jsonl --output-dir $runs/small-sft $common \
        $(max_steps 8) --learning-rate 2e-3 --batch-size 32 --epochs 2 --weight-decay 0.01
}

judge_model() {
    heading "fine-tuning that also teaches to judge (the EFT data of self-rewarding)"
    concatenate $runs/judge.jsonl $data/sft.jsonl $data/judge.jsonl
    python sft.py --model $runs/sft --dataset $runs/judge.jsonl --output-dir $runs/judge $common $(max_steps 8) \
        --learning-rate 1e-3 --batch-size 32 --weight-decay 0.01
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

score_policies() {  # NAME CHECKPOINT...: the table $runs/NAME.csv and the picture $runs/NAME.png
    heading "every policy on one scale"
    python gridworld.py score "${@:2}" --data $data --output $runs/$1.png --csv $runs/$1.csv
}

judge_claim() { python recipes/claim.py $1 $runs $data $seed ${STEPS:-} || verdict=1; }

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
