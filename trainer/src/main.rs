use std::process::ExitCode;

fn main() -> ExitCode {
    tsm_trainer::main()
}
