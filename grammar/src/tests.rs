//! Grammars over a small vocabulary, and vocabularies against the tokenizers crate.

use std::sync::Arc;

use baton_proto::grammar::Grammar;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::*;

mod adversarial;
mod vocabularies;

/// Token 256 + n is `TEXTS[n]`; below that they are bytes.
const TEXTS: [&str; 8] = ["true", "false", "\"a\"", "ab", "abc", " ", "}", "{\""];
const EOS: u32 = 256 + TEXTS.len() as u32;
/// A special token that ends nothing.
const BEGIN: u32 = EOS + 1;
const VOCAB: usize = BEGIN as usize + 1;

/// A `tokenizer.json` in the manner of sentencepiece: bytes, texts, special tokens.
fn tokenizer_json() -> Value {
    let bytes = (0..256).map(|byte| (format!("<0x{byte:02X}>"), json!(byte)));
    let texts = TEXTS.iter().enumerate();
    let texts = texts.map(|(n, text)| (text.replace(' ', "▁"), json!(256 + n)));
    let vocab: serde_json::Map<_, _> = bytes.chain(texts).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(EOS, "</s>"), special(BEGIN, "<s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": true,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": []},
    })
}

fn grammars() -> Grammars {
    Grammars::new(&Vocabulary::parse(&tokenizer_json().to_string()).unwrap(), VOCAB)
}

fn guide(grammar: Grammar) -> Guide {
    grammars().guide(&Arc::new(grammar)).unwrap()
}

fn refused(grammar: Grammar) -> String {
    match grammars().guide(&Arc::new(grammar)).unwrap_err() {
        GrammarError::Unusable(why) => why,
        GrammarError::Lost(why) => panic!("{why}"),
    }
}

const ENDS: Ends<'static> = Ends { eos: &[EOS], stop: &[], early: false };

fn allowed(guide: &mut Guide, ends: Ends<'_>) -> Vec<u32> {
    let mask = guide.mask(ends).unwrap();
    assert_eq!(mask.words().len(), VOCAB.div_ceil(32));
    (0..VOCAB as u32 + 40).filter(|token| mask.allows(*token)).collect()
}

fn text(text: &str) -> u32 {
    256 + TEXTS.iter().position(|other| *other == text).unwrap() as u32
}

#[test]
fn a_choice_allows_its_texts_and_then_the_end() {
    let choice = Grammar::Choice(["ab", "abc", "true"].map(str::to_owned).to_vec());
    let mut guide = guide(choice);
    let first = [u32::from(b'a'), u32::from(b't'), text("true"), text("ab"), text("abc")];
    assert_eq!(allowed(&mut guide, ENDS), first);
    guide.accept(&[text("ab")]).unwrap();
    assert_eq!(allowed(&mut guide, ENDS), [u32::from(b'c'), EOS]);
    guide.accept(&[b'c'.into()]).unwrap();
    assert_eq!(allowed(&mut guide, ENDS), [EOS]);
    assert!(guide.accept(&[b'c'.into()]).is_err(), "it is complete");
}

#[test]
fn quotes_and_unicode_of_a_choice_are_text() {
    for one in ["\"a\" \\ | b\n", "é🚚", "start: /x/", "</s>"] {
        let mut guide = guide(Grammar::Choice(vec![one.to_owned()]));
        for byte in one.bytes() {
            assert!(guide.mask(ENDS).unwrap().allows(byte.into()), "{one:?}");
            guide.accept(&[byte.into()]).unwrap();
        }
        assert_eq!(allowed(&mut guide, ENDS), [EOS], "{one:?}");
    }
}

#[test]
fn too_early_an_end_is_allowed_only_where_nothing_else_may_follow() {
    let early = Ends { early: true, ..ENDS };
    let mut guide = guide(Grammar::Regex("ab?".to_owned()));
    guide.accept(&[b'a'.into()]).unwrap();
    assert_eq!(allowed(&mut guide, ENDS), [u32::from(b'b'), EOS]);
    assert_eq!(allowed(&mut guide, early), [u32::from(b'b')]);
    let stop = Ends { stop: &[b'b' as u32], ..early };
    assert_eq!(allowed(&mut guide, stop), [u32::from(b'b'), EOS], "one end or the other");
    guide.accept(&[b'b'.into()]).unwrap();
    assert_eq!(allowed(&mut guide, early), [EOS]);
}

#[test]
fn special_tokens_are_never_text() {
    for grammar in [
        Grammar::Regex("(?s:.*)".to_owned()),
        Grammar::Lark("start: /(?s:.)*/ | \"</s>\" | \"<s>\"".to_owned()),
        Grammar::JsonObject,
    ] {
        let mask = guide(grammar).mask(Ends { eos: &[], ..ENDS }).unwrap();
        assert!(!mask.allows(EOS) && !mask.allows(BEGIN));
    }
    let named = refused(Grammar::Lark("start: <s>".to_owned()));
    assert_eq!(named, "it is not supported");
}

