"""Answers sampled with a cache against plain forward passes, and what becomes of them: the blocks sampling and answers.

The models are tiny and random; their sliding windows are shorter than the answers. All scripts have the same blocks.
"""

import copy
import inspect
import json
import math
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from conftest import assistant, refusal, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import grpo as script
from grpo import Drop, Row

CPU = torch.device("cpu")
ARGS = SimpleNamespace(gradient_checkpointing=False, tokens_per_forward=10**6, sample_tokens=10**6, max_new_tokens=8)
PROMPTS = [[9, 8, 7], [*range(3, 17)], [40, 41, 42, 43, 44, 45, 46]]
NONE = [63]  # stops that are never drawn, since the models have fewer tokens

common = dict(vocab_size=60, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
width = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
width |= dict(head_dim=8)
window = dict(sliding_window=6)
experts = dict(num_experts=4, num_experts_per_tok=2, num_local_experts=4, moe_intermediate_size=16)
experts |= dict(shared_expert_intermediate_size=16, shared_intermediate_size=16)
mamba = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1)
latent |= dict(num_key_value_heads=4, topk_group=1, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1)
old = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
alternating = lambda kind: dict(layer_types=[kind, "full_attention"] * 2)

FAMILIES = {  # name: (configuration, the attention that it is sampled under)
    "llama": (lambda: tf.LlamaConfig(**common, **width), "sdpa"),
    "mistral": (lambda: tf.MistralConfig(**common, **width, **window), "sdpa"),
    "qwen3_moe": (lambda: tf.Qwen3MoeConfig(**common, **width, **experts), "sdpa"),
    "gemma2": (
        lambda: tf.Gemma2Config(**common, **width, **window, attn_logit_softcapping=1.0, final_logit_softcapping=3.0),
        "eager",
    ),
    "gemma3": (lambda: tf.Gemma3TextConfig(**common, **width, **window, **alternating("sliding_attention")), "sdpa"),
    "gpt_oss": (lambda: tf.GptOssConfig(**common, **width, **window, **experts), "eager"),
    "deepseek_v3": (lambda: tf.DeepseekV3Config(**common, **(width | experts | latent)), "sdpa"),
    "gpt2": (lambda: tf.GPT2Config(**common, **old), "sdpa"),
    "bloom": (lambda: tf.BloomConfig(**common, hidden_size=32, n_layer=2, n_head=4), "sdpa"),
    "mpt": (lambda: tf.MptConfig(**common, d_model=32, n_layers=2, n_heads=4), "sdpa"),
    "lfm2": (lambda: tf.Lfm2Config(**common, **width, **alternating("conv")), "sdpa"),
    "qwen3_next": (
        lambda: tf.Qwen3NextConfig(**common, **width, **experts, **linear, **alternating("linear_attention")),
        "sdpa",
    ),
    "falcon_h1": (
        lambda: tf.FalconH1Config(**common, **width, **(mamba | dict(mamba_n_heads=4)), mamba_d_ssm=32),
        "sdpa",
    ),
    "jamba": (
        lambda: tf.JambaConfig(
            **common, **width, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
        ),
        "sdpa",
    ),
    "mamba2": (
        lambda: tf.Mamba2Config(
            **common, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1
        ),
        "eager",
    ),
}
REFUSED = {  # no cache, a cache that sampling does not know, or one that ignores the padding on the left
    "rwkv": lambda: tf.RwkvConfig(**common, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2),
    "mamba": lambda: tf.MambaConfig(**common, hidden_size=32, num_hidden_layers=2, state_size=8),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(**common, **width, lru_width=32, attention_window_size=16),
    "minimax": lambda: tf.MiniMaxConfig(**common, **width, num_local_experts=4),
}


def large(model):
    """The model with weights so large that every token matters to the next."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model.eval()


def random_model(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return large(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.fixture(scope="module")
def llama():
    model = random_model(FAMILIES["llama"][0]())
    script.check_sampler(model, "llama")
    return model


def numbers_of(answers, length=16):
    return script.uniform_numbers(0, 0, list(range(answers)), length)


@torch.no_grad()
def logps_after(model, ids):
    """What the model says of one sequence, alone and without a cache: log-probabilities [T, V]."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def distribution(logps, temperature, top_p):
    """{token: probability} of the smallest set of likeliest tokens that reaches top_p."""
    p = (logps / temperature).softmax(-1).tolist()
    likeliest, kept = sorted(range(len(p)), key=lambda i: -p[i]), {}
    for token in likeliest:
        if sum(kept.values()) < top_p:
            kept[token] = p[token]
    return {token: kept[token] / sum(kept.values()) for token in kept}


