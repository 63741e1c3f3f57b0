//! The end of a request whose prompt is embedded.

use std::time::Duration;

use baton_proto::ids::TransferId;

use crate::cluster::NodeRef;
use crate::core::Update;
use crate::life::{self, Flow};
use crate::request::{Phase, Request};
use crate::requests::{Action, Context};

/// A node that works on the request sends an embedding.
pub(crate) fn embedded(
    request: &mut Request,
    from: &NodeRef,
    (id, values, took): (TransferId, Vec<f32>, Duration),
    cx: &mut Context<'_>,
) -> Flow {
    let running = matches!(request.phase, Phase::Running(_));
    if !running || request.new.embed.is_none() {
        return Flow::Go;
    }
    cx.placer.prefilled(&from.node, id, took, cx.now);
    if values.len() != request.model.hidden_size as usize {
        let reason = "a node sent an embedding of another size".to_owned();
        return life::again(request, Some(from), reason, true, cx);
    }
    request.timings.first_token = cx.now.saturating_duration_since(request.arrived);
    request.timings.prefill = took;
    cx.placer.answered(&from.node, request.model.root, 0, cx.now);
    // The node is done with it by itself.
    life::close_leg(request, from, cx);
    let update = Update::Embedding(values);
    cx.out.push(Action::Update { request: id.request, update });
    Flow::End(Update::Done(request.summary(cx.now)))
}
