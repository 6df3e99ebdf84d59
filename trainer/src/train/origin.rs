//! The checkpoint from which all ranks go on. Each looks for it in the folder that it was told; where that is not one
//! folder for all of them, those that have none or an older one get the newest over the network.

use crate::checkpoint::{self, Found};
use crate::ddp::Peers;
use anyhow::Result;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tsm_job::WorkerEnv;

/// Bytes sent at once: they lie on the device meanwhile.
const CHUNK: usize = 64 << 20;

/// What one rank found for itself.
pub struct Own {
    found: Result<Option<Found>>,
    /// For the user.
    notes: Vec<String>,
}

/// Looks for what the launcher told this rank to go on from. Where there is nothing, others may have it; after a
/// restart, and in a run that is continued in its own folder, that is no error, because there may not have been a
/// checkpoint yet: it goes on from where the run began.
///
/// # Errors
/// A rank alone finds no usable checkpoint where there should be one (exit code DATA).
pub fn look(env: &WorkerEnv) -> Result<Own> {
    let restart = env.restart_count;
    let is_in_place = env.resume_from == env.run_dir;
    let (found, notes) = match &env.resume_from {
        None if restart == 0 => (Ok(None), Vec::new()),
        None => (
            Ok(None),
            vec![format!("restart {restart} from the beginning")],
        ),
        Some(path) if restart == 0 && !is_in_place => {
            (checkpoint::find(path).map(Some), Vec::new())
        }
        Some(path) => match checkpoint::find_if_any(path) {
            Ok(Ok(found)) => (Ok(Some(found)), Vec::new()),
            // Nobody has seen yet that they are broken.
            Ok(Err(unusable)) if restart == 0 && !unusable.is_empty() => {
                (checkpoint::find(path).map(Some), Vec::new())
            }
            Ok(Err(unusable)) => {
                let (found, why) = beginning(env, path);
                let warnings = unusable.iter().map(|u| format!("warning: {u}"));
                (found, warnings.chain([why]).collect())
            }
            Err(e) => (Err(e), Vec::new()),
        },
    };
    let found = match found {
        Err(e) if env.world_size == 1 => return Err(e),
        found => found,
    };
    Ok(Own { found, notes })
}

/// Where the run in `folder` began, and what to tell the user about that.
fn beginning(env: &WorkerEnv, folder: &Path) -> (Result<Option<Found>>, String) {
    let (found, place) = match &env.start_from {
        Some(path) => (checkpoint::find(path).map(Some), path.display().to_string()),
        None => (Ok(None), "the beginning".into()),
    };
    let start = match env.restart_count {
        0 => "start".to_string(),
        restart => format!("restart {restart}"),
    };
    let folder = folder.display();
    (
        found,
        format!("{start} from {place}: {folder} holds no usable checkpoint yet"),
    )
}

/// Makes the newest checkpoint that any rank has the one of all, and says what to tell the user about it. `None`: from
/// the beginning. Where all have the same, as in a shared folder, that costs a collective of a few bytes.
///
/// # Errors
/// No rank has a usable checkpoint, though this is no restart (exit code DATA), or a peer that is gone.
pub fn agree(own: Own, peers: &Peers, device: Device) -> Result<(Option<Found>, Vec<String>)> {
    let Own { found, mut notes } = own;
    let held = Held::of(found.as_ref().ok().and_then(Option::as_ref));
    let all = Held::gather(held, peers, device)?;
    let Some(transfer) = plan(&all) else {
        return Ok((found?, notes));
    };
    let own = found.unwrap_or_default();
    let bytes = send(own.as_ref(), transfer.root, peers, device)?;
    let keeps = !transfer.to.contains(&peers.rank());
    let found = match own.filter(|_| keeps) {
        Some(own) => own,
        None => {
            notes.clear();
            Found::unpack(&bytes)?
        }
    };
    notes.push(transfer.describe(found.snapshot.meta.step));
    Ok((Some(found), notes))
}

/// What a rank has, as far as the others need to know it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Held {
    /// -1: none.
    step: i64,
    /// The beginning of the digest.
    digest: i64,
}

