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

    def ids(self, messages, **more):
        return self.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, **more)["input_ids"]

    def answer(self, messages):
        ids = self.ids(messages, add_generation_prompt=True)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        return self.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)

    @torch.no_grad()
    def mistakes(self, system, chats):
        """How many of the (question, answer) pairs it would get wrong, each in a conversation of its own.

        The system message is read once. A token that is the best after the right tokens before it is the one
        that greedy decoding takes, so one pass over question and answer tells."""
        prefix = self.ids([system])
        cache = self.model(prefix, use_cache=True).past_key_values
        wrong = 0
        for question, answer in chats:
            ask = {"role": "user", "content": question}
            begin = self.ids([system, ask], add_generation_prompt=True).shape[1]
            ids = self.ids([system, ask, {"role": "assistant", "content": answer}])[:, :-1]
            guess = self.model(ids[:, prefix.shape[1]:], past_key_values=cache).logits.argmax(-1)
            wrong += not torch.equal(guess[0, begin - prefix.shape[1] - 1:-1], ids[0, begin:])
            cache.crop(prefix.shape[1] - ids.shape[1])
        return wrong


def script(book):
    """-> three (question, answer): early in the register, late in it, and a follow-up to the second."""
    names = list(book)
    early, late = names[len(names) // 5], names[len(names) * 3 // 4]
    return [
        {"ask": f"What is the code of {early}?", "expect": book[early]["code"]},
        {"ask": f"Who is the manager of {late}?", "expect": book[late]["manager"]},
        {"ask": "In which city is it?", "expect": book[late]["city"]},
    ]


def flawless(reader, text, book):
    """Whether a question about every statement is answered, and the three of the demo are."""
    system = {"role": "system", "content": corpus.SYSTEM + text}
    wrong = reader.mistakes(system, [(corpus.QUESTIONS[key][0].format(name), statement)
                                     for name, facts in book.items() for key, statement in facts.items()])
    if wrong:
        print("a register with", wrong, "mistakes", flush=True)
        return False
    first, second, follow_up = script(book)
    turn = [{"role": "user", "content": second["ask"]}, {"role": "assistant", "content": second["expect"]}]
    return all(reader.answer([system, *history, {"role": "user", "content": q["ask"]}]) == q["expect"]
               for history, q in (([], first), ([], second), (turn, follow_up)))


def main():
    path = pathlib.Path(sys.argv[1])
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1800
    reader = Reader(path)
    for seed in range(40):
        text, book = in_order(random.Random(seed), tokens // TOKENS_PER_DEPOT)
        if flawless(reader, text, book):
            break
    else:
        raise SystemExit("no register of this length is answered without a mistake")
    (path / "document.txt").write_text(text)
    (path / "questions.json").write_text(json.dumps({"system": corpus.SYSTEM, "questions": script(book)}, indent=1) + "\n")
    print("seed", seed, "tokens", len(reader.tokenizer.encode(text)), "depots", len(book))


if __name__ == "__main__":
    main()
