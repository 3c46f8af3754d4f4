"""Packed or padded rows give the log-probabilities of each row alone, and the same gradient, under every family's own attention.

The models are tiny and random; windows (32) are shorter than the rows, and longer than the probe that decides whether rows are packed.
"""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from conftest import FAMILIES, tiny_config
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

import dpo
from dpo import Row

CPU = torch.device("cpu")
ARGS = SimpleNamespace(gradient_checkpointing=False, tokens_per_forward=10**6)
SMALL = SimpleNamespace(tokens_per_forward=150)  # some rows together, some alone

common = dict(
    vocab_size=96, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
width = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
heads = dict(head_dim=8, query_pre_attn_scalar=8)
experts = dict(num_experts_per_tok=2, moe_intermediate_size=16, num_experts=4)
every_other = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
windowed = dict(use_sliding_window=True, sliding_window=32, max_window_layers=1)
old = dict(vocab_size=96, hidden_size=32, initializer_range=0.2, eos_token_id=2)
falcon = old | dict(num_hidden_layers=2, num_attention_heads=4)
longrope = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0] * 4,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=256,
)
vision = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)

CONFIGS = {
    "qwen2_moe, no windows": lambda: tf.Qwen2MoeConfig(
        **common, **width, **experts, shared_expert_intermediate_size=16
    ),
    "qwen2_moe, all windows": lambda: tf.Qwen2MoeConfig(
        **common, **width, **experts, shared_expert_intermediate_size=16, **(windowed | dict(max_window_layers=0))
    ),
    "qwen2_moe, a window": lambda: tf.Qwen2MoeConfig(
        **common, **width, **experts, shared_expert_intermediate_size=16, **windowed
    ),
    "qwen2, a window": lambda: tf.Qwen2Config(**common, **width, **windowed),
    "qwen3, a window": lambda: tf.Qwen3Config(**common, **width, head_dim=8, **windowed),
    "qwen3_moe, a window": lambda: tf.Qwen3MoeConfig(**common, **width, **experts, head_dim=8, **windowed),
    "mistral, a window": lambda: tf.MistralConfig(**common, **width, sliding_window=32),
    "mixtral, jitter": lambda: tf.MixtralConfig(**common, **width, num_local_experts=4, router_jitter_noise=0.5),
    "minimax, jitter": lambda: tf.MiniMaxConfig(
        **common,
        **width,
        num_local_experts=4,
        block_size=16,
        router_jitter_noise=0.5,
        layer_types=["linear_attention", "full_attention"],
    ),
    "phimoe, jitter": lambda: tf.PhimoeConfig(
        **common, **width, num_local_experts=4, router_jitter_noise=0.2, input_jitter_noise=0.2
    ),
    "gemma2, soft caps": lambda: tf.Gemma2Config(
        **common,
        **width,
        **heads,
        sliding_window=32,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
    ),
    "vaultgemma": lambda: tf.VaultGemmaConfig(
        **common,
        **(width | dict(num_key_value_heads=4)),
        **heads,
        sliding_window=32,
        attn_logit_softcapping=0.5,
        tie_word_embeddings=False,
    ),
    "gemma3, multimodal": lambda: tf.Gemma3Config(
        text_config=dict(**common, **width, **heads, **every_other), vision_config=vision, mm_tokens_per_image=4
    ),
    "gemma4": lambda: tf.Gemma4TextConfig(
        **common, **width, head_dim=8, **every_other, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **common, **width, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=32
    ),
    "mimo_v2": lambda: tf.MiMoV2FlashConfig(
        **common,
        **width,
        head_dim=8,
        v_head_dim=8,
        sliding_window=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "bloom": lambda: tf.BloomConfig(**old, n_layer=2, n_head=4),
    "mpt": lambda: tf.MptConfig(
        vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=512, initializer_range=0.2, eos_token_id=2
    ),
    "falcon, ALiBi": lambda: tf.FalconConfig(**falcon, alibi=True, bias=True),
    "falcon": lambda: tf.FalconConfig(**falcon, alibi=False),
    "falcon, new": lambda: tf.FalconConfig(**falcon, alibi=False, num_kv_heads=2, new_decoder_architecture=True),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **old,
        max_position_embeddings=512,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=32,
    ),
    "stablelm": lambda: tf.StableLmConfig(**common, **width),
    "stablelm, parallel": lambda: tf.StableLmConfig(**common, **width, use_parallel_residual=True, qk_layernorm=True),
    "cohere2": lambda: tf.Cohere2Config(**common, **width, **every_other),
    "granite": lambda: tf.GraniteConfig(
        **common,
        **width,
        logits_scaling=8.0,
        attention_multiplier=0.1,
        residual_multiplier=0.2,
        embedding_multiplier=12.0,
    ),
    "olmo3": lambda: tf.Olmo3Config(**common, **width, **every_other),
    "phi3, longrope": lambda: tf.Phi3Config(
        **common, **width, rope_parameters=longrope, original_max_position_embeddings=256
    ),
    "lfm2": lambda: tf.Lfm2Config(**common, **width, layer_types=["conv", "full_attention"]),
    "falcon_h1": lambda: tf.FalconH1Config(
        **common,
        **width,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=32,
    ),
}
NEEDS = {"mimo_v2": "MiMoV2FlashConfig", "gemma4": "Gemma4TextConfig"}  # not in every transformers
PACKED = {
    "gemma2",
    "gpt_oss",
    "vaultgemma",
    "gemma3, multimodal",
    "mistral",
    "qwen2, a window",
    "qwen3, a window",
    "mixtral, jitter",
}
PADDED = {
    "bloom",
    "mpt",
    "falcon, ALiBi",
    "gpt_neo",
    "lfm2",
    "falcon_h1",
    "mamba2",
}  # ALiBi from the mask, a window of its own, states


