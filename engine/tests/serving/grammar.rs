//! Grammars, in devices that run ahead and others: whatever else happens, the output follows.

use std::sync::{Arc, OnceLock};

use baton_grammar::{Grammars, Vocabulary};
use baton_proto::grammar::Grammar;
use baton_proto::message::NodeFinish;

use super::*;

/// Ends a sequence; the other tokens are bytes.
const EOS: u32 = 0;

/// Of the fake model's 128 tokens.
pub(crate) fn grammars() -> Arc<Grammars> {
    static GRAMMARS: OnceLock<Arc<Grammars>> = OnceLock::new();
    let make = || {
        let vocab: serde_json::Map<_, _> =
            (1..128).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
        let decoder = serde_json::json!({"type": "ByteFallback"});
        let file = serde_json::json!({"decoder": decoder, "model": {"vocab": vocab}});
        Arc::new(Grammars::new(&Vocabulary::parse(&file.to_string()).expect("a vocabulary"), 128))
    };
    GRAMMARS.get_or_init(make).clone()
}

/// A job drawn at temperature 1.
fn guided(n: u32, regex: &str, max_tokens: u32) -> Job {
    let mut job = job(n, prompt(n, 9), max_tokens);
    job.sampling.temperature = 1.0;
    job.sampling.seed = n.into();
    job.sampling.eos_token_ids = vec![EOS];
    job.sampling.grammar = Some(Arc::new(Grammar::Regex(regex.to_owned())));
    job
}

fn text(tokens: &[u32]) -> String {
    tokens.iter().filter(|token| **token != EOS).map(|token| char::from(*token as u8)).collect()
}

const WORDS: &str = "[ab]{3}(-[cd]{2}){0,4}";

/// Whether a text is one of [`WORDS`], or begins one.
fn is_word(text: &str, whole: bool) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let part = |i: usize, part: &&str| {
        let (letters, length) = if i == 0 { ("ab", 3) } else { ("cd", 2) };
        let last = i + 1 == parts.len();
        let fits = part.len() == length || !whole && last && part.len() < length;
        fits && part.chars().all(|c| letters.contains(c))
    };
    parts.len() <= 5 && parts.iter().enumerate().all(|(i, p)| part(i, p))
}

pub(super) fn outputs_follow_their_grammars_and_others_do_not_notice() {
    let node = Node::start(config());
    let free: Vec<Job> = (1..5).map(|n| job(n, prompt(n, 4 * n as usize), 20)).collect();
    let bound: Vec<Job> = (5..17).map(|n| guided(n, WORDS, if n < 9 { 4 } else { 60 })).collect();
    for job in free.iter().chain(&bound) {
        node.submit(job, Kind::Local);
    }
    let outputs = node.until_ended(free.len() + bound.len());
    for job in &free {
        assert_eq!(outputs[&job.id], expected(job));
    }
    for job in &bound {
        let output = &outputs[&job.id];
        let whole = output.last() == Some(&EOS);
        assert!(whole || output.len() == job.sampling.max_tokens as usize, "{output:?}");
        assert!(is_word(&text(output), whole), "{:?}", text(output));
    }
    let texts: BTreeSet<String> = bound.iter().map(|job| text(&outputs[&job.id])).collect();
    assert!(texts.len() > 6, "they are drawn: {texts:?}");
    node.idle();
}

pub(super) fn a_handed_over_sequence_follows_on() {
    let (prefill, decode) = (Node::start(config()), Node::start(config()));
    let alone = Node::start(config());
    for n in 1..9 {
        let job = guided(n, WORDS, 40);
        alone.submit(&job, Kind::Local);
        let want = alone.until_ended(1).remove(&job.id).expect("it has tokens");
        assert!(is_word(&text(&want), true));
        let (_, got) = hand_over(&prefill, &decode, &job, &mut |_| {});
        assert_eq!(got, want);
    }
}

