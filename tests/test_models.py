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
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import dpo
from dpo import Row

CPU = torch.device("cpu")
ARGS = SimpleNamespace(gradient_checkpointing=False, tokens_per_forward=10**6)
SMALL = SimpleNamespace(tokens_per_forward=150)  # some rows together, some alone

common = dict(vocab_size=96, initializer_range=0.2, eos_token_id=2, max_position_embeddings=512)
width = common | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
width |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1)
narrow = width | dict(head_dim=8)
gemma = narrow | dict(query_pre_attn_scalar=8)
experts = dict(num_experts_per_tok=2, moe_intermediate_size=16, num_experts=4)
qwen2_moe = width | experts | dict(shared_expert_intermediate_size=16)
every_other = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
windowed = dict(use_sliding_window=True, sliding_window=32, max_window_layers=1)
soft_caps = dict(sliding_window=32, attn_logit_softcapping=0.5, tie_word_embeddings=False)
old = dict(vocab_size=96, hidden_size=32, initializer_range=0.2, eos_token_id=2)
falcon = old | dict(num_hidden_layers=2, num_attention_heads=4)
mamba = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2)
vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28)
vision |= dict(patch_size=14)
minimax = width | dict(num_local_experts=4, block_size=16, layer_types=["linear_attention", "full_attention"])
mimo = narrow | dict(v_head_dim=8, sliding_window=32, n_routed_experts=4, num_experts_per_tok=2)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
longrope = dict(rope_parameters=LONG | dict(original_max_position_embeddings=256), original_max_position_embeddings=256)

CONFIGS = {  # name: (class, options)
    "qwen2_moe, no windows": ("Qwen2Moe", qwen2_moe),
    "qwen2_moe, all windows": ("Qwen2Moe", qwen2_moe | windowed | dict(max_window_layers=0)),
    "qwen2_moe, a window": ("Qwen2Moe", qwen2_moe | windowed),
    "qwen2, a window": ("Qwen2", width | windowed),
    "qwen3, a window": ("Qwen3", narrow | windowed),
    "qwen3_moe, a window": ("Qwen3Moe", narrow | experts | windowed),
    "mistral, a window": ("Mistral", width | dict(sliding_window=32)),
    "mixtral, jitter": ("Mixtral", width | dict(num_local_experts=4, router_jitter_noise=0.5)),
    "minimax, jitter": ("MiniMax", minimax | dict(router_jitter_noise=0.5)),
    "phimoe, jitter": ("Phimoe", width | dict(num_local_experts=4, router_jitter_noise=0.2, input_jitter_noise=0.2)),
    "gemma2, soft caps": ("Gemma2", gemma | soft_caps | dict(final_logit_softcapping=3.0)),
    "vaultgemma": ("VaultGemma", gemma | soft_caps | dict(num_key_value_heads=4)),
    "gemma3, multimodal": (
        "Gemma3",
        dict(text_config=gemma | every_other, vision_config=vision, mm_tokens_per_image=4),
    ),
    "gemma4": (
        "Gemma4Text",
        narrow | every_other | dict(vocab_size_per_layer_input=96, hidden_size_per_layer_input=8),
    ),
    "gpt_oss": ("GptOss", narrow | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32)),
    "mimo_v2": ("MiMoV2Flash", mimo | dict(moe_intermediate_size=16)),
    "bloom": ("Bloom", old | dict(n_layer=2, n_head=4)),
    "mpt": ("Mpt", dict(vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=512, initializer_range=0.2)),
    "falcon, ALiBi": ("Falcon", falcon | dict(alibi=True, bias=True)),
    "falcon": ("Falcon", falcon | dict(alibi=False)),
    "falcon, new": ("Falcon", falcon | dict(alibi=False, num_kv_heads=2, new_decoder_architecture=True)),
    "gpt_neo": (
        "GPTNeo",
        old | dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=32),
    ),
    "stablelm": ("StableLm", width),
    "stablelm, parallel": ("StableLm", width | dict(use_parallel_residual=True, qk_layernorm=True)),
    "cohere2": ("Cohere2", width | every_other),
    "granite": (
        "Granite",
        width | dict(logits_scaling=8.0, attention_multiplier=0.1, residual_multiplier=0.2, embedding_multiplier=12.0),
    ),
    "olmo3": ("Olmo3", width | every_other),
    "phi3, longrope": ("Phi3", width | longrope),
    "lfm2": ("Lfm2", width | dict(layer_types=["conv", "full_attention"])),
    "falcon_h1": (
        "FalconH1",
        width
        | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8),
    ),
    "mamba2": ("Mamba2", mamba | dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8)),
    "opt": ("OPT", width | dict(ffn_dim=64, word_embed_proj_dim=32)),
}
PACKED = {"gemma2", "gpt_oss", "vaultgemma", "gemma3, multimodal", "mixtral, jitter"}
PACKED |= {"mistral, a window", "qwen2, a window", "qwen3, a window"}
# ALiBi from the mask, a window of its own, states
PADDED = {"bloom", "mpt", "falcon, ALiBi", "gpt_neo", "lfm2", "falcon_h1", "mamba2"}


