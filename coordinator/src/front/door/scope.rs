//! What a key may be used for, and what each call needs. What is not known here needs the most.

use serde::Deserialize;

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Generating text, embedding it, and what clients do around it.
    Generate,
    /// Looking at the cluster: its nodes, caches, metrics, and all tenants' requests without their
    /// text.
    View,
    /// Changing the cluster: draining nodes, changing roles, cancelling others' requests.
    Operate,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Generate, Self::View, Self::Operate];

    /// Its name in key files.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::View => "view",
            Self::Operate => "operate",
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|scope| scope.as_str() == text);
        known.ok_or_else(|| format!("{text:?} is no scope; it must be generate, view or operate"))
    }
}

/// What a call needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing: whoever asks is answered.
    Nothing,
    /// Any key.
    Key,
    /// A key with this scope.
    Scope(Scope),
}

/// What the gRPC method `path` needs.
pub(crate) fn of_rpc(path: &str) -> Need {
    let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/'))
    else {
        return Need::Key;
    };
    match service {
        "grpc.health.v1.Health" => Need::Nothing,
        "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection" => {
            Need::Key
        }
        // They tell what all tenants do.
        "vllm.grpc.engine.VllmEngine" if matches!(method, "GetLoads" | "GetServerInfo") => {
            Need::Scope(Scope::View)
        }
        "baton.v1.Inference" | "vllm.grpc.engine.VllmEngine" => Need::Scope(Scope::Generate),
        // Commands begin with a verb that is none of these.
        "baton.v1.Cluster"
            if ["Get", "List", "Explain", "Watch"].iter().any(|verb| method.starts_with(verb)) =>
        {
            Need::Scope(Scope::View)
        }
        _ => Need::Scope(Scope::Operate),
    }
}

/// What the HTTP path needs.
pub(crate) fn of_path(path: &str) -> Need {
    match path {
        "/health" | "/live" => Need::Nothing,
        "/version" | "/v1/models" => Need::Key,
        "/metrics" => Need::Scope(Scope::View),
        "/tokenize" | "/detokenize" => Need::Scope(Scope::Generate),
        path if path.starts_with("/v1/models/") => Need::Key,
        path if path.starts_with("/v1/") => Need::Scope(Scope::Generate),
        // There is nothing, which is nobody else's business either.
        _ => Need::Key,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_needs_what_it_does() {
        use Need::{Key, Nothing};
        let [generate, view, operate] = Scope::ALL.map(Need::Scope);
        for (path, need) in [
            ("/grpc.health.v1.Health/Watch", Nothing),
            ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Key),
            ("/baton.v1.Inference/Generate", generate),
            ("/vllm.grpc.engine.VllmEngine/Abort", generate),
            ("/vllm.grpc.engine.VllmEngine/GetLoads", view),
            ("/vllm.grpc.engine.VllmEngine/GetServerInfo", view),
            ("/baton.v1.Inference/Embed", generate),
            ("/baton.v1.Cluster/GetStatus", view),
            ("/baton.v1.Cluster/ListNodes", view),
            ("/baton.v1.Cluster/SetRole", operate),
            ("/baton.v1.Cluster/Drain", operate),
            ("/baton.v1.Cluster/Cancel", operate),
            ("/baton.v1.Cluster/Unheard", operate),
            ("/baton.v1.Unheard/Of", operate),
            ("*", Key),
        ] {
            assert_eq!(of_rpc(path), need, "{path}");
        }
        for (path, need) in [
            ("/health", Nothing),
            ("/live", Nothing),
            ("/health/", Key),
            ("/version", Key),
            ("/metrics", view),
            ("/v1/models", Key),
            ("/v1/chat/completions", generate),
            ("/v1/embeddings", generate),
            ("/v1/unheard/of", generate),
            ("/tokenize", generate),
        ] {
            assert_eq!(of_path(path), need, "{path}");
        }
    }

    #[test]
    fn names_are_read_back() {
        for scope in Scope::ALL {
            assert_eq!(scope.as_str().parse(), Ok(scope));
        }
        assert!("admin".parse::<Scope>().unwrap_err().contains("generate, view or operate"));
    }
}
