//! Starts, watches and ends the workers of a distributed training job.

fn main() -> std::process::ExitCode {
    tsm_launch::main()
}
