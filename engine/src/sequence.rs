//! [`Sequence`]: a job on its way through the scheduler.

use std::time::{Duration, Instant};

use baton_proto::embedding::Pooling;
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, Logprobs, NodeFinish};
use baton_proto::sampling::SamplingParams;

use crate::blocks::User;
use crate::events::Kind;
use crate::scheduler::Following;

/// Where a sequence is. Each is in exactly one phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Holds no blocks.
    Waiting,
    /// An import that has its blocks and waits for their content.
    Importing,
    /// Has the blocks of its tokens and computes.
    Running,
}

/// One job with its tokens and blocks.
#[derive(Debug)]
pub struct Sequence {
    /// The job.
    pub id: TransferId,
    /// What is done with it.
    pub kind: Kind,
    /// Where it is.
    pub phase: Phase,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// The prompt, then the output, this attempt's and earlier ones'.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are prompt.
    pub prompt_tokens: usize,
    /// Leading tokens whose KV is in `blocks`.
    pub computed: usize,
    /// Leading tokens whose KV will be in `blocks` when every step in flight has ended.
    pub planned: usize,
    /// Tokens after `tokens` that steps in flight sample.
    pub pending: usize,
    /// Its place among the chunks of the last step that it was planned for.
    pub chunk: usize,
    /// Length at the last admission, or while it waits: what counts as its prompt.
    pub admitted_tokens: usize,
    /// Its blocks in order.
    pub blocks: Vec<u32>,
    /// Leading blocks that the prefix cache holds too.
    pub cached_blocks: usize,
    /// Hashes of the full blocks of `tokens`.
    pub hashes: Vec<BlockHash>,
    /// The parent of the first block.
    start: BlockHash,
    /// When it was submitted.
    pub arrived: Instant,
    /// When it fails.
    pub deadline: Option<Instant>,
    /// Its admission has been told.
    pub announced: bool,
    /// Its tokens' share of the time of the steps that computed its prompt, until the first token.
    pub prefill: Duration,
    /// It has produced a token in this attempt.
    pub sampled: bool,
    /// Log-probabilities of the prompt from position 1 on, as far as computed; `None` when not
    /// wanted or told already.
    pub prompt_logprobs: Option<Vec<(u32, Logprobs)>>,
    /// Where it is in its grammar, if it has one.
    pub following: Option<Following>,
    /// Sum of the hidden states that its embedding is made of, as far as computed.
    pub pooled: Vec<f64>,
}

impl Sequence {
    /// A sequence that waits. Hash chains start from `root`.
    #[must_use]
    pub fn new(job: Job, kind: Kind, root: &ModelRoot, block_tokens: usize, now: Instant) -> Self {
        let generates = !matches!(kind, Kind::Embed(_));
        // The exporting node tells the prompt's log-probabilities.
        let wanted = job.sampling.prompt_logprobs.is_some() && generates && kind != Kind::Import;
        Self {
            id: job.id,
            kind,
            phase: Phase::Waiting,
            prompt_tokens: job.prompt_tokens,
            computed: 0,
            planned: 0,
            pending: 0,
            chunk: 0,
            admitted_tokens: job.tokens.len(),
            blocks: Vec::new(),
            cached_blocks: 0,
            hashes: root.chain(job.salt, &job.tokens, block_tokens),
            start: root.start(job.salt),
            arrived: now,
            deadline: job.deadline.and_then(|left| now.checked_add(left)),
            announced: false,
            prefill: Duration::ZERO,
            sampled: false,
            prompt_logprobs: wanted.then(Vec::new),
            following: (generates && job.sampling.grammar.is_some()).then(Following::default),
            sampling: job.sampling,
            pooled: Vec::new(),
            tokens: job.tokens.to_vec(),
        }
    }

    /// Its length, with the tokens that are not known yet.
    #[must_use]
    pub fn length(&self) -> usize {
        self.tokens.len() + self.pending
    }

