//! A model on several devices of one node, against the model on the CPU.

use baton_engine::{Input, Step, StepChunk};
use baton_kernels::cuda::testing::{fail_streams, test_device};

use crate::common::tiny::Shape;
use crate::serving::{Node, hand_over};
use crate::support::{Asked, Gpu, devices};
use crate::{AMPLE, BASE, assert_close, assert_greedy, by_cpu, checkpoint, tokens};

/// Something of everything for each of four devices.
const WIDE: Shape = Shape { heads: 8, kv_heads: 4, biases: true, ..BASE };

#[test]
fn log_probabilities_are_those_of_the_cpu_however_many_devices() {
    let dir = checkpoint(&WIDE, None);
    let tokens = tokens(50, WIDE.vocab, 3);
    let theirs = by_cpu(dir.path(), &tokens);
    for count in [2, 4] {
        let Some(devices) = devices(count) else { return };
        let mut gpus = Gpu::load_to(&devices, dir.path(), 16, 1).unwrap();
        let ours = gpus.prompt_logprobs(&tokens, 23);
        assert_close(&ours, &theirs);
    }
}

#[test]
fn devices_go_through_graphs_and_queued_steps_together() {
    let Some(devices) = devices(2) else { return };
    let shape = Shape { qwen3: true, tied: true, ..BASE };
    let dir = checkpoint(&shape, None);
    let prompts = [tokens(19, shape.vocab, 1), tokens(6, shape.vocab, 2)];
    let asked: Vec<_> = prompts.iter().map(|prompt| Asked::greedy(prompt)).collect();
    let run = |ahead, watched| {
        let mut gpus = Gpu::load_to(&devices, dir.path(), 16, prompts.len()).unwrap();
        gpus.generate(&asked, 7, ahead, watched)
    };
    let one_by_one = run(false, true);
    assert_eq!(run(true, false), one_by_one);
    for (prompt, output) in prompts.iter().zip(&one_by_one) {
        assert_greedy(&dir, prompt, output);
    }
}

#[test]
fn devices_are_prepared_together() {
    let Some(devices) = devices(2) else { return };
    let dir = checkpoint(&BASE, None);
    let prompts = [tokens(19, BASE.vocab, 1), tokens(6, BASE.vocab, 2)];
    let asked: Vec<_> = prompts.iter().map(|prompt| Asked::greedy(prompt)).collect();
    let mut gpus = Gpu::load_within(&devices, dir.path(), (16, prompts.len()), AMPLE).unwrap();
    for (prompt, output) in prompts.iter().zip(gpus.generate(&asked, 5, true, false)) {
        assert_greedy(&dir, prompt, &output);
    }
}

/// Nobody waits for sums in which a device that failed takes no part.
#[test]
fn a_device_that_fails_ends_the_steps_of_all() {
    // One that no other test uses.
    let Some(devices) = devices(8).filter(|_| test_device().unwrap().emulator.is_some()) else {
        return;
    };
    let pair = [devices[0].clone(), devices[7].clone()];
    let mut gpus = Gpu::load_to(&pair, checkpoint(&WIDE, None).path(), 16, 1).unwrap();
    let (tokens, blocks) = (tokens(5, WIDE.vocab, 1), gpus.blocks(0));
    let chunk = StepChunk {
        input: Input::Tokens(&tokens),
        start: 0,
        blocks: &blocks,
        prompt_logprobs: None,
        sample: None,
        pool_from: None,
    };
    gpus.launch(&Step { chunks: vec![chunk], watched: false });
    fail_streams(&devices[7]);
    let failure = gpus.try_finish().unwrap_err().to_string();
    assert!(failure.contains("the device is lost"), "{failure}");
}

/// Pieces travel whole, whoever has which heads.
#[test]
fn sequences_go_on_where_heads_are_shared_otherwise() {
    let dir = checkpoint(&Shape { biases: false, ..WIDE }, None);
    for (from, to) in [(2, 1), (1, 2), (4, 2)] {
        let Some(from) = Node::start_on(dir.path(), from) else { return };
        let Some(to) = Node::start_on(dir.path(), to) else { return };
        let (job, output) = hand_over(&from, &to);
        // Not the tokens of either alone: sums of other parts round differently.
        assert_greedy(&dir, &job.tokens, &output);
    }
}

#[test]
fn models_that_so_many_devices_cannot_share_are_refused() {
    let Some(devices) = devices(3) else { return };
    let refused = Gpu::load_to(&devices, checkpoint(&WIDE, None).path(), 16, 1).err().unwrap();
    assert_eq!(refused.to_string(), "3 devices cannot share 4 key/value heads equally");
}