def drawn_alone(model, prompt, numbers, stops, temperature=1.0, top_p=1.0):
    """One answer the long way: every token from a forward pass over all that stands before it."""
    answer, logps = [], []
    for number in numbers.tolist():
        chances, below = distribution(logps_after(model, prompt + answer)[-1], temperature or 1.0, top_p), 0.0
        token = max(chances, key=chances.get)
        if temperature:
            for token in sorted(chances):
                below += chances[token]
                if below > number:
                    break
        answer.append(token)
        logps.append(math.log(chances[token]))
        if token in stops:
            break
    return answer, logps


# ---- families


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_plain_forward_pass(family):
    """Prompts of unequal lengths, answers that leave the batch; and no argument is one that transformers gives up."""
    make, attention = FAMILIES[family]
    model = random_model(make())
    if family == "mamba2" and not script.cache_argument(model):
        pytest.skip("this version of transformers has another cache for Mamba-2, which is refused")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        script.check_sampler(model, family)
        answers, sampled = script.sample(model, PROMPTS, numbers_of(12), [5, 6, 7, 8])
    assert model.sampling_attention == attention and model.config._attn_implementation == "eager"
    assert len(set(map(len, answers))) > 2
    for i, (answer, own) in enumerate(zip(answers, sampled)):
        prompt = PROMPTS[i // 4]
        plain = logps_after(model, prompt + answer)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(own), plain, rtol=1e-5, atol=2e-5)


def refused(model, capsys) -> str:
    said = refusal(lambda: script.check_sampler(model, "this/one"), capsys)
    assert said.startswith("error: this/one: ") and "cannot be sampled here" in said
    return said


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_sampling_would_get_wrong_is_refused(family, capsys):
    said = refused(random_model(REFUSED[family]()), capsys)
    assert "takes no key-value cache" in said or family != "rwkv"


CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class TakesCache(LlamaForCausalLM):
    """As from transformers 5.40 on: what comes under the old name is swallowed."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        kwargs.pop("past_key_values", None)
        options = {**kwargs, CACHE: cache, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)


class ForgetsItsCache(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        mask = attention_mask if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        return super().forward(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)


def of_class(kind, llama):
    config = copy.deepcopy(llama.config)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    model.load_state_dict(llama.state_dict())
    return model


def test_the_cache_is_given_under_the_name_that_the_forward_has(llama):
    model = of_class(TakesCache, llama)
    script.check_sampler(model, "this/one")
    answers, logps = script.sample(model, PROMPTS, numbers_of(6), [5, 6])
    expected, values = script.sample(llama, PROMPTS, numbers_of(6), [5, 6])
    assert answers == expected
    torch.testing.assert_close(torch.tensor(sum(logps, [])), torch.tensor(sum(values, [])), rtol=0, atol=1e-5)


def test_a_forward_that_does_not_use_its_cache_is_refused(llama, capsys):
    model = of_class(ForgetsItsCache, llama)
    assert "is off by" in refused(model, capsys) and model.config._attn_implementation == "eager"


# ---- the sampler


def test_randomness_is_a_function_of_seed_step_answer_and_position():
    numbers = script.uniform_numbers(7, 3, [4, 0, 9], 20)
    assert torch.equal(script.uniform_numbers(7, 3, [9], 20)[0], numbers[2])  # not of the other answers
    assert torch.equal(script.uniform_numbers(7, 3, [4], 5)[0], numbers[0, :5])  # nor of the length
    for seed, step, answer in ((8, 3, 4), (7, 4, 4), (7, 3, 5), (73, 3, 4), (7, 34, 0), (7, 3, 40)):
        assert not torch.equal(script.uniform_numbers(seed, step, [answer], 20)[0], numbers[0])
    many = numbers_of(500, 20)
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


ENDS = {"never": NONE, "one at a time": [0], "two": [11, 30], "many at once": [*range(0, 60, 3)], "all": [*range(60)]}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (0.0, 1.0)])
def test_answers_are_those_of_a_sampler_without_cache_and_batch(temperature, top_p, ends, llama):
    numbers = numbers_of(12, 10)
    answers, logps = script.sample(llama, PROMPTS, numbers, ENDS[ends], temperature, top_p)
    for i, (answer, own) in enumerate(zip(answers, logps)):
        expected, values = drawn_alone(llama, PROMPTS[i // 4], numbers[i], ENDS[ends], temperature, top_p)
        assert answer == expected and own == pytest.approx(values, abs=2e-5)
    lengths = {len(answer) for answer in answers}
    assert lengths == {"never": {10}, "all": {1}}.get(ends, lengths) and (ends != "many at once" or len(lengths) > 1)


def test_a_number_of_zero_draws_a_token_of_the_nucleus(llama):
    answers, logps = script.sample(llama, PROMPTS, torch.zeros(3, 10), NONE, top_p=0.5)
    assert script.sample(llama, PROMPTS, torch.zeros(3, 1), [0], top_p=0.5)[0] == [answer[:1] for answer in answers]
    for prompt, answer, own in zip(PROMPTS, answers, logps):
        assert all(map(math.isfinite, own)) and answer == drawn_alone(llama, prompt, torch.zeros(10), NONE, 1.0, 0.5)[0]


def test_no_prompts_no_answers(llama):
    assert script.sample(llama, [], torch.zeros(0, 5), [2]) == ([], [])
    assert script.sample_answers(llama, [], torch.zeros(0, 5), [2], ARGS, 1.0) == ([], [])


def shapes_of(model, monkeypatch) -> list:
    """The shape of the input of every forward pass from now on."""
    shapes, real = [], model.forward

    def forward(input_ids, attention_mask, position_ids, cache=None, past_key_values=None, use_cache=None, **options):
        shapes.append(tuple(input_ids.shape))
        options |= {CACHE: past_key_values if cache is None else cache, "use_cache": use_cache}
        return real(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)

    monkeypatch.setattr(model, "forward", forward)
    return shapes


def test_finished_answers_leave_the_batch_and_the_prompt_is_computed_once(llama, monkeypatch):
    shapes = shapes_of(llama, monkeypatch)
    answers, _ = script.sample(llama, PROMPTS, numbers_of(48, 30), [0, 3, 6, 9])
    lengths = [len(answer) for answer in answers]
    assert shapes[0] == (3, 14) and len(shapes) == max(lengths) < 31
    for t, (batch, tokens) in enumerate(shapes[1:], 1):
        ended = batch - sum(length > t for length in lengths)
        assert tokens == 1 and (ended == 0 or 0 < ended < batch / 8)  # the few that have ended go on for a while
    assert shapes[-1][0] < 8


# ---- answers of a policy


def test_neither_company_nor_memory_changes_answers(llama, monkeypatch):
    numbers, stops = numbers_of(12, 10), [0, 5, 10]
    answers, logps = script.sample_answers(llama, PROMPTS, numbers, stops, ARGS, 0.8, 0.95)
    assert llama.training  # as before
    for limit in (1, 50, 100):
        args = SimpleNamespace(sample_tokens=limit)
        with monkeypatch.context() as patch:
            shapes = shapes_of(llama, patch)
            again, values = script.sample_answers(llama, PROMPTS, numbers, stops, args, 0.8, 0.95)
        largest = max(batch for batch, tokens in shapes if tokens == 1)
        assert again == answers and largest <= max(1, limit // 24)
        torch.testing.assert_close(torch.tensor(sum(values, [])), torch.tensor(sum(logps, [])), rtol=0, atol=1e-5)
    with monkeypatch.context() as patch:
        shapes = shapes_of(llama, patch)
        script.sample_answers(llama, PROMPTS, numbers[:3], stops, SimpleNamespace(sample_tokens=50), 1.0)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 7), (1, 14)]  # similar lengths together
    order = [2, 0]
    chosen = [4 * i + k for i in order for k in range(4)]
    again, _ = script.sample_answers(llama, [PROMPTS[i] for i in order], numbers[chosen], stops, ARGS, 0.8, 0.95)
    assert again == [answers[i] for i in chosen]
    for i in (3, 8):  # each answer as when it is the only one
        alone, _ = script.sample_answers(llama, [PROMPTS[i // 4]], numbers[[i]], stops, ARGS, 0.8, 0.95)
        assert alone == [answers[i]]
    llama.eval()


def test_the_policy_is_asked_in_training_as_generate_asks_it(tiny_tokenizer):
    """Some templates open the thinking too, which no finished turn shows; some tokenizers close every text."""
    thinks, closes = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    thinks.chat_template = tiny_tokenizer.chat_template.replace("'<|assistant|>'", "'<|assistant|>' + '<think>\n'")
    special = [(name, tiny_tokenizer.convert_tokens_to_ids(name)) for name in ("<|bos|>", "<|end|>")]
    both = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=special)
    closes.backend_tokenizer.post_processor = both
    ids_of = lambda tokenizer, prompt: script.prompt_rows(tokenizer, 99, [], dict(prompt=prompt), Counter())[0].prompt
    prompt = [user("Up?"), assistant("So."), user("Why?")]
    for tokenizer in (tiny_tokenizer, thinks):
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert ids_of(tokenizer, prompt) == asked
    for tokenizer in (tiny_tokenizer, closes):
        for text in ("What is", "Sum: ", "It is\n"):
            assert ids_of(tokenizer, text) == tiny_tokenizer(text).input_ids


def test_prompts_that_cannot_be_used_are_dropped_and_counted(tiny_tokenizer, tmp_path, capsys):
    def check(extra):
        if extra["prompt"][-1]["content"] == "Refuse me":
            raise Drop("the judge cannot read it")

    with pytest.raises(ValueError, match="neither prompt, question, or instruction, nor chosen"):
        script.prompt_rows(tiny_tokenizer, 50, [], dict(text="Up?"), Counter())
    texts = ["Up?", "Refuse me", "", "go <|end|> up", "up " * 99, "Refuse me"]
    rows = [dict(prompt=[user(text)] if text else [], number=i) for i, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_row = lambda row, notes: script.prompt_rows(tiny_tokenizer, 50, [check], row, notes)
    made = script.prepare("--dataset", str(tmp_path / "rows.jsonl"), "train", tiny_tokenizer, encode_row)
    printed = capsys.readouterr().out
    assert [row.extra["number"] for row in made] == [0] and "1 rows from 6" in printed
    assert "2 dropped: the judge cannot read it" in printed and "1 dropped: empty prompt" in printed
    assert "1 dropped: special token <|end|>" in printed and "1 dropped: prompt leaves no room" in printed


def test_the_stop_tokens_are_the_tokenizers_and_those_of_the_model(tiny_tokenizer, llama):
    """GPT-2's default, 50256, lies beyond a small vocabulary."""
    known = script.stop_tokens(tiny_tokenizer)
    for given, more in ((None, []), (7, [7]), ([9, 50256, 8], [8, 9]), (50256, [])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=given))
        assert script.stop_ids(model, tiny_tokenizer) == sorted({*known, *more})


