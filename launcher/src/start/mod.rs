//! How the nodes of a job are found: SLURM, ssh, MPI, Kubernetes, or by hand.
pub mod slurm;
