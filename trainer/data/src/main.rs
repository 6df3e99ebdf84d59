use clap::Parser;
use tsm_data::cli::{self, Cli};
use tsm_job::exit;

fn main() {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        let code = if error.use_stderr() {
            exit::USAGE
        } else {
            exit::OK
        };
        // Nothing can be told to anyone when the terminal is gone.
        let _ = error.print();
        std::process::exit(code);
    });
    if let Err(error) = cli::run(cli) {
        eprintln!("error: {error:#}");
        std::process::exit(exit::code_of(&error));
    }
}
