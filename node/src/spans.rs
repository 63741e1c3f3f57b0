//! The node's part in the traces of requests: one span for each job and one for each transfer.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use baton_engine::{Kind, Submission};
use baton_kvtransfer::{SendError, Sent};
use baton_proto::ids::TransferId;
use baton_proto::message::TokenEvent;
use baton_telemetry::{Span, SpanKind, Tracer};

/// Spans of jobs that are not over. Without traced requests it does nothing.
pub(crate) struct Spans {
    tracer: Tracer,
    open: HashMap<TransferId, Open>,
}

struct Open {
    span: Span,
    /// Its blocks are being sent, which outlives the sequence.
    sends: bool,
    tokens: i64,
    admitted: Option<SystemTime>,
}

impl Spans {
    pub(crate) fn new(tracer: Tracer) -> Self {
        Self { tracer, open: HashMap::new() }
    }

    /// The engine is asked for a job.
    pub(crate) fn submitted(&mut self, Submission { job, kind, .. }: &Submission) {
        let Some(parent) = job.trace else { return };
        let name = match kind {
            Kind::Export => "baton.prefill",
            Kind::Import => "baton.decode",
            Kind::Local => "baton.prefill_and_decode",
            Kind::Embed(_) => "baton.embed",
            Kind::Serve | Kind::Fetch => return,
        };
        let now = SystemTime::now();
        let Some(mut span) = self.tracer.span(name, SpanKind::Internal, Some(parent), now) else {
            return;
        };
        span.set("baton.attempt", i64::from(job.id.attempt));
        span.set("baton.prompt_tokens", job.prompt_tokens as i64);
        self.open.insert(job.id, Open { span, sends: false, tokens: 0, admitted: None });
    }

    /// The job has blocks.
    pub(crate) fn admitted(&mut self, id: TransferId, cached_tokens: u32) {
        if let Some(open) = self.open.get_mut(&id) {
            open.admitted = Some(SystemTime::now());
            open.span.set("baton.cached_tokens", i64::from(cached_tokens));
        }
    }

    /// The job's blocks are offered to another node; [`Self::sent`] follows.
    pub(crate) fn sends(&mut self, id: TransferId) {
        if let Some(open) = self.open.get_mut(&id) {
            open.sends = true;
        }
    }

    /// The job has tokens.
    pub(crate) fn tokens(&mut self, tokens: &[TokenEvent]) {
        if self.open.is_empty() {
            return;
        }
        for TokenEvent { id, prefill, .. } in tokens {
            let Some(open) = self.open.get_mut(id) else { continue };
            open.tokens += 1;
            if let Some(took) = prefill {
                open.span.set("baton.prefill_seconds", took.as_secs_f64());
            }
        }
    }

    /// The job has its embedding.
    pub(crate) fn embedded(&mut self, id: TransferId, prefill: Duration) {
        if let Some(open) = self.open.get_mut(&id) {
            open.span.set("baton.prefill_seconds", prefill.as_secs_f64());
        }
    }

    /// The job's KV is at the other node, or will not get there.
    pub(crate) fn sent(&mut self, id: TransferId, outcome: &Result<Sent, SendError>) {
        let now = SystemTime::now();
        let Some(Open { span: job, admitted, .. }) = self.open.remove(&id) else { return };
        let (parent, began) = (Some(job.context()), admitted.unwrap_or(now));
        let transfer = self.tracer.span("baton.kv_transfer", SpanKind::Internal, parent, began);
        if let Some(mut span) = transfer {
            match outcome {
                Ok(sent) => {
                    span.set("baton.transport", sent.transport.name());
                    span.set("baton.transfer_bytes", sent.bytes as i64);
                    span.set("baton.transfer_hidden_seconds", sent.hidden.as_secs_f64());
                    span.set("baton.transfer_exposed_seconds", sent.exposed.as_secs_f64());
                }
                Err(error) => span.fail(&error.to_string()),
            }
            span.end(now);
        }
        job.end(now);
    }

    /// The engine is done with the job; `failure` says why it has no result.
    pub(crate) fn ended(&mut self, id: TransferId, failure: Option<&str>) {
        if failure.is_none() && self.open.get(&id).is_some_and(|open| open.sends) {
            return;
        }
        let Some(Open { mut span, tokens, .. }) = self.open.remove(&id) else { return };
        span.set("baton.output_tokens", tokens);
        if let Some(reason) = failure {
            span.fail(reason);
        }
        span.end(SystemTime::now());
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::hash::CacheSalt;
    use baton_proto::ids::RequestId;
    use baton_proto::message::Job;
    use baton_proto::sampling::SamplingParams;
    use baton_proto::trace::TraceContext;

    use super::*;

    fn export(request: u128) -> Submission {
        let job = Job {
            id: TransferId { request: RequestId(request), attempt: 1 },
            tokens: vec![1].into(),
            prompt_tokens: 1,
            sampling: SamplingParams::default(),
            salt: CacheSalt::default(),
            deadline: None,
            trace: Some(TraceContext { trace: 7, span: 5, sampled: true }),
        };
        Submission { job, kind: Kind::Export, held: false }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_span_waits_for_a_transfer_only_if_there_is_one() {
        let tracer = Tracer::start("http://127.0.0.1:9", "test", "a", 0.0).expect("an endpoint");
        let mut spans = Spans::new(tracer);
        let [sent, cancelled] = [1, 2].map(export);
        for job in [&sent, &cancelled] {
            spans.submitted(job);
            spans.admitted(job.job.id, 0);
        }
        spans.sends(sent.job.id);
        for job in [&sent, &cancelled] {
            spans.ended(job.job.id, None);
        }
        assert!(spans.open.keys().eq([&sent.job.id]), "what was cancelled is not sent");
        spans.sent(sent.job.id, &Err(SendError::Cancelled));
        assert!(spans.open.is_empty());
    }
}
