//! From what a client asks to what the core takes: checks, defaults, template, tokens.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use baton_proto::grammar::Grammar;
use baton_proto::hash::CacheSalt;
use baton_proto::sampling::SamplingParams;
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{Chat, ChatMessage, GenerateRequest, Sampling};

use super::conversation;
use super::models::ServedModel;
use super::refusal::Refusal;
use super::structured;
use crate::core::{ModelInfo, SubmitError};
use crate::placement::{Class, Standing, TenantId};

/// Most completions of one request.
pub(crate) const MAX_CHOICES: u32 = 16;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_SALT_BYTES: usize = 256;
const MAX_TENANT_BYTES: usize = 256;

/// A request that can be placed.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Of the first choice; each further one has the next seed.
    pub sampling: SamplingParams,
    /// Stop strings.
    pub stops: Vec<String>,
    /// What ends the output, a stop string or a stop token, is part of the text.
    pub include_stop: bool,
    /// Special tokens have no text.
    pub skip_special: bool,
    /// Completions wanted.
    pub choices: u32,
    /// Whose cached blocks may be used.
    pub salt: CacheSalt,
    /// Whose it is, and how urgent.
    pub standing: Standing,
    /// Name of the tenant.
    pub tenant: Arc<str>,
    /// From the request's arrival.
    pub deadline: Option<Duration>,
}

/// A request of which all is fine but its prompt, of which nothing is known, and its grammar, which has
/// a legal size.
pub(crate) struct Checked {
    input: Option<Input>,
    /// Without the prompt's tokens.
    prepared: Prepared,
}

impl Checked {
    /// Checks and completes a request. `drawn_seed` is for one without a seed.
    pub(crate) fn new(
        request: GenerateRequest,
        model: &ServedModel,
        info: &ModelInfo,
        drawn_seed: u64,
    ) -> Result<Self, Refusal> {
        let given = request.sampling.unwrap_or_default();
        let grammar = request.structured_output.map(structured::grammar).transpose()?;
        if grammar.is_some() && given.ignore_eos == Some(true) {
            let limit = "false with structured_output, which says where the text ends";
            return Err(Refusal::field("ignore_eos", true, limit));
        }
        let choices = request.n.unwrap_or(1);
        if !(1..=MAX_CHOICES).contains(&choices) {
            return Err(Refusal::field("n", choices, &format!("from 1 to {MAX_CHOICES}")));
        }
        if request.deadline_ms == Some(0) {
            return Err(Refusal::field("deadline_ms", 0, "at least 1"));
        }
        check_stops(&given.stop)?;
        let prepared = Prepared {
            tokens: Vec::new(),
            sampling: sampling(&given, grammar, (model, info), drawn_seed)?,
            include_stop: given.include_stop_string.unwrap_or(false),
            skip_special: given.skip_special_tokens.unwrap_or(true),
            stops: given.stop,
            choices,
            salt: salt(&request.tenant, request.cache_salt.as_deref())?,
            standing: standing(&request.priority, &request.tenant)?,
            tenant: request.tenant.into(),
            deadline: request.deadline_ms.map(|ms| Duration::from_millis(ms.into())),
        };
        Ok(Self { input: request.input, prepared })
    }

    /// What the output has to follow, if anything.
    pub(crate) fn grammar(&self) -> Option<&Arc<Grammar>> {
        self.prepared.sampling.grammar.as_ref()
    }

    /// Bytes of what is to be tokenized.
    pub(crate) fn text_bytes(&self) -> usize {
        text_bytes(self.input.as_ref())
    }

    /// Makes tokens of the prompt, which takes long if it is. `now` is for templates that tell the date.
    pub(crate) fn tokenize(
        self,
        model: &ServedModel,
        info: &ModelInfo,
        now: SystemTime,
    ) -> Result<Prepared, Refusal> {
        let tokens = prompt_tokens(self.input, model, info, true, now)?;
        let room = room_after(tokens.len(), info)?;
        let mut prepared = Prepared { tokens, ..self.prepared };
        // More than fits is no mistake: the output ends with the context.
        let sampling = &mut prepared.sampling;
        sampling.max_tokens = sampling.max_tokens.min(room);
        sampling.min_tokens = sampling.min_tokens.min(sampling.max_tokens);
        Ok(prepared)
    }
}

/// Bytes of text that a prompt is made of.
pub(crate) fn text_bytes(input: Option<&Input>) -> usize {
    match input {
        None | Some(Input::TokenIds(_)) => 0,
        Some(Input::Prompt(text)) => text.len(),
        Some(Input::Chat(chat)) => {
            let calls = |message: &ChatMessage| message.tool_calls.as_ref().map_or(0, String::len);
            let messages =
                chat.messages.iter().map(|message| message.content.len() + calls(message));
            let others = [&chat.tools, &chat.template_kwargs].into_iter().flatten();
            messages.chain(others.map(String::len)).sum()
        }
    }
}

/// An empty priority or tenant is that of all requests that name none.
pub(super) fn standing(priority: &str, tenant: &str) -> Result<Standing, Refusal> {
    let class = match priority {
        "" => Class::default(),
        name => Class::parse(name).ok_or_else(|| {
            Refusal::field("priority", format!("{name:?}"), "interactive, standard or batch")
        })?,
    };
    if tenant.len() > MAX_TENANT_BYTES {
        let what = format!("at most {MAX_TENANT_BYTES} bytes long");
        return Err(Refusal::field("tenant", format_args!("{} bytes long", tenant.len()), &what));
    }
    Ok(Standing { class, tenant: TenantId::named(tenant) })
}

