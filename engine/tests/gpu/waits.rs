//! The engine misses each of its waits for the device.

use std::sync::{Arc, Mutex};

use baton_engine::{EngineEvent, FirstToken, Kind};
use baton_kernels::cuda::testing::waits_not_missed;

use crate::serving::{Node, job, wait};
use crate::support::Types;
use crate::{BASE, assert_greedy, checkpoint, tokens};

/// For [`waits_not_missed`] to compare: greedy tokens survive much.
fn print(event: &EngineEvent) {
    if let EngineEvent::Tokens(tokens) = event {
        tokens.iter().for_each(|token| println!("outcome {:?}", (token.token, &token.logprobs)));
    }
}

/// Pieces are read when the engine says that they are complete, and before it waits for anything
/// else; nothing here depends on who is faster.
#[test]
fn a_sequence_moves_on_layer_by_layer() {
    let dir = checkpoint(&BASE, None);
    let (lease, pieces) = (Mutex::new(None), Arc::new(Mutex::new(Vec::new())));
    let read = pieces.clone();
    let told = move |event: &EngineEvent| {
        print(event);
        match event {
            EngineEvent::Admitted { lease: export, .. } => lease.lock().unwrap().clone_from(export),
            EngineEvent::KvReady { layer, blocks, .. } => {
                let export = lease.lock().unwrap().clone().expect("it was admitted");
                let found = wait(export.read(*layer, blocks.clone())).unwrap();
                let found = found.iter().flat_map(|piece| piece.as_ref().to_vec()).collect();
                read.lock().unwrap().push((*layer, blocks.clone(), found));
            }
            _ => *lease.lock().unwrap() = None,
        }
    };
    let Some(from) = Node::start_telling(dir.path(), 1, Types::default(), told) else { return };
    // Both nodes look at token 0: what is read too early while loading spoils the table's beginning.
    let [mut job, mut other] = [(1, 39, 4), (2, 9, 1)]
        .map(|(n, rest, most)| job(n, [vec![0], tokens(rest, 101, 5)].concat(), most));
    (job.sampling.logprobs, other.sampling.logprobs) = (Some(2), Some(2));
    from.submit(&job, Kind::Export);
    let first = from.until_ended(1)[&job.id][0];
    from.idle();
    let to = Node::start_telling(dir.path(), 1, Types::default(), print).unwrap();
    to.submit(&other, Kind::Local);
    to.until_ended(1);
    to.idle();
    to.submit(&job, Kind::Import);
    let import = to.lease();
    for (layer, blocks, bytes) in pieces.lock().unwrap().drain(..) {
        let bytes: Vec<u8> = bytes;
        let mut place = wait(import.place(layer, blocks.clone())).unwrap();
        let piece_bytes = bytes.len() / blocks.len();
        for (block, piece) in blocks.zip(bytes.chunks(piece_bytes)) {
            place.write(block, 0, piece);
        }
        wait(place.apply()).unwrap();
    }
    drop(import);
    to.engine.imported(job.id, FirstToken { token: first, logprobs: None, finish: None });
    let rest = to.until_ended(1).remove(&job.id).unwrap();
    to.idle();
    assert_eq!(rest.len(), 3);
    assert_greedy(&dir, &job.tokens, &[vec![first], rest].concat());
}

#[test]
fn steps_and_transfers_need_all_of_their_waits() {
    let found = waits_not_missed("waits::a_sequence_moves_on_layer_by_layer");
    let Some((waits, not_missed)) = found else { return };
    println!("{waits} waits");
    assert!(waits > 10 && not_missed.is_empty(), "{not_missed:?} of {waits} are not missed");
}
