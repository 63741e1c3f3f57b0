//! Certificates: whether they belong together, whose they are, and how long they last.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime};

use baton_identity::{CertificateFacts, Identity, Part};

use super::super::check::NO_IDENTITY;
use super::report::Finding;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// A certificate that ends sooner should be renewed now.
const SOON: Duration = DAY.saturating_mul(30);

const REISSUE: &str = "issue another one with `baton certs issue`, and restart the daemon";
const AS_ROOT: &str = "look at it as the daemon's user, or as root";

/// The identity in `folder` if there is one that can be used, and what is to say of it.
pub(super) fn load(
    folder: Option<&Path>,
    part: Part,
    findings: &mut Vec<Finding>,
) -> Option<Identity> {
    let Some(folder) = folder else {
        let remedy = "name its folder with --identity, such as /etc/baton/identity/decode-0";
        findings.push(Finding::note("identity", NO_IDENTITY, remedy));
        return None;
    };
    let loaded = Identity::load(folder);
    findings.push(match &loaded {
        Ok(_) => {
            Finding::fine("identity", format!("{} is whole and fits its CA", folder.display()))
        }
        Err(error) => {
            let error = error.to_string();
            let unread = error.contains("Permission denied");
            Finding::problem("identity", error, if unread { AS_ROOT } else { REISSUE })
        }
    });
    // Why it cannot be read was said.
    if let Ok(facts) = CertificateFacts::read(folder) {
        findings.push(role(&facts, part));
        findings.push(member_validity("certificate's time", &facts));
    }
    loaded.ok()
}

fn role(facts: &CertificateFacts, part: Part) -> Finding {
    let (name, names) = (&facts.name, facts.names.join(", "));
    if facts.part == part {
        return Finding::fine("certificate", format!("{name} is a {part}, as {names}"));
    }
    let found = format!("{name} is a {}, and the file is that of a {part}", facts.part);
    let flag = if part == Part::Node { "without" } else { "with" };
    Finding::problem("certificate", found, format!("issue one {flag} --coordinator"))
}

/// How long a member's certificate is still valid.
pub(super) fn member_validity(what: &str, facts: &CertificateFacts) -> Finding {
    validity(what, facts.not_before..facts.not_after, SystemTime::now(), REISSUE)
}

/// How long a certificate is still valid, and how to get another one.
pub(super) fn validity(
    what: &str,
    valid: Range<SystemTime>,
    now: SystemTime,
    renew: &str,
) -> Finding {
    if now < valid.start {
        let remedy = "compare this machine's clock with that of the one that issued it";
        return Finding::problem(what, "it is not valid yet", remedy);
    }
    match valid.end.duration_since(now) {
        Err(_) => Finding::problem(what, "it has expired", renew),
        Ok(left) => {
            let found = format!("{} days left", left.as_secs() / DAY.as_secs());
            if left < SOON { Finding::note(what, found, renew) } else { Finding::fine(what, found) }
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_identity::ClusterCa;

    use super::super::report::Verdict;
    use super::*;

    fn findings(folder: Option<&Path>, part: Part) -> Vec<Finding> {
        let mut findings = Vec::new();
        load(folder, part, &mut findings);
        findings
    }

    #[test]
    fn a_certificate_is_judged_by_its_time_and_its_part() {
        let folder = tempfile::tempdir().expect("a folder");
        let (ca, node) = (folder.path().join("ca"), folder.path().join("n"));
        let name = "n".parse().expect("a name");
        let ca = ClusterCa::create(&ca).expect("made");
        ca.issue(Part::Node, &name, &["10.0.0.7"], &node).expect("issued");

        let found = findings(Some(&node), Part::Node);
        assert!(found.iter().all(|finding| finding.verdict == Verdict::Fine), "{found:?}");
        assert!(found[1].found.contains("n.node.baton, 10.0.0.7"), "{found:?}");
        let wrong = findings(Some(&node), Part::Coordinator);
        assert_eq!(wrong.iter().filter(|finding| finding.is_problem()).count(), 1, "{wrong:?}");

        let facts = CertificateFacts::read(&node).expect("read");
        let verdict = |now| validity("x", facts.not_before..facts.not_after, now, "renew").verdict;
        assert_eq!(verdict(facts.not_after - DAY), Verdict::Note);
        assert_eq!(verdict(facts.not_after + DAY), Verdict::Problem);
        assert_eq!(verdict(facts.not_before - DAY), Verdict::Problem);
    }

    #[test]
    fn a_folder_without_an_identity_is_one_problem_and_none_is_a_note() {
        let folder = tempfile::tempdir().expect("a folder");
        let found = findings(Some(folder.path()), Part::Node);
        assert!(matches!(&found[..], [one] if one.is_problem()), "{found:?}");
        let found = findings(None, Part::Node);
        assert!(matches!(&found[..], [one] if one.verdict == Verdict::Note), "{found:?}");
    }
}
