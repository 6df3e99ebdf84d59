//! SLURM's short forms of lists: `gpu[001-003,7],login1` for node names, `4(x2),1` for numbers.

use std::fmt::Write;

/// More hosts than any list may name; SLURM's own bound on one range.
const MAX_HOSTS: usize = 65_536;

/// A list that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{list:?}, character {at}: {problem}")]
pub struct ListError {
    pub list: String,
    /// Counts from 1.
    pub at: usize,
    pub problem: String,
}

/// The hosts of a list, in its order.
///
/// A name may have several brackets, and text behind the last (which SLURM itself refuses). The last
/// bracket varies fastest, as in SLURM; with three and more, SLURM's order is another.
///
/// # Errors
/// With the position of what is wrong.
pub fn expand(list: &str) -> Result<Vec<String>, ListError> {
    let fail = |at: usize, problem: String| ListError {
        list: list.into(),
        at: list[..at].chars().count() + 1,
        problem,
    };
    let too_many = |at| fail(at, format!("it names more than {MAX_HOSTS} hosts"));
    let mut hosts = Vec::new();
    let mut start = 0;
    loop {
        let end = item_end(list, start);
        let item = &list[start..end];
        if item.is_empty() {
            return Err(fail(start, "a host name is missing".into()));
        }
        let mut names = vec![String::new()];
        let mut at = start;
        while at < end {
            let text_end = list[at..end].find(['[', ']']).map_or(end, |i| at + i);
            let text = &list[at..text_end];
            if let Some(i) = text.find(char::is_whitespace) {
                return Err(fail(at + i, "a host name has no blanks".into()));
            }
            names.iter_mut().for_each(|name| name.push_str(text));
            at = text_end;
            if at == end {
                break;
            }
            if list[at..].starts_with(']') {
                return Err(fail(at, "`]` without `[`".into()));
            }
            let Some(length) = list[at..end].find(']') else {
                return Err(fail(at, "the bracket is not closed".into()));
            };
            let numbers = bracket(&list[at + 1..at + length])
                .map_err(|(i, problem)| fail(at + 1 + i, problem))?;
            if names.len() * numbers.len() + hosts.len() > MAX_HOSTS {
                return Err(too_many(at));
            }
            let pair = |name: &String| {
                numbers
                    .iter()
                    .map(move |n| format!("{name}{n}"))
                    .collect::<Vec<_>>()
            };
            names = names.iter().flat_map(pair).collect();
            at += length + 1;
        }
        hosts.append(&mut names);
        if hosts.len() > MAX_HOSTS {
            return Err(too_many(start));
        }
        if end == list.len() {
            return Ok(hosts);
        }
        start = end + 1;
    }
}

/// Where the item that begins at `start` ends: at the next comma outside brackets.
fn item_end(list: &str, start: usize) -> usize {
    let mut inside = false;
    for (i, c) in list[start..].char_indices() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            ',' if !inside => return start + i,
            _ => {}
        }
    }
    list.len()
}

/// The numbers of `001-003,7`, or the offset of what is wrong.
fn bracket(text: &str) -> Result<Vec<String>, (usize, String)> {
    let mut numbers = Vec::new();
    let mut at = 0;
    for range in text.split(',') {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let number = |digits: &str, i: usize| match digits.parse::<u64>() {
            Ok(n) if digits.bytes().all(|b| b.is_ascii_digit()) => Ok(n),
            _ => Err((at + i, format!("{digits:?} is not a number"))),
        };
        let (from, to) = (number(low, 0)?, number(high, range.len() - high.len())?);
        if to < from {
            return Err((at, format!("{range} runs backwards")));
        }
        if to - from >= MAX_HOSTS as u64 || numbers.len() + (to - from) as usize >= MAX_HOSTS {
            return Err((at, format!("{range} names more than {MAX_HOSTS} hosts")));
        }
        let width = low.len();
        numbers.extend((from..=to).map(|n| format!("{n:0width$}")));
        at += range.len() + 1;
    }
    Ok(numbers)
}

/// The short form of `hosts`: [`expand`] gives the same hosts in the same order.
pub fn compress<S: AsRef<str>>(hosts: &[S]) -> String {
    let mut groups: Vec<Group> = Vec::new();
    for host in hosts {
        let host = host.as_ref();
        if !groups.last_mut().is_some_and(|group| group.takes(host)) {
            groups.push(Group::new(host));
        }
    }
    let texts: Vec<String> = groups.iter().map(Group::text).collect();
    texts.join(",")
}

