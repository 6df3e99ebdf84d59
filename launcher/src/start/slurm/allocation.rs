//! What a job has been given, read from the variables that SLURM sets.

use std::time::{Duration, SystemTime};
use tsm_job::exit::{self, Coded};

use super::job::JobId;
use super::nodelist::{counts, expand};
use crate::text;

/// Step ids from here on are SLURM's own (batch, extern, interactive), not those of an srun.
const FIRST_SPECIAL_STEP: u32 = 0xffff_fff0;
const BATCH_STEP: u32 = 0xffff_fffb;

/// The part of a cluster that this process may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    pub job: JobId,
    /// Of the job; inside a step those of the step.
    pub nodes: Vec<String>,
    /// `None` where SLURM does not manage GPUs, or does not say.
    pub gpus_per_node: Option<u32>,
    /// One per node where SLURM says so, else empty.
    pub cpus: Vec<u32>,
    /// When the job will be ended. Not every version tells by a variable: see [`super::Job::end`].
    pub end: Option<SystemTime>,
    /// How often the job was queued again.
    pub restart_count: u32,
    pub place: Place,
}

/// Where in a job a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The script of `sbatch`, on the first node.
    Batch,
    /// The shell of `salloc`: on the first node, or not on a node of the job at all.
    Shell,
    /// Started by the user's own `srun`; task `node` of one per node.
    Step { id: u32, node: u32 },
}

/// What the command line asks for; `None` where it says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub nodes: Option<u32>,
    /// On each node.
    pub gpus: Option<u32>,
}

impl Allocation {
    /// Reads the variables; `None` outside a job.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] for a variable that cannot be read or a job that cannot be used,
    /// [`exit::USAGE`] inside a step of several tasks per node.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Allocation>, Coded> {
        let get = |name: &str| lookup(name).filter(|value| !value.is_empty() && value != "(null)");
        let Some(raw) = get("SLURM_JOB_ID") else {
            return Ok(None);
        };
        if let Some(size) = get("SLURM_HET_SIZE") {
            let text = format!(
                "job {raw} is a heterogeneous job of {size} components (SLURM_HET_SIZE), which cannot be used\n  \
                 hint: submit one component: no `#SBATCH hetjob` lines, and no `:` between groups of options"
            );
            return Err(Coded::new(exit::PREFLIGHT, text));
        }
        let unreadable = |name: &str, value: &str, why: &str| {
            let hint =
                format!("SLURM sets {name}; look where it is changed before tsm-launch starts");
            let text = format!("{name} is {value:?}, which cannot be read: {why}\n  hint: {hint}");
            Coded::new(exit::PREFLIGHT, text)
        };
        let number = |name: &str| -> Result<Option<u32>, Coded> {
            let Some(value) = get(name) else {
                return Ok(None);
            };
            let parsed = value
                .parse()
                .map_err(|_| unreadable(name, &value, "not a number"))?;
            Ok(Some(parsed))
        };
        let required =
            |name: &str| number(name)?.ok_or_else(|| unreadable(name, "", "it is not set"));
        let job = JobId {
            id: required("SLURM_JOB_ID")?,
            array: number("SLURM_ARRAY_JOB_ID")?.zip(number("SLURM_ARRAY_TASK_ID")?),
        };

        let place = match number("SLURM_STEP_ID")? {
            Some(id) if id < FIRST_SPECIAL_STEP => Place::Step {
                id,
                node: required("SLURM_NODEID")?,
            },
            Some(BATCH_STEP) => Place::Batch,
            // Older versions give a batch shell no step, but it is a task, which a shell of salloc is not.
            None if get("SLURM_TASK_PID").is_some() => Place::Batch,
            _ => Place::Shell,
        };
        if let Place::Step { id, .. } = place
            && let Some(tasks) = get("SLURM_STEP_TASKS_PER_NODE")
        {
            let each = counts(&tasks)
                .map_err(|e| unreadable("SLURM_STEP_TASKS_PER_NODE", &tasks, &e.to_string()))?;
            if let Some(most) = each.iter().copied().max().filter(|&n| n > 1) {
                let text = format!(
                    "step {job}.{id} starts tsm-launch {most} times on a node (tasks per node: {tasks})\n  \
                     hint: start it once per node with srun --ntasks-per-node=1; it starts one worker per GPU itself"
                );
                return Err(Coded::new(exit::USAGE, text));
            }
        }

        let list = |names: &[&'static str]| {
            names
                .iter()
                .find_map(|&name| get(name).map(|value| (name, value)))
        };
        let names: &[&str] = match place {
            Place::Step { .. } => &[
                "SLURM_STEP_NODELIST",
                "SLURM_JOB_NODELIST",
                "SLURM_NODELIST",
            ],
            _ => &["SLURM_JOB_NODELIST", "SLURM_NODELIST"],
        };
        let (name, value) =
            list(names).ok_or_else(|| unreadable("SLURM_JOB_NODELIST", "", "it is not set"))?;
        let nodes = expand(&value).map_err(|e| unreadable(name, &value, &e.to_string()))?;

