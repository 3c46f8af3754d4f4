"""The CUDA paths, guarded on a CPU: whole runs on fake CUDA tensors, waits for the device counted, FlashAttention's numbers.

Skipped where there is no C++ compiler (fake_cuda.py says why it needs one)."""

import json
import math
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.attention.varlen as varlen
import transformers as tf
from conftest import REPO, tiny_config

HARNESS = REPO / "tests" / "fake_cuda.py"
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="the fake CUDA device needs a C++ compiler, c++")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    code = f"import sys; sys.path.insert(0, {str(HARNESS.parent)!r}); import fake_cuda; from pathlib import Path"
    subprocess.run([sys.executable, "-c", f"{code}; fake_cuda.build_shim(Path({str(folder)!r}))"], check=True)
    return str(folder / "shim.so")


@pytest.fixture(scope="module")
def run_fake(shim):
    """run_fake(world, script=..., options=...) -> what fake_cuda.run returns; one process for each number of ranks."""
    processes = {}

    def go(world: int, **job) -> dict:
        if world not in processes:
            env = os.environ | dict(WORLD_SIZE=str(world), FAKE_CUDA_SHIM=shim, PYTHONDONTWRITEBYTECODE="1")
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[world] = subprocess.Popen([sys.executable, HARNESS], env=env, cwd=REPO, **pipes)
        process, said = processes[world], []
        print(json.dumps(job), file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line[7:])
            said.append(line)
        del processes[world]
        pytest.fail(f"the process ended with {process.wait()}: {''.join(said)[-2000:]}")

    yield go
    for process in processes.values():
        process.stdin.close()
        process.wait()


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def inputs(tiny_model_dir, tiny_tokenizer, tmp_path_factory):
    """name -> path of a model or a data set."""
    folder, found = tmp_path_factory.mktemp("inputs"), {name: str(tiny_model_dir(name)) for name in MODELS}
    config = tiny_config("qwen3", tiny_tokenizer)
    config.num_labels = 1
    tf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "scorer")
    tiny_tokenizer.save_pretrained(folder / "scorer")
    asked = ["What is the best path?", "Write a letter to a friend.", "Right, up, right?", "What is 4 and 3?"]
    prompts = [f"{prompt} {i}" for i in range(4) for prompt in asked]
    rows = {
        "sft": [dict(prompt=p, completion="The path is safe.") for p in prompts],
        "pairs": [dict(prompt=p, chosen="The path is safe.", rejected="No.") for p in prompts],
        "rankings": [dict(prompt=p, completions=["No.", "The path.", "Up."], scores=[1, 2, 3]) for p in prompts],
        "prompts": [dict(prompt=[dict(role="user", content=p)], answer="3") for p in prompts],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(folder / f"{name}.jsonl")
    return found | dict(scorer=str(folder / "scorer"))


MODELS = ("llama", "qwen3", "gemma2", "nemotron")
common = dict(batch_size=4, max_steps=3, save_every=2, max_length=64, tokens_per_forward=60, eval_fraction=0.1)
online = common | dict(max_new_tokens=6, rewards=("scorer",), dataset="prompts", num_generations=2)
ptx = dict(ptx_coef=1.0, ptx_dataset="sft", value_model="scorer", num_minibatches=2, ppo_epochs=1)
RUNS = {  # name: (script, its options; the names of inputs stand for their paths)
    "sft": ("sft", common | dict(model="llama", dataset="sft", gradient_checkpointing=True)),
    "sft, soft caps": ("sft", common | dict(model="gemma2", dataset="sft", max_steps=1)),
    "sft, padded": ("sft", common | dict(model="nemotron", dataset="sft")),
    "reward_model": ("reward_model", common | dict(model="qwen3", dataset="rankings")),
    "dpo": ("dpo", common | dict(model="qwen3", dataset="rankings", nll_coef=0.2)),
    "dpo, merging": (
        "dpo",
        common | dict(model="qwen3", dataset="pairs", reference="qwen3", optimizer="onties", merge_base="qwen3"),
    ),
    "orpo": ("orpo", common | dict(model="qwen3", dataset="pairs")),
    "rpo": ("rpo", common | dict(model="qwen3", dataset="pairs", reward_model="scorer")),
    "ppo": ("ppo", online | dict(model="llama", rewards=("judge:qwen3", "scorer"), **ptx)),
    "grpo": ("grpo", online | dict(model="qwen3", rewards=("match:number", "scorer"), kl_coef=0.1, reference_every=2)),
}


def options_of(options: dict, inputs: dict, out, **more) -> dict:
    """Options with the paths of inputs in place of their names."""
    path = lambda x: (
        "judge:" * x.startswith("judge:") + inputs.get(x.removeprefix("judge:"), x) if isinstance(x, str) else x
    )
    paths = {k: tuple(map(path, v)) if isinstance(v, tuple) else path(v) for k, v in options.items()}
    return paths | dict(output_dir=str(out)) | more


# By run, in a step without evaluation or saving: the waits for the device outside of sampling, and the copies to it from
# memory that is not pinned, for each of which the host waits too. The waits of the offline scripts are the norm of the
# gradients, the metrics with the stop signal, and reward_model.py's extremes. No number depends on the micro-batches.
MOST = {
    "sft": (2, 0),
    "sft, padded": (2, 0),
    "reward_model": (3, 0),
    "dpo": (2, 0),
    "dpo, merging": (3, 0),
    "orpo": (2, 0),
    "rpo": (2, 0),
    "ppo": (9, 8),
    "grpo": (6, 10),
}


def check(found: dict, name: str, world: int = 1):
    """Fails where a run that fake_cuda.py describes has used the CPU, another dtype, or more waits than it may."""
    assert not found["error"] and not found["faults"], found["error"] or found["faults"]
    for model in found["models"]:
        assert model["packs"] == (name != "sft, padded"), f"packs: {model['packs']}"
        assert model["dtypes"] == ["bfloat16" if model["is_frozen"] else "float32"]
    assert (found["flash"] > 0) == (name not in ("sft, padded", "sft, soft caps"))
    if name in MOST:
        waits, copies, tokens = (found["steps"][1][field] for field in ("waits", "copies", "tokens"))
        sampling, counting = (waits.pop(function, 0) for function in ("sample", "forwards"))
        # several ranks agree on the number of forwards, once for each pass over the rows
        copies = {k: v for k, v in copies.items() if world == 1 or k != "forwards"}
        assert counting <= 11 * (world - 1)
        assert sampling <= 2 * tokens + 2, f"{sampling} waits for {tokens} tokens"
        assert sum(waits.values()) <= MOST[name][0], f"waits: {waits}"
        assert sum(copies.values()) <= MOST[name][1], f"copies: {copies}"


@needs_compiler
@pytest.mark.parametrize("world, name", [(1, name) for name in RUNS] + [(2, n) for n in ("sft", "dpo", "ppo", "grpo")])
def test_a_run_stays_on_the_device(world, name, run_fake, inputs, tmp_path):
    script, options = RUNS[name]
    found = run_fake(world, script=script, options=options_of(options, inputs, tmp_path / "run"))
    print(json.dumps(dict(NAME=name, WORLD=world) | found))
    assert len(found["steps"]) == options["max_steps"] or found["error"]
    check(found, name, world)


@needs_compiler
def test_a_resumed_run_stays_on_the_device(run_fake, inputs, tmp_path):
    """Policy, value model and both optimisers come from a checkpoint."""
    more = dict(rewards=(inputs["scorer"],), max_steps=2, save_every=1)
    options = options_of(RUNS["ppo"][1], inputs, tmp_path / "run", **more)
    check(run_fake(1, script="ppo", options=options, stop_after=2), "")
    check(found := run_fake(1, script="ppo", options=options | dict(resume=True)), "")
    assert len(found["steps"]) == 1


LABEL = dict(judge="qwen3", model="llama", dataset="prompts", rows=4, max_new_tokens=6)
BEST = dict(model="llama", reward_model=("scorer",), dataset="prompts", rows=4, max_new_tokens=6, n=2)


@needs_compiler
@pytest.mark.parametrize("args, options", [("LabelArgs", LABEL), ("BestOfNArgs", BEST)])
def test_rlaif_stays_on_the_device(args, options, run_fake, inputs, tmp_path):
    found = run_fake(1, script="rlaif", args=args, options=options_of(options, inputs, tmp_path / "run"))
    check(found, "")


ROWS_ON_CPU = "[number for column in columns for number in column]"
FAULTS = {  # what is planted in the script: (its text, with the fault, the run that meets it, what the failure says)
    "rows on the CPU": (f"to_device({ROWS_ON_CPU}, device)", f"torch.tensor({ROWS_ON_CPU})", "sft", "device"),
    "int64 lengths": ("cu_q=cu_q.int()", "cu_q=cu_q", "sft", "lengths are"),
    "float32 queries": ("q, k = q.to(v.dtype), k.to(v.dtype)", "q = q.float()", "sft", "dtypes torch.float32"),
    "a mask on the CPU": (
        "padded(torch.ones_like(ids))",
        "padded(torch.ones_like(ids)).cpu()",
        "sft, padded",
        "waits.*pad",
    ),
    "positions on the CPU": ("j = torch.arange(K, device=q.device)", "j = torch.arange(K)", "sft, soft caps", "packs"),
    "a wait for each forward": (
        "return self.base_model(",
        "return inputs['input_ids'].sum() and self.base_model(",
        "sft",
        "waits",
    ),
    "memory that is not pinned": (
        "values.pin_memory().to(device, non_blocking=True)",
        "values.to(device)",
        "sft",
        "copies",
    ),
    "a whole model moved": ("    model.eval()\n", "    model.eval().to(device)\n", "sft", "before it is sharded"),
    "a frozen model in float32": ("parameter.data = parameter.data.bfloat16()", "pass", "rpo", "float32"),
    "a count on the CPU": ("torch.tensor(most, device=device)", "torch.tensor(most)", "sft", "NCCL refuses"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, run_fake, inputs, tmp_path):
    right, wrong, name, said = FAULTS[fault]
    script, options = RUNS[name]
    options = options_of(options, inputs, tmp_path / "run", max_steps=2, save_every=0, eval_fraction=0.0)
    world = 2 if "NCCL" in said else 1
    found = run_fake(world, script=script, options=options, edits=[[right, wrong]])
    with pytest.raises(AssertionError, match=said):
        check(found, name)


# ---------------------------------------------------------------------------------------------------- FlashAttention


def dense(q, k, v, cu_q, cu_k, scale, window, given=None):
    """The output of attention by segments, q [T, H, D]; or, with the gradient given for it, those of q, k and v.

    As FlashAttention: the causal mask is aligned to a segment's last key, and a window counts keys to the left."""
    parts, groups = [], q.shape[1] // k.shape[1]
    for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist()):
        query, key, value = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        key, value = (x.repeat_interleave(groups, 0) for x in (key, value))  # [H, T, D]
        i, j = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        hidden = (j > i + window[1]) | (j < i - window[0] if window[0] >= 0 else False)
        weights = (query @ key.mT * scale).masked_fill(hidden, -math.inf).softmax(-1)
        if given is None:
            parts.append([(weights @ value).transpose(0, 1)])
            continue
        grad = given[a:b].transpose(0, 1)
        scores = weights * (grad @ value.mT - (grad @ value.mT * weights).sum(-1, keepdim=True)) * scale
        over_group = lambda x: x.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
        parts.append([(scores @ key).transpose(0, 1), over_group(scores.mT @ query), over_group(weights.mT @ grad)])
    return [torch.cat(part) for part in zip(*parts)]


@pytest.fixture(scope="module")
def flash_script():
    """dpo.py, whose rows_attention takes FlashAttention's branch on the CPU while FLASH is true; with kernels for it."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *args, **kwargs):
        assert max(cu_q.diff().tolist()) == max_q and max(cu_k.diff().tolist()) == max_k
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q) and cu_k[-1] == len(k)
        out = dense(q, k, v, cu_q, cu_k, scale, window_size)[0]
        return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(g, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window_size=None):
        return tuple(dense(q, k, v, cu_q, cu_k, scale, window_size, g))

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    text = (REPO / "dpo.py").read_text().replace("if q.is_cuda and", "if FLASH and")
    module = types.ModuleType("dpo_flash")
    sys.modules["dpo_flash"] = module  # for its dataclasses
    before = {**tf.AttentionInterface._global_mapping}
    exec(compile(text, REPO / "dpo.py", "exec"), module.__dict__)
    tf.AttentionInterface._global_mapping.update(before)  # other tests have models of their own scripts
    assert "if FLASH and" in text
    return module


LAYOUTS = [  # prompts, and the lengths of their answers
    ((5, (3, 9, 1)), (1, (1,)), (13, (7,)), (6, (10, 2)), (6, (10, 2)), (1, (1, 1))),
    ((2, (1,)), (7, (4,))),
    ((1, (1, 1, 1)),),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads, groups", [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
def test_flash_attention_gives_what_sdpa_gives(layout, heads, groups, window, flash_script):
    torch.manual_seed(0)
    row = lambda prompt, answers: flash_script.Row(
        [0] * prompt, [[0] * n for n in answers], [[True] * n for n in answers], {}
    )
    inputs = flash_script.pack([row(*form) for form in layout], torch.device("cpu"))[0]["inputs"]
    length = inputs["input_ids"].shape[1]
    qkv = [torch.randn(1, n, length, 16, dtype=torch.float64, requires_grad=True) for n in (heads, groups, groups)]
    given, found = torch.randn(1, length, heads, 16, dtype=torch.float64), []
    for flash_script.FLASH in (False, True):
        options = dict(scaling=0.3, sliding_window=window, rows=inputs["rows"])
        out = flash_script.rows_attention(None, *qkv, None, **options)[0]
        found.append([out, *torch.autograd.grad(out, qkv, given)])
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() < 1e-12
