//! What options are given: `2:4` nodes, the GPUs `0,1,3`, a time or `off`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;
use tsm_job::config::duration;

/// How many nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nodes {
    pub min: u32,
    pub max: u32,
}

impl Nodes {
    pub const ONE: Nodes = Nodes::exactly(1);

    pub const fn exactly(number: u32) -> Nodes {
        let (min, max) = (number, number);
        Nodes { min, max }
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.min == self.max {
            true => write!(f, "{}", self.max),
            false => write!(f, "{}:{}", self.min, self.max),
        }
    }
}

impl FromStr for Nodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Nodes, String> {
        let number = |part: &str| match part.parse::<u32>() {
            Ok(n) if (1..=65_536).contains(&n) => Ok(n),
            _ => Err(format!(
                "`{part}` is not a number of nodes; write 4, or 2:4 for two to four"
            )),
        };
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        let (min, max) = (number(min)?, number(max)?);
        if min > max {
            return Err(format!("the minimum {min} is above the maximum {max}"));
        }
        Ok(Nodes { min, max })
    }
}

/// A time, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(pub Option<Duration>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Limit, String> {
        match text {
            "off" => Ok(Limit(None)),
            text => match duration::parse(text)? {
                Duration::ZERO => {
                    Err("no rank is that quick; write `off` to look for no hangs".into())
                }
                time => Ok(Limit(Some(time))),
            },
        }
    }
}

/// Shorter than this, a busy machine is taken for a lost one.
pub(super) fn node_timeout(text: &str) -> Result<Duration, String> {
    let time = duration::parse(text)?;
    if time < Duration::from_millis(200) {
        return Err("a node needs at least 200ms to be heard".into());
    }
    Ok(time)
}

/// What `--gpus` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gpus {
    Auto,
    Count(u32),
    /// Positions in the list of visible GPUs.
    List(Vec<u32>),
}

impl Gpus {
    /// How many, where that is said.
    pub fn count(&self) -> Option<u32> {
        match self {
            Gpus::Auto => None,
            Gpus::Count(n) => Some(*n),
            Gpus::List(list) => Some(list.len() as u32),
        }
    }
}

impl FromStr for Gpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Gpus, String> {
        if text == "auto" {
            return Ok(Gpus::Auto);
        }
        let number = |part: &str| {
            part.trim().parse::<u32>().map_err(|_| {
                format!("`{part}` is not a number; write a count (8), `auto`, or a list (0,1,3; `2,` for GPU 2 alone)")
            })
        };
        if !text.contains(',') {
            return match number(text)? {
                0 => Err("no worker would start; for the CPU write --cpus N".into()),
                n => Ok(Gpus::Count(n)),
            };
        }
        let list = text
            .trim_end_matches(',')
            .split(',')
            .map(number)
            .collect::<Result<Vec<_>, _>>()?;
        for (i, gpu) in list.iter().enumerate() {
            if list[..i].contains(gpu) {
                return Err(format!("GPU {gpu} is named twice"));
            }
        }
        Ok(Gpus::List(list))
    }
}

impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Gpus::Auto => f.write_str("auto"),
            Gpus::Count(n) => write!(f, "{n}"),
            // A number alone would be a count.
            Gpus::List(list) if list.len() == 1 => write!(f, "{},", list[0]),
            Gpus::List(list) => {
                let list: Vec<_> = list.iter().map(u32::to_string).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}

/// Whose output appears on the launcher's own stdout and stderr.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Show {
    All,
    Ranks(Vec<u32>),
}

impl FromStr for Show {
    type Err = String;

    fn from_str(text: &str) -> Result<Show, String> {
        match text {
            "all" => Ok(Show::All),
            "none" => Ok(Show::Ranks(Vec::new())),
            list => list
                .split(',')
                .map(|part| {
                    part.trim()
                        .parse()
                        .map_err(|_| format!("`{part}` is not a rank; write `all`, `none` or 0,3"))
                })
                .collect::<Result<_, _>>()
                .map(Show::Ranks),
        }
    }
}

/// What is looked at before the first rank is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preflight {
    Off,
    /// GPUs, driver, disks, limits: less than a second.
    Quick,
    /// Memory, the network between the nodes and their GPUs are measured too: some seconds.
    Full,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_a_count_auto_or_a_list() {
        assert_eq!("8".parse(), Ok(Gpus::Count(8)));
        assert_eq!("auto".parse(), Ok(Gpus::Auto));
        assert_eq!("0,1,3".parse(), Ok(Gpus::List(vec![0, 1, 3])));
        assert_eq!("2,".parse(), Ok(Gpus::List(vec![2])));
        for text in ["8", "auto", "0,1,3", "2,"] {
            assert_eq!(text.parse::<Gpus>().unwrap().to_string(), text);
        }
        for bad in ["0", "", ",", "1,1", "x", "-1", "1,x"] {
            assert!(bad.parse::<Gpus>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ranks_to_show() {
        assert_eq!("all".parse(), Ok(Show::All));
        assert_eq!("none".parse(), Ok(Show::Ranks(Vec::new())));
        assert_eq!("0,3".parse(), Ok(Show::Ranks(vec![0, 3])));
        assert!("x".parse::<Show>().is_err());
    }
}
