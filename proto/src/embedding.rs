//! Embeddings: hidden states of a prompt, after the model's last norm, made into one vector.

/// Most elements of a hidden state: far above any real model.
pub const MAX_HIDDEN_SIZE: u32 = 1 << 16;

/// Which hidden states of a prompt make its embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Pooling {
    /// That of the last token.
    #[default]
    Last,
    /// The mean over all tokens. All of them are computed: a cached token has no hidden state.
    Mean,
}
