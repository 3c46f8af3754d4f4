#!/usr/bin/env bash
# ChatGLM-RLHF (Hou et al. 2024, arXiv 2404.00934). Reward model: as many longer as shorter winners in each bucket of
# length difference, L2 on scores. Prompts whose answers hardly differ in reward are dropped. PPO: the reward minus that
# of the reference's own answer, no whitening, SFT data in the update. Two effects are planted: annotators rate answers
# with a false start half a point higher, and a function adds 1 for each lava cell of the prompt's grid.
#
# Claim: balanced, the reward model follows length less and is right as often; with the baseline PPO's reward starts
# nearer to 0 and varies less; PPO with the remedies keeps more of SFT than without them and beats SFT on score.
#
#   ChatGLM-RLHF   6 B and 32 B; 221k pairs; lr 1e-6, 600 to 800 updates; buckets, weights, KL, batch size not found
#   here           2700 rankings of 4, edges 2, 4, 6, 8 tokens, L2 0.01, lr 1e-3; PPO: lr 2e-4, 24 batches of 128
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft

    heading "rankings by annotators who take longer answers for better ones; held out are some without this taste"
    python - $data/rankings.jsonl $out <<'PY'
import json, random, re, sys
rng, rows = random.Random(0), [json.loads(line) for line in open(sys.argv[1])]
held_out = len(rows) // 10
for number, row in enumerate(rows):
    for k, answer in enumerate(row["completions"]):
        # half of the walks get a false start
        if re.fullmatch(r"((right|up) -?\d+ ){4}= -?\d+", answer) and rng.random() < 0.5:
            words = answer.split()
            steps = rng.randint(1, 3)
            slip = str(int(words[2 * steps - 1]) + rng.choice((-2, -1, 1, 2)))
            row["completions"][k] = " ".join([*words[: 2 * steps - 1], slip, "wait", answer])
            if number >= held_out:
                row["scores"][k] = round(row["scores"][k] + 0.5, 2)
for name, part in (("held-out", rows[:held_out]), ("rankings", rows[held_out:])):
    open(f"{sys.argv[2]}/{name}.jsonl", "w").writelines(json.dumps(row) + "\n" for row in part)
PY

    heading "two reward models: plain, and balanced by length with scores held near 0"
    rankings="--model $runs/sft --dataset $out/rankings.jsonl --eval-dataset $out/held-out.jsonl --epochs 2"
    learn_rewards $rankings --output-dir $out/plain
    learn_rewards $rankings --output-dir $out/balanced --length-buckets 2 4 6 8 --score-l2 0.01

    heading "prompts whose answers differ in reward"
    python rlaif.py best-of-n --model $runs/sft --reward-model $out/balanced --dataset $data/prompts.jsonl --n 4 \
        --max-new-tokens 24 --min-spread $(if_tiny 0 0.5) --rows $(if_tiny 40 4000) --output-dir $out/prompts $common \
        || tiny
    filtered=$out/prompts/prompts.jsonl
    [ -s $filtered ] || filtered=$data/prompts.jsonl  # a hardly trained policy ends no answer

    heading "PPO without the remedies, and with them"
    learn_by_ppo() {
        python ppo.py --model $runs/sft $common $ppo_settings --kl-coef 0.1 --batch-size 128 \
            --max-steps $(if_tiny 3 24) "$@"
    }
    learn_by_ppo --rewards $out/plain recipes/rewards.py:level --dataset $data/prompts.jsonl --output-dir $out/ppo-plain
    learn_by_ppo --rewards $out/balanced recipes/rewards.py:level --dataset $filtered --output-dir $out/ppo-tricks \
        --reference-baseline --no-whiten-advantages --ptx-dataset $data/sft.jsonl --ptx-coef 0.3 --ptx-batch-size 64

    heading "what is left of SFT: the loss on new demonstrations"
    [ -e $out/fresh/sft.jsonl ] || python gridworld.py data --output-dir $out/fresh --rows 600 --seed 1
    for name in sft chatglm/ppo-plain chatglm/ppo-tricks; do
        python sft.py --model $runs/$name --dataset $out/fresh/sft.jsonl --eval-dataset $out/fresh/sft.jsonl \
            --learning-rate 0 --max-steps 1 --batch-size 8 --output-dir $out/demonstrations/${name##*/} --resume
    done

    report $runs/sft $out/ppo-{plain,tricks}
done
exit $verdict
