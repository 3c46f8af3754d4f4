"""These scripts on one GPU: are they right there, how fast are they beside TRL, and what does a whole chain of them give?

    pip install -e '.[bench]'                         without TRL, nothing stands beside
    python benchmarks/gpu.py                          check, train and online, real; writes its tables to docs/speed.md
    python benchmarks/gpu.py --parts check            exit code 1 where an error exceeds its bound
    python benchmarks/gpu.py --parts train --sizes 0.6B --methods sft dpo --repeats 5
    python benchmarks/gpu.py --parts real --model Qwen/Qwen3-0.6B --conversations chats.jsonl --pairs pairs.jsonl \
        --prompts prompts.jsonl
    python benchmarks/gpu.py --device cpu --sizes tiny       tries this file without a GPU; nothing is written

check    attention, log-probabilities, sampling and loss curves against float64, or against another way to the same numbers
train    tokens a second, peak memory and share of the measured matmul rate of sft.py, dpo.py and reward_model.py, beside TRL
online   steps of grpo.py and ppo.py, beside TRL's GRPO
real     sft.py, reward_model.py, dpo.py, ppo.py and grpo.py in a chain: on the grid world, or on your model and data sets

Models of train and online have random weights in Qwen3's shapes; their rows are random words, as long as chats are. Both
sides have float32 weights and AdamW, and compute in bfloat16. Whatever is timed has a process to itself. TRL runs in
every setting that might be its fastest; from the second repeat on, in the one that was. A side that runs out of memory
starts again with half as much in a forward.
"""

import argparse
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

from beside_trl import __file__ as RULES
from beside_trl import memory, rule, shown

REPO = Path(__file__).resolve().parent.parent

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
SHAPE += ("head_dim", "vocab_size", "max_position_embeddings")
SIZES = {
    "tiny": (64, 128, 2, 4, 2, True, 16, 1280, 4096),
    "0.6B": (1024, 3072, 28, 16, 8, True, 128, 151936, 40960),
    "1.7B": (2048, 6144, 28, 16, 8, True, 128, 151936, 40960),
    "8B": (4096, 12288, 36, 32, 8, False, 128, 151936, 40960),
}
WORK = dict(
    rows=1024,
    mean=350,
    longest=2048,
    batch=32,
    tokens=16384,
    prompts=64,
    answers=8,
    new=256,
    cache=2**18,
    steps=3,
    matmul=8192,
)
TINY = dict(
    rows=16, mean=30, longest=96, batch=8, tokens=512, prompts=4, answers=2, new=8, cache=2**12, steps=2, matmul=512
)
SETTINGS = {  # of TRL; where its DPO has no padding-free mode (1.16), it says so and pads
    "sft": {"padding-free": dict(padding_free=True, max_length=None), "packing": dict(packing=True)},
    "dpo": {"precomputed, padding-free": dict(precompute_ref_log_probs=True, padding_free=True)},
    "reward_model": {"padding": {}},
    "grpo": {"generate": {}, "static cache": dict(cache_implementation="static")},
}


# ------------------------------------------------------------------------------------------------------------------ processes


