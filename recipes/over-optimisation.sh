#!/usr/bin/env bash
# Over-optimisation of reward models (Gao et al. 2022, arXiv 2210.10760) on the grid world: two reward models of different size learn the same
# rankings; PPO without a KL penalty and best-of-n follow each; what they follow (the proxy) and the truth are drawn against the square root of
# the KL to the initial policy: runs/over-optimisation.png.
#
# What it must show:
#   the true score of PPO rises, then falls, each by more than two standard errors, while the proxy goes on rising (means of 5 batches)
#   the larger reward model reaches at least as high a true peak
#   best-of-n spends less KL than PPO for the same gain of true score (that of PPO's peak, or of the best n where that is less)
#
#   Gao et al.   gold: a reward model of 6 B; proxies 3 M to 3 B, on 90,000 of its labels; policy 1.2 B; batch 256, no KL penalty; scores in units of
#                the gold model's standard deviation; n to 60,000
#   here         gold: the opinion of the simulated people without their noise: points (0 to 1), less half a point for a lie; 1.25 for a right
#                refusal, -0.25 for a wrong one, -2 for no walk; proxies of 74,000 and 845,000 parameters, on their 3000 noisy rankings of 4; policy
#                845,000; batch 128, no KL penalty, 60 batches, in 5 of which the critic learns alone; lr rises from 0 all the
#                way, to 4e-4 and (critic) 1e-3; both critics start from the policy; n to 64
# In the picture each curve is less its start, in units of the standard deviation over the initial policy's answers.
# KL is nats an answer, pi against the initial policy: of PPO measured on its samples; of best-of-n, that of the answers drawn
# (log n - (n-1)/n, Gao's formula, is an upper bound where answers repeat; it is printed beside it).
# Tried on seed 0 before: lr 2e-4 from the start, with and without a KL coefficient of 0.02, and the small model as policy, with two learning rates.
# The first updates were too large to show a rise under the smaller reward model; the small policy learnt to lie before all else.
# The peak is the highest of 56 overlapping means, which flatters it a little. Gold was at first the score of honest walks alone, 0 for all else, not
# what the rankings' people hold.
# It holds on seeds 0 and 1. On seed 2 both reward models pay for claims of cells that are not there from the first updates on: the true score never
# rises above its start (0.58) and ends at -2.00 and 0.12, while the rewards go from 1.1 and 1.3 to 3.6 and 3.4. Neither 15 more batches for the
# critic alone nor 85 batches with a peak of 3e-4 changed that. Gao's laws in the square root of the KL are not fitted here.
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

    say "the small model: a base, from nothing; supervised fine-tuning; a reward model on the same rankings"
    python sft.py --dataset $data/pretrain.jsonl --output-dir $runs/small-base --seed $seed --resume $(few 8) \
        --hidden-size 48 --num-layers 2 --vocab-size 384 --learning-rate 5e-3 --batch-size 32 --weight-decay 0.01
    python sft.py --model $runs/small-base --dataset $data/sft.jsonl --output-dir $runs/small-sft --seed $seed --resume $(few 8) \
        --learning-rate 2e-3 --batch-size 32 --epochs 2 --weight-decay 0.01
    python reward_model.py --model $runs/small-sft --dataset $data/rankings.jsonl --output-dir $runs/small-reward-model --seed $seed --resume \
        $(few 8) --learning-rate 2e-3 --epochs 2

    # the rule is the true score; with weight 0 it trains nothing, and metrics.jsonl has its mean for every batch
    out=$runs/over-optimisation
    mkdir -p $out
    cat > $out/gold.py <<'PY'
from gridworld import quality


def gold(prompts, completions, **columns):
    return [quality(prompt, completion[-1]["content"], "helpful") for prompt, completion in zip(prompts, completions)]
