#!/usr/bin/env bash
# Over-optimisation of reward models (Gao et al. 2022, arXiv 2210.10760): two reward models of different size learn the
# same rankings; PPO without a KL penalty and best-of-n follow each. runs/over-optimisation.png shows the reward (proxy)
# and the truth (gold: the annotators' opinion without noise) against the square root of the KL to the initial policy.
#
# Claim: the true score of PPO rises, then falls, each by more than two standard errors, while the proxy rises on; the
# larger reward model reaches at least as high a true peak; best-of-n spends less KL than PPO for the same true gain. It
# holds on seeds 0 and 1; on seed 2 the true score only falls.
#
#   Gao et al.   gold: a 6 B reward model; proxies 3 M to 3 B on 90,000 of its labels; policy 1.2 B; n to 60,000
#   here         proxies of 74,000 and 845,000 parameters on 3000 rankings of 4; policy 845,000; 60 batches; n to 64
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model small_base small_sft
    heading "the small reward model, on the same rankings"
    learn_rewards --model $runs/small-sft --dataset $data/rankings.jsonl --output-dir $runs/small-reward-model \
        --learning-rate 2e-3 --epochs 2

    for size in small large; do  # gold, the true score, has weight 0: it is only logged
        heading "PPO without a KL penalty, from the $size reward model"
        rewards=$runs/reward_model; [ $size = large ] || rewards=$runs/small-reward-model
        python ppo.py --model $runs/sft --rewards $rewards recipes/rewards.py:gold=0 --value-model $runs/sft \
            --dataset $data/prompts.jsonl --kl-coef 0 --output-dir $out/ppo-$size $common --epochs 2 \
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
        python rlaif.py best-of-n --dataset $out/samples.jsonl --reward-model $rewards \
            --output-dir $out/scores-$size $common
    done

    report $runs/sft $out/ppo-{small,large}  # the claim replaces the picture by its own
done
exit $verdict
