"""Accuracy of a policy whose thinking is cut off after a number of tokens: the test-time axis of OpenAI's o1 post.

python recipes/thinking_budgets.py --model runs/o1 --dataset data/grid/test_reasoning.jsonl \
    --reward gridworld.py:best_walk --max-new-tokens 96 --budgets 0 24 72 --output-dir runs/o1-budgets

Samples an answer to each prompt. For each budget, an answer that still thinks after so many tokens has its thinking
closed there, and the policy goes on from </think>. Writes {"thinking_budget": {budget: accuracy}} to report.json, and
draws it in test_time.png.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo


@dataclass
class Args:
    model: str
    """policy that writes <think>...</think> before its answers: hub id or directory"""
    dataset: str
    """held-out prompts, with the columns that the reward reads"""
    reward: str
    """what says which answers are right, as in grpo.py --rewards: file.py:function that returns 0 or 1, or match:"""
    budgets: tuple[int, ...]
    """numbers of tokens after which the thinking is closed, from 0 to below --max-new-tokens"""
    output_dir: str
    """where report.json and test_time.png go"""
    max_new_tokens: int = 256
    """tokens of an answer, its thinking included"""
    temperature: float = 1.0
    """of sampling"""
    seed: int = 0
    """of sampling"""


def accuracy_by_budget(policy, tokenizer, reward, rows: list, budgets, stops: list, args, device) -> dict:
    """The share of right answers for each budget. args: of grpo.py."""
    numbers = grpo.uniform_numbers(args.seed, -2, list(range(len(rows))), args.max_new_tokens)
    sample = partial(grpo.sample_answers, policy, stops=stops, args=args, temperature=args.temperature)
    whole, _ = sample([row.prompt for row in rows], numbers)
    accuracies = {}
    for budget in budgets:
        texts = grpo.answer_texts(tokenizer, rows, [ids[:budget] for ids in whole], stops)
        begun = {}  # the answers that still think then: number -> ids up to </think>
        for i, (ids, text) in enumerate(zip(whole, texts)):
            has_opened = "<think>" in text
            if len(ids) > budget and "</think>" not in text and (has_opened or not budget):
                close = " </think>" if has_opened else "<think> </think>"
                close = "</think>" if text.endswith("<think>") else close
                begun[i] = ids[:budget] + tokenizer(close, add_special_tokens=False).input_ids
        prompts = [[*rows[i].prompt, *ids] for i, ids in begun.items()]
        ends, _ = sample(prompts, numbers[list(begun), budget:])
        closed = {i: ids + end for (i, ids), end in zip(begun.items(), ends)}
        answers = [closed.get(i, ids) for i, ids in enumerate(whole)]
        texts = grpo.answer_texts(tokenizer, rows, answers, stops)
        scores = grpo.total_reward([reward], rows, texts, answers)[1][reward.name].tolist()
        known = Counter(score for score in scores if not math.isnan(score))
        if others := set(known) - {0.0, 1.0}:
            grpo.fail(f"--reward {reward.name}: must say right or wrong, 1 or 0; it gave {min(others)}")
        accuracies[budget] = known[1.0] / max(1, known.total())
    return accuracies


def main(args: Args):
    if not args.budgets or min(args.budgets) < 0 or max(args.budgets) >= args.max_new_tokens:
        grpo.fail("--budgets: each must be from 0 to below --max-new-tokens")
    sampling = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    run = grpo.Args(model=args.model, dataset=args.dataset, rewards=(args.reward,), **sampling)
    device, dtype = grpo.setup_distributed(run)
    tokenizer = grpo.load_tokenizer(args.model)
    policy = grpo.read_model(AutoModelForCausalLM, args.model, tokenizer)
    grpo.check_sampler(policy, args.model)
    policy = grpo.prepare_model(policy, args.model, run, device, dtype)
    (reward,) = grpo.load_rewards(run, device, dtype)
    tags = tokenizer("<think> </think>", add_special_tokens=False).input_ids  # they are not the policy's own
    max_prompt = grpo.fit_length(run, args.model) - args.max_new_tokens - len(tags)
    encode_row = partial(grpo.prompt_rows, tokenizer, max_prompt, [reward.check] if reward.check else [])
    rows = grpo.prepare("--dataset", args.dataset, "test", tokenizer, encode_row)
    stops = grpo.stop_ids(policy, tokenizer)
    accuracies = accuracy_by_budget(policy, tokenizer, reward, rows, args.budgets, stops, run, device)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    grpo.write_json(out / "report.json", dict(thinking_budget=accuracies))
    figure = Figure(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(list(accuracies), list(accuracies.values()), "o-")
    axis.set(xlabel="tokens of thinking allowed", ylabel="accuracy on held-out prompts")
    figure.savefig(out / "test_time.png", dpi=120)
    print("accuracy by tokens of thinking: " + ", ".join(f"{n} {share:.3f}" for n, share in accuracies.items()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
