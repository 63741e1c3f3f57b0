//! `baton-decode`: the decode daemon.

fn main() -> std::process::ExitCode {
    let about = "Takes KV caches from prefill nodes and generates tokens.";
    baton_node::daemon::main(
        baton_proto::ids::Role::Decode,
        "baton-decode",
        about,
        baton_decode_node::serve,
    )
}