def run(name: str, launcher: tuple = (), **arguments) -> dict:
    """What a side returns, which works in a process of its own; or {"error": what went wrong}."""
    command = [sys.executable, *launcher, __file__, "--side", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("note:"):  # padded rows, say, are measured too, but are not what was to be measured
            print(f"{name}: {line}", flush=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr or done.returncode == -9:
        return dict(error="out of memory")
    print(f"{name} {arguments}\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
    return dict(error=f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:100]}".replace("|", "/"))


def in_turn(repeats: int, sides: dict) -> dict:
    """The results of each side, run in turn; after the first round only of the first side, ours, and of the fastest of the others.

    sides: by name, the arguments of `run`, of which share is the part of a batch that goes into a forward; halved while memory runs out."""
    found, names = {name: [] for name in sides}, list(sides)
    for _ in range(repeats):
        for name in names:
            result = run(**sides[name])
            while result.get("error") == "out of memory" and sides[name]["share"] > 1 / 64:
                sides[name]["share"] /= 2
                result = run(**sides[name])
            found[name].append(result | dict(share=sides[name]["share"]))
            print(
                f"{name:<32}", result.get("error") or f"{result['seconds']:8.2f} s {result['memory']:8} MB", flush=True
            )
        ours, *others = sides
        working = [name for name in others if "error" not in found[name][0]]
        names = [ours, *sorted(working, key=lambda name: found[name][0]["seconds"])[:1]]
        if "error" in found[ours][0]:
            break
    return {name: [r for r in results if "error" not in r] or results[:1] for name, results in found.items()}


def times(results: list, ours: list) -> str:
    """How many times as fast ours is."""
    ratios = [theirs["seconds"] / own["seconds"] for theirs, own in zip(results, ours) if "error" not in own]
    return shown(ratios, 2) if ratios and results is not ours else ""


def publish(args, heading: str, text: str, head: str = "", found: dict | None = None, cells=lambda results: results):
    """Prints a part's result and, from a GPU, writes it to docs/speed.md, in place of what stood there under the heading.

    found: the table's rows by name; cells: makes the cells of what is found."""
    text = f"{args.machine}\n\n{text}"
    if found:
        text += f"\n\n| {head} |\n{'| --- ' * (head.count('|') + 1)}|"
    for name, results in (found or {}).items():
        failed = isinstance(results[0], dict) and "error" in results[0]
        text += f"\n| {' | '.join([name, *([results[0]['error']] if failed else cells(results))])} |"
    print(f"\n## {heading}\n\n{text}\n", flush=True)
    if args.device == "cuda":
        file = REPO / "docs" / "speed.md"
        parts = file.read_text().rstrip("\n").split("\n\n## ")
        kept = [part for part in parts if not part.startswith(heading + "\n")]
        file.write_text("\n\n## ".join([*kept, f"{heading}\n\n{text}"]) + "\n")


def wait():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def side_device(size: int) -> dict:
    """The device, the versions, and the rate of a product of two matrices in the dtype of the computation."""
    import torch

    packages = ("torch", "transformers", "trl", "flash_attn")
    versions = {name: importlib.metadata.version(name) if importlib.util.find_spec(name) else "" for name in packages}
    gpu = torch.cuda.is_available()
    a, b = (
        torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32)
        for _ in "ab"
    )
    for count in (5, 20):  # the first few only warm up
        wait()
        clock = time.time()
        for _ in range(count):
            a @ b
        wait()
    rate = 2 * size**3 * count / (time.time() - clock)
    card = torch.cuda.get_device_properties(0) if gpu else SimpleNamespace(name="CPU", total_memory=2**40)
    return dict(name=card.name, memory=card.total_memory, rate=rate, versions=versions)


# ----------------------------------------------------------------------------------------------------------------------- data


def side_model(size: str, out: str, tokenizer: str, reward: bool = False) -> dict:
    """A checkpoint with random weights."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen3Config(
        **dict(zip(SHAPE, SIZES[size])),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        (Qwen3ForSequenceClassification if reward else Qwen3ForCausalLM)(config).save_pretrained(out)
    words = AutoTokenizer.from_pretrained(tokenizer)
    # a random policy draws from the whole vocabulary; without a text of its own, a token would reach no reward model
    words.add_tokens([f"x{i} " for i in range(config.vocab_size - len(words))])
    words.save_pretrained(out)
    return {}


def lines(file: Path, rows: list) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def make_data(folder: Path, work: dict) -> SimpleNamespace:
    """A tokenizer of 200 words; demonstrations, pairs and prompts of them, with log-normal lengths; the lengths in tokens."""
    import sft

    rng, words = random.Random(0), [f"we{i}" for i in range(200)]
    lines(folder / "words.jsonl", [dict(text=" " + " ".join(words))] * 10)
    tokenizer = sft.new_tokenizer(sft.Args(dataset=str(folder / "words.jsonl"), from_scratch=True, vocab_size=1024))
    tokenizer.save_pretrained(folder / "tokenizer")
    turn = lambda role, n: [dict(role=role, content=" ".join(rng.choices(words, k=max(1, int(n)))))]
    demonstrations, pairs = [], []
    for _ in range(work["rows"]):
        total = min(
            work["longest"] - 16, max(12, rng.lognormvariate(math.log(work["mean"]) - 0.32, 0.8))
        )  # 0.32: half the variance
        asked, shorter = total * rng.uniform(0.1, 0.6), rng.uniform(0.5, 1.0)
        prompt, answer = turn("user", asked), turn("assistant", total - asked)
        demonstrations.append(dict(prompt=prompt, completion=answer))
        pairs.append(dict(prompt=prompt, chosen=answer, rejected=turn("assistant", (total - asked) * shorter)))
    prompts = [
        dict(prompt=turn("user", work["mean"] * rng.uniform(0.1, 0.6))) for _ in range(work["prompts"] * work["steps"])
    ]
    files = dict(sft=lines(folder / "demonstrations.jsonl", demonstrations), dpo=lines(folder / "pairs.jsonl", pairs))
    files |= dict(reward_model=files["dpo"], online=lines(folder / "prompts.jsonl", prompts))
    ids = lambda messages, **options: len(tokenizer.apply_chat_template(messages, return_dict=False, **options))
    lengths = {}  # by method: (prompt, [answers]) of each row
    for method, rows, columns in (("sft", demonstrations, ("completion",)), ("dpo", pairs, ("chosen", "rejected"))):
        heads = [ids(row["prompt"], add_generation_prompt=True) for row in rows]
        lengths[method] = [(n, [ids(row["prompt"] + row[c]) - n for c in columns]) for n, row in zip(heads, rows)]
    return SimpleNamespace(
        tokenizer=str(folder / "tokenizer"), files=files, lengths=lengths | dict(reward_model=lengths["dpo"])
    )


def in_layers(s) -> int:
    """Parameters of the layers' matrices."""
    heads = 2 * s.num_attention_heads + 2 * s.num_key_value_heads
    return s.num_hidden_layers * s.hidden_size * (s.head_dim * heads + 3 * s.intermediate_size)


def parameters(size: str) -> int:
    s = SimpleNamespace(**dict(zip(SHAPE, SIZES[size])))
    return in_layers(s) + s.vocab_size * s.hidden_size * (1 if s.tie_word_embeddings else 2)


def flops(size: str, lengths: list, prompt_once: bool, head: bool) -> float:
    """Of forward and backward: 6 a parameter and token, and 12 a dimension of a head for each pair of a query and a key that it sees."""
    s, total = SimpleNamespace(**dict(zip(SHAPE, SIZES[size]))), 0.0
    for p, answers in lengths:
        prompts = 1 if prompt_once else len(answers)
        seen = prompts * p * p / 2 + sum(r * p + r * r / 2 for r in answers)
        total += (
            6 * in_layers(s) * (prompts * p + sum(answers))
            + 12 * s.num_hidden_layers * s.num_attention_heads * s.head_dim * seen
        )
        total += 6 * s.hidden_size * s.vocab_size * sum(answers) * head
    return total


# ---------------------------------------------------------------------------------------------------------------------- check


def attention_errors(device, dtype, window, heads: int, groups: int, width: int) -> dict:
    """Of rows_attention, forward and backward, against dense float64 attention, its mask built from which row and answer a token is of."""
    import torch

    import sft

    forms = ((5, (3, 9, 1)), (1, (1,)), (130, (70,)), (64, (100, 17)), (64, (100, 17)), (200, (1, 1, 60)))
    batch, _ = sft.pack(
        [sft.Row([0] * p, [[0] * r for r in answers], [[True] * r for r in answers], {}) for p, answers in forms],
        device,
    )
    who = [
        (i, k, t + p * (k >= 0))
        for i, (p, answers) in enumerate(forms)
        for k, n in ((-1, p), *enumerate(answers))
        for t in range(n)
    ]
    row, answer, at = torch.tensor(who, device=device).T
    seen = (row[:, None] == row) & ((answer == -1) | (answer[:, None] == answer))
    seen &= (at[:, None] >= at) & (at[:, None] - at < (window or len(who)))
    torch.manual_seed(0)
    q, k, v, given = (
        torch.randn(1, n, len(who), width, device=device).to(dtype) for n in (heads, groups, groups, heads)
    )

    def dense(q, k, v):
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        return ((q @ k.transpose(2, 3) * width**-0.5).masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2)

    def rows(q, k, v):
        return sft.rows_attention(
            None, q, k, v, None, scaling=width**-0.5, sliding_window=window, rows=batch["inputs"]["rows"]
        )[0]

    def results(attend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        out.backward(given.transpose(1, 2).to(dtype))
        return [x.detach().double() for x in (out, *(x.grad for x in inputs))]

    with mock.patch.object(sft, "varlen_attn", side_effect=sft.varlen_attn) as flash:
        found = results(rows, dtype)
    if flash.called != (device.type == "cuda" and dtype == torch.bfloat16):
        raise RuntimeError(f"varlen_attn {'ran' if flash.called else 'did not run'}")
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, results(dense, torch.float64))]
    name = f"attention by {'varlen_attn' if flash.called else 'sdpa'}, {heads} heads of {width}" + (
        f", window {window}" if window else ""
    )
    return {name: errors[0], f"{name}: gradients": max(errors[1:])}


