//! What `--help` says below the options.

/// No line is so long that a terminal of 80 columns breaks it, but of commands.
pub(super) const AFTER: &str = "Examples:
  tsm-launch --gpus 8 configs/ucf101.yaml optim.lr=0.01
  tsm-launch --cpus 2 configs/demo.yaml
  tsm-launch --gpus auto -- python train.py --epochs 10
  tsm-launch --gpus 8 --resume runs/demo-20260131-120000
  tsm-launch --hosts gpu-01:8,gpu-02:8 configs/ucf101.yaml
  mpirun -N 1 --bind-to none tsm-launch --gpus 8 configs/ucf101.yaml
On every node:
  tsm-launch --nodes 2 --rendezvous gpu-01:29400 --key-file job.key --gpus 8 configs/ucf101.yaml

Other commands, each with a --help of its own:
  tsm-launch doctor     can this machine, or these, run a job; else what to do
  tsm-launch slurm      submit a job to SLURM, or print the script for it
  tsm-launch key FILE   make the key that the nodes of --rendezvous share

Exit codes:
    0  the job ran to its end
    N  the own code of the rank that failed first, or 128 + its signal;
       128 + the signal that stopped the launcher
   64  the command line is wrong
   65  an input file is missing or broken
   69  a machine cannot run the job
   70  a bug of tsm-launch
   73  an output cannot be written
   75  saved, and to be continued
   76  a peer or node was lost
   78  the configuration is wrong
   92  the loss is not finite
   93  starting again would fail again";

#[cfg(test)]
mod tests {
    use super::super::Args;
    use super::AFTER;
    use clap::CommandFactory;
    use tsm_job::exit;

    #[test]
    fn the_help_names_every_command_and_code_and_is_broken_nowhere() {
        let help = Args::command().render_long_help().to_string();
        for command in ["doctor", "slurm", "key"] {
            assert!(
                help.contains(&format!("\n  tsm-launch {command} ")),
                "{help}"
            );
        }
        let (_, codes) = AFTER.split_once("Exit codes:\n").unwrap();
        let codes: Vec<i32> = codes
            .lines()
            .filter_map(|line| line.split_whitespace().next()?.parse().ok())
            .filter(|code| *code != exit::SIGNAL_BASE)
            .collect();
        let known = [
            exit::OK,
            exit::USAGE,
            exit::DATA,
            exit::PREFLIGHT,
            exit::BUG,
            exit::CANNOT_WRITE,
            exit::REQUEUE,
            exit::PEER,
            exit::CONFIG,
            exit::DIVERGED,
            exit::DO_NOT_REQUEUE,
        ];
        assert_eq!(codes, known);
        let (_, end) = help.split_once("Other commands").unwrap();
        for line in AFTER.split_once("Other commands").unwrap().1.lines() {
            assert!(line.len() < 80 && end.contains(line), "{line}");
        }
    }
}
