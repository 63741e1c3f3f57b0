//! docs/configuration.md says what the code says; `UPDATE=1 cargo test -p baton-tests --test
//! configuration` writes it anew.

use std::fmt::Write as _;
use std::path::Path;

use clap::{Args, Command};

const HEAD: &str = "\
# Configuration

One TOML file per daemon, given with `--config FILE`. A flag wins over its `BATON_*` variable, which wins over the
file. In the file a key has `_` where its flag has `-`. Unknown keys are refused with the nearest name; `baton check
FILE` reads a file as the daemon would. This page is made from the code by `tests/configuration.rs`.
";

/// Tables have no flags.
const ALIASES: &str = "
Several models can share a further name, in the file alone, with one table for each such name:

```toml
[[aliases]]
name = \"chat\"
models = [\"large\", \"small\"]   # served models, the preferred one first
prices = [1.0, 0.2]            # of a second of device time, relative; default 1 each
target_ttft_ms = 2000          # default
```

A request that names `chat` is served by the model with the least price times predicted prefill time among those that
would begin to answer within the target, or by whichever begins first. The last message says which model answered.
";

const KEYS: &str = "
`api_keys` names a file with one table for each key; `baton keys new --tenant NAME` makes a key and its table:

```toml
[[keys]]
name = \"website\"               # in logs and errors; letters, digits, - _ . @
sha256 = \"9f86d081…\"           # of the key; the key itself is nowhere
tenant = \"acme\"                # whose requests its requests are
scopes = [\"generate\"]          # default; also view and operate
requests_per_minute = 600      # these three: default no limit
tokens_per_minute = 1000000    # of prompts and outputs
max_in_flight = 32

[[tenants]]                    # limits of all keys of a tenant together
name = \"acme\"
tokens_per_minute = 2000000
```

[security.md](security.md) says what scopes allow and how limits count.
";

fn section<T: Args>(title: &str, page: &mut String) {
    writeln!(page, "\n## {title}\n\n| key | flag | variable | meaning |\n|---|---|---|---|")
        .unwrap();
    for argument in T::augment_args(Command::new("daemon")).get_arguments() {
        let (key, flag) = (argument.get_id(), argument.get_long().expect("every key is a flag"));
        let variable = argument.get_env().expect("every key is a variable").to_string_lossy();
        let help = argument.get_help().expect("every key is documented").to_string();
        let help = help.replace('\n', " ").replace('|', "\\|");
        writeln!(page, "| `{key}` | `--{flag}` | `{variable}` | {help} |").unwrap();
    }
}

#[test]
fn the_page_says_what_the_code_says() {
    let mut page = HEAD.to_owned();
    section::<baton_coordinator::settings::Settings>("Coordinator", &mut page);
    page.push_str(ALIASES);
    page.push_str(KEYS);
    section::<baton_node::settings::Settings>("Prefill and decode nodes", &mut page);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(written, page, "docs/configuration.md is out of date: run with UPDATE=1");
}
