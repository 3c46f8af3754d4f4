#!/usr/bin/env bash
# Supervised fine-tuning against RLHF (a survey of RL for language models, Wang et al. 2024, arXiv 2412.10400, introduction and section 2.4.1;
# diversity and generalisation after Kirk et al. 2024, arXiv 2310.06452) on the grid world: what the survey says sets them apart, one number each.
# RLHF is PPO as in instructgpt.sh; in (2) DPO, in (5) PPO with a second reward model.
#
# What it must show:
#   (1) equally good answers   a step on one of two answers that are both best makes the other less likely under fine-tuning, seldom under RLHF
#   (2) negative feedback      rejected answers become likelier by fine-tuning on the chosen ones, less likely by DPO
#   (3) no looking back        fine-tuning repeats the slips that the demonstrators take back, PPO makes fewer
#   (4) bias                   the demonstrators like to start to the right; between two equal walks PPO does so less
#   (5) safety                 rewarded for it, PPO walks more safely, and refuses no less often where no path is safe (what it costs is printed)
#   (6) generalisation         on grids of another kind PPO scores higher than SFT, and drops no more: with twice the lava; with no number above 0
#   (7) diversity              answers to one grid are less diverse the more reward forms them: SFT, then the best of 4 by the reward model, then PPO
# How it is measured: (1) by gradients, on new grids with two best walks, both safe: does a step that raises one walk's log-probability
# (fine-tuning), or the reward model's mean score over all walks (RLHF), lower the other's? In more than half of the grids, and in fewer. (2) on whole walks of new rankings. (3) the share of sampled answers with "wait". (4) the mean probability of the walk to the right, of
# the two, on new grids. (6) the mean drop over both kinds. (7) as in Kirk et al.: EAD of 8 answers to a grid, of 100 grids; across is that of the
# first answers to all grids, which should hardly differ.
#
# All seven held on seed 1. (4) did not on seed 0 (0.585, PPO 0.654): nothing is paid for even-handedness, the KL term keeps the odds of equal
# answers, and the reward model, which starts as the SFT model, leans to the right too (by 0.13 there; by 0.03 and 0.22 on seeds 1 and 2). (1) and
# (6) did not on seed 2: there a step on one walk makes all walks likelier, so that the other falls in 0.26 of the grids only (0.09 by RLHF; of
# what all walks have, its share falls in 0.46 and 0.04); and PPO, far above SFT on both kinds of grids, drops by 0.02 where SFT does not drop.
# (5) was tried with weights 1 and 1 on seed 0, which was too weak (0.39 of the walks safe); the weights are now those of deepseek-v2.sh.
# Nothing else was tuned.
#
#   Kirk et al.  LLaMA 7B, summaries: 16 answers x 500 inputs, best of 16, PPO with KL 0.05; EAD by input 0.79 (SFT) and 0.07 (RLHF) for OPT 6.7B
#   here         (2) one epoch on the best answer of each ranking where that is a walk, lr 3e-4, against dpo.sh's DPO; (5) a reward model on 1500 choices of people to whom lava is a
#                harm, 4 epochs; PPO from 0.1 times the first one and 2 times this one; KL 0.2 throughout
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

    say "RLHF: a reward model on rankings and PPO from it; DPO on the same rankings"
    python reward_model.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/reward_model --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --epochs 2
    ppo() {
        OMP_NUM_THREADS=1 python ppo.py --model $runs/sft --dataset $data/prompts.jsonl --seed $seed --resume --learning-rate 2e-4 \
            --value-learning-rate 1e-3 --warmup-ratio 0.1 --kl-coef 0.2 --batch-size 128 --ppo-epochs 2 --max-new-tokens 24 $(few 3) "$@"
    }
    ppo --reward-model $runs/reward_model --output-dir $runs/ppo
    python dpo.py --model $runs/sft --dataset $data/rankings.jsonl --output-dir $runs/dpo --seed $seed --resume --learning-rate 3e-4 --epochs 3 \
        --max-new-tokens 24 $(few 3) --nll-coef 1

    out=$runs/sft-vs-rlhf
    say "data: chosen answers alone; choices of people to whom lava is a harm; grids of two other kinds"
    python - $data $out <<'PY'
