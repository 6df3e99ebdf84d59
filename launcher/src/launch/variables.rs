//! What `--env` gives to the workers.

use tsm_job::exit::{self, Coded};

use crate::plan;

/// Each pair is `NAME=VALUE`, or `NAME` for the value that `lookup` gives.
///
/// # Errors
/// [`exit::USAGE`] for what is no variable, and for one that the launcher sets itself.
pub(super) fn parse(
    pairs: &[String],
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<(String, String)>, Coded> {
    pairs.iter().map(|pair| variable(pair, &lookup)).collect()
}

fn variable(
    pair: &str,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<(String, String), Coded> {
    let refuse = |why: &str| Coded::new(exit::USAGE, format!("--env {pair}: {why}"));
    let (name, value) = match pair.split_once('=') {
        Some((name, value)) => (name, Some(value.to_string())),
        None => (pair, lookup(pair)),
    };
    if name.is_empty() {
        return Err(refuse("a variable needs a name\n  hint: write NAME=VALUE"));
    }
    if name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let why = format!("{name:?} is no name of a variable\n  hint: write NAME=VALUE");
        return Err(refuse(&why));
    }
    if let Some(instead) = plan::set_by_launcher(name) {
        let all = plan::SET_VARIABLES.map(|(name, _)| name).join(", ");
        let why = format!("the launcher sets {name} itself\n  hint: {instead}; it sets {all}");
        return Err(refuse(&why));
    }
    let value = value.ok_or_else(|| {
        refuse("the variable is not set here\n  hint: write NAME=VALUE, or set it before")
    })?;
    Ok((name.into(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pair: &str) -> Result<(String, String), Coded> {
        variable(pair, |name| (name == "HERE").then(|| "v".into()))
    }

    #[test]
    fn a_variable_has_a_name_and_a_value() {
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        for (given, meant) in [
            ("A=1", pair("A", "1")),
            ("A=b=c d", pair("A", "b=c d")),
            ("A=", pair("A", "")),
            ("HERE", pair("HERE", "v")),
            // Ours are only for those who say nothing.
            ("OMP_NUM_THREADS=2", pair("OMP_NUM_THREADS", "2")),
            ("NCCL_SOCKET_IFNAME=ib0", pair("NCCL_SOCKET_IFNAME", "ib0")),
        ] {
            assert_eq!(of(given).unwrap(), meant);
        }
        for (given, why) in [
            ("=x", "needs a name"),
            ("", "needs a name"),
            ("A B=1", "\"A B\" is no name"),
            ("A\n=1", "is no name"),
            ("AWAY", "is not set here"),
        ] {
            let error = of(given).unwrap_err();
            assert_eq!(error.code, exit::USAGE);
            assert!(error.message.contains(why), "{error}");
            assert!(error.message.contains("\n  hint: "), "{error}");
        }
    }

    #[test]
    fn what_the_launcher_sets_is_refused_by_name_and_with_what_to_do_instead() {
        for (given, instead) in [
            ("RANK=7", "gives every rank"),
            ("WORLD_SIZE", "--gpus"),
            ("CUDA_VISIBLE_DEVICES=3", "--gpus"),
            ("TSM_RESUME_FROM=x", "--resume"),
        ] {
            let error = of(given).unwrap_err();
            let name = given.split('=').next().unwrap();
            assert_eq!(error.code, exit::USAGE);
            let why = format!("the launcher sets {name} itself\n  hint: ");
            for part in [why.as_str(), instead, "it sets RANK, "] {
                assert!(error.message.contains(part), "{part}: {error}");
            }
        }
    }
}