def model_of(name, tokenizer=None):
    """A random model in evaluation mode under its own attention."""
    if not hasattr(tf, NEEDS.get(name, "Qwen2Config")):
        pytest.skip("this transformers does not have it")
    config = tiny_config(name, tokenizer) if name in FAMILIES else CONFIGS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():  # wide enough that attention matters
            if parameter.ndim > 1 or parameter.shape == (4,):  # sinks too
                torch.nn.init.normal_(parameter, 0, 0.2 if parameter.ndim > 1 else 1.0)
    return model.eval()


def prepared(model, name):
    return dpo.prepare_model(model, name, ARGS, CPU, torch.float32, dpo.token_logps)


def rows_of(vocabulary: int, longest: int = 80) -> list:
    """Rows of one answer and of several, short and long, some tokens untrained."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, vocabulary, (n,), generator=generator).tolist()
    row = lambda prompt, *lengths: Row(
        ids(prompt), [ids(n) for n in lengths], [[i % 4 > 0 for i in range(n)] for n in lengths], {}
    )
    return [row(60, longest // 2, 30), row(7, 5), row(20, longest), row(20, 15, longest, 3)]


def alone(model, rows) -> torch.Tensor:
    """log pi of the trained tokens of all rows, each answer in a forward of its own."""
    logps = []
    for row in rows:
        for response, trained in zip(row.responses, row.trained):
            ids = torch.tensor([row.prompt + response])
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            picked = logits.log_softmax(-1)[len(row.prompt) - 1 : -1].gather(-1, ids[0, len(row.prompt) :, None])[:, 0]
            logps.append(picked[torch.tensor(trained)])
    return torch.cat(logps)


def together(model, rows, args=ARGS) -> torch.Tensor:
    """The same from forwards of several rows."""
    logps = {}
    for group, _, inputs, target in dpo.forwards(rows, args, model, CPU):
        counts = [sum(map(sum, row.trained)) for row in group]
        parts = model.token_logps(**inputs, target=target)[0].split(counts)
        logps |= {id(row): part for row, part in zip(group, parts)}
    assert len(logps) == len(rows)
    return torch.cat([logps[id(row)] for row in rows])


def gradient(model, logps) -> dict:
    """The gradient of a weighted sum of the log-probabilities, by the parameter's name."""
    weights = torch.linspace(-1, 1, len(logps)) / len(logps)
    (logps * weights).sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(model, reference, rows):
    theirs, ours = alone(reference, rows), together(model, rows)
    for logps in (ours, together(model, rows, SMALL)):
        assert (logps - theirs).abs().max() < 2e-5 * theirs.abs().max()
    expected, found = gradient(reference, theirs), gradient(model, ours)
    total = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert total > 0
    for name, grad in expected.items():
        assert (found.get(name, torch.zeros_like(grad)) - grad).norm() < 3e-4 * total, name


