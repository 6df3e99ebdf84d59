//! A synthetic motion set for trying out training: eight classes that differ only in the order of
//! their frames.

mod motion;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tsm_job::exit::{self, Coded};

pub use motion::CLASSES;
use motion::Clip;

const MANIFEST: &str = "manifest.json";
const JPEG_QUALITY: i32 = 90;

/// What a set is made from. Equal parameters give equal files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demo {
    /// Number of training clips.
    pub train: usize,
    /// Number of validation clips.
    pub val: usize,
    /// Width and height of a frame in pixels.
    pub size: usize,
    /// Frames per clip.
    pub frames: usize,
    pub seed: u64,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    /// Rises when the same parameters begin to give other pixels.
    version: u32,
    /// False while the set is being made.
    complete: bool,
    demo: Demo,
}

const VERSION: u32 = 1;

/// Whether [`Demo::make`] had anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    New,
    AlreadyThere,
}

/// The two parts of the set; their clips never share a texture.
#[derive(Debug, Clone, Copy)]
enum Split {
    Train,
    Val,
}

impl Split {
    fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Val => "val",
        }
    }
}

impl Demo {
    /// Writes the set below `out`: `<class>/<clip>/img_00001.jpg` and on, the lists `train.txt` and
    /// `val.txt` (`folder num_frames label`), and `classes.txt`. A set that is already there is left
    /// alone; one that was left half made, or made from other parameters, is made again.
    ///
    /// # Errors
    /// [`exit::CANNOT_WRITE`] when a file cannot be written or `out` holds something else,
    /// [`exit::USAGE`] for parameters out of range.
    pub fn make(&self, out: &Path) -> Result<Made> {
        self.validate()?;
        if self.is_complete(out) {
            return Ok(Made::AlreadyThere);
        }
        let cannot_write = || {
            Coded::new(
                exit::CANNOT_WRITE,
                format!("cannot make the demo set in {}", out.display()),
            )
        };
        clear(out)?;
        self.write_manifest(out, false).with_context(cannot_write)?;
        self.write_clips(out).with_context(cannot_write)?;
        for split in [Split::Train, Split::Val] {
            fs_err::write(out.join(format!("{}.txt", split.name())), self.list(split))
                .with_context(cannot_write)?;
        }
        fs_err::write(out.join("classes.txt"), CLASSES.join("\n") + "\n")
            .with_context(cannot_write)?;
        self.write_manifest(out, true).with_context(cannot_write)?;
        Ok(Made::New)
    }

    fn validate(&self) -> Result<()> {
        let bad = |text: String| Err(Coded::new(exit::USAGE, text).into());
        match self {
            d if d.train == 0 || d.val == 0 => bad(format!(
                "--train {} --val {}: both need a clip",
                d.train, d.val
            )),
            d if !(16..=1024).contains(&d.size) => {
                bad(format!("--size {} is outside 16 to 1024", d.size))
            }
            d if !(2..=1000).contains(&d.frames) => {
                bad(format!("--frames {} is outside 2 to 1000", d.frames))
            }
            _ => Ok(()),
        }
    }

    fn clips(&self) -> impl Iterator<Item = (Split, usize)> {
        let train = (0..self.train).map(|i| (Split::Train, i));
        train.chain((0..self.val).map(|i| (Split::Val, i)))
    }

    fn folder(&self, split: Split, index: usize) -> String {
        format!(
            "{}/{}_{index:05}",
            CLASSES[index % CLASSES.len()],
            split.name()
        )
    }

    fn list(&self, split: Split) -> String {
        let count = match split {
            Split::Train => self.train,
            Split::Val => self.val,
        };
        (0..count).fold(String::new(), |mut list, i| {
            writeln!(
                list,
                "{} {} {}",
                self.folder(split, i),
                self.frames,
                i % CLASSES.len()
            )
            .expect("writes to memory");
            list
        })
    }

    /// The manifest is written last, so it alone would do; the files are looked at because they may
    /// have been deleted since.
    fn is_complete(&self, out: &Path) -> bool {
        let manifest = read_manifest(out);
        manifest.is_some_and(|m| m.complete && m.version == VERSION && m.demo == *self)
            && [Split::Train, Split::Val].iter().all(|&split| {
                fs_err::read_to_string(out.join(format!("{}.txt", split.name())))
                    .is_ok_and(|l| l == self.list(split))
            })
            && self.clips().all(|(split, i)| {
                let last = out
                    .join(self.folder(split, i))
                    .join(frame_name(self.frames - 1));
                fs_err::metadata(last).is_ok_and(|m| m.len() > 0)
            })
    }

    fn write_manifest(&self, out: &Path, complete: bool) -> Result<()> {
        fs_err::create_dir_all(out)?;
        let manifest = Manifest {
            version: VERSION,
            complete,
            demo: self.clone(),
        };
        let text = serde_json::to_string_pretty(&manifest).expect("plain fields") + "\n";
        let (partial, path) = (out.join("manifest.json.partial"), out.join(MANIFEST));
        fs_err::write(&partial, text)?;
        Ok(fs_err::rename(partial, path)?)
    }

    fn write_clips(&self, out: &Path) -> Result<()> {
        let clips: Vec<(Split, usize)> = self.clips().collect();
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            let mut writer = ClipWriter::new(self)?;
            while let Some(&(split, index)) = clips.get(next.fetch_add(1, Ordering::Relaxed)) {
                let written = writer.write(
                    &out.join(self.folder(split, index)),
                    &Clip::draw(self, split, index),
                );
                if written.is_err() {
                    next.store(clips.len(), Ordering::Relaxed);
                    return written;
                }
            }
            Ok(())
        };
        let threads = std::thread::available_parallelism()
            .map_or(1, |n| n.get())
            .min(8);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .try_for_each(|w| w.join().expect("a worker reports errors"))
        })
    }
}

