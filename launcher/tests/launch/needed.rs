//! What the launcher needs to start: nothing that a plain machine lacks.

use elf::ElfBytes;
use elf::abi::DT_NEEDED;
use elf::endian::NativeEndian;

#[test]
fn the_launcher_links_the_c_library_and_nothing_else() {
    let file = fs_err::read(env!("CARGO_BIN_EXE_tsm-launch")).unwrap();
    let file = ElfBytes::<NativeEndian>::minimal_parse(&file).expect("an ELF file");
    let sections = file.find_common_data().expect("its sections");
    let (dynamic, names) = (sections.dynamic, sections.dynsyms_strs);
    let (dynamic, names) = dynamic.zip(names).expect("it is linked dynamically");
    let needed = dynamic.iter().filter(|entry| entry.d_tag == DT_NEEDED);
    let needed: Vec<&str> = needed
        .map(|entry| names.get(entry.d_val() as usize).expect("a name"))
        .collect();
    assert!(needed.contains(&"libc.so.6"), "{needed:?}");
    // Parts of the C library and of the compiler.
    let plain = [
        "libc.",
        "libm.",
        "libgcc_s.",
        "libpthread.",
        "libdl.",
        "librt.",
        "ld-linux",
    ];
    let strange = needed
        .iter()
        .filter(|name| !plain.iter().any(|plain| name.starts_with(plain)));
    assert_eq!(strange.collect::<Vec<_>>(), [&""; 0], "{needed:?}");
}
