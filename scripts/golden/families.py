"""The tiny checkpoints of the golden fixtures: one per thing that a model family does differently."""
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

TINY = dict(vocab_size=192, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=None,
            tie_word_embeddings=False)


def rope(theta, kind="default", **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


def family(kind, keys, dtype="float32", shards=1, **changes):
    """`keys`: which transformers' names config.json uses, "old" (4) or "new" (5)."""
    return {"config": kind(**{**TINY, **changes}), "keys": keys, "dtype": dtype, "shards": shards}


FAMILIES = {
    "llama2": family(LlamaConfig, "old", rope_parameters=rope(10000.0)),
    "llama3": family(
        LlamaConfig, "new", num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
        rope_parameters=rope(500000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=64)),
    "llama3-old-keys": family(
        LlamaConfig, "old", num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=3, intermediate_size=32,
        rope_parameters=rope(10000.0, "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=128)),
    "llama-linear": family(LlamaConfig, "old", rope_parameters=rope(10000.0, "linear", factor=4.0)),
    "llama-yarn": family(
        LlamaConfig, "new", rope_parameters=rope(10000.0, "yarn", factor=8.0, original_max_position_embeddings=64)),
    "qwen2": family(Qwen2Config, "old", num_attention_heads=4, rope_parameters=rope(1000000.0)),
    "qwen2-yarn": family(
        Qwen2Config, "old", max_position_embeddings=256,
        rope_parameters=rope(1000000.0, "yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen2-window": family(
        Qwen2Config, "new", num_hidden_layers=3, intermediate_size=32, use_sliding_window=True, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_parameters=rope(10000.0)),
    "qwen2-window-old-keys": family(
        Qwen2Config, "old", num_hidden_layers=3, intermediate_size=32, use_sliding_window=True, sliding_window=24,
        max_window_layers=1, rope_parameters=rope(10000.0)),
    "qwen3": family(
        Qwen3Config, "new", num_attention_heads=4, head_dim=16, tie_word_embeddings=True,
        rope_parameters=rope(1000000.0)),
    "mistral": family(
        MistralConfig, "old", num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=32,
        rope_parameters=rope(10000.0)),
    "sharded": family(Qwen3Config, "old", shards=3, head_dim=32, rope_parameters=rope(10000.0)),
    "bf16": family(
        Qwen2Config, "new", dtype="bfloat16", hidden_size=64, intermediate_size=96, tie_word_embeddings=True,
        rope_parameters=rope(1000000.0)),
    "f16": family(
        LlamaConfig, "old", dtype="float16", hidden_size=64, intermediate_size=96, head_dim=64, num_key_value_heads=1,
        rope_parameters=rope(10000.0)),
}


def old_keys(config):
    """config.json as transformers 4 wrote it, and as most checkpoints on the hub still have it."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    name = "rope_type" if kind == "llama3" else "type"
    config["rope_scaling"] = None if kind == "default" else {name: kind, **scaling}
    config.pop("layer_types", None)
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        config.pop("head_dim")
    config["transformers_version"] = "4.46.0"
    return config
