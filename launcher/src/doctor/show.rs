//! Findings as text.

use std::fmt::Write;

use crate::cluster::message::{Finding, Severity};
use crate::text::count;

/// One finding a line and its hint below, errors first, those of an area together, and a line that counts them.
pub fn print(findings: &[Finding], color: bool) -> String {
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    let place = |area: &str| findings.iter().position(|f| f.area == area);
    sorted.sort_by_key(|f| (std::cmp::Reverse(f.severity), place(&f.area)));
    let width = sorted.iter().map(|f| f.area.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in sorted {
        let (word, paint) = match finding.severity {
            Severity::Error => ("error", "\x1b[1;31m"),
            Severity::Warning => ("warning", "\x1b[1;33m"),
            Severity::Ok => ("ok", "\x1b[32m"),
        };
        let (paint, plain) = if color { (paint, "\x1b[0m") } else { ("", "") };
        let Finding {
            area,
            text: what,
            hint,
            ..
        } = finding;
        let _ = writeln!(text, "{paint}{word:<7}{plain}  {area:<width$}  {what}");
        if !hint.is_empty() {
            let _ = writeln!(text, "{:indent$}hint: {hint}", "", indent = 11 + width);
        }
    }
    let number = |severity| findings.iter().filter(|f| f.severity == severity).count() as u64;
    let errors = count(number(Severity::Error), "error");
    let warnings = count(number(Severity::Warning), "warning");
    let _ = writeln!(text, "{errors}, {warnings}, {} ok", number(Severity::Ok));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_first_with_their_hints() {
        let findings = [
            Finding::ok("gpu", "8 x H200"),
            Finding::warning("limits", "64 KiB may be locked", "raise memlock"),
            Finding::error("disk", "no space", "remove old runs"),
            Finding::ok("clock", "right"),
            Finding::ok("gpu", "no faults"),
        ];
        let expected = "\
error    disk    no space
                 hint: remove old runs
warning  limits  64 KiB may be locked
                 hint: raise memlock
ok       gpu     8 x H200
ok       gpu     no faults
ok       clock   right
1 error, 1 warning, 3 ok
";
        assert_eq!(print(&findings, false), expected);
        assert!(print(&findings, true).starts_with("\x1b[1;31merror  \x1b[0m  disk"));
    }
}
