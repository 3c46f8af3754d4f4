"""What the tests share: a quiet, offline, one-thread environment; tiny models; the scripts as a user runs them."""

import atexit
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Before anything imports torch or transformers, and inherited by every script that the tests run.
# for `datasets` and `transformers`; the user's cache is not touched
CACHE = os.environ.get("TESTS_CACHE") or tempfile.mkdtemp(prefix="tests-cache-")
if "TESTS_CACHE" not in os.environ:
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ |= dict(HF_HOME=CACHE, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ |= dict(WANDB_MODE="offline", WANDB_SILENT="true", MPLBACKEND="Agg")
os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
# Results repeat bit for bit on the CPU only. `CUDA_VISIBLE_DEVICES=0 pytest` uses a GPU all the same.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data and a real checkpoint that REAL_DATA names. Without one, the test is skipped."""
    folder = Path(os.environ.get("REAL_DATA") or "no such folder").resolve()
    if not folder.is_dir():
        pytest.skip("REAL_DATA names no folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def short_answers():
    """Evaluations print answers of a few tokens: 128 of them would take longer than the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sft", "dpo", "orpo", "rpo"):
            show_answers = importlib.import_module(name).show_answers.__wrapped__  # torch.no_grad wraps it
            patch.setattr(show_answers, "__defaults__", (3, 3))
        yield


def system(text) -> dict:
    return dict(role="system", content=text)


def user(text) -> dict:
    return dict(role="user", content=text)


def assistant(text, **more) -> dict:
    return dict(role="assistant", content=text, **more)


# ---- tiny models

SENTENCES = """The robot starts in the lower left corner and walks to the upper right. It may go up or right, one cell at a time.
What is the best path? Right, up, right, up: that is 4 and 3 and 5, and the sum is 12. No, I cannot help with that; the path is not safe.
Write a short letter to a friend. Dear Ann, thank you for the book! I read it in one evening, and I'd like to talk about it."""

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE. The chat template and plain `tokenizer(text)` both write the BOS token, as Llama 3's. Read only.

    Beside a Qwen2 model, AutoTokenizer loads any tokenizer as Qwen2's, which splits text in its own way and has
    <|endoftext|>. So this one does the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe, qwen2 = Tokenizer(models.BPE()), Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen2.normalizer, qwen2.pre_tokenizer, qwen2.decoder
    learn = dict(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(SENTENCES.splitlines(), trainers.BpeTrainer(**learn, show_progress=False))
    bos = ("<|bos|>", bpe.token_to_id("<|bos|>"))
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    roles = dict(pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>", unk_token="<|endoftext|>")
    roles |= dict(extra_special_tokens=special[4:])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles, model_max_length=512)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


FAMILIES = "llama qwen2 qwen3 gemma2 gemma3 mistral mixtral gpt2 phi3 deepseek_v2 glm4 nemotron qwen2_moe".split()


def tiny_config(family: str, tokenizer):
    """Two layers, width 32, 512 positions; sliding windows so short (9) that tests cross them."""
    import transformers as tf

    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    common = dict(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1, **special)
    width = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    width |= dict(num_attention_heads=4, num_key_value_heads=2)
    experts = dict(num_experts_per_tok=2, moe_intermediate_size=16)
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
    deepseek = dict(num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1)
    deepseek |= dict(n_routed_experts=4, n_shared_experts=1)
    shared_expert = dict(num_experts=4, shared_expert_intermediate_size=16)
    return {
        "llama": lambda: tf.LlamaConfig(**common, **width),
        "qwen2": lambda: tf.Qwen2Config(**common, **width),
        "qwen3": lambda: tf.Qwen3Config(**common, **width, head_dim=8),
        "gemma2": lambda: tf.Gemma2Config(**common, **width, head_dim=8, query_pre_attn_scalar=8, sliding_window=9),
        "gemma3": lambda: tf.Gemma3TextConfig(**common, **width, head_dim=8, query_pre_attn_scalar=8, sliding_window=9),
        "mistral": lambda: tf.MistralConfig(**common, **width, sliding_window=9),
        "mixtral": lambda: tf.MixtralConfig(**common, **width, num_local_experts=4),
        "gpt2": lambda: tf.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=512),
        "phi3": lambda: tf.Phi3Config(**common, **width),
        "deepseek_v2": lambda: tf.DeepseekV2Config(**common, **(width | experts | latent | deepseek)),
        "glm4": lambda: tf.Glm4Config(**common, **width, head_dim=8),
        "nemotron": lambda: tf.NemotronConfig(**common, **width),
        "qwen2_moe": lambda: tf.Qwen2MoeConfig(**common, **width, **experts, **shared_expert),
    }[family]()


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer, tmp_path_factory):
    """tiny_model_dir(family) -> directory of a random model of that family, with the tiny tokenizer. Read only."""
    made = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(tiny_config(family, tiny_tokenizer))
            folder = tmp_path_factory.mktemp("models") / family
            model.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            assert AutoTokenizer.from_pretrained(folder)(SENTENCES).input_ids == tiny_tokenizer(SENTENCES).input_ids
            made[family] = folder
        return made[family]

    return make


# ---- the scripts


def run(command, cwd, check, timeout, env):
    """Run a command to its end. Past the timeout, stop it and all that it started (torchrun needs SIGTERM for that)."""
    command, env = [str(word) for word in command], os.environ | (env or {})
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(timeout=20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        raise
    if check and process.returncode != 0:
        what = f"{' '.join(command)}\nexit code {process.returncode}"
        pytest.fail(f"{what}\n{out[-4000:]}\n{err[-8000:]}", pytrace=False)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def run_script():
    """run_script("sft", "--max-steps", 2, cwd=tmp_path) runs sft.py as a user would; flags are turned into strings.

    Returns the CompletedProcess (returncode, stdout, stderr). check: an exit code other than 0 fails the test; env adds
    variables."""

    def go(name, *flags, cwd, check=True, timeout=600, env=None):
        return run([sys.executable, REPO / f"{name}.py", *flags], cwd, check, timeout, env)

    return go


@pytest.fixture(scope="session")
def torchrun():
    """torchrun("sft", 2, "--max-steps", 2, cwd=tmp_path): the same under torchrun, with so many processes.

    launch: options of torchrun in place of --standalone."""

    def go(name, nproc, *flags, cwd, check=True, timeout=600, env=None, launch=("--standalone",)):
        launch = [sys.executable, "-m", "torch.distributed.run", *launch, "--nproc-per-node", nproc]
        return run([*launch, REPO / f"{name}.py", *flags], cwd, check, timeout, env)

    return go


# ---- ppo.py and grpo.py

QUESTIONS = ["What is the best path?", "Write a letter", "Is it safe? Say so.", "Sum: 4 3 5", "up"]
QUESTIONS += ["Where does the robot start? I'd like to talk about it."]
REPLIES = ["right", "Dear Ann, thank you", "No", "12", "Right, up, right", "I read it"]


@pytest.fixture(scope="session")
def talker(tiny_model_dir, tmp_path_factory) -> str:
    """A tiny policy that has learnt to give short answers and to end them, mostly. Read only."""
    from collections import Counter

    import torch
    from transformers import AutoModelForCausalLM

    import grpo

    device, args = torch.device("cpu"), grpo.Args(model="", dataset="", rewards=())
    source, out = str(tiny_model_dir("llama")), tmp_path_factory.mktemp("talker") / "talker"
    tokenizer = grpo.load_tokenizer(source)
    loaded = AutoModelForCausalLM, source, tokenizer, args, device, torch.float32, grpo.token_logps
    policy, rows = grpo.load_model(*loaded), []
    for question, reply in zip(QUESTIONS, REPLIES):
        prompt = [dict(role="user", content=question)]
        rows.append(grpo.Row(*grpo.encode(tokenizer, prompt, [reply], {}, Counter()), {}))
    inputs, target = grpo.pack(rows, device)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(25):
        (-policy.token_logps(**inputs, target=target)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    grpo.save_model(out, policy, tokenizer, torch.float32)
    return str(out)


def make_reward_model(folder, tokenizer, seed=1, vocab_size=None) -> str:
    """A random reward model, its head too."""
    import torch
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("llama", tokenizer)
    config.num_labels, config.score_shift, config.vocab_size = 1, 0.25, vocab_size or len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def scorer(tiny_tokenizer, tmp_path_factory) -> str:
    """A random reward model with the policy's tokenizer. Read only."""
    return make_reward_model(tmp_path_factory.mktemp("scorer") / "scorer", tiny_tokenizer)


@pytest.fixture
def gradients(monkeypatch):
    """gradients(script) -> the gradients before each step of an optimiser from now on, each name -> tensor."""

    def watch(script):
        found, real = [], script.take_step

        def record(model, *rest):
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return real(model, *rest)

        monkeypatch.setattr(script, "take_step", record)
        return found

    return watch


class Killed(BaseException):
    """As a kill would be: nothing catches it."""


def killed(monkeypatch, script, name: str, call: int, work):
    """Runs work, in which the call-th call of a script's function ends all."""
    real, calls = getattr(script, name), []

    def dying(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, name, dying)
        work()


def refusal(work, capsys) -> str:
    """What must refuse its input ends with exit code 2 and one sentence, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        work()
    err = capsys.readouterr().err
    said = [line[line.index("error: ") :] for line in err.replace("\r", "\n").splitlines() if "error: " in line]
    assert end.value.code == 2 and len(said) == 1 and "Traceback" not in err, err
    return said[0]


@pytest.fixture
def spy(monkeypatch):
    """spy(script, name) -> the calls of that function of a script from now on, each as (its arguments, its result)."""

    def watch(script, name):
        calls, real = [], getattr(script, name)

        def watched(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(script, name, watched)
        return calls

    return watch


def f64(*values):
    import torch

    return torch.tensor(values, dtype=torch.float64)


def near(actual, expected, tolerance=1e-6):
    """Equal to worked numbers, which have six decimals."""
    import torch

    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=True)