/// The tokens of a prompt. `add_special_tokens` is for a plain text.
pub(crate) fn prompt_tokens(
    input: Option<Input>,
    model: &ServedModel,
    info: &ModelInfo,
    add_special_tokens: bool,
    now: SystemTime,
) -> Result<Vec<u32>, Refusal> {
    match input {
        None => Err(Refusal::wrong("prompt", "one of prompt, token_ids and chat is required")),
        Some(Input::Prompt(text)) if text.is_empty() => {
            Err(Refusal::wrong("prompt", "prompt is empty"))
        }
        Some(Input::Prompt(text)) => Ok(model.tokenizer.encode(&text, add_special_tokens)?),
        Some(Input::TokenIds(tokens)) if tokens.ids.is_empty() => {
            Err(Refusal::wrong("token_ids", "token_ids is empty"))
        }
        Some(Input::TokenIds(tokens)) => match tokens.ids.iter().find(|&&t| t >= info.vocab_size) {
            Some(id) => {
                let limit = format!("ids below the vocabulary size ({})", info.vocab_size);
                let what = format!("an id in token_ids is {id}; it must be {limit}");
                Err(Refusal::wrong("token_ids", what))
            }
            None => Ok(tokens.ids),
        },
        Some(Input::Chat(chat)) => chat_prompt(&chat, model, now),
    }
}

fn chat_prompt(chat: &Chat, model: &ServedModel, now: SystemTime) -> Result<Vec<u32>, Refusal> {
    let Some(template) = &model.chat else {
        let what = format!("model {:?} has no chat template; send prompt instead", model.name);
        return Err(Refusal::wrong("chat", what));
    };
    if chat.messages.is_empty() {
        return Err(Refusal::wrong("chat.messages", "chat.messages is empty"));
    }
    let text = conversation::render(chat, template, now)?;
    Ok(model.tokenizer.encode(&text, false)?)
}

/// Tokens that fit behind a prompt; at least one must.
fn room_after(prompt_tokens: usize, info: &ModelInfo) -> Result<u32, SubmitError> {
    let limit = (info.max_model_len as usize).saturating_sub(1);
    match prompt_tokens {
        0 => Err(SubmitError::EmptyPrompt),
        tokens if tokens > limit => Err(SubmitError::PromptTooLong { tokens, limit }),
        tokens => Ok(info.max_model_len - tokens as u32),
    }
}

/// With as many tokens as there could be room for.
fn sampling(
    given: &Sampling,
    grammar: Option<Arc<Grammar>>,
    (ServedModel { defaults, .. }, info): (&ServedModel, &ModelInfo),
    drawn_seed: u64,
) -> Result<SamplingParams, Refusal> {
    let unset = SamplingParams::default();
    let float = |given: Option<f32>, checkpoint: Option<f32>, unset: f32| {
        given.or(checkpoint).unwrap_or(unset)
    };
    let mut logit_bias: Vec<_> = given.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect();
    logit_bias.sort_by_key(|&(id, _)| id);
    let params = SamplingParams {
        temperature: float(given.temperature, defaults.temperature, unset.temperature),
        top_k: given.top_k.or(defaults.top_k).unwrap_or(unset.top_k),
        top_p: float(given.top_p, defaults.top_p, unset.top_p),
        min_p: float(given.min_p, defaults.min_p, unset.min_p),
        repetition_penalty: float(
            given.repetition_penalty,
            defaults.repetition_penalty,
            unset.repetition_penalty,
        ),
        presence_penalty: given.presence_penalty.unwrap_or(unset.presence_penalty),
        frequency_penalty: given.frequency_penalty.unwrap_or(unset.frequency_penalty),
        logit_bias,
        seed: given.seed.unwrap_or(drawn_seed),
        max_tokens: given.max_tokens.unwrap_or(info.max_model_len),
        min_tokens: given.min_tokens.unwrap_or(unset.min_tokens),
        eos_token_ids: match given.ignore_eos {
            Some(true) => Vec::new(),
            _ => defaults.eos_token_ids.clone(),
        },
        stop_token_ids: given.stop_token_ids.clone(),
        logprobs: given.logprobs,
        prompt_logprobs: given.prompt_logprobs,
        grammar,
    };
    params.check(info.vocab_size)?;
    Ok(params)
}

fn check_stops(stops: &[String]) -> Result<(), Refusal> {
    if stops.len() > MAX_STOPS {
        let given = stops.len();
        let what = format!("the number of stop strings is {given}; it must be at most {MAX_STOPS}");
        return Err(Refusal::wrong("stop", what));
    }
    let wrong = stops.iter().find(|stop| !(1..=MAX_STOP_BYTES).contains(&stop.len()));
    wrong.map_or(Ok(()), |stop| {
        let given = stop.len();
        let limit = format!("from 1 to {MAX_STOP_BYTES} bytes long");
        Err(Refusal::wrong("stop", format!("a stop string is {given} bytes; it must be {limit}")))
    })
}

/// A tenant is a salt of its own, so that nobody learns from the time to the first token what others
/// have asked; a salt of the request divides the tenant's own cache.
pub(super) fn salt(tenant: &str, salt: Option<&str>) -> Result<CacheSalt, Refusal> {
    if let Some(salt) = salt.filter(|salt| salt.len() > MAX_SALT_BYTES) {
        let given = salt.len();
        let what = format!("cache_salt's length is {given}; it must be at most {MAX_SALT_BYTES}");
        return Err(Refusal::wrong("cache_salt", what));
    }
    Ok(CacheSalt::of(Some(tenant).filter(|tenant| !tenant.is_empty()), salt))
}