        let cpus = match get("SLURM_JOB_CPUS_PER_NODE") {
            Some(value) => counts(&value)
                .map_err(|e| unreadable("SLURM_JOB_CPUS_PER_NODE", &value, &e.to_string()))?,
            None => Vec::new(),
        };
        let end = match get("SLURM_JOB_END_TIME") {
            Some(value) => {
                let seconds = value
                    .parse()
                    .map_err(|_| unreadable("SLURM_JOB_END_TIME", &value, "not a number"))?;
                SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
            }
            None => None,
        };
        Ok(Some(Allocation {
            job,
            cpus: if cpus.len() == nodes.len() {
                cpus
            } else {
                Vec::new()
            },
            nodes,
            gpus_per_node: gpus(&get),
            end,
            restart_count: number("SLURM_RESTART_COUNT")?.unwrap_or(0),
            place,
        }))
    }

    /// Refuses a request that this job cannot fulfil, with the option that would change it.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`].
    pub fn check(&self, request: Request) -> Result<(), Coded> {
        let have = self.nodes.len() as u32;
        let what = match self.place {
            Place::Step { id, .. } => format!("step {}.{id}", self.job),
            Place::Batch | Place::Shell => format!("job {}", self.job),
        };
        let option = |flag: &str| match self.place {
            Place::Step { .. } => format!("start it with srun {flag}"),
            Place::Shell => format!("allocate with salloc {flag}"),
            Place::Batch => format!("submit with #SBATCH {flag}"),
        };
        if let Some(asked) = request.nodes.filter(|&asked| asked > have) {
            let text = format!(
                "{what} has {}, --nodes {asked} asks for {asked}\n  hint: {}, or give --nodes {have}",
                text::count(have, "node"),
                option(&format!("--nodes={asked}")),
            );
            return Err(Coded::new(exit::PREFLIGHT, text));
        }
        if let (Some(asked), Some(have)) = (request.gpus, self.gpus_per_node)
            && asked > have
        {
            let instead = match have {
                0 => "or give --cpus N".into(),
                n => format!("or give --gpus {n}"),
            };
            let text = format!(
                "{what} has {} on each node, --gpus {asked} asks for {asked}\n  hint: {}, {instead}",
                text::count(have, "GPU"),
                option(&format!("--gpus-per-node={asked}")),
            );
            return Err(Coded::new(exit::PREFLIGHT, text));
        }
        Ok(())
    }
}

