//! Nodes on GPUs, real or emulated, whose KV goes through NCCL: the same tokens, and no job lost when
//! the channel breaks. Each test has devices of its own, as what it breaks is a device's.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use baton_engine::gpu::{self, GpuModel, GpuOptions, ParallelModel, WeightDtype};
use baton_engine::model::LoadFormat;
use baton_engine::{EngineConfig, Executor};
use baton_kernels::cuda::testing::{break_nccl, test_device};
use baton_kernels::cuda::{Device, Libraries, Nccl};
use baton_kvtransfer::{Timing, Transport};
use baton_node::node::Setup;
use baton_proto::hash::CacheSalt;
use baton_proto::message::{Command, Job};

use crate::support::{Joined, KV_BLOCKS, Pair, hand_over, id, job, patiently};

/// The smallest that GPUs have kernels for.
const CONFIG: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 96, "vocab_size": 101, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;

const BLOCK_TOKENS: usize = 16;
/// A step computes so many tokens of a prompt however slow the machine is: a GPU rounds other steps
/// differently.
const STEP_TOKENS: usize = 16;

/// Longer than any test waits: nothing here ends because it takes long.
const FOREVER: Duration = Duration::from_secs(3600);
/// A channel that hangs is noticed soon. One that only the emulator holds up is given up as well.
const SHORT: Duration = Duration::from_millis(200);

/// Two nodes' devices, one or several for each.
struct Devices {
    ordinals: [Vec<usize>; 2],
    folders: Vec<PathBuf>,
    model: tempfile::TempDir,
}

impl Devices {
    /// None, with the reason printed, if there are no such devices or not all libraries.
    fn find(ordinals: [&[usize]; 2]) -> Option<Self> {
        let test = test_device()?;
        let paths = &test.paths;
        let found = Libraries::find(paths).and_then(|all| Nccl::find(paths).map(|_| all));
        let libraries = found.map_err(|missing| println!("skipped: {missing}")).ok()?;
        let count = Device::count(&libraries).expect("the driver works");
        let emulated = test.emulator.is_some();
        let ordinals = if emulated { ordinals.map(<[usize]>::to_vec) } else { from_zero(ordinals) };
        if ordinals.iter().flatten().any(|&ordinal| ordinal >= count) {
            println!("skipped: needs devices {ordinals:?}, there are {count}");
            return None;
        }
        let model = tempfile::tempdir().expect("a folder");
        std::fs::write(model.path().join("config.json"), CONFIG).expect("it can be written");
        Some(Self { ordinals, folders: paths.folders.clone(), model })
    }

    /// The same, if they can be broken.
    fn breakable(ordinals: [&[usize]; 2]) -> Option<Self> {
        if test_device()?.emulator.is_none() {
            println!("skipped: only the emulator's NCCL can be broken");
            return None;
        }
        Self::find(ordinals)
    }

    fn model(&self, ordinals: &[usize]) -> Box<dyn Executor> {
        let open = |&ordinal: &usize| gpu::open(ordinal, &self.folders).expect("there is one");
        let devices: Vec<_> = ordinals.iter().map(open).collect();
        let options = GpuOptions {
            dir: self.model.path(),
            format: LoadFormat::Dummy { seed: 3 },
            threads: 1,
            max_model_len: None,
            weight_dtype: WeightDtype::Bf16,
            kv_dtype: None,
            block_tokens: BLOCK_TOKENS,
            max_batch_tokens: STEP_TOKENS,
            max_sequences: 8,
            warm_up: Duration::ZERO,
            on_progress: &mut |_| {},
        };
        if let [device] = &devices[..] {
            return Box::new(GpuModel::load(device, options).expect("it is served"));
        }
        let nccl = gpu::find_nccl(&self.folders).expect("it is there");
        Box::new(ParallelModel::load(&devices, &nccl, options).expect("it is served"))
    }

    /// Two nodes whose channels wait for so long.
    async fn pair(&self, patience: Duration) -> Pair {
        self.pair_by(&[Transport::Nccl, Transport::Quic], patience).await
    }

    async fn pair_by(&self, transports: &[Transport], patience: Duration) -> Pair {
        let models = self.ordinals.each_ref().map(|ordinals| self.model(ordinals));
        let timing = Timing { channel: patience, ..Timing::default() };
        let change = |setup: &mut Setup| {
            setup.kv_transports = transports.to_vec();
            setup.cuda_libraries = self.folders.first().cloned();
            setup.engine = EngineConfig {
                block_tokens: BLOCK_TOKENS,
                kv_blocks: KV_BLOCKS,
                max_batch_tokens: STEP_TOKENS,
                max_sequences: 8,
                max_waiting: 8,
            };
        };
        Pair::of(models, timing, change).await
    }

    /// Lets so many more messages through one node's end of channels; calls hang or do not. Of a node
    /// of one device, as those of several need messages to compute.
    fn break_nccl(&self, node: usize, messages: Option<u16>, calls_hang: bool) {
        let [ordinal] = self.ordinals[node][..] else { panic!("several devices") };
        let device = gpu::open(ordinal, &self.folders).expect("there is one");
        break_nccl(&device, messages, calls_hang);
    }
}

/// The same devices by the lowest numbers: real ones are few, and their tests run one at a time.
fn from_zero(ordinals: [&[usize]; 2]) -> [Vec<usize>; 2] {
    let distinct: BTreeSet<_> = ordinals.concat().into_iter().collect();
    let number = |ordinal: &usize| distinct.range(..*ordinal).count();
    ordinals.map(|own| own.iter().map(number).collect())
}

