//! By what two failures are the same.

use super::{Class, Facts, Verdict, xid};

/// Characters of a signature.
const WIDTH: usize = 200;

/// A text that is equal for failures of the same kind and cause. Numbers, addresses, temporary paths and times are
/// left away: they differ between two runs of the same error.
pub fn signature(verdict: &Verdict, facts: &Facts) -> String {
    let class = verdict.class;
    let end = facts.end.map(|end| end.to_string());
    let cause = match class {
        // Their evidence is what happened to be there.
        Class::NodeLost | Class::Hang => return class.to_string(),
        Class::OutOfMemory if facts.oom_kills.all > 0 || facts.oom_kill.is_some() => {
            return class.to_string();
        }
        Class::Hardware => match xid::number(&verdict.evidence) {
            Some(number) => format!("Xid {number}"),
            None => normal(&verdict.evidence),
        },
        // A code or a signal is no number that varies.
        _ if end.as_ref() == Some(&verdict.evidence) => verdict.evidence.clone(),
        _ => normal(&verdict.evidence),
    };
    format!("{class}: {cause}")
}

fn normal(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let in_token = |c: char| c.is_alphanumeric() || c == '_';
        let (token, after) = if let Some(name) = rest.strip_prefix("/tmp/") {
            let stop = |c: char| c.is_whitespace() || "/'\",:)]>".contains(c);
            let end = name.find(stop).unwrap_or(name.len());
            out.push_str("/tmp/#");
            ("", &name[end..])
        } else if let Some(after) = after_uuid(rest) {
            push_number(&mut out);
            ("", after)
        } else if in_token(first) {
            rest.split_at(rest.find(|c| !in_token(c)).unwrap_or(rest.len()))
        } else if first.is_whitespace() {
            if !out.ends_with(' ') {
                out.push(' ');
            }
            ("", &rest[first.len_utf8()..])
        } else {
            out.push(first);
            ("", &rest[first.len_utf8()..])
        };
        push_token(&mut out, token);
        rest = after;
    }
    out.trim().chars().take(WIDTH).collect()
}

/// What follows a UUID at the start of `text`.
fn after_uuid(text: &str) -> Option<&str> {
    let (uuid, after) = text.split_at_checked(36)?;
    let dash = |i: usize| [8, 13, 18, 23].contains(&i);
    let fits = |(i, b): (usize, u8)| {
        if dash(i) {
            b == b'-'
        } else {
            b.is_ascii_hexdigit()
        }
    };
    uuid.bytes().enumerate().all(fits).then_some(after)
}

fn push_token(out: &mut String, token: &str) {
    let is_hex = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    let has_digit = token.bytes().any(|b| b.is_ascii_digit());
    let address = token.strip_prefix("0x").is_some_and(is_hex);
    if address || (token.len() >= 8 && has_digit && is_hex(token)) {
        return push_number(out);
    }
    for c in token.chars() {
        if c.is_ascii_digit() {
            push_number(out);
        } else {
            out.push(c);
        }
    }
}

/// One `#` for a number, also for one of several parts: 1.5, 12:30:01, 10.0.0.1, 2026-01-02.
fn push_number(out: &mut String) {
    if out.ends_with('#') {
        return;
    }
    let joined = ["#.", "#:", "#-", "#,"]
        .iter()
        .any(|end| out.ends_with(end));
    if joined {
        out.pop();
    } else {
        out.push('#');
    }
}