PY
    for size in small large; do
        say "PPO without a KL penalty, from the $size reward model"
        rm=$runs/reward_model; [ $size = large ] || rm=$runs/small-reward-model
        python ppo.py --model $runs/sft --reward-model $rm --value-model $runs/sft --rule $out/gold.py:gold --rule-weight 0 --kl-coef 0 \
            --dataset $data/prompts.jsonl --output-dir $out/ppo-$size --seed $seed --resume --epochs 2 --max-steps $(tiny && echo 3 || echo 60) \
            --learning-rate 4e-4 --value-learning-rate 1e-3 --warmup-ratio 1 --critic-warmup $(tiny && echo 1 || echo 5) --batch-size 128 \
            --ppo-epochs 2 --max-new-tokens 24
    done

    say "64 answers to each of 300 prompts, for best-of-n"
    [ -e $out/samples.jsonl ] || python - $runs $data $seed "${STEPS:-}" <<'PY'
import json, os, random, sys
from collections import Counter
from gridworld import answer_all, load_policy
runs, data, seed, steps = sys.argv[1:]
rows = [json.loads(line) for line in open(f"{data}/prompts.jsonl")]
rows = random.Random(int(seed)).sample(rows, 10 if steps == "tiny" else 300)
model, tokenizer = load_policy(f"{runs}/sft")
answers, _ = answer_all(model, tokenizer, [row["prompt"] for row in rows], 64, 24, 1.0, int(seed))
part = f"{runs}/over-optimisation/samples.part"
with open(part, "w") as file:
    for row, texts in zip(rows, answers):
        times = Counter(text for text in texts if text)  # best-of-n scores an answer once, however often it was given
        file.write(json.dumps(dict(prompt=row["prompt"], completions=list(times), times=list(times.values()))) + "\n")
os.replace(part, part.replace(".part", ".jsonl"))
PY
    for size in small large; do
        rm=$runs/reward_model; [ $size = large ] || rm=$runs/small-reward-model
        python rlaif.py best-of-n --model "" --dataset $out/samples.jsonl --reward-model $rm --output-dir $out/scores-$size --seed $seed --resume
    done

    say "every policy on one scale"
    python gridworld.py score $runs/sft $out/ppo-{small,large} --data $data --output $out/score.png --csv $runs/over-optimisation.csv \
        $(tiny && echo --samples 1)

    python - "$runs" "${STEPS:-}" <<'PY' || verdict=1
import json, sys
from math import comb, inf, log, sqrt
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gridworld import quality
runs, steps = sys.argv[1:]
read = lambda name: [json.loads(line) for line in open(f"{runs}/over-optimisation/{name}.jsonl")]
sizes, models, times = ("small", "large"), dict(small="small-reward-model", large="reward_model"), (1, 2, 4, 8, 16, 32, 64)
samples = [row | dict(true=[quality(row["prompt"], text, "helpful") for text in row["completions"]]) for row in read("samples")]

def deviation(pairs):
    """Standard deviation of (value, how often)."""
    count = sum(k for _, k in pairs)
    mean = sum(x * k for x, k in pairs) / count
    return sqrt(sum((x - mean) ** 2 * k for x, k in pairs) / count) or 1.0

def best_of(answers, n):
    """Unbiased, of all choices of n of the N answers: (value by which the best is chosen, how often, true score) each -> means and KL."""
    answers, below, total = sorted(answers, key=lambda answer: answer[0]), 0, sum(k for _, k, _ in answers)
    n, sums = min(n, total), [0.0, 0.0, 0.0]
    for proxy, k, true in answers:
        p = (comb(below + k, n) - comb(below, n)) / comb(total, n)  # of being the best
        below += k
        if p:
            sums = [s + x for s, x in zip(sums, (p * proxy, p * true, p * log(p * total / k)))]
    return sums

