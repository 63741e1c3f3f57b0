//! A gateway's calls of a front whose core is played by the test.

use baton_proto::message::{Logprobs, NodeFinish};
use baton_proto::wire::engine::generate_complete::MatchedStop;
use baton_proto::wire::engine::generate_request::Input;
use baton_proto::wire::engine::generate_response::Response;
use baton_proto::wire::engine::vllm_engine_client::VllmEngineClient;
use baton_proto::wire::engine::{
    AbortRequest, GenerateComplete, GenerateRequest, GenerateStreamChunk, GetLoadsRequest,
    GetModelInfoRequest, GetServerInfoRequest, HealthCheckRequest, SamplingParams, TokenizedInput,
};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::core::Update;
use crate::front::fixtures::{MAX_MODEL_LEN, Play, Played, done, output, start, tokenizer, until};

fn request(id: &str, params: SamplingParams) -> GenerateRequest {
    let input = TokenizedInput { original_text: String::new(), input_ids: vec![10, 11] };
    GenerateRequest {
        request_id: id.to_owned(),
        input: Some(Input::Tokenized(input)),
        sampling_params: Some(params),
        ..GenerateRequest::default()
    }
}

fn client(played: &Played) -> VllmEngineClient<Channel> {
    VllmEngineClient::new(played.channel())
}

async fn rest(
    mut stream: Streaming<baton_proto::wire::engine::GenerateResponse>,
) -> Result<(Vec<GenerateStreamChunk>, Vec<GenerateComplete>), Status> {
    let (mut chunks, mut completions) = (Vec::new(), Vec::new());
    while let Some(message) = stream.message().await? {
        match message.response.unwrap() {
            Response::Chunk(chunk) => chunks.push(chunk),
            Response::Complete(complete) => completions.push(complete),
        }
    }
    Ok((chunks, completions))
}

fn two_tokens() -> Vec<Update> {
    let logprobs = |of: f32| Some(Logprobs { logprob: of, top: vec![(7, of), (8, of - 1.0)] });
    let prompt = Logprobs { logprob: -0.5, top: Vec::new() };
    let mut tokens = [output(20, None), output(21, Some(NodeFinish::Length))];
    (tokens[0].logprobs, tokens[1].logprobs) = (logprobs(-1.0), logprobs(-2.0));
    let tokens = tokens.map(|token| Update::Tokens(vec![token]));
    let mut updates = vec![Update::PromptLogprobs(vec![(11, prompt)])];
    updates.extend(tokens);
    updates.push(done(Some(NodeFinish::Length)));
    updates
}

#[tokio::test]
async fn a_stream_is_the_answer_in_chunks() {
    let played = start(|_| Play::Accept(two_tokens())).await;
    let params = SamplingParams { logprobs: Some(2), n: 2, ..SamplingParams::default() };
    let asked = |stream| GenerateRequest { stream, ..request("a", params.clone()) };
    let whole = client(&played).generate(asked(false)).await.unwrap().into_inner();
    let (none, whole) = rest(whole).await.unwrap();
    assert!(none.is_empty());
    let parts = client(&played).generate(asked(true)).await.unwrap().into_inner();
    let (chunks, ends) = rest(parts).await.unwrap();
    for index in 0..2 {
        let whole = whole.iter().find(|complete| complete.index == index).unwrap();
        let end = ends.iter().find(|complete| complete.index == index).unwrap();
        assert_eq!(whole.output_ids, [20, 21]);
        assert_eq!((whole.finish_reason.as_str(), whole.completion_tokens), ("length", 2));
        assert_eq!((whole.prompt_tokens, whole.cached_tokens), (2, 1));
        let logprobs = whole.output_logprobs.as_ref().unwrap();
        assert_eq!(logprobs.token_logprobs, [-1.0, -2.0]);
        assert_eq!(logprobs.top_logprobs[1].values, [-2.0, -3.0]);
        let prompt = whole.input_logprobs.as_ref().unwrap();
        let values: Vec<_> = prompt.token_logprobs.iter().map(|token| token.value).collect();
        assert_eq!((values, &prompt.token_ids), (vec![None, Some(-0.5)], &vec![10, 11]));

        let chunks: Vec<_> = chunks.iter().filter(|chunk| chunk.index == index).collect();
        let ids: Vec<_> = chunks.iter().flat_map(|chunk| &chunk.token_ids).copied().collect();
        assert_eq!((&ids, chunks[0].prompt_tokens), (&whole.output_ids, 2));
        let counted: u32 = chunks.iter().map(|chunk| chunk.completion_tokens).sum();
        assert_eq!(counted, whole.completion_tokens);
        assert_eq!(chunks[0].input_logprobs, whole.input_logprobs);
        assert!(end.output_ids.is_empty() && end.output_logprobs.is_none());
        assert_eq!((end.cached_tokens, &end.finish_reason), (1, &whole.finish_reason));
    }
}

