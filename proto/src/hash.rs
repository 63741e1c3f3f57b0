//! Names of KV blocks: a hash chain over the tokens.
//!
//! `hash(block) = BLAKE3-128(hash(previous block) ‖ the block's token ids, little endian)`. The
//! chain starts from a root keyed with the model's revision and KV geometry and with the
//! request's salt. A collision would hand one tenant another's cache, hence a cryptographic hash.

use crate::geometry::KvGeometry;

/// Identity of a full block: of its tokens and of everything before them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockHash(pub [u8; 16]);

/// Identity of a model and of its KV layout; equal on all nodes that can exchange blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ModelRoot(pub [u8; 16]);

/// Separates the caches of tenants: requests with different salts share no block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct CacheSalt(pub Option<[u8; 16]>);

impl CacheSalt {
    /// The salt that a text stands for.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        Self(Some(truncated(
            blake3::Hasher::new_derive_key("baton 1 cache salt").update(text.as_bytes()),
        )))
    }

    /// The salt of a tenant's request that may name a further salt. No two tenants share one,
    /// whatever they name; without a tenant it is that of [`CacheSalt::from_text`] or none.
    #[must_use]
    pub fn of(tenant: Option<&str>, text: Option<&str>) -> Self {
        let Some(tenant) = tenant else {
            return text.map_or_else(Self::default, Self::from_text);
        };
        let mut hasher = blake3::Hasher::new_derive_key("baton 1 tenant cache salt");
        hasher.update(&(tenant.len() as u64).to_le_bytes()).update(tenant.as_bytes());
        if let Some(text) = text {
            // A salt that is empty is one, too.
            hasher.update(&[1]).update(text.as_bytes());
        }
        Self(Some(truncated(&hasher)))
    }
}

impl ModelRoot {
    /// The root of a model whose content `revision` identifies, with KV laid out as `geometry`.
    #[must_use]
    pub fn new(revision: &[u8; 32], geometry: &KvGeometry) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("baton 1 model root");
        hasher.update(revision);
        let KvGeometry { layers, kv_heads, head_dim, dtype, block_tokens } = *geometry;
        for number in [layers, kv_heads, head_dim, dtype as u32, block_tokens] {
            hasher.update(&number.to_le_bytes());
        }
        Self(truncated(&hasher))
    }

    /// Hashes of the full blocks of `tokens`; a last, partial block has none.
    #[must_use]
    pub fn chain(&self, salt: CacheSalt, tokens: &[u32], block_tokens: usize) -> Vec<BlockHash> {
        let mut parent = self.start(salt);
        tokens
            .chunks_exact(block_tokens)
            .map(|block| {
                parent = parent.child(block);
                parent
            })
            .collect()
    }

    /// The parent of a sequence's first block.
    #[must_use]
    pub fn start(&self, salt: CacheSalt) -> BlockHash {
        let mut hasher = blake3::Hasher::new_derive_key("baton 1 chain start");
        hasher.update(&self.0);
        if let Some(salt) = salt.0 {
            hasher.update(&salt);
        }
        BlockHash(truncated(&hasher))
    }
}

impl BlockHash {
    /// The hash of the block of `tokens` that follows this one.
    #[must_use]
    pub fn child(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(truncated(&hasher))
    }
}

fn truncated(hasher: &blake3::Hasher) -> [u8; 16] {
    let mut out = [0; 16];
    hasher.finalize_xof().fill(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::KvDtype;

    fn root(layers: u32) -> ModelRoot {
        let geometry =
            KvGeometry { layers, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32, block_tokens: 4 };
        ModelRoot::new(&[7; 32], &geometry)
    }

    #[test]
    fn a_hash_names_the_whole_prefix() {
        let (a, b) = ([1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 2, 3, 4, 5, 6, 7, 8]);
        let (a, b) = (
            root(2).chain(CacheSalt::default(), &a, 4),
            root(2).chain(CacheSalt::default(), &b, 4),
        );
        assert_eq!((a.len(), b.len()), (2, 2));
        assert_ne!(a[1], b[1], "same tokens after another prefix are another block");
    }

    #[test]
    fn tenants_share_no_salt_whatever_they_name() {
        let names = [None, Some(""), Some("a"), Some("b"), Some("ab"), Some("a\u{1}b")];
        let salts = names.iter().flat_map(|tenant| names.map(|text| CacheSalt::of(*tenant, text)));
        let salts: Vec<_> = salts.collect();
        for (i, a) in salts.iter().enumerate() {
            assert!(salts[i + 1..].iter().all(|b| a != b), "salt {i} is not the only one");
        }
        assert_eq!(CacheSalt::of(None, Some("a")), CacheSalt::from_text("a"));
        assert_eq!(CacheSalt::of(None, None), CacheSalt::default());
    }

    #[test]
    fn salts_and_models_share_nothing() {
        let tokens = [1, 2, 3, 4];
        let all = [
            root(2).chain(CacheSalt::default(), &tokens, 4)[0],
            root(3).chain(CacheSalt::default(), &tokens, 4)[0],
            root(2).chain(CacheSalt::from_text("a"), &tokens, 4)[0],
            root(2).chain(CacheSalt::from_text(""), &tokens, 4)[0],
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }
}