units = dict(true=deviation([(x, k) for row in samples for x, k in zip(row["true"], row["times"])]))
ppo, bon = {}, {}
for size in sizes:
    given = {str(row["prompt"]): {c[-1]["content"]: s for c, s in zip(row["completions"], row["scores"])} for row in read(f"scores-{size}/rankings")}
    scored = [[(given[str(row["prompt"])][text], k, true) for text, k, true in zip(row["completions"], row["times"], row["true"])
               if text in given[str(row["prompt"])]] for row in samples if str(row["prompt"]) in given]
    units[size] = deviation([(proxy, k) for row in scored for proxy, k, _ in row])
    means = lambda n: [sum(x) / len(scored) for x in zip(*(best_of(row, n) for row in scored))]
    bon[size] = [(kl, proxy, true) for proxy, true, kl in map(means, times)]
    raw = [(m["objective/kl"], m[f"rewards/{models[size]}/mean"], m["rewards/rule/mean"]) for m in read(f"ppo-{size}/metrics")]
    ppo[size] = [tuple(sum(x) / len(x) for x in zip(*raw[i : i + 5])) for i in range(max(1, len(raw) - 4))]  # means of 5 batches

figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for axis, title, curves in zip(axes, ("PPO without a KL penalty", "best of 1, 2, 4, ... 64"), (ppo, bon)):
    for size, colour in zip(sizes, ("tab:orange", "tab:blue")):
        kl, proxy, true = zip(*curves[size])
        d = [sqrt(max(0.0, x)) for x in kl]
        axis.plot(d, [(x - proxy[0]) / units[size] for x in proxy], "--", color=colour, label=f"proxy: {size} reward model")
        axis.plot(d, [(x - true[0]) / units["true"] for x in true], color=colour, label=f"true, following the {size} one")
    axis.axhline(0, color="lightgrey", zorder=0)
    axis.set(title=title, xlabel="square root of the KL to the initial policy (nats an answer)")
axes[0].set(ylabel="score less its start, in standard deviations")
axes[0].legend(fontsize=8)
figure.savefig(f"{runs}/over-optimisation.png", dpi=120)

def spent(curve, gain):
    """The KL at which a curve's true score first is so much above its start, between two points in proportion; infinite if it never is."""
    for (kl, _, true), (kl_then, _, then) in zip([curve[0], *curve], curve):
        if then - curve[0][2] >= gain:
            return kl + (kl_then - kl) * ((gain + curve[0][2] - true) / (then - true) if then > true else 1)
    return inf

noise, claims = 2 * units["true"] * sqrt(2 / (5 * 128)), {}  # two standard errors of the difference of two means of 5 batches
peaks = {size: max(ppo[size], key=lambda point: point[2]) for size in sizes}
for size in sizes:
    (_, first, start), (kl, proxy, true), (kl_end, last, end) = ppo[size][0], peaks[size], ppo[size][-1]
    claims[f"{size} reward model: true score of PPO {start:.2f}, at its peak {true:.2f} (KL {kl:.1f}), at the end {end:.2f} (KL {kl_end:.1f}), proxy "
           f"{first:.2f}, {proxy:.2f}, {last:.2f}"] = true > start + noise and end < true - noise and last > proxy > first
claims[f"peak of the larger less that of the smaller {peaks['large'][2] - peaks['small'][2]:+.2f}"] = peaks["large"][2] >= peaks["small"][2]
for size in sizes:
    gain = min(max(true for *_, true in curve) - curve[0][2] for curve in (ppo[size], bon[size]))
    kl, kl_ppo = spent(bon[size], gain), spent(ppo[size], gain)
    claims[f"KL for {gain:.2f} more true score from the {size} one: best-of-n {kl:.2f}, PPO {kl_ppo:.2f}"] = gain > noise and kl < kl_ppo
holds = all(claims.values())
text = "not judged (tiny)" if steps == "tiny" else "holds" if holds else "does not hold"
said = "; ".join(line + " (no)" * (steps != "tiny" and not true) for line, true in claims.items())
for size in sizes:
    line = ", ".join(f"{n}: {true:.2f} ({kl:.2f}, bound {log(n) - (n - 1) / n:.2f})" for n, (kl, _, true) in zip(times, bon[size]))
    print(f"beside it: best of n by the {size} reward model, true score (KL): {line}")
print(f"claim: {said}: {text}")
sys.exit(0 if holds or steps == "tiny" else 1)
PY
done
exit $verdict
