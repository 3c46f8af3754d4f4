"""These scripts on one GPU: are they right there, how fast are they beside TRL, and what do they make of real conversations?

    pip install -e '.[bench]'                                              (trl may be missing, or elsewhere: --trl-python)
    python benchmarks/gpu.py                                               check, train and online, at 0.6, 1.7 and 8 B parameters
    python benchmarks/gpu.py --parts check                                 is it right? exit code 1 where an error exceeds its bound
    python benchmarks/gpu.py --parts train --sizes 0.6B --methods sft dpo --repeats 5
    python benchmarks/gpu.py --conversations chats.jsonl --pairs pairs.jsonl --prompts prompts.jsonl --work runs/gpu
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --device cpu --sizes tiny   all of it, tiny, to try this file: results go to stdout only

check    attention, log-probabilities, sampling and whole loss curves against float64, or against another way to the same number
train    tokens a second, peak memory and share of the measured matmul rate of sft.py, dpo.py and reward_model.py, beside TRL
online   a step of grpo.py and ppo.py, beside TRL's GRPO; and sampling alone, beside the two ways of transformers
real     a model of 70 M parameters from nothing, on your files: pre-training, chat, reward model, DPO, PPO, GRPO

Models of train and online have random weights in Qwen3's shapes, and rows of random words with the lengths of chats. Both sides have float32
weights and AdamW, and compute in bfloat16. Whatever is timed has a process to itself. TRL runs in every setting that might be its fastest;
from the second repeat on, in the one that was. A side that runs out of memory starts again with half as much in a forward. Each table goes to
benchmarks/RESULTS.md, in place of what stood there under the same heading.
"""

import argparse
import copy
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import beside_trl
from beside_trl import shown, write_results

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
SHAPE += ("head_dim", "vocab_size", "max_position_embeddings")
SIZES = {
    "tiny": (64, 128, 2, 4, 2, True, 16, 1280, 4096),
    "0.6B": (1024, 3072, 28, 16, 8, True, 128, 151936, 40960),
    "1.7B": (2048, 6144, 28, 16, 8, True, 128, 151936, 40960),
    "8B": (4096, 12288, 36, 32, 8, False, 128, 151936, 40960),
}
WORK = dict(rows=1024, mean=350, longest=2048, batch=32, tokens=16384, prompts=64, answers=8, new_tokens=256, cache=2**18, steps=3, matmul=8192)
TINY_WORK = dict(rows=16, mean=30, longest=96, batch=8, tokens=512, prompts=4, answers=2, new_tokens=8, cache=2**12, steps=2, matmul=512)
SETTINGS = {  # of TRL; where its DPO has no padding-free mode (1.16), it says so and pads
    "sft": {"padding-free": dict(padding_free=True, max_length=None), "packing": dict(packing=True)},
    "dpo": {"precomputed, padding-free": dict(precompute_ref_log_probs=True, padding_free=True)},
    "reward_model": {"padding": {}},
    "grpo": {
        "generate": {},
        "static cache": dict(cache_implementation="static"),
        "continuous batching": dict(use_transformers_continuous_batching=True),
    },
}
PARTS = ("check", "train", "online", "real")


# ------------------------------------------------------------------------------------------------------------------ processes