def asked_row(prompt, ids) -> Row:
    return Row(ids, [[]], [[]], dict(prompt=prompt, kind=""))


def test_answers_are_written_without_special_tokens_but_with_their_thinking(tiny_tokenizer):
    for tags in ([], ["<think>", "</think>"]):  # as text, and as special tokens
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_special_tokens(dict(extra_special_tokens=[*tiny_tokenizer.extra_special_tokens, *tags]))
        encode = lambda text, tokenizer=tokenizer: tokenizer(text, add_special_tokens=False).input_ids
        ids, stops = encode("<think>a</think> No<|user|>!"), [*script.stop_tokens(tokenizer), *encode("u")]
        opened = encode("<|user|>Hi<|end|><|assistant|><think>\n")
        rows = [asked_row([user("Hi")], [1, 5, 6]), asked_row([user("Hi")], opened), asked_row("Hi", [1, 30])]
        found = script.answer_texts(tokenizer, rows, [ids + stops[:1], ids, ids + stops[-1:]], stops)
        assert found == ["<think>a</think> No!", "<think><think>a</think> No!", "<think>a</think> No!"]
        assert script.answer_texts(tokenizer, rows[:2], [stops[:1], []], stops) == ["", "<think>"]


def test_an_answer_that_goes_on_keeps_its_first_space():
    """After a text, or an answer that was begun, under a tokenizer that drops a text's first space, as Llama 2's."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581is": 1, "\u258142": 2}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    begun = [user("How many?"), assistant("It is")]
    for prompt, text in (("It is", " 42"), (begun, " 42"), ([user("It is")], "42")):
        assert script.answer_texts(tokenizer, [asked_row(prompt, [1])], [[2]], []) == [text]
        assert script.final_answer(prompt, "<think>1</think> 42 \n") == text


def test_minibatches_cut_every_pass_into_equal_parts():
    for answers, parts in ((10, 1), (10, 3), (2, 4), (7, 7)):
        found, size = list(script.minibatches(answers, 3, parts, step=1, seed=0)), min(parts, answers)
        assert len(found) == 3 * size and max(map(len, found)) - min(map(len, found)) <= 1
        passes = [sum(found[i : i + size], []) for i in range(0, len(found), size)]
        assert all(sorted(order) == list(range(answers)) for order in passes)
        if answers > 2:
            assert passes[0] != passes[1]
            for step, seed in ((2, 0), (1, 1)):
                assert found != list(script.minibatches(answers, 3, parts, step, seed))


@pytest.mark.parametrize("family", ["mistral", "bloom"])  # packed, and padded
def test_values_of_tokens_are_those_of_each_row_alone(family):
    plain, model = (random_model(FAMILIES[family][0]()) for _ in range(2))
    model = script.prepare_model(model, family, ARGS, CPU, torch.float32, script.token_logps)
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, 60, (n,), generator=generator).tolist()
    rows = [Row(draw(p), [draw(r)], [[True, False] * (r // 2) + [True] * (r % 2)], {}) for p, r in ((4, 9), (12, 1))]
    rows += [rows[0]._replace(trained=[[True] * 9], extra={}), Row(draw(2), [draw(20)], [[True] * 20], {})]
    for limit in (1, 1000):
        args = SimpleNamespace(tokens_per_forward=limit, temperature=0.7)
        script.add_values(("logps", "entropy"), model.token_logps, model, rows, args, CPU)
        for row in rows:
            logits = logps_after(plain, row.prompt + row.responses[0])[len(row.prompt) - 1 : -1]
            logps, trained = (logits / 0.7).log_softmax(-1), torch.tensor(row.trained[0])
            expected = logps.gather(1, torch.tensor(row.responses[0])[:, None])[:, 0], -(logps.exp() * logps).sum(1)
            for values, own in zip(expected, (row.extra["logps"], row.extra["entropy"])):
                torch.testing.assert_close(own, values[trained], rtol=0, atol=5e-5)
    assert model.training


def test_samples_are_shown_with_their_rewards_and_where_they_are_cut_off(monkeypatch):
    shown, named = [], [script.Reward("judge", 1.0, None), script.Reward("match", 1.0, None)]
    monkeypatch.setattr(script.tqdm, "write", shown.append)
    answers = []
    for prompt, text, judge, ended in (
        ([user("Up?")], "It is\n4.", 0.5, 0.0),
        ("What is", "up " * 200, math.nan, 1.0),
        ("c", "x", 0.0, 1.0),
        ("d", "y", 0.0, 1.0),
    ):
        extra = {"prompt_row": asked_row(prompt, [1]), "text": text, "has_ended": ended, "reward": -0.5}
        answers.append(Row([1], [[2]], [[True]], extra | {"rewards/judge": judge, "rewards/match": -1.0}))
    script.show_samples("step 1", answers, named, "reward")
    title, first, second, third = shown
    assert title == "step 1:" and "'x'" in third
    assert first == "  'Up?'\n    -> 'It is\\n4.' (cut off)   judge +0.50, match -1.00, reward -0.50"
    assert "'What is'" in second and "cut off" not in second and "judge" not in second and "match -1.00" in second
    assert len(second) < 400 and " ... " in second


def test_a_note_from_half_of_the_answers_cut_off_on(capsys):
    for share_ended, noted in ((0.0, "100%"), (0.5, "50%"), (0.51, ""), (1.0, "")):
        script.warn_if_cut(share_ended, ARGS)
        said = capsys.readouterr().out
        assert said.startswith(f"note: {noted} of the answers run into --max-new-tokens 8") if noted else not said
