"""ppo.py: the method against worked numbers and brute force, and whole runs against a naive implementation.

Most runs happen in this process, by `ppo.main`. The blocks that ppo.py shares have test files of their own.
"""

import gzip
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, REPLIES, f64, killed, make_reward_model, near, tiny_config
from test_plumbing import CPU, equal, jsonl, lasting, lines_of, on_ranks, refused, talk, weights_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo
import reward_model

END, OTHER_END = 2, 3  # ids of <|end|>, which ends a turn, and <|endoftext|>


# ---- helpers


def weights(folder, sub="") -> dict:
    return weights_of(Path(folder) / sub)


def assert_same_gradients(found: dict, expected: dict):
    """Equal to 1e-4 of the largest of all gradients: float32 sums in another order differ by less."""
    assert found.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    for name in found:
        say = lambda message, name=name: f"{name}: {message}"
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4 * scale, msg=say)


def settings(**options) -> ppo.Args:
    """Args for functions that read neither --model nor --dataset."""
    return ppo.Args(**dict(model="", dataset="", rewards=()) | options)


@pytest.fixture(scope="module")
def other_tokenizer():
    """Another vocabulary and another template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe, special = Tokenizer(models.BPE()), ["[END]", "[PAD]", "[TURN]"]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learn = dict(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(QUESTIONS * 2 + REPLIES, trainers.BpeTrainer(**learn, show_progress=False))
    names = dict(eos_token="[END]", pad_token="[PAD]", extra_special_tokens=special[2:])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[TURN]' + m['role'] + '\n' + m['content'] + '[END]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[TURN]assistant\n' }}{% endif %}"
    )
    return tokenizer


RULES = """
import json, os


def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in c[0]["content"])) for c in completions]


def watch(prompts, completions, **columns):  # no opinion: it writes down what each rank has sampled
    with open(os.environ.get("WATCH", "watched") + os.environ.get("RANK", ""), "a") as f:
        f.writelines(json.dumps([p, c]) + "\\n" for p, c in zip(prompts, completions))
    return [None] * len(prompts)
