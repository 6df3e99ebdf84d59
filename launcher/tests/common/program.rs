//! Programs that tests write.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes an executable file of these bytes. Another process writes it: while this one has it open for writing, so has any
/// child of another thread between its fork and its exec, and nobody could execute it (ETXTBSY).
pub fn write_program(path: &Path, bytes: impl AsRef<[u8]>) {
    let mut command = Command::new("sh");
    command.args(["-c", r#"cat > "$0" && chmod 755 "$0""#]);
    let mut child = command
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("sh starts");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(bytes.as_ref()).expect("cat reads");
    drop(stdin);
    assert!(child.wait().expect("a child").success(), "{path:?}");
}
