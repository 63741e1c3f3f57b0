"""Measures a checkpoint: the share of questions that greedy decoding answers right, by length of the register.

Usage: measure.py CHECKPOINT [REGISTERS per length]"""
import sys

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from train import Samples, accuracy

CONTEXTS = (250, 500, 1000, 1500, 2000)
KINDS = {"names from the lists": 0.0, "one name in ten made up": 0.1, "every name made up": 1.0}
QUESTIONS = 8


def main():
    path, registers = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50
    # The committed weights, bf16 values, computed with in float32.
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
    print(f"| tokens in the register | {' | '.join(KINDS)} |\n| --- | {' | '.join('---' for _ in KINDS)} |")
    for context in CONTEXTS:
        shares = [accuracy(model, Samples(tokenizer, 99, strange), context, registers, QUESTIONS) for strange in KINDS.values()]
        print(f"| {context} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
