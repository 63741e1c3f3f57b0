//! `baton explain`: why a request went where it went, and what came of the prediction.

use baton_proto::wire::v1::{
    Candidate, Cost, Decision, ExplainRequest, ExplainResponse, Outcome, RequestInfo,
};
use serde_json::{Value, json};

use super::CommandError;
use super::requests::{self, nodes, runs};
use crate::client::{Target, explain};
use crate::output::{OutputArgs, bytes, table, time};

/// Command line of `baton explain`.
#[derive(clap::Args)]
pub(crate) struct ExplainArgs {
    /// Its id, or the first digits of it, as `baton requests` shows them
    request: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `baton explain`.
pub(crate) async fn run(args: ExplainArgs) -> Result<(), CommandError> {
    args.output.print(|| show(&args)).await
}

async fn show(args: &ExplainArgs) -> Result<String, CommandError> {
    let request = ExplainRequest { request_id: args.request.clone() };
    let response = args.target.cluster().await?.explain(request).await;
    let explained = response.map_err(|status| explain(&status))?.into_inner();
    Ok(if args.output.is_json() { as_json(&explained) } else { as_text(&explained) })
}

fn as_json(explained: &ExplainResponse) -> String {
    let request = explained.request.clone().unwrap_or_default();
    json!({
        "request": requests::as_json(&request),
        "decision": explained.decision.as_ref().map(decision_json),
        "failures": explained.failures,
        "turn": explained.turn.as_ref().map(|turn| json!({
            "node": turn.node,
            "ahead": turn.ahead,
            "ahead_ms": turn.ahead_ms,
            "behind": turn.behind,
        })),
        "outcomes": explained.outcomes.iter().map(|outcome| json!({
            "term": outcome.term,
            "predicted_ms": outcome.predicted_ms,
            "took_ms": outcome.took_ms,
        })).collect::<Value>(),
    })
    .to_string()
}

fn decision_json(decision: &Decision) -> Value {
    let candidate = |candidate: &Candidate| {
        let cost = candidate.cost.unwrap_or_default();
        json!({
            "prefill_node": candidate.prefill_node,
            "decode_node": candidate.decode_node,
            "pull_node": candidate.pull_node,
            "pull_tokens": candidate.pull_tokens,
            "cached_tokens": candidate.cached_tokens,
            "cost": {
                "queue_ms": cost.queue_ms,
                "pull_ms": cost.pull_ms,
                "prefill_ms": cost.prefill_ms,
                "transfer_ms": cost.transfer_ms,
                "decode_ms": cost.decode_ms,
                "harm_ms": cost.harm_ms,
                "total_ms": cost.total_ms,
            },
        })
    };
    json!({
        "tokens": decision.tokens,
        "prefill_nodes_compared": decision.prefill_nodes_compared,
        "decode_nodes_compared": decision.decode_nodes_compared,
        "reason": decision.reason,
        "at_ms": decision.at_ms,
        "candidates": decision.candidates.iter().map(candidate).collect::<Value>(),
        "left_out": decision.left_out.iter().map(|left_out| json!({
            "node": left_out.node,
            "why": left_out.why,
        })).collect::<Value>(),
        "more_left_out": decision.more_left_out,
        "of_other_models": decision.of_other_models,
    })
}

fn as_text(explained: &ExplainResponse) -> String {
    let request = explained.request.clone().unwrap_or_default();
    let mut text = facts(&request);
    for failure in &explained.failures {
        text += &format!("failed    {failure}\n");
    }
    if let Some(turn) = &explained.turn {
        let (node, ahead, behind) = (&turn.node, turn.ahead, turn.behind);
        let ms = time(turn.ahead_ms);
        text += &format!("waits     for {node}: {ahead} before it ({ms}), {behind} behind it\n");
    }
    match &explained.decision {
        Some(decision) => text + &placed(decision) + &outcome(&request, &explained.outcomes),
        None => text + "placed    not at all\n",
    }
}

fn placed(decision: &Decision) -> String {
    let left_out = left_out(decision);
    if decision.candidates.is_empty() {
        return format!("placed    no node could take it\n{left_out}");
    }
    candidates(decision, &left_out)
}

/// Who was not compared, in a line; nothing if everybody was.
fn left_out(decision: &Decision) -> String {
    let reason = |why: &str| match why {
        "failed_it" => "failed it before".to_owned(),
        other => other.replace('_', " "),
    };
    let named = decision.left_out.iter();
    let mut parts: Vec<String> =
        named.map(|left_out| format!("{} ({})", left_out.node, reason(&left_out.why))).collect();
    let mut count = |count: u32, what: &str| {
        if count > 0 {
            parts.push(format!("{count} {what}"));
        }
    };
    count(decision.more_left_out, "more");
    count(decision.of_other_models, "of other models");
    if parts.is_empty() { String::new() } else { format!("left out  {}\n", parts.join(", ")) }
}

fn facts(request: &RequestInfo) -> String {
    let RequestInfo { id, model, priority, phase, tenant, attempts, .. } = request;
    let usage = request.usage.unwrap_or_default();
    let life = time(request.timings.unwrap_or_default().total_ms);
    let (since, ago) = match request.ended_ms {
        Some(ms) => ("after", format!(", {} ago", time(ms as f64))),
        None => ("since", String::new()),
    };
    let tenant = if tenant.is_empty() { String::new() } else { format!(", of {tenant}") };
    let reason = match &*request.error {
        "" => String::new(),
        error => format!(": {error}"),
    };
    let plural = if *attempts == 1 { "attempt" } else { "attempts" };
    format!(
        "request   {id}\nmodel     {model}, {priority}{tenant}\n\
         phase     {phase} {since} {life}{ago}{reason}\n\
         nodes     {}, {attempts} {plural}\n\
         tokens    {} of the prompt, {} of them cached; {} generated\n",
        nodes(request),
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
    )
}

fn candidates(decision: &Decision, left_out: &str) -> String {
    let Decision { prefill_nodes_compared, decode_nodes_compared, reason, at_ms, .. } = decision;
    let head = [
        "", "PREFILL", "DECODE", "CACHED", "queue", "pull", "prefill", "transfer", "decode",
        "harm", "TOTAL ms",
    ];
    let rows: Vec<_> = decision.candidates.iter().enumerate().map(|(at, c)| row(at, c)).collect();
    format!(
        "placed    {} after it arrived, of {prefill_nodes_compared} prefill and \
         {decode_nodes_compared} decode nodes\nwhy       {reason}\n{left_out}\n{}",
        time(*at_ms),
        table(&head, &rows)
    )
}

fn row(at: usize, candidate: &Candidate) -> Vec<String> {
    let cost = candidate.cost.unwrap_or_default();
    let Cost { queue_ms, pull_ms, prefill_ms, transfer_ms, decode_ms, harm_ms, total_ms } = cost;
    let prefill = match &*candidate.prefill_node {
        "" => "(the same)",
        name => name,
    };
    let cached = match candidate.pull_tokens {
        0 => candidate.cached_tokens.to_string(),
        pulled => {
            format!("{}, {pulled} from {}", candidate.cached_tokens, candidate.pull_node)
        }
    };
    let chosen = if at == 0 { ">" } else { "" };
    let mut row =
        vec![chosen.to_owned(), prefill.to_owned(), candidate.decode_node.clone(), cached];
    let terms = [queue_ms, pull_ms, prefill_ms, transfer_ms, decode_ms, harm_ms, total_ms];
    row.extend(terms.map(|ms| format!("{ms:.1}")));
    row
}

/// What was predicted when it was placed, beside what it took.
fn outcome(request: &RequestInfo, outcomes: &[Outcome]) -> String {
    if outcomes.is_empty() {
        return String::new();
    }
    let ms = |ms: f64| format!("{ms:.1}");
    let row = |outcome: &Outcome| {
        let took = outcome.took_ms.map_or("-".to_owned(), ms);
        vec![in_words(&outcome.term).to_owned(), ms(outcome.predicted_ms), took]
    };
    let rows: Vec<_> = outcomes.iter().map(row).collect();
    let took = request.timings.unwrap_or_default();
    let mut text = format!("\n{}", table(&["ms", "PREDICTED", "TOOK"], &rows));
    text += &format!("waited here for its turn: {}\n", time(request.held_ms));
    if took.transfer_bytes > 0 {
        let (moved, hidden) = (bytes(took.transfer_bytes), time(took.transfer_hidden_ms));
        text += &format!("KV moved: {moved}, {hidden} of it behind the prefill\n");
    }
    if runs(request) { text } else { text + &format!("in all: {}\n", time(took.total_ms)) }
}

fn in_words(term: &str) -> &str {
    match term {
        "queue" => "queue on the node",
        "first_token" => "to the first token",
        "transfer" => "transfer not hidden",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::v1::{LeftOut, Timings, Turn, Usage};

    use super::*;

    fn candidate(prefill: &str, decode: &str, cost: Cost) -> Candidate {
        Candidate {
            prefill_node: prefill.to_owned(),
            decode_node: decode.to_owned(),
            cached_tokens: 64,
            cost: Some(cost),
            ..Candidate::default()
        }
    }

    fn explained() -> ExplainResponse {
        let remote = Cost {
            queue_ms: 1.0,
            prefill_ms: 10.0,
            transfer_ms: 2.0,
            total_ms: 13.0,
            ..Cost::default()
        };
        let local = Cost { prefill_ms: 20.25, harm_ms: 3.0, total_ms: 23.25, ..Cost::default() };
        let pulls =
            Candidate { pull_node: "e".to_owned(), pull_tokens: 96, ..candidate("", "d", local) };
        let request = RequestInfo {
            id: "ab".repeat(16),
            model: "demo".to_owned(),
            priority: "standard".to_owned(),
            tenant: "acme".to_owned(),
            phase: "finished".to_owned(),
            prefill_node: "p".to_owned(),
            decode_node: "d".to_owned(),
            attempts: 1,
            usage: Some(Usage { prompt_tokens: 100, cached_tokens: 64, completion_tokens: 7 }),
            timings: Some(Timings {
                queue_ms: 6.0,
                prefill_ms: 11.0,
                transfer_hidden_ms: 9.0,
                transfer_exposed_ms: 1.5,
                ttft_ms: 17.5,
                total_ms: 250.0,
                transfer_bytes: 2048,
                ..Timings::default()
            }),
            held_ms: 4.0,
            ended_ms: Some(3000),
            ..RequestInfo::default()
        };
        let decision = Decision {
            tokens: 100,
            prefill_nodes_compared: 1,
            decode_nodes_compared: 2,
            reason: "remote: 13.0 ms, 64% cached on p; local would be 23.3 ms".to_owned(),
            at_ms: 4.0,
            candidates: vec![candidate("p", "d", remote), pulls],
            left_out: vec![LeftOut { node: "e".to_owned(), why: "failed_it".to_owned() }],
            more_left_out: 2,
            of_other_models: 0,
        };
        let (request, decision) = (Some(request), Some(decision));
        let outcome = |term: &str, predicted_ms, took_ms| Outcome {
            term: term.to_owned(),
            predicted_ms,
            took_ms,
        };
        let outcomes = vec![
            outcome("queue", 1.0, Some(2.0)),
            outcome("prefill", 10.0, Some(11.0)),
            outcome("first_token", 11.0, Some(13.5)),
            outcome("transfer", 2.0, None),
        ];
        ExplainResponse { request, decision, outcomes, ..ExplainResponse::default() }
    }

    #[test]
    fn what_ended_is_compared_with_its_prediction() {
        let wanted = "\
request   abababababababababababababababab
model     demo, standard, of acme
phase     finished after 250 ms, 3.0 s ago
nodes     p > d, 1 attempt
tokens    100 of the prompt, 64 of them cached; 7 generated
placed    4 ms after it arrived, of 1 prefill and 2 decode nodes
why       remote: 13.0 ms, 64% cached on p; local would be 23.3 ms
left out  e (failed it before), 2 more

   PREFILL     DECODE  CACHED         queue  pull  prefill  transfer  decode  harm  TOTAL ms
>  p           d       64             1.0    0.0   10.0     2.0       0.0     0.0   13.0
   (the same)  d       64, 96 from e  0.0    0.0   20.2     0.0       0.0     3.0   23.2

ms                   PREDICTED  TOOK
queue on the node    1.0        2.0
prefill              10.0       11.0
to the first token   11.0       13.5
transfer not hidden  2.0        -
waited here for its turn: 4 ms
KV moved: 2.0 KiB, 9 ms of it behind the prefill
in all: 250 ms
";
        assert_eq!(as_text(&explained()), wanted);
    }

    #[test]
    fn what_waits_says_for_whom_and_what_was_refused_says_why() {
        let mut waits = explained();
        let request = waits.request.as_mut().expect("there is one");
        (request.attempts, request.ended_ms) = (0, None);
        request.phase = "queued".to_owned();
        waits.outcomes.clear();
        let turn = Turn { node: "p".to_owned(), ahead: 3, ahead_ms: 1200.0, behind: 1 };
        waits.turn = Some(turn);
        let text = as_text(&waits);
        assert!(text.contains("waits     for p: 3 before it (1.2 s), 1 behind it\n"), "{text}");
        assert!(!text.contains("PREDICTED"), "{text}");

        let mut refused = waits;
        (refused.decision, refused.turn) = (None, None);
        let request = refused.request.as_mut().expect("there is one");
        (request.phase, request.error) = ("refused".to_owned(), "nobody".to_owned());
        request.ended_ms = Some(1000);
        let text = as_text(&refused);
        assert!(text.contains("phase     refused after 250 ms, 1.0 s ago: nobody\n"), "{text}");
        assert!(text.ends_with("placed    not at all\n"), "{text}");

        let left_out = vec![LeftOut { node: "d".to_owned(), why: "too_small".to_owned() }];
        refused.decision = Some(Decision { left_out, of_other_models: 3, ..Decision::default() });
        let text = as_text(&refused);
        let wanted =
            "placed    no node could take it\nleft out  d (too small), 3 of other models\n";
        assert!(text.ends_with(wanted), "{text}");
    }
}
