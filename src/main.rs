//! The `rewake` binary.

fn main() -> std::process::ExitCode {
    rewake::cli::main()
}
