//! Loading: what a folder must hold, how broken ones are refused, random weights.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::Path;

use baton_engine::model::{LoadError, LoadFormat, LoadOptions, LoadProgress, Model};
use baton_engine::{Forward, Wanted};
use baton_proto::geometry::KvDtype;
use half::bf16;
use safetensors::Dtype;
use serde_json::json;

use common::tiny::{PLAIN, Shape, Tensors, checkpoint, write_config, write_tensors, write_typed};
use common::{Part, Runner, bits, golden, load};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn try_load(dir: &Path, max_model_len: Option<usize>) -> Result<Model, LoadError> {
    Model::load(LoadOptions {
        dir,
        format: LoadFormat::Safetensors,
        threads: 1,
        max_model_len,
        kv_dtype: None,
        on_progress: &mut |_| {},
    })
}

fn refusal(dir: &Path) -> String {
    match try_load(dir, None) {
        Ok(_) => panic!("it loads"),
        Err(e) => e.to_string(),
    }
}

/// A folder whose tensors are spread over two shards by their order.
fn sharded(tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &PLAIN.config());
    let (mut parts, mut map) = ([Tensors::new(), Tensors::new()], serde_json::Map::new());
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        parts[i % 2].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), json!(format!("part-{}.safetensors", i % 2)));
    }
    for (i, part) in parts.iter().enumerate() {
        write_tensors(&dir.path().join(format!("part-{i}.safetensors")), part);
    }
    fs::write(dir.path().join(INDEX), json!({"weight_map": map}).to_string()).unwrap();
    dir
}

fn logits(dir: &Path, format: LoadFormat) -> Vec<Vec<f32>> {
    let mut run = Runner::new(load(dir, format, 2, None), 16, 8, 1);
    run.all_logits(&[3, 1, 4, 1, 5, 9, 2, 6], &mut || 8)
}

#[test]
fn shards_hold_the_same_model_as_one_file() {
    let tensors = PLAIN.tensors(1);
    let (one, two) = (checkpoint(&PLAIN, &tensors), sharded(&tensors));
    let of = |dir: &tempfile::TempDir| bits(&logits(dir.path(), LoadFormat::Safetensors));
    assert!(of(&one) == of(&two));
    let revision = |dir: &tempfile::TempDir| try_load(dir.path(), None).unwrap().revision();
    assert_eq!(revision(&one), revision(&two));
}

#[test]
fn a_revision_names_configuration_and_weights() {
    let revision = |shape: &Shape, tensors: &Tensors| {
        try_load(checkpoint(shape, tensors).path(), None).unwrap().revision()
    };
    let tensors = PLAIN.tensors(1);
    let base = revision(&PLAIN, &tensors);
    assert_eq!(base, revision(&PLAIN, &tensors));
    let mut changed = tensors.clone();
    changed.get_mut("model.norm.weight").unwrap().1[3] += 1e-3;
    assert_ne!(base, revision(&PLAIN, &changed));
    assert_ne!(base, revision(&Shape { head_dim: 16, heads: 2, kv_heads: 1, ..PLAIN }, &tensors));
}

#[test]
fn wrong_tensors_are_named() {
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = PLAIN.tensors(1);
        change(&mut tensors);
        refusal(checkpoint(&PLAIN, &tensors).path())
    };
    let key = "model.layers.1.self_attn.k_proj.weight";
    assert_eq!(
        with(&|t| drop(t.remove(key))),
        "tensor model.layers.1.self_attn.k_proj.weight is missing"
    );
    assert_eq!(
        with(&|t| t.get_mut(key).unwrap().0 = vec![32, 16]),
        "model.safetensors: tensor model.layers.1.self_attn.k_proj.weight is [32, 16]; \
         expected [16, 32]"
    );
    let bias = ("model.layers.0.self_attn.q_proj.bias".to_owned(), (vec![32], vec![0.0; 32]));
    assert_eq!(
        with(&|t| drop(t.insert(bias.0.clone(), bias.1.clone()))),
        "model.safetensors: tensor model.layers.0.self_attn.q_proj.bias is not part of this model"
    );
}

