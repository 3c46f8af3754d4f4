"""Whole runs of the scripts on a CUDA device that is not there: devices, dtypes and shapes are checked, values are not computed.

    python tests/fake_cuda.py     reads a line of JSON for each run from stdin: the arguments of `run`; prints what it returns

FakeTensorMode follows the device, dtype and shape of every tensor and refuses what CUDA would refuse. Its tensors say
`cuda`, so that the scripts take their CUDA branches: bfloat16, FSDP2, varlen_attn, fused AdamW. Needs a process of its
own and a C++ compiler: SHIM gives the CPU build of torch what autograd asks about a CUDA device. WORLD_SIZE=2 runs the
first of two ranks. It does not see: values, memory, speed, NCCL, and kernels that refuse what their fake versions
allow (`strict` repeats the rules of varlen_attn).

Two things are counted by the function of the script in which they happen: `waits`, in which the host reads a value
from the device, and `copies` to the device from memory that is not pinned, for which the host waits as well.
"""

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
import torch.nn.attention.varlen as varlen
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

REPO = Path(__file__).resolve().parent.parent
WORLD = int(os.environ.get("WORLD_SIZE", 1))
aten = torch.ops.aten
SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static Stream stream0() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return stream0(); }
  Stream getDefaultStream(Device) const override { return stream0(); }
  Stream exchangeStream(Stream) const noexcept override { return stream0(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at { struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
static auto* mine = new (const_cast<CUDAHooksInterface*>(&detail::getCUDAHooks())) CUDAHooks({}); }  // replaces the CPU build's
"""


def build_shim(folder: Path) -> Path:
    """Compiles SHIM. FAKE_CUDA_SHIM names one that is there already."""
    home, library = Path(torch.__file__).parent, folder / "shim.so"
    (folder / "shim.cpp").write_text(SHIM)
    links = ["-L", home / "lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
    command = ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", "-w", folder / "shim.cpp", "-I", home / "include"]
    subprocess.run([*command, *links, "-o", library], check=True)
    return library


# ------------------------------------------------------------------------------------------------------ fake tensors


class Mode(FakeTensorMode):
    """Any value that Python asks for is 1, or True. Counts where the host waits for the device."""

    avoid_device_init = True

    def __init__(self, scripts: Path):
        super().__init__(allow_non_fake_inputs=True)
        self.scripts, self.waits, self.copies, self.paused = str(scripts), Counter(), Counter(), False

    def note(self, counts: Counter):
        """Counts for the innermost function of a script that is being run."""
        frame = sys._getframe()
        while frame and (os.path.dirname(frame.f_code.co_filename) != self.scripts or frame.f_code.co_name[0] == "<"):
            frame = frame.f_back
        if not self.paused:
            counts[frame.f_code.co_name if frame else "elsewhere"] += 1

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].is_cuda:
                self.note(self.waits)
            return getattr(args[0], "known_value", one_of(args[0]))
        if func is aten.is_pinned.default:
            return getattr(args[0], "in_pinned_memory", False)
        if func is aten._pin_memory.default:
            with self:
                pinned = torch.empty_like(args[0])
            pinned.in_pinned_memory = True
            return pinned
        if func is aten.nonzero.default:  # as many as possible but one
            self.read(args[0])
            with self:
                size = (max(1, args[0].numel() - 1), args[0].dim())
                return torch.zeros(size, dtype=torch.long, device=args[0].device)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default):
            indices = [index for index in args[1] if index is not None]
            for index in indices:
                if args[0].is_cuda and not index.is_cuda:
                    self.note(self.copies)
                elif args[0].device != index.device:
                    raise RuntimeError(f"index on {index.device} into a tensor on {args[0].device}")
            if func is aten.index.Tensor and indices[0].dtype == torch.bool:
                self.read(indices[0])
                with self:
                    shape = (indices[0].numel(), *args[0].shape[indices[0].dim() :])
                    return torch.zeros(shape, dtype=args[0].dtype, device=args[0].device)
        if func is aten._to_copy.default:
            self.move(args[0], torch.device(kwargs.get("device") or args[0].device), kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            self.move(args[1], args[0].device, kwargs.get("non_blocking") or len(args) > 2 and args[2])
        return super().dispatch(func, types, args, kwargs)

    def read(self, tensor):
        if tensor.is_cuda:
            self.note(self.waits)

    def move(self, source, device, non_blocking):
        if source.is_cuda and device.type == "cpu":
            self.note(self.waits)
        elif (
            device.type == "cuda" and not source.is_cuda and not (non_blocking and hasattr(source, "in_pinned_memory"))
        ):
            self.note(self.copies)


def one_of(tensor):
    """The value that every element has for Python."""
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def tolist(tensor):
    if isinstance(tensor, FakeTensor) and tensor.is_cuda:
        MODE[0].note(MODE[0].waits)
    nested = lambda shape: [nested(shape[1:]) for _ in range(shape[0])] if shape else one_of(tensor)
    return nested(list(tensor.shape))


MODE = []  # the mode of the run


def to_fake(module, device, **_):
    """Module.to for a device that is not there; tied weights stay tied."""
    seen = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in store.items():
                if value is None or isinstance(value, FakeTensor) and value.device.type == torch.device(device).type:
                    continue
                if isinstance(value, torch.distributed.tensor.DTensor):
                    continue
                if id(value) not in seen:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                    is_parameter = isinstance(value, torch.nn.Parameter)
                    seen[id(value)] = torch.nn.Parameter(fake, value.requires_grad) if is_parameter else fake
                store[name] = seen[id(value)]
    return module


MODULE_TO = torch.nn.Module.to


def module_to(module, device=None, *args, **kwargs):
    if not isinstance(torch.empty(0), FakeTensor):  # outside of the fake mode
        return MODULE_TO(module, device, *args, **kwargs)
    if (
        torch.device(device).type == "cuda"
        and dist.is_initialized()
        and isinstance(module, transformers.PreTrainedModel)
    ):
        raise RuntimeError("a whole model is moved to the device before it is sharded")
    return to_fake(module, device)


def strict(varlen_attn):
    """varlen_attn with the rules of its kernel (mha_varlen_fwd in torch's flash_api.cpp), which its fake version lacks."""

    def call(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        assert q.dtype == k.dtype == v.dtype in (torch.bfloat16, torch.float16), f"dtypes {q.dtype} {k.dtype} {v.dtype}"
        assert cu_q.dtype == cu_k.dtype == torch.int32, f"lengths are {cu_q.dtype}, not int32"
        assert len(cu_q) == len(cu_k) and cu_q.is_contiguous() and cu_k.is_contiguous()
        assert {x.device.type for x in (q, k, v, cu_q, cu_k)} == {"cuda"}, "a tensor is on the CPU"
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[1] % k.shape[1] == 0
        assert isinstance(max_q, int) and isinstance(max_k, int)
        FLASH_CALLS.append(q.shape)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)

    call.__signature__ = inspect.signature(varlen_attn)
    return call


FLASH_CALLS = []


class Nothing:
    """A stream or an event."""

    device, stream_id, device_index, device_type = torch.device("cuda", 0), 0, 0, 1

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def real(function):
    """The function, outside of the fake mode."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def on_device(function):
    """A collective that refuses tensors of the CPU, as NCCL does."""

    def call(values, *args, **kwargs):
        for tensor in values if isinstance(values, list) else [values]:
            if not tensor.is_cuda:
                raise RuntimeError(f"{function.__name__} of a tensor on the {tensor.device}, which NCCL refuses")
        return function(values, *args, **kwargs)

    return call


def zeros_like(value, faults: list):
    """What is saved, with zeros for its tensors; a tensor that is not on the CPU is a fault."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            faults.append(f"saved from {value.device}")
        with unset_fake_temporarily():
            return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {k: zeros_like(v, faults) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(zeros_like(v, faults) for v in value)
    return value


@contextlib.contextmanager
def fake_cuda(scripts: Path, faults: list):
    """From here on there is one CUDA device, whose tensors have no values, and WORLD ranks, of which this is the first."""
    begin, shard, meshes = dist.init_process_group, fsdp.fully_shard, []
    repeat, tensor, save, load = torch.Tensor.repeat_interleave, torch.tensor, torch.save, torch.load
    grouped_mm = torch.nn.functional.grouped_mm
    torch.utils._device._device_constructors()  # cached, for `with torch.device(...)`: the functions before the patches

    def init_process_group(*args, **kwargs):
        with unset_fake_temporarily():
            begin("fake", store=FakeStore(), rank=0, world_size=WORLD)
            meshes[:] = [init_device_mesh("cuda", (WORLD,))]

    def fully_shard(module, **options):
        return shard(to_fake(module, "cuda"), mesh=meshes[0], **options)

    def known_tensor(data, *args, **kwargs):
        """A tensor of one number keeps it, since it may be the number of forwards; a list its sum, for repeat_interleave."""
        made = tensor(data, *args, **kwargs)
        if isinstance(made, FakeTensor) and type(data) is int:
            made.known_value = data
        if isinstance(made, FakeTensor) and isinstance(data, list) and all(type(x) is int for x in data):
            made.known_sum = sum(data)
        return made

    def repeat_interleave(self, repeats, *args, **kwargs):
        if isinstance(repeats, FakeTensor) and "output_size" not in kwargs:
            MODE[0].read(repeats)
            kwargs["output_size"] = repeats.known_sum
        return repeat(self, repeats, *args, **kwargs)

    def save_pretrained(model, directory, state_dict=None, **kwargs):
        faults.extend(f"{name} is saved from {w.device}" for name, w in state_dict.items() if w.device.type != "cpu")
        with unset_fake_temporarily():
            directory.mkdir(parents=True, exist_ok=True)
            model.config.save_pretrained(directory)
            raw = json.loads((directory / "config.json").read_text())
            raw["architectures"] = [type(model).__name__.replace("FSDP", "")]
            (directory / "config.json").write_text(json.dumps(raw))
            weights = zeros_like(state_dict, faults)
            safetensors.torch.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    def gather(parts, value):
        parts[:] = [value] + [[] for _ in parts[1:]]

    def mm(a, b, offs=None, **kwargs):
        assert offs.dtype == torch.int32 and a.dtype == b.dtype and offs.device == a.device == b.device
        return grouped_mm(a, b, offs=offs, **kwargs) if a.dtype == torch.bfloat16 else torch.bmm(a[None], b[:1])[0]

    nothing, zero = (lambda *args, **kwargs: None), (lambda *args: 0)
    device = dict(is_available=lambda: True, is_initialized=lambda: False, device_count=lambda: 1, set_device=nothing)
    device |= dict(current_device=zero, current_stream=lambda *args: Nothing(), max_memory_allocated=zero)
    device |= dict(stream=lambda s: contextlib.nullcontext(), Stream=Nothing, Event=Nothing, synchronize=nothing)
    device |= dict(is_bf16_supported=lambda *args, **kwargs: True, empty_cache=nothing, set_rng_state=nothing)
    device |= dict(get_device_capability=lambda *args: (9, 0), get_rng_state=lambda *args: torch.zeros(16).byte())
    ranks = dict(init_process_group=init_process_group, barrier=nothing, all_gather_object=gather)
    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"):
        ranks[name] = on_device(getattr(dist, name))
    files = dict(save=lambda x, f: real(save)(zeros_like(x, faults), f))
    files |= dict(Generator=lambda device="cpu", new=torch.Generator: new())
    files |= dict(load=lambda f, **options: real(load)(f, **options | dict(mmap=False)), tensor=known_tensor)
    unfinished = lambda self, finished, *args, **kwargs: not finished
    with contextlib.ExitStack() as stack:
        for target, changes in (
            (torch.cuda, device),
            (dist, ranks),
            (fsdp, dict(fully_shard=fully_shard)),
            (varlen, dict(varlen_attn=strict(varlen.varlen_attn))),
            (torch.nn.Module, dict(to=module_to)),
            (torch, files),
            (torch.Tensor, dict(repeat_interleave=repeat_interleave)),
            (torch.nn.functional, dict(grouped_mm=mm)),
            (
                torch._subclasses.fake_tensor,
                dict(init_gpu_context=nothing),
            ),  # torch 2.11 would make a real tensor first
            (transformers.PreTrainedModel, dict(save_pretrained=save_pretrained)),
            (transformers.GenerationMixin, dict(_has_unfinished_sequences=unfinished)),
        ):
            stack.enter_context(mock.patch.multiple(target, **changes))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", tolist, create=True))
        plain = lambda self, spec: format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)
        stack.enter_context(mock.patch.object(FakeTensor, "__format__", plain, create=True))
        MODE[:] = [Mode(scripts)]
        try:
            yield stack.enter_context(MODE[0])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ scripts


def load_script(name: str, edits: list, folder: Path):
    """The script as a module, after its text has been edited: a list of [text, what replaces it]."""
    text = (REPO / f"{name}.py").read_text()
    for old, new in edits:
        assert text.count(old) >= 1, f"{name}.py does not have {old!r}"
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NeverStop:
    """In place of a script's STOP: a fake value, which Python reads as 1, would be a signal."""

    signal = 0
    agreed = property(lambda self: False, lambda self, value: None)


def adapt(script, mode: Mode, found: dict, stop_after: int):
    """Replaces what asks for values: these parts of the script see real tensors, or are told what they would find."""
    read, prepare, sample = (getattr(script, name, None) for name in ("read_model", "prepare_model", "sample"))
    log = getattr(script, "log_metrics", None)

    def prepare_model(model, name, args, device, *rest, **options):
        mode.paused = True
        model = prepare(to_fake(model, "cpu"), name, args, device, *rest, **options)
        mode.paused = False
        is_frozen = not any(p.requires_grad for p in model.parameters())
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        found["models"].append(dict(packs=model.packs, is_frozen=is_frozen, dtypes=dtypes))
        wrong = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if p.device.type != "cuda"]
        found["faults"] += [f"{name} is not on the device" for name in wrong]
        return model

    def sampled(model, prompts, numbers, stops, *args, **options):
        """Answers of several lengths in place of the values that the fake tensors lack."""
        if not isinstance(numbers, FakeTensor):
            return sample(model, prompts, numbers, stops, *args, **options)
        if not numbers.is_cuda:
            found["faults"].append("the sampler's numbers are on the CPU")
        sample(model, prompts, numbers, stops, *args, **options)
        found["tokens"] += numbers.shape[1]
        longest = numbers.shape[1]
        answers = [[20 + (i + j) % 200 for j in range(min(longest, 2 + i % 4) - 1)] for i in range(len(numbers))]
        answers = [ids + [stops[0] if i % 3 else 30] for i, ids in enumerate(answers)]
        return answers, [[-1.0] * len(ids) for ids in answers]

    def log_metrics(args, out, metrics, bar):
        step = dict(waits=dict(mode.waits), copies=dict(mode.copies), tokens=found["tokens"])
        found["steps"].append(step)
        mode.waits.clear()
        mode.copies.clear()
        found["tokens"] = 0
        log(args, out, metrics, bar)
        if len(found["steps"]) == stop_after:
            sys.exit(0)

    replaced = dict(prepare_model=prepare_model, log_metrics=log_metrics)
    replaced |= dict(read_model=real(read), fingerprint=real(script.fingerprint), check_first_step=lambda *a, **k: None)
    if sample:
        replaced |= dict(sample=sampled, check_sampler=real(script.check_sampler))
    if hasattr(script, "show_answers"):
        replaced["show_answers"] = functools.partial(script.show_answers, max_new_tokens=3)
    if hasattr(script, "STOP"):
        replaced["STOP"] = NeverStop()
    for name, value in replaced.items():
        if hasattr(script, name):
            setattr(script, name, value)


def run(script: str, options: dict, args: str = "Args", edits: list = (), stop_after: int = 0) -> dict:
    """What a run does: its error (empty: none), models, waits and copies by step, faults in what it saved.

    args: the class of its options; edits: of its text; stop_after: steps after which it ends as if it were killed."""
    found = dict(error="", models=[], steps=[], faults=[], tokens=0, flash=0)
    FLASH_CALLS.clear()
    with tempfile.TemporaryDirectory() as folder:
        with fake_cuda(Path(folder), found["faults"]) as mode:
            try:
                with unset_fake_temporarily():
                    module = load_script(script, edits, Path(folder))
                adapt(module, mode, found, stop_after)
                module.main(getattr(module, args)(**options))
            except SystemExit as end:
                found["error"] = f"exit code {end.code}" if end.code else ""
            except BaseException:
                found["error"] = traceback.format_exc()
    last = dict(waits=dict(mode.waits), copies=dict(mode.copies), tokens=found.pop("tokens"))
    return found | dict(after=last, flash=len(FLASH_CALLS))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        ctypes.CDLL(os.environ.get("FAKE_CUDA_SHIM") or str(build_shim(Path(folder))))
    torch.autograd.set_multithreading_enabled(False)
    for line in sys.stdin:
        print("\nRESULT " + json.dumps(run(**json.loads(line))), flush=True)
