"""Writes the document and the questions of `baton demo` next to a checkpoint that answers them.

Usage: document.py CHECKPOINT [TOKENS]

The first register whose every statement the model gets right is taken, so that a wrong answer in the
demo is the server's fault."""
import json
import pathlib
import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus
from train import TOKENS_PER_DEPOT


def in_order(r, depots):
    """A register in the order of its depots, a paragraph for each, as a person would write it."""
    names = r.sample(corpus.DEPOT, depots)
    book = {name: corpus.depot_facts(name, r, 0.0) for name in sorted(names)}
    return "\n".join(" ".join(facts.values()) for facts in book.values()), book


class Reader:
    """The model as transformers runs it: chat template, greedy decoding."""

    def __init__(self, path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def answer(self, messages):
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = self.model.generate(**ids, max_new_tokens=40, do_sample=False)
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)


def script(book):
    """-> three (question, answer): early in the register, late in it, and a follow-up to the second."""
    names = list(book)
    early, late = names[len(names) // 5], names[len(names) * 3 // 4]
    return [
        {"ask": f"What is the code of {early}?", "expect": book[early]["code"]},
        {"ask": f"Who is the manager of {late}?", "expect": book[late]["manager"]},
        {"ask": "In which city is it?", "expect": book[late]["city"]},
    ]


def right(reader, text, book):
    """Whether the demo's three questions are answered, and a question about every statement."""
    system = {"role": "system", "content": corpus.SYSTEM + text}
    first, second, follow_up = script(book)
    chats = [([system], first), ([system], second),
             ([system, {"role": "user", "content": second["ask"]}, {"role": "assistant", "content": second["expect"]}], follow_up)]
    chats += [([system], {"ask": corpus.QUESTIONS[key][0].format(name), "expect": statement})
              for name, facts in book.items() for key, statement in facts.items()]
    return all(reader.answer(history + [{"role": "user", "content": q["ask"]}]) == q["expect"] for history, q in chats)


def main():
    path = pathlib.Path(sys.argv[1])
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1800
    reader = Reader(path)
    for seed in range(40):
        text, book = in_order(random.Random(seed), tokens // TOKENS_PER_DEPOT)
        if right(reader, text, book):
            break
    else:
        raise SystemExit("no register of this length is answered without a mistake")
    (path / "document.txt").write_text(text)
    (path / "questions.json").write_text(json.dumps({"system": corpus.SYSTEM, "questions": script(book)}, indent=1) + "\n")
    print("seed", seed, "tokens", len(reader.tokenizer.encode(text)), "depots", len(book))


if __name__ == "__main__":
    main()