#[test]
fn a_type_that_is_no_float_of_ours_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &PLAIN.config());
    let double = |name: &str| if name == "model.norm.weight" { Dtype::F64 } else { Dtype::F32 };
    write_typed(&dir.path().join(SINGLE), &PLAIN.tensors(1), double);
    assert_eq!(
        refusal(dir.path()),
        "model.safetensors: tensor model.norm.weight is F64; expected F32, BF16 or F16"
    );
}

#[test]
fn tensors_may_differ_in_precision() {
    let mut tensors = PLAIN.tensors(1);
    for value in tensors.values_mut().flat_map(|(_, values)| values) {
        *value = bf16::from_f32(*value).to_f32();
    }
    let plain = logits(checkpoint(&PLAIN, &tensors).path(), LoadFormat::Safetensors);
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &PLAIN.config());
    // Of the matrices that are stacked into one, only one; and all of the MLP.
    let mixed = |name: &str| match name {
        name if name.contains("k_proj") || name.contains("mlp") => Dtype::BF16,
        _ => Dtype::F32,
    };
    write_typed(&dir.path().join(SINGLE), &tensors, mixed);
    assert!(bits(&logits(dir.path(), LoadFormat::Safetensors)) == bits(&plain));
}

#[test]
fn tensors_that_nothing_reads_are_ignored() {
    let shape = Shape { tied: true, ..PLAIN };
    let mut tensors = shape.tensors(1);
    let plain = logits(checkpoint(&shape, &tensors).path(), LoadFormat::Safetensors);
    let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq";
    tensors.insert(inv_freq.into(), (vec![4], vec![9.0; 4]));
    let table = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), table);
    let more = logits(checkpoint(&shape, &tensors).path(), LoadFormat::Safetensors);
    assert!(bits(&more) == bits(&plain));
}

#[test]
fn an_output_layer_of_its_own_is_used_although_the_configuration_ties_it() {
    let untied = PLAIN.tensors(1);
    let plain = logits(checkpoint(&PLAIN, &untied).path(), LoadFormat::Safetensors);
    let tied = Shape { tied: true, ..PLAIN };
    let own = logits(checkpoint(&tied, &untied).path(), LoadFormat::Safetensors);
    assert!(bits(&own) == bits(&plain));
}

#[test]
fn broken_files_are_named() {
    let tensors = PLAIN.tensors(1);
    let whole = fs::read(checkpoint(&PLAIN, &tensors).path().join(SINGLE)).unwrap();
    let cut = [0, 7, 8, 100, whole.len() / 2, whole.len() - 1];
    let mut all: Vec<Vec<u8>> = cut.iter().map(|n| whole[..*n].to_vec()).collect();
    all.push([&whole[..], b"more"].concat());
    all.push([&u64::MAX.to_le_bytes()[..], &whole[8..]].concat());
    for bytes in all {
        let dir = checkpoint(&PLAIN, &tensors);
        fs::write(dir.path().join(SINGLE), &bytes).unwrap();
        let text = refusal(dir.path());
        assert!(text.starts_with("model.safetensors: "), "{} bytes: {text}", bytes.len());
    }
}

#[test]
fn an_index_cannot_lead_out_of_its_folder() {
    for file in ["../part-0.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "./x"] {
        let dir = sharded(&PLAIN.tensors(1));
        let index = json!({"weight_map": {"model.norm.weight": file}}).to_string();
        fs::write(dir.path().join(INDEX), index).unwrap();
        let text = refusal(dir.path());
        assert!(text.contains(INDEX) && text.contains(&format!("{file:?}")), "{text}");
    }
}

#[test]
fn a_missing_shard_is_named() {
    let dir = sharded(&PLAIN.tensors(1));
    fs::remove_file(dir.path().join("part-1.safetensors")).unwrap();
    assert!(refusal(dir.path()).starts_with("part-1.safetensors: "));
    for index in ["{", "{}", r#"{"weight_map": {"a": 1}}"#] {
        fs::write(dir.path().join(INDEX), index).unwrap();
        assert!(refusal(dir.path()).starts_with(INDEX));
    }
}

#[test]
fn an_incomplete_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(dir.path()).starts_with("config.json: "));
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(refusal(dir.path()).starts_with("config.json: "));
    write_config(dir.path(), &json!({"model_type": "gpt2"}));
    assert_eq!(
        refusal(dir.path()),
        r#"config.json: model_type is "gpt2"; supported: llama, mistral, qwen2, qwen3"#
    );
    write_config(dir.path(), &PLAIN.config());
    assert!(refusal(dir.path()).starts_with("neither model.safetensors nor"));
}

