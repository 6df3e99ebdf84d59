//! The key of a job: 32 random bytes that only the job's own processes know.