def small_model(script, device, dtype, folder: str, family: str, tokenizer: str):
    """A random model as the script loads and shards it, and the same in float64 (but for norms and rotary angles, float32 in transformers)."""
    import torch
    import transformers

    directory = f"{folder}/{family}"
    if not Path(directory).exists():
        torch.manual_seed(0)
        size = dict(
            vocab_size=5000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        size |= dict(
            head_dim=64, max_position_embeddings=1024, initializer_range=0.06
        )  # large weights, so that distributions are sharp
        getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**size)).save_pretrained(
            directory
        )
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    exact = (
        transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").double().to(device)
    )
    model = script.read_model(transformers.AutoModelForCausalLM, directory, script.load_tokenizer(directory))
    if hasattr(script, "check_sampler"):  # ppo.py and grpo.py
        script.check_sampler(model, directory)
    options = SimpleNamespace(gradient_checkpointing=False)
    model = script.prepare_model(model, directory, options, device, dtype, script.token_logps)
    if not model.packs:
        raise RuntimeError("its attention does not follow packed rows")
    return model, exact


def alone(model, prompt: list, answer: list, temperature: float = 1.0):
    """Log-probabilities of an answer's tokens by the model's own forward on this one sequence."""
    import torch

    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def logp_errors(device, dtype, folder: str, family: str, tokenizer: str) -> dict:
    """Of token_logps on packed rows, and of the gradient of their mean, against float64, one sequence at a time."""
    import torch

    import sft

    (model, exact), rng = small_model(sft, device, dtype, folder, family, tokenizer), random.Random(0)
    ids = lambda n: rng.choices(range(5000), k=n)
    forms = ((40, (30, 7)), (3, (1,)), (1, (2,)), (90, (60, 1, 44)), (100, (200,)))
    rows = [sft.Row(ids(p), [ids(r) for r in answers], [[True] * r for r in answers], {}) for p, answers in forms]
    batch, target = sft.pack(rows, device)
    logps, *_ = model.token_logps(**batch, target=target)
    wanted = torch.cat([alone(exact, row.prompt, answer) for row in rows for answer in row.responses])
    (-logps.mean()).backward()
    (-wanted.mean()).backward()
    whole = lambda p: getattr(p.grad, "full_tensor", lambda: p.grad)().double()
    squares = [
        ((whole(a) - b.grad).square().sum(), b.grad.square().sum())
        for a, b in zip(model.parameters(), exact.parameters())
    ]
    gap, norm = (float(sum(x)) ** 0.5 for x in zip(*squares))
    return {
        f"token_logps of packed rows, {family}": float((logps - wanted).abs().max()),
        f"its gradient, {family}": gap / norm,
    }


