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
    "sft, padded": ("sft", common | dict(model="nemotron", dataset="sft", max_steps=1)),
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
    path = lambda x: "judge:" * x.startswith("judge:") + inputs.get(x.removeprefix("judge:"), x) if isinstance(x, str) else x
    paths = {k: tuple(map(path, v)) if isinstance(v, tuple) else path(v) for k, v in options.items()}
    return paths | dict(output_dir=str(out)) | more


@needs_compiler
@pytest.mark.parametrize("world, name", [(1, name) for name in RUNS] + [(2, n) for n in ("sft", "dpo", "ppo", "grpo")])
def test_a_run_stays_on_the_device(world, name, run_fake, inputs, tmp_path):
    script, options = RUNS[name]
    found = run_fake(world, script=script, options=options_of(options, inputs, tmp_path / "run"))
    print(json.dumps(found, indent=1))
    assert not found["error"] and not found["faults"], found["error"] or found["faults"]
    assert len(found["steps"]) == options["max_steps"]


LABEL = dict(judge="qwen3", model="llama", dataset="prompts", max_rows=4, max_new_tokens=6)
BEST = dict(model="llama", reward_model="scorer", dataset="prompts", max_rows=4, max_new_tokens=6, n=2)


@needs_compiler
@pytest.mark.parametrize("args, options", [("LabelArgs", LABEL), ("BestOfNArgs", BEST)])
def test_rlaif_stays_on_the_device(args, options, run_fake, inputs, tmp_path):
    found = run_fake(1, script="rlaif", args=args, options=options_of(options, inputs, tmp_path / "run"))
    print(json.dumps(found, indent=1))
    assert not found["error"] and not found["faults"], found["error"] or found["faults"]
