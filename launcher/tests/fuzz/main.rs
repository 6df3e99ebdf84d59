//! The fuzz target of the wire, with a macro in place of the fuzzer, which needs a nightly compiler: the target is
//! compiled with everything else, and does what it is for.

/// In the target's eyes, the fuzzer.
extern crate self as libfuzzer_sys;

#[path = "../../fuzz/fuzz_targets/wire.rs"]
#[allow(unused_attributes, reason = "the target is a program of its own")]
mod wire;

/// Gives the function that the fuzzer would call a name.
#[macro_export]
macro_rules! fuzz_target {
    (|$bytes:ident: &[u8]| $body:expr) => {
        pub fn target($bytes: &[u8]) {
            $body
        }
    };
}

const MANIFEST: &str = include_str!("../../fuzz/Cargo.toml");

#[test]
fn the_target_takes_whatever_comes() {
    for kind in 0..=u8::MAX {
        for length in [0, 1, 2, 15, 64, 700] {
            let bytes: Vec<u8> = (0..length).map(|i: u32| (i * 7) as u8 ^ kind).collect();
            wire::target(&[&[kind], bytes.as_slice()].concat());
        }
    }
    wire::target(&[]);
}

#[test]
fn cargo_fuzz_finds_the_target_and_this_crate() {
    for line in [
        "path = \"fuzz_targets/wire.rs\"",
        "tsm-launch = { path = \"..\" }",
    ] {
        assert!(MANIFEST.lines().any(|l| l == line), "{line}\n{MANIFEST}");
    }
}
