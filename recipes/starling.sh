#!/usr/bin/env bash
# Starling-7B (Zhu et al. 2024, COLM, OpenReview GqDntYTTbk) on the grid world: a judge ranks 7 answers to each prompt, a reward model learns the
# likelihood of whole rankings (Plackett-Luce), and PPO follows it. To PPO Starling adds three things: the critic is trained first, every answer
# that ends gets a constant reward, and all weights are trained instead of the last layers.
#
# What it must show:
#   no dip: mean reward and mean true score of the first fifth of the batches after the first update are not below those before it by more than
#       two standard errors (judged by the batches before it)
#   length under control: mean tokens within 10% of those before PPO, and at least 0.98 of the last answers end
#   the score rises, and all weights beat the last layer
#   whole rankings make at least as good a reward model as all their pairs (share of right pairs on people's rankings, within 0.02)
# It showed all of this on seeds 0 and 1; on seed 2 the true score of the first fifth was 0.12 lower than before, though the reward rose: the dip that
# critic training does not prevent. PPO without critic training and constant is printed beside it. Answers here have a length of their own, so length is a weak test.
#
# A 3 x 3 grid has six paths, so 7 answers are about 4 different ones; repeats count once. On 4 x 4 cells, with 20 paths, models of this size and
# training did not learn to read the grid (0.07 of the answers were honest); the judge could not tell, and PPO taught them to claim high numbers.
#
#   Starling-7B   judge GPT-4, all 7 answers in one question; 182,954 prompts x 7 answers of many models
#                 reward model from Llama 2 7B, lr 1e-5, batch 20 prompts, 1 epoch
#                 PPO of OpenChat 3.5: lr 2e-7, KL 0.01, 64 answers a batch, minibatches of 4, 2 passes; the constant is unpublished
#   here          judge and policy are one checkpoint, asked which of two answers "pays more", in both orders; 2500 prompts x 7 of its own answers
#                 reward model from that checkpoint, lr 1e-3, batch 64 prompts, 2 epochs
#                 PPO: lr 2e-4, critic 1e-3, KL 0.2, 128 answers a batch, 2 passes; 31 batches, in 6 of which the critic learns alone; constant 1
# The settings were chosen by trying five on seed 0, on the same held-out grids; with the question "is better" and 1000 prompts both reward models
# were at chance on held-out pairs, so the question and the held-out pairs (people's rankings of points) are others than at first.
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

    say "fine-tuning that also teaches to judge: policy and judge in one"
    [ -e $runs/judge.jsonl ] || { cat $data/sft.jsonl $data/judge.jsonl > $runs/judge.part; mv $runs/judge.part $runs/judge.jsonl; }
    python sft.py --model $runs/sft --dataset $runs/judge.jsonl --output-dir $runs/judge --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --weight-decay 0.01

    say "what its judgements are worth, against people's; then 7 answers to each prompt, compared two by two, in both orders"
    out=$runs/starling
    mkdir -p $out
    echo "pays more" > $out/principles.txt
    ask="--judge $runs/judge --requests $data/requests.json --principles $out/principles.txt --seed $seed --resume"
    if tiny; then ask+=" --min-mass 0"; fi  # a judge of a few steps knows no letters
    python rlaif.py audit --dataset $data/test_preferences.jsonl --min-gap 0.5 --output-dir $out/audit $ask
    python rlaif.py label --model $runs/judge --k 7 --dataset $data/prompts.jsonl --rows $(tiny && echo 40 || echo 2500) --max-new-tokens 24 \
        --output-dir $out/labels $ask

    say "two reward models from the same rankings: the likelihood of each whole ranking, and all its pairs; tested on people's rankings"
    [ -e $out/held-out.jsonl ] || { head -n 1000 $data/rankings.jsonl > $out/held-out.part; mv $out/held-out.part $out/held-out.jsonl; }
    for loss in plackett-luce pairs; do
        python reward_model.py --model $runs/judge --dataset $out/labels/rankings.jsonl --loss $loss --eval-dataset $out/held-out.jsonl \
            --output-dir $out/$loss --seed $seed --resume $(few 8) --learning-rate 1e-3 --epochs 2
    done

    # the rule is the true score; with weight 0 it trains nothing, and metrics.jsonl has its mean for every batch
    ppo() {
        python ppo.py --model $runs/judge --reward-model $out/plackett-luce --rule gridworld.py:walk_score --rule-weight 0 \
            --dataset $data/prompts.jsonl --seed $seed --resume --learning-rate 2e-4 --value-learning-rate 1e-3 --warmup-ratio 0.1 --kl-coef 0.2 \
            --ppo-epochs 2 --batch-size $(tiny && echo 8 || echo 128) --max-new-tokens 24 $(few 6) "$@"
    }
    say "PPO with a critic trained first and a constant reward: all weights, then the last of four layers only; then without the two"
    starling="--critic-warmup $(tiny && echo 2 || echo 6) --reward-constant 1"
    ppo --output-dir $out/all-weights $starling
    ppo --output-dir $out/last-layer $starling --train-last-layers 1
    ppo --output-dir $out/plain

    say "every policy on one scale"
    python gridworld.py score $runs/judge $out/{all-weights,last-layer,plain} --data $data --output $runs/starling.png --csv $runs/starling.csv $(tiny && echo --samples 1)

    python - "$runs" "${STEPS:-}" <<'PY' || verdict=1
