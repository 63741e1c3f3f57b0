//! The driver with nodes that are ends of channels.

use baton_proto::hash::CacheSalt;
use baton_proto::ids::{Role, TransferId};
use baton_proto::message::{NodeFinish, TokenEvent};
use baton_proto::sampling::SamplingParams;
use metrics_exporter_prometheus::PrometheusBuilder;

use super::*;
use crate::core::{NewRequest, OutputToken, RequestError, Updates};
use crate::requests::Limits;
use crate::testing::{hello, node};

struct Node {
    name: NodeId,
    link: LinkId,
    commands: mpsc::Receiver<Command>,
    closed: oneshot::Receiver<()>,
    driver: mpsc::Sender<FromLink>,
}

impl Node {
    async fn join(driver: &mpsc::Sender<FromLink>, name: &str, role: Role, outbox: usize) -> Self {
        let (outbox, commands) = mpsc::channel(outbox);
        let (open, closed) = oneshot::channel();
        let (reply, answer) = oneshot::channel();
        let (name, link) = (node(name), Link { outbox, _open: open });
        let hello = FromLink::Hello { node: name.clone(), hello: hello(role, 1), link, reply };
        driver.send(hello).await.unwrap();
        let link = answer.await.unwrap().unwrap();
        Self { name, link, commands, closed, driver: driver.clone() }
    }

    async fn command(&mut self) -> Command {
        self.commands.recv().await.unwrap()
    }

    async fn say(&self, event: NodeEvent) {
        let (node, link) = (self.name.clone(), self.link);
        self.driver.send(FromLink::Event { node, link, event }).await.unwrap();
    }

    async fn token(&self, id: TransferId, position: u32, finish: Option<NodeFinish>) {
        let (token, logprobs, prefill) = (100 + position, None, None);
        let event = TokenEvent { id, position, token, logprobs, finish, prefill };
        self.say(NodeEvent::Tokens(vec![event])).await;
    }
}

fn start() -> (Core, mpsc::Sender<FromLink>) {
    let limits = Limits { requests: 2, tokens: 1000 };
    let (driver, core, links) =
        Driver::new(Options { limits, index_blocks: 100, placement: Default::default() });
    tokio::spawn(driver.run());
    (core, links)
}

fn request(id: u128) -> NewRequest {
    NewRequest {
        id: RequestId(id),
        model: "demo".to_owned(),
        tokens: vec![1, 2, 3].into(),
        embed: None,
        sampling: SamplingParams { max_tokens: 3, ..SamplingParams::default() },
        salt: CacheSalt::default(),
        standing: Default::default(),
        tenant: Default::default(),
        deadline: None,
        trace: None,
    }
}

async fn tokens(updates: &mut Updates) -> Vec<OutputToken> {
    match updates.recv().await {
        Some(Update::Tokens(tokens)) => tokens,
        other => panic!("no tokens: {other:?}"),
    }
}

#[tokio::test]
async fn a_request_runs_on_a_joined_node() {
    let (core, links) = start();
    let unknown = SubmitError::UnknownModel("demo".to_owned());
    assert_eq!(core.submit(request(1)).await.unwrap_err(), unknown);
    let mut d = Node::join(&links, "d", Role::Decode, 8).await;
    assert!(core.status().await.ready);
    let mut updates = core.submit(request(1)).await.unwrap();
    let Command::Decode { job, prefill: None, .. } = d.command().await else { panic!("no job") };
    d.token(job.id, 0, None).await;
    d.token(job.id, 1, Some(NodeFinish::EndOfSequence)).await;
    assert_eq!(tokens(&mut updates).await[0].token, 100);
    assert_eq!(tokens(&mut updates).await[0].token, 101);
    assert!(matches!(updates.recv().await, Some(Update::Done(_))));
    assert_eq!(updates.recv().await, None);
    assert_eq!(core.status().await.requests_finished, 1);
    assert_eq!(core.nodes().await[0].node, d.name);
}

