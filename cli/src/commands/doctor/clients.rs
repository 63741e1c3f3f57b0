//! What a coordinator shows to clients and asks of them: its certificate and the file of API keys.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use baton_coordinator::front::door::{Door, Tls, TlsFiles};
use baton_identity::validity;

use super::certificates;
use super::report::Finding;

const RENEW: &str = "get another one from its authority, then `systemctl reload baton-coordinator`";

/// The certificate of the client ports.
pub(super) fn tls(files: Option<&TlsFiles>) -> Vec<Finding> {
    let Some(files) = files else { return Vec::new() };
    let mut findings = vec![match Tls::load(files.clone()) {
        Ok(_) => {
            let (cert, key) = (files.cert.display(), files.key.display());
            Finding::fine("tls_cert", format!("{cert} is whole and fits {key}"))
        }
        Err(error) => {
            let remedy = "correct the file; the daemon's user must be able to read a key, and others not \
                          (chgrp baton, chmod 640)";
            Finding::problem("tls_cert", error.to_string(), remedy)
        }
    }];
    let certificates = [
        ("tls_cert's time", Some(&files.cert)),
        ("tls_client_ca's time", files.client_ca.as_ref()),
    ];
    for (what, file) in certificates {
        // Why it cannot be read was said.
        if let Some(Ok(valid)) = file.map(|file| validity(file)) {
            findings.push(certificates::validity(what, valid, SystemTime::now(), RENEW));
        }
    }
    findings.extend(only_its_owner("tls_key", &files.key));
    findings
}

/// The file of API keys.
pub(super) fn keys(file: Option<&PathBuf>) -> Vec<Finding> {
    let Some(file) = file else { return Vec::new() };
    let mut findings = vec![match Door::new(Some(file.clone())) {
        Ok(door) => {
            let count = door.key_count().unwrap_or_default();
            Finding::fine("api_keys", format!("{} has {count} keys", file.display()))
        }
        Err(error) => {
            let remedy = "correct the file (docs/security.md); it must be readable by the daemon's user and \
                          writable by nobody else (chgrp baton, chmod 640)";
            Finding::problem("api_keys", error.to_string(), remedy)
        }
    }];
    findings.extend(only_its_owner("api_keys", file));
    findings
}

/// Root reads everything, a unit's user does not.
fn only_its_owner(what: &str, file: &Path) -> Option<Finding> {
    let facts = file.metadata().ok()?;
    let closed = closed_to_units(facts.uid(), facts.mode());
    closed.then(|| {
        let found = format!("only root may read {}", file.display());
        Finding::note(what, found, "for systemd's unit: chgrp baton and chmod 640")
    })
}

fn closed_to_units(owner: u32, mode: u32) -> bool {
    owner == 0 && mode & 0o044 == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use baton_coordinator::front::door::keys::NewKey;
    use baton_coordinator::front::door::scope::Scope;
    use baton_identity::{ClusterCa, Part};

    use super::super::report::Verdict;
    use super::*;

    fn set_mode(file: &Path, mode: u32) {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(file, mode).expect("its owner may");
    }

    fn problems(findings: &[Finding]) -> Vec<&Finding> {
        findings.iter().filter(|finding| finding.is_problem()).collect()
    }

    #[test]
    fn the_clients_certificate_is_judged_by_its_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let (ca, out) = (folder.path().join("ca"), folder.path().join("c"));
        let authority = ClusterCa::create(&ca).expect("made");
        authority
            .issue(Part::Coordinator, &"c".parse().expect("a name"), &[], &out)
            .expect("issued");
        let (cert, key) = (out.join("node.pem"), out.join("node.key"));
        let files = TlsFiles { cert, key, client_ca: Some(ca.join("ca.pem")) };
        assert!(tls(None).is_empty());
        let found = tls(Some(&files));
        assert!(problems(&found).is_empty(), "{found:?}");
        let times: Vec<_> = found.iter().filter(|f| f.found.ends_with("days left")).collect();
        assert_eq!(times.len(), 2, "{found:?}");

        set_mode(&files.key, 0o644);
        let found = tls(Some(&files));
        let open = problems(&found);
        assert!(open[0].found.contains("open to every user"), "{found:?}");
        assert!(open[0].remedy.contains("chmod 640"), "{found:?}");
        let nothing = TlsFiles { cert: folder.path().join("no.pem"), ..files };
        assert_eq!(problems(&tls(Some(&nothing))).len(), 1);
    }

    #[test]
    fn the_file_of_keys_is_read_as_the_coordinator_would() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("keys.toml");
        assert!(keys(None).is_empty());
        assert!(keys(Some(&file))[0].is_problem(), "there is none");
        let key = NewKey::draw("website", "acme", &[Scope::Generate]).expect("drawn");
        std::fs::write(&file, key.entry).expect("written");
        set_mode(&file, 0o640);
        let found = keys(Some(&file));
        assert!(matches!(&found[..], [one] if one.found.ends_with("has 1 keys")), "{found:?}");
        set_mode(&file, 0o666);
        let found = keys(Some(&file));
        assert!(
            found[0].is_problem() && found[0].found.contains("every user may write"),
            "{found:?}"
        );
    }

    #[test]
    fn what_only_root_may_read_is_told() {
        assert!(closed_to_units(0, 0o100_600));
        assert!(!closed_to_units(0, 0o100_640) && !closed_to_units(1000, 0o100_600));
        assert_eq!(only_its_owner("x", Path::new("/nowhere")), None);
        let own = tempfile::NamedTempFile::new().expect("a file");
        let root = own.as_file().metadata().expect("it is there").uid() == 0;
        let verdict = only_its_owner("x", own.path()).map(|finding| finding.verdict);
        assert_eq!(verdict, root.then_some(Verdict::Note));
    }
}
