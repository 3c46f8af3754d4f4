"""Averages the weights of checkpoints of one model, as Llama 3 does (arXiv 2407.21783, section 4.1.5).

python recipes/average.py OUT DIR DIR ...

OUT is a Hugging Face directory with the configuration, the tokenizer and the dtype of the first DIR.
The mean is taken in float64: the average of equal checkpoints is that checkpoint, bit for bit.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def average_weights(out: str, names: list):
    model = AutoModelForCausalLM.from_pretrained(names[0], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(names[0])
    total = {key: weight.double() for key, weight in model.state_dict().items()}
    for name in names[1:]:
        if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
            sys.exit(f"{name}: its tokenizer differs from that of {names[0]}; average checkpoints of one model")
        weights = AutoModelForCausalLM.from_pretrained(name, dtype="auto").state_dict()
        if {key: w.shape for key, w in weights.items()} != {key: w.shape for key, w in total.items()}:
            sys.exit(f"{name}: its weights differ in name or shape from those of {names[0]}")
        for key, weight in weights.items():
            total[key] += weight.double()
    with torch.no_grad():
        for key, weight in model.state_dict().items():
            weight.copy_(total[key] / len(names))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"done: {out} is the average of {', '.join(names)}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python recipes/average.py OUT DIR DIR ...   (at least two checkpoints)")
    average_weights(sys.argv[1], sys.argv[2:])
