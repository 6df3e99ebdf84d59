//! The key of a job: 32 random bytes that only the job's own processes know.

use fs_err::File;
use fs_err::os::unix::fs::OpenOptionsExt;
use hmac::{Hmac, KeyInit, Mac};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use sha2::Sha256;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};
use tsm_job::config::duration;
use tsm_job::exit::{self, Coded};

const NUM_BYTES: usize = 32;
const NUM_DIGITS: usize = 2 * NUM_BYTES;

/// How long [`Key::read_fd`] waits for the whole line.
pub const FD_DEADLINE: Duration = Duration::from_secs(30);

pub(super) type HmacSha256 = Hmac<Sha256>;

/// The secret of one job. Whoever has it can run commands as this user on every node of the job.
#[derive(Clone)]
pub struct Key([u8; NUM_BYTES]);

/// Never the bytes.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(secret)")
    }
}

impl Key {
    /// A new key from the kernel's random numbers.
    pub fn random() -> Key {
        Key(random())
    }

    /// Reads a file that [`Key::write_file`] made, or one with 64 hexadecimal digits in it.
    ///
    /// # Errors
    /// [`exit::USAGE`] unless it is a regular file that belongs to this user, that nobody else may
    /// read, and that holds a key.
    pub fn read_file(path: &Path) -> Result<Key, Coded> {
        let file = open_private(path, "key file")?;
        let mut text = Vec::new();
        // One byte more than a key and its line's end: enough to see that it is too long.
        let limit = NUM_DIGITS as u64 + 2;
        let read = file.take(limit).read_to_end(&mut text);
        read.map_err(|e| Coded::new(exit::USAGE, format!("cannot read the key: {e}")))?;
        parse(&text).map_err(|problem| {
            let path = path.display();
            let hint =
                "a key file is one line of 64 hexadecimal digits, as openssl rand -hex 32 prints it";
            let text = format!("the key file {path} holds no key: {problem}\n  hint: {hint}");
            Coded::new(exit::USAGE, text)
        })
    }

    /// Makes a file that only this user can read. What is there already stays as it is.
    ///
    /// # Errors
    /// [`exit::CANNOT_WRITE`] when there is something at `path`, or when it cannot be made.
    pub fn write_file(&self, path: &Path) -> Result<(), Coded> {
        let mut options = fs_err::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(path).map_err(|e| {
            let hint = match e.kind() {
                ErrorKind::AlreadyExists => "\n  hint: use the key in it, or remove it first",
                _ => "",
            };
            let text = format!("cannot make a key file: {e}{hint}");
            Coded::new(exit::CANNOT_WRITE, text)
        })?;
        file.write_all(self.to_line().as_bytes()).map_err(|e| {
            // A part of a key is of no use to anybody.
            let _ = fs_err::remove_file(path);
            Coded::new(
                exit::CANNOT_WRITE,
                format!("cannot write the key file: {e}"),
            )
        })
    }

    /// Reads one line from an inherited descriptor, and no byte behind it: stdin may go on as the
    /// connection. A descriptor above 2 is closed afterwards, so that no worker inherits it. Blocks
    /// for up to [`FD_DEADLINE`], so call it before anything else runs.
    ///
    /// # Errors
    /// [`exit::USAGE`] when the descriptor is not open for reading, or no key comes in time.
    pub fn read_fd(fd: RawFd) -> Result<Key, Coded> {
        let refuse = |problem: &str, hint: &str| {
            let text =
                format!("cannot read the key from descriptor {fd}: {problem}\n  hint: {hint}");
            Coded::new(exit::USAGE, text)
        };
        let line = match fd {
            0 => read_line(std::io::stdin().as_fd(), Instant::now() + FD_DEADLINE),
            3.. if is_open(fd) => {
                // SAFETY: open, and handed to this process for the key alone; nobody else closes it.
                #[expect(
                    unsafe_code,
                    reason = "a number on the command line names a descriptor"
                )]
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                read_line(fd.as_fd(), Instant::now() + FD_DEADLINE)
            }
            3.. => Err("it is not open".into()),
            _ => Err("it is no input".into()),
        };
        let open = format!(
            "give 0 for stdin, or a number from 3 on that the shell opened: {}<FILE",
            fd.max(3)
        );
        let line = line.map_err(|problem| refuse(&problem, &open))?;
        parse(&line).map_err(|problem| refuse(&problem, "send one line of 64 hexadecimal digits"))
    }

    /// Another key, for one purpose: whoever has this one can make it, but it does not tell this one.
    pub fn derive(&self, purpose: &[u8]) -> Key {
        let code = self.mac(b"tsm-key derived\0").chain_update(purpose);
        Key(code.finalize().into_bytes().into())
    }

    /// The key as 64 hexadecimal digits and the end of the line: what a key file holds, and what
    /// [`Key::read_fd`] expects.
    pub fn to_line(&self) -> String {
        let mut line = String::with_capacity(NUM_DIGITS + 1);
        for byte in self.0 {
            for digit in [byte >> 4, byte & 15] {
                line.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
            }
        }
        line.push('\n');
        line
    }

    /// A code of this key for one purpose. No label may be the beginning of another.
    pub(super) fn mac(&self, label: &[u8]) -> HmacSha256 {
        hmac(&self.0).chain_update(label)
    }
}

