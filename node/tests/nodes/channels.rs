//! Nodes on GPUs, real or emulated, whose KV goes through NCCL: the same tokens, and no job lost when
//! the channel breaks. Each test has devices of its own, as what it breaks is a device's.

use std::path::PathBuf;
use std::time::Duration;

use baton_engine::gpu::{self, GpuModel, GpuOptions, WeightDtype};
use baton_engine::model::LoadFormat;
use baton_engine::{EngineConfig, Executor};
use baton_kernels::cuda::testing::{break_nccl, test_device};
use baton_kernels::cuda::{Device, Libraries};
use baton_kvtransfer::{Timing, Transport};
use baton_node::node::Setup;
use baton_proto::hash::CacheSalt;
use baton_proto::message::{Command, Job};

use crate::support::{Joined, KV_BLOCKS, Pair, hand_over, id, job, patiently};

/// The smallest that GPUs have kernels for.
const CONFIG: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "intermediate_size": 96, "vocab_size": 101, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;

const BLOCK_TOKENS: usize = 16;

/// Longer than any test waits: nothing here ends because it takes long.
const FOREVER: Duration = Duration::from_secs(3600);
/// A channel that hangs is noticed soon. One that only the emulator holds up is given up as well.
const SHORT: Duration = Duration::from_millis(200);

/// Two nodes' devices.
struct Devices {
    ordinals: [usize; 2],
    folders: Vec<PathBuf>,
    model: tempfile::TempDir,
}

impl Devices {
    /// None, with the reason printed, if there are no such devices.
    fn find(ordinals: [usize; 2]) -> Option<Self> {
        let paths = &test_device()?.paths;
        let libraries = Libraries::find(paths).expect("they were found before");
        let count = Device::count(&libraries).expect("the driver works");
        if ordinals.iter().any(|&ordinal| ordinal >= count) {
            println!("skipped: needs devices {ordinals:?}, there are {count}");
            return None;
        }
        let model = tempfile::tempdir().expect("a folder");
        std::fs::write(model.path().join("config.json"), CONFIG).expect("it can be written");
        Some(Self { ordinals, folders: paths.folders.clone(), model })
    }

    fn model(&self, ordinal: usize) -> Box<dyn Executor> {
        let device = gpu::open(ordinal, &self.folders).expect("there is one");
        let options = GpuOptions {
            dir: self.model.path(),
            format: LoadFormat::Dummy { seed: 3 },
            threads: 1,
            max_model_len: None,
            weight_dtype: WeightDtype::Bf16,
            kv_dtype: None,
            block_tokens: BLOCK_TOKENS,
            max_batch_tokens: 64,
            max_sequences: 8,
            warm_up: Duration::ZERO,
            on_progress: &mut |_| {},
        };
        Box::new(GpuModel::load(&device, options).expect("it is served"))
    }

    /// Two nodes whose channels wait for so long.
    async fn pair(&self, patience: Duration) -> Pair {
        let models = self.ordinals.map(|ordinal| self.model(ordinal));
        let timing = Timing { channel: patience, ..Timing::default() };
        let change = |setup: &mut Setup| {
            setup.kv_transports = vec![Transport::Nccl, Transport::Quic];
            setup.cuda_libraries = self.folders.first().cloned();
            setup.engine = EngineConfig {
                block_tokens: BLOCK_TOKENS,
                kv_blocks: KV_BLOCKS,
                max_batch_tokens: 64,
                max_sequences: 8,
                max_waiting: 8,
            };
        };
        Pair::of(models, timing, change).await
    }

    /// Lets so many more messages through one node's end of channels; calls hang or do not.
    fn break_nccl(&self, node: usize, messages: Option<u16>, calls_hang: bool) {
        let device = gpu::open(self.ordinals[node], &self.folders).expect("there is one");
        break_nccl(&device, messages, calls_hang);
    }
}

/// Hands a job over, and computes it on the decode node alone, whose cache knows nothing of it.
async fn hands_over(prefill: &mut Joined, decode: &mut Joined, request: u32, length: usize) {
    let job = job(id(request.into()), request, length, 4);
    let salt = CacheSalt(Some([request as u8; 16]));
    let alone = Job { id: id(u128::from(request) + 1000), salt, ..job.clone() };
    let (alone_id, command) = (alone.id, Command::Decode { job: alone, prefill: None, pull: None });
    decode.command(command).await;
    let expected: Vec<_> = decode.rest(alone_id).await.iter().map(|token| token.token).collect();
    hand_over(prefill, decode, &job).await;
    let mut tokens = vec![prefill.token(job.id).await.token];
    tokens.extend(decode.rest(job.id).await.iter().map(|token| token.token));
    assert_eq!(tokens, expected, "job {request}");
}

