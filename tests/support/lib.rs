//! What the cross-crate tests share: real clusters of real processes, and requests to them.

use std::path::PathBuf;
use std::time::Duration;

use baton_cli::launcher::{Cluster, ClusterOptions, bundled_model};
use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::inference_client::InferenceClient;
use baton_proto::wire::v1::{
    Finished, GenerateRequest, GenerateResponse, GetStatusRequest, ListNodesRequest, Node,
    Sampling, TokenIds,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// Longest wait for something that must happen; a test that reaches it has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster of real processes and a client of it.
pub struct TestCluster {
    /// The processes.
    pub cluster: Cluster,
    channel: Channel,
}

/// The folder with the daemons that were built with this test.
pub fn daemons() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned()
}

/// Options for the bundled model with `prefill` + `decode` nodes, one thread each.
pub fn options(prefill: u32, decode: u32) -> ClusterOptions {
    ClusterOptions {
        prefill,
        decode,
        threads: Some(1),
        daemons: Some(daemons()),
        quiet: true,
        ..ClusterOptions::default()
    }
}

/// A model without weights that computes slowly enough for a queue to form, and for a long prompt to
/// be cut short.
const SLOW_MODEL: &str = r#"{
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192, "rope_theta": 10000.0, "tie_word_embeddings": true,
    "hidden_act": "silu", "torch_dtype": "bfloat16"
}"#;

impl TestCluster {
    /// Starts `prefill` + `decode` nodes, with `kv_blocks` blocks each, of a model that computes
    /// slowly. Decode nodes compute no prompts. The folder is the model's; it must outlive the cluster.
    pub async fn start_slow(
        prefill: u32,
        decode: u32,
        kv_blocks: u64,
    ) -> (Self, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let write = std::fs::write(folder.path().join("config.json"), SLOW_MODEL);
        write.expect("a file in it");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let copy = std::fs::copy(model().join(file), folder.path().join(file));
            copy.expect("the bundled model has it");
        }
        let wanted = ClusterOptions {
            model: Some(folder.path().to_owned()),
            load_format: Some("dummy".into()),
            local_prefill: Some("never".into()),
            kv_blocks: Some(kv_blocks),
            ..options(prefill, decode)
        };
        (Self::start(wanted).await, folder)
    }

    /// Starts a cluster and waits until it serves.
    pub async fn start(options: ClusterOptions) -> Self {
        let cluster = Cluster::start(options).await.expect("the cluster starts");
        let endpoint = Endpoint::from_shared(format!("http://{}", cluster.grpc()));
        let channel = endpoint.expect("an address").connect().await.expect("it listens");
        Self { cluster, channel }
    }

    /// A client of coordinator number `coordinator`.
    pub fn inference_at(&self, coordinator: usize) -> InferenceClient<Channel> {
        let address = self.cluster.coordinators()[coordinator].grpc;
        let endpoint = Endpoint::from_shared(format!("http://{address}"));
        let channel = endpoint.expect("an address").connect_lazy();
        InferenceClient::new(channel).max_decoding_message_size(64 << 20)
    }

    /// A client for text generation.
    pub fn inference(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// A client for looking at the cluster.
    pub fn operator(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel.clone())
    }

    /// Sends `request`.
    pub async fn generate(
        &self,
        request: GenerateRequest,
    ) -> Result<Streaming<GenerateResponse>, Status> {
        self.inference().generate(request).await.map(tonic::Response::into_inner)
    }

    /// Sends `request` and waits for its end.
    pub async fn complete(&self, request: GenerateRequest) -> Result<Answer, Status> {
        Answer::gather(self.generate(request).await?).await
    }

    /// The nodes as the coordinator knows them.
    pub async fn nodes(&self) -> Vec<Node> {
        let response = self.operator().list_nodes(ListNodesRequest {}).await;
        response.expect("the coordinator answers").into_inner().nodes
    }

    /// Waits until no node holds a block for a request, and returns the nodes.
    pub async fn idle(&self) -> Vec<Node> {
        let idle = async {
            loop {
                let status = self.operator().get_status(GetStatusRequest {}).await;
                let active = status.expect("the coordinator answers").into_inner().requests_active;
                let nodes = self.nodes().await;
                if active == 0 && nodes.iter().all(is_idle) {
                    return nodes;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, idle).await {
            Ok(nodes) => nodes,
            Err(_) => panic!("blocks are still held: {:#?}", self.nodes().await),
        }
    }
}

/// No block of the node is held for a request or a transfer, and none is lost.
pub fn is_idle(node: &Node) -> bool {
    let blocks = node.kv_blocks.unwrap_or_default();
    let whole = blocks.free + blocks.cached == blocks.total;
    whole && blocks.active == 0 && blocks.leased == 0 && node.running == 0 && node.waiting == 0
}

/// Everything that one request's stream said.
#[derive(Debug, Default)]
pub struct Answer {
    /// Generated tokens of choice 0.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// The end of the stream.
    pub finished: Option<Finished>,
}

impl Answer {
    /// Adds one message of the stream.
    pub fn add(&mut self, message: GenerateResponse) {
        self.tokens.extend(message.token_ids);
        self.text += &message.text;
        self.finished = message.finished.or(self.finished.take());
    }

    /// Reads a stream to its end.
    pub async fn gather(mut stream: Streaming<GenerateResponse>) -> Result<Self, Status> {
        let mut answer = Self::default();
        while let Some(message) = stream.message().await? {
            answer.add(message);
        }
        assert!(answer.finished.is_some(), "a stream ended without saying why");
        Ok(answer)
    }
}

/// A small deterministic source of test data (SplitMix64).
pub struct Chance(pub u64);

impl Chance {
    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    /// `length` token ids.
    pub fn tokens(&mut self, length: usize) -> Vec<u32> {
        (0..length).map(|_| 10 + self.below(1000) as u32).collect()
    }
}

/// A request for `max_tokens` tokens after `tokens`, greedy and not ended by the model.
pub fn request(tokens: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    let sampling = Sampling {
        temperature: Some(0.0),
        max_tokens: Some(max_tokens),
        ignore_eos: Some(true),
        ..Sampling::default()
    };
    GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids: tokens })),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

/// The bundled model's folder.
pub fn model() -> PathBuf {
    bundled_model().expect("the bundled model is in the repository")
}
