"""What the machine and its usual software reach, for the same shapes as Baton's benchmarks.

    scripts/gpu/peers.py machine         copies, matrix products, attention through cuDNN
    scripts/gpu/peers.py transformers    prefill and decode of the shape of Qwen3-8B

Prints one JSON object per line: {"name", "value", "unit"}. Needs PyTorch with CUDA, and for the second transformers: without them it says
so and exits with 77. A part that cannot run prints {"name", "skipped"} and the next one goes on.
"""

import json
import statistics
import sys
import traceback

try:
    import torch
except ImportError:
    print(f"PyTorch is not installed for {sys.executable}")
    sys.exit(77)

# The shape of Qwen3-8B.
SHAPE = dict(
    hidden_size=4096,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)
DEVICE = torch.device("cuda")


def say(name, value, unit):
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit}), flush=True)


def median_ms(run, repeats=20, warmup=3):
    """Median time of `run` by device events."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def copies():
    """Bytes read and written per second, device to device; bytes moved per second, to and from pinned memory."""
    source = torch.randint(0, 255, (4 << 30,), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source))
    say("peer.copy.device", 2 * source.numel() / ms / 1e6, "GB/s")
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    part = target[: host.numel()]
    ms = median_ms(lambda: part.copy_(host, non_blocking=True), repeats=5)
    say("peer.copy.host_to_device", host.numel() / ms / 1e6, "GB/s")
    ms = median_ms(lambda: host.copy_(part, non_blocking=True), repeats=5)
    say("peer.copy.device_to_host", host.numel() / ms / 1e6, "GB/s")


def matrices():
    size = 8192
    a, b = random(size, size), random(size, size)
    ms = median_ms(lambda: a @ b)
    say("peer.matmul.bf16", 2 * size**3 / ms / 1e9, "TFLOP/s")


def attention():
    """Causal attention of one prompt through cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads, dim = 32, 8, 128
    for length in (2048, 8192, 16384):
        q = random(1, heads, length, dim)
        # cuDNN's fused kernel reads shared heads by strides.
        k, v = (random(1, kv_heads, length, dim).repeat_interleave(heads // kv_heads, 1) for _ in range(2))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            ms = median_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        operations = 4 * length**2 * heads * dim / 2
        say(f"peer.attention.cudnn.{length}", operations / ms / 1e9, "TFLOP/s")


def model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SHAPE)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        # Buffers made on the meta device hold nothing: make the rotary frequencies again.
        model.model.rotary_emb = type(model.model.rotary_emb)(config, device=DEVICE)
    return model.eval()


@torch.no_grad()
def prefill(model, length=8192):
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, length), device=DEVICE)
    ms = median_ms(lambda: model(tokens, logits_to_keep=1, use_cache=False), repeats=3, warmup=1)
    say(f"peer.transformers.prefill.{length}", length / ms * 1e3, "token/s")


@torch.no_grad()
def decode(model, batch, context=4096, steps=64):
    """One compiled step after `context` cached positions; their content is random, their cost is not."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + 2 * steps)
    tokens = torch.randint(0, SHAPE["vocab_size"], (batch, 1), device=DEVICE)

    def step(tokens):
        return model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    # Allocates the cache, which must not happen inside of the compiled graph.
    step(tokens)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    ms = median_ms(lambda: compiled(tokens).clone(), repeats=steps, warmup=5)
    say(f"peer.transformers.decode.{batch}", batch / ms * 1e3, "token/s")


def machine():
    for name, part in (("copies", copies), ("matrices", matrices), ("attention", attention)):
        attempt(name, part)


def transformers():
    loaded = attempt("model", model)
    if loaded is not None:
        attempt("prefill", lambda: prefill(loaded))
        # Should there be no time for all of them, the ends say most.
        for batch in (1, 64, 8, 32):
            attempt(f"decode.{batch}", lambda: decode(loaded, batch))


def attempt(name, part):
    try:
        return part()
    except Exception as error:  # One missing part must not cost the others.
        traceback.print_exc()
        print(json.dumps({"name": f"peer.{name}", "skipped": str(error).split("\n")[0][:200]}), flush=True)
        return None


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("PyTorch finds no CUDA device")
        sys.exit(77)
    {"machine": machine, "transformers": transformers}[sys.argv[1]]()