#[tokio::test]
async fn what_ended_the_output_is_named() {
    let ids = tokenizer().encode("one two three", false).unwrap();
    let play = move |asked: &crate::core::NewRequest| match asked.sampling.stop_token_ids.len() {
        0 => Play::UntilStopped(
            ids.iter().map(|&id| Update::Tokens(vec![output(id, None)])).collect(),
        ),
        _ => {
            let finish = Some(NodeFinish::StopToken(5));
            Play::Accept(vec![Update::Tokens(vec![output(5, finish)]), done(finish)])
        }
    };
    let played = start(play).await;
    let stop = SamplingParams { stop: vec!["two".into()], ..SamplingParams::default() };
    let token = SamplingParams { stop_token_ids: vec![5], ..SamplingParams::default() };
    for (params, matched) in
        [(stop, MatchedStop::MatchedStopStr("two".into())), (token, MatchedStop::MatchedTokenId(5))]
    {
        let stream = client(&played).generate(request("", params)).await.unwrap().into_inner();
        let (_, ends) = rest(stream).await.unwrap();
        assert_eq!((&*ends[0].finish_reason, &ends[0].matched_stop), ("stop", &Some(matched)));
    }
}

#[tokio::test]
async fn a_request_ends_by_its_name_and_runs_once() {
    let first = || vec![Update::Tokens(vec![output(20, None)])];
    let played = start(move |_| Play::Silence(first())).await;
    let ask = GenerateRequest { stream: true, ..request("mine", SamplingParams::default()) };
    let mut stream = client(&played).generate(ask.clone()).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let status = client(&played).generate(ask.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert!(status.message().contains("\"mine\"") && status.get_details_retry_info().is_some());

    let request_ids = vec!["another".to_owned(), "mine".to_owned()];
    client(&played).abort(AbortRequest { request_ids }).await.unwrap();
    assert_eq!(stream.message().await.unwrap_err().code(), Code::Cancelled);
    assert_eq!(played.dropped().await, played.asked()[0].id);
    // The name is free: so it is again when a client goes away without a word.
    let mut again = client(&played).generate(ask.clone()).await.unwrap().into_inner();
    again.message().await.unwrap().unwrap();
    drop(again);
    played.dropped().await;
    until(async || client(&played).generate(ask.clone()).await.ok()).await;

    let request_ids = vec![String::new(); 4097];
    let status = client(&played).abort(AbortRequest { request_ids }).await.unwrap_err();
    let said = "request_ids is a list of 4097; it must be one of at most 4096";
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, said));

    let long = request(&"x".repeat(257), SamplingParams::default());
    let status = client(&played).generate(long).await.unwrap_err();
    assert_eq!(status.message(), "request_id is 257 bytes long; it must be at most 256 bytes long");
}

#[tokio::test]
async fn it_says_what_it_is_and_how_busy() {
    let played = start(|_| panic!("nothing is generated")).await;
    let mut client = client(&played);
    let model = client.get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((&*model.served_model_name, model.max_context_length), ("demo", MAX_MODEL_LEN));
    assert_eq!((model.vocab_size, model.eos_token_ids), (2048, vec![2, 0]));
    assert_eq!(model.default_sampling_params_json, r#"{"temperature":0.0}"#);
    let server = client.get_server_info(GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((server.data_parallel_size, server.is_paused), (1, false));
    let loads = client.get_loads(GetLoadsRequest::default()).await.unwrap().into_inner();
    let load = &loads.loads[0];
    // Of the played node's blocks 3 are active and 1 is leased.
    let block = server.block_size;
    assert_eq!((load.num_used_tokens, load.max_total_num_tokens), (4 * block, 1024 * block));
    assert_eq!(load.token_usage, 4.0 / 1024.0);
    played.set_ready(false);
    let unhealthy = until(async || {
        let health = client.health_check(HealthCheckRequest {}).await.unwrap().into_inner();
        (!health.healthy).then_some(health)
    });
    assert_eq!(unhealthy.await.message, "no decode node");
}
