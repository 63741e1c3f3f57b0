//! `baton generate`: asks for text and prints it as it comes.

use std::path::PathBuf;

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::structured_output::Kind;
use baton_proto::wire::v1::{
    Chat, ChatMessage, FinishReason, Finished, GenerateRequest, GenerateResponse, Sampling,
    StructuredOutput, TokenIds, TokenLogprob, TokenLogprobs,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::CommandError;
use super::complete::complete;
use super::requests::{timings_json, usage_json};
use crate::client::{Target, read};
use crate::output::print;

/// Command line of `baton generate`.
#[derive(clap::Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    input: InputArgs,
    /// Which model; needed only where several are served
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    model: String,
    /// Number of completions [default: 1]
    #[arg(long, value_name = "N")]
    n: Option<u32>,
    /// Give up after this many milliseconds
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<u32>,
    /// Share cached KV blocks only with requests of the same salt
    #[arg(long, value_name = "TEXT")]
    cache_salt: Option<String>,
    /// How urgent it is: interactive, standard or batch [default: standard]
    #[arg(long, value_name = "CLASS", default_value = "", hide_default_value = true)]
    priority: String,
    /// Whose request it is
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    tenant: String,
    /// Print one JSON object at the end (with --n above 1, a list of them), log-probabilities included
    #[arg(long)]
    json: bool,
    // A heading goes on until the next one.
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    structured: StructuredArgs,
    #[command(flatten)]
    target: Target,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct InputArgs {
    /// Text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with text to continue
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    token_ids: Option<Vec<u32>>,
    /// JSON file: [{"role": "user", "content": "…"}, …]
    #[arg(long, value_name = "FILE")]
    chat: Option<PathBuf>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "What the text has to be")]
#[group(multiple = false)]
struct StructuredArgs {
    /// JSON that is valid under this schema
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Text that this regular expression matches as a whole
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    regex: Option<String>,
    /// Text of this grammar, in llguidance's variant of Lark's syntax
    #[arg(long, value_name = "FILE")]
    lark: Option<PathBuf>,
}

impl StructuredArgs {
    fn load(self) -> Result<Option<StructuredOutput>, CommandError> {
        let schema = self.json_schema.as_deref().map(read).transpose()?.map(Kind::JsonSchema);
        let lark = self.lark.as_deref().map(read).transpose()?.map(Kind::Lark);
        let kind = schema.or(self.regex.map(Kind::Regex)).or(lark);
        Ok(kind.map(|kind| StructuredOutput { kind: Some(kind) }))
    }
}

#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Fewest tokens to generate
    #[arg(long, value_name = "N")]
    min_tokens: Option<u32>,
    /// 0 is greedy
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Drop tokens less likely than this share of the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Above 1 discourages tokens already seen
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Discourages tokens already generated
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Discourages tokens by how often they were generated
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Fixes the outcome
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// End before this text; may be given again
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// End at these tokens
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    stop_token_ids: Vec<u32>,
    /// Log-probabilities with this many alternatives per token
    #[arg(long, value_name = "K", requires = "json")]
    logprobs: Option<u32>,
    /// The same for the prompt's tokens
    #[arg(long, value_name = "K", requires = "json")]
    prompt_logprobs: Option<u32>,
    /// Go on after the end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
}

impl From<SamplingArgs> for Sampling {
    fn from(args: SamplingArgs) -> Self {
        Self {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repetition_penalty: args.repetition_penalty,
            presence_penalty: args.presence_penalty,
            frequency_penalty: args.frequency_penalty,
            seed: args.seed,
            max_tokens: args.max_tokens,
            min_tokens: args.min_tokens,
            ignore_eos: args.ignore_eos.then_some(true),
            stop: args.stop,
            stop_token_ids: args.stop_token_ids,
            logprobs: args.logprobs,
            prompt_logprobs: args.prompt_logprobs,
            ..Self::default()
        }
    }
}

/// A chat message as `--chat` files hold it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    role: String,
    content: String,
}