/// Neighbours in a list whose names differ in their last number only.
struct Group<'a> {
    prefix: &'a str,
    suffix: &'a str,
    /// First number as written, and the last.
    ranges: Vec<(&'a str, u64)>,
}

impl<'a> Group<'a> {
    fn new(host: &'a str) -> Group<'a> {
        let (prefix, digits, suffix) = split(host);
        Group {
            prefix,
            suffix,
            ranges: digits.parse().map(|n| (digits, n)).into_iter().collect(),
        }
    }

    /// Adds `host`, if it belongs here.
    fn takes(&mut self, host: &'a str) -> bool {
        let (prefix, digits, suffix) = split(host);
        let Ok(number) = digits.parse::<u64>() else {
            return false;
        };
        if (prefix, suffix) != (self.prefix, self.suffix) {
            return false;
        }
        match self.ranges.last_mut() {
            None => return false,
            Some((first, last))
                if last.checked_add(1) == Some(number)
                    && format!("{number:0w$}", w = first.len()) == digits =>
            {
                *last = number;
            }
            Some(_) => self.ranges.push((digits, number)),
        }
        true
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (first, last) in &self.ranges {
            let comma = if text.is_empty() { "" } else { "," };
            let _ = match first.parse() == Ok(*last) {
                true => write!(text, "{comma}{first}"),
                false => write!(text, "{comma}{first}-{last:0w$}", w = first.len()),
            };
        }
        let many = text.contains(['-', ',']);
        let (open, close) = if many { ("[", "]") } else { ("", "") };
        format!("{}{open}{text}{close}{}", self.prefix, self.suffix)
    }
}

/// Before, in, and behind the last number of a name.
fn split(host: &str) -> (&str, &str, &str) {
    let end = host
        .rfind(|c: char| c.is_ascii_digit())
        .map_or(0, |i| i + 1);
    let start = host[..end].rfind(|c: char| !c.is_ascii_digit());
    let start = start.map_or(0, |i| {
        i + host[i..].chars().next().map_or(0, char::len_utf8)
    });
    (&host[..start], &host[start..end], &host[end..])
}

/// The numbers of `4(x2),1`: one per node.
///
/// # Errors
/// With the position of what is wrong.
pub fn counts(list: &str) -> Result<Vec<u32>, ListError> {
    let mut counts = Vec::new();
    let mut at = 0;
    for item in list.split(',') {
        let fail = |i: usize, problem: String| ListError {
            list: list.into(),
            at: list[..at + i].chars().count() + 1,
            problem,
        };
        let (count, times) = match item.split_once("(x") {
            None => (item, "1"),
            Some((count, rest)) => (
                count,
                rest.strip_suffix(')')
                    .ok_or_else(|| fail(count.len(), "the bracket is not closed".into()))?,
            ),
        };
        let number = |text: &str, i: usize| {
            let is_number = |_: &u32| text.bytes().all(|b| b.is_ascii_digit());
            let number = text.parse::<u32>().ok().filter(is_number);
            number.ok_or_else(|| fail(i, format!("{text:?} is not a number")))
        };
        let (value, times) = (number(count, 0)?, number(times, count.len() + 2)?);
        if counts.len() + times as usize > MAX_HOSTS {
            return Err(fail(0, format!("it covers more than {MAX_HOSTS} nodes")));
        }
        counts.extend(std::iter::repeat_n(value, times as usize));
        at += item.len() + 1;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(list: &str) -> Vec<String> {
        expand(list).unwrap()
    }

    #[test]
    fn lists_expand() {
        assert_eq!(
            names("gpu[001-003,7],login1"),
            ["gpu001", "gpu002", "gpu003", "gpu7", "login1"]
        );
        assert_eq!(names("[1-2]"), ["1", "2"]);
        assert_eq!(names("n[9-11]"), ["n9", "n10", "n11"]);
        assert_eq!(names("n[099-101]"), ["n099", "n100", "n101"]);
        assert_eq!(names("n[08-010]"), ["n08", "n09", "n10"]);
        assert_eq!(
            names("r[1-2]n[3-4]-ib"),
            ["r1n3-ib", "r1n4-ib", "r2n3-ib", "r2n4-ib"]
        );
        assert_eq!(names("rack[1-2]n[01-10]").len(), 20);
        assert_eq!(names("x[18446744073709551615]"), ["x18446744073709551615"]);
    }

    #[test]
    fn an_error_has_its_place() {
        let error = |list: &str| {
            let error = expand(list).unwrap_err();
            (error.at, error.problem)
        };
        for (list, at, problem) in [
            ("", 1, "a host name is missing"),
            ("a,,b", 3, "a host name is missing"),
            ("a,", 3, "a host name is missing"),
            ("gpu[1-3", 4, "the bracket is not closed"),
            ("gpu1]", 5, "`]` without `[`"),
            ("n[]", 3, "\"\" is not a number"),
            ("n[1,x]", 5, "\"x\" is not a number"),
            ("n[1-2-3]", 5, "\"2-3\" is not a number"),
            ("n[+1]", 3, "\"+1\" is not a number"),
            ("ü[1-a]", 5, "\"a\" is not a number"),
            ("n[7,3-1]", 5, "3-1 runs backwards"),
            ("n1 n2", 3, "a host name has no blanks"),
            ("n[[1]]", 3, "\"[1\" is not a number"),
            (
                "n[18446744073709551616]",
                3,
                "\"18446744073709551616\" is not a number",
            ),
        ] {
            assert_eq!(error(list), (at, problem.to_string()), "{list}");
        }
        assert_eq!(
            expand("n[1").unwrap_err().to_string(),
            "\"n[1\", character 2: the bracket is not closed"
        );
    }

    #[test]
    fn a_list_that_would_fill_the_memory_is_refused() {
        assert_eq!(names("n[0-65535]").len(), MAX_HOSTS);
        for list in [
            "n[0-65536]",
            "n[0-18446744073709551615]",
            "n[1-999]m[1-999]",
            "n[0-65535],a",
            "n[0-9][0-9][0-9][0-9][0-9]",
        ] {
            assert!(
                expand(list)
                    .unwrap_err()
                    .problem
                    .contains("more than 65536"),
                "{list}"
            );
        }
    }

    #[test]
    fn hosts_compress() {
        let short = |list: &str| compress(&list.split(' ').collect::<Vec<_>>());
        assert_eq!(short("n1 n2 n3 n5 m1"), "n[1-3,5],m1");
        assert_eq!(short("n08 n09 n10 n011"), "n[08-10,011]");
        assert_eq!(short("n9 n10 n1"), "n[9-10,1]");
        assert_eq!(short("a b n1-ib n2-ib"), "a,b,n[1-2]-ib");
        assert_eq!(short("n1 n1"), "n[1,1]");
        assert_eq!(short("r1n1 r1n2 r2n1"), "r1n[1-2],r2n1");
        assert_eq!(compress::<&str>(&[]), "");
    }

    #[test]
    fn counts_expand() {
        assert_eq!(counts("4(x2),1"), Ok(vec![4, 4, 1]));
        assert_eq!(counts("1"), Ok(vec![1]));
        let at = |list: &str| counts(list).unwrap_err().at;
        assert_eq!(
            (at(""), at("4,x"), at("4(x2"), at("4(x),1"), at("1,4(2)")),
            (1, 3, 2, 4, 3)
        );
        assert!(counts("1(x4294967295)").is_err());
    }

    proptest! {
        #[test]
        fn compressing_loses_nothing(hosts in prop::collection::vec("[a-c]{0,2}[0-9]{1,3}(-x)?|[a-z]{1,3}", 1..40)) {
            prop_assert_eq!(expand(&compress(&hosts)).unwrap(), hosts);
        }

        #[test]
        fn ranges_survive(prefix in "[a-z]{1,4}", low in 0u32..2000, length in 0u32..300, width in 1usize..6) {
            let hosts: Vec<String> = (low..=low + length).map(|n| format!("{prefix}{n:0width$}")).collect();
            let short = compress(&hosts);
            prop_assert!(!short.contains(','), "{}", short);
            prop_assert_eq!(expand(&short).unwrap(), hosts);
        }

        #[test]
        fn nothing_panics(list in "[a-c0-9,\\[\\]()x -]{0,24}") {
            let _ = (expand(&list), counts(&list));
        }
    }
}
