use std::path::Path;

use baton_proto::config::parse_toml;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    let settings: Settings = parse_toml(text, Path::new("c.toml"))?;
    settings.try_into()
}

#[test]
fn what_is_not_set_has_a_default() {
    let config = parse("model = ['/m/a']\nidentity = '/i'\nmax_wait_s = 1.5").unwrap();
    assert_eq!(config.models, [("a".to_owned(), PathBuf::from("/m/a"))]);
    assert_eq!(config.options.placement.most_wait, Some(Duration::from_millis(1500)));
    assert_eq!((config.http.port(), config.drain_timeout), (7402, Duration::from_secs(60)));
}

fn aliased(alias: &str) -> Result<Config, ConfigError> {
    parse(&format!("model = ['/m/large', '/m/small']\nidentity = '/i'\n[[aliases]]\n{alias}"))
}

#[test]
fn an_alias_stands_for_several_models() {
    let config = aliased("name = 'chat'\nmodels = ['large', 'small']").unwrap();
    let [alias] = &config.aliases[..] else { panic!("{:?}", config.aliases) };
    assert_eq!((alias.prices.as_slice(), alias.target_ttft_ms), (&[1.0, 1.0][..], 2000.0));
    let cases = [
        ("name = 'large'\nmodels = ['small']", "aliases.name is \"large\", which"),
        ("name = 'a'\nmodels = []", "aliases.models of \"a\" is empty"),
        ("name = 'a'\nmodels = ['x']", "has \"x\", which is not served"),
        ("name = 'a'\nmodels = ['small']\nprices = []", "has 0 prices for 1 models"),
        ("name = 'a'\nmodels = ['small']\nprices = [0.0]", "has 0; it must be above 0"),
        ("name = 'a'\nmodels = ['small']\ntarget_ttft_ms = -1.0", "is -1; it must be"),
        ("name = 'a'\nmodel = []", "unknown key `model`; did you mean `models`?"),
    ];
    for (alias, message) in cases {
        let error = aliased(alias).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn mistakes_are_named() {
    let cases = [
        ("modle = ['/m']", "c.toml:1:1: unknown key `modle`; did you mean `model`?"),
        ("identity = '/i'", "model is not set; give --model, or model in the configuration file"),
        (
            "model = ['/m']",
            "identity is not set; give --identity, or identity in the configuration file",
        ),
        ("model = ['/m/a', '/n/a']", "model_name names \"a\" twice"),
        ("model = ['/m']\nmodel_name = []", "model_name has 0 names for 1 models"),
        ("model = ['/m']\nmax_requests = 0", "max_requests is 0; it must be from 1 to 1048576"),
        (
            "model = ['/m']\nmax_requests = 9223372036854775807",
            "max_requests is 9223372036854775807; it must be from 1 to 1048576",
        ),
        ("model = ['/m']\nmax_held_tokens = 0", "max_held_tokens must be above 0"),
        (
            "model = ['/m']\nmax_bodies_bytes = 1",
            "max_bodies_bytes is 1; it must be at least 16777216",
        ),
        (
            "model = ['/m']\nidentity = '/i'\noverload_status = 500",
            "overload_status is 500; it must be 529, 503 or 429",
        ),
        ("model = ['/m']\nmax_wait_s = -1", "max_wait_s is -1; it must be above 0"),
        (
            "model = ['/m']\nidentity = '/i'\npeers = ['10.0.0.1']",
            "peers has \"10.0.0.1\", which is not HOST:PORT",
        ),
        (
            "model = ['/m']\nidentity = '/i'\ngrpc = '0.0.0.0:1'",
            "0.0.0.0:1 is open to other machines without encryption; set tls_cert and tls_key, \
             listen on a loopback address, or set allow_plaintext = true",
        ),
        ("model = ['/m']\ntls_cert = '/c'", "tls_cert is set without tls_key"),
        ("model = ['/m']\ntls_client_ca = '/c'", "tls_client_ca is set without tls_cert"),
    ];
    for (text, message) in cases {
        assert_eq!(parse(text).unwrap_err().to_string(), message);
    }
}