    /// Tokens whose KV no step was planned to compute.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.length() - self.planned
    }

    /// It generates: every token that it was admitted with is computed, or in flight.
    #[must_use]
    pub fn decoding(&self) -> bool {
        self.planned >= self.admitted_tokens && !self.embeds()
    }

    /// An embedding is made of it, and no token.
    #[must_use]
    pub fn embeds(&self) -> bool {
        matches!(self.kind, Kind::Embed(_))
    }

    /// It may need more blocks than those of its tokens.
    #[must_use]
    pub fn grows(&self) -> bool {
        self.kind != Kind::Export && !self.embeds()
    }

    /// The first row whose hidden state goes into its embedding, of those from position `start` to
    /// `end`.
    #[must_use]
    pub fn pools_from(&self, start: usize, end: usize) -> Option<usize> {
        match self.kind {
            Kind::Embed(Pooling::Mean) => Some(0),
            Kind::Embed(Pooling::Last) => (end == self.tokens.len()).then(|| end - start - 1),
            _ => None,
        }
    }

    /// A step in flight reads or writes its blocks.
    #[must_use]
    pub fn in_flight(&self) -> bool {
        self.planned > self.computed
    }

    /// It is known to end with a token that a step in flight samples, whichever that is.
    #[must_use]
    pub fn ends_in_flight(&self, max_model_len: usize) -> bool {
        let output = self.output().len() + self.pending;
        self.pending > 0
            && (self.kind == Kind::Export
                || output >= self.sampling.max_tokens as usize
                || self.length() >= max_model_len)
    }

    /// A token may be sampled for it: it is free, or it is known what may follow its last token.
    #[must_use]
    pub fn may_sample(&self) -> bool {
        let Some(following) = &self.following else { return true };
        self.pending == 0 && following.mask().is_some()
    }

    /// As what it uses its blocks.
    #[must_use]
    pub fn user(&self) -> User {
        match self.phase {
            Phase::Importing => User::Transfer,
            Phase::Waiting | Phase::Running => User::Sequence,
        }
    }

    /// The prompt.
    #[must_use]
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_tokens]
    }

    /// The output so far, over all attempts.
    #[must_use]
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.prompt_tokens..]
    }

    /// The hash of block `ordinal`'s predecessor; `None` for the first block.
    #[must_use]
    pub fn parent(&self, ordinal: usize) -> Option<BlockHash> {
        ordinal.checked_sub(1).map(|before| self.hashes[before])
    }

    /// Blocks that the prefix cache may provide: never all, for the last token has to be computed
    /// (or imported) to have logits; none if something of every token of the prompt is wanted.
    #[must_use]
    pub fn matchable(&self, block_tokens: usize) -> &[BlockHash] {
        if self.prompt_logprobs.is_some() || self.kind == Kind::Embed(Pooling::Mean) {
            return &[];
        }
        &self.hashes[..(self.tokens.len() - 1) / block_tokens]
    }

    /// Appends a generated token and, if it fills a block, the block's hash.
    pub fn push(&mut self, token: u32, block_tokens: usize) {
        self.tokens.push(token);
        if self.tokens.len().is_multiple_of(block_tokens) {
            let parent = self.hashes.last().unwrap_or(&self.start);
            let block = &self.tokens[self.tokens.len() - block_tokens..];
            self.hashes.push(parent.child(block));
        }
    }

    /// Why the sequence ends with its last token, if it does.
    #[must_use]
    pub fn finish(&self, max_model_len: usize) -> Option<NodeFinish> {
        let output = self.output();
        let token = *output.last()?;
        // A mask has an end only where that is allowed.
        let may_stop = self.following.is_some() || output.len() > self.sampling.min_tokens as usize;
        if may_stop && self.sampling.eos_token_ids.contains(&token) {
            Some(NodeFinish::EndOfSequence)
        } else if may_stop && self.sampling.stop_token_ids.contains(&token) {
            Some(NodeFinish::StopToken(token))
        } else if output.len() >= self.sampling.max_tokens as usize
            || self.tokens.len() >= max_model_len
        {
            Some(NodeFinish::Length)
        } else {
            None
        }
    }
}
