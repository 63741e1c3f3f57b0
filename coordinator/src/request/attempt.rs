//! One attempt: a pair of nodes, or one node, and how far they are.

use std::collections::VecDeque;

use baton_proto::message::TokenEvent;

use crate::cluster::NodeRef;

/// A node's part in an attempt.
#[derive(Clone, Debug)]
pub(crate) struct Leg {
    pub(crate) node: NodeRef,
    /// The node may still hold something for the attempt.
    pub(crate) open: bool,
}

/// One attempt.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) prefill: Option<Leg>,
    pub(crate) decode: Leg,
    /// Position of the prefill node's token; without one, of the decode node's first.
    first: usize,
    first_seen: bool,
    /// Position of the decode node's next token.
    decode_next: usize,
    /// Tokens of the decode node that overtook the prefill node's.
    ahead: VecDeque<TokenEvent>,
    /// The decode node has the KV: the prefill node is no longer needed.
    pub(crate) handed_over: bool,
    /// Who serves the attempt's pull, until it is over.
    pub(crate) pull: Option<NodeRef>,
}

/// A node broke the rules; its attempt is void.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) &'static str);

impl Attempt {
    /// `first`: the output position that it starts from.
    pub(crate) fn new(
        prefill: Option<NodeRef>,
        decode: NodeRef,
        pull: Option<NodeRef>,
        first: usize,
    ) -> Self {
        let remote = prefill.is_some();
        Self {
            prefill: prefill.map(|node| Leg { node, open: true }),
            decode: Leg { node: decode, open: true },
            first,
            first_seen: false,
            decode_next: if remote { first + 1 } else { first },
            ahead: VecDeque::new(),
            handed_over: !remote,
            pull,
        }
    }

    /// The part of the node that computes the prompt.
    pub(crate) fn computing(&self) -> &Leg {
        self.prefill.as_ref().unwrap_or(&self.decode)
    }

    pub(crate) fn computes(&self, node: &NodeRef) -> bool {
        self.computing().node == *node
    }

    pub(crate) fn is_prefill(&self, node: &NodeRef) -> bool {
        self.prefill.as_ref().is_some_and(|leg| leg.node == *node)
    }

    /// Losing the prefill node now would lose the attempt.
    pub(crate) fn needs_prefill(&self) -> bool {
        self.prefill.is_some() && !(self.handed_over && self.first_seen)
    }

    /// Whether it has given a token.
    pub(super) fn has_begun(&self) -> bool {
        self.first_seen || (self.prefill.is_none() && self.decode_next > self.first)
    }

    pub(crate) fn leg(&mut self, node: &NodeRef) -> Option<&mut Leg> {
        let prefill = self.prefill.as_mut().filter(|leg| leg.node == *node);
        prefill.or(Some(&mut self.decode).filter(|leg| leg.node == *node))
    }

    pub(crate) fn legs(&mut self) -> impl Iterator<Item = &mut Leg> {
        std::iter::once(&mut self.decode).chain(self.prefill.as_mut())
    }

    /// Takes a token; those that are next in order are appended to `ready`. The two nodes' streams
    /// are not ordered against each other, but each one's tokens are.
    pub(super) fn take(
        &mut self,
        from: &NodeRef,
        event: TokenEvent,
        ready: &mut Vec<TokenEvent>,
    ) -> Result<(), Broken> {
        let position = event.position as usize;
        if self.is_prefill(from) {
            if position > self.first {
                return Err(Broken("a prefill node sent more than one token"));
            }
            if position == self.first && !self.first_seen {
                self.first_seen = true;
                ready.push(event);
                ready.extend(self.ahead.drain(..));
            }
            return Ok(());
        }
        if position > self.decode_next {
            return Err(Broken("a decode node left out a token"));
        }
        if position < self.decode_next {
            return Ok(());
        }
        self.decode_next += 1;
        self.handed_over = true;
        if self.prefill.is_none() || self.first_seen {
            ready.push(event);
        } else {
            self.ahead.push_back(event);
        }
        Ok(())
    }
}