/// Jobs' numbers and the lengths of their prompts.
const JOBS: [(u32, usize); 4] = [(1, 20), (2, 70), (3, 5), (4, 90)];

/// What the jobs must generate: what they do with KV that went over the network. With the same number
/// of devices that is what the decode node generates alone; others round differently.
async fn expected(devices: &Devices) -> Vec<Vec<u32>> {
    let mut pair = devices.pair_by(&[Transport::Quic], FOREVER).await;
    let (mut prefill, mut decode) = pair.streams().await;
    let mut expected = Vec::new();
    for wanted in JOBS {
        let tokens = hands_over(&mut prefill, &mut decode, wanted).await;
        if devices.ordinals[0].len() == devices.ordinals[1].len() {
            assert_eq!(tokens, alone(&mut decode, wanted).await, "{wanted:?}");
        }
        expected.push(tokens);
    }
    pair.idle().await;
    expected
}

async fn hands_over(
    prefill: &mut Joined,
    decode: &mut Joined,
    (request, length): (u32, usize),
) -> Vec<u32> {
    let job = job(id(request.into()), request, length, 4);
    hand_over(prefill, decode, &job).await;
    let mut tokens = vec![prefill.token(job.id).await.token];
    tokens.extend(decode.rest(job.id).await.iter().map(|token| token.token));
    tokens
}

/// The decode node computes the job's prompt, too, of which its cache knows nothing.
async fn alone(decode: &mut Joined, (request, length): (u32, usize)) -> Vec<u32> {
    let (id, salt) = (id(u128::from(request) + 1000), CacheSalt(Some([request as u8; 16])));
    let job = Job { salt, ..job(id, request, length, 4) };
    decode.command(Command::Decode { job, prefill: None, pull: None }).await;
    decode.rest(id).await.iter().map(|token| token.token).collect()
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
    goes_by_nccl([&[0], &[1]]).await;
}

/// Whichever device has the heads that another one needs sends them to it.
#[tokio::test(flavor = "multi_thread")]
async fn kv_goes_between_unequal_numbers_of_devices_by_nccl() {
    goes_by_nccl([&[8], &[9, 10]]).await;
    goes_by_nccl([&[9, 10], &[8]]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_goes_between_several_devices_each_by_nccl() {
    goes_by_nccl([&[11, 12], &[13, 14]]).await;
    goes_by_nccl([&[11, 12], &[13, 14, 8, 9]]).await;
}

async fn goes_by_nccl(ordinals: [&[usize]; 2]) {
    let Some(devices) = Devices::find(ordinals) else { return };
    let expected = expected(&devices).await;
    let mut pair = devices.pair(FOREVER).await;
    let (mut prefill, mut decode) = pair.streams().await;
    assert_eq!(prefill.hello.transports, ["nccl", "quic"]);
    assert_eq!(hands_over(&mut prefill, &mut decode, JOBS[0]).await, expected[0]);
    channels(&pair, 1).await;
    let before = sent(&pair, Transport::Quic);
    for (wanted, expected) in JOBS.into_iter().zip(expected).skip(1) {
        assert_eq!(hands_over(&mut prefill, &mut decode, wanted).await, expected, "{wanted:?}");
    }
    pair.idle().await;
    assert!(sent(&pair, Transport::Nccl) > 0);
    assert_eq!(sent(&pair, Transport::Quic), before);
    assert_eq!(pair.prefill.endpoint.last_transport(), Some(Transport::Nccl));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_never_end_lose_no_job() {
    broken_lose_no_job([&[2], &[3]], &[0, 1], (Some(1), false)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_hang_lose_no_job() {
    broken_lose_no_job([&[4], &[5]], &[0, 1], (None, true)).await;
}

/// One lane carries its part of a parcel, the other one does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_breaks_loses_no_job() {
    broken_lose_no_job([&[15], &[10, 14]], &[0], (Some(1), false)).await;
    broken_lose_no_job([&[10, 14], &[15]], &[1], (Some(1), false)).await;
}

/// Breaks these nodes' ends of a channel that is up, one after the other: so many messages more get
/// through, or calls hang.
async fn broken_lose_no_job(
    ordinals: [&[usize]; 2],
    ends: &[usize],
    (messages, calls_hang): (Option<u16>, bool),
) {
    let Some(devices) = Devices::breakable(ordinals) else { return };
    let expected = expected(&devices).await;
    for &node in ends {
        let mut pair = devices.pair(SHORT).await;
        let (mut prefill, mut decode) = pair.streams().await;
        assert_eq!(hands_over(&mut prefill, &mut decode, JOBS[0]).await, expected[0]);
        channels(&pair, 1).await;
        devices.break_nccl(node, messages, calls_hang);
        for (wanted, expected) in JOBS.into_iter().zip(&expected).skip(1) {
            assert_eq!(&hands_over(&mut prefill, &mut decode, wanted).await, expected);
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
    let Some(devices) = Devices::find([&[6], &[6]]) else { return };
    let mut pair = devices.pair(FOREVER).await;
    let (mut prefill, mut decode) = pair.streams().await;
    for wanted in JOBS {
        hands_over(&mut prefill, &mut decode, wanted).await;
    }
    pair.idle().await;
    assert_eq!(sent(&pair, Transport::Nccl), 0);
    assert!(sent(&pair, Transport::Quic) > 0);
}

/// Its blocks are free and it goes on, however long the channel would have waited.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_dies_in_mid_transfer_holds_nobody_up() {
    let Some(devices) = Devices::breakable([&[7], &[1]]) else { return };
    let mut pair = devices.pair(FOREVER).await;
    let (mut prefill, mut decode) = pair.streams().await;
    hands_over(&mut prefill, &mut decode, JOBS[0]).await;
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
