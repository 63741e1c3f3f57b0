//! `baton.v1.Cluster`: what operators look at and ask for.

use std::time::{Instant, SystemTime};

use baton_proto::ids::{NodeId, Role};
use baton_proto::wire::v1::cluster_server::Cluster;
use baton_proto::wire::v1::{
    CancelRequest, CancelResponse, DrainRequest, DrainResponse, ExplainRequest, ExplainResponse,
    GetCacheRequest, GetCacheResponse, GetStatusRequest, GetStatusResponse, KvBlocks,
    ListNodesRequest, ListNodesResponse, ListRequestsRequest, ListRequestsResponse, Node,
    NodeCache, SetRoleRequest, SetRoleResponse, WatchRequest,
};
use tonic::{Request, Response, Status};

use super::door::Caller;
use super::door::scope::Scope;
use super::refusal::Refusal;
use super::{Front, details, explain, prepare, watch};
use crate::core::{CacheQuery, NodeView};
use crate::history::IdPrefix;
use crate::orders::Order;

/// Requests in a list whose asker names no limit, and the most that may be asked for.
const LISTED_REQUESTS: u32 = 100;
const MOST_LISTED_REQUESTS: u32 = 4096;

#[tonic::async_trait]
impl Cluster for Front {
    type WatchStream = watch::Messages;

    async fn get_status(
        &self,
        _: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        let (status, pulse) = (self.status().await, self.core.pulse().await);
        Ok(Response::new(GetStatusResponse {
            version: super::VERSION.to_owned(),
            ready: status.ready,
            reason: status.reason,
            models: status.models,
            requests_active: status.requests_active as u32,
            prefill_nodes: status.prefill_nodes as u32,
            decode_nodes: status.decode_nodes as u32,
            uptime_ms: status.uptime.as_millis() as u64,
            requests_finished: status.requests_finished,
            requests_failed: status.requests_failed,
            requests_retried: status.requests_retried,
            peers: status.peers,
            requests_waiting: status.requests_waiting as u32,
            alerts: pulse.alerts.iter().map(explain::alert).collect(),
            tokens: Some(explain::totals(&pulse.totals)),
            recent: Some(explain::recent(&pulse.recent)),
            transfers_active: pulse.transfers as u32,
            unix_ms: watch::unix_ms(SystemTime::now()),
        }))
    }

    async fn list_nodes(
        &self,
        _: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let nodes = self.core.nodes().await.into_iter().map(node).collect();
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    async fn get_cache(
        &self,
        request: Request<GetCacheRequest>,
    ) -> Result<Response<GetCacheResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let GetCacheRequest { node, prefix, tenant, cache_salt, model } = request.into_inner();
        let node = node.map(parse_node).transpose()?;
        let prompt = match prefix {
            Some(prefix) => {
                let tenant = tenant_of(&caller, tenant.as_deref())?;
                let salt = prepare::salt(tenant, cache_salt.as_deref())?;
                let (model, tokens) = self.prefix_tokens(&model, prefix).await?;
                Some((model, salt, tokens))
            }
            None => None,
        };
        let prefix_tokens = prompt.as_ref().map_or(0, |(.., tokens)| tokens.len() as u32);
        let cache = self.core.cache(CacheQuery { node: node.clone(), prompt }).await;
        if let Some(node) = node.filter(|_| cache.nodes.is_empty()) {
            return Err(details::no_node(&node, format!("node {node} has not joined")));
        }
        let nodes = cache.nodes.into_iter().map(|held| NodeCache {
            id: held.node.to_string(),
            blocks: held.blocks,
            matched_tokens: held.matched_tokens,
            prompt_tokens: held.hits.prompt_tokens,
            cached_tokens: held.hits.cached_tokens,
            evicted_blocks: held.hits.evicted_blocks,
        });
        Ok(Response::new(GetCacheResponse {
            nodes: nodes.collect(),
            prefix_tokens,
            index_blocks: cache.index_blocks,
            index_bytes: cache.index_bytes,
        }))
    }

    async fn set_role(
        &self,
        request: Request<SetRoleRequest>,
    ) -> Result<Response<SetRoleResponse>, Status> {
        let SetRoleRequest { node, role, force } = request.into_inner();
        let known = [Role::Prefill, Role::Decode].into_iter().find(|r| r.as_str() == role);
        let role = known
            .ok_or_else(|| Refusal::field("role", format!("{role:?}"), "prefill or decode"))?;
        self.order(node, Order::Role(role), force).await?;
        Ok(Response::new(SetRoleResponse {}))
    }

