#!/usr/bin/env bash
# SFT against RLHF: what sets them apart by a survey (Wang et al. 2024, arXiv 2412.10400, introduction and 2.4.1;
# diversity and generalisation after Kirk et al. 2024, arXiv 2310.06452). recipes/claim.py measures each by one number.
#   (1) equally good answers   a step on one of two best walks makes the other less likely more often under SFT
#   (2) negative feedback      rejected walks become likelier by SFT on the chosen ones, less likely by DPO
#   (3) no looking back        SFT repeats the demonstrators' slips ("wait"), PPO makes fewer
#   (4) bias                   of two equal walks SFT prefers the one to the right, as the demonstrators do; PPO less
#   (5) safety                 rewarded for it, PPO walks more safely and refuses rightly no less often
#   (6) generalisation         with twice the lava, or no number above 0, PPO scores higher; its mean drop is no larger
#   (7) diversity              EAD of 8 answers to a grid falls from SFT to best of 4 to PPO
# All hold on seed 1; (4) fails on seed 0, (1) and (6) on seed 2. Settings: PPO as in instructgpt.sh; (2) lr 3e-4.
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model

    heading "RLHF: PPO from the reward model; DPO on the same rankings"
    ppo --rewards $runs/reward_model --output-dir $runs/ppo
    dpo --output-dir $runs/dpo --nll-coef 1

    heading "data: the chosen walks of the rankings; choices of annotators who mind lava; grids of two other kinds"
    grep '"kind": "harmless"' $data/preferences.jsonl > $out/harmless.jsonl
    python - $data $out <<'PY'
import json, os, random, sys
from gridworld import LAVA, check_answer, new_grid, pretrain_row, prompt_row, read_grid
data, out = sys.argv[1:]
def write(name, rows):
    os.makedirs(os.path.dirname(f"{out}/{name}"), exist_ok=True)
    open(f"{out}/{name}.jsonl", "w").writelines(json.dumps(row) + "\n" for row in rows)
rankings = map(json.loads, open(f"{data}/rankings.jsonl"))
best = ((row["prompt"], max(zip(row["scores"], row["completions"]))[1]) for row in rankings)
whole = ((prompt, text) for prompt, text in best if check_answer(read_grid(prompt), text).kind == "walk")
write("chosen", (dict(prompt=prompt, completion=[dict(role="assistant", content=text)]) for prompt, text in whole))
def poorer(grid):
    return tuple(tuple(str(-abs(int(cell))) if cell not in ("S", "G", LAVA) else cell for cell in row) for row in grid)
for name, lava, change in (("lava", 0.36, tuple), ("poor", 0.18, poorer)):
    rng = random.Random(name)
    write(f"{name}/test", (prompt_row(rng, change(new_grid(rng, 3, lava))) for _ in range(300)))
    write(f"{name}/test_pretrain", (pretrain_row(rng, change(new_grid(rng, 3, lava))) for _ in range(10)))
PY

    heading "fine-tuning on the chosen walks; a reward model of harm, and PPO from both reward models"
    python sft.py --model $runs/sft --dataset $out/chosen.jsonl --output-dir $out/chosen $common $(max_steps 3) \
        --learning-rate 3e-4 --batch-size 32
    learn_rewards --model $runs/sft --dataset $out/harmless.jsonl --output-dir $out/harmless --epochs 4
    ppo --rewards $runs/reward_model=0.1 $out/harmless=2 --output-dir $out/ppo-safe

    for kind in lava poor; do score_policies $recipe/$kind $out/$kind $runs/sft $runs/ppo; done
    report $runs/sft $runs/ppo $runs/dpo $out/ppo-safe
done
exit $verdict
