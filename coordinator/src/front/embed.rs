//! Embeddings: each input is a request to the core of its own, and all of them answer together.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::embedding::Pooling;
use baton_proto::ids::RequestId;
use baton_proto::sampling::SamplingParams;
use baton_proto::trace::TraceContext;
use baton_proto::wire::v1;
use baton_proto::wire::v1::embed_input::Input;
use baton_proto::wire::v1::{EmbedInput, EmbedRequest, EmbedResponse, Embedding, GenerateRequest};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Front;
use super::door::{Admission, Caller};
use super::inference::{count_refused, random};
use super::models::ServedModel;
use super::prepare::{salt, standing};
use super::refusal::Refusal;
use super::running::Run;
use super::trace::CompletionSpan;
use crate::core::{Core, ModelInfo, NewRequest, RequestError, SubmitError, Summary, Update, Usage};

/// Most inputs of a request, as in OpenAI's API.
pub(crate) const MAX_INPUTS: usize = 2048;
/// Inputs of one request that are placed at a time; the others wait here, and take nobody's place.
const MAX_AT_ONCE: usize = 32;

/// A request whose inputs can be embedded.
struct Prepared {
    model: Arc<ServedModel>,
    prompts: Vec<Arc<[u32]>>,
    normalize: bool,
    deadline: Option<Instant>,
    trace: Option<TraceContext>,
    /// What all inputs have in common.
    common: NewRequest,
    // Until the last input has ended.
    _admission: Admission,
    _run: Run,
}

/// One input's vector, before it is normalized.
struct Embedded {
    at: usize,
    id: RequestId,
    values: Vec<f32>,
    usage: Usage,
}

impl Front {
    /// Embeds all inputs of a request; an error is that of the first one that fails. The tenant of
    /// the caller's key is that of the request, whatever it says itself.
    pub(crate) async fn embeddings(
        &self,
        caller: &Caller,
        request: EmbedRequest,
        timeout: Option<Duration>,
        arrived: Instant,
    ) -> Result<EmbedResponse, Refusal> {
        let prepared = self.prepare_embedding(caller, request, timeout, arrived).await;
        let prepared = prepared.inspect_err(count_refused)?;
        let mut embeddings = vec![Embedding::default(); prepared.prompts.len()];
        let mut usage = v1::Usage::default();
        let mut waiting = prepared.prompts.iter().cloned().enumerate();
        // Dropping it cancels what runs.
        let mut running = JoinSet::new();
        loop {
            while running.len() < MAX_AT_ONCE
                && let Some((at, tokens)) = waiting.next()
            {
                let (request, span) = self.one_of(&prepared, tokens)?;
                running.spawn(embed_one(self.core.clone(), at, request, span));
            }
            let Some(embedded) = running.join_next().await else { break };
            let Embedded { at, id, mut values, usage: used } =
                embedded.map_err(|_| SubmitError::ShuttingDown)??;
            if prepared.normalize {
                normalize(&mut values);
            }
            embeddings[at] = Embedding { values, request_id: id.to_string() };
            usage.prompt_tokens += used.prompt_tokens;
            usage.cached_tokens += used.cached_tokens;
        }
        Ok(EmbedResponse { embeddings, usage: Some(usage), model: prepared.model.name.clone() })
    }

    async fn prepare_embedding(
        &self,
        caller: &Caller,
        mut request: EmbedRequest,
        timeout: Option<Duration>,
        arrived: Instant,
    ) -> Result<Prepared, Refusal> {
        let run = self.running.begin().ok_or(SubmitError::ShuttingDown)?;
        let admission = caller.enter()?;
        if let Some(tenant) = caller.tenant() {
            request.tenant = tenant.to_owned();
        }
        let pooling = check(&request)?;
        let standing = standing(&request.priority, &request.tenant)?;
        let salt = salt(&request.tenant, request.cache_salt.as_deref())?;
        let (model, info) = self.model_for(&named(&request)).await?;
        let (tokenizing, inputs) = (model.clone(), request.inputs);
        let tokenized = tokio::task::spawn_blocking(move || {
            let inputs = inputs.into_iter().enumerate();
            inputs.map(|(at, input)| tokens(at, input, &tokenizing, &info)).collect()
        });
        let prompts: Result<Vec<_>, Refusal> =
            tokenized.await.map_err(|_| SubmitError::ShuttingDown)?;
        let prompts = prompts?;
        admission.charge_prompt(prompts.iter().map(|tokens| tokens.len()).sum())?;
        let own = request.deadline_ms.map(|ms| Duration::from_millis(ms.into()));
        let deadline = [own, timeout].into_iter().flatten().min();
        let common = NewRequest {
            id: RequestId(0),
            model: model.name.clone(),
            tokens: Arc::default(),
            sampling: SamplingParams { max_tokens: 1, ..SamplingParams::default() },
            embed: Some(pooling),
            salt,
            standing,
            tenant: request.tenant.into(),
            deadline: None,
            trace: None,
        };
        Ok(Prepared {
            model,
            prompts,
            normalize: request.normalize.unwrap_or(true),
            deadline: deadline.map(|deadline| arrived + deadline),
            trace: caller.trace,
            common,
            _admission: admission,
            _run: run,
        })
    }

