//! What was compared when a request was placed, kept so that it can be explained.

use std::time::Instant;

use baton_proto::ids::NodeId;

use crate::placement::cost::Cost;

/// Most placements of a decision that are kept: the cheapest pairs and the cheapest single nodes.
pub const MOST_CONSIDERED: usize = 6;

/// One way to serve a request, and what it was thought to cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Considered {
    /// Who would compute the prompt; `None`: the decode node itself.
    pub prefill: Option<NodeId>,
    /// Who would generate the tokens.
    pub decode: NodeId,
    /// From whom a cached prefix would be fetched first, and its tokens.
    pub pull: Option<(NodeId, usize)>,
    /// Tokens cached on the node that would compute the prompt.
    pub cached: usize,
    /// In milliseconds.
    pub cost: Cost,
}

impl Considered {
    fn kind(&self) -> &'static str {
        if self.prefill.is_some() { "remote" } else { "local" }
    }
}

/// How one attempt was placed, or refused a place.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// When.
    pub at: Instant,
    /// Tokens of prompt and output so far.
    pub tokens: usize,
    /// Prefill nodes that were compared.
    pub prefill_nodes: usize,
    /// Decode nodes that were compared.
    pub decode_nodes: usize,
    /// What was chosen, then the cheapest of what was not; at most [`MOST_CONSIDERED`], never none.
    pub considered: Vec<Considered>,
}

impl Decision {
    /// What was chosen.
    #[must_use]
    pub fn chosen(&self) -> &Considered {
        &self.considered[0]
    }

    /// Why, in one line for people.
    #[must_use]
    pub fn reason(&self) -> String {
        let chosen = self.chosen();
        let percent = 100 * chosen.cached / self.tokens.max(1);
        let on = chosen.prefill.as_ref().unwrap_or(&chosen.decode);
        let other = self.considered.iter().find(|other| other.kind() != chosen.kind());
        let other = match other {
            None if self.prefill_nodes == 0 => "; no prefill node is free".to_owned(),
            // Of an embedding: nothing else is compared.
            None => String::new(),
            Some(other) => format!("; {} would be {:.1} ms", other.kind(), other.cost.total()),
        };
        let (kind, total) = (chosen.kind(), chosen.cost.total());
        format!("{kind}: {total:.1} ms, {percent}% cached on {on}{other}")
    }
}
