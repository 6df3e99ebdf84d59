//! TensorBoard event files: TFRecord framing and the few protocol buffer messages we need, by hand.
//!
//! Formats: `tensorflow/core/lib/io/record_writer.h` (framing), `core/util/event.proto`,
//! `core/framework/summary.proto` and `tensor.proto` (field numbers).

use super::record::{Record, unix_s};
use super::warn::WarnOnce;
use fs_err::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Writes one event file at a time into a folder; one writer (rank 0) a folder.
///
/// Events are held in memory and written every `flush_every`, by [`Self::flush`] and on drop. A
/// failing write (a full disk, a folder that is gone) is named once on standard error and never
/// stops the training: the held events are lost, and the next flush begins a new file.
#[derive(Debug)]
pub struct EventWriter {
    folder: PathBuf,
    flush_every: Duration,
    last_flush: SystemTime,
    buffer: Vec<u8>,
    file: Option<File>,
    warn: WarnOnce,
}

impl EventWriter {
    /// Begins a file in `folder`, which is made if it is missing.
    ///
    /// `resumed_after` is the number of steps the checkpoint had finished, `None` for a fresh run:
    /// what older files of the folder say about later steps is then dropped by TensorBoard, which reads a
    /// session start as such a mark.
    pub fn create(
        folder: impl Into<PathBuf>,
        resumed_after: Option<u64>,
        flush_every: Duration,
        now: SystemTime,
    ) -> EventWriter {
        let mut writer = EventWriter {
            folder: folder.into(),
            flush_every,
            last_flush: now,
            buffer: Vec::new(),
            file: None,
            warn: WarnOnce::default(),
        };
        if let Some(step) = resumed_after {
            frame(&mut writer.buffer, &session_start(step + 1, now));
        }
        writer.write_out(now);
        writer
    }

    /// One point of curve `tag`. `step` is the x axis.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64, now: SystemTime) {
        self.scalars(step, &[(tag, value)], now);
    }

    /// The known numbers of a record under their tags, see [`Record::scalars`].
    pub fn record(&mut self, record: &Record, now: SystemTime) {
        self.scalars(record.step(), &record.scalars(), now);
    }

    /// Points of several curves at one step.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)], now: SystemTime) {
        if values.is_empty() {
            return;
        }
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut message = Vec::new();
            put_bytes(&mut message, 1, tag.as_bytes());
            put_f32(&mut message, 2, *value as f32);
            put_bytes(&mut summary, 1, &message);
        }
        self.event(step, &summary, now);
    }

    /// A text, shown as Markdown.
    pub fn text(&mut self, tag: &str, step: u64, markdown: &str, now: SystemTime) {
        const DT_STRING: u64 = 7;
        let mut dim = Vec::new();
        put_varint(&mut dim, 1, 1);
        let mut shape = Vec::new();
        put_bytes(&mut shape, 2, &dim);
        let mut tensor = Vec::new();
        put_varint(&mut tensor, 1, DT_STRING);
        put_bytes(&mut tensor, 2, &shape);
        put_bytes(&mut tensor, 8, markdown.as_bytes());
        let mut plugin = Vec::new();
        put_bytes(&mut plugin, 1, b"text");
        let mut metadata = Vec::new();
        put_bytes(&mut metadata, 1, &plugin);
        let mut value = Vec::new();
        put_bytes(&mut value, 1, tag.as_bytes());
        put_bytes(&mut value, 8, &tensor);
        put_bytes(&mut value, 9, &metadata);
        let mut summary = Vec::new();
        put_bytes(&mut summary, 1, &value);
        self.event(step, &summary, now);
    }

    /// Writes what is held.
    pub fn flush(&mut self, now: SystemTime) {
        if !self.buffer.is_empty() {
            self.write_out(now);
        }
    }

    fn event(&mut self, step: u64, summary: &[u8], now: SystemTime) {
        let mut event = event_header(step, now);
        put_bytes(&mut event, 5, summary);
        frame(&mut self.buffer, &event);
        // A clock that was set back counts as due.
        if now
            .duration_since(self.last_flush)
            .map_or(true, |waited| waited >= self.flush_every)
        {
            self.write_out(now);
        }
    }

    fn write_out(&mut self, now: SystemTime) {
        self.last_flush = now;
        let written = match &mut self.file {
            Some(file) => file.write_all(&self.buffer),
            None => begin_file(&self.folder, now).and_then(|mut file| {
                file.write_all(&self.buffer)?;
                self.file = Some(file);
                Ok(())
            }),
        };
        self.buffer.clear();
        if let Err(error) = written {
            // Readers stop at a torn record, so nothing may follow it in this file.
            self.file = None;
            self.warn.failed("cannot write TensorBoard events", &error);
        }
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        self.flush(self.last_flush);
    }
}

/// Makes a file that sorts behind all others of the folder: readers take them in order of name.
fn begin_file(folder: &Path, now: SystemTime) -> io::Result<File> {
    fs_err::create_dir_all(folder)?;
    let mut latest = 0;
    for entry in fs_err::read_dir(folder)? {
        latest = latest.max(time_of_name(&entry?.file_name().to_string_lossy()).unwrap_or(0));
    }
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
        .max(latest + 1);
    let host = sysinfo::System::host_name()
        .unwrap_or_else(|| "host".into())
        .replace('/', "_");
    let pid = std::process::id();
    let mut attempt = 0;
    let mut file = loop {
        let path = folder.join(format!(
            "events.out.tfevents.{seconds:010}.{host}.{pid}.{attempt}"
        ));
        match OpenOptions::new().create_new(true).append(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
            opened => break opened?,
        }
    };
    let mut first = event_header(0, now);
    put_bytes(&mut first, 3, b"brain.Event:2");
    let mut record = Vec::new();
    frame(&mut record, &first);
    file.write_all(&record)?;
    Ok(file)
}

