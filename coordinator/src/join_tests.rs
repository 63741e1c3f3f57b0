//! The join service over real connections.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use baton_identity::{COORDINATOR_SERVER_NAME, ClusterCa, Part};
use baton_proto::hash::{BlockHash, CacheSalt};
use baton_proto::ids::{RequestId, Role};
use baton_proto::message::Command;
use baton_proto::sampling::SamplingParams;
use baton_proto::wire::node::join_client::JoinClient;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_stream::StreamExt;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::*;
use crate::control::Options;
use crate::core::{CacheQuery, Core, NewRequest, Updates};
use crate::driver::Driver;
use crate::exchange::Caller;
use crate::front::fixtures::until;
use crate::requests::Limits;
use crate::testing::{hello, node};

const REQUESTS: usize = 10;

fn drive() -> (Core, mpsc::Sender<FromLink>) {
    let limits = Limits { requests: REQUESTS, tokens: 1000 };
    let (driver, core, links) =
        Driver::new(Options { limits, index_blocks: 2000, placement: Default::default() });
    tokio::spawn(driver.run());
    (core, links)
}

struct World {
    dir: TempDir,
    ca: ClusterCa,
    core: Core,
    address: SocketAddr,
    identity: Identity,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create(&dir.path().join("ca")).unwrap();
        let (core, links) = drive();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let identity = issue(&ca, dir.path(), Part::Coordinator, "c", "c");
        let world = Self { dir, ca, core: core.clone(), address, identity: identity.clone() };
        tokio::spawn(async move {
            serve(listener, &identity, REQUESTS, core, links, std::future::pending())
                .await
                .unwrap();
        });
        world
    }

    fn issue(&self, part: Part, name: &str, folder: &str) -> Identity {
        issue(&self.ca, self.dir.path(), part, name, folder)
    }

    async fn join(&self, name: &str, hello: Hello) -> Result<Node, Status> {
        let identity = self.issue(Part::Node, name, name);
        dial(&identity, self.address, hello).await
    }

    async fn blocks_known(&self) -> u64 {
        self.core.cache(CacheQuery::default()).await.index_blocks
    }

    async fn submit(&self) -> Updates {
        let request = NewRequest {
            id: RequestId(1),
            model: "demo".to_owned(),
            tokens: vec![1, 2, 3].into(),
            embed: None,
            sampling: SamplingParams::default(),
            salt: CacheSalt::default(),
            standing: Default::default(),
            tenant: Default::default(),
            deadline: None,
            trace: None,
        };
        self.core.submit(request).await.unwrap()
    }
}

fn issue(ca: &ClusterCa, dir: &Path, part: Part, name: &str, folder: &str) -> Identity {
    let dir = dir.join(folder);
    if !dir.exists() {
        ca.issue(part, &node(name), &["127.0.0.1"], &dir).unwrap();
    }
    Identity::load(&dir).unwrap()
}

/// A joined node; dropping it closes its connection.
#[derive(Debug)]
struct Node {
    _events: mpsc::Sender<FromNode>,
    commands: Streaming<ToNode>,
}

impl Node {
    async fn command(&mut self) -> Command {
        self.commands.message().await.unwrap().unwrap().try_into().unwrap()
    }
}

async fn dial(identity: &Identity, address: SocketAddr, hello: Hello) -> Result<Node, Status> {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(identity.ca_pem()))
        .identity(tonic::transport::Identity::from_pem(identity.cert_pem(), identity.key_pem()))
        .domain_name(COORDINATOR_SERVER_NAME);
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();
    let (events, outgoing) = mpsc::channel(8);
    let outgoing = tokio_stream::once(hello.into()).chain(ReceiverStream::new(outgoing));
    let mut commands = JoinClient::new(channel).join(outgoing).await?.into_inner();
    let welcome = commands.message().await?.unwrap().message;
    assert!(matches!(welcome, Some(to_node::Message::Welcome(_))));
    Ok(Node { _events: events, commands })
}

