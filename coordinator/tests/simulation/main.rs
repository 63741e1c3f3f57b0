//! The coordinator's whole decision machine against a made-up cluster: random requests,
//! cancellations, deadlines, node deaths, lost streams, failures, delays and duplicates, in random
//! order. Whatever happens, every stream is exactly what one undisturbed node would have given.

mod cluster;
mod node;

use proptest::prelude::*;

use cluster::{Ended, Op, Sim};

fn op() -> impl Strategy<Value = Op> {
    let number = || any::<u16>();
    prop_oneof![
        4 => (0..40_u8, 1..12_u8).prop_map(|(prompt, output)| Op::Submit { prompt, output, late: false }),
        1 => (0..40_u8, 1..12_u8).prop_map(|(prompt, output)| Op::Submit { prompt, output, late: true }),
        20 => number().prop_map(Op::DeliverDown),
        20 => number().prop_map(Op::DeliverUp),
        8 => number().prop_map(Op::DeliverKv),
        25 => number().prop_map(Op::Work),
        2 => number().prop_map(Op::Report),
        1 => number().prop_map(Op::Kill),
        1 => number().prop_map(Op::LoseStream),
        3 => number().prop_map(Op::Restart),
        1 => number().prop_map(Op::Fail),
        1 => number().prop_map(Op::Refuse),
        1 => number().prop_map(Op::Cancel),
        1 => number().prop_map(Op::Stop),
        1 => number().prop_map(Op::Repeat),
        3 => (1..200_u16).prop_map(Op::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_stream_is_the_undisturbed_one_and_nothing_stays_behind(
        ops in proptest::collection::vec(op(), 1..400),
        prefill in 0..3_usize,
        decode in 1..4_usize,
    ) {
        let mut sim = Sim::new(prefill, decode);
        for op in ops {
            sim.apply(op);
        }
        sim.settle();
        for client in sim.clients.values() {
            match client.ended {
                Some(Ended::Complete) => prop_assert_eq!(&client.tokens, &client.oracle()),
                Some(Ended::Late) => prop_assert!(client.late),
                Some(Ended::ByClient) => prop_assert!(client.left),
                None => prop_assert!(false, "a request never ended"),
            }
        }
        let status = sim.status();
        prop_assert_eq!(status.requests_active, 0);
        let ended = status.requests_finished + status.requests_failed;
        prop_assert_eq!(ended, sim.clients.len() as u64);
        prop_assert!(sim.control.owes_nothing(), "the ledger still owes work");
        prop_assert!(sim.nodes.values().all(|node| node.jobs.is_empty()), "a node still has work");
    }
}