#[test]
fn lengths_are_bounded_by_the_checkpoint() {
    let dir = checkpoint(&PLAIN, &PLAIN.tensors(1));
    let length = |asked| try_load(dir.path(), asked).map(|model| model.max_model_len());
    assert_eq!(length(None).unwrap(), 128);
    assert_eq!(length(Some(64)).unwrap(), 64);
    for asked in [0, 129] {
        assert_eq!(
            length(Some(asked)).unwrap_err().to_string(),
            format!(
                "max_model_len is {asked}; max_position_embeddings in config.json allows 1 to 128"
            )
        );
    }
}

#[test]
fn sequences_end_where_generation_config_says() {
    let dir = checkpoint(&PLAIN, &PLAIN.tensors(1));
    let eos = || try_load(dir.path(), None).map(|model| model.eos_token_ids().to_vec());
    assert_eq!(eos().unwrap(), [1, 2]);
    let generation = dir.path().join("generation_config.json");
    for (text, ids) in [(r#"{"eos_token_id": [5, 6]}"#, [5, 6]), ("{}", [1, 2])] {
        fs::write(&generation, text).unwrap();
        assert_eq!(eos().unwrap(), ids);
    }
    fs::write(&generation, r#"{"eos_token_id": "x"}"#).unwrap();
    assert_eq!(
        eos().unwrap_err().to_string(),
        r#"generation_config.json: eos_token_id is "x"; expected a token id or a list of token ids"#
    );
}

#[test]
fn progress_is_reported_up_to_the_end() {
    for dir in golden() {
        let mut seen: Vec<LoadProgress> = Vec::new();
        Model::load(LoadOptions {
            dir: &dir,
            format: LoadFormat::Safetensors,
            threads: 1,
            max_model_len: None,
            kv_dtype: None,
            on_progress: &mut |progress| seen.push(progress),
        })
        .unwrap();
        let last = seen.last().unwrap();
        assert_eq!(last.done_bytes, last.total_bytes);
        assert!(seen.is_sorted_by_key(|p| p.done_bytes) && seen.len() > 10);
    }
}

#[test]
fn a_cache_has_the_weights_type_unless_told_otherwise() {
    for dir in golden() {
        let name = dir.file_name().unwrap().to_str().unwrap();
        let own = match name {
            "bf16" => KvDtype::Bf16,
            "f16" => KvDtype::F16,
            _ => KvDtype::F32,
        };
        let dtype = |kv| load(&dir, LoadFormat::Safetensors, 1, kv).geometry(16).dtype;
        assert_eq!((dtype(None), dtype(Some(KvDtype::F16))), (own, KvDtype::F16), "{name}");
    }
}

#[test]
fn random_weights_follow_from_the_seed() {
    for dtype in ["float32", "bfloat16", "float16"] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Shape { qwen3: true, biases: true, ..PLAIN }.config();
        config["torch_dtype"] = json!(dtype);
        write_config(dir.path(), &config);
        let of = |seed| {
            let format = LoadFormat::Dummy { seed };
            (bits(&logits(dir.path(), format)), load(dir.path(), format, 1, None).revision())
        };
        let (first, again, other) = (of(1), of(1), of(2));
        assert!(first == again && first.0 != other.0 && first.1 != other.1);
        let values = logits(dir.path(), LoadFormat::Dummy { seed: 1 });
        let square: f32 = values.iter().flatten().map(|x| x * x).sum();
        let size = (square / values.iter().flatten().count() as f32).sqrt();
        assert!((0.1..10.0).contains(&size), "logits of size {size}");
    }
}

#[test]
fn a_step_may_want_nothing() {
    let dir = checkpoint(&PLAIN, &PLAIN.tensors(1));
    let mut run = Runner::new(load(dir.path(), LoadFormat::Safetensors, 1, None), 16, 32, 1);
    let part = Part { sequence: 0, tokens: &[1, 2, 3], start: 0, wanted: Wanted::None };
    assert!(run.step(&[part]).is_empty());
}