    /// The request of one input, and its span.
    fn one_of(
        &self,
        prepared: &Prepared,
        tokens: Arc<[u32]>,
    ) -> Result<(NewRequest, CompletionSpan), Refusal> {
        let left = prepared.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(Refusal::Late);
        }
        let name = &prepared.model.name;
        let span = CompletionSpan::begin_embedding(&self.tracer, prepared.trace, name);
        let id = RequestId(u128::from_ne_bytes(random()));
        let (deadline, trace) = (left, span.context());
        Ok((NewRequest { id, tokens, deadline, trace, ..prepared.common.clone() }, span))
    }
}

/// The pooling of a request whose numbers are fine.
fn check(request: &EmbedRequest) -> Result<Pooling, Refusal> {
    let count = request.inputs.len();
    if !(1..=MAX_INPUTS).contains(&count) {
        let limit = format!("from 1 to {MAX_INPUTS}");
        return Err(Refusal::field("inputs", format_args!("{count} inputs"), &limit));
    }
    if request.deadline_ms == Some(0) {
        return Err(Refusal::field("deadline_ms", 0, "at least 1"));
    }
    match v1::Pooling::try_from(request.pooling) {
        Ok(v1::Pooling::Unspecified) => Ok(Pooling::default()),
        Ok(v1::Pooling::Last) => Ok(Pooling::Last),
        Ok(v1::Pooling::Mean) => Ok(Pooling::Mean),
        Err(_) => Err(Refusal::field("pooling", request.pooling, "last or mean")),
    }
}

/// What decides which model of an alias embeds: the first input stands for all.
fn named(request: &EmbedRequest) -> GenerateRequest {
    let input = request.inputs.iter().find_map(|input| input.input.clone());
    let input = input.map(|input| match input {
        Input::Text(text) => v1::generate_request::Input::Prompt(text),
        Input::TokenIds(ids) => v1::generate_request::Input::TokenIds(ids),
    });
    GenerateRequest { model: request.model.clone(), input, ..GenerateRequest::default() }
}

/// The tokens of input number `at`.
fn tokens(
    at: usize,
    input: EmbedInput,
    model: &ServedModel,
    info: &ModelInfo,
) -> Result<Arc<[u32]>, Refusal> {
    let wrong = |what: String| Refusal::wrong(&format!("inputs[{at}]"), what);
    let tokens = match input.input {
        Some(Input::Text(text)) if !text.is_empty() => model.tokenizer.encode(&text, true)?,
        Some(Input::TokenIds(ids)) if !ids.ids.is_empty() => ids.ids,
        _ => return Err(wrong(format!("input {at} is empty"))),
    };
    if let Some(id) = tokens.iter().find(|&&id| id >= info.vocab_size) {
        let limit = format!("below the vocabulary size ({})", info.vocab_size);
        return Err(wrong(format!("an id in input {at} is {id}; it must be {limit}")));
    }
    let limit = (info.max_model_len as usize).saturating_sub(1);
    match tokens.len() {
        0 => Err(SubmitError::EmptyPrompt.into()),
        tokens if tokens > limit => Err(SubmitError::PromptTooLong { tokens, limit }.into()),
        _ => Ok(tokens.into()),
    }
}

/// One input on its way through the core. Dropping it cancels.
async fn embed_one(
    core: Core,
    at: usize,
    request: NewRequest,
    mut span: CompletionSpan,
) -> Result<Embedded, Refusal> {
    let id = request.id;
    let outcome = outcome(&core, request).await;
    match outcome {
        Ok((values, summary)) => {
            span.embedded(&summary, values.len());
            Ok(Embedded { at, id, values, usage: summary.usage })
        }
        Err(refusal) => {
            span.failed(&refusal);
            Err(refusal)
        }
    }
}

async fn outcome(core: &Core, request: NewRequest) -> Result<(Vec<f32>, Summary), Refusal> {
    let mut updates = core.submit(request).await?;
    let mut values = None;
    while let Some(update) = updates.recv().await {
        match update {
            Update::Embedding(embedding) => values = Some(embedding),
            Update::Done(summary) => {
                let nothing = || RequestError::Rejected("the node sent no embedding".to_owned());
                return Ok((values.ok_or_else(nothing)?, summary));
            }
            Update::Failed(error) => return Err(error.into()),
            Update::Tokens(_) | Update::PromptLogprobs(_) => {}
        }
    }
    Err(SubmitError::ShuttingDown.into())
}

/// Makes a vector as long as 1; one of zeros stays.
fn normalize(values: &mut [f32]) {
    let length = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        values.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}
