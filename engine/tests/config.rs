//! Which configurations are served, what they mean, and how the others are refused.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use baton_engine::config::{Family, ModelConfig};
use serde_json::{Value, json};

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
    })
}

fn family(model_type: &str, architecture: &str) -> Value {
    with(llama(), &json!({"model_type": model_type, "architectures": [architecture]}))
}

fn qwen2() -> Value {
    family("qwen2", "Qwen2ForCausalLM")
}

fn qwen3() -> Value {
    family("qwen3", "Qwen3ForCausalLM")
}

fn mistral() -> Value {
    family("mistral", "MistralForCausalLM")
}

/// `config` with the keys of `changes`.
fn with(mut config: Value, changes: &Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(mut config: Value, key: &str) -> Value {
    config.as_object_mut().unwrap().remove(key).unwrap();
    config
}

fn parse(config: &Value) -> ModelConfig {
    ModelConfig::parse(config).unwrap_or_else(|e| panic!("{e}: {config}"))
}

fn refusal(config: &Value) -> String {
    match ModelConfig::parse(config) {
        Ok(_) => panic!("served: {config}"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn what_cannot_be_served_is_refused_by_key_and_value() {
    let kinds = "default, linear, dynamic, llama3, yarn";
    let cases = [
        (
            json!({"model_type": "mixtral"}),
            r#"model_type is "mixtral"; supported: llama, mistral, qwen2, qwen3"#,
        ),
        (json!({"model_type": null}), "model_type is missing"),
        (
            json!({"architectures": ["LlamaForSequenceClassification"]}),
            r#"architectures is ["LlamaForSequenceClassification"]; supported: LlamaForCausalLM"#,
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            r#"quantization_config.quant_method is "gptq"; supported: unquantized weights"#,
        ),
        (json!({"hidden_act": "gelu"}), r#"hidden_act is "gelu"; supported: silu"#),
        (json!({"num_local_experts": 8}), "num_local_experts is 8; supported: 0"),
        (json!({"num_experts": 128}), "num_experts is 128; supported: 0"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5; supported: 1.0"),
        (
            json!({"final_logit_softcapping": 30.0}),
            "final_logit_softcapping is 30.0; supported: null",
        ),
        (
            json!({"torch_dtype": "float8_e4m3fn"}),
            r#"torch_dtype is "float8_e4m3fn"; supported: float32, bfloat16, float16"#,
        ),
        (json!({"dtype": "int8"}), r#"dtype is "int8"; supported: float32, bfloat16, float16"#),
        (json!({"hidden_size": 0}), "hidden_size is 0; expected a whole number from 1 to 1048576"),
        (
            json!({"hidden_size": "64"}),
            r#"hidden_size is "64"; expected a whole number from 1 to 1048576"#,
        ),
        (json!({"hidden_size": 66}), "num_attention_heads is 4; expected a divisor of hidden_size"),
        (
            json!({"num_key_value_heads": 3}),
            "num_key_value_heads is 3; expected a divisor of num_attention_heads",
        ),
        (json!({"head_dim": 15}), "head_dim is 15; expected an even number up to 256"),
        (json!({"vocab_size": null}), "vocab_size is missing"),
        (json!({"max_position_embeddings": null}), "max_position_embeddings is missing"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings is 1; expected true or false"),
        (
            json!({"eos_token_id": -1}),
            "eos_token_id is -1; expected a token id or a list of token ids",
        ),
        (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps is -1e-6; expected a number above 0"),
        (
            json!({"layer_types": ["full_attention"]}),
            r#"layer_types is ["full_attention"]; expected a list of num_hidden_layers = 4 names"#,
        ),
        (
            json!({"layer_types": ["full_attention", "linear_attention", "full_attention", "x"]}),
            r#"layer_types is "linear_attention"; supported: full_attention, sliding_attention"#,
        ),
        (
            json!({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
            &format!(r#"rope_scaling.rope_type is "longrope"; supported: {kinds}"#),
        ),
        (
            json!({"rope_scaling": {"type": "su"}}),
            &format!(r#"rope_scaling.type is "su"; supported: {kinds}"#),
        ),
        (
            json!({"rope_parameters": {"rope_type": "proportional"}}),
            &format!(r#"rope_parameters.rope_type is "proportional"; supported: {kinds}"#),
        ),
        (
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            r#"rope_parameters.full_attention is {"rope_type":"default"}; supported: null"#,
        ),
        (
            json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
            "rope_parameters.partial_rotary_factor is 0.25; supported: 1.0",
        ),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is missing"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0}}),
            "rope_scaling.factor is 0; expected a number above 0",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 1.0}}),
            "rope_scaling.high_freq_factor is 1.0; expected more than low_freq_factor",
        ),
        (json!({"rope_scaling": "yarn"}), r#"rope_scaling is "yarn"; expected an object"#),
        (json!({"rope_theta": "1e6"}), r#"rope_theta is "1e6"; expected a number above 0"#),
    ];
    for (changes, text) in cases {
        assert_eq!(refusal(&with(llama(), &changes)), text);
    }
    assert_eq!(refusal(&json!([])), "the file is []; expected an object");
}

#[test]
fn what_one_family_serves_another_refuses() {
    let cases = [
        (mistral(), json!({"attention_bias": true}), "attention_bias is true; supported: false"),
        (qwen3(), json!({"mlp_bias": true}), "mlp_bias is true; supported: false"),
        (qwen2(), json!({"num_key_value_heads": null}), "num_key_value_heads is missing"),
        (
            qwen2(),
            json!({"layer_types": ["sliding_attention", "full_attention", "full_attention",
                "full_attention"]}),
            "layer_types is [\"sliding_attention\",\"full_attention\",\"full_attention\",\
             \"full_attention\"]; supported: what sliding_window says",
        ),
    ];
    for (config, changes, text) in cases {
        assert_eq!(refusal(&with(config, &changes)), text);
    }
}

#[test]
fn a_long_value_is_cut() {
    let text = refusal(&with(llama(), &json!({"hidden_act": "é".repeat(1000)})));
    assert!(text.len() < 250 && !text.contains('\n'), "{text}");
}

/// The keys that count, as on the hub.
#[test]
fn published_models_are_served() {
    let llama = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "head_dim": 64,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "use_cache": true, "vocab_size": 128256
    });
    let qwen = json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "use_cache": true, "use_sliding_window": false, "vocab_size": 152064
    });
    let mistral = json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336, "head_dim": 128,
        "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 131072
    });
    for config in [llama, qwen, mistral] {
        let c = parse(&config);
        assert!(c.windows.iter().all(Option::is_none));
        assert_eq!(c.windows.len() as u64, config["num_hidden_layers"].as_u64().unwrap());
        assert_eq!(c.rope.frequencies.len() * 2, c.head_dim);
    }
}

#[test]
fn families_differ_in_biases_and_norms() {
    let facts = |config: Value| {
        let c = parse(&config);
        (c.family, c.qkv_bias, c.output_bias, c.mlp_bias, c.qk_norm)
    };
    let biased = |config| with(config, &json!({"attention_bias": true}));
    assert_eq!(facts(llama()), (Family::Llama, false, false, false, false));
    assert_eq!(facts(biased(llama())), (Family::Llama, true, true, false, false));
    assert!(parse(&with(llama(), &json!({"mlp_bias": true}))).mlp_bias);
    assert_eq!(facts(mistral()), (Family::Mistral, false, false, false, false));
    assert_eq!(facts(qwen2()), (Family::Qwen2, true, false, false, false));
    assert_eq!(facts(qwen3()), (Family::Qwen3, false, false, false, true));
    assert_eq!(facts(biased(qwen3())), (Family::Qwen3, true, true, false, true));
}

#[test]
fn absent_keys_mean_what_transformers_says() {
    let minimal = without(
        without(without(llama(), "num_key_value_heads"), "rms_norm_eps"),
        "tie_word_embeddings",
    );
    let minimal = without(without(without(minimal, "torch_dtype"), "eos_token_id"), "hidden_act");
    let c = parse(&without(minimal, "architectures"));
    assert_eq!((c.kv_heads, c.head_dim, c.tied, c.dtype), (4, 16, false, None));
    assert_eq!((c.norm_eps, c.eos_token_ids, c.rope.frequencies[0]), (1e-6, vec![], 1.0));
    // theta 10000, head_dim 16: the second pair turns at 10000^(-2/16).
    assert!((c.rope.frequencies[1] - 0.316_227_77).abs() < 1e-7, "{:?}", c.rope);
    assert_eq!(parse(&qwen3()).head_dim, 128);
    assert_eq!(parse(&with(qwen3(), &json!({"head_dim": null}))).head_dim, 128);
    assert_eq!(parse(&with(llama(), &json!({"head_dim": 48}))).head_dim, 48);
}

#[test]
fn end_of_sequence_is_one_token_or_several() {
    let eos = |value: Value| parse(&with(llama(), &json!({"eos_token_id": value}))).eos_token_ids;
    assert_eq!(eos(json!(7)), [7]);
    assert_eq!(eos(json!([7, 9])), [7, 9]);
    assert_eq!(eos(Value::Null), [0; 0]);
}

#[test]
fn windows_follow_the_family() {
    let windows = |config: Value, changes: Value| parse(&with(config, &changes)).windows;
    let w = Some(24);
    // Mistral: every layer; absent is its class's default, null is none.
    assert_eq!(windows(mistral(), json!({"sliding_window": 24})), [w; 4]);
    assert_eq!(windows(mistral(), json!({"sliding_window": null})), [None; 4]);
    assert_eq!(windows(mistral(), json!({})), [Some(4096); 4]);
    // Qwen: only if asked for, and from layer max_window_layers on.
    let qwen = json!({"sliding_window": 24, "max_window_layers": 3});
    assert_eq!(windows(qwen2(), qwen.clone()), [None; 4]);
    let used = with(qwen, &json!({"use_sliding_window": true}));
    assert_eq!(windows(qwen2(), used.clone()), [None, None, None, w]);
    // The list of transformers 5 wins.
    let (full, slides) = ("full_attention", "sliding_attention");
    let listed = with(used, &json!({"layer_types": [slides, full, slides, full]}));
    assert_eq!(windows(qwen3(), listed), [w, None, w, None]);
    // transformers' Llama knows no window.
    assert_eq!(windows(llama(), json!({"sliding_window": 24})), [None; 4]);
}

#[test]
fn old_and_new_rope_keys_mean_the_same() {
    let kinds = [
        json!({"rope_type": "default"}),
        json!({"rope_type": "linear", "factor": 4.0}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ];
    let mut seen = Vec::new();
    for kind in kinds {
        let new = with(kind.clone(), &json!({"rope_theta": 5e5}));
        let new = parse(&with(llama(), &json!({"rope_parameters": new}))).rope;
        let mut oldest = kind.clone();
        oldest["type"] = oldest.as_object_mut().unwrap().remove("rope_type").unwrap();
        for old in [kind, oldest] {
            let old = json!({"rope_theta": 5e5, "rope_scaling": old});
            assert_eq!(parse(&with(llama(), &old)).rope, new);
        }
        assert!(!seen.contains(&new), "every kind scales in its own way");
        seen.push(new);
    }
}

#[test]
fn yarn_scales_attention_as_given_or_as_derived() {
    let scale = |changes: Value| {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0});
        parse(&with(llama(), &json!({"rope_scaling": with(yarn, &changes)}))).rope.scale
    };
    let derived = |weight: f32| 0.1 * weight * 4.0f32.ln() + 1.0;
    let close = |a: f32, b: f32| assert!((a - b).abs() < 1e-6, "{a} {b}");
    close(scale(json!({})), derived(1.0));
    close(scale(json!({"attention_factor": 0.75})), 0.75);
    close(scale(json!({"mscale": 0.5, "mscale_all_dim": 2.0})), derived(0.5) / derived(2.0));
    close(scale(json!({"mscale": 0.5})), derived(1.0));
    close(scale(json!({"mscale": 0.5, "mscale_all_dim": 0})), derived(1.0));
}

#[test]
fn yarn_blends_between_its_bounds() {
    let frequencies = |changes: Value| {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 256});
        let yarn = with(yarn, &changes);
        parse(&with(llama(), &json!({"head_dim": 64, "rope_parameters": yarn}))).rope.frequencies
    };
    let plain = |i: usize| 1e4f32.powf(-2.0 * i as f32 / 64.0);
    let usual = frequencies(json!({}));
    assert!((usual[0] - plain(0)).abs() < 1e-7, "fast dimensions are kept");
    assert!((usual[31] / plain(31) - 0.25).abs() < 1e-5, "slow ones are stretched");
    assert_ne!(frequencies(json!({"beta_fast": 16})), usual);
    assert_ne!(frequencies(json!({"beta_slow": 2})), usual);
    assert_ne!(frequencies(json!({"truncate": false})), usual);
    assert_eq!(frequencies(json!({"beta_fast": 32, "beta_slow": 1, "truncate": true})), usual);
}
