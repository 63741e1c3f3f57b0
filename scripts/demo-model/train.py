"""Trains the demo model: a small Qwen3-architecture checkpoint that answers questions about a register.

Made for leftover CPU time, so what counts is how few tokens it takes until the model looks values up:
- Training begins with recitation, a register followed by its own statements in another order. It asks for
  a value every 8 tokens, a chat for one every 29; from chats alone no look-up formed in 5 million tokens.
- Registers have one to four attributes: those with one have the most names to tell apart.
- Sequences are short at first and grow once the loss is low, and with them the number of depots.
- Attention starts out as induction heads (see `mimetic`), and matrices are trained with Muon. From a plain
  start the model copied values of the right kind within a million tokens, but told no two names apart in 7.
- Only what can be known carries loss, and logits are computed for that alone.
The checkpoint in OUT is replaced as training goes on, so that it can be used before the end."""
import argparse
import json
import os
import random
import time

# The threads share their cores with other jobs: one that spins at a barrier keeps the other from reaching it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

import corpus

TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# How Qwen2 and Qwen3 split text; every digit is a token of its own.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (tokens per sequence, share of recitations); the next stage begins when the mean loss falls below MASTERED.
# After the last one, batches come from all stages from the one numbered POLISH on.
STAGES = [(128, 1.0), (192, 0.5), (256, 0.5), (384, 0.5), (512, 0.4), (768, 0.4), (1024, 0.3), (1536, 0.3), (2304, 0.2)]
MASTERED, POLISH = 0.1, 3
TOKENS_PER_FACT = 9
TOKENS_PER_DEPOT = 35
MOST_DEPOTS = 90
# How attention starts out, see `mimetic`: the rotary frequencies that tell neighbours apart and those that
# stay put over a whole document, and how much the heads write.
NEAR, FAR, GATHER, COPY = 6, 2e-3, 0.5, 0.3


