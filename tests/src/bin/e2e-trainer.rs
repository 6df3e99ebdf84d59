fn main() -> std::process::ExitCode {
    tsm_trainer::main()
}