def sampling_errors(device, dtype, folder: str, method: str, tokenizer: str, temperature: float) -> dict:
    """Of the log-probabilities that the sampler records, and of those that the script then computes, against float64."""
    import torch

    script, rng = importlib.import_module(method), random.Random(0)
    model, exact = small_model(script, device, dtype, folder, "Qwen3", tokenizer)
    prompts = [rng.choices(range(5000), k=n) for n in (3, 60, 17, 17, 1)]
    stops = list(range(200))  # many, for uneven ends
    numbers = script.uniform_numbers(0, 0, list(range(20)), 30)
    args = SimpleNamespace(tokens_per_forward=500, sample_tokens=600, temperature=temperature)
    tokens, recorded = script.sample_answers(model, prompts, numbers, stops, args, temperature)
    rows = [script.Row(prompts[i // 4], [ids], [[True] * len(ids)], {}) for i, ids in enumerate(tokens)]
    script.add_values(("logps",), model.token_logps, model, rows, args, device)
    with torch.no_grad():
        wanted = torch.cat([alone(exact, row.prompt, row.responses[0], temperature) for row in rows])
    recorded, name = torch.tensor(sum(recorded, []), device=device), f"{method}.py, T {temperature:g}"
    errors = {
        f"{name}: log-probabilities the sampler records": recorded,
        f"{name}: those of the forward after it": script.joined(rows, "logps"),
    }
    return {what: float((logps - wanted).abs().max()) for what, logps in errors.items()}


def side_check(folder: str, tokenizer: str) -> dict:
    """By what is checked: (largest error, bound)."""
    import sft

    found = {}

    def note(bounds, errors, *arguments):
        try:
            errors = errors(device, kind, *arguments)
        except Exception as e:  # the other checks still say something
            errors = {f"{errors.__name__} {arguments}": f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"}
        found.update({f"{dtype}: {what}": (error, bound) for (what, error), bound in zip(errors.items(), bounds)})

    for dtype in ("float32", "bfloat16"):  # float32 first: bfloat16 starts a process group, and with it FSDP
        fine, (device, kind) = dtype == "float32", sft.setup_distributed(SimpleNamespace(dtype=dtype, seed=0))
        for heads in ((16, 8, 128), (4, 4, 64)):
            for window in (None, 50):
                note((5e-5, 5e-5) if fine else (0.02, 0.02), attention_errors, window, *heads)
        for family in ("Llama", "Qwen3"):
            note((2e-4, 1e-4) if fine else (0.15, 0.06), logp_errors, folder, family, tokenizer)
        for method, temperature in (("ppo", 1.0), ("grpo", 0.7)):
            note((2e-4, 2e-4) if fine else (0.2, 0.2), sampling_errors, folder, method, tokenizer, temperature)
    sft.dist.destroy_process_group()
    return found


def check(args, data, folder: Path) -> bool:
    found = run("check", folder=str(folder), tokenizer=data.tokenizer)
    found = {"every check within one process": (found["error"], 0.0)} if "error" in found else found
    flags = dict(method="sft", model=f"{folder}/Llama", data=data.files["sft"], share=1.0, overwrite=True)
    flags |= dict(max_steps=8, batch_size=8, learning_rate=1e-4)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    plain = run("ours", **flags, out=f"{folder}/plain", dtype="float32")
    rank = run("ours", **flags, out=f"{folder}/rank", dtype="float32", group=True, launcher=torchrun)
    half = run("ours", **flags, out=f"{folder}/half", dtype="bfloat16")
    for what, other, bound in (("float32: a rank of torchrun under FSDP2", rank, 1e-4), ("bfloat16", half, 0.05)):
        wrong = plain.get("error") or other.get("error")
        found[f"{what}: loss curve of sft.py"] = (
            wrong or max(abs(a - b) for a, b in zip(plain["losses"], other["losses"], strict=True)),
            bound,
        )
    good = {what: isinstance(error, float) and error <= bound for what, (error, bound) in found.items()}
    found = {what: (good[what], *x) for what, x in found.items()}
    text = "Errors of attention are relative to the largest entry, those of gradients to their norm; of log-probabilities and losses they are in"
    text += (
        " nats. The references are float64, one sequence at a time; of the curves, one process in float32 without FSDP."
    )
    cells = lambda x: [f"{x[1]:.1e}" if isinstance(x[1], float) else x[1], f"{x[2]:g}", "yes" if x[0] else "**no**"]
    publish(args, "One GPU: is it right?", text, "what | largest error | bound | within it", found, cells)
    return all(good.values())


# ---------------------------------------------------------------------------------------------------------------------- train


def side_ours(
    method: str, model: str, data: str, out: str, share: float, group: bool = False, tokens: int = 16384, **flags
) -> dict:
    """A run of a script: its losses, the seconds of its second half, its peak memory."""
    script = importlib.import_module(method)
    if group:  # where there is a process group, the scripts shard, in float32 too
        script.dist.init_process_group("nccl" if script.torch.cuda.is_available() else "gloo")
    flags |= dict(
        model=model,
        dataset=data,
        output_dir=out,
        eval_fraction=0.0,
        lr_schedule="constant",
        tokens_per_forward=int(tokens * share),
    )
    script.main(script.Args(**flags))
    log = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    seconds = log[-1]["seconds"] - log[len(log) // 2 - 1]["seconds"]
    return dict(losses=[line["loss"] for line in log], seconds=seconds, memory=log[-1]["peak_memory_mb"])


def side_trl(method: str, setting: dict, model: str, data: str, out: str, share: float, batch: int, **flags) -> dict:
    """A run of a TRL trainer: seconds of its second epoch, or of a step of GRPO after the first; peak memory; tokens sampled in a step."""
    import torch
    import trl
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

    gpu, name, at_once = (
        torch.cuda.is_available(),
        dict(sft="SFT", reward_model="Reward", dpo="DPO", grpo="GRPO")[method],
        max(1, int(batch * share)),
    )
    flags |= dict(
        output_dir=out,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=batch // at_once,
        learning_rate=1e-6,
        seed=0,
    )
    flags |= dict(
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=gpu,
    )
    flags |= dict(use_cpu=not gpu, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)
    auto, options = (
        (AutoModelForSequenceClassification, dict(num_labels=1))
        if method == "reward_model"
        else (AutoModelForCausalLM, {})
    )
    options |= dict(
        dtype=torch.float32, attn_implementation="flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    )
    inputs = dict(
        model=auto.from_pretrained(model, **options),
        args=getattr(trl, f"{name}Config")(**flags | setting),
        callbacks=[Clock()],
    )
    inputs |= dict(reward_funcs=rule) if method == "grpo" else {}
    inputs |= dict(
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left" if method == "grpo" else "right")
    )
    trainer = getattr(trl, f"{name}Trainer")(
        **inputs, train_dataset=load_dataset("json", data_files=data, split="train")
    )
    trainer.train()
    peak = torch.cuda.max_memory_allocated() >> 20 if gpu else memory()
    if method == "grpo":
        length = median(
            line["completions/mean_length"] for line in trainer.state.log_history if "completions/mean_length" in line
        )
        return dict(seconds=median(b - a for a, b in zip(steps, steps[1:])), memory=peak, tokens=length * batch)
    return dict(seconds=epochs[-1] - epochs[0], memory=peak)


def train(args, data, folder: Path):
    work, own = args.amount, dict(epochs=2, learning_rate=1e-6, overwrite=True)
    own |= dict(batch_size=work["batch"], max_length=work["longest"], tokens=work["tokens"])
    for size in args.sizes:
        need, model = 16 * parameters(size), str(folder / size)
        if need > args.memory:
            text = f"Not run: weights, gradients and AdamW's two moments take {need / 1e9:.0f} GB, the card has {args.memory / 1e9:.0f} GB; sft.py,"
            publish(
                args,
                f"One GPU: training, {size}",
                text + " dpo.py and reward_model.py have no option that trains less.",
            )
            continue
        run("model", size=size, out=model, tokenizer=data.tokenizer)
        for method in args.methods:
            lengths, recompute = data.lengths[method], need > 1e11  # where the activations would not fit beside that
            tokens = sum(p + r for p, answers in lengths for r in answers)
            common = dict(
                method=method,
                model=model,
                data=data.files[method],
                out=str(folder / "out"),
                gradient_checkpointing=recompute,
            )
            sides = {f"{method}.py": dict(name="ours", share=1.0, **common, **own)}
            for name, setting in SETTINGS[method].items() if args.trl_version else ():
                batch = (
                    max(1, round(tokens * work["batch"] / len(lengths) / work["longest"]))
                    if name == "packing"
                    else work["batch"]
                )
                setting = dict(max_length=work["longest"], num_train_epochs=2) | setting
                theirs = dict(
                    name="trl", share=1.0 if method == "sft" else 0.25, batch=batch
                )  # padded rows need more memory
                sides[f"TRL, {name}"] = dict(**theirs, setting=setting, **common)
            print(f"\n{method}.py, {size}", flush=True)
            found = in_turn(args.repeats, sides)
            ours = found[f"{method}.py"]

            def cells(results):
                seconds, share = [r["seconds"] for r in results], results[0]["share"]
                done = flops(size, lengths, prompt_once=results is ours, head=method != "reward_model") / median(
                    seconds
                )
                forward = (
                    f"{int(work['tokens'] * share)} tokens" if results is ours else f"1/{round(1 / share)} of a batch"
                )
                peak = f"{max(r['memory'] for r in results) / 1024:.1f}"
                return [
                    shown([tokens / s for s in seconds], 0),
                    times(results, ours),
                    peak,
                    f"{done / args.rate:.2f}",
                    forward,
                ]

            text = f"{parameters(size) / 1e9:.2g} B parameters; {len(lengths)} rows, {tokens} tokens (a prompt once for each answer),"
            text += f" {work['batch']} rows a step; the second of two epochs; medians of {args.repeats} runs, and the range (a slower setting of TRL"
            text += f" runs once). Matmul rate: {args.rate / 1e12:.3g} TFLOP/s, measured. FLOPs by formula: 6 for a parameter and token, the causal"
            text += " half of attention, the output layer at trained tokens; padding and recomputation do not count; a prompt counts as often as its"
            text += " side computes it."
            text += " The reference's log-probabilities are computed before, on both sides." if method == "dpo" else ""
            text += " Activations are recomputed in the backward pass, on both sides." if recompute else ""
            head = f"side | tokens a second | times as fast is {method}.py | peak GB | share of the matmul rate | a forward"
            publish(args, f"One GPU: training, {method}.py, {size}", text, head, found, cells)
            shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.rmtree(model)


# --------------------------------------------------------------------------------------------------------------------- online


def side_online(
    method: str, model: str, data: str, out: str, share: float, reward: str, tokens: int, cache: int, **flags
) -> dict:
    """A run of a script: seconds of a step after the first and of the sampling in it, tokens sampled in a step, peak memory."""
    script, seconds, counts = importlib.import_module(method), [], []
    sample_answers = script.sample_answers

    def timed(*arguments, **named):
        wait()
        clock = time.time()
        answers = sample_answers(*arguments, **named)
        wait()
        seconds.append(time.time() - clock)
        counts.append(sum(map(len, answers[0])))
        return answers

    script.sample_answers = timed  # no metric tells sampling from the update
    flags |= dict(rewards=(reward,)) if method == "ppo" else dict(rewards=(f"{RULES}:rule",), kl_coef=0.0)
    flags |= dict(tokens_per_forward=int(tokens * share), sample_tokens=int(cache * share))
    flags |= dict(model=model, dataset=data, output_dir=out, overwrite=True, eval_fraction=0.0)
    script.main(script.Args(**flags))
    log = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    step = median(b["seconds"] - a["seconds"] for a, b in zip(log, log[1:]))
    return dict(seconds=step, sampling=median(seconds[1:]), tokens=median(counts[1:]), memory=log[-1]["peak_memory_mb"])


def online(args, data, folder: Path):
    work, size = args.amount, args.sizes[0]
    model, reward, out = (str(folder / name) for name in ("policy", "reward", "out"))
    run("model", size=size, out=model, tokenizer=data.tokenizer)
    run("model", size=size, out=reward, tokenizer=data.tokenizer, reward=True)
    common = dict(model=model, data=data.files["online"], out=out, num_generations=work["answers"])
    own = dict(
        batch_size=work["prompts"],
        max_new_tokens=work["new"],
        cache=work["cache"],
        tokens=work["tokens"],
        reward=reward,
    )
    sides = {"grpo.py": dict(name="online", method="grpo", share=1.0, **common, **own)}
    for name, setting in SETTINGS["grpo"].items() if args.trl_version else ():
        setting = (
            dict(max_completion_length=work["new"], temperature=1.0, beta=0.0, gradient_checkpointing=False) | setting
        )
        theirs = dict(
            method="grpo",
            setting=setting,
            batch=work["prompts"] * work["answers"],
            num_train_epochs=1,
        )
        sides[f"TRL's GRPO, {name}"] = dict(name="trl", share=1 / 8, **theirs, **common)
    print(f"\ngrpo.py and ppo.py, {size}", flush=True)
    found = in_turn(args.repeats, sides) | in_turn(
        args.repeats, {"ppo.py": dict(name="online", method="ppo", share=1.0, **common, **own)}
    )

    def cells(results):
        parts = [(r["sampling"], r["seconds"] - r["sampling"]) for r in results if "sampling" in r]
        split = [shown(list(x), 2) for x in zip(*parts)] or ["", ""]
        ratio = "" if results is found["ppo.py"] else times(results, found["grpo.py"])
        return [shown([r["seconds"] for r in results], 2), *split, rate(results), ratio, peak(results)]

    rate = lambda results: shown([r["tokens"] / r["seconds"] for r in results], 0)
    peak = lambda results: f"{max(r['memory'] for r in results) / 1024:.1f}"
    shape = f"{size}, {work['prompts']} prompts x {work['answers']} answers of at most {work['new']} tokens (random weights seldom stop before)"
    text = f"{shape}; steps after the first, medians of {args.repeats} runs, and the range. GRPO: one update a step, no KL; ppo.py: the default"
    text += f" 4, a reward model and a value model of the policy's size. --sample-tokens {work['cache']}. TRL samples with transformers; vLLM was"
    text += " not tried."
    head = "side | seconds a step | sampling | the rest | tokens sampled a second | times as fast is grpo.py | peak GB"
    publish(args, f"One GPU: GRPO and PPO, {size}", text, head, found, cells)

    for directory in (model, reward, out):
        shutil.rmtree(directory, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------- real


def call(script: str, out: Path, *more, **flags) -> dict:
    """A script as a user calls it; the last line of its metrics."""
    options = [str(x) for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)]
    command = [str(REPO / script), *more, "--output-dir", str(out), *options]
    print("python", *command, flush=True)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    file = out / "metrics.jsonl"
    return json.loads(file.read_text().splitlines()[-1]) if file.exists() else {}


def real(args, folder: Path):
    """Every stage on the command line: from nothing on the grid world, or from --model on the data sets given."""
    tiny, grid = args.sizes == ["tiny"], folder / "grid"
    call("gridworld.py", grid, "data", rows=200 if tiny else 20000)
    steps = dict(max_steps=2) if tiny else {}
    model, found = args.model, {}
    if not model:
        size = (
            dict(hidden_size=32, num_layers=2, num_heads=2)
            if tiny
            else dict(hidden_size=512, num_layers=8, num_heads=8)
        )
        flags = dict(dataset=grid / "pretrain.jsonl", learning_rate=1e-3, **size, **steps)
        found["sft.py --from-scratch"] = call("sft.py", folder / "base", "--from-scratch", **flags)
        model = folder / "base"
    pairs, prompts = args.pairs or grid / "rankings.jsonl", args.prompts or grid / "prompts.jsonl"
    flags = dict(
        model=model, dataset=args.conversations or grid / "sft.jsonl", learning_rate=1e-4 if args.model else 1e-3
    )
    found["sft.py"] = call("sft.py", folder / "sft", **flags, **steps)
    scored = dict(model=folder / "sft", dataset=pairs, **steps)
    found["reward_model.py"] = call("reward_model.py", folder / "reward_model", **scored, learning_rate=3e-5)
    found["dpo.py"] = call("dpo.py", folder / "dpo", **scored, learning_rate=3e-6)
    online = dict(model=folder / "sft", rewards=folder / "reward_model", dataset=prompts, learning_rate=3e-6)
    online |= dict(max_new_tokens=16 if tiny else 256, max_steps=2 if tiny else 100)
    found["ppo.py"] = call("ppo.py", folder / "ppo", **online, value_learning_rate=1e-5, batch_size=4 if tiny else 128)
    found["grpo.py"] = call("grpo.py", folder / "grpo", **online, batch_size=4 if tiny else 32)
    shown = ("eval_loss", "eval_accuracy", "eval_rewards/accuracies", "eval_objective/scores", "eval_reward")

    def cells(line):
        held_out = ", ".join(f"{name[5:]} {line[name]:.3f}" for name in shown if name in line)
        return [str(line["step"]), f"{line['seconds']:.0f}", f"{line['peak_memory_mb'] / 1024:.1f}", held_out]

    text = f"Model: {args.model or 'from nothing'}; data: {args.conversations or 'the grid world'}. Settings were not searched."
    found = {name: [line] for name, line in found.items()}
    head = "script | steps | seconds | peak GB | held out"
    publish(args, "One GPU: a chain of the scripts", text, head, found, lambda results: cells(results[0]))


def main():
    parts, methods = ("check", "train", "online", "real"), ("sft", "dpo", "reward_model")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=list(SIZES),
        default=["0.6B", "1.7B", "8B"],
        help="of train; online takes the first",
    )
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="of train")
    parser.add_argument("--repeats", type=int, default=0, help="runs of each side (default: 3; of tiny models 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="", help="of real: a checkpoint (default: from nothing, on the grid world)")
    parser.add_argument("--conversations", default="", help="of real: a data set that sft.py reads")
    parser.add_argument("--pairs", default="", help="of real: one that reward_model.py reads")
    parser.add_argument("--prompts", default="", help="of real: one that ppo.py reads")
    args = parser.parse_args()
    # one device: with several, TRL's trainers would run under DataParallel
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= dict(WANDB_MODE="disabled", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    tiny = args.sizes == ["tiny"]
    args.amount, args.repeats = TINY if tiny else WORK, args.repeats or (1 if tiny else 3)
    device = run("device", size=args.amount["matmul"])
    if "error" in device or args.device == "cuda" and device["name"] == "CPU":
        sys.exit(f"no GPU: {device.get('error', 'torch sees none')}; --device cpu --sizes tiny only tries this file")
    versions = device["versions"]
    args.rate, args.memory, args.trl_version = device["rate"], device["memory"], versions["trl"]
    attention = f"flash-attn {versions['flash_attn']}" if versions["flash_attn"] else "sdpa, without flash-attn"
    beside = f"TRL {args.trl_version} on {attention}" if args.trl_version else "without TRL, which is not installed"
    software = f"torch {versions['torch']}, transformers {versions['transformers']}; {beside}"
    args.machine = f"{datetime.date.today()}, {device['name']}; {software}."
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = make_data(folder, args.amount) if {*args.parts} - {"real"} else None
        good = check(args, data, folder) if "check" in args.parts else True
        if "train" in args.parts:
            train(args, data, folder)
        if "online" in args.parts:
            online(args, data, folder)
        if "real" in args.parts:
            real(args, folder)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print("\n" + json.dumps(globals()[f"side_{sys.argv[2]}"](**json.loads(sys.argv[3]))), flush=True)
    else:
        main()
