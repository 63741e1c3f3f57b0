//! Serves a trace with all the real machines and says how long that took here.
//!
//! `cargo run --release -p baton-sim --example world_trace -- TRACE PREFILL DECODE [REQUESTS]`

use std::path::Path;
use std::time::Instant;

use baton_sim::device::A800X8_70B;
use baton_sim::replay::{Disturbance, Link, Settings};
use baton_sim::trace::Trace;
use baton_sim::world::replay_trace;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).map(|text| text.parse::<usize>().expect("a number"));
    let file = arguments.first().expect("a trace");
    let mut trace = Trace::read(Path::new(file), 512).expect("a trace");
    trace.spread();
    trace.requests.truncate(number(3).unwrap_or(usize::MAX));
    let device = A800X8_70B;
    let settings = Settings {
        prefill_nodes: number(1).unwrap_or(12),
        decode_nodes: number(2).unwrap_or(4),
        cache_blocks: 10_000,
        prefill_cost: device.prefill_cost,
        decode_cost: device.decode_cost,
        link: Some(Link { gbps: 400.0, bytes_per_token: device.kv_bytes_per_token }),
        deadline_ms: None,
        disturbance: Disturbance::default(),
        report_ms: 100.0,
        seed: 0,
    };
    let began = Instant::now();
    let outcome = replay_trace(&settings, &trace).expect("the cluster can serve the trace");
    println!("{:#?}", outcome.summary(&settings, &trace));
    println!("{:.1} s", began.elapsed().as_secs_f64());
}
