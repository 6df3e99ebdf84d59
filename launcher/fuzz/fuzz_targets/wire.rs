//! What may arrive on a connection. In launcher/: `cargo +nightly fuzz run wire`.
//!
//! The tests of the wire run the same function with random bytes.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tsm_launch::cluster::wire::fuzz_one(bytes));