"""


@pytest.fixture
def usual(talker, tmp_path, monkeypatch) -> dict:
    """The flags of a short run in an empty folder, on a function that counts vowels."""
    monkeypatch.chdir(tmp_path)
    Path("rules.py").write_text(RULES)
    kinds = ["even", "odd"] * 3
    rows = [dict(prompt=talk(question), kind=kind) for question, kind in zip(QUESTIONS, kinds)]
    flags = dict(model=talker, dataset=jsonl(Path("prompts.jsonl"), rows), rewards=("rules.py:vowels",))
    flags |= dict(output_dir="out", eval_fraction=0.0, max_new_tokens=8, batch_size=3, max_steps=2, ppo_epochs=2)
    return flags | dict(learning_rate=1e-3, value_learning_rate=1e-3, warmup_ratio=0.0)


@pytest.fixture
def train(usual):
    """train(**options) runs ppo.main here and returns the lines of its metrics."""

    def go(**options):
        args = ppo.Args(**(usual | options))
        ppo.main(args)
        return lines_of(args.output_dir)

    return go


# ---- the method, in numbers


def test_a_score_sits_on_the_last_token_and_each_token_pays_its_kl():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    logps, ref_logps = torch.tensor([-1, -0.5, -2, 0]) * mask, torch.tensor([-1.2, -0.4, -2.5, 7])
    shaped = ppo.shaped_rewards(torch.tensor([2.0, -3.0, 1.0]), logps, ref_logps, mask, 0.1)
    near(shaped, [[-0.02, 0.01, -0.05, 2.7], [-3.02, 0, 0, 0], [-0.02, 0.01, 0.95, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_gae_is_its_direct_sum_and_masked_tokens_are_transparent(seed):
    rng = random.Random(seed)
    B, T, gamma, lam = 3, rng.randint(1, 9), rng.choice([1.0, 0.9, 0.5]), rng.choice([0.0, 0.5, 0.95, 1.0])
    torch.manual_seed(seed)
    rewards, values = torch.randn(2, B, T).double()
    mask = torch.rand(B, T) < 0.6
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b in range(B):
        real = [t for t in range(T) if mask[b, t]]
        v = [values[b, t].item() for t in real] + [0.0]
        errors = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(real)]
        for i, t in enumerate(real):
            direct = sum((gamma * lam) ** (k - i) * errors[k] for k in range(i, len(real)))
            assert advantages[b, t].item() == pytest.approx(direct, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(direct + v[i], abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_whiten_looks_at_real_tokens_only():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, dtype=torch.float64) * 3 + 2, torch.rand(4, 6) < 0.7
    white = ppo.whiten(x, mask)
    # 1e-8 is added to the variance, here near 9
    assert white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-7)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-9)
    wider, wider_mask = torch.cat([x, torch.full((4, 3), 99.0)], 1), torch.cat([mask, torch.zeros(4, 3).bool()], 1)
    torch.testing.assert_close(ppo.whiten(wider, wider_mask), torch.cat([white, torch.zeros(4, 3)], 1))


@pytest.mark.parametrize(
    "ratio, advantage, loss, moves",
    [
        (1.1, 1, -1.1, True),
        (1.5, 1, -1.2, False),
        (0.5, 1, -0.5, True),
        (1.5, -1, 1.5, True),
        (0.5, -1, 0.8, False),
        (0.9, -1, 0.9, True),
    ],
)
def test_policy_clip_table(ratio, advantage, loss, moves):
    logp = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    found = ppo.policy_loss(logp, torch.zeros_like(logp), torch.full_like(logp, advantage), 0.2)
    found.backward()
    near(found.detach(), float(loss))
    near(logp.grad, -ratio * advantage if moves else 0.0)


@pytest.mark.parametrize(
    "value, clip, loss", [(0.9, 0.2, 0.045), (0.3, 0.2, 0.245), (1.5, 0.2, 0.125), (0.6, 0.2, 0.08), (0.9, 0.0, 0.005)]
)
def test_value_clip_table(value, clip, loss):
    near(ppo.value_loss(f64(value), f64(0.5), f64(1), clip), [loss])


# ---- the value model


@pytest.mark.parametrize("packs", [True, False])
def test_values_are_the_heads_reading_of_the_state_before_each_token(packs, scorer, tiny_tokenizer):
    args = settings(tokens_per_forward=10)
    value = ppo.load_value_model(scorer, tiny_tokenizer, args, CPU, torch.float32)
    if not packs:
        value.packs = False
        value.set_attn_implementation("eager")
    plain = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    answers = [([5, 6, 7], [8, 9]), ([40], [10, 11, 12]), ([5, 6, 7], [13, 9])]
    rows = [ppo.Row(prompt, [ids], [[True] * len(ids)], {}) for prompt, ids in answers]
    ppo.add_values(("values",), value.state_values, value, rows, args, CPU)
    for row in rows:
        ids = torch.tensor([row.prompt + row.responses[0]])
        expected = plain.score(plain.base_model(input_ids=ids).last_hidden_state)[0, len(row.prompt) - 1 : -1, 0]
        torch.testing.assert_close(row.extra["values"], expected - 0.25, rtol=0, atol=1e-5)


def rewarded_by(*paths) -> list:
    """Rewards of which some come from reward models."""
    return [ppo.Reward("name", 1.0, None, path=path) for path in paths]


def test_the_value_model_starts_from_the_first_reward_model_if_that_reads_the_same_tokens(
    talker, scorer, other_tokenizer, tiny_tokenizer, tmp_path
):
    other, args = make_reward_model(tmp_path / "other", other_tokenizer), settings(model=talker)
    assert ppo.choose_value_model(args, rewarded_by("", scorer, other), tiny_tokenizer) == scorer
    assert ppo.choose_value_model(args, rewarded_by(other, scorer), tiny_tokenizer) == talker
    assert ppo.choose_value_model(args, rewarded_by(""), tiny_tokenizer) == talker
    args = settings(model=talker, value_model=talker)
    assert ppo.choose_value_model(args, rewarded_by(scorer), tiny_tokenizer) == talker


def test_the_head_of_the_value_model_begins_at_zero_or_as_the_reward_models(train, spy, scorer):
    estimated = spy(ppo, "gae")
    train(max_steps=1, output_dir="policy")
    train(rewards=(scorer,), max_steps=1)
    assert not estimated[0][0][1].any() and weights("policy", "value")["score.weight"].any()
    (_, values, mask, *_), _ = estimated[1]
    assert (values[mask] != 0).all()


def test_train_last_layers_leaves_the_others_as_they_were(train, talker, scorer):
    train(train_last_layers=1, rewards=(scorer,), save_every=1)
    for before, after in ((weights(talker), weights("out")), (weights(scorer), weights("out", "value"))):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if "layers.1." in name or name == "score.weight"}


# ---- whole runs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_update_nothing_has_moved(temperature, train):
    first, *_ = train(max_steps=1, ppo_epochs=1, batch_size=6, num_generations=2, temperature=temperature)
    assert abs(first["objective/kl"]) < 1e-4 and abs(first["objective/non_score_reward"]) < 1e-5
    assert abs(first["policy/approxkl_avg"]) < 1e-8 and first["policy/clipfrac_avg"] == 0
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5) and first["val/ratio_var"] < 1e-5
    assert first["val/clipfrac_avg"] == 0 and first["sampling/logp_difference"] < 1e-5


@pytest.mark.parametrize(
    "shifts, says", [((0.01, 0.02), "the KL to the reference is"), ((0.1, 0.1), "the approximate KL is")]
)
def test_forward_passes_that_differ_are_found_out(shifts, says, usual, monkeypatch, capsys):
    """Those of the reference, or of the policy in training and before."""
    real, left = ppo.add_values, [*shifts, 0.0]

    def shifted(names, values_of, model, rows, *rest):
        real(names, values_of, model, rows, *rest)
        shift = left.pop(0)
        for row in rows:
            row.extra[names[0]] = row.extra[names[0]] - shift

    monkeypatch.setattr(ppo, "add_values", shifted)
    assert says in refused(ppo, capsys, **usual)


def test_the_metrics_say_what_they_mean(train, spy):
    shaped, estimated, lines = spy(ppo, "shaped_rewards"), spy(ppo, "gae"), train(num_generations=2, kl_coef=0.3)
    for line, ((scores, logps, ref_logps, mask, coef), rewards) in zip(lines, shaped, strict=True):
        kl = ((logps - ref_logps) * mask).sum(1).mean().item()
        assert line["objective/kl"] == pytest.approx(kl, abs=1e-5) and coef == 0.3
        assert line["objective/scores"] == pytest.approx(scores.mean().item(), abs=1e-5)
        assert line["objective/rlhf_reward"] == pytest.approx(rewards.sum(1).mean().item(), abs=1e-5)
        assert line["response_length"] == pytest.approx(mask.sum().item() / len(mask))
        assert line["episode"] == line["step"] * 6
    for line, ((_, values, mask, *_), (_, returns)) in zip(lines, estimated, strict=True):
        unexplained = (returns - values)[mask].square().mean() / returns[mask].var(unbiased=False)
        assert line["val/explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-3)
    assert abs(lines[1]["objective/kl"]) > 1e-4


@pytest.mark.parametrize("whitened", [True, False])
def test_the_first_gradients_are_those_of_a_naive_implementation(whitened, train, spy, gradients, talker, scorer):
    """Two answers to each prompt, two minibatches, a temperature: every index in the loop counts."""
    sampled, scored, gradients = spy(ppo, "sample_answers"), spy(ppo, "total_reward"), gradients(ppo)
    options = dict(temperature=0.8, num_generations=2, num_minibatches=2, ppo_epochs=1, batch_size=5)
    options |= dict(kl_coef=0.1, lam=0.9, gamma=0.97, value_clip=0.0, whiten_advantages=whitened)
    train(**options, rewards=(scorer,), max_steps=1, tokens_per_forward=50)
    (_, prompts, *_), (tokens, _) = sampled[0]
    _, (totals, _) = scored[0]
    minibatch = next(ppo.minibatches(10, 1, 2, 0, 0))
    assert len(minibatch) == 5

    policy = AutoModelForCausalLM.from_pretrained(talker)
    value = AutoModelForSequenceClassification.from_pretrained(scorer)
    logps, values, advantages, returns = [], [], [], []
    for i, ids in enumerate(tokens):
        prompt = prompts[i]
        whole, states = torch.tensor([[*prompt, *ids]]), slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
        logits = policy(whole).logits[0, states] / 0.8
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
        values.append(value.score(value.base_model(whole).last_hidden_state)[0, states, 0] - 0.25)
        rewards = [0.0] * len(ids)  # the reference is the policy still
        rewards[-1] = totals[i].item() if ids[-1] == END else -1.0
        after = values[-1].tolist()[1:] + [0.0]
        own, carried = [], 0.0
        for r, v, v_next in reversed(list(zip(rewards, values[-1].tolist(), after))):
            carried = r + 0.97 * v_next - v + 0.97 * 0.9 * carried
            own.insert(0, carried)
        advantages.append(torch.tensor(own))
        returns.append(torch.tensor(own) + values[-1].detach())
    if whitened:
        every = torch.cat(advantages)
        advantages = [(a - every.mean()) / (every.var(unbiased=False) + 1e-8).sqrt() for a in advantages]
    pick = lambda parts: torch.cat([parts[i] for i in minibatch])
    (-(pick(logps) * pick(advantages)).mean()).backward()
    (0.5 * (pick(values) - pick(returns)).square().mean()).backward()
    for model, found in ((policy, gradients[0]), (value, gradients[1])):
        assert_same_gradients(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def hand_made(monkeypatch, answers: list):
    """Sampling gives these answers to every prompt in turn."""

    def sample_answers(model, prompts, numbers, *rest, **options):
        tokens = [answers[i % len(answers)] for i in range(len(numbers))]
        return tokens, [[0.0] * len(ids) for ids in tokens]

    monkeypatch.setattr(ppo, "sample_answers", sample_answers)


def test_an_answer_cut_off_gets_its_penalty_alone_and_every_stop_token_counts(
    train, spy, monkeypatch, talker, tmp_path, capsys
):
    tokenizer = AutoTokenizer.from_pretrained(talker)
    tokenizer.eos_token = "<|endoftext|>"  # the template ends turns with <|end|>: two stop tokens
    AutoModelForCausalLM.from_pretrained(talker).save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    ids = tokenizer("see", add_special_tokens=False).input_ids  # two vowels
    hand_made(monkeypatch, [[*ids, END], [*ids, OTHER_END], [*ids, 7, 8]])
    shaped, model = spy(ppo, "shaped_rewards"), str(tmp_path / "two")
    (line,) = train(model=model, max_steps=1, missing_eos_score=-7.0, reward_constant=10.0, kl_coef=0.0)
    (scores, *_, mask, _), rewards = shaped[0]
    lengths = mask.sum(1).tolist()
    assert scores.tolist() == [12, 12, -7] and lengths == [len(ids) + 1, len(ids) + 1, len(ids) + 2]
    for row, score, length in zip(rewards, scores, lengths):
        assert row.sum() == score == row[length - 1]
    assert line["val/num_eos_tokens"] == 2 and line["val/share_eos"] == pytest.approx(2 / 3)
    assert line["rewards/vowels/mean"] == 2
    shown = [text for text in capsys.readouterr().out.splitlines() if "    -> " in text]
    assert ["(cut off)" in text for text in shown] == [False, False, True]


def test_samples_are_shown_at_every_tenth_of_the_steps(train, capsys):
    train(epochs=10, max_steps=20, ppo_epochs=1)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and line.endswith(":")]
    assert shown == ["step 1:", *(f"step {step}:" for step in range(2, 21, 2))]


def test_reference_baseline_subtracts_the_reward_of_the_references_answer(train, spy):
    total, shaped = spy(ppo, "total_reward"), spy(ppo, "shaped_rewards")
    options = dict(batch_size=6, num_generations=2, max_new_tokens=30, reward_constant=0.5)
    train(reference_baseline=True, max_steps=1, **options)
    (_, (greedy, _)), (_, (own, _)) = total
    (scores, *_), _ = shaped[0]
    expected = own - greedy.repeat_interleave(2) + 0.5
    ended = scores != -1
    assert greedy.numel() == 6 and ended.sum() > 4 and expected[ended].any()
    torch.testing.assert_close(scores[ended], expected[ended])


def test_the_reference_answers_each_prompt_once(train, monkeypatch):
    greedy, real = [], ppo.sample_answers

    def watched(model, prompts, numbers, stops, args, temperature):
        greedy.extend(map(tuple, prompts if temperature == 0 else []))
        return real(model, prompts, numbers, stops, args, temperature)

    monkeypatch.setattr(ppo, "sample_answers", watched)
    train(reference_baseline=True, epochs=3, max_steps=6, num_generations=2)
    assert len(greedy) == len(set(greedy)) == len(QUESTIONS)


def test_critic_warmup_trains_the_value_model_alone(train, talker):
    lines = train(critic_warmup=2, output_dir="warm")
    assert equal(weights("warm"), weights(talker)) and weights("warm", "value")["score.weight"].any()
    for line in lines:  # a policy that has not moved
        assert line["grad_norm"] == line["lr"] == line["val/ratio_var"] == 0
        assert line["val/ratio"] == 1 and line["loss/value_avg"] > 0 < line["value_grad_norm"]
    first, second = train(critic_warmup=1)
    assert abs(first["loss/policy_avg"]) < 1e-6 < abs(second["loss/policy_avg"])
    assert second["grad_norm"] > 0 and not equal(weights("out"), weights(talker))


def test_saving_before_the_first_step_of_an_optimiser_changes_nothing(train, scorer):
    """An optimiser without a state makes a step when torch is asked for its state."""
    options = dict(critic_warmup=3, max_steps=5, epochs=3, rewards=(scorer,))
    train(**options, output_dir="never")
    train(**options, save_every=1, output_dir="often")
    assert equal(weights("never"), weights("often")) and equal(weights("never", "value"), weights("often", "value"))


def test_max_kl_ends_the_run_and_saves_the_policy_as_it_is(train, talker, capsys):
    lines = train(max_kl=1e-3, max_steps=6, epochs=4, learning_rate=1e-2, eval_fraction=0.2, batch_size=2)
    assert 1 < len(lines) < 6 and lines[-1]["objective/kl"] > 1e-3 and "eval_objective/kl" in lines[-1]
    assert all(line["objective/kl"] <= 1e-3 for line in lines[:-1])
    assert f"stopped after step {len(lines)}: the KL" in capsys.readouterr().out
    assert not equal(weights("out"), weights(talker)) and json.loads(Path("out/args.json").read_text())["finished"]


def test_ptx_adds_the_gradient_of_the_mean_log_likelihood(train, gradients, talker):
    gradients, texts = gradients(ppo), ["Right, up, right", "The sum is 12, and it is safe", "No"]
    options = dict(ptx_dataset=jsonl(Path("ptx.jsonl"), [dict(text=text) for text in texts]), ptx_batch_size=3)
    train(max_steps=1, ppo_epochs=1, output_dir="without")
    (line,) = train(max_steps=1, ppo_epochs=1, ptx_coef=0.5, **options, output_dir="with", tokens_per_forward=20)
    without, _, found, _ = gradients
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talker), AutoTokenizer.from_pretrained(talker)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([*tokenizer(text).input_ids, END])
        total = total - model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum()
        count += len(ids) - 1
    (total / count).backward()
    assert line["loss/ptx"] == pytest.approx((total / count).item(), rel=1e-5)
    expected = {name: without[name] + 0.5 * p.grad for name, p in model.named_parameters()}
    assert_same_gradients(found, expected)


def test_evaluation_is_of_held_out_prompts_with_the_same_randomness_every_time(train, talker):
    a, b = train(learning_rate=0.0, eval_fraction=0.5, eval_every=1, epochs=2, output_dir="still")
    assert equal(weights("still"), weights(talker)) and weights("still", "value")["score.weight"].any()
    assert a["eval_objective/scores"] == b["eval_objective/scores"] and abs(a["eval_objective/kl"]) < 1e-5 > abs(
        b["objective/kl"]
    )


def test_a_policy_learns_what_is_rewarded(train):
    """More vowels, in some seconds."""
    options = dict(batch_size=6, num_generations=6, epochs=30, max_steps=30, kl_coef=0.0, missing_eos_score=0.0)
    lines = train(**options, learning_rate=3e-3, value_learning_rate=3e-3)
    scores = [line["objective/scores"] for line in lines]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > first + 1.5 and last > 1.5 * first, scores
    assert lines[-1]["objective/kl"] > 1


# ---- resume


def test_a_killed_run_resumed_is_the_uninterrupted_one(train, monkeypatch, scorer):
    """Plain runs are killed in test_storms.py."""
    jsonl(Path("ptx.jsonl"), [dict(text=text) for text in QUESTIONS])
    jsonl(Path("many.jsonl"), [dict(prompt=talk(f"{q} {i} " * 3)) for i in range(2) for q in QUESTIONS])
    long = dict(batch_size=5, epochs=4, max_steps=0, num_minibatches=2, save_every=2, rewards=(scorer,))
    long |= dict(reference_baseline=True, dataset="many.jsonl", ptx_dataset="ptx.jsonl", ptx_coef=0.5)
    long |= dict(train_last_layers=1, critic_warmup=5, lr_schedule="cosine")
    train(**long, output_dir="whole")
    killed(monkeypatch, ppo, "log_metrics", 6, lambda: train(**long, output_dir="killed"))
    train(**long, output_dir="killed", resume=True)
    assert lasting("whole") == lasting("killed") and len(lasting("whole")) >= 8
    for sub in ("", "value"):
        assert equal(weights("whole", sub), weights("killed", sub))


# ---- ranks


@pytest.fixture
def on_two_ranks(usual, scorer) -> dict:
    """A run with every kind of work that ranks share: its flags. The last of its batches has one prompt alone."""
    rows = [dict(prompt=talk(f"{QUESTIONS[i % 6]} {i}")) for i in range(20)]
    flags = dict(dataset=jsonl(Path("many.jsonl"), rows), eval_fraction=0.2, batch_size=5, epochs=2, max_steps=0)
    flags |= dict(ptx_dataset=jsonl(Path("ptx.jsonl"), [dict(text=text) for text in QUESTIONS]), ptx_coef=0.2)
    flags |= dict(num_generations=2, num_minibatches=2, ptx_batch_size=3, reference_baseline=True)
    return usual | flags | dict(rewards=(scorer, "rules.py:watch"), eval_every=3, save_every=2)


def seen(*files) -> Counter:
    return Counter(line for file in files for line in Path(file).read_text().splitlines())


def test_two_ranks_are_one_process(on_two_ranks, monkeypatch):
    ppo.main(ppo.Args(**on_two_ranks | dict(output_dir="one")))
    monkeypatch.setenv("WATCH", "two")
    on_ranks(ppo, 2, **on_two_ranks | dict(output_dir="two"))
    one = lines_of("one")
    assert len(one) == 8 and one[3]["episode"] == 32  # batches of 5, 5, 5 and 1 prompts
    for x, y in zip(lasting("one"), lasting("two"), strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-4), f"step {x['step']}"
    for sub in ("", "value"):
        a, b = weights("one", sub), weights("two", sub)
        assert a.keys() == b.keys()
        for name in a:  # a tenth of one step of the learning rate
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
    # sample by sample, the greedy ones of the baselines too
    assert seen("watched") == seen("two0", "two1") and seen("two0") != seen("two1")
    states = [torch.load(f"{out}/checkpoint-2/state.pt", weights_only=True)["baselines"] for out in ("one", "two")]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 10


# ---- bad input

BAD = {  # what is wrong: (options, what the message names)
    "ptx-coef without data": (dict(ptx_coef=0.5), "--ptx-dataset"),
    "ptx data without a coefficient": (dict(ptx_dataset="prompts.jsonl"), "--ptx-coef"),
    "no room for a prompt": (dict(max_new_tokens=1024), "--max-new-tokens"),
    "no room for any prompt": (dict(max_length=10), "--dataset"),
    "a reference with another tokenizer": (dict(reference="other"), "--reference"),
    "a value model with another tokenizer": (dict(value_model="other_value"), "--value-model"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_refused_in_one_sentence_and_destroys_nothing(wrong, usual, other_tokenizer, capsys):
    options, named = BAD[wrong]
    Path("out").mkdir()
    Path("out/args.json").write_text("{}")
    if "other" in str(options):
        AutoModelForCausalLM.from_config(tiny_config("llama", other_tokenizer)).save_pretrained("other")
        other_tokenizer.save_pretrained("other")
        make_reward_model("other_value", other_tokenizer, vocab_size=400)
    assert named in refused(ppo, capsys, **usual | options | dict(overwrite=True))
    assert os.listdir("out") == ["args.json"]


# ---- real data


def test_real_prompts_a_real_checkpoint_and_a_reward_model_of_them(real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with gzip.open(real_data / "hh_rlhf.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    letters = lambda row: sum(len(m["content"]) for m in row["prompt"] + row["chosen"] + row["rejected"])
    policy = str(real_data / "stories260K-hf")
    short = dict(dataset=jsonl(Path("pairs.jsonl"), [row for row in rows if letters(row) < 500][:60]), model=policy)
    short |= dict(max_length=512, tokens_per_forward=4096, batch_size=8)
    reward_model.main(reward_model.Args(**short, max_steps=4, learning_rate=1e-3, output_dir="rm"))
    options = dict(max_steps=2, learning_rate=1e-4, value_learning_rate=1e-3, max_new_tokens=24, ppo_epochs=2)
    ppo.main(ppo.Args(**short, **options, rewards=("rm",), output_dir="out"))
    lines = lines_of("out")
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert abs(lines[0]["objective/kl"]) < 1e-3 and lines[0]["sampling/logp_difference"] < 1e-4
    assert not equal(weights("out"), weights(policy))
    assert AutoModelForCausalLM.from_pretrained("out").config.tie_word_embeddings
