//! `baton.v1.Inference`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use baton_proto::ids::RequestId;
use baton_proto::wire::v1::inference_server::Inference;
use baton_proto::wire::v1::{
    DetokenizeRequest, DetokenizeResponse, EmbedRequest, EmbedResponse, GenerateRequest,
    GenerateResponse, TokenizeRequest, TokenizeResponse,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::Front;
use super::choice::Choice;
use super::completion::{self, Accepted, Message, Ticket};
use super::door::Caller;
use super::models::ServedModel;
use super::prepare::{Checked, Prepared, prompt_tokens, text_bytes};
use super::refusal::Refusal;
use super::trace::{CallSpan, Operation};
use crate::core::{ModelInfo, NewRequest, SubmitError};

/// Completions under way. Dropping it cancels them.
pub(crate) struct Started {
    /// The model that answers.
    pub(crate) model: Arc<ServedModel>,
    /// Under which the core knows the first completion.
    pub(crate) id: RequestId,
    /// Token ids of each request's prompt.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Of all completions; an error is the last one.
    pub(crate) messages: mpsc::Receiver<Message>,
    /// Ends when nobody has it any more.
    pub(crate) span: CallSpan,
}

#[tonic::async_trait]
impl Inference for Front {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived = Instant::now();
        let timeout = grpc_timeout(request.metadata());
        let caller = Caller::of(request.extensions())?;
        let requests = vec![request.into_inner()];
        let started = self.start(&caller, requests, timeout, arrived).await?;
        started.span.streams(true);
        let messages = ReceiverStream::new(started.messages);
        Ok(Response::new(Box::pin(messages.map(|message| message.map_err(Status::from)))))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        Ok(Response::new(self.token_ids(request.into_inner()).await?))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        Ok(Response::new(self.text_of(request.into_inner()).await?))
    }

    async fn embed(
        &self,
        request: Request<EmbedRequest>,
    ) -> Result<Response<EmbedResponse>, Status> {
        let arrived = Instant::now();
        let timeout = grpc_timeout(request.metadata());
        let caller = Caller::of(request.extensions())?;
        let embedded = self.embeddings(&caller, request.into_inner(), timeout, arrived).await;
        Ok(Response::new(embedded?))
    }
}

impl Front {
    /// Starts all of `requests` or none; there is at least one, and the first one's model serves all.
    /// Each message names its completion: those of a request follow those of the one before.
    /// The tenant of the caller's key is that of all requests, whatever they say themselves.
    pub(crate) async fn start(
        &self,
        caller: &Caller,
        requests: Vec<GenerateRequest>,
        timeout: Option<Duration>,
        arrived: Instant,
    ) -> Result<Started, Refusal> {
        let span = CallSpan::begin(&self.tracer, Operation::of(&requests[0]), caller, arrived);
        let started = self.start_all(caller, requests, timeout, arrived, &span).await;
        started.inspect_err(|refusal| {
            span.failed(refusal);
            count_refused(refusal);
        })
    }

    async fn start_all(
        &self,
        caller: &Caller,
        requests: Vec<GenerateRequest>,
        timeout: Option<Duration>,
        arrived: Instant,
        span: &CallSpan,
    ) -> Result<Started, Refusal> {
        let begun = self.running.begin().ok_or(SubmitError::ShuttingDown)?;
        let ticket = Ticket::new(caller.enter()?, begun);
        let name = caller.name_of(&requests[0])?.map(|name| self.names.take(name)).transpose()?;
        let (model, info) = self.model_for(&requests[0]).await?;
        span.found(&requests[0].model, &model.name);
        let mut all = Vec::new();
        for mut request in requests {
            if let Some(tenant) = caller.tenant() {
                request.tenant = tenant.to_owned();
            }
            let own = request.deadline_ms.map(|ms| Duration::from_millis(ms.into()));
            let most = [own, timeout].into_iter().flatten().min();
            let preparing = self.prepare(request, &model, &info);
            all.push(before(most.map(|most| arrived + most), preparing).await?);
        }
        let prompt_tokens = all.iter().map(|prepared| prepared.tokens.len()).sum();
        ticket.admission.charge_prompt(prompt_tokens)?;
        span.prepared(&all);
        span.input(prompt_tokens);
        let completions = all.iter().map(|prepared| prepared.choices).sum();
        let mut accepted = Vec::new();
        for prepared in &all {
            let deadline = [prepared.deadline, timeout].into_iter().flatten().min();
            let deadline = deadline.map(|deadline| arrived + deadline);
            let submitted = self
                .submit_all(&model, prepared, deadline, (span, completions), &mut accepted)
                .await;
            // What was accepted may have been computed by now.
            let nothing_begun = accepted.is_empty();
            submitted.inspect_err(|_| {
                if nothing_begun {
                    ticket.admission.refund_prompt(prompt_tokens);
                }
            })?;
        }
        let prompts = all.into_iter().map(|prepared| prepared.tokens).collect();
        let id = accepted[0].updates.id();
        let messages = completion::run_all(accepted, &self.core, ticket, name);
        Ok(Started { model, id, prompts, messages, span: span.clone() })
    }

