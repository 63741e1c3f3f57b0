//! A whole coordinator in this process: clients over gRPC, nodes that join over mutual TLS and answer
//! at once. So what remains is what the coordinator itself, and its connections, take.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use baton_cli::launcher::bundled_model;
use baton_coordinator::config::Config;
use baton_coordinator::server::{Coordinator, install_metrics};
use baton_coordinator::settings::Settings;
use baton_identity::{COORDINATOR_SERVER_NAME, ClusterCa, Identity, Part};
use baton_proto::message::{Command, Hello, NodeEvent};
use baton_proto::wire::node::join_client::JoinClient;
use baton_proto::wire::node::{FromNode, ToNode, to_node};
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::inference_client::InferenceClient;
use baton_proto::wire::v1::{GenerateRequest, Sampling, TokenIds};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use super::cluster::{answers, hello, report};
use super::decisions::{count, number};
use super::prompts::mix;
use super::times::Times;
use super::{Figure, PlaceArgs};
use crate::commands::CommandError;

/// Events of a node that wait to be sent.
const OUTBOX: usize = 4096;
/// Blocks of each node's pool.
const NODE_BLOCKS: u64 = 1 << 20;
/// How often nodes report.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Tokens per answer: one from each node of a pair.
const OUTPUT_TOKENS: u32 = 2;
/// Token ids of prompts are below this.
const VOCABULARY: u64 = 1000;

pub(super) async fn run(args: &PlaceArgs) -> Result<Vec<Figure>, CommandError> {
    let state = tempfile::tempdir()?;
    let ca = ClusterCa::create(&state.path().join("ca"))?;
    let issue = |part, name: &str| -> Result<Identity, CommandError> {
        let folder = state.path().join(name);
        ca.issue(part, &name.parse()?, &["127.0.0.1"], &folder)?;
        Ok(Identity::load(&folder)?)
    };
    issue(Part::Coordinator, "coordinator")?;
    let config = config(&state.path().join("coordinator"))?;
    let coordinator = Coordinator::start(&config, install_metrics()?).await?;
    let mut nodes = JoinSet::new();
    for at in 0..args.nodes as usize {
        let identity = issue(Part::Node, &format!("node-{at}"))?;
        let hello = hello(at, model_name(&config), NODE_BLOCKS);
        let (events, commands) = join(&identity, coordinator.cluster, hello).await?;
        nodes.spawn(serve(at, events, commands));
    }
    let figures = ask(args, coordinator.grpc).await;
    coordinator.stop().await;
    figures
}

fn model_name(config: &Config) -> &str {
    &config.models[0].0
}

fn config(identity: &Path) -> Result<Config, CommandError> {
    let free = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let settings = Settings {
        cluster_listen: free,
        grpc: free,
        http: free,
        identity: Some(identity.to_owned()),
        model: Some(vec![bundled_model()?]),
        ..Settings::default()
    };
    Ok(settings.try_into()?)
}

/// Joins as a node does.
async fn join(
    identity: &Identity,
    coordinator: SocketAddr,
    hello: Hello,
) -> Result<(mpsc::Sender<NodeEvent>, Streaming<ToNode>), CommandError> {
    let own = tonic::transport::Identity::from_pem(identity.cert_pem(), identity.key_pem());
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(identity.ca_pem()))
        .identity(own)
        .domain_name(COORDINATOR_SERVER_NAME);
    let endpoint = Endpoint::from_shared(format!("https://{coordinator}"))?.tls_config(tls)?;
    let channel = endpoint.tcp_nodelay(true).connect().await?;
    let (events, outgoing) = mpsc::channel(OUTBOX);
    let outgoing = ReceiverStream::new(outgoing).map(FromNode::from);
    let outgoing = tokio_stream::once(FromNode::from(hello)).chain(outgoing);
    let mut commands = JoinClient::new(channel).join(outgoing).await?.into_inner();
    match commands.message().await?.and_then(|first| first.message) {
        Some(to_node::Message::Welcome(_)) => Ok((events, commands)),
        _ => Err("the coordinator does not welcome its nodes".into()),
    }
}

/// Answers commands and reports until the stream ends.
async fn serve(node: usize, events: mpsc::Sender<NodeEvent>, mut commands: Streaming<ToNode>) {
    let snapshot = NodeEvent::Snapshot { sequence: 0, hashes: Vec::new(), last: true };
    let mut news = vec![snapshot];
    let mut reports = tokio::time::interval(REPORT_INTERVAL);
    loop {
        for event in news.drain(..) {
            if events.send(event).await.is_err() {
                return;
            }
        }
        tokio::select! {
            command = commands.message() => {
                let Ok(Some(command)) = command else { return };
                let Ok(command) = Command::try_from(command) else { return };
                news.extend(answers(&command));
            }
            _ = reports.tick() => news.push(NodeEvent::Report(report(node, 0, NODE_BLOCKS))),
        }
    }
}

/// Asks for answers, so many at a time, for as long as wanted.
async fn ask(args: &PlaceArgs, grpc: SocketAddr) -> Result<Vec<Figure>, CommandError> {
    let end = Instant::now() + Duration::from_secs(args.seconds.into());
    let mut clients = JoinSet::new();
    for client in 0..args.concurrency {
        let channel = Endpoint::from_shared(format!("http://{grpc}"))?.connect().await?;
        clients.spawn(keep_asking(channel, client, args.prompt_tokens, end));
    }
    let (mut first, mut last) = (Times::default(), Times::default());
    while let Some(client) = clients.join_next().await {
        for (first_token, total) in client?? {
            first.add(first_token);
            last.add(total);
        }
    }
    let per_second = last.len() as f64 / f64::from(args.seconds);
    Ok(vec![
        count("nodes", args.nodes.into()),
        count("concurrency", args.concurrency.into()),
        count("prompt_tokens", args.prompt_tokens.into()),
        number("requests_per_second", per_second),
        first.figure("first_token_us"),
        last.figure("response_us"),
    ])
}

/// Times to the first token and to the end.
async fn keep_asking(
    channel: Channel,
    client: u32,
    prompt_tokens: u32,
    end: Instant,
) -> Result<Vec<(Duration, Duration)>, CommandError> {
    let mut inference = InferenceClient::new(channel);
    let mut times = Vec::new();
    while Instant::now() < end {
        // No two prompts begin alike.
        let seed = mix(u64::from(client) << 32 | times.len() as u64);
        let ids = (0..prompt_tokens).map(|at| (mix(seed ^ u64::from(at)) % VOCABULARY) as u32);
        let sampling = Sampling {
            temperature: Some(0.0),
            max_tokens: Some(OUTPUT_TOKENS),
            ignore_eos: Some(true),
            ..Sampling::default()
        };
        let request = GenerateRequest {
            input: Some(Input::TokenIds(TokenIds { ids: ids.collect() })),
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        let begin = Instant::now();
        let mut stream = inference.generate(request).await?.into_inner();
        let mut first = None;
        while let Some(message) = stream.message().await? {
            if !message.token_ids.is_empty() {
                first.get_or_insert_with(|| begin.elapsed());
            }
        }
        times.push((first.ok_or("an answer has no token")?, begin.elapsed()));
    }
    Ok(times)
}