impl Held {
    fn of(found: Option<&Found>) -> Held {
        found.map_or(
            Held {
                step: -1,
                digest: 0,
            },
            |found| {
                let digest = found.sha256.get(..15).unwrap_or_default();
                Held {
                    step: found.snapshot.meta.step as i64,
                    digest: i64::from_str_radix(digest, 16).unwrap_or_default(),
                }
            },
        )
    }

    /// That of every rank, by rank.
    fn gather(own: Held, peers: &Peers, device: Device) -> Result<Vec<Held>> {
        let own = Tensor::from_slice(&[own.step, own.digest]).f_to_device(device)?;
        let all = peers.all_gather(&own, "comparison of the checkpoints")?;
        let held = |t: &Tensor| -> Result<Held> {
            let t: Vec<i64> = Vec::try_from(&t.f_to_device(Device::Cpu)?)?;
            let (step, digest) = (t[0], t[1]);
            Ok(Held { step, digest })
        };
        all.iter().map(held).collect()
    }
}

/// A checkpoint that has to be sent.
#[derive(Debug, PartialEq)]
struct Transfer {
    root: u32,
    /// Ranks that have none or another one.
    to: Vec<u32>,
}

/// Who sends its checkpoint to whom: the lowest rank with the newest. `None` where all have the same.
fn plan(all: &[Held]) -> Option<Transfer> {
    let newest = all.iter().map(|h| h.step).max()?;
    let root = all.iter().position(|h| h.step == newest)?;
    let others = all.iter().zip(0..).filter(|(h, _)| **h != all[root]);
    let to: Vec<u32> = others.map(|(_, rank)| rank).collect();
    let root = root as u32;
    (!to.is_empty()).then_some(Transfer { root, to })
}

impl Transfer {
    fn describe(&self, step: u64) -> String {
        let (root, to) = (self.root, self.to.as_slice());
        let ranks = match to {
            [one] => format!("rank {one}, which did not have it"),
            more => format!("{} ranks that did not have it", more.len()),
        };
        format!(
            "warning: the run folder is not shared by all nodes: rank {root} sent its checkpoint of step {step} to {ranks}; checkpoints are lost with the disk of rank 0's node"
        )
    }
}

/// The bytes of the checkpoint of `root`, on all ranks.
fn send(own: Option<&Found>, root: u32, peers: &Peers, device: Device) -> Result<Vec<u8>> {
    let what = "broadcast of the checkpoint";
    let is_root = peers.rank() == root;
    let mut bytes = match own {
        Some(found) if is_root => found.pack()?,
        _ => Vec::new(),
    };
    let length = Tensor::from_slice(&[bytes.len() as i64]).f_to_device(device)?;
    peers.broadcast(&[length.shallow_clone()], root, what)?;
    bytes.resize(length.int64_value(&[0]) as usize, 0);
    for chunk in bytes.chunks_mut(CHUNK) {
        let data = Tensor::f_from_data_size(chunk, &[chunk.len() as i64], Kind::Uint8)?
            .f_to_device(device)?;
        peers.broadcast(&[data.shallow_clone()], root, what)?;
        if !is_root {
            let numel = chunk.len();
            data.f_to_device(Device::Cpu)?
                .f_copy_data_u8(chunk, numel)?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(all: &[(i64, i64)]) -> Vec<Held> {
        let held = |&(step, digest)| Held { step, digest };
        all.iter().map(held).collect()
    }

    #[test]
    fn nothing_is_sent_where_all_have_the_same() {
        assert_eq!(plan(&held(&[(-1, 0); 3])), None);
        assert_eq!(plan(&held(&[(40, 7); 3])), None);
        assert_eq!(plan(&[]), None);
    }

    #[test]
    fn the_lowest_rank_with_the_newest_sends() {
        let sent = |all: &[(i64, i64)]| plan(&held(all)).map(|t| (t.root, t.to));
        assert_eq!(sent(&[(40, 7), (-1, 0)]), Some((0, vec![1])));
        // Rank 0 is on another node than before.
        assert_eq!(
            sent(&[(-1, 0), (20, 5), (40, 7), (40, 7)]),
            Some((2, vec![0, 1]))
        );
        // Two histories.
        assert_eq!(sent(&[(40, 7), (40, 8), (40, 7)]), Some((0, vec![1])));
    }
}
