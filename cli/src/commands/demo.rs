//! `baton demo`: a cluster on this machine, three questions about one long document, and what
//! each cost: cold, with the document's KV blocks in the prefix caches, and as a follow-up.

use std::path::{Path, PathBuf};

use baton_cli::launcher::{Cluster, ClusterOptions, bundled_model};
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{Chat, ChatMessage, GenerateRequest, Sampling};
use serde::Deserialize;

use super::CommandError;
use super::complete::complete;
use super::generate::Completion;
use crate::client::{Target, read};
use crate::output::{bytes, print};

/// KV cache of a node: for ten times the document.
const KV_MEMORY: &str = "64MiB";

const LABELS: [&str; 3] = ["cold", "warm prefix", "follow-up"];

/// Command line of `baton demo`.
#[derive(clap::Args)]
pub(crate) struct DemoArgs {
    /// Prefill nodes
    #[arg(long, value_name = "N", default_value_t = 1)]
    prefill: u32,
    /// Decode nodes
    #[arg(long, value_name = "N", default_value_t = 1)]
    decode: u32,
    /// What nodes compute on: `cpu`, `cuda`, `cuda:N` or `auto` [default: auto]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Folder with the libraries of CUDA
    #[arg(long, value_name = "DIR")]
    cuda_libraries: Option<PathBuf>,
}

/// `questions.json` beside the demo model.
#[derive(Deserialize)]
struct Script {
    system: String,
    questions: Vec<Question>,
}

#[derive(Deserialize)]
struct Question {
    ask: String,
    expect: String,
}

fn load(model: &Path) -> Result<(String, Vec<Question>), CommandError> {
    let script: Script = serde_json::from_str(&read(&model.join("questions.json"))?)?;
    let document = read(&model.join("document.txt"))?;
    Ok((script.system + document.trim_end(), script.questions))
}

/// Runs `baton demo`.
pub(crate) async fn run(args: DemoArgs) -> Result<(), CommandError> {
    let model = bundled_model()?;
    let (system, questions) = load(&model)?;
    let options = ClusterOptions {
        prefill: args.prefill,
        decode: args.decode,
        device: args.device,
        cuda_libraries: args.cuda_libraries,
        // Nodes may share a GPU.
        kv_memory: Some(KV_MEMORY.to_owned()),
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(options).await?;
    let result = ask_all(&Target::new(&cluster.grpc().to_string()), &system, &questions).await;
    cluster.stop().await;
    match result? {
        0 => Ok(print("\nAll answers are right.\n")?),
        wrong => Err(format!("{wrong} of {} answers are wrong", questions.len()).into()),
    }
}

/// Asks every question; the last one follows up on the one before. Returns how many were wrong.
async fn ask_all(
    target: &Target,
    system: &str,
    questions: &[Question],
) -> Result<usize, CommandError> {
    let words = system.split(' ').count();
    print(&format!("One document of {words} words, {} questions about it.\n", questions.len()))?;
    let mut wrong = 0;
    let mut messages = Vec::new();
    for (index, question) in questions.iter().enumerate() {
        if index + 1 < questions.len() {
            messages = vec![message("system", system)];
        }
        messages.push(message("user", &question.ask));
        let answer = ask(target, &messages).await?;
        let (label, text) = (LABELS.get(index).unwrap_or(&"question"), answer.text.trim());
        print(&format!("\n{label} — {}\n  {text}\n{}", question.ask, cost(&answer)))?;
        if text != question.expect {
            print(&format!("  WRONG: expected {:?}\n", question.expect))?;
            wrong += 1;
        }
        messages.push(message("assistant", &question.expect));
    }
    Ok(wrong)
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned(), ..ChatMessage::default() }
}

async fn ask(target: &Target, messages: &[ChatMessage]) -> Result<Completion, CommandError> {
    let chat = Chat { messages: messages.to_vec(), ..Chat::default() };
    let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(64), ..Sampling::default() };
    let request = GenerateRequest {
        input: Some(Input::Chat(chat)),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    };
    let mut choices = complete(target, request, |_| Ok(())).await?;
    Ok(choices.remove(0))
}

fn cost(answer: &Completion) -> String {
    let usage = answer.finished.usage.unwrap_or_default();
    let timings = answer.finished.timings.unwrap_or_default();
    let placement = answer.finished.placement.clone().unwrap_or_default();
    let nodes = match placement.prefill_node.as_str() {
        "" => placement.decode_node,
        prefill => format!("{prefill} -> {}", placement.decode_node),
    };
    format!(
        "  first token {:.1} ms | {} of {} prompt tokens cached | prefill {:.1} ms\n  \
         {} of KV moved: {:.1} ms hidden behind prefill, {:.1} ms not\n  {nodes}: {}\n",
        timings.ttft_ms,
        usage.cached_tokens,
        usage.prompt_tokens,
        timings.prefill_ms,
        bytes(timings.transfer_bytes),
        timings.transfer_hidden_ms,
        timings.transfer_exposed_ms,
        placement.reason,
    )
}