#[tokio::test]
async fn a_node_is_who_its_certificate_says() {
    let world = World::start().await;
    let _p = world.join("p-1", hello(Role::Prefill, 1)).await.unwrap();
    let names: Vec<_> = world.core.nodes().await.into_iter().map(|view| view.node).collect();
    assert_eq!(names, [node("p-1")]);
    // A coordinator's certificate is no node's.
    let identity = world.issue(Part::Coordinator, "c2", "c2");
    let error = dial(&identity, world.address, hello(Role::Decode, 1)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::PermissionDenied);
}

/// What is presented to a node that connects now.
async fn presented(identity: &Identity, address: SocketAddr) -> Vec<u8> {
    let tls = TlsConnector::from(Arc::new(identity.rustls_client(&[b"h2"])));
    let name = ServerName::try_from(COORDINATOR_SERVER_NAME).unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let stream = tls.connect(name, stream).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

fn certificate(identity: &Identity) -> Vec<u8> {
    CertificateDer::from_pem_slice(identity.cert_pem().as_bytes()).unwrap().to_vec()
}

#[tokio::test]
async fn a_renewed_certificate_is_for_new_connections() {
    let world = World::start().await;
    let mut d = world.join("d", hello(Role::Decode, 1)).await.unwrap();
    let n = world.issue(Part::Node, "n", "n");
    let old = certificate(&world.identity);
    assert_eq!(presented(&n, world.address).await, old);

    let renewed = world.issue(Part::Coordinator, "c", "renewed");
    world.identity.reload(&world.dir.path().join("renewed")).unwrap();
    assert_ne!(certificate(&renewed), old);
    assert_eq!(presented(&n, world.address).await, certificate(&renewed));

    // Another member's does not count, and a connection from before goes on.
    world.issue(Part::Coordinator, "other", "other");
    assert!(world.identity.reload(&world.dir.path().join("other")).is_err());
    assert_eq!(presented(&n, world.address).await, certificate(&renewed));
    let _updates = world.submit().await;
    assert!(matches!(d.command().await, Command::Decode { .. }));
}

#[tokio::test]
async fn an_older_life_and_an_unequal_model_are_refused_with_the_reason() {
    let world = World::start().await;
    let _d = world.join("d", hello(Role::Decode, 2)).await.unwrap();
    let error = world.join("d", hello(Role::Decode, 1)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    assert!(error.message().starts_with("node d joined with epoch 2 before"), "{error}");
    let mut other = hello(Role::Decode, 1);
    other.geometry.layers += 1;
    let error = world.join("e", other).await.unwrap_err();
    assert!(error.message().contains("another KV geometry"), "{error}");
    assert_eq!(world.core.status().await.decode_nodes, 1);
}

#[tokio::test]
async fn a_killed_node_loses_no_request() {
    let world = World::start().await;
    let mut first = world.join("d-1", hello(Role::Decode, 1)).await.unwrap();
    let mut updates = world.submit().await;
    assert!(matches!(first.command().await, Command::Decode { .. }));
    let mut second = world.join("d-2", hello(Role::Decode, 1)).await.unwrap();
    drop(first);
    let Command::Decode { job, .. } = second.command().await else { panic!("no job") };
    assert_eq!(job.id.attempt, 2);
    world.core.stop(updates.id()).await;
    assert!(matches!(updates.recv().await, Some(crate::core::Update::Done(_))));
}

#[tokio::test]
async fn a_hung_node_is_noticed() {
    let world = World::start().await;
    // Everything passes through here until the first command has; then nothing does, and no
    // connection ends.
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (proxy_address, real) = (proxy.local_addr().unwrap(), world.address);
    let (freeze, frozen) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let (mut node, _) = proxy.accept().await.unwrap();
        let mut coordinator = TcpStream::connect(real).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut node, &mut coordinator) => {}
            _ = frozen => std::future::pending().await,
        }
    });
    let identity = world.issue(Part::Node, "d-1", "d-1");
    let mut first = dial(&identity, proxy_address, hello(Role::Decode, 1)).await.unwrap();
    let _updates = world.submit().await;
    assert!(matches!(first.command().await, Command::Decode { .. }));
    freeze.send(()).unwrap();
    let mut second = world.join("d-2", hello(Role::Decode, 1)).await.unwrap();
    assert!(matches!(second.command().await, Command::Decode { .. }));
}