/// GPUs on this node; for a shell that is on no node, what the job asked for.
fn gpus(get: &impl Fn(&str) -> Option<String>) -> Option<u32> {
    let count = |name: &str| get(name)?.parse().ok();
    let ids = |name: &str| Some(get(name)?.split(',').count() as u32);
    // `8`, `h100:8`, or `a100:2,h100:2`.
    let typed = |name: &str| {
        let value = get(name)?;
        let each = value
            .split(',')
            .map(|part| part.rsplit(':').next()?.parse::<u32>().ok());
        each.sum::<Option<u32>>()
    };
    count("SLURM_GPUS_ON_NODE")
        .or_else(|| ids("SLURM_STEP_GPUS"))
        .or_else(|| ids("SLURM_JOB_GPUS"))
        .or_else(|| typed("SLURM_GPUS_PER_NODE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| {
            pairs
                .iter()
                .rfind(|(n, _)| *n == name)
                .map(|(_, v)| v.to_string())
        }
    }

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Allocation>, Coded> {
        Allocation::from_env(lookup(pairs))
    }

    const BATCH: [(&str, &str); 8] = [
        ("SLURM_JOB_ID", "123"),
        ("SLURM_JOB_NODELIST", "n[1-2]"),
        ("SLURM_GPUS_ON_NODE", "4"),
        ("SLURM_JOB_CPUS_PER_NODE", "48(x2)"),
        ("SLURM_TASK_PID", "77"),
        ("SLURM_PROCID", "0"),
        ("SLURM_NODEID", "0"),
        ("SLURM_NODE_ALIASES", "(null)"),
    ];

    fn with(more: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
        BATCH.iter().chain(more).copied().collect()
    }

    #[test]
    fn a_batch_shell_is_no_step_although_it_has_a_rank() {
        let found = read(&BATCH).unwrap().unwrap();
        assert_eq!(found.place, Place::Batch);
        assert_eq!(
            (found.job.to_string(), found.nodes),
            ("123".into(), vec!["n1".into(), "n2".into()])
        );
        assert_eq!((found.gpus_per_node, found.cpus), (Some(4), vec![48, 48]));
        assert_eq!((found.restart_count, found.end), (0, None));
        let newer = with(&[("SLURM_STEP_ID", "4294967291")]);
        assert_eq!(read(&newer).unwrap().unwrap().place, Place::Batch);
        assert_eq!(read(&[]).unwrap(), None);
    }

    #[test]
    fn a_shell_of_salloc_is_no_step() {
        let login = [
            ("SLURM_JOB_ID", "9"),
            ("SLURM_JOB_NODELIST", "n1"),
            ("SLURM_GPUS_PER_NODE", "h100:8"),
        ];
        let found = read(&login).unwrap().unwrap();
        assert_eq!((found.place, found.gpus_per_node), (Place::Shell, Some(8)));
        let interactive = with(&[("SLURM_STEP_ID", "4294967290")]);
        assert_eq!(read(&interactive).unwrap().unwrap().place, Place::Shell);
    }

    #[test]
    fn a_step_has_its_own_nodes_and_one_task_on_each() {
        let step = with(&[
            ("SLURM_JOB_NODELIST", "n[1-4]"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NODELIST", "n[3-4]"),
            ("SLURM_STEP_TASKS_PER_NODE", "1(x2)"),
            ("SLURM_NODEID", "1"),
        ]);
        let found = read(&step).unwrap().unwrap();
        assert_eq!(
            (found.place, found.nodes),
            (
                Place::Step { id: 0, node: 1 },
                vec!["n3".into(), "n4".into()]
            )
        );
        let many = with(&[
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_TASKS_PER_NODE", "8(x2)"),
        ]);
        let error = read(&many).unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        assert!(
            error.message.contains("8 times") && error.message.contains("--ntasks-per-node=1"),
            "{error}"
        );
    }

    #[test]
    fn the_rest_of_a_job_is_read() {
        let found = read(&with(&[
            ("SLURM_ARRAY_JOB_ID", "120"),
            ("SLURM_ARRAY_TASK_ID", "3"),
            ("SLURM_RESTART_COUNT", "2"),
            ("SLURM_JOB_END_TIME", "1800000000"),
        ]));
        let found = found.unwrap().unwrap();
        assert_eq!(
            (found.job.to_string(), found.restart_count),
            ("120_3".into(), 2)
        );
        assert_eq!(
            found.end,
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))
        );
    }

    #[test]
    fn gpus_are_counted_whatever_says_so() {
        let count = |pairs: &[(&str, &str)]| gpus(&lookup(pairs));
        assert_eq!(
            count(&[("SLURM_GPUS_ON_NODE", "2"), ("SLURM_JOB_GPUS", "0,1,2")]),
            Some(2)
        );
        assert_eq!(
            count(&[("SLURM_STEP_GPUS", "4,6"), ("SLURM_JOB_GPUS", "0,1,2")]),
            Some(2)
        );
        assert_eq!(count(&[("SLURM_JOB_GPUS", "7")]), Some(1));
        assert_eq!(count(&[("SLURM_GPUS_PER_NODE", "a100:2,h100:3")]), Some(5));
        assert_eq!(count(&[("SLURM_GPUS_PER_NODE", "many")]), None);
        assert_eq!(count(&[]), None);
    }

    #[test]
    fn what_cannot_be_read_or_used_is_named() {
        let text =
            |more: &[(&'static str, &'static str)]| read(&with(more)).unwrap_err().to_string();
        assert!(
            text(&[("SLURM_JOB_NODELIST", "n[1-")])
                .contains("character 2: the bracket is not closed")
        );
        assert!(text(&[("SLURM_JOB_ID", "x")]).contains("SLURM_JOB_ID is \"x\""));
        assert!(text(&[("SLURM_JOB_NODELIST", "(null)")]).contains("SLURM_JOB_NODELIST"));
        assert!(text(&[("SLURM_RESTART_COUNT", "-1")]).contains("not a number"));
        assert!(text(&[("SLURM_HET_SIZE", "2")]).contains("heterogeneous"));
    }

    #[test]
    fn a_request_that_does_not_fit_names_the_option_to_change() {
        let job = read(&BATCH).unwrap().unwrap();
        let ask = |job: &Allocation, nodes, gpus| {
            job.check(Request { nodes, gpus })
                .map_err(|e| e.to_string())
        };
        assert_eq!(ask(&job, Some(2), Some(4)), Ok(()));
        assert_eq!(ask(&job, None, None), Ok(()));
        assert_eq!(
            ask(&job, None, Some(8)).unwrap_err(),
            "job 123 has 4 GPUs on each node, --gpus 8 asks for 8\n  \
             hint: submit with #SBATCH --gpus-per-node=8, or give --gpus 4"
        );
        let mut step = Allocation {
            place: Place::Step { id: 1, node: 0 },
            ..job
        };
        assert_eq!(
            ask(&step, Some(4), None).unwrap_err(),
            "step 123.1 has 2 nodes, --nodes 4 asks for 4\n  hint: start it with srun --nodes=4, or give --nodes 2"
        );
        step.gpus_per_node = None;
        assert_eq!(
            ask(&step, None, Some(8)),
            Ok(()),
            "the nodes themselves know better"
        );
    }
}