impl InputArgs {
    fn load(self) -> Result<Input, CommandError> {
        if let Some(path) = &self.prompt_file {
            return Ok(Input::Prompt(read(path)?));
        }
        if let Some(path) = &self.chat {
            let messages: Vec<Message> = serde_json::from_str(&read(path)?)
                .map_err(|e| format!("{}: {e}", path.display()))?;
            let messages = messages
                .into_iter()
                .map(|m| ChatMessage { role: m.role, content: m.content, ..Default::default() })
                .collect();
            return Ok(Input::Chat(Chat { messages, ..Chat::default() }));
        }
        Ok(match self.token_ids {
            Some(ids) => Input::TokenIds(TokenIds { ids }),
            None => Input::Prompt(self.prompt.unwrap_or_default()),
        })
    }
}

/// One completion, put together from the messages of a stream.
#[derive(Default)]
pub(crate) struct Completion {
    pub(crate) request_id: String,
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    prompt_logprobs: Vec<TokenLogprobs>,
    pub(crate) finished: Finished,
}

impl Completion {
    pub(super) fn add(&mut self, message: GenerateResponse) {
        self.request_id = message.request_id;
        self.text += &message.text;
        self.token_ids.extend(message.token_ids);
        self.logprobs.extend(message.logprobs);
        self.prompt_logprobs.extend(message.prompt_logprobs);
        if let Some(finished) = message.finished {
            self.finished = finished;
        }
    }

    fn to_json(&self) -> Value {
        let placement = self.finished.placement.clone().unwrap_or_default();
        let mut object = json!({
            "request_id": self.request_id,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": finish_reason(self.finished.reason()),
            "matched_stop": matched_stop(&self.finished),
            "logprobs": logprobs(&self.logprobs),
            "usage": usage_json(self.finished.usage),
            "timings": timings_json(self.finished.timings),
            "placement": {
                "prefill_node": placement.prefill_node,
                "decode_node": placement.decode_node,
                "reason": placement.reason,
                "attempts": placement.attempts,
            },
        });
        if !self.prompt_logprobs.is_empty() {
            object["prompt_logprobs"] = logprobs(&self.prompt_logprobs);
        }
        object
    }
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Unspecified => "unspecified",
    }
}

fn matched_stop(finished: &Finished) -> Value {
    match (&finished.stop_string, finished.stop_token_id) {
        (Some(text), _) => json!(text),
        (None, Some(token)) => json!(token),
        (None, None) => Value::Null,
    }
}

fn logprobs(tokens: &[TokenLogprobs]) -> Value {
    let one = |t: &TokenLogprob| json!({"token_id": t.token_id, "logprob": t.logprob});
    let list = tokens.iter().map(|t| {
        let top: Vec<Value> = t.top.iter().map(one).collect();
        json!({"token_id": t.token_id, "logprob": t.logprob, "top": top})
    });
    if tokens.is_empty() { Value::Null } else { list.collect() }
}

/// Runs `baton generate`.
pub(crate) async fn run(args: GenerateArgs) -> Result<(), CommandError> {
    let streams = !args.json && args.n.unwrap_or(1) == 1;
    let request = GenerateRequest {
        model: args.model,
        sampling: Some(args.sampling.into()),
        deadline_ms: args.deadline_ms,
        cache_salt: args.cache_salt,
        priority: args.priority,
        tenant: args.tenant,
        n: args.n,
        structured_output: args.structured.load()?,
        input: Some(args.input.load()?),
        request_id: String::new(),
    };
    let show = |text: &str| if streams { print(text) } else { Ok(()) };
    let choices = complete(&args.target, request, show).await?;
    if args.json {
        let mut objects: Vec<Value> = choices.iter().map(Completion::to_json).collect();
        let value = if objects.len() == 1 { objects.remove(0) } else { Value::Array(objects) };
        print(&format!("{value}\n"))?;
    } else if streams {
        print("\n")?;
    } else {
        for (index, choice) in choices.iter().enumerate() {
            print(&format!("--- {index} ---\n{}\n", choice.text))?;
        }
    }
    Ok(())
}
