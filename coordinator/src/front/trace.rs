//! The spans of a call, with attributes as OpenTelemetry's
//! [conventions for generative models](https://github.com/open-telemetry/semantic-conventions-genai)
//! name them: one for all that a client asked for at once, and one under it for each completion or
//! embedding if there are several. They never hold text.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use baton_proto::trace::TraceContext;
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{FinishReason, Finished, GenerateRequest, Placement, Timings};
use baton_telemetry::{Span, SpanKind, Tracer};
use tokio::time::Instant;

use super::door::Caller;
use super::prepare::Prepared;
use super::refusal::Refusal;
use crate::core::Summary;

/// What a call is for, as the conventions name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Chat,
    Text,
    Embeddings,
}

impl Operation {
    /// Of a request for tokens.
    pub(crate) fn of(request: &GenerateRequest) -> Self {
        if matches!(request.input, Some(Input::Chat(_))) { Self::Chat } else { Self::Text }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Text => "text_completion",
            Self::Embeddings => "embeddings",
        }
    }
}

/// The span of a call. Ends when the last clone is dropped. Without a span, if the call is not traced.
#[derive(Clone)]
pub(crate) struct CallSpan {
    operation: Operation,
    tracer: Tracer,
    call: Option<Arc<Mutex<Call>>>,
}

/// What is known of a call so far.
struct Call {
    span: Span,
    /// By completion, why it ended.
    reasons: Vec<Option<&'static str>>,
    output_tokens: u64,
    cached_tokens: u64,
    first_token_ms: Option<f64>,
}

impl CallSpan {
    /// A call came at `arrived`, of a client that may have a span of its own.
    pub(crate) fn begin(
        tracer: &Tracer,
        operation: Operation,
        caller: &Caller,
        arrived: Instant,
    ) -> Self {
        let began = SystemTime::now().checked_sub(arrived.elapsed());
        let began = began.unwrap_or(SystemTime::UNIX_EPOCH);
        let span = tracer.span(operation.as_str(), SpanKind::Server, caller.trace, began);
        let call = span.map(|mut span| {
            span.set("gen_ai.operation.name", operation.as_str());
            span.set("gen_ai.provider.name", "baton");
            if let Some(server) = &caller.server {
                span.set("server.address", server.host().to_owned());
                if let Some(port) = server.port_u16() {
                    span.set("server.port", i64::from(port));
                }
            }
            let (reasons, first_token_ms) = (Vec::new(), None);
            Call { span, reasons, output_tokens: 0, cached_tokens: 0, first_token_ms }
        });
        let call = call.map(|call| Arc::new(Mutex::new(call)));
        Self { operation, tracer: tracer.clone(), call }
    }

    /// What `asked` names is `model`.
    pub(crate) fn found(&self, asked: &str, model: &str) {
        let Some(mut call) = self.lock() else { return };
        call.span.rename(format!("{} {model}", self.operation.as_str()));
        let asked = if asked.is_empty() { model } else { asked };
        call.span.set("gen_ai.request.model", asked.to_owned());
        call.span.set("gen_ai.response.model", model.to_owned());
    }

    /// These prompts are to be completed; there is at least one.
    pub(crate) fn prepared(&self, prompts: &[Prepared]) {
        let Some(mut call) = self.lock() else { return };
        let sampling = &prompts[0].sampling;
        call.span.set("gen_ai.request.max_tokens", i64::from(sampling.max_tokens));
        call.span.set("gen_ai.request.temperature", f64::from(sampling.temperature));
        call.span.set("gen_ai.request.top_p", f64::from(sampling.top_p));
        if sampling.top_k > 0 {
            call.span.set("gen_ai.request.top_k", i64::from(sampling.top_k));
        }
        // Attributes have no unsigned numbers: those from 2⁶³ are shown 2⁶⁴ less.
        call.span.set("gen_ai.request.seed", sampling.seed.cast_signed());
        if prompts[0].choices > 1 {
            call.span.set("gen_ai.request.choice.count", i64::from(prompts[0].choices));
        }
    }

    /// The prompts have so many tokens together.
    pub(crate) fn input(&self, tokens: usize) {
        if let Some(mut call) = self.lock() {
            call.span.set("gen_ai.usage.input_tokens", tokens as i64);
        }
    }

    /// Whether the client is told of tokens as they come.
    pub(crate) fn streams(&self, streams: bool) {
        if let Some(mut call) = self.lock() {
            call.span.set("gen_ai.request.stream", streams);
        }
    }

    /// Completion or embedding number `index` of `all` begins. `first`: the first of its prompt, whose
    /// tokens count once.
    pub(crate) fn part(&self, index: u32, all: u32, first: bool) -> PartSpan {
        let (name, number) = match self.operation {
            Operation::Embeddings => ("baton.embedding", "baton.input"),
            _ => ("baton.completion", "baton.choice"),
        };
        let began = SystemTime::now();
        let several = if all > 1 { self.context() } else { None };
        let own = several
            .and_then(|parent| self.tracer.span(name, SpanKind::Internal, Some(parent), began));
        let own = own.map(|mut span| {
            span.set(number, i64::from(index));
            span
        });
        if let Some(mut call) = self.lock() {
            call.reasons.resize(all as usize, None);
        }
        PartSpan { own, call: self.clone(), index, first, began }
    }