    async fn drain(
        &self,
        request: Request<DrainRequest>,
    ) -> Result<Response<DrainResponse>, Status> {
        let DrainRequest { node, undo, force } = request.into_inner();
        self.order(node, Order::Drain(!undo), force).await?;
        Ok(Response::new(DrainResponse {}))
    }

    async fn list_requests(
        &self,
        request: Request<ListRequestsRequest>,
    ) -> Result<Response<ListRequestsResponse>, Status> {
        let ListRequestsRequest { active, limit } = request.into_inner();
        let limit = limit.unwrap_or(LISTED_REQUESTS);
        if !(1..=MOST_LISTED_REQUESTS).contains(&limit) {
            let range = format!("from 1 to {MOST_LISTED_REQUESTS}");
            return Err(Refusal::field("limit", limit, &range).into());
        }
        let list = self.core.requests(active, limit as usize).await;
        let now = Instant::now();
        let requests = list.requests.iter().map(|view| explain::request(view, now)).collect();
        Ok(Response::new(ListRequestsResponse { requests, active: list.active as u32 }))
    }

    async fn explain(
        &self,
        request: Request<ExplainRequest>,
    ) -> Result<Response<ExplainResponse>, Status> {
        let name = request.into_inner().request_id;
        let explained = self.core.explain(parse_request(&name)?).await;
        let explained = explained.map_err(|error| details::not_found(&error, &name))?;
        Ok(Response::new(explain::response(explained, Instant::now())))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let name = request.into_inner().request_id;
        let id = self.core.cancel_one(parse_request(&name)?).await;
        let id = id.map_err(|error| details::not_found(&error, &name))?;
        Ok(Response::new(CancelResponse { request_id: id.to_string() }))
    }

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(watch::start(
            self.core.clone(),
            self.running.clone(),
            request.into_inner(),
        )))
    }
}

impl Front {
    async fn order(&self, node: String, order: Order, force: bool) -> Result<(), Status> {
        let node = parse_node(node)?;
        let ordered = self.core.order(node, order, force).await;
        ordered.map_err(|error| details::not_ordered(&error))
    }

    /// The name of the model, which is empty for the only one, and the text's tokens.
    async fn prefix_tokens(
        &self,
        model: &str,
        text: String,
    ) -> Result<(String, Vec<u32>), Refusal> {
        let model = self.models.get(model)?.clone();
        let (name, bytes) = (model.name.clone(), text.len());
        let tokens =
            self.computing.run(bytes, move || model.tokenizer.encode(&text, true)).await??;
        Ok((name, tokens))
    }
}

/// Whose cache is asked about. Whether a prompt is in it tells what its tenant has asked, so who may
/// only look sees no other's.
fn tenant_of<'a>(caller: &'a Caller, asked: Option<&'a str>) -> Result<&'a str, Status> {
    match (caller.tenant(), asked) {
        (own, None) => Ok(own.unwrap_or_default()),
        (Some(own), Some(tenant)) if own != tenant && !caller.may(Scope::Operate) => {
            let why = format!("the key is {own}'s; another tenant's cache needs scope \"operate\"");
            Err(Status::permission_denied(why))
        }
        (_, Some(tenant)) => Ok(tenant),
    }
}

fn parse_request(id: &str) -> Result<IdPrefix, Refusal> {
    let shown: String = id.chars().take(80).collect();
    let digits = "a request's id, or its first hexadecimal digits";
    IdPrefix::parse(id).ok_or_else(|| Refusal::field("request_id", format!("{shown:?}"), digits))
}

fn parse_node(name: String) -> Result<NodeId, Refusal> {
    name.parse().map_err(|e| Refusal::wrong("node", format!("node: {e}")))
}

fn node(view: NodeView) -> Node {
    let NodeView { node, hello, report, report_age } = view;
    Node {
        id: node.to_string(),
        role: hello.role.to_string(),
        epoch: hello.epoch.0,
        model: hello.model,
        kv_address: hello.kv_address,
        transports: hello.transports,
        draining: report.draining,
        report_age_ms: report_age.as_millis() as u64,
        kv_blocks: Some(KvBlocks {
            total: hello.total_blocks,
            free: report.blocks.free,
            active: report.blocks.active,
            cached: report.blocks.cached,
            leased: report.blocks.leased,
            block_tokens: hello.geometry.block_tokens,
            bytes_per_block: hello.geometry.block_bytes() as u64,
        }),
        waiting: report.waiting,
        running: report.running,
        prefill_tokens_per_second: report.prefill_tokens_per_second,
        decode_step_ms: report.decode_step_ms,
        kv_transport: report.kv_transport,
    }
}