    /// Checks and completes a request, and makes tokens of its prompt.
    async fn prepare(
        &self,
        request: GenerateRequest,
        model: &Arc<ServedModel>,
        info: &ModelInfo,
    ) -> Result<Prepared, Refusal> {
        let checked = Checked::new(request, model, info, u64::from_ne_bytes(random()))?;
        if let Some(grammar) = checked.grammar() {
            self.compiler.check(grammar, model).await?;
        }
        let (model, info) = (model.clone(), info.clone());
        let (bytes, now) = (checked.text_bytes(), SystemTime::now());
        self.computing.run(bytes, move || checked.tokenize(&model, &info, now)).await?
    }

    /// The tokens of a request's prompt, and whose they are.
    pub(crate) async fn tokenize(
        &self,
        request: GenerateRequest,
        add_special_tokens: bool,
    ) -> Result<(Arc<ServedModel>, ModelInfo, Vec<u32>), Refusal> {
        let (model, info) = self.model_for(&request).await?;
        let (bytes, now) = (text_bytes(request.input.as_ref()), SystemTime::now());
        let tokenizing = move || {
            let tokens = prompt_tokens(request.input, &model, &info, add_special_tokens, now)?;
            Ok((model, info, tokens))
        };
        self.computing.run(bytes, tokenizing).await?
    }

    /// The model that serves a request.
    pub(crate) async fn model_for(
        &self,
        request: &GenerateRequest,
    ) -> Result<(Arc<ServedModel>, ModelInfo), Refusal> {
        let model = match self.aliases.resolve(request, &self.core).await? {
            Some(model) => model,
            None => self.models.get(&request.model)?.clone(),
        };
        let info = self.core.model(&model.name);
        let info = info.ok_or_else(|| SubmitError::NoNodes(model.name.clone()))?;
        Ok((model, info))
    }

    /// Adds a request's completions to those that the core has accepted. Dropping these cancels them.
    /// They are some of so `many` of a call.
    async fn submit_all(
        &self,
        model: &ServedModel,
        prepared: &Prepared,
        deadline: Option<Instant>,
        (call, many): (&CallSpan, u32),
        accepted: &mut Vec<Accepted>,
    ) -> Result<(), Refusal> {
        for index in 0..prepared.choices {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Refusal::Late);
            }
            let mut sampling = prepared.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index.into());
            let id = RequestId(u128::from_ne_bytes(random()));
            let number = accepted.len() as u32;
            let choice = Choice::new(number, id, model, prepared);
            let span = call.part(number, many, index == 0);
            let request = NewRequest {
                id,
                model: model.name.clone(),
                tokens: prepared.tokens.as_slice().into(),
                sampling,
                embed: None,
                salt: prepared.salt,
                standing: prepared.standing,
                tenant: prepared.tenant.clone(),
                deadline: left,
                trace: span.context(),
            };
            accepted.push(Accepted { choice, updates: self.core.submit(request).await?, span });
        }
        Ok(())
    }
}

/// A long text may wait for its turn, but not beyond its request's deadline.
async fn before<T>(
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    match deadline {
        Some(deadline) => timeout_at(deadline, work).await.map_err(|_| Refusal::Late)?,
        None => work.await,
    }
}

/// A request was not begun.
pub(super) fn count_refused(refusal: &Refusal) {
    let code = format!("{:?}", refusal.code());
    metrics::counter!("baton_refused_requests_total", "code" => code).increment(1);
}

/// The deadline that a gRPC client sends along: up to eight digits and a unit. One that cannot be
/// read is none, as in other gRPC servers.
pub(super) fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_grpc_timeouts() {
        let parse = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            grpc_timeout(&metadata)
        };
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "m", "-1S", "+1S", "1", "1x", "123456789S", "1.5S"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
