"""Writes tests/golden: tiny random checkpoints and what transformers computes from them on a CPU in float32.

Run from anywhere: `make.py [NAME...]`; without names, every family and the text fixture are made."""
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import text
from families import FAMILIES, old_keys

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
PROMPT, CONTINUATION = 96, 64
# Along the greedy path the best token leads by at least this much, so that rounding cannot turn the path ...
MARGIN = 0.01
# ... and the path visits this many tokens, so that a model which repeats itself cannot follow it by chance.
DISTINCT = 24


def randomise(model, generator):
    """Weights large enough for logits that are not flat; biases and norms that matter."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = 1 + 0.2 * noise
        elif p.dim() == 1:
            p.data = 0.3 * noise
        else:
            p.data = (0.5 if "embed" in name else 0.25) * noise


def write_checkpoint(spec, generator, out):
    """Saves the checkpoint as a hub repository would hold it."""
    model = AutoModelForCausalLM.from_config(spec["config"])
    randomise(model, generator)
    model = model.to(getattr(torch, spec["dtype"]))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(out, max_shard_size=size // spec["shards"] + 1)
    if spec["keys"] == "old":
        path = out / "config.json"
        path.write_text(json.dumps(old_keys(json.loads(path.read_text())), indent=2) + "\n")
    (out / "generation_config.json").unlink()


@torch.no_grad()
def expected(out, prompt):
    """-> (log-probs at every prompt position, greedy continuation, its smallest top-2 margin), read back from `out`.

    No KV cache is used: the oracle must not share a way to go wrong with what it judges."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    logprobs = model(prompt[None], use_cache=False).logits[0].log_softmax(-1)
    ids, margins = prompt.clone(), []
    for _ in range(CONTINUATION):
        top = model(ids[None], use_cache=False).logits[0, -1].topk(2)
        margins.append(float(top.values[0] - top.values[1]))
        ids = torch.cat([ids, top.indices[:1]])
    return logprobs, ids[len(prompt):], min(margins)


def check_keys(spec, out):
    """The old key names must mean to transformers what the new ones said."""
    meant, read = spec["config"], AutoConfig.from_pretrained(out)
    assert meant.rope_parameters.items() <= read.rope_parameters.items()
    for key in ("layer_types", "head_dim", "sliding_window"):
        assert getattr(meant, key, None) == getattr(read, key, None), key


def make(name, spec):
    out = OUT / name
    for seed in range(1000):
        shutil.rmtree(out, ignore_errors=True)
        generator = torch.Generator().manual_seed(seed)
        write_checkpoint(spec, generator, out)
        prompt = torch.randint(2, spec["config"].vocab_size, (PROMPT,), generator=generator)
        logprobs, greedy, margin = expected(out, prompt)
        if margin > MARGIN and len(greedy.unique()) >= DISTINCT:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a continuation worth testing")
    check_keys(spec, out)
    save_file({"prompt": prompt, "logprobs": logprobs.contiguous(), "greedy": greedy.contiguous()}, out / "expected.safetensors")
    print(f"{name}: seed {seed}, margin {margin:.4f}, {len(greedy.unique())} distinct tokens, "
          f"{sum(f.stat().st_size for f in out.iterdir()) // 1024} KiB", flush=True)


def main():
    names = sys.argv[1:] or [*FAMILIES, "text"]
    for name in names:
        if name == "text":
            text.make(OUT / "text")
        else:
            make(name, FAMILIES[name])


if __name__ == "__main__":
    main()