import json, os, random, sys
from gridworld import LAVA, check_answer, new_grid, pretrain_row, prompt_row, read_grid
data, out = sys.argv[1:]
read = lambda name: map(json.loads, open(f"{data}/{name}.jsonl"))
def write(name, rows):
    os.makedirs(os.path.dirname(f"{out}/{name}"), exist_ok=True)
    open(f"{out}/{name}.jsonl", "w").writelines(json.dumps(row) + "\n" for row in rows)
best = ((row["prompt"], max(zip(row["scores"], row["completions"]))[1]) for row in read("rankings"))
whole = ((prompt, text) for prompt, text in best if check_answer(read_grid(prompt), text).kind == "walk")
write("chosen", (dict(prompt=prompt, completion=[dict(role="assistant", content=text)]) for prompt, text in whole))
write("harmless", (row for row in read("preferences") if row["kind"] == "harmless"))
def poorer(grid):
    return tuple(tuple(str(-abs(int(cell))) if cell not in ("S", "G", LAVA) else cell for cell in row) for row in grid)
for name, lava, change in (("lava", 0.36, tuple), ("poor", 0.18, poorer)):
    rng = random.Random(name)
    write(f"{name}/test", (prompt_row(rng, change(new_grid(rng, 3, lava))) for _ in range(300)))
    write(f"{name}/test_pretrain", (pretrain_row(rng, change(new_grid(rng, 3, lava))) for _ in range(10)))
PY

    say "fine-tuning on the chosen answers, without the rejected ones"
    python sft.py --model $runs/sft --dataset $out/chosen.jsonl --output-dir $out/chosen --seed $seed --resume $(few 3) \
        --learning-rate 3e-4 --batch-size 32

    say "a reward model of harm; PPO from both"
    python reward_model.py --model $runs/sft --dataset $out/harmless.jsonl --output-dir $out/harmless --seed $seed --resume $(few 8) \
        --learning-rate 1e-3 --epochs 4
    ppo --reward-model $runs/reward_model $out/harmless --reward-weights 0.1 2 --output-dir $out/ppo-safe

    say "every policy on one scale; then both on grids of another kind: twice the lava, and no number above 0"
    python gridworld.py score $runs/sft $runs/ppo $runs/dpo $out/ppo-safe --data $data --output $runs/sft-vs-rlhf.png --csv $runs/sft-vs-rlhf.csv \
        $(tiny && echo --samples 1)
    for kind in lava poor; do
        python gridworld.py score $runs/sft $runs/ppo --data $out/$kind --output $out/$kind.png --csv $out/$kind.csv $(tiny && echo --samples 1)
    done

    say "the numbers that the table has not"
    python - "$runs" $data "${STEPS:-}" <<'PY'
import json, random, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from gridworld import answer_all, as_ids, assistant, check_answer, ead, grid_text, load_policy, mean, new_grid, ranking_row, tell, user, walks
runs, data, steps = sys.argv[1:]
small = steps == "tiny"
paths = dict(sft="sft", ppo="ppo", dpo="dpo", chosen="sft-vs-rlhf/chosen")
policies = {name: (model.cpu(), tokenizer) for name, path in paths.items() for model, tokenizer in [load_policy(f"{runs}/{path}")]}
tokenizer, rewards = policies["sft"][1], AutoModelForSequenceClassification.from_pretrained(f"{runs}/reward_model", dtype=torch.float32).eval()

def logp(name, prompt, answer):
    """log pi(answer | prompt), the end of the turn included."""
    model, tokenizer = policies[name]
    before, ids = len(as_ids(tokenizer, prompt, answer_next=True)), as_ids(tokenizer, [*prompt, assistant(answer)])
    logits = model(input_ids=torch.tensor([ids])).logits[0, before - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[before:])[:, None]).sum()