pub(super) fn hmac(key: &[u8; NUM_BYTES]) -> HmacSha256 {
    HmacSha256::new_from_slice(key).expect("a key of any length will do")
}

pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
    bytes
}

/// Opens a regular file of this user's own that nobody else may read or change. `what` names it in errors.
///
/// # Errors
/// [`exit::USAGE`], with the command that puts it right.
pub fn open_private(path: &Path, what: &str) -> Result<File, Coded> {
    let shown = path.display();
    let refuse = |problem: String| {
        Coded::new(
            exit::USAGE,
            format!("cannot use the {what} {shown}: {problem}"),
        )
    };
    // Looked at after it is open, so that it cannot be exchanged in between; a FIFO must not block.
    let mut options = fs_err::OpenOptions::new();
    let options = options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path);
    let file = file.map_err(|e| {
        let hint = match e.kind() {
            ErrorKind::NotFound if what == "key file" => {
                format!("\n  hint: make one with tsm-launch key {shown}, and copy it to every node")
            }
            _ => String::new(),
        };
        Coded::new(exit::USAGE, format!("cannot use the {what}: {e}{hint}"))
    })?;
    let stat = fstat(&file).map_err(|e| refuse(e.to_string()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refuse("it is no regular file".into()));
    }
    let me = rustix::process::geteuid().as_raw();
    if stat.st_uid != me {
        let owner = stat.st_uid;
        let hint = format!("make a copy of your own: install -m 600 {shown} COPY");
        return Err(refuse(format!(
            "it belongs to user {owner}, this is user {me}\n  hint: {hint}"
        )));
    }
    let mode = stat.st_mode & 0o777;
    if mode & 0o077 != 0 {
        let problem = format!("its mode is {mode:04o}, so others have access");
        return Err(refuse(format!("{problem}\n  hint: chmod 600 {shown}")));
    }
    Ok(file)
}

/// Hexadecimal digits with or without the end of the line. Says what is wrong without what was read.
pub fn parse(text: &[u8]) -> Result<Key, String> {
    let digits = text.strip_suffix(b"\n").unwrap_or(text);
    if digits.len() != NUM_DIGITS {
        let len = match digits.len() {
            len if len > NUM_DIGITS => format!("more than {NUM_DIGITS}"),
            len => len.to_string(),
        };
        return Err(format!(
            "it has {len} characters, not {NUM_DIGITS} hexadecimal digits"
        ));
    }
    let mut key = [0; NUM_BYTES];
    for (i, &digit) in digits.iter().enumerate() {
        let value = char::from(digit).to_digit(16);
        let value = value.ok_or_else(|| format!("character {} is no hexadecimal digit", i + 1))?;
        key[i / 2] = key[i / 2] << 4 | value as u8;
    }
    Ok(Key(key))
}

fn is_open(fd: RawFd) -> bool {
    // Asked through /proc, since a `BorrowedFd` of a closed descriptor must not exist.
    fs_err::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()
}

/// Bytes up to the end of the line, which is included, or up to one more than a key has.
fn read_line(fd: BorrowedFd<'_>, deadline: Instant) -> Result<Vec<u8>, String> {
    let mut line = Vec::with_capacity(NUM_DIGITS + 2);
    while line.len() < NUM_DIGITS + 2 && line.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("less than a century");
        let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut polled, Some(&left)) {
            Ok(0) => {
                let waited = duration::format(FD_DEADLINE);
                return Err(format!("no whole line came within {waited}"));
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.to_string()),
        }
        let mut byte = [0];
        match rustix::io::read(fd, &mut byte) {
            Ok(0) => break,
            Ok(_) => line.push(byte[0]),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
    Ok(line)
}

#[cfg(test)]
mod tests;