import csv, json, sys
from math import ceil, sqrt
from statistics import mean, stdev
runs, steps = sys.argv[1:]
rows = {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(f"{runs}/starling.csv"))}
names = ("judge", "all-weights", "last-layer", "plain")
column = lambda key: [float(rows[name][key]) for name in names]
read = lambda name: [json.loads(line) for line in open(f"{runs}/starling/{name}/metrics.jsonl")]
ours, plain, audit = read("all-weights"), read("plain"), json.load(open(f"{runs}/starling/audit/report.json"))
warm = json.load(open(f"{runs}/starling/all-weights/args.json"))["args"]["critic_warmup"]
def early(run, key, first):
    """Mean of a reward over the first fifth of the batches from number first on, less its mean before any update; and two standard errors."""
    before, after = [m[key] for m in ours[: warm + 1]], [m[key] for m in run[first : first + ceil((len(run) - first) / 5)]]
    return mean(after) - mean(before), 2 * stdev(before) * sqrt(1 / len(before) + 1 / len(after))
rises = {key: early(ours, f"rewards/{key}/mean", warm + 1) for key in ("plackett-luce", "rule")}
beside = {key: early(plain, f"rewards/{key}/mean", 1) for key in rises}
(score, tokens), honest = map(column, ("score", "tokens")), column("honest")
ended = mean(m["val/share_eos"] for m in ours[-5:])
right = {name: read(name)[-1]["eval_accuracy"] for name in ("plackett-luce", "pairs")}
changes = ", ".join("{} {:+.2f} (noise {:.2f})".format(name, *rises[key]) for name, key in (("reward", "plackett-luce"), ("true score", "rule")))
claims = {
    f"first fifth of PPO less its start: {changes}": all(rise >= -noise for rise, noise in rises.values()),
    f"tokens {tokens[0]:.1f}, after PPO {tokens[1]:.1f}, {ended:.3f} of answers end": abs(tokens[1] / tokens[0] - 1) <= 0.1 and ended >= 0.98,
    f"score {score[0]:.2f}, all weights {score[1]:.2f}": score[1] > score[0],
    f"last layer {score[2]:.2f}": score[1] > score[2],
    f"reward model right in {right['plackett-luce']:.3f} of held-out pairs by whole rankings, {right['pairs']:.3f} by pairs":
        right["plackett-luce"] >= right["pairs"] - 0.02,
}
holds = all(claims.values())
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
said = "; ".join(line + " (no)" * (steps != "tiny" and not true) for line, true in claims.items())
judge, apart = audit["kinds"]["helpful"], [f"{rise:+.2f}" for rise, _ in beside.values()]
print(f"beside it: the judge agrees with people who count points {judge['agree']} times, disagrees {judge['disagree']}, cannot say {judge['tie']}; "
      f"PPO without critic training and constant: first fifth {', '.join(apart)}, score {score[3]:.2f}, tokens {tokens[3]:.1f}; "
      f"honest {', '.join(f'{x:.2f}' for x in honest)}")
print(f"claim: {said}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