#[test]
fn every_refusal_is_counted_whoever_refuses() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let shown = recorder.handle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    ::metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let (core, links) = start();
            core.submit(request(1)).await.unwrap_err();
            let _d = Node::join(&links, "d", Role::Decode, 8).await;
            let running = [core.submit(request(1)).await, core.submit(request(2)).await];
            assert!(running.iter().all(Result::is_ok));
            core.submit(request(3)).await.unwrap_err();
        });
    });
    for (reason, count) in [("invalid", 1), ("overloaded", 1)] {
        let line = format!("baton_requests_rejected_total{{reason=\"{reason}\"}} {count}");
        assert!(shown.render().contains(&line), "{}", shown.render());
    }
}

#[tokio::test]
async fn a_client_that_goes_away_cancels() {
    let (core, links) = start();
    let mut d = Node::join(&links, "d", Role::Decode, 8).await;
    // One after the other, more than are allowed at a time: each one's place is given back.
    for id in 1..20 {
        let updates = core.submit(request(id)).await.unwrap();
        let Command::Decode { job, .. } = d.command().await else { panic!("no job") };
        drop(updates);
        assert_eq!(d.command().await, Command::Cancel(job.id));
    }
    // One that goes away before it is answered leaves nothing either.
    let mut submit = Box::pin(core.submit(request(20)));
    let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(submit.as_mut().poll(cx))).await;
    assert!(polled.is_pending());
    drop(submit);
    let status = core.status().await;
    assert_eq!((status.requests_active, status.requests_finished), (0, 0));
}

#[tokio::test]
async fn who_gives_up_on_an_id_that_runs_already_cancels_nothing() {
    let (core, links) = start();
    let mut d = Node::join(&links, "d", Role::Decode, 8).await;
    let mut updates = core.submit(request(1)).await.unwrap();
    let Command::Decode { job, .. } = d.command().await else { panic!("no job") };
    let mut again = Box::pin(core.submit(request(1)));
    let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(again.as_mut().poll(cx))).await;
    assert!(polled.is_pending());
    drop(again);
    assert_eq!(core.submit(request(1)).await.unwrap_err(), SubmitError::DuplicateId(RequestId(1)));
    d.token(job.id, 0, Some(NodeFinish::EndOfSequence)).await;
    assert_eq!(tokens(&mut updates).await[0].token, 100);
}

#[tokio::test]
async fn stopping_is_an_end_and_cancelling_a_failure() {
    let (core, links) = start();
    let mut d = Node::join(&links, "d", Role::Decode, 8).await;
    for stop in [true, false] {
        let mut updates = core.submit(request(1)).await.unwrap();
        let Command::Decode { job, .. } = d.command().await else { panic!("no job") };
        if stop {
            core.stop(updates.id()).await;
            let Some(Update::Done(summary)) = updates.recv().await else { panic!("not done") };
            assert_eq!(summary.finish, None);
        } else {
            core.cancel(updates.id()).await;
            let end = updates.recv().await;
            assert_eq!(end, Some(Update::Failed(RequestError::Cancelled)));
        }
        assert_eq!(d.command().await, Command::Cancel(job.id));
    }
}

#[tokio::test]
async fn a_node_that_does_not_take_its_commands_is_disconnected() {
    let (core, links) = start();
    let slow = Node::join(&links, "slow", Role::Decode, 1).await;
    let first = core.submit(request(1)).await.unwrap();
    let mut spare = Node::join(&links, "spare", Role::Decode, 8).await;
    // The cancellation does not fit into the outbox any more.
    drop(first);
    assert!(slow.closed.await.is_err(), "the driver hangs up");
    let _updates = core.submit(request(2)).await.unwrap();
    assert!(matches!(spare.command().await, Command::Decode { .. }));
    assert_eq!(core.status().await.decode_nodes, 1);
}

#[tokio::test]
async fn shutting_down_ends_all_requests_and_takes_no_more() {
    let (core, links) = start();
    let mut d = Node::join(&links, "d", Role::Decode, 8).await;
    let mut updates = core.submit(request(1)).await.unwrap();
    let Command::Decode { job, .. } = d.command().await else { panic!("no job") };
    core.shut_down().await;
    assert_eq!(updates.recv().await, Some(Update::Failed(RequestError::ShuttingDown)));
    assert_eq!(d.command().await, Command::Cancel(job.id));
    assert_eq!(core.submit(request(2)).await.unwrap_err(), SubmitError::ShuttingDown);
}
