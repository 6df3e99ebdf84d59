//! `tsm-launch doctor` and the preflight: whether this machine can run a job.
