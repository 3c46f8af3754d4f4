#!/usr/bin/env bash
# Nemotron-4 340B (arXiv 2406.11704): DPO with a likelihood term, then three rounds of RPO, each from and against the
# last round's checkpoint. The reward model scores 4 answers of the round's policy to each prompt (all 6 pairs).
#
# Claim: the score rises over the rounds; on the first round's answers the better ones lose less probability under RPO
# than under DPO (rpo.py with --eta 1000); near ties stay near. Near ties are pairs of samples that state the same
# total; |beta h| on them is the gap_error of a run of rpo.py with learning rate 0 and both rewards 0.
#
#   Nemotron-4   DPO: 160k pairs, lr 3e-8 to 3e-7, beta 3e-4 to 3e-3, likelihood term 1e-5 to 1e-3 (its sum)
#                RPO: 300k pairs of many models' answers, lr 3e-7, beta 1e-3 to 1, eta 1, likelihood term 1e-5
#   here         DPO as in dpo.sh; RPO: 2000 prompts x 4 a round, lr 2e-4, beta 0.1, eta 0.3, likelihood term 0.2 (mean)
source "$(dirname "$0")/common.sh"
rpo() { python rpo.py --reward-model $runs/reward_model $common --learning-rate 2e-4 $(max_steps 3) "$@"; }
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft

    heading "DPO with the likelihood term; beside it a reward model on the same rankings"
    in_background $out/dpo.log dpo --output-dir $runs/dpo --nll-coef 1
    reward_model
    wait_for_background

    policy=$runs/dpo
    for round in 1 2 3; do
        heading "round $round: answers of the current policy, RPO on their scores"
        answers=$out/answers-$round.jsonl
        [ -e $answers ] || python gridworld.py annotate --model $policy --prompts $data/prompts.jsonl \
            --output $answers --k 4 --seed $((10 * seed + round)) --rows $(if_tiny 60 2000) --max-new-tokens 24
        rpo --model $policy --dataset $answers --eta 0.3 --nll-coef 0.2 --output-dir $out/rpo-$round
        policy=$out/rpo-$round
    done

    heading "the other parts of the claim: DPO and RPO on the first round's answers; then both on pairs of equal totals"
    first="--model $runs/dpo --dataset $out/answers-1.jsonl"
    in_background $out/as-dpo.log rpo $first --eta 1000 --output-dir $out/as-dpo
    rpo $first --eta 0.3 --output-dir $out/as-rpo
    wait_for_background
    python - $out <<'PY'
import json, sys
with open(f"{sys.argv[1]}/ties.jsonl", "w") as file:
    for row in map(json.loads, open(f"{sys.argv[1]}/answers-1.jsonl")):
        by_total = {}
        for answer in row["completions"]:
            by_total.setdefault(answer.rpartition("=")[2], set()).add(answer)
        for answers in map(sorted, by_total.values()):
            if len(answers) > 1:
                a, b = ([dict(role="assistant", content=answer)] for answer in answers[:2])
                pair = dict(prompt=row["prompt"], chosen=a, rejected=b, score_chosen=0.0, score_rejected=0.0)
                file.write(json.dumps(pair) + "\n")
PY
    for name in dpo rpo; do
        [ -s $out/ties.jsonl ] || break  # a hardly trained policy states no total twice
        in_background $out/ties.log python rpo.py --model $out/as-$name --reference $runs/dpo \
            --dataset $out/ties.jsonl --learning-rate 0 --max-steps 1 --batch-size 10000 --eval-fraction 0 \
            --output-dir $out/ties-$name --overwrite
        wait_for_background
    done

    report $runs/sft $runs/dpo $out/rpo-{1,2,3}
done
exit $verdict
