//! Embeddings: each input is a request to the core of its own, and all of them answer together.

mod inputs;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use baton_proto::ids::RequestId;
use baton_proto::sampling::SamplingParams;
use baton_proto::wire::v1;
use baton_proto::wire::v1::{EmbedInput, EmbedRequest, EmbedResponse, Embedding, GenerateRequest};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::inputs::{check, check_size, text_bytes, tokens};
use super::Front;
use super::door::{Admission, Caller};
use super::inference::{count_refused, random};
use super::models::ServedModel;
use super::names::Named;
use super::prepare::{salt, standing};
use super::refusal::Refusal;
use super::running::Run;
use super::trace::{CallSpan, Operation, PartSpan};
use crate::core::{
    Core, ModelInfo, NewRequest, RequestError, SubmitError, Summary, Update, Updates, Usage,
};

pub(crate) use self::inputs::MAX_INPUTS;

/// Inputs of one request that are placed at a time; the others wait here, and take nobody's place.
const MAX_AT_ONCE: usize = 32;
/// How often an input is submitted, while the cluster is full and others have their vectors.
const MAX_SUBMITS: usize = 60;

/// A request whose inputs can be embedded.
struct Prepared {
    model: Arc<ServedModel>,
    prompts: Vec<Arc<[u32]>>,
    normalize: bool,
    deadline: Option<Instant>,
    span: CallSpan,
    /// What all inputs have in common.
    common: NewRequest,
    /// Of all prompts, as they were charged.
    prompt_tokens: usize,
    // Until the last input has ended.
    _name: Option<Named>,
    admission: Admission,
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
        let span = CallSpan::begin(&self.tracer, Operation::Embeddings, caller, arrived);
        let embedded = self.embed_all(caller, request, timeout, arrived, &span).await;
        embedded.inspect_err(|refusal| {
            span.failed(refusal);
            if !matches!(refusal, Refusal::Failed { .. }) {
                count_refused(refusal);
            }
        })
    }

    async fn embed_all(
        &self,
        caller: &Caller,
        request: EmbedRequest,
        timeout: Option<Duration>,
        arrived: Instant,
        span: &CallSpan,
    ) -> Result<EmbedResponse, Refusal> {
        let prepared = self.prepare_embedding(caller, request, timeout, arrived, span).await?;
        let accepted = Arc::new(AtomicBool::new(false));
        self.embed_prepared(&prepared, &accepted).await.inspect_err(|refusal| {
            if matches!(refusal, Refusal::Submit(_)) && !accepted.load(Ordering::Relaxed) {
                prepared.admission.refund_prompt(prepared.prompt_tokens);
            }
        })
    }

    async fn embed_prepared(
        &self,
        prepared: &Prepared,
        accepted: &Arc<AtomicBool>,
    ) -> Result<EmbedResponse, Refusal> {
        let mut embeddings = vec![Embedding::default(); prepared.prompts.len()];
        let mut usage = v1::Usage::default();
        let mut waiting = prepared.prompts.iter().cloned().enumerate();
        // Dropping it cancels what runs.
        let mut running = JoinSet::new();
        loop {
            while running.len() < MAX_AT_ONCE
                && let Some((at, tokens)) = waiting.next()
            {
                let (request, span) = one_of(prepared, at, tokens)?;
                running.spawn(embed_one(self.core.clone(), at, request, span, accepted.clone()));
            }
            let Some(embedded) = running.join_next().await else { break };
            let Embedded { at, id, mut values, usage: used } =
                embedded.map_err(|_| Refusal::Internal)??;
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
        span: &CallSpan,
    ) -> Result<Prepared, Refusal> {
        let run = self.running.begin().ok_or(SubmitError::ShuttingDown)?;
        let admission = caller.enter()?;
        if let Some(tenant) = caller.tenant() {
            request.tenant = tenant.to_owned();
        }
        let name = caller.name_of(&named(&request))?;
        let name = name.map(|name| self.names.take(name)).transpose()?;
        let pooling = check(&request)?;
        let standing = standing(&request.priority, &request.tenant)?;
        let salt = salt(&request.tenant, request.cache_salt.as_deref())?;
        self.one_model(&request.model)?;
        let (model, info) = self.model_for(&named(&request)).await?;
        span.found(&request.model, &model.name);
        check_size(request.inputs.len(), info.hidden_size as usize)?;
        let prompts = self.prompts_of(request.inputs, &model, info).await?;
        let prompt_tokens = prompts.iter().map(|tokens| tokens.len()).sum();
        admission.charge_prompt(prompt_tokens)?;
        span.input(prompt_tokens);
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
            span: span.clone(),
            common,
            prompt_tokens,
            _name: name,
            admission,
            _run: run,
        })
    }

    /// The tokens of all inputs.
    async fn prompts_of(
        &self,
        inputs: Vec<EmbedInput>,
        model: &Arc<ServedModel>,
        info: ModelInfo,
    ) -> Result<Vec<Arc<[u32]>>, Refusal> {
        let (model, bytes) = (model.clone(), inputs.iter().map(text_bytes).sum());
        let tokenize = move || {
            let inputs = inputs.into_iter().enumerate();
            inputs.map(|(at, input)| tokens(at, input, &model, &info)).collect()
        };
        self.computing.run(bytes, tokenize).await?
    }

    /// Vectors of several models cannot be compared, so an alias must not choose among them.
    fn one_model(&self, name: &str) -> Result<(), Refusal> {
        match self.aliases.names().find(|(alias, models)| *alias == name && models.len() > 1) {
            None => Ok(()),
            Some((alias, models)) => {
                let models = models.join(", ");
                let what = format!("model is {alias:?}, which is several models ({models})");
                Err(Refusal::wrong("model", what + "; embeddings must name one of them"))
            }
        }
    }
}

