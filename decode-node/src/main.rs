//! `baton-decode`: the decode daemon.

fn main() -> std::process::ExitCode {
    baton_decode_node::run()
}