#[tokio::test]
async fn a_message_that_makes_no_sense_ends_the_stream() {
    let world = World::start().await;
    let identity = world.issue(Part::Node, "d", "d");
    let mut d = dial(&identity, world.address, hello(Role::Decode, 1)).await.unwrap();
    d._events.send(FromNode { message: None }).await.unwrap();
    assert!(d.commands.message().await.unwrap().is_none());
    assert_eq!(world.core.status().await.decode_nodes, 0);
}

#[tokio::test]
async fn a_node_that_hangs_up_while_it_is_admitted_is_reported_gone() {
    let world = World::start().await;
    let identity = world.issue(Part::Coordinator, "c2", "c2");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (links, mut heard) = mpsc::channel(8);
    let core = world.core.clone();
    let never = std::future::pending();
    tokio::spawn(async move { serve(listener, &identity, 1, core, links, never).await });
    let identity = world.issue(Part::Node, "d", "d");
    let dialling =
        tokio::spawn(async move { dial(&identity, address, hello(Role::Decode, 1)).await });
    let Some(FromLink::Hello { link, reply, .. }) = heard.recv().await else { panic!("no hello") };
    dialling.abort();
    link.outbox.closed().await;
    reply.send(Ok(LinkId(1))).unwrap();
    assert!(matches!(heard.recv().await, Some(FromLink::Closed { link: LinkId(1), .. })));
}

#[tokio::test]
async fn coordinators_hear_each_other_and_no_node() {
    let world = World::start().await;
    let (core, driver) = drive();
    let caller = |name: &str, part| {
        let identity = world.issue(part, name, name);
        Caller { identity, core: core.clone(), driver: driver.clone() }
    };
    let address = world.address.to_string();
    for (name, part) in [("n", Part::Node), ("c", Part::Coordinator)] {
        let result = caller(name, part).call_once(&address).await;
        assert!(result.is_err(), "{name} is a node, or the coordinator itself");
    }
    let calling = tokio::spawn(caller("c2", Part::Coordinator).keep_exchanging(address));
    let heard = |core: Core, peers: Vec<String>| async move {
        until(async || (core.status().await.peers == peers).then_some(())).await;
    };
    heard(core.clone(), vec!["c".to_owned()]).await;
    heard(world.core.clone(), vec!["c2".to_owned()]).await;
    calling.abort();
    heard(world.core.clone(), Vec::new()).await;
}

#[tokio::test]
async fn news_of_many_blocks_arrives_whole() {
    let world = World::start().await;
    let node = world.join("d", hello(Role::Decode, 1)).await.unwrap();
    let hash = |number: u32| BlockHash([0; 16]).child(&[number]);
    let hashes: Vec<_> = (0..1000).map(hash).collect();
    let snapshot = NodeEvent::Snapshot { sequence: 7, hashes: hashes.clone(), last: true };
    let (stored, removed) = ((1000..1600).map(hash).collect(), hashes[..999].to_vec());
    let events = [snapshot, NodeEvent::Cache { sequence: 8, stored, removed }];
    for event in events {
        node._events.send(event.into()).await.unwrap();
    }
    // Nothing answers an event; what is known tells when both were heard.
    let mut known = BTreeSet::new();
    until(async || {
        known.insert(world.blocks_known().await);
        known.contains(&601).then_some(())
    })
    .await;
    assert!(known.iter().all(|&blocks| blocks <= 1000), "{known:?}");
}
