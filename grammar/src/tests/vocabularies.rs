//! Bytes of tokens, one after the other, are the text that the tokenizer makes of them.

use super::*;

fn demo() -> String {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    std::fs::read_to_string(root.join("models/demo/tokenizer.json")).unwrap()
}

/// The same text by both, after a first token that keeps its leading blank from being cut.
fn agree(file: &str, ids: &[u32]) {
    let vocabulary = Vocabulary::parse(file).unwrap();
    let tokenizer = Tokenizer::from_bytes(file).unwrap();
    let bytes: Vec<u8> =
        ids.iter().flat_map(|id| vocabulary.bytes()[*id as usize].clone()).collect();
    // Nonsense becomes one sign or several.
    if let Ok(text) = String::from_utf8(bytes) {
        assert_eq!(tokenizer.decode(ids, true).unwrap(), text, "{ids:?}");
    }
}

#[test]
fn every_token_is_what_the_tokenizer_says() {
    let (demo, small) = (demo(), tokenizer_json().to_string());
    for (file, size) in [(&demo, 2048), (&small, VOCAB)] {
        let vocabulary = Vocabulary::parse(file).unwrap();
        assert_eq!(vocabulary.bytes().len(), size);
        let tokenizer = Tokenizer::from_bytes(file).unwrap();
        let mut texts = 0;
        for id in 0..size as u32 {
            let Ok(text) = std::str::from_utf8(&vocabulary.bytes()[id as usize]) else { continue };
            assert_eq!(tokenizer.decode(&[id], true).unwrap(), text, "token {id}");
            texts += usize::from(!text.is_empty());
        }
        assert!(texts > size / 3, "most are whole characters: {texts} of {size}");
    }
}

proptest! {
    #[test]
    fn texts_keep_their_bytes(text in "\\PC{0,40}") {
        let file = demo();
        let tokenizer = Tokenizer::from_bytes(&file).unwrap();
        agree(&file, tokenizer.encode(text.as_str(), false).unwrap().get_ids());
    }

    #[test]
    fn sequences_of_tokens_keep_their_bytes(ids in prop::collection::vec(0..256 + TEXTS.len() as u32, 0..12)) {
        agree(&tokenizer_json().to_string(), &ids);
    }
}

#[test]
fn unigram_models_and_metaspace_are_read() {
    let file = json!({"decoder": {"type": "Metaspace", "replacement": "▁"},
        "added_tokens": [{"id": 0, "content": "<unk>", "special": true},
            {"id": 3, "content": "<think>", "special": false}],
        "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1.0], ["<0x0A>", -2.0]]}});
    let vocabulary = Vocabulary::parse(&file.to_string()).unwrap();
    assert_eq!(vocabulary.bytes(), [&b""[..], b" a", b"\n", b"<think>"]);
}

#[test]
fn other_files_are_refused() {
    let refused = |file: Value| Vocabulary::parse(&file.to_string()).unwrap_err();
    assert!(matches!(Vocabulary::parse("{"), Err(VocabularyError::Json(_))));
    assert_eq!(refused(json!({"decoder": {"type": "WordPiece"}})), VocabularyError::Unsupported);
    let decoder = json!({"type": "ByteLevel"});
    let vocab = VocabularyError::Malformed("model.vocab");
    assert_eq!(refused(json!({"decoder": decoder})), vocab);
    let huge = json!({"decoder": decoder, "model": {"vocab": {"a": u64::MAX}}});
    assert_eq!(refused(huge), vocab, "an id does not decide how much memory is taken");
    let added = json!({"decoder": decoder, "model": {"vocab": {}}, "added_tokens": [{"id": 1}]});
    assert_eq!(refused(added), VocabularyError::Malformed("added_tokens"));
}