/// The request of input number `at`, and its span.
fn one_of(
    prepared: &Prepared,
    at: usize,
    tokens: Arc<[u32]>,
) -> Result<(NewRequest, PartSpan), Refusal> {
    let deadline = prepared.deadline.map(|at| at.saturating_duration_since(Instant::now()));
    if deadline.is_some_and(|left| left.is_zero()) {
        return Err(Refusal::Late);
    }
    let span = prepared.span.part(at as u32, prepared.prompts.len() as u32, true);
    let (id, trace) = (RequestId(u128::from_ne_bytes(random())), span.context());
    Ok((NewRequest { id, tokens, deadline, trace, ..prepared.common.clone() }, span))
}

/// A request for tokens of the same model and tenant: what both kinds have in common reads that.
fn named(request: &EmbedRequest) -> GenerateRequest {
    let (model, tenant) = (request.model.clone(), request.tenant.clone());
    GenerateRequest { model, tenant, ..GenerateRequest::default() }
}

/// One input on its way through the core. Dropping it cancels.
async fn embed_one(
    core: Core,
    at: usize,
    request: NewRequest,
    mut span: PartSpan,
    accepted: Arc<AtomicBool>,
) -> Result<Embedded, Refusal> {
    let id = request.id;
    let outcome = outcome(&core, request, &accepted).await;
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

async fn outcome(
    core: &Core,
    request: NewRequest,
    accepted: &AtomicBool,
) -> Result<(Vec<f32>, Summary), Refusal> {
    let mut updates = submit(core, request, accepted).await?;
    accepted.store(true, Ordering::Relaxed);
    let mut values = None;
    while let Some(update) = updates.recv().await {
        match update {
            Update::Embedding(embedding) => values = Some(embedding),
            Update::Done(summary) => {
                let nothing = "the node sent no embedding".to_owned();
                let nothing = || Refusal::failed(RequestError::Rejected(nothing));
                return Ok((values.ok_or_else(nothing)?, summary));
            }
            Update::Failed(error) => return Err(Refusal::failed(error)),
            Update::Tokens(_) | Update::PromptLogprobs(_) => {}
        }
    }
    Err(SubmitError::ShuttingDown.into())
}

/// Submits one input. Once others are accepted it waits for room, if its deadline allows: the
/// whole request would have to be sent again.
async fn submit(
    core: &Core,
    mut request: NewRequest,
    accepted: &AtomicBool,
) -> Result<Updates, SubmitError> {
    let deadline = request.deadline.map(|left| Instant::now() + left);
    for _ in 1..MAX_SUBMITS {
        let wait = match core.submit(request.clone()).await {
            Err(SubmitError::Overloaded { retry_after }) => retry_after,
            submitted => return submitted,
        };
        let then = Instant::now() + wait;
        let late = deadline.is_some_and(|deadline| deadline <= then);
        if late || !accepted.load(Ordering::Relaxed) {
            return Err(SubmitError::Overloaded { retry_after: wait });
        }
        tokio::time::sleep_until(then).await;
        request.deadline = deadline.map(|deadline| deadline.saturating_duration_since(then));
    }
    core.submit(request).await
}

/// Makes a vector as long as 1; one of zeros stays.
fn normalize(values: &mut [f32]) {
    let length = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        values.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}