def run(name: str, python: str = sys.executable, launcher: tuple = (), **arguments) -> dict:
    """What a side returns, which works in a process of its own; or {"error": what went wrong}."""
    done = subprocess.run([python, *launcher, __file__, "--side", name, json.dumps(arguments)], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("note:"):  # a model whose attention does not follow rows is measured, but is not what was to be measured
            print(f"{name}: {line}", flush=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr or done.returncode == -9:
        return dict(error="out of memory")
    print(f"{name} {arguments}\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
    return dict(error=f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:100]}".replace("|", "/"))


def in_turn(repeats: int, sides: dict) -> dict:
    """The results of each side, run in turn; after the first round only of the first side, ours, and of the fastest of the others.

    sides: by name, the arguments of `run`. While memory runs out, a side starts again with half the share of the work in a forward."""
    found, shares, names = {name: [] for name in sides}, dict.fromkeys(sides, 1.0), list(sides)
    for _ in range(repeats):
        for name in names:
            result = run(share=shares[name], **sides[name])
            while result.get("error") == "out of memory" and shares[name] > 1 / 16:
                shares[name] /= 2
                result = run(share=shares[name], **sides[name])
            found[name].append(result | dict(share=shares[name]))
            print(f"{name:<36}", result.get("error") or f"{result['seconds']:8.2f} s {result['memory']:8} MB", flush=True)
        ours, *others = [name for name in sides if "error" not in found[name][0]] or [""]
        if ours != next(iter(sides)):
            break
        names = [ours, *sorted(others, key=lambda name: found[name][0]["seconds"])[:1]]
    return {name: [r for r in results if "error" not in r] or results[:1] for name, results in found.items()}


def times(results: list, ours: list) -> str:
    """How many times as fast as this side ours is."""
    pairs = [] if results is ours or "error" in results[0] or "error" in ours[0] else zip(results, ours)
    ratios = [theirs["seconds"] / own["seconds"] for theirs, own in pairs]
    return shown(ratios, 2) if ratios else ""


def peak(results: list) -> str:
    return f"{max(r['memory'] for r in results) / 1024:.1f}"


def publish(args, heading: str, text: str, head: str = "", table: list = ()):
    """A part's result: printed, and on a GPU written to RESULTS.md."""
    rows = [f"| {' | '.join(cells)} |" for cells in table]
    text = "\n".join([f"{args.machine}\n\n{text}", *(["", f"| {head} |", "| --- " * (head.count("|") + 1) + "|", *rows] if rows else [])])
    print(f"\n## {heading}\n\n{text}\n", flush=True)
    if args.device != "cpu":
        write_results(heading, text)


def side(name: str, arguments: str):
    """One side's work in this process; its last line is the result."""
    print("\n" + json.dumps(globals()[f"side_{name}"](**json.loads(arguments))), flush=True)


def wait():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def side_device(size: int) -> dict:
    """The device, the versions, and its rate in the product of two matrices, in the dtype of the computation."""
    import torch

    versions = {
        p: importlib.metadata.version(p) if importlib.util.find_spec(p) else "" for p in ("torch", "transformers", "trl", "flash_attn", "vllm")
    }
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    for count in (5, 20):  # the first few only warm up
        wait()
        clock = time.time()
        for _ in range(count):
            a @ b
        wait()
    rate = 2 * size**3 * count / (time.time() - clock)
    properties = torch.cuda.get_device_properties(0) if gpu else SimpleNamespace(name="CPU", total_memory=2**40)
    return dict(name=properties.name, memory=properties.total_memory, rate=rate, versions=versions)


def side_model(size: str, out: str, tokenizer: str, reward: bool = False) -> dict:
    """A checkpoint with random weights."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen3Config(**dict(zip(SHAPE, SIZES[size])), pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = (Qwen3ForSequenceClassification if reward else Qwen3ForCausalLM)(config)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return {}


# ----------------------------------------------------------------------------------------------------------------------- data


def lines(file: Path, rows: list) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def make_data(folder: Path, work: dict) -> SimpleNamespace:
    """A tokenizer of 200 words, and demonstrations, pairs and prompts of them: log-normal lengths, as in real chats."""
    import sft

    rng, words = random.Random(0), [f"we{i}" for i in range(200)]
    _, tokenizer = sft.new_model(sft.Args(vocab_size=1024, hidden_size=16, num_layers=1, num_heads=1), [" " + " ".join(words)] * 10)
    tokenizer.save_pretrained(folder / "tokenizer")
    say = lambda role, n: [dict(role=role, content=" ".join(rng.choices(words, k=max(1, int(n)))))]
    demonstrations, pairs = [], []
    for _ in range(work["rows"]):
        total = min(work["longest"] - 16, max(12, rng.lognormvariate(math.log(work["mean"]) - 0.32, 0.8)))  # 0.32: half the variance
        asked, other = total * rng.uniform(0.1, 0.6), rng.uniform(0.6, 1.0)
        prompt, answer = say("user", asked), say("assistant", total - asked)
        demonstrations.append(dict(prompt=prompt, completion=answer))
        pairs.append(dict(prompt=prompt, chosen=answer, rejected=say("assistant", 1 + (total - asked) * other)))
    prompts = [dict(prompt=say("user", work["mean"] * rng.uniform(0.1, 0.6))) for _ in range(work["prompts"] * work["steps"])]
    files = dict(sft=lines(folder / "demonstrations.jsonl", demonstrations), grpo=lines(folder / "prompts.jsonl", prompts))
    files |= dict(dpo=lines(folder / "pairs.jsonl", pairs), reward_model=str(folder / "pairs.jsonl"), ppo=files["grpo"])
    ids = lambda messages, **options: len(tokenizer.apply_chat_template(messages, return_dict=False, **options))
    lengths = {}  # by method: (prompt, [responses]) of each row
    for method, rows, columns in (("sft", demonstrations, ("completion",)), ("dpo", pairs, ("chosen", "rejected"))):
        heads = [ids(row["prompt"], add_generation_prompt=True) for row in rows]
        lengths[method] = [(n, [ids(row["prompt"] + row[c]) - n for c in columns]) for n, row in zip(heads, rows)]
    return SimpleNamespace(tokenizer=str(folder / "tokenizer"), files=files, lengths=lengths | dict(reward_model=lengths["dpo"]))


def parameters(size: str) -> int:
    s = SimpleNamespace(**dict(zip(SHAPE, SIZES[size])))
    return products(s) + s.vocab_size * s.hidden_size * (1 if s.tie_word_embeddings else 2)


def products(s) -> int:
    """Parameters of the layers' matrices."""
    heads = 2 * s.num_attention_heads + 2 * s.num_key_value_heads
    return s.num_hidden_layers * s.hidden_size * (s.head_dim * heads + 3 * s.intermediate_size)


def flops(size: str, lengths: list, prompt_once: bool, head: bool) -> float:
    """Of forward and backward: 6 a parameter and token, and 12 a head's dimension for each pair of a query and a key that it sees."""
    s, total = SimpleNamespace(**dict(zip(SHAPE, SIZES[size]))), 0.0
    for p, answers in lengths:
        times = 1 if prompt_once else len(answers)
        tokens, seen = times * p + sum(answers), times * p * p / 2 + sum(r * p + r * r / 2 for r in answers)
        total += 6 * products(s) * tokens + 12 * s.num_hidden_layers * s.num_attention_heads * s.head_dim * seen
        total += 6 * s.hidden_size * s.vocab_size * sum(answers) * head
    return total


# ---------------------------------------------------------------------------------------------------------------------- check


def attention_errors(device, dtype, window, heads: int, groups: int, width: int) -> dict:
    """Of rows_attention, forward and backward, against dense float64 attention whose mask is built from who each token is."""
    import sft
    import torch

    forms = ((5, (3, 9, 1)), (1, (1,)), (130, (70,)), (64, (200, 17)), (64, (200, 17)), (300, (1, 1, 260)))
    forwards, _ = sft.pack([sft.Row([0] * p, [[0] * r for r in answers]) for p, answers in forms], device)
    who = [(i, k, t) for i, (p, answers) in enumerate(forms) for k, n in ((-1, p), *enumerate(answers)) for t in range(n)]
    row, part, at = torch.tensor([(i, k, t + (forms[i][0] if k >= 0 else 0)) for i, k, t in who], device=device).T
    seen = (row[:, None] == row) & (at[:, None] >= at) & ((part == -1) | (part[:, None] == part))
    seen &= at[:, None] - at < (window or len(who))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, len(who), width, device=device).to(dtype) for n in (heads, groups, groups))
    given = torch.randn(1, len(who), heads, width, device=device).to(dtype)

    def dense(q, k, v):
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        scores = (q @ k.transpose(2, 3) * width**-0.5).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def rows(q, k, v):
        return sft.rows_attention(None, q, k, v, None, scaling=width**-0.5, sliding_window=window, rows=forwards[0][0]["rows"])[0]

    def results(attend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*(x * 1 for x in inputs))
        out.backward(given.to(dtype))
        return [out.detach().double(), *(x.grad.double() for x in inputs)]

    import torch.nn.attention.varlen as varlen

    with mock.patch.object(varlen, "varlen_attn", wraps=varlen.varlen_attn) as spy:
        found = results(rows, dtype)
    if spy.called != (device.type == "cuda" and dtype == torch.bfloat16):
        raise RuntimeError(f"varlen_attn {'ran' if spy.called else 'did not run'}")
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, results(dense, torch.float64))]
    name = f"attention, {heads} heads of {width}" + (f", window {window}" if window else "") + (", varlen_attn" if spy.called else ", sdpa")
    return {f"{name}: forward": errors[0], f"{name}: backward": max(errors[1:])}


