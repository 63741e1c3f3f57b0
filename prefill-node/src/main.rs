//! `baton-prefill`: the prefill daemon.

fn main() -> std::process::ExitCode {
    let about = "Computes prompts and streams their KV cache to decode nodes.";
    baton_node::daemon::main(
        baton_proto::ids::Role::Prefill,
        "baton-prefill",
        about,
        baton_prefill_node::serve,
    )
}