@torch.no_grad()
def reward(prompt, answer):
    return rewards(input_ids=torch.tensor([as_ids(tokenizer, [*prompt, assistant(answer)])])).logits[0, 0]

def gradient(value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policies["sft"][0].parameters()), retain_graph=True)])

def new_grids(count, name, accept):
    """That many new grids, for which accept finds something, with what it finds."""
    rng, found = random.Random(f"sft-vs-rlhf {name}"), []
    while len(found) < count:
        grid = new_grid(rng, 3)
        if thing := accept(rng, grid):
            found.append(([user(grid_text(grid))], grid, thing))
    return found
found = {}

# (1) two walks that are both best: does a step on the first make the second less likely?
def two_best(rng, grid):
    best = [walk for walk in walks(grid) if walk.total == max(w.total for w in walks(grid))]
    return rng.sample(best, 2) if len(best) == 2 and all(walk.safe for walk in best) else None
falls = dict(sft=[], rlhf=[])
for prompt, grid, (a, b) in new_grids(3 if small else 100, 1, two_best):
    told = list(map(tell, walks(grid)))
    logps = torch.stack([logp("sft", prompt, text) for text in told])
    scores = torch.stack([reward(prompt, text) for text in told])
    other = gradient(logps[told.index(tell(b))])
    falls["sft"].append((gradient(logps[told.index(tell(a))]) @ other).item() < 0)
    falls["rlhf"].append((gradient((logps.softmax(0) * scores).sum()) @ other).item() < 0)
found["falls"] = {name: mean(values) for name, values in falls.items()}

# (2) rejected answers: pairs of whole walks out of new rankings
def ranked(rng, grid):
    row = ranking_row(rng, grid)
    kept = [pair for pair in zip(row["scores"], row["completions"]) if check_answer(grid, pair[1]).kind == "walk"]
    return min(kept)[1] if len(kept) > 1 else None
rejected = new_grids(3 if small else 200, 2, ranked)
with torch.no_grad():
    found["rejected"] = {name: mean(logp(name, prompt, text).item() for prompt, _, text in rejected) for name in policies}

# (3) slips, in 16 answers to each held-out grid
prompts = [json.loads(line)["prompt"] for line in open(f"{data}/test.jsonl")][: 8 if small else 300]
answers = {name: answer_all(*policies[name], prompts, 2 if small else 16, 48, 1.0, 0)[0] for name in ("sft", "ppo")}
found["slips"] = {name: mean(" wait " in text for texts in group for text in texts) for name, group in answers.items()}

# (4) bias: two walks of equal total, one to the right and one up, equally safe
def equal(rng, grid):
    same = lambda a, b: (a.moves[0], b.moves[0], a.total, a.safe) == ("right", "up", b.total, b.safe)
    pairs = [(a, b) for a in walks(grid) for b in walks(grid) if same(a, b)]
    return rng.choice(pairs) if pairs else None
with torch.no_grad():
    pairs = new_grids(3 if small else 300, 4, equal)
    found["right"] = {name: mean(torch.sigmoid(logp(name, p, tell(a)) - logp(name, p, tell(b))).item() for p, _, (a, b) in pairs)
                      for name in ("sft", "ppo")}
found["taste"] = mean((reward(p, tell(a)) - reward(p, tell(b))).item() for p, _, (a, b) in pairs)

# (7) diversity: 8 answers to a grid; the best of 4 has 8 groups of 4
prompts = prompts[:100]
groups = [[texts[i : i + 4] for i in range(0, len(texts), 4)] for texts in answer_all(*policies["sft"], prompts, 4 if small else 32, 48, 1.0, 1)[0]]
best = []
for prompt, fours in zip(prompts, groups):
    worth = {text: reward(prompt, text).item() for four in fours for text in four}
    best.append([max(four, key=worth.get) for four in fours])
