//! `baton cache`: what the prefix caches hold, by node or for one prompt.

use baton_proto::wire::v1::{GetCacheRequest, GetCacheResponse};
use serde_json::{Value, json};

use super::CommandError;
use super::status::percent;
use crate::client::{Target, explain};
use crate::output::{OutputArgs, bytes, table};

/// Command line of `baton cache`.
#[derive(clap::Args)]
pub(crate) struct CacheArgs {
    /// Show this node only
    #[arg(long, conflicts_with = "prefix")]
    node: Option<String>,
    /// Show how much of this prompt each node holds
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Whose prompt: tenants share no cache [default: the API key's tenant; without keys nobody's]
    #[arg(long, value_name = "NAME", requires = "prefix")]
    tenant: Option<String>,
    /// The `cache_salt` of the requests meant
    #[arg(long, value_name = "SALT", requires = "prefix")]
    cache_salt: Option<String>,
    /// Whose model [default: the only one]
    #[arg(long, default_value = "", hide_default_value = true, requires = "prefix")]
    model: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `baton cache`.
pub(crate) async fn run(args: CacheArgs) -> Result<(), CommandError> {
    args.output.print(|| show(&args)).await
}

async fn show(args: &CacheArgs) -> Result<String, CommandError> {
    let CacheArgs { node, prefix, tenant, cache_salt, model, .. } = args;
    let request = GetCacheRequest {
        node: node.clone(),
        prefix: prefix.clone(),
        tenant: tenant.clone(),
        cache_salt: cache_salt.clone(),
        model: model.clone(),
    };
    let response = args.target.cluster().await?.get_cache(request).await;
    let cache = response.map_err(|status| explain(&status))?.into_inner();
    Ok(if args.output.is_json() { as_json(&cache) } else { as_text(&cache, args.prefix.is_some()) })
}

fn as_json(cache: &GetCacheResponse) -> String {
    let nodes: Value = cache
        .nodes
        .iter()
        .map(|n| {
            json!({
                "id": n.id,
                "blocks": n.blocks,
                "matched_tokens": n.matched_tokens,
                "prompt_tokens": n.prompt_tokens,
                "cached_tokens": n.cached_tokens,
                "evicted_blocks": n.evicted_blocks,
            })
        })
        .collect();
    json!({
        "nodes": nodes,
        "prefix_tokens": cache.prefix_tokens,
        "index": {"blocks": cache.index_blocks, "bytes": cache.index_bytes},
    })
    .to_string()
}

fn as_text(cache: &GetCacheResponse, prefix: bool) -> String {
    let rows: Vec<Vec<String>> = cache
        .nodes
        .iter()
        .map(|n| {
            let matched = format!("{} of {}", n.matched_tokens, cache.prefix_tokens);
            let hits = match n.prompt_tokens {
                0 => "-".to_owned(),
                all => format!("{}% of {all}", percent(n.cached_tokens, all)),
            };
            let mut row = vec![n.id.clone(), n.blocks.to_string()];
            row.extend([n.evicted_blocks.to_string(), hits]);
            row.extend(prefix.then_some(matched));
            row
        })
        .collect();
    let head: &[&str] = &["NODE", "BLOCKS", "EVICTED", "HIT TOKENS", "TOKENS OF THE PREFIX"];
    let head = if prefix { head } else { &head[..head.len() - 1] };
    let index = format!("index: {} blocks, {}\n", cache.index_blocks, bytes(cache.index_bytes));
    table(head, &rows) + &index
}