/// The seconds in `events.out.tfevents.<seconds>.…`.
fn time_of_name(name: &str) -> Option<u64> {
    name.strip_prefix("events.out.tfevents.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// `Event { wall_time = 1, step = 2 }`, to which a payload is added.
fn event_header(step: u64, now: SystemTime) -> Vec<u8> {
    let mut event = Vec::new();
    put_f64(&mut event, 1, unix_s(now));
    put_varint(&mut event, 2, step);
    event
}

/// `Event { session_log = 7 { status = START } }`: events of this step and later, read before, are void.
fn session_start(first_step: u64, now: SystemTime) -> Vec<u8> {
    const START: u64 = 1;
    let mut log = Vec::new();
    put_varint(&mut log, 1, START);
    let mut event = event_header(first_step, now);
    put_bytes(&mut event, 7, &log);
    event
}

/// Appends a TFRecord: length, masked CRC of the length, data, masked CRC of the data.
fn frame(out: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked_crc(data).to_le_bytes());
}

/// CRC-32C, rotated and offset so that the CRC of data holding CRCs stays useful.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn put_f64(out: &mut Vec<u8>, field: u64, value: f64) {
    varint(out, field << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn put_f32(out: &mut Vec<u8>, field: u64, value: f32) {
    varint(out, field << 3 | 5);
    out.extend_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// The folder's files in order of name.
    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = fs_err::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        paths.sort();
        paths
    }

    /// Splits a file into records, checking each length and checksum.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = fs_err::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut records = Vec::new();
        let unmask = |crc: &[u8]| {
            let masked = u32::from_le_bytes(crc.try_into().unwrap()).wrapping_sub(0xa282_ead8);
            masked.rotate_left(15)
        };
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(
                unmask(&rest[8..12]),
                crc32c::crc32c(&rest[..8]),
                "checksum of a length"
            );
            let data = &rest[12..12 + length];
            assert_eq!(
                unmask(&rest[12 + length..16 + length]),
                crc32c::crc32c(data),
                "checksum of a record"
            );
            records.push(data.to_vec());
            rest = &rest[16 + length..];
        }
        records
    }

    #[test]
    fn a_record_has_the_bytes_of_the_format() {
        // CRC-32C of "123456789" is 0xe3069283 (the catalogue's check value).
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
        let mut event = event_header(300, at(2));
        put_bytes(&mut event, 3, b"x");
        let expected: &[u8] = &[
            0x09, 0, 0, 0, 0, 0, 0, 0, 0x40, 0x10, 0xac, 0x02, 0x1a, 1, b'x',
        ];
        assert_eq!(event, expected);
    }

    #[test]
    fn scalars_come_back_through_framing_and_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), None, Duration::from_secs(30), at(1000));
        writer.scalars(5, &[("loss", 1.5), ("lr", 0.25)], at(1001));
        drop(writer);
        let paths = files(dir.path());
        let name = paths[0].file_name().unwrap().to_string_lossy().into_owned();
        assert!(
            name.starts_with("events.out.tfevents.0000001000."),
            "{name}"
        );
        let records = records(&paths[0]);
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"brain.Event:2"));
        let mut loss = b"\x0a\x0b\x0a\x04loss\x15".to_vec();
        loss.extend(1.5f32.to_le_bytes());
        assert!(
            records[1].windows(loss.len()).any(|w| w == loss),
            "{:?}",
            records[1]
        );
    }

    #[test]
    fn events_are_written_when_due_and_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), None, Duration::from_secs(30), at(1000));
        let path = files(dir.path()).remove(0);
        writer.scalar("a", 1, 0.0, at(1029));
        assert_eq!(records(&path).len(), 1, "held");
        writer.scalar("a", 2, 0.0, at(1030));
        assert_eq!(records(&path).len(), 3, "due");
        writer.scalar("a", 3, 0.0, at(1031));
        drop(writer);
        assert_eq!(records(&path).len(), 4, "dropped");
    }

    #[test]
    fn a_resumed_run_begins_a_later_file_with_a_session_start() {
        let dir = tempfile::tempdir().unwrap();
        drop(EventWriter::create(
            dir.path(),
            None,
            Duration::ZERO,
            at(1000),
        ));
        // The clock went back; the file must still sort behind.
        drop(EventWriter::create(
            dir.path(),
            Some(20),
            Duration::ZERO,
            at(900),
        ));
        let paths = files(dir.path());
        assert_eq!(paths.len(), 2);
        let second = records(&paths[1]);
        assert_eq!(second.len(), 2);
        assert_eq!(
            second[1][9..],
            [0x10, 21, 0x3a, 2, 0x08, 1],
            "step 21, session_log START"
        );
    }

    #[test]
    fn a_broken_folder_warns_once_and_heals() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tb");
        fs_err::write(&folder, "a file in the way").unwrap();
        let mut writer = EventWriter::create(&folder, None, Duration::ZERO, at(1000));
        assert!(writer.warn.warned);
        writer.scalar("a", 1, 0.0, at(1001));
        fs_err::remove_file(&folder).unwrap();
        writer.scalar("a", 2, 0.0, at(1002));
        assert_eq!(
            records(&files(&folder)[0]).len(),
            2,
            "version and the one event after the repair"
        );
    }
}
