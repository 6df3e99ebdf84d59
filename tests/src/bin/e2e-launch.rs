fn main() -> std::process::ExitCode {
    tsm_launch::main()
}
