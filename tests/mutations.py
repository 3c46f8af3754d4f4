"""Planted bugs, and the tests that must catch them.

    python tests/mutations.py                 every bug, one after the other, about ten minutes
    python tests/mutations.py dpo.py ppo.py   the bugs of these scripts

A bug is (script, text, text with the bug, arguments of pytest). It is planted in a copy of the repository, and pytest
must then report failed tests. Bugs that survive are printed, and the exit code is 1. test_copies.py checks that each
text still stands exactly once in its script.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

MUTATIONS = [
    (
        "sft.py",
        '(logged["loss"] * weight * WORLD / total).backward()',
        '(logged["loss"] * weight * WORLD / len(batch)).backward()',
        "tests/test_sft.py -k metrics_and_gradient_are_those_of_the_rows",
    ),
    (
        "sft.py",
        "ids = plain_ids(tokenizer, text + tokenizer.eos_token)",
        "ids = plain_ids(tokenizer, text)",
        "tests/test_sft.py -k test_every_format",
    ),
    (
        "sft.py",
        "peak_rate * (min(1.0, (step + 1) / warmup) * decay)",
        "peak_rate * (min(1.0, step / warmup) * decay)",
        "tests/test_plumbing.py -k test_learning_rate",
    ),
    (
        "sft.py",
        "dict(params=vectors, weight_decay=0.0)",
        "dict(params=vectors, weight_decay=args.weight_decay)",
        "tests/test_plumbing.py -k test_a_step_of_adamw",
    ),
    (
        "sft.py",
        "    STOP.agreed = stop > 0\n",
        "    STOP.agreed = STOP.signal > 0\n",
        "tests/test_plumbing.py -k test_all_ranks_stop",
    ),
    (
        "sft.py",
        'random.Random(f"{seed}-{epoch}")',
        'random.Random(f"{seed}")',
        "tests/test_plumbing.py -k test_an_epoch",
    ),
    (
        "sft.py",
        '.splitlines(True)[: state["step"]]',
        ".splitlines(True)",
        "tests/test_plumbing.py -k 'before_a_rename and 9'",
    ),
    (
        "sft.py",
        "        if optimizer.state:  #",
        "        if not optimizer.state:  #",
        "tests/test_plumbing.py -k 'before_a_rename and 9'",
    ),
    (
        "sft.py",
        "save_models(part, models, torch.float32)",
        "save_models(part, models)",
        "tests/test_plumbing.py -k test_a_resumed_run_ends_in_the_dtype",
    ),
    (
        "sft.py",
        "            f.seek(max(f.tell(), size - 2**24))\n            digest.update(f.read())\n",
        "",
        "tests/test_plumbing.py -k test_a_changed_input",
    ),
    (
        "sft.py",
        "disable = RANK > 0 or not sys.stderr.isatty()",
        "disable = RANK > 0",
        "tests/test_plumbing.py -k test_progress_in_a_file",
    ),
    (
        "reward_model.py",
        "if len(r) <= room]",
        "if len(r) < room]",
        "tests/test_reward_model.py -k an_answer_too_long_is_dropped_and_never_cut",
    ),
    (
        "reward_model.py",
        "if step >= steps - max(1, steps // 10):",
        "if step > steps - max(1, steps // 10):",
        "tests/test_reward_model.py -k the_shift_is_the_mean_score",
    ),
    (
        "reward_model.py",
        "(ranks[:, None] > ranks[None, :]) | itself",
        "(ranks[:, None] >= ranks[None, :]) | itself",
        "tests/test_reward_model.py -k plackett_luce_with_ties",
    ),
    (
        "dpo.py",
        "if not text.startswith(opening) or any(words in whole and words not in before for words in said):",
        "if not text.startswith(opening):",
        "tests/test_tokens.py -k what_a_conversation_trains",
    ),
    (
        "dpo.py",
        "return ends[0] if ends else",
        "return ends[-1] if ends else",
        "tests/test_tokens.py -k a_turn_ends_with",
    ),
    (
        "dpo.py",
        "        return ids[: len(ids) - after]\n",
        "        return ids[: len(ids) - after - 1]\n",
        "tests/test_tokens.py -k a_turn_ends_with",
    ),
    (
        "dpo.py",
        "trained[start : len(ids)] = [True] * (len(ids) - start)",
        "trained[start + 1 : len(ids)] = [True] * (len(ids) - start - 1)",
        "tests/test_tokens.py -k what_a_conversation_trains",
    ),
    (
        "dpo.py",
        "    return opening + begun[overlap:]\n",
        "    return opening + begun\n",
        "tests/test_tokens.py -k a_begun_answer_is_prompt",
    ),
    (
        "dpo.py",
        'prompt + reply[0]["content"] + tokenizer.eos_token',
        'prompt + reply[0]["content"]',
        "tests/test_inputs.py -k columns_that_hold_a_prompt",
    ),
    (
        "dpo.py",
        "if (scores[i] > scores[j] or is_tied_pair)",
        "if (scores[i] < scores[j] or is_tied_pair)",
        "tests/test_inputs.py -k stands_in_both",
    ),
    (
        "dpo.py",
        "        first += len(row.responses)\n",
        "        first += 1\n",
        "tests/test_dpo.py -k all_pairs_of_unequal",
    ),
    (
        "dpo.py",
        "            keys += [*range(start, start + length), *range(begin, len(ids))] if others else []\n",
        "            keys += [*range(start, start + length), *range(begin - 1, len(ids) - 1)] if others else []\n",
        "tests/test_cuda.py -k flash_attention_gives",
    ),
    (
        "dpo.py",
        "window = (sliding_window - 1 if sliding_window else -1, 0)",
        "window = (sliding_window if sliding_window else -1, 0)",
        "tests/test_cuda.py -k flash_attention_gives",
    ),
    (
        "dpo.py",
        'source=places[packed["source"]], last=places[packed["last"]]',
        'source=places[packed["source"]] - 1, last=places[packed["last"]]',
        "tests/test_models.py -k 'alone and mpt'",
    ),
    (
        "dpo.py",
        "d.scatter_add_(1, t[:, None], g[:, None])",
        "d.scatter_add_(1, t[:, None], -g[:, None])",
        "tests/test_models.py -k 'alone and llama'",
    ),
    (
        "dpo.py",
        "parameter.data = parameter.data.bfloat16()",
        "parameter.data = parameter.data.float()",
        "tests/test_models.py -k frozen",
    ),
    (
        "dpo.py",
        "content = [float(token not in stops) for token in response]",
        "content = [1.0 for token in response]",
        "tests/test_dpo.py -k an_end_of_turn_is_format",
    ),
    (
        "dpo.py",
        "reference_logps(policy, compared, content_sums, tokenizer",
        "reference_logps(policy, compared, response_sums, tokenizer",
        "tests/test_preferences.py -k 'models and reference and dpo'",
    ),
    (
        "dpo.py",
        'f"{args.seed}-{steps}-{i}"',
        'f"{args.seed}-{i}"',
        "tests/test_dpo.py -k ondare_keeps_a_random_share_new_at_each_step",
    ),
    (
        "dpo.py",
        "nll = -(response_sums(logps, rows) / lengths)[best]",
        "nll = -response_sums(logps, rows)[best]",
        "tests/test_preferences.py -k 'batch and dpo'",
    ),
    (
        "reward_model.py",
        "(prompt, responses), ranks = as_pair(row), [1, 0]",
        "(prompt, responses), ranks = as_pair(row), [0, 1]",
        "tests/test_dpo.py -k every_layout",
    ),
    (
        "orpo.py",
        'logged["nll_loss"] - args.odds_ratio_coef * logged["log_odds_ratio"]',
        'logged["nll_loss"] + args.odds_ratio_coef * logged["log_odds_ratio"]',
        "tests/test_preferences.py -k 'models and orpo'",
    ),
    (
        "rpo.py",
        '"gap_error": (args.beta * h - args.eta * g).abs(),',
        '"gap_error": (args.beta * h - g).abs(),',
        "tests/test_preferences.py -k 'batch and rpo'",
    ),
    (
        "orpo.py",
        "lengths = content_sums(ones, rows)",
        "lengths = response_sums(ones, rows)",
        "tests/test_orpo.py -k test_train_prompt",
    ),
    (
        "rpo.py",
        "return bernoulli_kl(eta * g, beta * h)",
        "return bernoulli_kl(beta * h, eta * g)",
        "tests/test_rpo.py -k losses_of_worked_examples",
    ),
    (
        "ppo.py",
        "    rewards = -kl_coef * (logps - ref_logps) * mask\n",
        "    rewards = kl_coef * (logps - ref_logps) * mask\n",
        "tests/test_ppo.py -k score_sits",
    ),
    (
        "ppo.py",
        "        next_value = torch.where(mask[:, t], values[:, t], next_value)\n",
        "        next_value = values[:, t]\n",
        "tests/test_ppo.py -k direct_sum",
    ),
    (
        "ppo.py",
        'args.reward_constant - state["baselines"][i] for i',
        'args.reward_constant + state["baselines"][i] for i',
        "tests/test_ppo.py -k subtracts_the_reward",
    ),
    (
        "ppo.py",
        'score if row.extra["has_ended"] else args.missing_eos_score',
        "score",
        "tests/test_ppo.py -k penalty_alone",
    ),
    (
        "grpo.py",
        "    numbers = [attempt * len(prompts) * n + slot for slot in slots]\n",
        "    numbers = slots\n",
        "tests/test_grpo.py -k resampling_replaces",
    ),
    (
        "grpo.py",
        'len(part) > 1 and part[0].extra["place"] == answer.extra["place"] and size <= limit',
        "len(part) > 1 and size <= limit",
        "tests/test_grpo.py -k share_it",
    ),
    (
        "grpo.py",
        "    return [part.flip(0).cumsum(0).flip(0) for part in normalised",
        "    return [part.cumsum(0) for part in normalised",
        "tests/test_grpo.py -k advantages_of_steps",
    ),
    (
        "grpo.py",
        "            weights[places] = answer_weights(lengths[places], counted[places], args.normalise, args.max_new_tokens)\n",
        "            weights[places] = answer_weights(lengths[places], torch.ones_like(counted[places]), args.normalise, args.max_new_tokens)\n",
        "tests/test_grpo.py -k naive",
    ),
    (
        "grpo.py",
        "        has_ended = has_ended | torch.isin(token, stops)\n",
        "        has_ended = torch.isin(token, stops)\n",
        "tests/test_sampling.py -k leave_the_batch",
    ),
    (
        "grpo.py",
        "reward.weight * named[reward.name].nan_to_num(0.0)",
        "reward.weight * named[reward.name].nan_to_num(1.0)",
        "tests/test_rewards.py -k kinds_that_it_names",
    ),
    (
        "rlaif.py",
        "return (first.softmax(-1)[..., 0] + second.softmax(-1)[..., 1]) / 2",
        "return (first.softmax(-1)[..., 0] + second.softmax(-1)[..., 0]) / 2",
        "tests/test_rlaif.py -k test_letters_are_renormalised",
    ),
    (
        "rlaif.py",
        "return [text for text, has_ended in answers if has_ended and text_of(text)]",
        "return [text for text, has_ended in answers if text_of(text)]",
        "tests/test_rlaif.py -k test_label_samples",
    ),
    (
        "rlaif.py",
        'best, worst = (0, 1) if c["verdict"] == "a" else (1, 0)',
        "best, worst = (0, 1)",
        "tests/test_rlaif.py -k test_label_gives_soft",
    ),
    (
        "rlaif.py",
        "        if a > b:  # a is the one called high\n            first, second, own = 1 - second, 1 - first, [1 - p for p in own]\n",
        "",
        "tests/test_rlaif.py -k test_swapping_every_pair",
    ),
    (
        "rlaif.py",
        'principle = random.Random(f"{args.seed}-{key}-{j}").choice(run.principles)',
        'principle = random.Random(f"{args.seed}").choice(run.principles)',
        "tests/test_rlaif.py -k test_every_judgement_draws",
    ),
    (
        "rlaif.py",
        "rows.append(Row(ids[:1], [[*ids[1:], ids[-1]]], [[True] * len(ids)], dict(index=len(passed))))",
        "rows.append(Row(ids[:1], [ids[1:]], [[True] * (len(ids) - 1)], dict(index=len(passed))))",
        "tests/test_rlaif.py -k test_synthesise_drops_near_repeats",
    ),
    (
        "gridworld.py",
        '        taken = drawn if name == "final.jsonl" else held_out',
        "        taken = held_out",
        "tests/test_gridworld.py -k no_grid_of_a_held_out_file",
    ),
    (
        "gridworld.py",
        "delta = r + gamma * V[s_next] - V[s]",
        "delta = r + V[s_next] - V[s]",
        "tests/test_gridworld.py -k actor_critic_steps",
    ),
    (
        "gridworld.py",
        "best_next = Q[s_next, legal[s_next]].max() if legal[s_next].any() else 0.0",
        "best_next = Q[s_next].max() if legal[s_next].any() else 0.0",
        "tests/test_gridworld.py -k q_learning_looks",
    ),
    (
        "gridworld.py",
        "next_value, next_advantage = values[:, t] * mask[:, t], advantages[:, t]",
        "next_value, next_advantage = values[:, t], advantages[:, t]",
        "tests/test_gridworld.py -k gae_sees_nothing",
    ),
    (
        "gridworld.py",
        "return -torch.min(ratio * advantages,",
        "return -torch.max(ratio * advantages,",
        "tests/test_gridworld.py -k policy_loss_is_clipped",
    ),
    (
        "gridworld.py",
        "- LAVA_COST[kind] * (not verdict.safe)",
        "- LAVA_COST[kind] * verdict.safe",
        "tests/test_gridworld.py -k what_annotators_think",
    ),
]


def survives(folder: Path, script: str, text: str, bug: str, selection: str) -> str:
    """Why the bug was not caught by the tests of the copy in folder, or "" if it was."""
    source = (REPO / script).read_text()
    if source.count(text) != 1:
        return f"the text stands {source.count(text)} times in the script"
    (folder / script).write_text(source.replace(text, bug))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(selection)]
    code = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (folder / script).write_text(source)
    # pytest's exit codes: 0 all passed, 1 some failed, above 1 nothing was tested
    return {0: "no test failed", 1: ""}.get(code.returncode, f"pytest ended with exit code {code.returncode}")


def main(names: list) -> int:
    chosen = [mutation for mutation in MUTATIONS if not names or mutation[0] in names]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        kept = shutil.ignore_patterns(".git", "runs", "data", "results", "*.png", "__pycache__")
        copy = Path(shutil.copytree(REPO, Path(folder) / "copy", ignore=kept))
        for script, text, bug, selection in chosen:
            reason = survives(copy, script, text, bug, selection)
            survivors += bool(reason)
            change = bug.strip().split("\n")[0] or f"without {text.strip()}"
            print(f"{'SURVIVES' if reason else 'caught':8}  {script}: {change}", flush=True)
            if reason:
                print(f"          {reason}: pytest {selection}", flush=True)
    print(f"{len(chosen)} bugs, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
