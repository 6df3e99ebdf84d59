//! Whether a job that failed is started again. Pure.
