//! Embeddings from real clusters, over both APIs.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::wire::v1::embed_input::Input;
use baton_proto::wire::v1::{
    EmbedInput, EmbedRequest, EmbedResponse, Embedding, ListRequestsRequest, Pooling, TokenIds,
};
use baton_tests::{Chance, TestCluster, model, options, request};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Status;

fn wanted(prompts: &[Vec<u32>], pooling: Pooling) -> EmbedRequest {
    let input =
        |ids: &Vec<u32>| EmbedInput { input: Some(Input::TokenIds(TokenIds { ids: ids.clone() })) };
    EmbedRequest {
        inputs: prompts.iter().map(input).collect(),
        pooling: pooling.into(),
        normalize: Some(false),
        ..EmbedRequest::default()
    }
}

async fn embed(cluster: &TestCluster, request: EmbedRequest) -> Result<EmbedResponse, Status> {
    cluster.inference().embed(request).await.map(tonic::Response::into_inner)
}

fn values(response: EmbedResponse) -> Vec<Vec<f32>> {
    response.embeddings.into_iter().map(|embedding| embedding.values).collect()
}

/// The bundled model's table of token embeddings, which is its output layer too: `[vocab, hidden]`.
fn output_layer() -> (Vec<f32>, usize) {
    let file = std::fs::read(model().join("model.safetensors")).unwrap();
    let (length, rest) = file.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let (header, data) = rest.split_at(length);
    let header: Value = serde_json::from_slice(header).unwrap();
    let table = &header["model.embed_tokens.weight"];
    assert_eq!(table["dtype"], "BF16");
    let at = |i: usize| table["data_offsets"][i].as_u64().unwrap() as usize;
    let bf16 = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    let values = data[at(0)..at(1)].as_chunks().0.iter().map(bf16).collect();
    (values, table["shape"][1].as_u64().unwrap() as usize)
}

/// The likeliest next token after a hidden state.
fn next(layer: &(Vec<f32>, usize), hidden: &[f32]) -> u32 {
    assert_eq!(hidden.len(), layer.1);
    let score = |row: &[f32]| -> f64 {
        row.iter().zip(hidden).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
    };
    let rows = layer.0.chunks(layer.1).map(score).enumerate();
    rows.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0 as u32
}

async fn http(cluster: &TestCluster, body: &Value) -> (u16, Value) {
    let mut stream = TcpStream::connect(cluster.cluster.http()).await.unwrap();
    let body = body.to_string();
    let request = format!(
        "POST /v1/embeddings HTTP/1.0\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), serde_json::from_str(body).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vector_leads_to_the_token_that_comes_next_and_is_the_same_everywhere() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let prompts: Vec<_> = (1..9).map(|n| Chance(n).tokens(7 * n as usize)).collect();
    let response = embed(&cluster, wanted(&prompts, Pooling::Last)).await.unwrap();
    let by = response.embeddings[0].request_id.clone();
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    assert_eq!(response.usage.unwrap().prompt_tokens as usize, tokens);
    let (last, layer) = (values(response), output_layer());
    for (prompt, vector) in prompts.iter().zip(&last) {
        let generated = cluster.complete(request(prompt.clone(), 1)).await.unwrap();
        assert_eq!(generated.tokens, [next(&layer, vector)]);
    }
    let mean = values(embed(&cluster, wanted(&prompts, Pooling::Mean)).await.unwrap());
    assert!(mean.iter().zip(&last).all(|(mean, last)| mean != last));
    // Each alone, from the cache and by the other API.
    for (at, prompt) in prompts.iter().enumerate() {
        let ask = json!({"input": prompt, "normalize": false});
        let (status, body) = http(&cluster, &ask).await;
        assert_eq!(status, 200, "{body}");
        let again: Vec<f32> = serde_json::from_value(body["data"][0]["embedding"].clone()).unwrap();
        assert_eq!(again, last[at]);
    }
    let unit = EmbedRequest { normalize: None, ..wanted(&prompts, Pooling::Mean) };
    for (unit, mean) in values(embed(&cluster, unit).await.unwrap()).iter().zip(&mean) {
        let length = mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!(
            unit.iter()
                .zip(mean)
                .all(|(u, x)| (f64::from(*u) * length - f64::from(*x)).abs() < 1e-4)
        );
    }

    let list = cluster.operator().list_requests(ListRequestsRequest::default()).await.unwrap();
    let list = list.into_inner().requests;
    let shown = list.iter().find(|shown| shown.id == by).expect("operators see it");
    let given = (&*shown.phase, &*shown.prefill_node, &*shown.decode_node);
    assert_eq!(given, ("finished", "", "prefill-0"), "one node does it, and a prefill node");
    cluster.idle().await;
    cluster.cluster.stop().await;

    let alone = TestCluster::start(options(0, 1)).await;
    assert_eq!(values(embed(&alone, wanted(&prompts, Pooling::Last)).await.unwrap()), last);
    assert_eq!(values(embed(&alone, wanted(&prompts, Pooling::Mean)).await.unwrap()), mean);
}

/// The prefill node that computes something.
async fn busy(cluster: &TestCluster) -> String {
    let found = async {
        loop {
            let nodes = cluster.nodes().await;
            let busy = nodes.iter().find(|node| node.running > 0 && node.role == "prefill");
            if let Some(node) = busy {
                return node.id.clone();
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(60), found).await.expect("a node begins with it")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_its_node_costs_a_pause() {
    let (cluster, _folder) = TestCluster::start_slow(2, 1, 800).await;
    let cluster = Arc::new(cluster);
    let prompts = vec![Chance(1).tokens(3000)];
    let (asking, ask) = (Arc::clone(&cluster), wanted(&prompts, Pooling::Mean));
    let answer = tokio::spawn(async move { embed(&asking, ask).await });
    let killed = busy(&cluster).await;
    cluster.cluster.kill(&killed);
    let survived = values(answer.await.unwrap().unwrap());
    let again = values(embed(&cluster, wanted(&prompts, Pooling::Mean)).await.unwrap());
    assert_eq!(survived, again);
    assert_eq!(cluster.idle().await.len(), 2, "the dead node is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_everything() {
    let (cluster, _folder) = TestCluster::start_slow(1, 1, 800).await;
    let cluster = Arc::new(cluster);
    let prompts: Vec<_> = (0..6).map(|n| Chance(n).tokens(3000)).collect();
    let (asking, ask) = (Arc::clone(&cluster), wanted(&prompts, Pooling::Last));
    let call = tokio::spawn(async move { embed(&asking, ask).await });
    busy(&cluster).await;
    call.abort();
    cluster.idle().await;
    let short = wanted(&[vec![5, 6, 7]], Pooling::Last);
    let Embedding { values, .. } = embed(&cluster, short).await.unwrap().embeddings.remove(0);
    assert_eq!(values.len(), 256, "the cluster serves on");
}