shown = {name: [texts[:8] for texts in group[:100]] for name, group in answers.items()} | dict(best=best)
found["diverse"] = {name: mean(map(ead, group)) for name, group in shown.items()}
found["across"] = {name: ead([texts[0] for texts in group]) for name, group in shown.items()}
open(f"{runs}/sft-vs-rlhf/numbers.json", "w").write(json.dumps(found, indent=2) + "\n")
PY

    python - "$runs" "${STEPS:-}" <<'PY' || verdict=1
import csv, json, sys
runs, steps = sys.argv[1:]
def table(path):
    return {row["checkpoint"].rstrip("/").split("/")[-1]: row for row in csv.DictReader(open(path))}
found, rows = json.load(open(f"{runs}/sft-vs-rlhf/numbers.json")), table(f"{runs}/sft-vs-rlhf.csv")
two = lambda key, names=("sft", "ppo"), rows=rows: [float(rows[name][key]) for name in names]
score = two("score")
safe, refused, wrongly, cost = (two(key, ("sft", "ppo-safe")) for key in ("safe", "refused", "wrongly", "score"))
shifted = [two("score", rows=table(f"{runs}/sft-vs-rlhf/{kind}.csv")) for kind in ("lava", "poor")]
drop = [sum(score[i] - kind[i] for kind in shifted) / 2 for i in (0, 1)]
falls, rejected, slips, right, diverse, across = (found[key] for key in ("falls", "rejected", "slips", "right", "diverse", "across"))
lines = [
    (f"equally good answers: the other best walk gets less likely in {falls['sft']:.2f} of grids by a step of SFT, in {falls['rlhf']:.2f} "
     "by one of RLHF", falls["sft"] > 0.5 > falls["rlhf"]),
    (f"negative feedback: log-probability of rejected walks {rejected['sft']:.2f} at the start; {rejected['chosen']:.2f} by SFT on chosen ones, "
     f"{rejected['dpo']:.2f} by DPO", rejected["chosen"] > rejected["sft"] > rejected["dpo"]),
    (f"no looking back: slips in {slips['sft']:.4f} of answers SFT, {slips['ppo']:.4f} PPO", slips["ppo"] < slips["sft"]),
    (f"bias: of two equal walks the one to the right with {right['sft']:.3f} SFT, {right['ppo']:.3f} PPO "
     f"(the reward model's mean gap {found['taste']:+.2f})", abs(right["ppo"] - 0.5) < abs(right["sft"] - 0.5)),
    (f"safety: safe walks {safe[0]:.2f} SFT, {safe[1]:.2f} PPO with the second reward model; right refusals {refused[0]:.2f}, {refused[1]:.2f} "
     f"(wrong ones {wrongly[0]:.2f}, {wrongly[1]:.2f}; score {cost[0]:.2f}, {cost[1]:.2f})",
     safe[1] > safe[0] and refused[1] >= refused[0]),
    (f"generalisation: score {score[0]:.2f} SFT, {score[1]:.2f} PPO; with twice the lava {shifted[0][0]:.2f}, {shifted[0][1]:.2f}; "
     f"with no number above 0 {shifted[1][0]:.2f}, {shifted[1][1]:.2f}", all(kind[1] > kind[0] for kind in shifted) and drop[1] <= drop[0]),
    (f"diversity by input: {diverse['sft']:.2f} SFT, {diverse['best']:.2f} best of 4, {diverse['ppo']:.2f} PPO (across inputs {across['sft']:.2f}, "
     f"{across['best']:.2f}, {across['ppo']:.2f})", diverse["sft"] > diverse["best"] > diverse["ppo"]),
]
for number, (line, true) in enumerate(lines, 1):
    print(f"({number}) {line}: {'not judged (tiny)' if steps == 'tiny' else 'holds' if true else 'does not hold'}")
count = sum(true for _, true in lines)
text = "not judged (tiny)" if steps == "tiny" else "holds" if count == len(lines) else "does not hold"
print(f"claim: {count} of {len(lines)} differences between SFT and RLHF are as described: {text}")
sys.exit(0 if count == len(lines) or steps == "tiny" else 1)
PY
done
exit $verdict
