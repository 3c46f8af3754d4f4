"""--tokens-per-forward bounds the peak of memory: four times the batch takes no more, a quarter of the tokens takes
less."""

import importlib
import json
import weakref

import pytest
import torch
from test_faults import SCRIPTS
from test_plumbing import jsonl
from test_storms import flags_of  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of all tensors made while it is on, and still there; and their peak."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.bytes += size
                    weakref.finalize(storage, self.gone, key, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def gone(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def peak_of(script: str, out, **flags) -> int:
    module = importlib.import_module(script)
    with Live() as live:
        module.main(module.Args(**flags, output_dir=str(out)))
    return live.peak


@pytest.mark.parametrize("script", SCRIPTS)
def test_tokens_per_forward_bounds_the_peak(script, flags_of, tmp_path):  # noqa: F811
    flags = flags_of(script) | dict(max_steps=1, eval_fraction=0.0, save_every=0, learning_rate=1e-5)
    if script in ("ppo", "grpo"):  # the same for the caches of sampling
        flags |= dict(sample_tokens=200)
    rows = [json.loads(line) for line in open(flags["dataset"])] * 4
    flags |= dict(dataset=jsonl(tmp_path / "many.jsonl", rows))
    peak = lambda b, t: peak_of(script, tmp_path / f"{b}-{t}", **flags | dict(batch_size=b, tokens_per_forward=t))
    usual, more_rows, more_tokens = peak(8, 200), peak(32, 200), peak(32, 800)
    assert more_rows < 1.5 * usual and more_tokens > 1.5 * more_rows