fn read_manifest(out: &Path) -> Option<Manifest> {
    serde_json::from_str(&fs_err::read_to_string(out.join(MANIFEST)).ok()?).ok()
}

/// Removes what an earlier call left in `out`, and refuses a folder that is not ours.
fn clear(out: &Path) -> Result<()> {
    let is_ours = out.join(MANIFEST).exists();
    let mut entries = match fs_err::read_dir(out) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => {
            return Err(anyhow::Error::new(e)
                .context(Coded::new(exit::CANNOT_WRITE, "cannot look into --out")));
        }
    };
    if !is_ours && entries.next().is_some() {
        let text = format!(
            "{} holds files that are no demo set; choose another --out",
            out.display()
        );
        return Err(Coded::new(exit::CANNOT_WRITE, text).into());
    }
    for class in CLASSES {
        match fs_err::remove_dir_all(out.join(class)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                let text = "cannot remove the earlier demo set";
                return Err(anyhow::Error::new(e).context(Coded::new(exit::CANNOT_WRITE, text)));
            }
            _ => {}
        }
    }
    Ok(())
}

fn frame_name(t: usize) -> PathBuf {
    format!("img_{:05}.jpg", t + 1).into()
}

/// Renders and writes clips, with its buffers kept.
struct ClipWriter {
    size: usize,
    jpeg: turbojpeg::Compressor,
    grey: Vec<f64>,
    rgb: Vec<u8>,
}

impl ClipWriter {
    fn new(demo: &Demo) -> Result<ClipWriter> {
        let mut jpeg = turbojpeg::Compressor::new().context("cannot start the JPEG encoder")?;
        jpeg.set_quality(JPEG_QUALITY)
            .context("cannot set the JPEG quality")?;
        jpeg.set_subsamp(turbojpeg::Subsamp::Sub2x2)
            .context("cannot set the JPEG subsampling")?;
        Ok(ClipWriter {
            size: demo.size,
            jpeg,
            grey: Vec::new(),
            rgb: Vec::new(),
        })
    }

    fn write(&mut self, folder: &Path, clip: &Clip) -> Result<()> {
        fs_err::create_dir_all(folder)?;
        for t in 0..clip.poses.len() {
            let file = self.encode(clip, t)?;
            fs_err::write(folder.join(frame_name(t)), file)?;
        }
        Ok(())
    }

    fn encode(&mut self, clip: &Clip, t: usize) -> Result<Vec<u8>> {
        clip.render(t, self.size, &mut self.grey);
        clip.shade(t, &self.grey, &mut self.rgb);
        let image = turbojpeg::Image {
            pixels: self.rgb.as_slice(),
            width: self.size,
            pitch: self.size * 3,
            height: self.size,
            format: turbojpeg::PixelFormat::RGB,
        };
        self.jpeg
            .compress_to_vec(image)
            .with_context(|| format!("cannot encode a frame of {}", CLASSES[clip.label]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: Demo = Demo {
        train: 16,
        val: 8,
        size: 32,
        frames: 6,
        seed: 3,
    };

    #[test]
    fn lists_agree_with_the_files_and_a_second_call_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("demo");
        assert_eq!(DEMO.make(&out).unwrap(), Made::New);
        let mut decoder = crate::decode::Decoder::new();
        let mut frame = crate::decode::Frame::default();
        let mut clips = 0;
        for list in ["train.txt", "val.txt"] {
            for line in fs_err::read_to_string(out.join(list)).unwrap().lines() {
                let [folder, frames, label] = line.split(' ').collect::<Vec<_>>()[..] else {
                    panic!("{line}")
                };
                assert!(
                    folder.starts_with(&format!("{}/", CLASSES[label.parse::<usize>().unwrap()]))
                );
                let files = fs_err::read_dir(out.join(folder)).unwrap().count();
                assert_eq!(files.to_string(), frames);
                decoder
                    .image(&out.join(folder).join("img_00006.jpg"), &mut frame)
                    .unwrap();
                assert_eq!((frame.width, frame.height), (32, 32));
                clips += 1;
            }
        }
        assert_eq!(clips, 24);
        let first = fs_err::read(out.join("left/train_00000/img_00001.jpg")).unwrap();
        assert_eq!(DEMO.make(&out).unwrap(), Made::AlreadyThere);
        fs_err::remove_file(out.join("down/val_00003/img_00006.jpg")).unwrap();
        assert_eq!(DEMO.make(&out).unwrap(), Made::New);
        assert_eq!(
            fs_err::read(out.join("left/train_00000/img_00001.jpg")).unwrap(),
            first
        );
    }

    #[test]
    fn a_half_made_set_is_made_again_and_other_folders_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        DEMO.write_manifest(dir.path(), false).unwrap();
        fs_err::create_dir_all(dir.path().join("left/train_99999")).unwrap();
        assert_eq!(DEMO.make(dir.path()).unwrap(), Made::New);
        assert!(!dir.path().join("left/train_99999").exists());

        let other = tempfile::tempdir().unwrap();
        fs_err::write(other.path().join("thesis.txt"), "years of work").unwrap();
        let error = DEMO.make(other.path()).unwrap_err();
        assert_eq!(exit::code_of(&error), exit::CANNOT_WRITE);
        assert!(other.path().join("thesis.txt").exists());
    }

    #[test]
    fn a_disk_error_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs_err::write(&file, "").unwrap();
        let error = DEMO.make(&file.join("demo")).unwrap_err();
        assert_eq!(exit::code_of(&error), exit::CANNOT_WRITE);
        assert!(format!("{error:#}").contains("file/demo"), "{error:#}");
    }
}
