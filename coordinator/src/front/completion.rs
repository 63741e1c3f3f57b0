//! Completions under way: from the core's updates to messages for the client.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use baton_proto::wire::v1::GenerateResponse;
use tokio::sync::mpsc;

use super::choice::{Choice, Step};
use super::door::Admission;
use super::names::Named;
use super::refusal::Refusal;
use super::running::Run;
use super::trace::PartSpan;
use crate::core::{Core, RequestError, Update, Updates};

/// Messages that wait for a slow client; the rest waits as tokens in the core's channel.
const WAITING_MESSAGES: usize = 16;

/// A client that takes none of them for so long is given up.
const SLOW_CLIENT: Duration = Duration::from_secs(60);

/// A part of a completion, or why there is none.
pub(super) type Message = Result<GenerateResponse, Refusal>;

/// What a request holds until its last completion has ended.
pub(super) struct Ticket {
    pub(super) admission: Admission,
    /// Tokens that the client was given.
    emitted: AtomicU64,
    /// A completion failed, or it was noticed that the client has left.
    over: AtomicBool,
    _run: Run,
}

impl Ticket {
    pub(super) fn new(admission: Admission, run: Run) -> Self {
        Self { admission, emitted: AtomicU64::new(0), over: AtomicBool::new(false), _run: run }
    }

    /// The client is given so many tokens more.
    fn emit(&self, tokens: usize) {
        self.admission.charge_output(tokens);
        self.emitted.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// Nobody takes messages any more: after a failure nobody has to.
    fn client_left(&self, span: &PartSpan) {
        if !self.over.swap(true, Ordering::Relaxed) {
            span.left();
            metrics::counter!("baton_client_disconnects_total").increment(1);
        }
    }

    fn failed(&self, error: RequestError) -> Refusal {
        self.over.store(true, Ordering::Relaxed);
        Refusal::Failed { error, emitted: self.emitted.load(Ordering::Relaxed) }
    }
}

/// A completion that the core has accepted. Dropping it cancels it.
pub(super) struct Accepted {
    pub(super) choice: Choice,
    pub(super) updates: Updates,
    pub(super) span: PartSpan,
}

/// Where a completion's messages go.
struct Out {
    messages: mpsc::Sender<Message>,
    /// A place that is kept for an error.
    last_word: mpsc::OwnedPermit<Message>,
    ticket: Arc<Ticket>,
    name: Option<Arc<Named>>,
}

/// Carries out a request's completions. Who drops the messages cancels them.
pub(super) fn run_all(
    accepted: Vec<Accepted>,
    core: &Core,
    ticket: Ticket,
    name: Option<Named>,
) -> mpsc::Receiver<Message> {
    let (ticket, name) = (Arc::new(ticket), name.map(Arc::new));
    let (sender, messages) = mpsc::channel(WAITING_MESSAGES + accepted.len());
    // All before any runs: then there is room for them.
    let room = |_: &Accepted| sender.clone().try_reserve_owned();
    let last_words: Result<Vec<_>, _> = accepted.iter().map(room).collect();
    let last_words = last_words.expect("the channel has a place for each completion");
    for (accepted, last_word) in accepted.into_iter().zip(last_words) {
        let (ticket, name) = (ticket.clone(), name.clone());
        let out = Out { messages: sender.clone(), last_word, ticket, name };
        tokio::spawn(run(accepted, core.clone(), out));
    }
    messages
}

/// Carries one choice's updates to the client. A client that goes away closes `messages`; dropping
/// `updates` then cancels the request.
async fn run(accepted: Accepted, core: Core, out: Out) {
    // In this order, so that the request has been given up before its name is free.
    let Out { messages, last_word, ticket, mut name } = out;
    let Accepted { mut choice, mut updates, mut span } = accepted;
    loop {
        let update = tokio::select! {
            () = messages.closed() => return ticket.client_left(&span),
            () = aborted(name.as_deref()) => Some(Update::Failed(RequestError::Cancelled)),
            update = updates.recv() => update,
        };
        let (message, last) = match update.map(|update| choice.take(update)) {
            Some(Step::Nothing) => continue,
            Some(Step::Send(message)) => (Ok(message), false),
            Some(Step::Stop(message)) => {
                core.stop(updates.id()).await;
                (Ok(message), false)
            }
            Some(Step::Last(message)) => (Ok(message), true),
            Some(Step::Fail(error)) => (Err(ticket.failed(error)), true),
            None => (Err(ticket.failed(RequestError::ShuttingDown)), true),
        };
        match &message {
            Ok(GenerateResponse { request_id, finished: Some(finished), .. }) => {
                span.finished(request_id, finished);
            }
            Ok(_) => {}
            Err(refusal) => span.failed(refusal),
        }
        if let Ok(message) = &message {
            ticket.emit(message.token_ids.len());
        }
        if last {
            // Whoever has the end may send the request again.
            name = None;
        }
        match tokio::time::timeout(SLOW_CLIENT, messages.send(message)).await {
            Ok(Ok(())) if last => return,
            Ok(Ok(())) => {}
            Ok(Err(_)) => return ticket.client_left(&span),
            // An end without an error would look like success.
            Err(_) => {
                span.failed(&Refusal::SlowClient);
                last_word.send(Err(Refusal::SlowClient));
                return;
            }
        }
    }
}

/// Returns when the client ends the request by its name.
async fn aborted(name: Option<&Named>) {
    match name {
        Some(name) => name.aborted().await,
        None => std::future::pending().await,
    }
}