/// Waits until so many channels are up at both ends; the first job of a pair opens the connection.
async fn channels(pair: &Pair, count: usize) {
    let (to, from) = (&pair.prefill.endpoint, &pair.decode.endpoint);
    let up = async {
        while (to.channels().0, from.channels().1) != (count, count) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    patiently("a channel comes up, or is given up", up).await;
}

fn sent(pair: &Pair, way: Transport) -> u64 {
    let sent = pair.prefill.endpoint.sent_bytes();
    sent.into_iter().find(|(other, _)| *other == way).map_or(0, |(_, bytes)| bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_goes_from_device_to_device_by_nccl() {
    let Some(devices) = Devices::find([0, 1]) else { return };
    let mut pair = devices.pair(FOREVER).await;
    let (mut prefill, mut decode) = pair.streams().await;
    assert_eq!(prefill.hello.transports, ["nccl", "quic"]);
    hands_over(&mut prefill, &mut decode, 1, 20).await;
    channels(&pair, 1).await;
    let before = sent(&pair, Transport::Quic);
    for (request, length) in [(2, 5), (3, 40), (4, 150)] {
        hands_over(&mut prefill, &mut decode, request, length).await;
    }
    pair.idle().await;
    assert!(sent(&pair, Transport::Nccl) > 0);
    assert_eq!(sent(&pair, Transport::Quic), before);
    assert_eq!(pair.prefill.endpoint.last_transport(), Some(Transport::Nccl));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_never_end_lose_no_job() {
    broken_lose_no_job([2, 3], Some(1), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_hang_lose_no_job() {
    broken_lose_no_job([4, 5], None, true).await;
}

/// Breaks either end of a channel that is up.
async fn broken_lose_no_job(ordinals: [usize; 2], messages: Option<u16>, calls_hang: bool) {
    let Some(devices) = Devices::find(ordinals) else { return };
    for node in [0, 1] {
        let mut pair = devices.pair(SHORT).await;
        let (mut prefill, mut decode) = pair.streams().await;
        hands_over(&mut prefill, &mut decode, 1, 20).await;
        channels(&pair, 1).await;
        devices.break_nccl(node, messages, calls_hang);
        for (request, length) in [(2, 100), (3, 40)] {
            hands_over(&mut prefill, &mut decode, request, length).await;
        }
        pair.idle().await;
        assert_eq!(pair.prefill.endpoint.last_transport(), Some(Transport::Quic));
        channels(&pair, 0).await;
        devices.break_nccl(node, None, false);
    }
}

/// NCCL refuses two ranks on one device.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_one_device_send_bytes() {
    let Some(devices) = Devices::find([6, 6]) else { return };
    let mut pair = devices.pair(FOREVER).await;
    let (mut prefill, mut decode) = pair.streams().await;
    for (request, length) in [(1, 20), (2, 40)] {
        hands_over(&mut prefill, &mut decode, request, length).await;
    }
    pair.idle().await;
    assert_eq!(sent(&pair, Transport::Nccl), 0);
    assert!(sent(&pair, Transport::Quic) > 0);
}

/// Its blocks are free and it goes on, however long the channel would have waited.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_dies_in_mid_transfer_holds_nobody_up() {
    let Some(devices) = Devices::find([7, 1]) else { return };
    let mut pair = devices.pair(FOREVER).await;
    let (mut prefill, mut decode) = pair.streams().await;
    hands_over(&mut prefill, &mut decode, 1, 20).await;
    channels(&pair, 1).await;
    devices.break_nccl(0, Some(1), false);
    let job = job(id(2), 2, 100, 4);
    hand_over(&prefill, &decode, &job).await;
    // Its KV is on its way, and does not arrive.
    prefill.token(job.id).await;
    pair.prefill.serving.abort();
    pair.prefill.endpoint.close().await;
    decode.failure(job.id).await;
    pair.decode.idle().await;
    channels(&pair, 0).await;
    devices.break_nccl(0, None, false);
}