def alone(model, prompt: list, answer: list, temperature: float = 1.0, kept=None):
    """Log-probabilities of an answer's tokens by the model's own forward on this one sequence."""
    import torch

    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    if kept is not None:
        allowed = torch.ones_like(logits, dtype=torch.bool)
        for t, nucleus in enumerate(kept):
            allowed[t, nucleus] = False
        logits = logits.masked_fill(allowed, -math.inf)
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def small_model(script, folder: str, family: str, tokenizer: str, device, dtype):
    """A random model with sharp distributions as the script loads and shards it, and the same in float64 (norms and angles stay float32)."""
    import torch
    import transformers

    directory = f"{folder}/{family}"
    if not Path(directory).exists():
        torch.manual_seed(0)
        size = dict(vocab_size=5000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
        config = getattr(transformers, f"{family}Config")(**size, head_dim=64, initializer_range=0.06, max_position_embeddings=1024)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    exact = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").double().to(device)
    model = script.load_model(transformers.AutoModelForCausalLM, directory, script.load_tokenizer(directory), device, dtype)
    if not model.together:
        raise RuntimeError("its attention does not follow rows: the scripts would run one sequence a forward")
    return script.shard(model, dtype, script.token_logps), exact


def logp_errors(device, dtype, folder: str, family: str, tokenizer: str) -> dict:
    """Of token_logps on packed rows, and of the gradient of their mean, against float64, one sequence at a time."""
    import sft
    import torch

    model, exact = small_model(sft, folder, family, tokenizer, device, dtype)
    rng = random.Random(0)
    ids = lambda n: rng.choices(range(5000), k=n)
    rows = [sft.Row(ids(p), [ids(r) for r in answers]) for p, answers in ((40, (30, 7)), (3, (1,)), (1, (2,)), (90, (60, 1, 44)), (200, (300,)))]
    logps, *_ = model.token_logps(*sft.pack(rows, device))
    (-logps.mean()).backward()
    wanted = torch.cat([alone(exact, row.prompt, answer) for row in rows for answer in row.responses])
    (-wanted.mean()).backward()
    whole = lambda p: getattr(p.grad, "full_tensor", lambda: p.grad)().double()
    gap = math.sqrt(sum(float((whole(a) - b.grad).square().sum()) for a, b in zip(model.parameters(), exact.parameters())))
    norm = math.sqrt(sum(float(b.grad.square().sum()) for b in exact.parameters()))
    return {f"{family}: log-probabilities of packed rows": float((logps - wanted).abs().max()), f"{family}: their gradient": gap / norm}


def sampling_errors(device, dtype, method: str, folder: str, tokenizer: str, temperature: float, top_p: float) -> dict:
    """Of the log-probabilities that the sampler records, and of those that the script computes again, against float64."""
    import torch

    script, rng = importlib.import_module(method), random.Random(0)
    model, exact = small_model(script, folder, "Qwen3", tokenizer, device, dtype)
    prompts = [script.Row(rng.choices(range(5000), k=n), []) for n in (3, 60, 17, 17, 1)]
    numbers = script.uniform_numbers(0, 0, list(range(20)), 40)
    tokens, recorded, kept = script.sample_answers(model, prompts, numbers, list(range(200)), 600, temperature, top_p)  # 200 stops: uneven ends
    rows = [prompts[i // 4]._replace(responses=[answer]) for i, answer in enumerate(tokens)]
    options, wanted = SimpleNamespace(temperature=temperature, tokens_per_forward=500), []
    with torch.no_grad():
        again, _ = script.response_logps(model, rows, kept, options, device)
        for row, nuclei in zip(rows, kept):
            wanted.append(alone(exact, row.prompt, row.responses[0], temperature, nuclei))
    name, worst = f"{method}.py, T {temperature:g}, top-p {top_p:g}", lambda parts: max(float((a - b).abs().max()) for a, b in zip(parts, wanted))
    return {f"{name}: recorded": worst([torch.tensor(x, device=device) for x in recorded]), f"{name}: computed again": worst(again)}


def side_check(folder: str, tokenizer: str) -> list:
    """(what, largest error, bound) of each check within one process."""
    import sft
    import torch

    found = []

    def note(bounds, errors, *arguments):
        try:
            errors = errors(*arguments)
        except Exception as e:  # the other checks still say something
            errors = {f"{errors.__name__}{arguments[2:]}": f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"}
        found.extend((f"{dtype} {what}", error, bound) for (what, error), bound in zip(errors.items(), bounds))

    for dtype in ("float32", "bfloat16"):  # float32 first: bfloat16 starts a process group, and with it FSDP
        fine, (device, kind) = dtype == "float32", sft.start_ranks(dtype)
        for heads in ((16, 8, 128), (8, 8, 64), (4, 4, 12)):
            for window in (None, 50):
                note((5e-5, 5e-5) if fine else (0.02, 0.02), attention_errors, device, kind, window, *heads)  # of the largest entry
        for family in ("Llama", "Qwen3"):  # in nats; of the gradient's norm
            note((2e-4, 1e-4) if fine else (0.15, 0.05), logp_errors, device, kind, folder, family, tokenizer)
        for method in ("ppo", "grpo"):
            for options in ((1.0, 1.0), (0.7, 0.9)):
                note((2e-4, 2e-4) if fine else (0.15, 0.15), sampling_errors, device, kind, method, folder, tokenizer, *options)
    torch.distributed.destroy_process_group()
    return found


def check(args, data, folder: Path) -> bool:
    found = run("check", folder=str(folder), tokenizer=data.tokenizer)
    rows = [("every check within one process", found["error"], 0.0)] if "error" in found else found
    sft = dict(name="ours", method="sft", model=f"{folder}/Llama", data=data.files["sft"], share=1.0, max_steps=8, batch_size=8, learning_rate=1e-4)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    plain = run(**sft, out=f"{folder}/plain", dtype="float32")
    rank = run(**sft, out=f"{folder}/rank", dtype="float32", group=True, launcher=torchrun)
    half = run(**sft, out=f"{folder}/half", dtype="bfloat16")
    for what, other, bound in (("float32, a rank of torchrun under FSDP2", rank, 1e-4), ("bfloat16", half, 0.05)):
        wrong = plain.get("error") or other.get("error")
        rows.append((f"loss curve of sft.py, {what}", wrong or max(abs(a - b) for a, b in zip(plain["losses"], other["losses"], strict=True)), bound))
    good = [isinstance(error, float) and error <= bound for _, error, bound in rows]
    table = [[what, f"{e:.1e}" if isinstance(e, float) else e, f"{bound:.0e}", "yes" if ok else "**no**"] for (what, e, bound), ok in zip(rows, good)]
    text = "Errors of attention are relative to the largest entry, of gradients to their norm; of log-probabilities and losses they are in nats. The"
    text += " references are float64, one sequence at a time; of the curves, a single process in float32.\n"
    publish(args, "One GPU: is it right?", text, "what | largest error | bound | within it", table)
    return all(good)


# ------------------------------------------------------------------------------------------------------------------- training


def side_ours(method: str, model: str, data: str, out: str, share: float, group: bool = False, tokens: int = 16384, **flags) -> dict:
    """A run of a script: its losses, the seconds of its second half, its peak memory."""
    script = importlib.import_module(method)
    if group:  # where there is a process group, a script shards, in float32 too
        import torch

        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    flags |= dict(show=0) if method == "dpo" else {}
    flags |= dict(model=model, dataset=data, output_dir=out, eval_fraction=0.0, lr_schedule="constant", tokens_per_forward=int(tokens * share))
    script.main(script.Args(**flags))
    log = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    seconds = log[-1]["seconds"] - log[len(log) // 2 - 1]["seconds"]
    return dict(losses=[line["loss"] for line in log], seconds=seconds, memory=log[-1]["peak_memory_mb"])


def side_trl(method: str, setting: dict, model: str, data: str, out: str, share: float, batch: int, packs: int = 0, **flags) -> dict:
    """A run of a TRL trainer: the seconds of its second epoch, of GRPO of a step after the first; its peak memory; tokens sampled in a step."""
    import resource

    import torch
    import trl as library
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from transformers.utils import is_flash_attn_2_available

    steps, epochs = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            wait()
            steps.append(time.time())

        def on_epoch_end(self, *args, **kwargs):
            wait()
            epochs.append(time.time())

    gpu, name = torch.cuda.is_available(), dict(sft="SFT", reward_model="Reward", dpo="DPO", grpo="GRPO")[method]
    batch = packs if setting.get("packing") else batch  # as many full rows as hold the tokens of a batch
    at_once = max(1, int(batch * share))
    flags |= dict(output_dir=out, per_device_train_batch_size=at_once, gradient_accumulation_steps=batch // at_once, learning_rate=1e-6, seed=0)
    flags |= dict(lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", bf16=gpu)
    flags |= dict(use_cpu=not gpu, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True) | setting
    auto, options = (AutoModelForSequenceClassification, dict(num_labels=1)) if method == "reward_model" else (AutoModelForCausalLM, {})
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    policy = auto.from_pretrained(model, dtype=torch.float32, attn_implementation=attention, **options)
    inputs = dict(model=policy, args=getattr(library, f"{name}Config")(**flags), train_dataset=load_dataset("json", data_files=data, split="train"))
    inputs |= dict(reward_funcs=beside_trl.rule) if method == "grpo" else {}
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left" if method == "grpo" else "right")
    trainer = getattr(library, f"{name}Trainer")(**inputs, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    memory = torch.cuda.max_memory_allocated() >> 20 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    if method == "grpo":
        length = median(line["completions/mean_length"] for line in trainer.state.log_history if "completions/mean_length" in line)
        return dict(seconds=median(b - a for a, b in zip(steps, steps[1:])), memory=memory, tokens=length * batch)
    return dict(seconds=epochs[-1] - epochs[0], memory=memory)


def train(args, data, folder: Path):
    work, own = args.work, dict(epochs=2, batch_size=args.work["batch"], learning_rate=1e-6, max_length=args.work["longest"], overwrite=True)
    for size in args.sizes:
        need, model, out = 16 * parameters(size), str(folder / size), str(folder / "out")
        if need > args.memory:
            text = f"Not run: weights, gradients and AdamW's two moments take {need / 1e9:.0f} GB, the card has {args.memory / 1e9:.0f} GB; sft.py, dpo.py"
            publish(args, f"One GPU: training, {size}", text + " and reward_model.py have no option that trains less.")
            continue
        run("model", size=size, out=model, tokenizer=data.tokenizer)
        for method in args.methods:
            lengths = data.lengths[method]
            tokens = sum(p + r for p, answers in lengths for r in answers)
            packs = max(1, round(tokens * work["batch"] / len(lengths) / work["longest"]))
            common = dict(
                method=method, model=model, data=data.files[method], out=out, gradient_checkpointing=need > 1e11
            )  # else activations do not fit
            sides = {f"{method}.py": dict(name="ours", **common, **own, tokens=work["tokens"])}
            for name, setting in SETTINGS[method].items() if args.trl_version else ():
                setting = dict(max_length=work["longest"], num_train_epochs=2) | setting | args.trl
                sides[f"TRL, {name}"] = dict(name="trl", python=args.trl_python, setting=setting, **common, batch=work["batch"], packs=packs)
            print(f"\n{method}.py, {size}", flush=True)
            found, table = in_turn(args.repeats, sides), []
            ours = found[f"{method}.py"]
            for name, results in found.items():
                if "error" in results[0]:
                    table.append([name, results[0]["error"], *[""] * 4])
                    continue
                seconds, share = [r["seconds"] for r in results], results[0]["share"]
                done = flops(size, lengths, prompt_once=results is ours, head=method != "reward_model") / median(seconds)
                forward = f"{int(work['tokens'] * share)} tokens" if results is ours else f"1/{round(1 / share)} of a batch"
                cells = [name, shown([tokens / s for s in seconds], 0), times(results, ours), peak(results), f"{done / args.rate:.2f}", forward]
                table.append(cells)
            text = f"{parameters(size) / 1e9:.2f} B parameters; {len(lengths)} rows, {tokens} tokens (a prompt once for each answer), {work['batch']} rows a step;"
            text += f" the second of two epochs, medians of {args.repeats} runs in turn, and the range (a TRL setting that is not its fastest runs once). The"
            text += f" matmul rate is {args.rate / 1e12:.3g} TFLOP/s, measured; FLOPs by formula: 6 for a parameter and token, attention by its causal half, the"
            text += " output layer at trained tokens; padding and recomputation do not count, and a prompt counts as often as its side computes it."
            text += " The reference's log-probabilities come before, on both sides." if method == "dpo" else ""
            text += " Activations are recomputed, on both sides." if common["gradient_checkpointing"] else ""
            head = f"side | tokens a second | times as fast is {method}.py | peak GB | share of the matmul rate | a forward"
            publish(args, f"One GPU: training, {method}.py, {size}", text, head, table)
            shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(model)


# --------------------------------------------------------------------------------------------------------------------- online


def side_online(method: str, model: str, data: str, out: str, share: float, reward: str, tokens: int, **flags) -> dict:
    """A run of a script: seconds of a step after the first and of the sampling in it, tokens sampled in a step, peak memory."""
    script, seconds, counts = importlib.import_module(method), [], []
    sample_answers = script.sample_answers

    def timed(*arguments):
        wait()
        clock = time.time()
        answers = sample_answers(*arguments)
        wait()
        seconds.append(time.time() - clock)
        counts.append(sum(map(len, answers[0])))
        return answers

    script.sample_answers = timed  # no metric tells sampling from the update
    flags |= dict(reward_model=(reward,)) if method == "ppo" else dict(rule=f"{beside_trl.__file__}:rule", kl_coef=0.0)
    flags |= dict(model=model, dataset=data, output_dir=out, overwrite=True, eval_fraction=0.0, show_every=0, tokens_per_forward=int(tokens * share))
    script.main(script.Args(**flags))
    log = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    step = median(b["seconds"] - a["seconds"] for a, b in zip(log, log[1:]))
    return dict(seconds=step, sampling=median(seconds[1:]), tokens=median(counts[1:]), memory=log[-1]["peak_memory_mb"])


def side_sampling(way: str, model: str, data: str, share: float, prompts: int, answers: int, new_tokens: int, cache: int) -> dict:
    """Answers to the same prompts in one of three ways: tokens and seconds of two batches after the first, peak memory."""
    import ppo
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    device, dtype = ppo.start_ranks("auto")
    tokenizer = ppo.load_tokenizer(model)
    asked = [tokenizer.apply_chat_template(json.loads(line)["prompt"], add_generation_prompt=True, return_dict=False) for line in open(data)][
        :prompts
    ]
    if way == "scripts":
        policy = ppo.load_model(AutoModelForCausalLM, model, tokenizer, device, dtype)
        policy = ppo.shard(policy.requires_grad_(False), dtype, ppo.token_logps)
    else:
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    end, found = tokenizer.eos_token_id, []
    config = GenerationConfig(do_sample=True, max_new_tokens=new_tokens, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=0)
    for batch in range(3):
        wait()
        clock, count = time.time(), 0
        if way == "scripts":
            numbers = ppo.uniform_numbers(0, batch, list(range(prompts * answers)), new_tokens)
            sampled, *_ = ppo.sample_answers(policy, [ppo.Row(ids, []) for ids in asked], numbers, [end], int(cache * share), 1.0, 1.0)
            count = sum(map(len, sampled))
        elif way == "generate":
            several, width = max(1, int(prompts * share)), max(map(len, asked))
            for i in range(0, prompts, several):
                part = [ids for ids in asked[i : i + several] for _ in range(answers)]
                mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in part], device=device)
                ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in part], device=device)
                new = policy.generate(input_ids=ids, attention_mask=mask, generation_config=config, cache_implementation="static")[:, width:]
                count += int(((new == end).cumsum(1) - (new == end).long() == 0).sum())  # up to the end, which counts
        else:
            sampled = policy.generate_batch(inputs=[ids for ids in asked for _ in range(answers)], generation_config=config)
            count = sum(len(answer.generated_tokens) for answer in sampled.values())
        wait()
        found.append((count, time.time() - clock))
    (first, a), (second, b) = found[1:]
    return dict(tokens=first + second, seconds=a + b, memory=ppo.peak_memory(device))


def online(args, data, folder: Path):
    work, size, prompts = args.work, args.sizes[0], data.files["grpo"]
    model, reward, out = (str(folder / name) for name in ("policy", "reward", "out"))
    run("model", size=size, out=model, tokenizer=data.tokenizer)
    run("model", size=size, out=reward, tokenizer=data.tokenizer, reward=True)
    batch, common = work["prompts"] * work["answers"], dict(model=model, data=prompts, out=out, num_generations=work["answers"])
    own = dict(batch_size=work["prompts"], max_new_tokens=work["new_tokens"], sample_tokens=work["cache"], tokens=work["tokens"], reward=reward)
    sides = {"grpo.py": dict(name="online", method="grpo", **common, **own)}
    for name, setting in SETTINGS["grpo"].items() if args.trl_version else ():
        setting = dict(max_completion_length=work["new_tokens"], temperature=1.0, beta=0.0, gradient_checkpointing=False) | setting | args.trl
        sides[f"TRL's GRPO, {name}"] = dict(name="trl", python=args.trl_python, method="grpo", setting=setting, **common, batch=batch)
    print(f"\ngrpo.py and ppo.py, {size}", flush=True)
    found, table = in_turn(args.repeats, sides), []
    ours = found["grpo.py"]
    found |= in_turn(args.repeats, {"ppo.py": dict(name="online", method="ppo", **common, **own)})
    for name, results in found.items():
        if "error" in results[0]:
            table.append([name, results[0]["error"], *[""] * 5])
            continue
        seconds, sampling = [r["seconds"] for r in results], [r["sampling"] for r in results if "sampling" in r]
        cells = [
            name,
            shown(seconds, 2),
            shown(sampling, 2) if sampling else "",
            shown([s - t for s, t in zip(seconds, sampling)], 2) if sampling else "",
        ]
        cells += [shown([r["tokens"] / r["seconds"] for r in results], 0), "" if name == "ppo.py" else times(results, ours), peak(results)]
        table.append(cells)
    text = f"{size}, {work['prompts']} prompts x {work['answers']} answers of at most {work['new_tokens']} tokens a step (random weights seldom stop), one update a"
    text += f" step for GRPO without a KL, for ppo.py the default 4 with a reward model and a value model of the same size; --sample-tokens {work['cache']}."
    text += f" Steps after the first; medians of {args.repeats} runs. TRL generates with transformers; its way by vLLM is not compared."
    head = "side | seconds a step | sampling | the rest | generated tokens a second | times as fast is grpo.py | peak GB"
    publish(args, f"One GPU: GRPO and PPO, {size}", text, head, table)

    shape = dict(prompts=work["prompts"], answers=work["answers"], new_tokens=work["new_tokens"], cache=work["cache"])
    ways = {"the scripts' loop": "scripts", "generate, static cache": "generate", "generate_batch": "continuous batching"}
    found = in_turn(args.repeats, {name: dict(name="sampling", way=way, model=model, data=prompts, **shape) for name, way in ways.items()})
    rate = lambda results: shown([r["tokens"] / r["seconds"] for r in results], 0)
    ours = found["the scripts' loop"]
    table = [[k, *([r[0]["error"], "", ""] if "error" in r[0] else [rate(r), times(r, ours), peak(r)])] for k, r in found.items()]
    text = f"{size}, {work['prompts']} prompts x {work['answers']} answers of at most {work['new_tokens']} tokens, two batches after the first."
    publish(args, f"One GPU: sampling, {size}", text, "way | tokens a second | times as fast is the loop | peak GB", table)
    for directory in (model, reward, out):
        shutil.rmtree(directory, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------- real


def side_perplexity(models: list, data: str, longest: int) -> list:
    """Of the assistant's turns of held-out conversations, for each model."""
    import sft
    from transformers import AutoModelForCausalLM

    (device, dtype), found, held_out = sft.start_ranks("auto"), [], sft.load_rows("--conversations", data)
    for name in models:
        tokenizer = sft.load_tokenizer(name)
        model = sft.shard(sft.load_model(AutoModelForCausalLM, name, tokenizer, device, dtype), dtype, sft.token_logps)
        rows = sft.prepare("held out", held_out, tokenizer, sft.demonstrations(tokenizer, longest, everything=False, allow_special=False))
        found.append(sft.evaluate_sft(model, rows, SimpleNamespace(tokens_per_forward=16384), device)["eval_perplexity"])
    return found


def call(script: str, out: Path, *more, **flags) -> dict:
    """A script as a user calls it; the last line of its metrics. What is finished in `out` already is left as it is."""
    command = [sys.executable, str(Path(__file__).parent.parent / script), *more, "--output-dir", str(out), "--resume"]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]) if (out / "metrics.jsonl").exists() else {}


def win_rate(ours: dict, theirs: dict) -> str:
    """The share of pairs of answers, one of each policy to the same prompt, of which ours has the higher reward."""
    wins = [sum((a > b) + (a == b) / 2 for a in ours[p] for b in theirs[p]) / len(ours[p]) / len(theirs[p]) for p in ours if p in theirs]
    return f"{sum(wins) / len(wins):.3f} ({len(wins)} prompts)" if wins else ""


def real(args, folder: Path):
    """Every stage on the command line, from nothing; then the policies on held-out prompts."""
    heading, given = "One GPU: a model from nothing", dict(conversations=args.conversations, pairs=args.pairs, prompts=args.prompts)
    if not all(given.values()):
        return print(f"\n## {heading}\n\nSkipped: it takes --conversations, --pairs and --prompts.\n", flush=True)
    import sft

    files, test = {}, {}
    for name, file in given.items():
        parts = sft.load_rows(f"--{name}", file).train_test_split(test_size=0.05, seed=0)
        for part, into in (("train", files), ("test", test)):
            rows = parts[part].select(range(min(len(parts[part]), 8 if args.sizes == ["tiny"] else 10**9)))
            into[name] = lines(folder / f"{name}-{part}.jsonl", list(rows))
            if name == "conversations":
                into["text"] = lines(folder / f"text-{part}.jsonl", [dict(text=text) for text in sft.plain_texts("--conversations", rows)])
    tiny = args.sizes == ["tiny"]
    size = dict(hidden_size=640, num_layers=12, num_heads=10, vocab_size=16384)
    size = dict(hidden_size=32, num_layers=2, num_heads=2, vocab_size=512) if tiny else size
    longest, new, steps = (128, 16, 2) if tiny else (1024, 256, 200)
    on = lambda name: dict(dataset=files[name], eval_dataset=test[name], max_length=longest)
    rl = on("prompts") | dict(model=folder / "sft", reward_model=folder / "reward_model", max_new_tokens=new, max_steps=steps, learning_rate=3e-6)
    last = dict(
        base=call("sft.py", folder / "base", **size, **on("text"), learning_rate=1e-3, weight_decay=0.1, batch_size=64),
        sft=call("sft.py", folder / "sft", model=folder / "base", **on("conversations"), learning_rate=1e-4, epochs=2),
        reward_model=call("reward_model.py", folder / "reward_model", model=folder / "sft", **on("pairs"), learning_rate=2e-5),
        dpo=call("dpo.py", folder / "dpo", model=folder / "sft", **on("pairs"), learning_rate=3e-6, max_new_tokens=new),
        ppo=call("ppo.py", folder / "ppo", **rl, value_learning_rate=1e-5, batch_size=4 if tiny else 128),
        grpo=call("grpo.py", folder / "grpo", **rl, num_generations=2 if tiny else 8, batch_size=4 if tiny else 32),
    )
    policies, scores, ended, table = ("sft", "dpo", "ppo", "grpo"), {}, {}, []
    asked = dict(reward_model=folder / "reward_model", dataset=test["prompts"], n=4, max_new_tokens=new)
    for name in policies:
        out = folder / f"best-{name}"
        call("rlaif.py", out, "best-of-n", model=folder / name, **asked)
        rankings = [json.loads(line) for line in (out / "rankings.jsonl").open()]
        scores[name] = {json.dumps(row["prompt"]): row["scores"] for row in rankings}
        report = json.loads((out / "report.json").read_text())
        ended[name] = 1 - report.get("cut_off_or_empty", 0) / (4 * report["rows"])
    perplexities = run("perplexity", models=[str(folder / name) for name in policies], data=test["conversations"], longest=longest)
    for name, perplexity in zip(policies, perplexities):
        rewards = [score for found in scores[name].values() for score in found]
        cells = [f"{name}.py", f"{perplexity:.2f}", win_rate(scores[name], scores["sft"]) if name != "sft" else ""]
        cells += [f"{sum(rewards) / len(rewards):+.2f}" if rewards else "", f"{ended[name]:.2f}", f"{last[name]['seconds']:.0f}"]
        table.append(cells)
    names = ", ".join(f"{name} {Path(file).name}" for name, file in given.items())
    text = f"{names}; a twentieth held out of each. Pre-training: perplexity {last['base']['eval_perplexity']:.1f} on held-out text, {last['base']['seconds']:.0f} s;"
    text += f" reward model: accuracy {last['reward_model']['eval_accuracy']:.3f} on held-out pairs, DPO's implicit reward"
    text += f" {last['dpo']['eval_rewards/accuracies']:.3f}. Four answers to each held-out prompt; rewards are the reward model's, the same that PPO and GRPO"
    text += " were trained on, of the answers that came to an end. Settings were not searched."
    head = "policy | perplexity of held-out conversations | win rate over sft.py | mean reward | answers that end | seconds of training"
    publish(args, heading, text, head, table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.6B", "1.7B", "8B"], help="of train; online takes the first")
    parser.add_argument("--methods", nargs="+", choices=("sft", "dpo", "reward_model"), default=("sft", "dpo", "reward_model"), help="of train")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--trl", type=json.loads, default={}, help="more settings of TRL, as JSON: '{\"use_liger_kernel\": true}'")
    parser.add_argument("--trl-python", default=sys.executable, help="the Python that has TRL")
    parser.add_argument("--conversations", default="", help="of real: a data set that sft.py reads")
    parser.add_argument("--pairs", default="", help="of real: one that reward_model.py reads")
    parser.add_argument("--prompts", default="", help="of real: one that ppo.py reads")
    parser.add_argument("--work", default="", help="directory to work in, where what real has finished stays (default: a temporary one)")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= dict(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    args.work_dir, args.work = args.work, TINY_WORK if args.sizes == ["tiny"] else WORK
    device = run("device", size=args.work["matmul"])
    if "error" in device or args.device == "cuda" and device["name"] == "CPU":
        sys.exit(f"no GPU: {device.get('error', 'torch sees none')}; --device cpu --sizes tiny only tries this file")
    versions = device["versions"]
    theirs = versions if args.trl_python == sys.executable else run("device", python=args.trl_python, size=64).get("versions", {})
    args.rate, args.memory, args.trl_version = device["rate"], device["memory"], theirs.get("trl")
    args.machine = f"{datetime.date.today()}, {device['name']}; torch {versions['torch']}, transformers {versions['transformers']}; "
    also = (
        f"TRL {args.trl_version}, {'flash-attn ' + theirs['flash_attn'] if theirs['flash_attn'] else 'without flash-attn'}"
        if args.trl_version
        else ""
    )
    args.machine += (also or "TRL is not installed, so that nothing stands beside") + "."
    good = True
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(args.work_dir or folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = make_data(folder, args.work)
        if "check" in args.parts:
            good = check(args, data, folder)
        if "train" in args.parts:
            train(args, data, folder)
        if "online" in args.parts:
            online(args, data, folder)
        if "real" in args.parts:
            real(args, folder)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        main()
