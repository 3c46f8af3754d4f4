"""How near every training script comes to the machine's limit, its rate of matrix multiplications, and where the rest of the time goes.

    python benchmarks/limit.py                                                    on HH-RLHF and GSM8K from the hub, some minutes on one core
    python benchmarks/limit.py --pairs hh.jsonl --questions gsm8k.jsonl           from files

The work is that of beside_trl.py. FLOPs are counted operator by operator while a script runs, as what its steps do and no start-up; seconds are
those of its own log, in a run apart; where the time goes, by the profiler in a third. Sampling is measured beside its own floor, the
multiplications of its forwards at the limit; the rate that [64, 256] x [256, 768] reaches is given beside it.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from beside_trl import machine, make_work, ours, write_results

METHODS = ("sft", "reward_model", "dpo", "orpo", "rpo", "grpo", "ppo")
KINDS = {  # what an operator's name begins with, by kind; the first that fits counts
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::baddbmm", "mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "optimiser": ("aten::_fused_adam", "aten::_foreach", "aten::linalg_vector_norm", "Optimizer"),
    "vocabulary": (
        "aten::_log_softmax",
        "aten::logsumexp",
        "aten::amax",
        "aten::special_entr",
        "aten::gather",
        "aten::cumsum",
        "aten::searchsorted",
    ),
    "copies": (
        "aten::copy_",
        "aten::cat",
        "aten::index",
        "aten::clone",
        "aten::stack",
        "aten::embedding",
        "aten::contiguous",
        "aten::repeat",
    ),
}


def side(mode: str, method: str, model: str, data: str, out: str, steps: str):
    """One run of a script in this process: prints what the mode is to find."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    forward, backward = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward")
    )  # not known to it
    known = {
        forward: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v),
    }
    torch.set_num_threads(1)
    script, counter, sampling = (
        importlib.import_module(method),
        FlopCounterMode(display=False, custom_mapping=known),
        Counter(),
    )
    options = dataclass_with(script, max_steps=int(steps))
    if hasattr(script, "sample_answers"):
        real = script.sample_answers

        def watched(*args, **kwargs):
            clock, before = time.perf_counter(), counter.get_total_flops() if mode == "flops" else 0
            result = real(*args, **kwargs)
            sampling.update(
                seconds=time.perf_counter() - clock, flops=counter.get_total_flops() - before if mode == "flops" else 0
            )
            return result

        script.sample_answers = watched
    work = ours(method, model, data, out)
    next(work)
    script.Args = options
    found = {}
    if mode == "flops":
        with counter:
            next(work, None)
        found = dict(flops=counter.get_total_flops())
    elif mode == "profile":
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            clock = time.perf_counter()
            next(work, None)
            wall, spent = time.perf_counter() - clock, Counter()
        for event in profiler.key_averages():
            kind = next(
                (kind for kind, names in KINDS.items() if event.key.startswith(names)),
                "elementwise" if event.key.startswith("aten::") else "",
            )
            spent[kind] += event.self_cpu_time_total / 1e6
        found = dict(wall=wall, spent=spent)
    else:
        next(work, None)
        lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
        found = dict(seconds=(lines[-1]["seconds"] - lines[0]["seconds"]) / (len(lines) - 1))
    print(json.dumps(found | dict(sampling=sampling)))


def dataclass_with(script, **fixed):
    """The script's Args with some options fixed, whatever `ours` gives."""
    real = script.Args
    return lambda **flags: real(**flags | fixed)


def rate(n: int, k: int, m: int) -> float:
    """GFLOP/s of [n, k] x [k, m] in float32 on one core: the best of several."""
    import torch

    torch.set_num_threads(1)
    a, b, best = torch.randn(n, k), torch.randn(k, m), 0.0
    repeats = max(3, round(2e9 / (n * k * m)))
    for _ in range(5):
        clock = time.perf_counter()
        for _ in range(repeats):
            a @ b
        best = max(best, 2 * n * k * m * repeats / (time.perf_counter() - clock) / 1e9)
    return best


def run(*arguments) -> dict:
    done = subprocess.run([sys.executable, __file__, "--side", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=8, help="of 16 rows; for grpo and ppo half as many, of 64 answers")
    parser.add_argument("--pairs", default="Anthropic/hh-rlhf", help="preference data: hub id or file")
    parser.add_argument("--questions", default="openai/gsm8k:main", help="prompts: hub id or file")
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("--steps must be at least 4")
    limit, shaped, decoding, rows, sampled = rate(1024, 1024, 1024), rate(2048, 256, 768), rate(64, 256, 768), [], []
    print(
        f"matrices: {limit:.0f} GFLOP/s; [2048, 256] x [256, 768] {shaped:.0f}; [64, 256] x [256, 768] {decoding:.0f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        files = make_work(Path(folder), args.pairs, args.questions, args.steps)
        for method in args.methods:
            steps = max(2, args.steps // 2) if method in ("grpo", "ppo") else args.steps
            go = lambda mode, n: run(mode, method, f"{folder}/model", files[method], f"{folder}/{method}-{mode}-{n}", n)
            timed, few, many, profiled = go("time", steps), go("flops", 1), go("flops", steps), go("profile", steps)
            flops = (many["flops"] - few["flops"]) / (steps - 1) / 1e9
            share = {kind: profiled["spent"].get(kind, 0) / profiled["wall"] for kind in (*KINDS, "elementwise")}
            share["Python, files"] = 1 - sum(share.values())
            speed = flops / timed["seconds"]
            cells = [f"{method}.py", f"{timed['seconds']:.2f}", f"{flops:.0f}", f"{speed:.0f}", f"{speed / limit:.2f}"]
            rows.append(f"| {' | '.join([*cells, *(f'{part:.0%}' for part in share.values())])} |")
            print(rows[-1], flush=True)
            if timed["sampling"]:
                seconds, count = timed["sampling"]["seconds"] / steps, many["sampling"]["flops"] / steps / 1e9
                sampled.append(f"| {method}.py | {seconds:.2f} | {count / limit:.2f} | {count / limit / seconds:.2f} |")
                print(sampled[-1], flush=True)
    heads = [
        "script",
        "seconds a step",
        "GFLOP a step",
        "GFLOP/s",
        "share of the limit",
        *KINDS,
        "elementwise",
        "Python, files",
    ]
    table = f"| {' | '.join(heads)} |\n" + "| --- " * len(heads) + "|\n" + "\n".join(rows)
    floor = "| sampling of | seconds a step | its floor | share |\n| --- | --- | --- | --- |\n" + "\n".join(sampled)
    rates = f"Matrices of 1024 x 1024: {limit:.0f} GFLOP/s, the limit; [2048, 256] x [256, 768]: {shaped:.0f}; [64, 256] x [256, 768]: {decoding:.0f}."
    notes = "The last columns are shares of the time of a whole run under the profiler, start-up included."
    write_results("Beside the limit", f"{machine()}\n\n{rates}\n{notes}\n\n{table}\n\n{floor}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        main()
