//! The span of a completion or an embedding, with attributes as OpenTelemetry's
//! [conventions for generative models](https://github.com/open-telemetry/semantic-conventions-genai)
//! name them. It never holds text.

use std::time::SystemTime;

use baton_proto::sampling::SamplingParams;
use baton_proto::trace::TraceContext;
use baton_proto::wire::v1::{FinishReason, Finished};
use baton_telemetry::{Span, SpanKind, Tracer};

use crate::core::Summary;

/// Ends when it is dropped. Empty, if the completion is not traced.
pub(crate) struct CompletionSpan(Option<Span>);

impl CompletionSpan {
    /// A completion of `model` begins, for a client that may have a span of its own.
    pub(crate) fn begin(
        tracer: &Tracer,
        client: Option<TraceContext>,
        model: &str,
        sampling: &SamplingParams,
    ) -> Self {
        let began = SystemTime::now();
        let span = tracer.span(format!("generate {model}"), SpanKind::Server, client, began);
        Self(span.map(|mut span| {
            span.set("gen_ai.operation.name", "generate_content");
            span.set("gen_ai.provider.name", "baton");
            span.set("gen_ai.request.model", model.to_owned());
            span.set("gen_ai.request.max_tokens", i64::from(sampling.max_tokens));
            span.set("gen_ai.request.temperature", f64::from(sampling.temperature));
            span.set("gen_ai.request.top_p", f64::from(sampling.top_p));
            span
        }))
    }

    /// A prompt is embedded by `model`, for a client that may have a span of its own.
    pub(crate) fn begin_embedding(
        tracer: &Tracer,
        client: Option<TraceContext>,
        model: &str,
    ) -> Self {
        let (name, began) = (format!("embeddings {model}"), SystemTime::now());
        Self(tracer.span(name, SpanKind::Server, client, began).map(|mut span| {
            span.set("gen_ai.operation.name", "embeddings");
            span.set("gen_ai.provider.name", "baton");
            span.set("gen_ai.request.model", model.to_owned());
            span
        }))
    }

    /// The embedding is there.
    pub(crate) fn embedded(&mut self, summary: &Summary, dimensions: usize) {
        let Some(span) = &mut self.0 else { return };
        let Summary { usage, timings, placement, .. } = summary;
        span.set("gen_ai.embeddings.dimension.count", dimensions as i64);
        span.set("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens));
        span.set("gen_ai.usage.cache_read.input_tokens", i64::from(usage.cached_tokens));
        span.set("baton.queue_seconds", timings.queue.as_secs_f64());
        span.set("baton.place_seconds", timings.place.as_secs_f64());
        span.set("baton.decode_node", placement.decode.to_string());
        span.set("baton.attempts", i64::from(placement.attempts));
    }

    /// What nodes are told.
    pub(crate) fn context(&self) -> Option<TraceContext> {
        self.0.as_ref().map(Span::context)
    }

    /// The completion is whole.
    pub(crate) fn finished(&mut self, id: &str, finished: &Finished) {
        let Some(span) = &mut self.0 else { return };
        span.set("gen_ai.response.id", id.to_owned());
        let reason = match finished.reason() {
            FinishReason::Length => "length",
            FinishReason::Stop | FinishReason::Unspecified => "stop",
        };
        span.set("gen_ai.response.finish_reasons", reason);
        if let Some(usage) = &finished.usage {
            span.set("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens));
            span.set("gen_ai.usage.output_tokens", i64::from(usage.completion_tokens));
            span.set("gen_ai.usage.cache_read.input_tokens", i64::from(usage.cached_tokens));
        }
        if let Some(times) = &finished.timings {
            span.set("gen_ai.response.time_to_first_chunk", times.ttft_ms / 1e3);
            span.set("baton.queue_seconds", times.queue_ms / 1e3);
            span.set("baton.place_seconds", times.place_ms / 1e3);
            span.set("baton.transfer_exposed_seconds", times.transfer_exposed_ms / 1e3);
        }
        if let Some(place) = &finished.placement {
            span.set("baton.prefill_node", place.prefill_node.clone());
            span.set("baton.decode_node", place.decode_node.clone());
            span.set("baton.attempts", i64::from(place.attempts));
        }
    }

    /// The completion failed.
    pub(crate) fn failed(&mut self, reason: &dyn std::error::Error) {
        if let Some(span) = &mut self.0 {
            span.fail(&reason.to_string());
        }
    }
}
