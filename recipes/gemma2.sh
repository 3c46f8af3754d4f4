#!/usr/bin/env bash
# Gemma 2 (arXiv 2408.00118, section 4) on the grid world: a policy learns by PPO from a reward model ten times its size, with a tokenizer of its own,
# trained on conversations of one and of several turns; and a large model, as automatic rater of answers side by side, tunes a
# hyper-parameter and catches reward hacking (Gemma 1, arXiv 2403.08295).
#
# What it must show:
#   the larger reward model gives the better gold score: PPO from it ends higher than from one of the policy's size, each at its best KL coefficient
#   on later turns it is right more often than one trained on as many conversations of a single turn
#   of three KL coefficients the lowest lets PPO hack (the reward model's score is the highest, gold below SFT's); the rater, who compares each run
#       with SFT, chooses the one that gold chooses, and puts the hacked run last
# Gold is the opinion of the simulated people without their noise: points (0 to 1), less half a point for a lie, half for lava, one for a wish of the
# user's second turn not met; 1.25 for a right refusal, -0.25 for a wrong one, -2 for no walk. Measured on 4 answers to each of 300 held-out prompts,
# 204 of one turn and 96 of two.
#
#   Gemma         policies of 2.6 B to 27 B, the reward model "an order of magnitude larger"; Gemma 1: pairs, a variant of REINFORCE with a KL term,
#                 a high-capacity model as rater; all else undisclosed
#   here          policy 74,000 parameters, reward models and rater 845,000, vocabularies of 384 and 468; PPO, lr 5e-4, critic 2e-3, 48 batches of
#                 128; the rater is the judge of gpt4.sh, asked which of two answers "is better"
# Left out: distillation from a larger teacher on the student's own answers, and the average of runs with different settings.
# Tried on seed 0 before, same held-out grids: the pairs of preferences.jsonl (2193, of two kinds of people, too few: later turns 0.69 right, with
# single turns 0.70); 4000 pairs in place of 12000 (later turns on three seeds 0.79, 0.64, 0.72, with single turns 0.47, 0.71, 0.68); the same rows by
# both kinds, and by those who want points alone; reward models that go on from those on rankings; KL coefficients 0.2, 0.05 and 0.
#
# What it showed on three seeds: on later turns 0.74, 0.80, 0.77 are right, with single turns 0.51, 0.42, 0.50; with KL 0.03 PPO hacks. The other
# parts do not hold. The larger reward model is no better here (the smaller one is right on 0.73, 0.79, 0.77 of later turns), nor is PPO from it:
# gold 0.20, 0.09, 0.21 to 0.25, 0.16, 0.23; with 4000 pairs 0.22, 0.07, 0.20 to 0.17, 0.13, 0.22. And the rater prefers the hacked runs, which claim
# points that are not there: it, too, hardly checks the numbers of an answer against the grid. With more of a judge's training, on 12,000 comparisons
# of which half have made-up numbers, such a run still won 0.67 against SFT (ties half; 0.69 before; by gold 0.32), by a rater from another base 0.65.
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

    say "the large model: a base, from nothing; supervised fine-tuning; more of it on the tasks of a judge, for the rater"
    python sft.py --dataset $data/pretrain.jsonl --output-dir $runs/base --seed $seed --resume $(few 8) \
        --learning-rate 2e-3 --batch-size 32 --weight-decay 0.01
    python sft.py --model $runs/base --dataset $data/sft.jsonl --output-dir $runs/sft --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --epochs 2 --weight-decay 0.01
    [ -e $runs/judge.jsonl ] || { cat $data/sft.jsonl $data/judge.jsonl > $runs/judge.part; mv $runs/judge.part $runs/judge.jsonl; }
    python sft.py --model $runs/sft --dataset $runs/judge.jsonl --output-dir $runs/judge --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --batch-size 32 --weight-decay 0.01

    say "the small model: a base, from nothing; supervised fine-tuning"
    python sft.py --dataset $data/pretrain.jsonl --output-dir $runs/small-base --seed $seed --resume $(few 8) \
        --hidden-size 48 --num-layers 2 --vocab-size 384 --learning-rate 5e-3 --batch-size 32 --weight-decay 0.01
    python sft.py --model $runs/small-base --dataset $data/sft.jsonl --output-dir $runs/small-sft --seed $seed --resume $(few 8) \
        --learning-rate 2e-3 --batch-size 32 --epochs 2 --weight-decay 0.01

    say "simulated people compare answers: 12000 pairs, half of them in a second turn; 12000 in the first turn; held out, 500 in a second turn"
    out=$runs/gemma2
    mkdir -p $out
    [ -e $out/later.jsonl ] || python - $data $out $(tiny && echo 40 || echo 12000) <<'PY'
