//! What every part of tsm-launch agrees on. Nothing here links libtorch.
//!
//! - [`config`]: one YAML per job, validated whole before anything starts.
//! - [`mod@env`]: the environment contract between the launcher and a worker.
//! - [`run_dir`]: which file lies where in a run folder.
//! - [`message`]: what a worker tells its launcher over `TSM_AGENT_FD`.
//! - [`all_reduce`]: what a rank says of an all-reduce that it measured.
//! - [`exit`]: the documented exit codes.
//! - [`text`]: texts of any length, cut.

pub mod all_reduce;
pub mod config;
pub mod env;
pub mod exit;
pub mod message;
pub mod run_dir;
pub mod text;

pub use config::Config;
pub use env::WorkerEnv;
pub use run_dir::RunDir;