@pytest.mark.parametrize("name", [*FAMILIES, *CONFIGS])
def test_rows_together_give_what_each_row_gives_alone(name, tiny_tokenizer):
    reference = model_of(name, tiny_tokenizer)
    model = prepared(copy.deepcopy(reference), name)
    assert model.training and (name not in PACKED or model.packs) and (name not in PADDED or not model.packs)
    rows = rows_of(model.config.get_text_config().vocab_size)
    assert_same(model, reference, rows)
    if not model.packs:  # what is padded must not see its neighbours either
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "name", ["qwen2, a window", "qwen2_moe, a window", "mistral, a window", "gemma2, soft caps", "gpt_oss"]
)
def test_a_window_that_packing_would_ignore_is_found_out(name, monkeypatch):
    """With an attention that ignores windows, a model with one must not be packed, however long its window."""
    true = dpo.rows_attention
    ignores = lambda *args, sliding_window=None, **kwargs: true(*args, sliding_window=None, **kwargs)
    dpo.AttentionInterface.register("packed_rows", ignores)
    try:
        model = prepared(model_of(name), name)
    finally:
        dpo.AttentionInterface.register("packed_rows", true)
    assert not model.packs
    windows = {getattr(x, "sliding_window", None) for x in (model.config, *model.modules())} - {None}
    assert windows <= {32}  # those of the probe are gone


@pytest.mark.parametrize("name", ["mixtral, jitter", "minimax, jitter", "phimoe, jitter"])
def test_two_forwards_in_training_are_the_same_function(name):
    model = prepared(model_of(name), name)
    rows = rows_of(96)
    torch.manual_seed(1)
    first = together(model, rows)
    torch.manual_seed(2)
    assert torch.equal(first, together(model, rows))
    assert torch.equal(first, together(model.eval(), rows))


@pytest.mark.parametrize("name", ["gpt_oss", "bloom"])
def test_dropout_is_off_unless_it_is_asked_for(name):
    config = CONFIGS[name]()
    config.attention_dropout = config.hidden_dropout = 0.5
    CONFIGS[f"{name}, dropout"] = lambda: config
    for wanted in (False, True):
        model = model_of(f"{name}, dropout")
        dpo.prepare_model(model, name, ARGS, CPU, torch.float32, dpo.token_logps, dropout=wanted)
        first, second = (together(model, rows_of(96)) for _ in range(2))
        assert torch.equal(first, second) is not wanted
    del CONFIGS[f"{name}, dropout"]


# ------------------------------------------------------------------------------------------------------------- positions


def saved_config(folder, config, **changes) -> str:
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return str(folder)


LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)


