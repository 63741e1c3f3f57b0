//! `baton.v1.Inference`.

use std::time::{Duration, SystemTime};

use baton_proto::ids::RequestId;
use baton_proto::wire::v1::inference_server::Inference;
use baton_proto::wire::v1::{GenerateRequest, GenerateResponse};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::Front;
use super::choice::{Choice, Step};
use super::models::ServedModel;
use super::prepare::{Prepared, prepare};
use super::refusal::{Refusal, failure};
use crate::core::{Core, NewRequest, SubmitError, Updates};

/// Messages that wait for a slow client; the rest waits as tokens in the core's channel.
const WAITING_MESSAGES: usize = 16;

type Message = Result<GenerateResponse, Status>;

#[tonic::async_trait]
impl Inference for Front {
    type GenerateStream = ReceiverStream<Message>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived = Instant::now();
        let timeout = grpc_timeout(request.metadata());
        self.start(request.into_inner(), timeout, arrived).await.map_or_else(
            |refusal| {
                let status = Status::from(refusal);
                let code = format!("{:?}", status.code());
                metrics::counter!("baton_refused_requests_total", "code" => code).increment(1);
                Err(status)
            },
            |messages| Ok(Response::new(ReceiverStream::new(messages))),
        )
    }
}

impl Front {
    async fn start(
        &self,
        request: GenerateRequest,
        timeout: Option<Duration>,
        arrived: Instant,
    ) -> Result<mpsc::Receiver<Message>, Refusal> {
        let model = match self.aliases.resolve(&request, &self.core).await? {
            Some(model) => model,
            None => self.models.get(&request.model)?.clone(),
        };
        let info = self.core.model(&model.name);
        let info = info.ok_or_else(|| SubmitError::NoNodes(model.name.clone()))?;
        let (seed, now) = (u64::from_ne_bytes(random()), SystemTime::now());
        let for_prepare = model.clone();
        // A long prompt takes milliseconds of computing, which would hold up other requests.
        let prepared =
            tokio::task::spawn_blocking(move || prepare(request, &for_prepare, &info, seed, now));
        let prepared = prepared.await.map_err(|_| Refusal::Submit(SubmitError::ShuttingDown))??;
        let deadline = [prepared.deadline, timeout].into_iter().flatten().min();
        let deadline = deadline.map(|deadline| arrived + deadline);
        let accepted = self.submit_all(&model, &prepared, deadline).await?;

        let (sender, messages) = mpsc::channel(WAITING_MESSAGES);
        for (choice, updates) in accepted {
            tokio::spawn(run(choice, updates, self.core.clone(), sender.clone()));
        }
        Ok(messages)
    }

    /// All choices are accepted or none: dropping the accepted ones cancels them.
    async fn submit_all(
        &self,
        model: &ServedModel,
        prepared: &Prepared,
        deadline: Option<Instant>,
    ) -> Result<Vec<(Choice, Updates)>, Refusal> {
        let mut accepted = Vec::new();
        for index in 0..prepared.choices {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Refusal::Late);
            }
            let mut sampling = prepared.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index.into());
            let id = RequestId(u128::from_ne_bytes(random()));
            let choice = Choice::new(
                index,
                id,
                model,
                &prepared.tokens,
                prepared.stops.clone(),
                sampling.min_tokens,
            );
            let request = NewRequest {
                id,
                model: model.name.clone(),
                tokens: prepared.tokens.as_slice().into(),
                sampling,
                salt: prepared.salt,
                standing: prepared.standing,
                deadline: left,
            };
            accepted.push((choice, self.core.submit(request).await?));
        }
        Ok(accepted)
    }
}

/// Carries one choice's updates to the client. A client that goes away closes `messages`; dropping
/// `updates` then cancels the request.
async fn run(
    mut choice: Choice,
    mut updates: Updates,
    core: Core,
    messages: mpsc::Sender<Message>,
) {
    loop {
        let update = tokio::select! {
            () = messages.closed() => return,
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
            Some(Step::Fail(error)) => (Err(failure(&error)), true),
            None => (Err(Refusal::Submit(SubmitError::ShuttingDown).into()), true),
        };
        if messages.send(message).await.is_err() || last {
            return;
        }
    }
}

/// The deadline that a gRPC client sends along: up to eight digits and a unit. One that cannot be
/// read is none, as in other gRPC servers.
fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_grpc_timeouts() {
        let parse = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            grpc_timeout(&metadata)
        };
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "m", "-1S", "+1S", "1", "1x", "123456789S", "1.5S"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
