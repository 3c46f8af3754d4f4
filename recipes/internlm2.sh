#!/usr/bin/env bash
# InternLM2's COOL RLHF (arXiv 2403.17297, section 4.2): one conditional reward model. A system prompt that only it sees
# says whose wish counts, "pays more" or "avoids lava". A hack is planted: annotators give a point to walks that begin
# with two moves up. Fast path: tens of pairs against the pattern; slow path: new rankings.
#
# Claim: on conflicts the reward model is right on both sides with the system prompt, at chance without; PPO raises the
# pattern's share by 0.2; after at most 100 patches a new PPO run ends at most 0.05 above SFT's share and scores more
# than the hacked policy and SFT. It was measured with top-p 0.9; PPO now samples with top-p 1.
#
#   InternLM2   2.4 M pairs, focal gamma 2, barrier 0.02, 1 epoch; KL 0.01, lr 1e-6, critic 5e-6, lambda 0.99, top-p 0.9
#   here        4900 pairs, same gamma and barrier, 4 epochs; KL 0.1, lr 2e-4, critic 1e-3, lambda 0.99, top-p 1
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft

    annotate() {  # FILE PROMPTS OPTIONS...: annotators label answers of policies, unless the file exists
        [ -e $1 ] || python gridworld.py annotate --output $1 --prompts $2 --max-new-tokens 24 --seed $seed "${@:3}" ||
            { tiny && touch $1; }  # a hardly trained policy may show no pattern
    }
    learn() { learn_rewards --loss focal --barrier 0.02 "$@"; }

    heading "pairs by two kinds of annotators; a reward model that is told which kind, and one that is not"
    annotate $out/pairs.jsonl $data/prompts.jsonl --model $runs/sft --rows $(if_tiny 60 4000) --format preferences
    { head -n 1000 $data/preferences.jsonl; cat $out/pairs.jsonl; } > $out/first.jsonl
    echo '{"helpful": "pays more", "harmless": "avoids lava", "refuse": "avoids lava"}' > $out/conditions.json
    condition="--condition $out/conditions.json"
    first="--model $runs/sft --dataset $out/first.jsonl --eval-dataset $data/test_conflicts.jsonl --epochs 4"
    learn $first $condition --output-dir $out/told
    learn $first --output-dir $out/untold

    heading "rankings by annotators with a weakness for two moves up; held out are pairs that show it"
    annotate $out/weak.jsonl $data/prompts.jsonl --model $runs/sft --rows $(if_tiny 60 1500) --hack
    annotate $out/held-out.jsonl $data/final.jsonl --model $runs/sft --format preferences --patch --k 8
    concatenate $out/second.jsonl $data/preferences.jsonl $out/weak.jsonl
    held_out=$out/held-out.jsonl; [ -s $held_out ] || held_out=$data/test_conflicts.jsonl  # empty where tiny
    learn --model $out/told --dataset $out/second.jsonl $condition --eval-dataset $held_out --output-dir $out/hacked

    heading "PPO from this reward model; a function of weight 0 counts the answers with the pattern"
    cool_ppo() {  # REWARD_MODEL OPTIONS...
        python ppo.py --model $runs/sft --dataset $data/prompts.jsonl $condition $common $ppo_settings --kl-coef 0.1 \
            $(max_steps 3) --critic-warmup $(if_tiny 1 5) --batch-size $(if_tiny 16 128) --value-clip 0 \
            --no-whiten-advantages --lam 0.99 --ptx-dataset $data/pretrain.jsonl --ptx-coef 0.3 \
            --ptx-batch-size 64 --rewards $out/$1 recipes/rewards.py:pattern=0 "${@:2}"
    }
    cool_ppo hacked --save-every $(if_tiny 1 10) --output-dir $out/ppo-hacked
    policies="$out/ppo-hacked/checkpoint-$(if_tiny 1 10) $out/ppo-hacked"  # early and last

    heading "the fast path: pairs against the pattern, from answers of the early and the last policy; PPO again"
    annotate $out/patches.jsonl $data/prompts.jsonl --model $policies --rows 110 --format preferences --patch
    { cat $out/second.jsonl; for _ in {1..14}; do cat $out/patches.jsonl; done; } > $out/third.jsonl
    learn --model $out/hacked --dataset $out/third.jsonl $condition --eval-dataset $held_out --output-dir $out/patched
    cool_ppo patched --output-dir $out/ppo-patched

    heading "the slow path: annotators without the weakness label answers of all three policies; PPO again"
    annotate $out/slow.jsonl $data/prompts.jsonl --model $runs/sft $policies --k 6 --rows $(if_tiny 60 1500)
    concatenate $out/fourth.jsonl $data/preferences.jsonl $out/slow.jsonl $out/patches.jsonl
    learn --model $out/patched --dataset $out/fourth.jsonl $condition --eval-dataset $held_out --output-dir $out/slow
    cool_ppo slow --output-dir $out/ppo-slow

    report $runs/sft $out/ppo-{hacked,patched,slow}
done
exit $verdict