    /// There were calls of tools in a completion that has ended.
    pub(crate) fn called_tools(&self, index: u32) {
        let Some(mut call) = self.lock() else { return };
        if let Some(reason) = call.reasons.get_mut(index as usize)
            && *reason == Some("stop")
        {
            *reason = Some("tool_calls");
        }
    }

    /// The call failed, or was not begun.
    pub(crate) fn failed(&self, refusal: &Refusal) {
        if let Some(mut call) = self.lock() {
            call.span.set("error.type", format!("{:?}", refusal.code()));
            call.span.fail(&refusal.to_string());
        }
    }

    /// The client left before the end.
    pub(crate) fn left(&self) {
        if let Some(mut call) = self.lock() {
            call.span.set("error.type", "Cancelled");
        }
    }

    fn context(&self) -> Option<TraceContext> {
        self.lock().map(|call| call.span.context())
    }

    fn lock(&self) -> Option<MutexGuard<'_, Call>> {
        let call = self.call.as_ref()?;
        Some(call.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let reasons: Vec<_> = self.reasons.iter().flatten().copied().collect();
        if !reasons.is_empty() {
            self.span.set_list("gen_ai.response.finish_reasons", reasons);
            self.span.set("gen_ai.usage.output_tokens", self.output_tokens as i64);
            self.span.set("gen_ai.usage.cache_read.input_tokens", self.cached_tokens as i64);
        }
        if let Some(ms) = self.first_token_ms {
            self.span.set("gen_ai.response.time_to_first_chunk", ms / 1e3);
        }
    }
}

/// A completion or an embedding of a call. If it is the only one, the call's span is its own.
pub(crate) struct PartSpan {
    /// Before the call's, as it ends first.
    own: Option<Span>,
    call: CallSpan,
    index: u32,
    /// The first of its prompt.
    first: bool,
    began: SystemTime,
}

impl PartSpan {
    /// What nodes are told.
    pub(crate) fn context(&self) -> Option<TraceContext> {
        self.own.as_ref().map(Span::context).or_else(|| self.call.context())
    }

    /// Does something with the part's span.
    fn with(&mut self, act: impl FnOnce(&mut Span)) {
        match &mut self.own {
            Some(span) => act(span),
            None => {
                if let Some(mut call) = self.call.lock() {
                    act(&mut call.span);
                }
            }
        }
    }

    /// The completion is whole.
    pub(crate) fn finished(&mut self, id: &str, finished: &Finished) {
        self.with(|span| span.set("gen_ai.response.id", id.to_owned()));
        let times = finished.timings.unwrap_or_default();
        self.timed(&times);
        self.placed(&finished.placement.clone().unwrap_or_default());
        let Some(mut call) = self.call.lock() else { return };
        let index = self.index as usize;
        if let Some(reason) = call.reasons.get_mut(index) {
            *reason = Some(match finished.reason() {
                FinishReason::Length => "length",
                FinishReason::Stop | FinishReason::Unspecified => "stop",
            });
        }
        let usage = finished.usage.unwrap_or_default();
        call.output_tokens += u64::from(usage.completion_tokens);
        if self.first {
            call.cached_tokens += u64::from(usage.cached_tokens);
        }
        let first = call.first_token_ms.get_or_insert(times.ttft_ms);
        *first = first.min(times.ttft_ms);
    }

    fn timed(&mut self, times: &Timings) {
        self.queued(Duration::from_secs_f64(times.queue_ms.max(0.0) / 1e3));
        self.with(|span| {
            span.set("baton.place_seconds", times.place_ms / 1e3);
            span.set("baton.transfer_exposed_seconds", times.transfer_exposed_ms / 1e3);
        });
    }

    fn placed(&mut self, place: &Placement) {
        self.with(|span| {
            span.set("baton.prefill_node", place.prefill_node.clone());
            span.set("baton.decode_node", place.decode_node.clone());
            span.set("baton.attempts", i64::from(place.attempts));
        });
    }

    /// It waited so long from its beginning: here, and then on the node that computed its prompt.
    fn queued(&mut self, waited: Duration) {
        self.with(|span| span.set("baton.queue_seconds", waited.as_secs_f64()));
        let Some(context) = self.context() else { return };
        let tracer = &self.call.tracer;
        let queue = tracer.span("baton.queue", SpanKind::Internal, Some(context), self.began);
        if let Some(queue) = queue {
            queue.end(self.began + waited);
        }
    }

    /// The embedding, of so many numbers, is there.
    pub(crate) fn embedded(&mut self, summary: &Summary, dimensions: usize) {
        let Summary { usage, timings, placement, .. } = summary;
        self.queued(timings.queue);
        self.with(|span| {
            span.set("gen_ai.embeddings.dimension.count", dimensions as i64);
            span.set("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens));
            span.set("gen_ai.usage.cache_read.input_tokens", i64::from(usage.cached_tokens));
            span.set("baton.place_seconds", timings.place.as_secs_f64());
            span.set("baton.decode_node", placement.decode.to_string());
            span.set("baton.attempts", i64::from(placement.attempts));
        });
    }

    /// It failed, and its call with it.
    pub(crate) fn failed(&mut self, refusal: &Refusal) {
        if let Some(span) = &mut self.own {
            span.set("error.type", format!("{:?}", refusal.code()));
            span.fail(&refusal.to_string());
        }
        self.call.failed(refusal);
    }

    /// The client left before its end.
    pub(crate) fn left(&self) {
        self.call.left();
    }
}