import json, random, sys
from gridworld import annotators_scores, as_preference, new_grid, preference_row
data, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
held_out = {json.loads(line)["prompt"][0]["content"] for name in ("test", "test_preferences") for line in open(f"{data}/{name}.jsonl")}
rng, pairs, test = random.Random(7), {1: [], 3: []}, max(5, count // 24)  # by the number of messages in the prompt
while len(pairs[1]) < count or len(pairs[3]) < count // 2 + test:
    row = preference_row(rng, new_grid(rng, 3))
    if row and row["prompt"][0]["content"] not in held_out:  # compared again: people of the two kinds disagree, these have gold's opinion and noise
        prompt, answers = row["prompt"], [row[key][0]["content"] for key in ("chosen", "rejected")]
        if row := as_preference(prompt, answers, annotators_scores(rng, prompt, answers, "overall"), "overall"):
            pairs[len(prompt)].append(row)
mixed = [row for both in zip(pairs[1], pairs[3][test : test + count // 2]) for row in both]
for name, rows in dict(single=pairs[1][:count], mixed=mixed, later=pairs[3][:test]).items():
    with open(f"{out}/{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
PY

    say "reward models: large, large on single turns, small"
    reward_model() {
        python reward_model.py --eval-dataset $out/later.jsonl --seed $seed --resume $(few 8) "$@"
    }
    reward_model --model $runs/sft --dataset $out/mixed.jsonl --output-dir $out/rm-large --learning-rate 1e-3
    reward_model --model $runs/sft --dataset $out/single.jsonl --output-dir $out/rm-single --learning-rate 1e-3
    reward_model --model $runs/small-sft --dataset $out/mixed.jsonl --output-dir $out/rm-small --learning-rate 2e-3

    # the rule is gold; with weight 0 it trains nothing, and metrics.jsonl has its mean for every batch
    cat > $out/gold.py <<'PY'
from gridworld import quality


def gold(prompts, completions, **columns):
    return [quality(prompt, completion[-1]["content"], "overall") for prompt, completion in zip(prompts, completions)]
PY
    ppo() {
        say "PPO from the $1 reward model, KL coefficient $2"
        python ppo.py --model $runs/small-sft --reward-model $out/rm-$1 --value-model $runs/small-sft --rule $out/gold.py:gold --rule-weight 0 \
            --dataset $out/mixed.jsonl --output-dir $out/$1-$2 --seed $seed --resume --kl-coef $2 --epochs 2 --learning-rate 5e-4 \
            --value-learning-rate 2e-3 --warmup-ratio 0.1 --batch-size $(tiny && echo 8 || echo 128) --ppo-epochs 2 --max-new-tokens 24 \
            --max-steps $(tiny && echo 3 || echo 48)
    }
    coefs="0.4 0.1 0.03"
    for size in large small; do
        for coef in $coefs; do
            ppo $size $coef
        done
    done

    say "the rater compares the runs from the large reward model with the SFT model"
    for coef in $coefs; do
        python rlaif.py compare $out/large-$coef $runs/small-sft --judge $runs/judge --requests $data/requests.json --dataset $data/test.jsonl \
            --max-new-tokens 24 --output-dir $out/compare-$coef --seed $seed --resume $(if tiny; then echo --min-mass 0; fi)
    done

    say "gold scores on held-out prompts"
    python - $runs $data $seed $coefs <<'PY'
import json, sys
from gridworld import answer_all, load_policy, mean, quality
runs, data, seed, *coefs = sys.argv[1:]
prompts, gold = [json.loads(line)["prompt"] for line in open(f"{data}/test_preferences.jsonl")], {}
for name in ["small-sft", *(f"gemma2/{size}-{coef}" for size in ("large", "small") for coef in coefs)]:
    answers, _ = answer_all(*load_policy(f"{runs}/{name}"), prompts, 4, 24, 1.0, int(seed))
    opinions = [mean(quality(prompt, text, "overall") for text in texts) for prompt, texts in zip(prompts, answers)]
    single, later = ([x for x, prompt in zip(opinions, prompts) if (len(prompt) > 1) == several] for several in (False, True))
    gold[name.split("/")[-1]] = dict(all=mean(opinions), single=mean(single), later=mean(later))
    print(name, gold[name.split("/")[-1]])
json.dump(dict(coefs=coefs, gold=gold), open(f"{runs}/gemma2/gold.json", "w"))
PY

    say "every policy on one scale"
    python gridworld.py score $runs/small-sft $(printf "$out/large-%s " $coefs) --data $data --output $runs/gemma2.png --csv $runs/gemma2.csv \
        $(tiny && echo --samples 1)

    python - "$runs" "${STEPS:-}" <<'PY' || verdict=1
import json, sys
runs, steps = sys.argv[1:]
last = lambda name, key, count: [json.loads(line)[key] for line in open(f"{runs}/gemma2/{name}/metrics.jsonl").readlines()[-count:]]
found = json.load(open(f"{runs}/gemma2/gold.json"))
coefs, gold = found["coefs"], {name: opinion["all"] for name, opinion in found["gold"].items()}
wins = {coef: json.load(open(f"{runs}/gemma2/compare-{coef}/report.json"))["win_rate"] or 0.0 for coef in coefs}
proxy = {coef: sum(scores) / len(scores) for coef in coefs for scores in [last(f"large-{coef}", "rewards/rm-large/mean", 5)]}
right = {name: last(f"rm-{name}", "eval_accuracy", 1)[0] for name in ("large", "single", "small")}
large, small = ([gold[f"{size}-{coef}"] for coef in coefs] for size in ("large", "small"))
best, hacked, words = coefs[large.index(max(large))], coefs[-1], lambda values: ", ".join(f"{x:.2f}" for x in values)
claims = {
    f"gold by PPO with KL coefficients {', '.join(coefs)} from the larger reward model {words(large)}, the smaller {words(small)}, SFT "
    f"{gold['small-sft']:.2f}": max(large) > max(small),
    f"right on later turns {right['large']:.2f}, trained on single turns {right['single']:.2f} (small {right['small']:.2f})":
        right["large"] > right["single"],
    f"the larger one's score {words(proxy.values())}: the last run is hacked": max(coefs, key=proxy.get) == hacked and large[-1] < gold["small-sft"],
    f"the rater {words(wins.values())}: chooses as gold does": max(coefs, key=wins.get) == best,
    "and puts the hacked run last": min(coefs, key=wins.get) == hacked,
}
holds = all(claims.values())
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
said = "; ".join(line + " (no)" * (steps != "tiny" and not true) for line, true in claims.items())
print(f"claim: {said}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
