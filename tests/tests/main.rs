//! The whole system: real launcher, real trainers, real files.

mod all_reduce;
mod bad_input;
mod crew;
mod data_parallel;
mod elastic;
mod job;
mod local_disks;
mod membership;
mod mpi;
mod nodes;
mod preempt;
mod programs;
mod resume;
mod slurm;
mod tensorboard;
mod video;
mod weizmann;
