"""The shape of Qwen3-8B, as its config.json says it."""

CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936, max_position_embeddings=40960,
    rms_norm_eps=1e-6, rope_theta=1000000, hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16",
)