def make_tokenizer(vocab):
    """A byte-level BPE in which the words of the corpus are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    r = random.Random(1)

    def texts():
        for _ in range(8000):
            text, book = corpus.register(r, 6, 0.02)
            talk = corpus.turns(r, book)
            yield corpus.SYSTEM + text + "".join("\n".join(next(talk)) for _ in range(4)) + "\nsystem\nuser\nassistant\n"

    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    return tokenizer


class Samples:
    """Draws conversations as token ids, each with the mask of the tokens that belong to answers."""

    def __init__(self, tokenizer, seed, strange):
        self.tokenizer = tokenizer
        self.r = random.Random(seed)
        self.strange = strange

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def register(self, tokens):
        """A register of about so many tokens, with some of the attributes."""
        keys = self.r.sample(list(corpus.QUESTIONS), self.r.randint(1, 4))
        depots = int(tokens / TOKENS_PER_FACT / len(keys))
        return corpus.register(self.r, min(max(1, depots), MOST_DEPOTS), self.strange, keys)

    def system(self, text):
        return self.encode(corpus.chatml("system", corpus.SYSTEM + text))

    def turn(self, talk):
        """-> (ids up to the answer, ids of the answer and of the line break after it)"""
        question, answer = next(talk)
        ask = self.encode(corpus.chatml("user", question) + "<|im_start|>assistant\n")
        return ask, self.encode(answer + "<|im_end|>\n")

    def conversation(self, length):
        """Exactly `length` tokens: a register, then turns, the last one cut off."""
        text, book = self.register(length * self.r.uniform(0.25, 0.8))
        ids = self.system(text)
        mask = [False] * len(ids)
        talk = corpus.turns(self.r, book)
        while len(ids) < length:
            ask, answer = self.turn(talk)
            ids += ask + answer
            mask += [False] * len(ask) + [True] * (len(answer) - 1) + [False]
        return ids[:length], mask[:length]

    def recitation(self, length):
        """Exactly `length` tokens: a register, then its statements in another order, of which the values are masked."""
        text, book = self.register(length * self.r.uniform(0.2, 0.6))
        ids = self.encode(text + "\n")
        mask = [False] * len(ids)
        statements = [s for facts in book.values() for s in facts.values()]
        while len(ids) < length:
            self.r.shuffle(statements)
            for statement in statements:
                subject, value = statement.split(" is ")
                known, asked = self.encode(subject + " is"), self.encode(f" {value} ")
                ids += known + asked
                mask += [False] * len(known) + [True] * (len(asked) - 1) + [False]
        return ids[:length], mask[:length]

    def batch(self, rows, length, recited):
        drawn = [self.recitation(length + 1) if self.r.random() < recited else self.conversation(length + 1) for _ in range(rows)]
        return torch.tensor([ids for ids, _ in drawn]), torch.tensor([mask for _, mask in drawn])


@torch.no_grad()
def accuracy(model, samples, context, registers, turns=6):
    """The share of answers that greedy decoding gets right, every token of them, for registers of `context` tokens.

    An answer is right token by token given the right tokens before it exactly when greedy decoding yields it."""
    model.eval()
    right = total = 0
    for _ in range(registers):
        text, book = corpus.register(samples.r, context // TOKENS_PER_DEPOT, samples.strange)
        ids = samples.system(text)
        talk, spans = corpus.turns(samples.r, book), []
        for _ in range(turns):
            ask, answer = samples.turn(talk)
            ids += ask
            spans.append((len(ids), len(ids) + len(answer) - 1))
            ids += answer
        x = torch.tensor([ids])
        guess = model(x[:, :-1]).logits[0].argmax(-1)
        for begin, end in spans:
            right += bool((guess[begin - 1:end - 1] == x[0, begin:end]).all())
            total += 1
    model.train()
    return right / total


@torch.no_grad()
def mimetic(model):
    """Starts attention as induction heads, in the spirit of Trockman and Kolter's mimetic initialisation (2023).

    A head of the first layer reads the token `offset` places back: embeddings share a component, and on it
    queries agree with keys that are rotated by so many places. It writes what it read, turned `offset` times.
    In later layers the query is the key turned once more, so that a token attends to the successor of a place
    with the same last few words, and what a head writes is what it read: a copy."""
    config = model.config
    hidden, dim = config.hidden_size, config.head_dim
    per_kv = config.num_attention_heads // config.num_key_value_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(dim // 2) / (dim // 2))
    near, far = (torch.arange(dim // 2) < NEAR).float().repeat(2), (frequency < FAR).repeat(2)
    shared = torch.randn(hidden).sign()
    content = torch.eye(hidden) - torch.outer(shared, shared) / hidden
    turn = content @ torch.linalg.qr(torch.randn(hidden, hidden)).Q @ content
    model.model.embed_tokens.weight.normal_(0, 0.1).add_(0.1 * shared)

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight *= 0.35
        attention = layer.self_attn
        q, k, v, o = (p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj))
        v.copy_(torch.randn_like(v) @ content / hidden ** 0.5)
        k.copy_(torch.randn_like(k) @ content / hidden ** 0.5)
        for head in range(config.num_attention_heads):
            own = slice(head * dim, (head + 1) * dim)
            kv = slice(head // per_kv * dim, (head // per_kv + 1) * dim)
            if i == 0:
                offset = head + 1
                # Rotary embedding turns the key by its distance against the query; so does this.
                angle = offset * frequency
                query = torch.cat([angle.cos() + angle.sin(), angle.cos() - angle.sin()]) * near
                k[kv] = torch.outer(near, shared) / hidden + 0.02 * torch.randn(dim, hidden)
                q[own] = torch.outer(query, shared) / hidden + 0.02 * torch.randn(dim, hidden)
                o[:, own] = GATHER * torch.linalg.matrix_power(turn, offset) @ v[kv].T
            else:
                q[own] = k[kv] @ turn
                o[:, own] = COPY * v[kv].T
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.copy_(torch.where(far, 1.6, 0.5) if i else torch.full((dim,), 1.5))


class Muon:
    """Momentum whose update is orthogonalised (Newton-Schulz), batched over matrices of one shape."""

    def __init__(self, matrices, momentum=0.95, decay=0.02):
        self.groups = {}
        for p in matrices:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.buffers = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()}
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, lr):
        for shape, ps in self.groups.items():
            grad = torch.stack([p.grad for p in ps])
            buffer = self.buffers[shape]
            buffer.lerp_(grad, 1 - self.momentum)
            update = self.orthogonal(grad.lerp(buffer, self.momentum))
            scale = lr * max(1, shape[0] / shape[1]) ** 0.5
            for p, u in zip(ps, update):
                p.mul_(1 - lr * self.decay).sub_(u, alpha=scale)

    @staticmethod
    def orthogonal(m):
        tall = m.size(-2) > m.size(-1)
        x = m.mT if tall else m
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT if tall else x


def write(path, data):
    """Whole or not at all: others read the checkpoint while training replaces it."""
    with open(path + ".part", "wb") as f:
        f.write(data)
    os.replace(path + ".part", path)


def save(model, tokenizer, out):
    os.makedirs(out, exist_ok=True)
    weights = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    weights.load_state_dict(model.state_dict())
    weights.generation_config.update(do_sample=False, eos_token_id=[tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
                                     pad_token_id=tokenizer.token_to_id("<|endoftext|>"))
    stage = os.path.join(out, ".stage")
    weights.save_pretrained(stage)
    for name in os.listdir(stage):
        os.replace(os.path.join(stage, name), os.path.join(out, name))
    os.rmdir(stage)
    write(os.path.join(out, "tokenizer.json"), tokenizer.to_str(pretty=False).encode())
    write(os.path.join(out, "tokenizer_config.json"), json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "add_bos_token": False, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    }, indent=1).encode())


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--minutes", type=float, default=45, help="wall time for the whole schedule")
    ap.add_argument("--resume", help="a checkpoint of this script to start from")
    ap.add_argument("--stage", type=int, default=0, help="the stage to start at, counted from 0")
    ap.add_argument("--tokenizer", help="a tokenizer.json to use instead of making one")
    ap.add_argument("--hidden", type=int, default=128)
    ap.add_argument("--layers", type=int, default=4)
    ap.add_argument("--ffn", type=int, default=256)
    ap.add_argument("--vocab", type=int, default=2048)
    ap.add_argument("--batch-tokens", type=int, default=2304)
    ap.add_argument("--lr", type=float, default=0.02, help="of the matrices; embeddings and norms take a sixth of it")
    ap.add_argument("--strange", type=float, default=0.1, help="share of made-up names")
    ap.add_argument("--seed", type=int, default=7)
    a = ap.parse_args()
    torch.manual_seed(a.seed)

    tokenizer = Tokenizer.from_file(a.tokenizer) if a.tokenizer else make_tokenizer(a.vocab)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    if a.resume:
        model = Qwen3ForCausalLM.from_pretrained(a.resume, dtype=torch.float32)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=a.hidden, intermediate_size=a.ffn, num_hidden_layers=a.layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=None, eos_token_id=end, pad_token_id=pad))
        mimetic(model)
    print("vocabulary", tokenizer.get_vocab_size(), "parameters", sum(p.numel() for p in model.parameters()), flush=True)

    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    samples = Samples(tokenizer, a.seed, a.strange)
    start, step, seen, done, stage, mean = time.time(), 0, 0, 0.0, a.stage, 1.0
    while done < 1:
        length, recited = STAGES[stage] if stage < len(STAGES) else samples.r.choice(STAGES[POLISH:])
        x, mask = samples.batch(max(2, a.batch_tokens // length), length, recited)
        hidden = model.model(x[:, :-1]).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[mask[:, 1:]]), x[:, 1:][mask[:, 1:]])
        loss.backward()
        lr = a.lr * min(1, (step + 1) / 30, (1 - done) / 0.6)
        muon.step(lr)
        for group in adam.param_groups:
            group["lr"] = lr / 6
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        seen += x.numel()
        done = (time.time() - start) / (60 * a.minutes)
        mean += 0.03 * (loss.item() - mean)
        if step % 50 == 0:
            print(f"{time.time() - start:6.0f}s step {step} {done:.3f} length {length} tokens {seen / 1e6:.2f}M loss {mean:.4f}", flush=True)
        if mean < MASTERED and stage < len(STAGES):
            stage, mean = stage + 1, 1.0
        if step % 100 == 0:
            check = Samples(tokenizer, 5, a.strange)
            print("   accuracy", {n: round(accuracy(model, check, n, 10), 3) for n in (500, 2000)}, flush=True)
            save(model, tokenizer, a.out)
    save(model, tokenizer, a.out)


if __name__ == "__main__":
    main()
