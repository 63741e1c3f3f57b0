//! One request to whichever coordinator serves it.

use std::io;

use baton_proto::wire::v1::{FinishReason, GenerateRequest};

use super::generate::Completion;
use super::{CommandError, Failed};
use crate::client::{Failure, Target, explain, is_lost};

/// Sends `request` to the first coordinator that serves it and gathers its completions; `on_text`
/// sees the first one's text as it comes.
pub(crate) async fn complete(
    target: &Target,
    request: GenerateRequest,
    mut on_text: impl FnMut(&str) -> io::Result<()>,
) -> Result<Vec<Completion>, CommandError> {
    let mut failures = Vec::new();
    for address in target.addresses() {
        match complete_at(target, address, request.clone(), &mut on_text).await {
            Ok(choices) => return Ok(choices),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::TryAnother(error)) => failures.push(error.to_string()),
        }
    }
    Err(Failed::with(Failed::UNREACHABLE, failures.join("; ")))
}

async fn complete_at(
    target: &Target,
    address: &str,
    request: GenerateRequest,
    on_text: &mut impl FnMut(&str) -> io::Result<()>,
) -> Result<Vec<Completion>, Failure> {
    let wanted = request.n.unwrap_or(1).max(1) as usize;
    let mut stream = target.inference(address).await?.generate(request).await?.into_inner();
    // Not before it is known that so many may be asked for.
    let mut choices: Vec<Completion> = Vec::new();
    choices.resize_with(wanted, Completion::default);
    let mut begun = false;
    loop {
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(status) if begun => return Err(Failure::Final(broken(&status, &choices))),
            Err(status) => return Err(status.into()),
        };
        begun = true;
        if message.choice == 0 {
            on_text(&message.text).map_err(|e| Failure::Final(e.into()))?;
        }
        let unasked = || Failure::Final("the coordinator sent a choice nobody asked for".into());
        choices.get_mut(message.choice as usize).ok_or_else(unasked)?.add(message);
    }
    match choices.iter().all(|c| c.finished.reason() != FinishReason::Unspecified) {
        true => Ok(choices),
        false => Err(Failure::Final("the stream ended before the request was finished".into())),
    }
}

/// What to say of a stream that fails after its first message. It is not tried again: what was
/// shown cannot be taken back.
fn broken(status: &tonic::Status, choices: &[Completion]) -> CommandError {
    if !is_lost(status) {
        return explain(status);
    }
    let tokens: usize = choices.iter().map(|choice| choice.token_ids.len()).sum();
    format!(
        "the stream broke after {tokens} tokens; the same request with the same seed gives the same \
         answer: {}",
        status.message()
    )
    .into()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use baton_proto::wire::v1::inference_server::{Inference, InferenceServer};
    use baton_proto::wire::v1::{
        DetokenizeRequest, DetokenizeResponse, EmbedRequest, EmbedResponse, Finished,
        GenerateResponse, TokenizeRequest, TokenizeResponse,
    };
    use tokio::net::TcpListener;
    use tokio_stream::Iter;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Request, Response, Status};

    use super::*;

    /// A coordinator that answers every request the same.
    #[derive(Clone)]
    struct Script(Result<Vec<Result<GenerateResponse, Status>>, Status>);

    #[tonic::async_trait]
    impl Inference for Script {
        type GenerateStream = Iter<std::vec::IntoIter<Result<GenerateResponse, Status>>>;

        async fn generate(
            &self,
            _: Request<GenerateRequest>,
        ) -> Result<Response<Self::GenerateStream>, Status> {
            self.0.clone().map(|messages| Response::new(tokio_stream::iter(messages)))
        }

        async fn tokenize(
            &self,
            _: Request<TokenizeRequest>,
        ) -> Result<Response<TokenizeResponse>, Status> {
            unreachable!("nobody asks")
        }

        async fn detokenize(
            &self,
            _: Request<DetokenizeRequest>,
        ) -> Result<Response<DetokenizeResponse>, Status> {
            unreachable!("nobody asks")
        }

        async fn embed(&self, _: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
            unreachable!("nobody asks")
        }
    }

    async fn serve(script: Script) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let server = Server::builder().add_service(InferenceServer::new(script));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        address
    }

    fn message(token: u32, finished: bool) -> Result<GenerateResponse, Status> {
        let end = Finished { reason: FinishReason::Length.into(), ..Finished::default() };
        let finished = finished.then_some(end);
        Ok(GenerateResponse { token_ids: vec![token], finished, ..GenerateResponse::default() })
    }

    async fn ask(scripts: &[Script]) -> Result<Vec<u32>, String> {
        // Nobody listens there.
        let mut addresses = vec!["127.0.0.1:1".to_owned()];
        for script in scripts {
            addresses.push(serve(script.clone()).await.to_string());
        }
        let target = Target::new(&addresses.join(","));
        let answer = complete(&target, GenerateRequest::default(), |_| Ok(())).await;
        answer.map(|mut choices| choices.remove(0).token_ids).map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn a_coordinator_that_cannot_serve_is_not_the_last_word() {
        let serves = Script(Ok(vec![message(1, false), message(2, true)]));
        let empty = Script(Err(Status::unavailable("no nodes")));
        let broken = Script(Ok(vec![Err(Status::unavailable("going down"))]));
        assert_eq!(ask(&[empty.clone(), broken, serves.clone()]).await, Ok(vec![1, 2]));
        assert_eq!(ask(std::slice::from_ref(&serves)).await, Ok(vec![1, 2]));
        let error = ask(&[empty]).await.unwrap_err();
        assert!(
            error.starts_with("no coordinator answers at 127.0.0.1:1 (Connection refused"),
            "{error}"
        );
        assert!(error.ends_with("; no nodes"), "{error}");
    }

    #[tokio::test]
    async fn what_would_fail_again_and_what_was_begun_is_not_tried_elsewhere() {
        let serves = Script(Ok(vec![message(1, true)]));
        let refuses = Script(Err(Status::invalid_argument("no prompt")));
        assert_eq!(ask(&[refuses, serves.clone()]).await, Err("no prompt".to_owned()));
        let breaks = Script(Ok(vec![message(1, false), Err(Status::unavailable("lost"))]));
        let error = "the stream broke after 1 tokens; the same request with the same seed gives the same answer: lost".to_owned();
        assert_eq!(ask(&[breaks, serves]).await, Err(error));
    }
}