pub(super) fn an_attempt_goes_on_where_the_last_one_ended() {
    let node = Node::start(config());
    let whole = guided(3, WORDS, 40);
    node.submit(&whole, Kind::Local);
    let tokens = node.until_ended(1).remove(&whole.id).expect("it has tokens");
    for cut in 1..tokens.len() {
        let so_far = whole.tokens.iter().chain(&tokens[..cut]).copied().collect();
        let job = Job { id: id(100 + cut as u32), tokens: so_far, ..whole.clone() };
        node.submit(&job, Kind::Local);
        // Positions go on, too, as `until_ended` sees.
        assert_eq!(node.until_ended(1)[&job.id], tokens[cut..], "after {cut}");
    }
    // What earlier attempts said must be of the grammar.
    let foreign = whole.tokens.iter().copied().chain([u32::from(b'x')]).collect();
    node.submit(&Job { id: id(200), tokens: foreign, ..whole }, Kind::Local);
    let (reason, retry) = failure(&node);
    assert!(reason.contains("cannot follow its grammar") && retry == Retry::OtherNode, "{reason}");
    // A step that was under way still holds its blocks.
    node.eventually(|report| report.blocks.active == 0);
    node.idle();
}

fn failure(node: &Node) -> (String, Retry) {
    loop {
        if let EngineEvent::Failed { reason, retry, .. } = node.next() {
            return (reason, retry);
        }
    }
}

pub(super) fn ends_are_where_the_grammar_has_them() {
    let node = Node::start(config());
    let run = |job: Job| {
        node.submit(&job, Kind::Local);
        let mut tokens = Vec::new();
        loop {
            let event = node.tokens().remove(0);
            tokens.push(event.token);
            if let Some(finish) = event.finish {
                node.ended(job.id);
                return (text(&tokens), finish);
            }
        }
    };
    let long = Job { id: id(50), ..guided(1, "a*", 12) };
    let mut early = long.clone();
    early.sampling.min_tokens = 8;
    let (text, finish) = run(early);
    assert!(text.len() >= 8 || finish == NodeFinish::Length, "{text} {finish:?}");
    let mut complete = Job { id: id(51), ..guided(1, "abc", 12) };
    complete.sampling.min_tokens = 8;
    // The prompt's penalties and biases do not reach beyond the grammar either.
    complete.sampling.logit_bias = vec![(EOS, 100.0), (u32::from(b'x'), 100.0)];
    complete.sampling.repetition_penalty = 3.0;
    assert_eq!(run(complete.clone()), ("abc".to_owned(), NodeFinish::EndOfSequence));
    let mut stopped = Job { id: id(52), ..complete.clone() };
    stopped.sampling.min_tokens = 0;
    stopped.sampling.stop_token_ids = vec![b'b'.into()];
    assert_eq!(run(stopped), ("ab".to_owned(), NodeFinish::StopToken(b'b'.into())));
    let mut cut = Job { id: id(53), ..complete };
    (cut.sampling.max_tokens, cut.sampling.min_tokens) = (2, 0);
    assert_eq!(run(cut), ("ab".to_owned(), NodeFinish::Length));
}

pub(super) fn a_grammar_that_does_not_compile_fails_its_job() {
    let node = Node::start(config());
    node.submit(&guided(1, "(", 5), Kind::Local);
    assert_eq!(failure(&node).1, Retry::Never);
    let mut bare = job(2, prompt(2, 9), 3);
    bare.sampling.grammar = Some(Arc::new(Grammar::JsonObject));
    let submission = Submission { job: bare, kind: Kind::Local, held: false };
    let refused = node.engine.submit(submission).expect_err("nothing ends it");
    assert!(refused.to_string().contains("structured_output is given"), "{refused}");
    node.idle();
}

#[test]
fn a_node_without_a_tokenizer_refuses_grammars() {
    let device = support::device(FakeModel::new(128, 200));
    let engine = Engine::start(config(), device, None, Box::new(|_| {}));
    let job = guided(1, "a", 5);
    let refused = engine.submit(Submission { job, kind: Kind::Local, held: false });
    assert_eq!(refused, Err(SubmitError::NoGrammars));
    assert_eq!(SubmitError::NoGrammars.retry(), Retry::OtherNode);
}

macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod in_turn {
            $(#[test] fn $test() { super::$test(); })*
        }
        mod ahead {
            $(#[test] fn $test() { support::ahead(super::$test); })*
            use super::support;
        }
    };
}

on_both!(
    outputs_follow_their_grammars_and_others_do_not_notice,
    a_handed_over_sequence_follows_on,
    an_attempt_goes_on_where_the_last_one_ended,
    ends_are_where_the_grammar_has_them,
    a_grammar_that_does_not_compile_fails_its_job,
);