@pytest.mark.parametrize(
    "config, changes, original",
    [
        (tf.LlamaConfig(**common, **width), dict(rope_parameters=LONG | dict(original_max_position_embeddings=32)), 32),
        (
            tf.Phi3Config(**common, **width),
            dict(rope_parameters=LONG, original_max_position_embeddings=32),
            32,
        ),
        (  # as Phi-3 is published
            tf.Phi3Config(**common, **width),
            dict(
                rope_parameters=None,
                rope_theta=1e4,
                rope_scaling=dict(type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4),
                original_max_position_embeddings=32,
            ),
            32,
        ),
        (
            tf.LlamaConfig(**common, **width),
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            512,
        ),
        (
            tf.Gemma3TextConfig(**common, **width, **heads),
            dict(
                rope_parameters=dict(
                    full_attention=LONG | dict(original_max_position_embeddings=32),
                    sliding_attention=dict(rope_type="default", rope_theta=1e4),
                )
            ),
            32,
        ),
    ],
    ids=["longrope", "original outside", "as published", "dynamic", "by layer type"],
)
def test_lengths_that_change_the_rotary_embeddings_are_refused(config, changes, original, tmp_path, capsys):
    name = saved_config(tmp_path / "model", config, **changes)
    args = SimpleNamespace(max_length=original + 1)
    with pytest.raises(SystemExit) as e:
        dpo.fit_length(args, name)
    said = capsys.readouterr().err
    assert e.value.code == 2 and f"--max-length {original + 1}" in said and f"at most {original}" in said
    args.max_length = original
    assert dpo.fit_length(args, name) == original


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="default", rope_theta=1e4),
        dict(rope_type="linear", rope_theta=1e4, factor=2.0),
        dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32),
        dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_that_ignore_the_length_take_every_length(rope, tmp_path):
    config = tf.LlamaConfig(**common, **width, rope_parameters=rope)
    name = saved_config(tmp_path / "model", config)
    assert dpo.fit_length(SimpleNamespace(max_length=400), name) == 400
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert_same(prepared(copy.deepcopy(reference), "llama"), reference, rows_of(96))


# ------------------------------------------------------------------------------------------------------------- sharding


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["gemma3, multimodal", "llama", "gpt2", "mistral", "bloom", "opt", "mixtral, jitter"])
def test_the_text_models_layers_are_sharded(name, one_rank, tiny_tokenizer):
    reference = model_of(name, tiny_tokenizer)
    model = prepared(copy.deepcopy(reference), name)
    sharded = {k for k, module in model.named_modules() if isinstance(module, FSDPModule)}
    layers = {k for k, _ in model.named_modules() if re.search(r"\.(layers|h)\.\d+$", k) and "vision" not in k}
    assert len(layers) == 2 and sharded == layers | {""}
    rows = rows_of(model.config.get_text_config().vocab_size)
    theirs, ours = alone(reference, rows), together(model, rows)
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


# ----------------------------------------------------------------------------------------------------------- generation

SAMPLED = [
    "llama",
    "qwen3",
    "gpt2",
    "glm4",
    "deepseek_v2",
    "bloom",
    "mpt",
    "falcon, ALiBi",
    "stablelm",
    "lfm2",
    "mamba2",
    "granite",
]
SAMPLED += [
    "mistral, a window",
    "qwen2, a window",
    "qwen3, a window",
    "olmo3",
    "gemma2, soft caps",
    "gpt_oss",
    "vaultgemma",
]


@pytest.mark.parametrize("name", SAMPLED)
def test_the_answers_shown_are_those_of_the_models_own_attention(name, tiny_tokenizer, capsys):
    model = model_of(name, tiny_tokenizer)
    text = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    model.generation_config.eos_token_id = None
    rows = [row for row in rows_of(model.config.get_text_config().vocab_size)]
    rows[1] = rows[0]._replace(prompt=rows[0].prompt + rows[0].responses[0])
    expected = []
    with torch.no_grad():
        for row in rows[:3]:
            ids = torch.tensor([row.prompt])
            for _ in range(12):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            expected.append(text.decode(ids[0, len(row.prompt) :].tolist()))
    model = prepared(model, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "stop_tokens", lambda tokenizer: [0])
        for row, words in zip(rows, expected):
            dpo.show_answers(model, text, [row], count=1, max_new_tokens=12)
            shown = re.search(r"-> '([\d ]*)'", capsys.readouterr().out)[1].split()
            assert shown == words.split()[: len(shown)] and (len(shown) == 12 or shown[-1] == "0")
    assert model.training and model.config._attn_implementation == ("packed_rows" if model.packs else "eager")
