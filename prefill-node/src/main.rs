//! `baton-prefill`: the prefill daemon.

fn main() -> std::process::ExitCode {
    baton_prefill_node::run()
}
