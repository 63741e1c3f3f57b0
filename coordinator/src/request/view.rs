//! A request as operators see it.

use std::sync::Arc;
use std::time::Instant;

use super::{Phase, Request};
use crate::history::{Record, RequestView, Stage};

impl Request {
    /// As operators see it while it runs.
    pub(crate) fn view(&self, now: Instant) -> RequestView {
        let stage = match &self.phase {
            Phase::Waiting { .. } => Stage::NoNodes,
            Phase::Held => Stage::Queued,
            Phase::Running(attempt) if !attempt.has_begun() => Stage::Prefill,
            Phase::Running(_) | Phase::Finishing { .. } => Stage::Decode,
        };
        self.view_as(self.model.name.clone(), stage, now)
    }

    /// The same, with what explains its course.
    pub(crate) fn record(&self, now: Instant) -> Record {
        let (decision, failures) = (self.decision.clone(), self.failures.clone());
        Record { view: self.view(now), decision, failures }
    }

    /// The same of a request that ends now.
    pub(crate) fn into_record(
        mut self: Box<Self>,
        stage: Stage,
        error: Option<String>,
        now: Instant,
    ) -> Record {
        let model = std::mem::take(&mut self.model.name);
        let view = RequestView { ended: Some(now), error, ..self.view_as(model, stage, now) };
        Record { view, decision: self.decision.take(), failures: self.failures }
    }

    fn view_as(&self, model: String, stage: Stage, now: Instant) -> RequestView {
        let (prefill, decode) = match self.placement.clone() {
            Some((prefill, decode)) => (prefill, Some(decode)),
            None => (None, None),
        };
        RequestView {
            id: self.new.id,
            model,
            tenant: Arc::clone(&self.new.tenant),
            class: self.new.standing.class,
            stage,
            prefill,
            decode,
            attempts: self.attempt,
            usage: self.usage(),
            timings: self.timings(now),
            held: self.held,
            arrived: self.arrived,
            ended: None,
            error: None,
        }
    }
}