#[test]
fn json_is_followed_to_its_end() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}},
        "required": ["a"], "additionalProperties": false});
    let mut guide = guide(Grammar::JsonSchema(schema.to_string()));
    let mask = guide.mask(ENDS).unwrap();
    assert!(mask.allows(text("{\"")) && !mask.allows(text("ab")) && !mask.allows(EOS));
    guide.accept(&[text("{\""), b'a'.into(), b'"'.into(), b':'.into()]).unwrap();
    let mask = guide.mask(ENDS).unwrap();
    assert!(mask.allows(text("true")) && mask.allows(text(" ")) && !mask.allows(text("\"a\"")));
    guide.accept(&[text("true"), text("}")]).unwrap();
    assert_eq!(allowed(&mut guide, ENDS), [EOS]);
}

#[test]
fn blanks_of_json_do_not_go_on_for_ever() {
    let mut guide = guide(Grammar::JsonObject);
    guide.accept(&[b'{'.into()]).unwrap();
    let blanks = (0..100).take_while(|_| {
        let allowed = guide.mask(ENDS).unwrap().allows(text(" "));
        allowed && guide.accept(&[text(" ")]).is_ok()
    });
    assert_eq!(blanks.count(), 32);
}

#[test]
fn what_cannot_be_followed_is_refused() {
    for (grammar, said) in [
        (Grammar::JsonSchema("{".to_owned()), "no JSON"),
        (Grammar::JsonSchema(json!({"type": "strin"}).to_string()), "strin"),
        (Grammar::JsonSchema(json!({"not": {"type": "null"}}).to_string()), "not"),
        (Grammar::JsonSchema(json!({"$ref": "http://x/y"}).to_string()), "http://x/y"),
        (
            Grammar::JsonSchema(json!({"type": "array", "uniqueItems": true}).to_string()),
            "uniqueItems",
        ),
        (
            Grammar::JsonSchema(json!({"x-guidance": {"lenient": true}}).to_string()),
            "x-guidance.lenient",
        ),
        (Grammar::Regex("(a".to_owned()), "regex"),
        (Grammar::Regex("a\\b".to_owned()), ""),
        (Grammar::Lark("start: other".to_owned()), "other"),
        (Grammar::Lark("begin: \"a\"".to_owned()), "start"),
    ] {
        let why = refused(grammar);
        assert!(why.contains(said), "{said:?} is not in {why:?}");
    }
}

#[test]
fn a_text_that_leaves_its_grammar_is_noticed() {
    let mut guide = guide(Grammar::Regex("a+".to_owned()));
    guide.accept(&[b'a'.into()]).unwrap();
    assert!(matches!(guide.accept(&[b'b'.into()]), Err(GrammarError::Lost(_))));
    assert!(guide.mask(ENDS).is_err());
}

#[test]
fn guides_of_one_grammar_go_their_own_ways() {
    let (grammars, grammar) = (grammars(), Arc::new(Grammar::Regex("ab|cd".to_owned())));
    let mut one = grammars.guide(&grammar).unwrap();
    one.accept(&[b'a'.into()]).unwrap();
    let mut other = grammars.guide(&Arc::new(Grammar::clone(&grammar))).unwrap();
    assert_eq!(allowed(&mut other, ENDS), [b'a'.into(), b'c'.into(), text("ab")]);
    assert_eq!(allowed(&mut one, ENDS), [u32::from(b'b')]);
    grammars.forget(&grammar);
    other.accept(&[b'c'.into()]).unwrap();
    assert_eq!(allowed(&mut other, ENDS), [u32::from(b'd')]);
}

proptest! {
    /// Any way through the masks is a text of the language, by the regex crate's own account.
    #[test]
    fn masks_lead_to_words_of_the_language(choices in prop::collection::vec(any::<u32>(), 60)) {
        let rule = "(ab|abc|true)(,(ab|false))*";
        let mut guide = guide(Grammar::Regex(rule.to_owned()));
        let vocabulary = Vocabulary::parse(&tokenizer_json().to_string()).unwrap();
        let mut text = Vec::new();
        for choice in choices {
            let options = allowed(&mut guide, ENDS);
            let token = options[choice as usize % options.len()];
            if token == EOS {
                let words: Vec<&str> = std::str::from_utf8(&text).unwrap().split(',').collect();
                prop_assert!(["ab", "abc", "true"].contains(&words[0]));
                prop_assert!(words[1..].iter().all(|word| ["ab", "false"].contains(word)));
                return Ok(());
            }
            text.extend(&vocabulary.bytes()[token as usize]);
            guide.accept(&[token]).unwrap();
        }
    }
}
