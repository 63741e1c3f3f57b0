//! What was found, and what to do about it.

use std::path::Path;

use serde_json::{Value, json};

use super::super::check;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As it should be.
    Fine,
    /// Worth knowing.
    Note,
    /// Wrong.
    Problem,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) what: String,
    pub(super) verdict: Verdict,
    pub(super) found: String,
    /// Empty if there is nothing to do.
    pub(super) remedy: String,
}

impl Finding {
    pub(super) fn fine(what: impl Into<String>, found: impl Into<String>) -> Self {
        let (what, found) = (what.into(), found.into());
        Self { what, verdict: Verdict::Fine, found, remedy: String::new() }
    }

    pub(super) fn note(what: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Note, remedy: remedy.into(), ..Self::fine(what, found) }
    }

    pub(super) fn problem(what: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Problem, remedy: remedy.into(), ..Self::fine(what, found) }
    }

    pub(super) fn is_problem(&self) -> bool {
        self.verdict == Verdict::Problem
    }
}

pub(super) fn good_file(file: &Path, whose: &str) -> Finding {
    Finding::fine("configuration", format!("{} is {whose} file", file.display()))
}

pub(super) fn bad_file(file: &Path, error: &dyn std::error::Error) -> Finding {
    let remedy = "docs/configuration.md lists every key; `baton check` reads the file again";
    Finding::problem("configuration", check::named(file, error), remedy)
}

pub(super) fn as_text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.what.len()).max().unwrap_or_default();
    let mut text = String::new();
    for Finding { what, verdict, found, remedy } in findings {
        let mark = match verdict {
            Verdict::Fine => "ok     ",
            Verdict::Note => "note   ",
            Verdict::Problem => "PROBLEM",
        };
        text += &format!("{mark}  {what:<width$}  {found}\n");
        if !remedy.is_empty() {
            text += &format!("{:9}{:width$}  -> {remedy}\n", "", "");
        }
    }
    text
}

pub(super) fn as_json(findings: &[Finding]) -> String {
    let object = |finding: &Finding| {
        let verdict = match finding.verdict {
            Verdict::Fine => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "problem",
        };
        json!({
            "check": finding.what,
            "verdict": verdict,
            "found": finding.found,
            "remedy": finding.remedy,
        })
    };
    format!("{}\n", findings.iter().map(object).collect::<Value>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_comes_with_its_remedy() {
        let findings = [
            Finding::fine("disk", "9 GiB free"),
            Finding::problem("open files", "256", "raise LimitNOFILE"),
        ];
        let wanted = "\
ok       disk        9 GiB free
PROBLEM  open files  256
                     -> raise LimitNOFILE
";
        assert_eq!(as_text(&findings), wanted);
        assert!(as_json(&findings).contains("\"verdict\":\"problem\""));
    }
}
