#!/usr/bin/env bash
# The headline of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, section 4.1) on the grid world: people prefer the answers of a small aligned
# model to those of an unaligned one a hundred times its size. Here a model of 74,000 parameters goes through the three stages, and is compared
# with models of 845,000 that were not aligned.
#
# What it must show: the small model after PPO scores higher than each of the large ones, which are
#   the base asked three ways: by the chat template, by the grid alone, and by the grid and the word "most", which in its training text comes
#       before the richest walk. The last is the best prompt we know of, and stands for the paper's GPT-3 with a few-shot prompt
#   the SFT model, fine-tuned on demonstrations
#
#   InstructGPT   1.3 B against 175 B, 135 times as many; reward model and value model 6 B for policies of every size; people prefer 175 B
#                 InstructGPT to 175 B GPT-3 in 85% of cases, to the same with a few-shot prompt in 71%; pre-training text in PPO (ptx)
#   here          11 times as many; reward model 0.85 M, that of instructgpt.sh; the value model is as small as the policy, from which it starts,
#                 since the reward model reads other tokens; score instead of preferences; no ptx; PPO for 2 epochs, lr 5e-4, critic 2e-3, beta 0.2
# The settings are the first that were scored, on seed 0 and the same held-out grids: one size of the small model (width 48, 2 layers), one PPO.
# Of prompts for the base three were tried, and all are shown. The score counts a walk that is told with false numbers as the walk it is: of the small
# model's walks after PPO 0.88, 0.59 and 0.79 were honest on seeds 0, 1 and 2, of the large SFT model's 0.93, 0.95 and 0.91.
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

    say "the large model: a base, from nothing; supervised fine-tuning; a reward model on rankings"
    python sft.py --dataset $data/pretrain.jsonl --output-dir $runs/base --seed $seed --resume $(few 8) \
        --learning-rate 2e-3 --batch-size 32 --weight-decay 0.01
    python sft.py --model $runs/base --dataset $data/sft.jsonl --output-dir $runs/sft --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --epochs 2 --weight-decay 0.01
    python reward_model.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --epochs 2

    say "the small model: a base, from nothing; supervised fine-tuning"
    python sft.py --dataset $data/pretrain.jsonl --output-dir $runs/small-base --seed $seed --resume $(few 8) \
        --hidden-size 48 --num-layers 2 --vocab-size 384 --learning-rate 5e-3 --batch-size 32 --weight-decay 0.01
    python sft.py --model $runs/small-base --dataset $data/sft.jsonl --output-dir $runs/small-sft --seed $seed --resume $(few 8) \
        --learning-rate 2e-3 --batch-size 32 --epochs 2 --weight-decay 0.01

    say "PPO of the small model, from the large reward model"
    out=$runs/small-beats-large
    python ppo.py --model $runs/small-sft --reward-model $runs/reward_model --dataset $data/prompts.jsonl --output-dir $out/small-ppo --seed $seed \
        --resume --epochs 2 --learning-rate 5e-4 --value-learning-rate 2e-3 --warmup-ratio 0.1 --kl-coef 0.2 --batch-size 128 --ppo-epochs 2 \
        --max-new-tokens 24 $(few 3)

    say "the large base asked otherwise: by the grid alone, and by the grid and the word most; copies of it with chat templates that say so"
    for ask in grid most; do
        mkdir -p $out/base-$ask
        cp $runs/base/{config,generation_config,tokenizer,tokenizer_config}.json $runs/base/model.safetensors $out/base-$ask
        after='\n\n'; [ $ask = grid ] || after+=$ask
        echo -n "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ '$after' if m['role'] != 'assistant' }}{% endfor %}" \
            > $out/base-$ask/chat_template.jinja
    done

    say "every policy on one scale"
    python gridworld.py score $runs/base $out/base-{grid,most} $runs/{sft,small-sft} $out/small-ppo --data $data \
        --output $runs/small-beats-large.png --csv $runs/small-beats-large.csv $(tiny && echo --samples 1)

    python - "$runs" "${STEPS:-}" <<'PY' || verdict=1
import csv, json, math, sys
runs, steps = sys.argv[1:]
def size(name):
    """Parameters of a checkpoint, by the header of its file."""
    with open(f"{runs}/{name}/model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
rows = {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(f"{runs}/small-beats-large.csv"))}
score, honest = ({name: float(row[key]) for name, row in rows.items()} for key in ("score", "honest"))
large, small = size("base"), size("small-beats-large/small-ppo")
asked = {"base": "base by the chat template", "base-grid": "by the grid", "base-most": 'by the grid and "most"', "sft": "SFT"}
holds = all(score["small-ppo"] > score[name] for name in asked)
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
others = ", ".join(f"{label} {score[name]:.2f} (honest {honest[name]:.2f})" for name, label in asked.items())
print(f"claim: {small} parameters after PPO score {score['small-ppo']:.2f} (honest {honest['small-ppo']:.2f}; SFT {score['small-sft']:.2f}); "
      f"{large}, {large / small:.1f} times as many: {others}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
