use super::*;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};

const LINE: &str = "00ff102030405060708090a0b0c0d0e0f0112233445566778899aabbccddeeff\n";

fn set_mode(path: &Path, mode: u32) {
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A pipe that holds `text` and has no writer any more.
fn pipe_with(text: &[u8]) -> OwnedFd {
    let (read, write) = std::io::pipe().unwrap();
    (&write).write_all(text).unwrap();
    read.into()
}

#[test]
fn a_line_is_read_as_it_was_written() {
    let key = parse(LINE.as_bytes()).unwrap();
    assert_eq!(key.to_line(), LINE);
    let upper = LINE.trim_end().to_uppercase();
    assert_eq!(parse(upper.as_bytes()).unwrap().to_line(), LINE);
    let random = Key::random();
    assert_ne!(random.to_line(), Key::random().to_line());
    assert_eq!(
        parse(random.to_line().as_bytes()).unwrap().to_line(),
        random.to_line()
    );
}

#[test]
fn a_derived_key_is_another_one_and_always_the_same() {
    let key = parse(LINE.as_bytes()).unwrap();
    let derived = |purpose: &[u8]| key.derive(purpose).to_line();
    assert_eq!(derived(b"a"), derived(b"a"));
    assert_ne!(derived(b"a"), derived(b"b"));
    assert_ne!(derived(b"a"), LINE);
    assert_ne!(derived(b"a"), Key::random().derive(b"a").to_line());
}

#[test]
fn what_is_no_key_is_refused_without_being_shown() {
    let digits = LINE.trim_end();
    let bad = [
        (
            String::new(),
            "it has 0 characters, not 64 hexadecimal digits",
        ),
        (
            digits[1..].to_string(),
            "it has 63 characters, not 64 hexadecimal digits",
        ),
        (
            format!("{digits}0"),
            "it has more than 64 characters, not 64 hexadecimal digits",
        ),
        (
            format!("{LINE}\n"),
            "it has more than 64 characters, not 64 hexadecimal digits",
        ),
        (
            digits.replace("1122", "11g2"),
            "character 37 is no hexadecimal digit",
        ),
        (
            digits.replacen("00", "+0", 1),
            "character 1 is no hexadecimal digit",
        ),
    ];
    for (text, problem) in bad {
        assert_eq!(parse(text.as_bytes()).unwrap_err(), problem, "{text:?}");
    }
}

#[test]
fn debug_shows_no_byte() {
    assert_eq!(
        format!("{:?}", parse(LINE.as_bytes()).unwrap()),
        "Key(secret)"
    );
}

#[test]
fn a_written_file_is_private_and_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    let key = Key::random();
    key.write_file(&path).unwrap();
    let mode = fs_err::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(Key::read_file(&path).unwrap().to_line(), key.to_line());

    let error = Key::random().write_file(&path).unwrap_err();
    assert_eq!(error.code, exit::CANNOT_WRITE);
    assert!(error.message.contains("\n  hint: "), "{error}");
    assert_eq!(Key::read_file(&path).unwrap().to_line(), key.to_line());
    let nowhere = Key::random().write_file(&dir.path().join("no/key"));
    assert_eq!(nowhere.unwrap_err().code, exit::CANNOT_WRITE);
}

#[test]
fn a_file_that_others_can_reach_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    Key::random().write_file(&path).unwrap();
    for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644] {
        set_mode(&path, mode);
        let error = Key::read_file(&path).unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        let problem = format!(
            "cannot use the key file {0}: its mode is {mode:04o}, so others have access\n  hint: chmod 600 {0}",
            path.display()
        );
        assert_eq!(error.message, problem);
    }
    for mode in [0o600, 0o400, 0o700] {
        set_mode(&path, mode);
        Key::read_file(&path).unwrap();
    }
}

#[test]
fn only_a_regular_file_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs_err::create_dir(path("dir")).unwrap();
    set_mode(&path("dir"), 0o700);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("fifo"),
        FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    for name in ["dir", "fifo"] {
        let error = Key::read_file(&path(name)).unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        assert!(
            error.message.ends_with(": it is no regular file"),
            "{error}"
        );
    }
    let error = Key::read_file(&path("none")).unwrap_err();
    assert_eq!(error.code, exit::USAGE);
    assert!(error.message.contains("none"), "{error}");

    // Kubernetes shows a secret's files through symbolic links.
    Key::random().write_file(&path("key")).unwrap();
    symlink(path("key"), path("link")).unwrap();
    Key::read_file(&path("link")).unwrap();
}

#[test]
fn a_file_of_another_user_is_refused() {
    // /proc/1 belongs to whoever runs init; only where that is somebody else can this be seen.
    if rustix::process::geteuid().is_root() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Key::random().write_file(&path).unwrap();
        // A user namespace may not map this user; then there is nothing to refuse.
        if std::os::unix::fs::chown(&path, Some(12345), None).is_err() {
            return;
        }
        let error = Key::read_file(&path).unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        assert!(
            error
                .message
                .contains("it belongs to user 12345, this is user 0\n  hint: "),
            "{error}"
        );
    } else {
        let error = Key::read_file(Path::new("/etc/passwd")).unwrap_err();
        assert!(error.message.contains("it belongs to user 0"), "{error}");
    }
}

#[test]
fn a_file_without_a_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    fs_err::write(&path, "0".repeat(1 << 20)).unwrap();
    set_mode(&path, 0o600);
    let error = Key::read_file(&path).unwrap_err();
    assert_eq!(error.code, exit::USAGE);
    assert!(error.message.contains("more than 64"), "{error}");
}

#[test]
fn what_follows_the_line_stays_in_the_descriptor() {
    let pipe = pipe_with(format!("{LINE}and the rest").as_bytes());
    let line = read_line(pipe.as_fd(), Instant::now() + FD_DEADLINE).unwrap();
    assert_eq!(line, LINE.as_bytes());
    let mut rest = String::new();
    std::fs::File::from(pipe).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "and the rest");
}

#[test]
fn a_descriptor_is_read_with_bounds() {
    let endless = pipe_with(&[b'0'; 4096]);
    let line = read_line(endless.as_fd(), Instant::now() + FD_DEADLINE).unwrap();
    assert_eq!(line.len(), NUM_DIGITS + 2);
    assert!(parse(&line).is_err());

    let (silent, _writer) = std::io::pipe().unwrap();
    let error = read_line(silent.as_fd(), Instant::now()).unwrap_err();
    assert_eq!(error, "no whole line came within 30s");
}

#[test]
fn a_descriptor_is_used_up_or_refused() {
    // Far above what other tests open meanwhile, so that a closed number is not used again.
    let number = rustix::io::fcntl_dupfd_cloexec(pipe_with(LINE.as_bytes()), 700).unwrap();
    let number = number.into_raw_fd();
    assert_eq!(Key::read_fd(number).unwrap().to_line(), LINE);
    let error = Key::read_fd(number).unwrap_err();
    assert_eq!(error.code, exit::USAGE);
    let problem = format!("cannot read the key from descriptor {number}: it is not open\n  hint: ");
    assert!(error.message.starts_with(&problem), "{error}");
    for no_input in [-1, 1, 2] {
        let error = Key::read_fd(no_input).unwrap_err();
        assert!(error.message.contains("it is no input"), "{error}");
    }
    let short = rustix::io::fcntl_dupfd_cloexec(pipe_with(b"abc"), 700).unwrap();
    let error = Key::read_fd(short.into_raw_fd()).unwrap_err();
    assert!(error.message.contains("it has 3 characters"), "{error}");
}
