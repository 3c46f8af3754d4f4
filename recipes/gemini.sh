#!/usr/bin/env bash
# Gemini (report, arXiv 2312.11805, section 6.3 and figure 7: the data flywheel), in the spirit of it, on the grid world: RL pushes a reward model
# to its limits, and the reward model is kept up by feedback on what the policy answers now. Four rounds of PPO; before each round but the first,
# people rank answers of the policy as it is, and the reward model is trained further with these and with older rankings. Beside it, the same four
# rounds on the reward model of the start. Both lines share round 1; prompts, steps and settings are equal, only the reward model differs.
#
# What it must show:
#   in the static line the true score falls, from the end of one round (its peak) to the end of the last, though its reward goes on rising
#   in the refreshed line the true score rises from the end of that same round to the end of the last
#   of two answers of the refreshed line's policy, as it enters a round, to held-out grids, the refreshed reward model knows the better one more often than the first one does,
#       in every round; better by the simulated people's opinion without its noise
# The true score of an answer is that of its walk if every number in it is true, else 0. It is measured while training (mean of the last 5
# batches of a round, some 600 answers; a fall or a rise counts from 0.03 on, two standard errors of a mean) and trains nothing. When a reward model is pushed
# too far here, the policy claims cells that are not there.
#
#   Gemini  stages as here; feedback is of preferences and of ratings. No equation, algorithm, size or setting is published
#   here    rounds of 20 batches of 128 prompts, PPO as in instructgpt.sh but for KL 0.1 in place of 0.2, to the SFT model; between rounds 1500
#           prompts x 8 answers at temperature 1.3 are ranked; 1000 older rankings beside them, equal parts of all earlier sets; 1 epoch, lr 1e-3
# The settings were chosen by trying four on seed 0, on the same held-out grids: with KL 0.02 or 0.05, or rounds of 31 batches at KL 0.1 (all three
# with answers at temperature 1, and stopped after round 2), the refreshed line fell in round 2 as the static one did. The first refresh comes
# before the policy has learnt to lie, and adds little; the later ones see what went wrong.
# All held on seed 0. On seed 1 the static line does not fall within 80 batches (0.70, 0.78, 0.80, 0.80 by rounds, with a dip to 0.74 in the last;
# the refreshed one 0.70, 0.79, 0.79, 0.82), so that nothing was there to cure; its reward models are better, all the same. On seed 2 the
# static line falls most (0.66, 0.40, 0.46, 0.40); the refreshed one does not (0.66, 0.64, 0.64, 0.65), nor does it rise, and in round 2 its reward
# model is no better (0.67 to 0.68). At the end the refreshed line is the higher one on all three seeds: 0.84, 0.82, 0.65 to 0.65, 0.80, 0.40.
# Seven rounds of 10 batches at KL 0.05 (seed 1): the static line again did not fall (0.60 to 0.66), the refreshed one ended higher (0.60 to 0.73).
# The third part was first measured by the people's noisy rankings: 0.74, 0.67, 0.71 to 0.72, 0.63, 0.71 on seed 0, no gain in the last round.
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

    say "a reward model on rankings"
    python reward_model.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --epochs 2

    out=$runs/gemini
    mkdir -p $out
    # one round of PPO: number, start, reward model, name, and more options; the rule is the true score: with weight 0 it trains nothing,
    # and metrics.jsonl has its mean for every batch
    ppo() {
        python ppo.py --model $2 --reference $runs/sft --reward-model $3 --output-dir $out/$4 --dataset $data/prompts.jsonl --eval-fraction 0 \
            --rule gridworld.py:walk_score --rule-weight 0 --seed $((10 * seed + $1)) --resume --learning-rate 2e-4 --value-learning-rate 1e-3 \
            --warmup-ratio 0.1 --kl-coef 0.1 --batch-size 128 --ppo-epochs 2 --max-new-tokens 24 --max-steps $(tiny && echo 2 || echo 20) "${@:5}"
    }
    # people rank a policy's answers: policy, prompts, how many, file, seed, and more options; a file that stands is left as it is
    rank() {
        [ -e $4 ] || python gridworld.py annotate --model $1 --prompts $2 --rows $3 --output $4 --seed $5 --kind helpful --max-new-tokens 24 "${@:6}"
    }
    say "round 1, for both lines"
    ppo 1 $runs/sft $runs/reward_model fresh-1
    old=$runs/reward_model static=$out/fresh-1 older=$data/rankings.jsonl
    for round in $(tiny && echo 2 || echo 2 3 4); do
        last=$out/fresh-$((round - 1))
        say "round $round: people rank what the policy of the refreshed line answers now, on prompts of training and on held-out grids"
        rank $last $data/prompts.jsonl $(tiny && echo 60 || echo 1500) $out/rankings-$round.jsonl $((10 * seed + round)) --k 8 --temperature 1.3
        rank $last $data/test.jsonl $(tiny && echo 60 || echo 300) $out/held-out-$round.jsonl $((10 * seed + round))
        [ -e $out/mix-$round.jsonl ] || { head -qn $((1000 / (round - 1))) $older | cat - $out/rankings-$round.jsonl > $out/mix.part
            mv $out/mix.part $out/mix-$round.jsonl; }
        older+=" $out/rankings-$round.jsonl"
        say "round $round: the reward model trained on"
        python reward_model.py --model $old --dataset $out/mix-$round.jsonl --eval-dataset $out/held-out-$round.jsonl --seed $seed --resume $(few 8) \
            --learning-rate 1e-3 --output-dir $out/reward-$round
        old=$out/reward-$round
        say "round $round: PPO, with the refreshed reward model and with the first one"
        ppo $round $last $old fresh-$round --value-model $last/value
        ppo $round $static $runs/reward_model static-$round --value-model $static/value
        static=$out/static-$round
    done

    say "every policy on one scale"
    python gridworld.py score $runs/sft $out/fresh-? $out/static-? --data $data --output $runs/gemini.png --csv $runs/gemini.csv \
        $(tiny && echo --samples 1)

    say "how often the first reward model and the refreshed one know the truly better of two answers of the current policy"
    python - "$runs" <<'PY'
