//! `vllm.grpc.engine.VllmEngine`, as the gateway SMG speaks it: the whole cluster looks like one engine. Texts are the
//! gateway's business; it sends token ids and gets token ids.

use std::pin::Pin;
use std::sync::Arc;

use baton_proto::wire::engine::vllm_engine_server::VllmEngine;
use baton_proto::wire::engine::{
    AbortRequest, AbortResponse, GenerateRequest, GenerateResponse, GetLoadsRequest,
    GetLoadsResponse, GetModelInfoRequest, GetModelInfoResponse, GetServerInfoRequest,
    GetServerInfoResponse, HealthCheckRequest, HealthCheckResponse,
};
use baton_proto::wire::v1;
use serde_json::{Map, json};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::Front;
use super::defaults::Defaults;
use super::door::Caller;
use super::inference::grpc_timeout;
use super::names::Name;
use super::refusal::Refusal;
use reply::Reply;

mod loads;
mod reply;
mod request;

#[cfg(test)]
mod tests;

/// Where grammars begin: there is no reasoning parser that would hold them back.
const GRAMMARS_BEGIN: &str = "first_token";

/// Most requests that one call ends.
const MAX_ABORTED: usize = 4096;

#[tonic::async_trait]
impl VllmEngine for Front {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived = Instant::now();
        let timeout = grpc_timeout(request.metadata());
        let caller = Caller::of(request.extensions())?;
        let asked = request.into_inner();
        let stream = asked.stream;
        let request = request::read(asked)?;
        let choices = request.n.unwrap_or(1);
        let started = self.start(&caller, vec![request], timeout, arrived).await?;
        started.span.streams(stream);
        let mut reply = Reply::new(started.prompts.concat(), choices, stream);
        let messages = ReceiverStream::new(started.messages).filter_map(move |message| {
            message.map(|message| reply.take(message)).map_err(Status::from).transpose()
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn abort(
        &self,
        request: Request<AbortRequest>,
    ) -> Result<Response<AbortResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let tenant: Arc<str> = caller.tenant().unwrap_or_default().into();
        let ids = request.into_inner().request_ids;
        if ids.len() > MAX_ABORTED {
            let (given, limit) =
                (format!("a list of {}", ids.len()), format!("one of at most {MAX_ABORTED}"));
            return Err(Refusal::field("request_ids", given, &limit).into());
        }
        for id in ids {
            self.names.abort(&Name { tenant: tenant.clone(), text: id.into() });
        }
        Ok(Response::new(AbortResponse {}))
    }

    async fn health_check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.status().await;
        let message = if status.ready { "ready".to_owned() } else { status.reason };
        Ok(Response::new(HealthCheckResponse { healthy: status.ready, message }))
    }

    async fn get_model_info(
        &self,
        _: Request<GetModelInfoRequest>,
    ) -> Result<Response<GetModelInfoResponse>, Status> {
        let (model, info) = self.model_for(&v1::GenerateRequest::default()).await?;
        let eos = model.defaults.eos_token_ids.iter();
        Ok(Response::new(GetModelInfoResponse {
            is_generation: true,
            max_context_length: info.max_model_len,
            vocab_size: info.vocab_size,
            supports_vision: false,
            served_model_name: info.name,
            eos_token_ids: eos.filter_map(|&id| i32::try_from(id).ok()).collect(),
            max_req_input_len: i32::try_from(info.max_model_len).unwrap_or(i32::MAX),
            default_sampling_params_json: sampling_json(&model.defaults),
            // Files are looked for where the gateway runs: it is told there.
            model_path: String::new(),
        }))
    }

    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        let status = self.status().await;
        let (_, info) = self.model_for(&v1::GenerateRequest::default()).await?;
        Ok(Response::new(GetServerInfoResponse {
            active_requests: status.requests_active as u32,
            is_paused: self.running.draining(),
            uptime_seconds: status.uptime.as_secs_f64(),
            server_type: "baton".to_owned(),
            data_parallel_size: 1,
            block_size: info.geometry.block_tokens as i32,
            constrained_decoding_start: GRAMMARS_BEGIN.to_owned(),
        }))
    }

    async fn get_loads(
        &self,
        _: Request<GetLoadsRequest>,
    ) -> Result<Response<GetLoadsResponse>, Status> {
        let (status, nodes) = (self.status().await, self.core.nodes().await);
        let totals = self.core.pulse().await.totals;
        Ok(Response::new(loads::response(&status, &nodes, &totals)))
    }
}

/// What a checkpoint says of sampling, as the gateway fills it in.
fn sampling_json(defaults: &Defaults) -> String {
    let Defaults { temperature, top_k, top_p, min_p, repetition_penalty, eos_token_ids: _ } =
        defaults;
    let all = [
        ("temperature", temperature.map(|value| json!(value))),
        ("top_k", top_k.map(|value| json!(value))),
        ("top_p", top_p.map(|value| json!(value))),
        ("min_p", min_p.map(|value| json!(value))),
        ("repetition_penalty", repetition_penalty.map(|value| json!(value))),
    ];
    let said = all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let said: Map<_, _> = said.collect();
    if said.is_empty() { String::new() } else { serde_json::Value::from(said).to_string() }
}
