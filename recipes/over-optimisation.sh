#!/usr/bin/env bash
# Over-optimisation of reward models (Gao et al. 2022, arXiv 2210.10760): two reward models of different size learn the
# same rankings; PPO without a KL penalty and best-of-n follow each. runs/over-optimisation.png shows the reward (proxy)
# and the truth (gold) against the square root of the KL to the initial policy.
#
# Claim: the true score of PPO rises, then falls, each by more than two standard errors, while the proxy rises on; the
# larger reward model reaches at least as high a true peak; best-of-n spends less KL than PPO for the same true gain. It
# holds on seeds 0 and 1; on seed 2 the true score only falls.
#
#   Gao et al.   gold: a 6 B reward model; proxies 3 M to 3 B on 90,000 of its labels; policy 1.2 B; batch 256; n to
#                60,000
#   here         gold: the annotators' opinion without noise: points (0 to 1), -0.5 for a lie, 1.25 for a right refusal,
#                -0.25 for a wrong one, -2 for no walk; proxies of 74,000 and 845,000 parameters on 3000 noisy rankings
#                of 4; policy 845,000; batch 128, 60 batches, 5 for the critic alone; lr rises all the way, to 4e-4
#                (critic 1e-3); n to 64
# KL: nats an answer; for best-of-n that of the answers drawn (Gao's log n - (n-1)/n is an upper bound where answers
# repeat).
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed
    world
    base
    sft
    reward_model
    small_base
    small_sft
    heading "the small reward model, on the same rankings"
    python reward_model.py --model $runs/small-sft --dataset $data/rankings.jsonl \
        --output-dir $runs/small-reward-model $common $(max_steps 8) --learning-rate 2e-3 --epochs 2

    out=$runs/over-optimisation
    mkdir -p $out
    cat > $out/gold.py <<'PY'
from gridworld import quality


def gold(prompts, completions, **columns):
    return [quality(prompt, completion[-1]["content"], "helpful") for prompt, completion in zip(prompts, completions)]
PY
    for size in small large; do  # the rule, with weight 0, only logs the true score
        heading "PPO without a KL penalty, from the $size reward model"
        rewards=$runs/reward_model; [ $size = large ] || rewards=$runs/small-reward-model
        python ppo.py --model $runs/sft --reward-model $rewards --value-model $runs/sft --dataset $data/prompts.jsonl \
            --rule $out/gold.py:gold --rule-weight 0 --kl-coef 0 --output-dir $out/ppo-$size $common --epochs 2 \
            --max-steps $(if_tiny 3 60) --learning-rate 4e-4 --value-learning-rate 1e-3 --warmup-ratio 1 \
            --critic-warmup $(if_tiny 1 5) --batch-size 128 --ppo-epochs 2 --max-new-tokens 24
    done

    heading "64 answers to each of 300 prompts, for best-of-n"
    [ -e $out/samples.jsonl ] || python - $runs $data $seed $(if_tiny 10 300) <<'PY'
import json, os, random, sys
from collections import Counter
from gridworld import answer_all, load_policy
runs, data, seed, count = sys.argv[1:]
rows = [json.loads(line) for line in open(f"{data}/prompts.jsonl")]
rows = random.Random(int(seed)).sample(rows, int(count))
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
        rewards=$runs/reward_model; [ $size = large ] || rewards=$runs/small-reward-model
        python rlaif.py best-of-n --model "" --dataset $out/samples.jsonl --reward-model $rewards \
            --output-dir $out/scores-$size $common
    done

    heading "every policy on one scale"
    python gridworld.py score $runs/sft $out/ppo-{small,large} --data $data --output $out/score.png \
        --csv $runs/over-optimisation.csv $(if_tiny "--samples 1")
    judge_claim over-optimisation
done
exit $verdict
