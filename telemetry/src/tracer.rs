//! Traces over OTLP: spans are batched and sent by a thread of their own, and dropped when it cannot
//! keep up, so that a collector that is slow or dead costs nothing.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use baton_proto::trace::TraceContext;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer as _, TracerProvider,
};
use opentelemetry::{Array, Context, KeyValue, StringValue};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider,
};

pub use opentelemetry::Value;
pub use opentelemetry::trace::SpanKind;

/// Spans that wait to be sent; further ones are dropped.
const MAX_WAITING_SPANS: usize = 8192;
const MAX_BATCH_SPANS: usize = 512;
const SEND_INTERVAL: Duration = Duration::from_secs(1);
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Traces cannot be sent to where the configuration says.
#[derive(Debug, thiserror::Error)]
#[error("otlp_endpoint is {endpoint:?}: {source}")]
pub struct StartError {
    endpoint: String,
    source: ExporterBuildError,
}

/// Makes spans; without a collector it makes none. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Tracer(Option<SdkTracer>);

/// A span that is not over yet; dropping it ends it now.
#[derive(Debug)]
pub struct Span(opentelemetry_sdk::trace::Span);

impl Tracer {
    /// Sends spans of `service`, one of whose processes is `instance`, over gRPC to `endpoint`, e.g.
    /// `http://127.0.0.1:4317`. Of the traces that begin here the share `ratio`, from 0 to 1, is
    /// recorded; others as whoever began them says. Must be called in a tokio runtime.
    pub fn start(
        endpoint: &str,
        service: &'static str,
        instance: &str,
        ratio: f64,
    ) -> Result<Self, StartError> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint);
        let exporter = exporter.with_timeout(SEND_TIMEOUT).build();
        let failed = |source| StartError { endpoint: endpoint.to_owned(), source };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(MAX_WAITING_SPANS)
            .with_max_export_batch_size(MAX_BATCH_SPANS)
            .with_scheduled_delay(SEND_INTERVAL)
            .build();
        let processor = BatchSpanProcessor::builder(exporter.map_err(failed)?)
            .with_batch_config(batches)
            .build();
        let resource = Resource::builder_empty()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(resource)
            .build();
        Ok(Self(Some(provider.tracer("baton"))))
    }

    /// Begins a span under `parent`, or a trace. `None` if it is not recorded.
    #[must_use]
    pub fn span(
        &self,
        name: impl Into<Cow<'static, str>>,
        kind: SpanKind,
        parent: Option<TraceContext>,
        began: SystemTime,
    ) -> Option<Span> {
        let tracer = self.0.as_ref()?;
        let parent = parent.map_or_else(Context::new, |parent| {
            Context::new().with_remote_span_context(span_context(parent))
        });
        let span = SpanBuilder::from_name(name).with_kind(kind).with_start_time(began);
        let span = tracer.build_with_context(span, &parent);
        span.is_recording().then_some(Span(span))
    }
}

impl Span {
    /// What spans under this one are told.
    #[must_use]
    pub fn context(&self) -> TraceContext {
        let context = self.0.span_context();
        let trace = u128::from_be_bytes(context.trace_id().to_bytes());
        let span = u64::from_be_bytes(context.span_id().to_bytes());
        TraceContext { trace, span, sampled: context.is_sampled() }
    }

    /// Adds an attribute.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.0.set_attribute(KeyValue::new(key, value));
    }

    /// Adds an attribute that has several values.
    pub fn set_list(&mut self, key: &'static str, values: Vec<&'static str>) {
        let values = values.into_iter().map(StringValue::from).collect();
        self.set(key, Value::Array(Array::String(values)));
    }

    /// Gives it another name.
    pub fn rename(&mut self, name: String) {
        self.0.update_name(name);
    }

    /// What it stands for has failed, for this reason.
    pub fn fail(&mut self, reason: &str) {
        self.0.set_status(Status::error(reason.to_owned()));
    }

    /// Ends it.
    pub fn end(mut self, at: SystemTime) {
        self.0.end_with_timestamp(at);
    }
}

fn span_context(context: TraceContext) -> SpanContext {
    SpanContext::new(
        TraceId::from(context.trace),
        SpanId::from(context.span),
        if context.sampled { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED },
        true,
        TraceState::NONE,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: TraceContext = TraceContext { trace: 1 << 90, span: 5, sampled: true };

    #[tokio::test(flavor = "multi_thread")]
    async fn a_span_continues_the_trace_of_its_parent_and_follows_its_choice() {
        let tracer = Tracer::start("http://127.0.0.1:9", "test", "a", 0.0).expect("an endpoint");
        let begin = |parent| tracer.span("x", SpanKind::Server, parent, SystemTime::now());
        let context = begin(Some(PARENT)).expect("its parent is recorded").context();
        assert_eq!((context.trace, context.sampled), (PARENT.trace, true));
        assert_ne!(context.span, PARENT.span);
        assert!(begin(Some(TraceContext { sampled: false, ..PARENT })).is_none());
        assert!(begin(None).is_none(), "none of the traces that begin here");
        assert!(
            Tracer::default()
                .span("x", SpanKind::Server, Some(PARENT), SystemTime::now())
                .is_none()
        );
    }
}