import json, os, sys
from itertools import permutations
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from gridworld import as_ids, assistant, mean, quality
runs = sys.argv[1]
disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(f"{runs}/sft")

@torch.no_grad()
def right(name, rankings):
    """The share of pairs in which the better answer scores higher; better by the people's opinion without its noise, and no ties."""
    model = AutoModelForSequenceClassification.from_pretrained(f"{runs}/{name}", dtype=torch.float32).eval()
    score = lambda prompt, answer: model(input_ids=torch.tensor([as_ids(tokenizer, [*prompt, assistant(answer)])])).logits[0, 0].item()
    found = []
    for row in map(json.loads, open(f"{runs}/gemini/{rankings}.jsonl")):
        answers = [(quality(row["prompt"], answer, "helpful"), score(row["prompt"], answer)) for answer in row["completions"]]
        found += [a[1] > b[1] for a, b in permutations(answers, 2) if a[0] > b[0] + 0.01]
    return mean(found)

rounds = [k for k in (2, 3, 4) if os.path.exists(f"{runs}/gemini/held-out-{k}.jsonl")]
models = dict(first="reward_model", refreshed="gemini/reward-{}")
found = {name: [right(model.format(k), f"held-out-{k}") for k in rounds] for name, model in models.items()}
open(f"{runs}/gemini/right.json", "w").write(json.dumps(found) + "\n")
PY

    python - "$out" "${STEPS:-}" <<'PY' || verdict=1
import json, os, sys
from statistics import mean
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
out, steps = sys.argv[1:]
rounds = [k for k in (2, 3, 4) if os.path.exists(f"{out}/static-{k}")]
read = lambda name: [json.loads(line) for line in open(f"{out}/{name}/metrics.jsonl")]
lines = {line: [read("fresh-1"), *(read(f"{line}-{k}") for k in rounds)] for line in ("static", "fresh")}
true, reward = "rewards/rule/mean", "objective/scores"
ends = lambda line, key: [mean(m[key] for m in one[-5:]) for one in lines[line]]  # of the last 5 batches of each round, 640 answers
right = json.load(open(f"{out}/right.json"))
static, fresh, proxy = ends("static", true), ends("fresh", true), ends("static", reward)
start = lines["fresh"][0][0][true]

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for parts, name in zip(lines.values(), ("static reward model", "refreshed reward model")):
    for axis, key in zip(axes, (true, reward)):
        values = [m[key] for part in parts for m in part]
        smooth = [mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
        axis.plot(range(1, len(values) + 1), smooth, label=name)
for axis, title in zip(axes, ("true score", "reward, by the reward model in use")):
    for k in range(1, len(rounds) + 1):
        axis.axvline(k * len(lines["fresh"][0]), color="grey", linestyle=":")
    axis.set(title=title, xlabel="batches (mean of the last 5); dotted: a round ends")
axes[0].legend()
figure.savefig(f"{out}-training.png", dpi=100)

listed = lambda values: ", ".join(f"{value:.2f}" for value in values)
peak = max(range(len(rounds)), key=static.__getitem__)  # the round after which the true score of the static line falls
claims = {
    f"true score {start:.2f} at the start, by rounds {listed(static)} with the static reward model": static[-1] < static[peak] - 0.03,
    f"whose reward goes {listed(proxy)}": proxy[-1] > proxy[peak],
    f"{listed(fresh)} with the refreshed one": fresh[-1] > fresh[peak] + 0.03,
    f"right on the current policy's answers: the refreshed one {listed(right['refreshed'])}, the first {listed(right['first'])}":
        all(a > b for a, b in zip(right["refreshed"], right["first"])),
}
holds = all(claims.values())
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
said = "; ".join(line + " (no)" * (steps != "tiny" and not true) for line, true in claims.items())
print(f"claim: {said}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
