#!/usr/bin/env bash
# Zephyr-141B by ORPO (Hong, Lee & Thorne 2024, arXiv 2403.07691): fine-tuning and preferences in one stage, from the
# base model and without a reference model. The same run with lambda 0 is fine-tuning on the chosen answers.
#
# Claim: at equal steps ORPO scores higher than that fine-tuning; it raises rejected answers less and the log odds ratio
# more. The second part starts from the SFT model and uses whole walks only: from the base, learning the chat format
# raises every answer at first. In the paper (figures 3 and 6) rejected answers fall outright; here they only gain less.
#
#   Zephyr-141B   lambda 0.05, lr 5e-6, inverse square root, warm-up 100, 3 epochs, batch 32
#   the paper     lambda 0.1 (Mistral), 0.2 (Llama 2), 0.25 (Phi-2), lr 5e-6 to 8e-6
#   here          lambda 0.5, lr 1e-3, cosine, 3 epochs, batch 32
source "$(dirname "$0")/common.sh"
orpo() { python orpo.py $common $(max_steps 3) "$@"; }
for seed in ${SEEDS:-0}; do
    start_seed $seed base

    heading "ORPO and, beside it, fine-tuning on the chosen answers; both from the base model"
    from_base="--model $runs/base --dataset $data/rankings.jsonl --learning-rate 1e-3"
    in_background $runs/chosen.log orpo $from_base --odds-ratio-coef 0 --output-dir $runs/chosen
    orpo $from_base --odds-ratio-coef 0.5 --output-dir $runs/orpo
    wait_for_background

    sft
    python - $data/rankings.jsonl $data/walks.jsonl <<'PY'
import json, re, sys
with open(sys.argv[2], "w") as file:
    for row in map(json.loads, open(sys.argv[1])):
        pairs = zip(row["completions"], row["scores"])
        kept = [(c, s) for c, s in pairs if re.fullmatch(r"((right|up) -?\d+ )+= -?\d+", c)]
        if len(kept) > 1:
            walks = dict(prompt=row["prompt"], completions=[c for c, _ in kept], scores=[s for _, s in kept])
            file.write(json.dumps(walks) + "\n")
PY
    heading "the second part of the claim: both from the SFT model, on whole walks; and where they start"
    walks="--model $runs/sft --dataset $data/walks.jsonl"
    start_and_chosen() {
        python orpo.py $walks $common --learning-rate 0 --max-steps 1 --output-dir $out/start
        orpo $walks --learning-rate 3e-4 --epochs 1 --odds-ratio-coef 0 --output-dir $out/chosen
    }
    in_background $runs/chosen.log start_and_chosen
    orpo $walks --learning-rate 3e-4 --epochs 1 --odds-ratio-coef 0.5 --output-dir $out/orpo
    wait_for_background

    report $runs/chosen $runs/orpo
done
exit $verdict