def model_of(name, tokenizer=None, **more):
    kind, options = CONFIGS.get(name, ("Llama", {}))
    if not hasattr(tf, f"{kind}Config"):
        pytest.skip("this transformers does not have it")
    config = tiny_config(name, tokenizer) if name in FAMILIES else getattr(tf, f"{kind}Config")(**options)
    for field, value in more.items():
        setattr(config, field, value)
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
    for wanted in (False, True):
        model = model_of(name, attention_dropout=0.5, hidden_dropout=0.5)
        dpo.prepare_model(model, name, ARGS, CPU, torch.float32, dpo.token_logps, dropout=wanted)
        first, second = (together(model, rows_of(96)) for _ in range(2))
        assert torch.equal(first, second) is not wanted


# ---- positions


def saved_config(folder, config, **changes) -> str:
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return str(folder)


SHORT = dict(original_max_position_embeddings=32)
BY_TYPE = dict(full_attention=LONG | SHORT, sliding_attention=dict(rope_type="default", rope_theta=1e4))
FACTORS = dict(type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)
PUBLISHED = dict(rope_parameters=None, rope_theta=1e4, rope_scaling=FACTORS)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)


@pytest.mark.parametrize(
    "config, changes, original",
    [
        (tf.LlamaConfig(**width), dict(rope_parameters=LONG | SHORT), 32),
        (tf.Phi3Config(**width), dict(rope_parameters=LONG) | SHORT, 32),
        (tf.Phi3Config(**width), PUBLISHED | SHORT, 32),
        (tf.LlamaConfig(**width), dict(rope_parameters=DYNAMIC), 512),
        (tf.Gemma3TextConfig(**gemma), dict(rope_parameters=BY_TYPE), 32),
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


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
IGNORANT = [dict(rope_type="default"), dict(rope_type="linear", factor=2.0), LLAMA3 | SHORT]
IGNORANT += [dict(rope_type="yarn", factor=4.0) | SHORT]


@pytest.mark.parametrize("rope", IGNORANT, ids=lambda rope: rope["rope_type"])
def test_rotary_embeddings_that_ignore_the_length_take_every_length(rope, tmp_path):
    config = tf.LlamaConfig(**width, rope_parameters=rope | dict(rope_theta=1e4))
    name = saved_config(tmp_path / "model", config)
    assert dpo.fit_length(SimpleNamespace(max_length=400), name) == 400
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert_same(prepared(copy.deepcopy(reference), "llama"), reference, rows_of(96))


# ---- sharding


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


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch cannot compute attention in bfloat16"
)
def test_a_frozen_model_is_kept_in_bfloat16(one_rank):
    """It gives what the same model gives whose float32 weights are cast in each forward; angles stay in float32."""
    trained, frozen = model_of("qwen3, a window"), model_of("qwen3, a window").requires_grad_(False)
    for model, dtype in ((trained, torch.float32), (frozen, torch.bfloat16)):
        dpo.prepare_model(model, "qwen3", ARGS, CPU, torch.bfloat16, dpo.token_logps)
        assert {p.dtype for p in model.parameters()} == {dtype} and {b.dtype for b in model.buffers()} == {
            torch.float32
        }
    assert torch.equal(together(trained, rows_of(96)), together(frozen, rows_of(96)))


def test_packing_that_fails_in_bfloat16_alone_is_found_out(one_rank, capsys):
    def raises(module, q, k, v, *args, **kwargs):
        if v.dtype == torch.bfloat16:
            raise RuntimeError("no such kernel")
        return dpo.rows_attention(module, q, k, v, *args, **kwargs)

    reference, model = model_of("qwen2, a window"), model_of("qwen2, a window")
    dpo.AttentionInterface.register("packed_rows", raises)
    try:
        dpo.prepare_model(model, "qwen2", ARGS, CPU, torch.bfloat16, dpo.token_logps)
    finally:
        dpo.AttentionInterface.register("packed_rows", dpo.rows_attention)
    assert not model.packs and "(RuntimeError: no such kernel); they are padded" in capsys.readouterr().out
    assert all(isinstance(p, DTensor) for p in model.parameters())  # nothing stays gathered
    logps, expected = together(model, rows_of(96)), alone(reference, rows_of(96))
    assert (logps - expected).norm() < 0.1 * expected.norm()
    assert gradient(model, logps)


# ---- generation

SAMPLED = ["llama", "gpt2", "deepseek_v2", "bloom", "mpt", "lfm2", "mamba2"]
SAMPLED += ["mistral, a window", "gemma2, soft caps", "gpt_oss"]


@pytest.mark.parametrize("name", SAMPLED)
def test_the_answers_shown_are_those_of_the_models_own_attention(name, tiny_tokenizer, capsys):
    model = model_of(name, tiny_tokenizer)
    text = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    model.generation_config.eos_token_id = None
    rows = rows_of(model.config.get_text_config().vocab_size)
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
