fn main() -> std::process::ExitCode {
    tsm_bench::main()
}
