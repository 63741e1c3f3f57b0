//! [`Guide`]: follows a text through its grammar.

use llguidance::Matcher;

use crate::compile::GrammarError;

/// The tokens of which one may come next: a bit for each, the lowest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask(Box<[u32]>);

impl TokenMask {
    /// A mask that allows these tokens, all below `vocab_size`.
    #[must_use]
    pub fn of(tokens: &[u32], vocab_size: usize) -> Self {
        let mut mask = Self(vec![0; vocab_size.div_ceil(32)].into());
        tokens.iter().for_each(|token| mask.set(*token, true));
        mask
    }

    /// Its words: `[vocab_size / 32 rounded up]`.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.0
    }

    /// Whether a token is allowed.
    #[must_use]
    pub fn allows(&self, token: u32) -> bool {
        self.0.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    fn set(&mut self, token: u32, allowed: bool) {
        if let Some(word) = self.0.get_mut(token as usize / 32) {
            let bit = 1 << (token % 32);
            *word = if allowed { *word | bit } else { *word & !bit };
        }
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

/// The tokens that end a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// End-of-sequence tokens: allowed where the text is complete, and nowhere else.
    pub eos: &'a [u32],
    /// Further tokens that end it, wherever the grammar has them as text.
    pub stop: &'a [u32],
    /// Neither, as long as anything else may follow: fewer tokens than the least wanted are here.
    pub early: bool,
}

/// Where a text is in its grammar.
pub struct Guide {
    matcher: Matcher,
    words: usize,
}

impl Guide {
    pub(crate) fn new(matcher: Matcher, words: usize) -> Self {
        Self { matcher, words }
    }

    /// The text goes on with these tokens, none of which ended it.
    ///
    /// # Errors
    /// If the grammar does not allow that. The guide is of no more use then.
    pub fn accept(&mut self, tokens: &[u32]) -> Result<(), GrammarError> {
        self.matcher.consume_tokens(tokens).map_err(lost)
    }

    /// The tokens that may come next; at least one. Takes microseconds to milliseconds.
    ///
    /// # Errors
    /// If there is none, or the grammar has become too complex. The guide is of no more use then.
    pub fn mask(&mut self, ends: Ends<'_>) -> Result<TokenMask, GrammarError> {
        let reason = self.matcher.stop_reason();
        if !reason.is_ok() {
            return Err(GrammarError::Lost(reason.to_string()));
        }
        let complete = self.matcher.is_stopped();
        let may_end = complete || self.matcher.is_accepting().map_err(lost)?;
        let mut mask = TokenMask(vec![0; self.words].into());
        if !complete {
            match self.matcher.compute_mask() {
                Ok(found) => mask.0.iter_mut().zip(found.as_slice()).for_each(|(to, w)| *to = *w),
                // No token has the bytes that might follow.
                Err(_) if may_end => {}
                Err(error) => return Err(lost(error)),
            }
        }
        ends.eos.iter().for_each(|token| mask.set(*token, may_end));
        if ends.early {
            let mut without = mask.clone();
            ends.eos.iter().chain(ends.stop).for_each(|token| without.set(*token, false));
            mask = if without.is_empty() { mask } else { without };
        }
        match mask.is_empty() {
            true => Err(GrammarError::Lost("no token may follow".to_owned())),
            false => Ok(mask),
        }
    }
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").finish_non_exhaustive()
    }
}

fn lost(error: impl std::fmt::Display) -> GrammarError {
    GrammarError::Lost(error.to_string().chars().take(300).collect())
}
