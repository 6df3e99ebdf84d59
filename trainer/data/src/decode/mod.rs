//! Pictures and video frames from files, as rows of interleaved RGB bytes.

mod image;
mod object;
mod video;

use std::path::{Path, PathBuf};

pub use video::Video;

/// One decoded picture: `height` rows of `width` RGB triples, no padding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frame {
    pub width: u32,
    pub height: u32,
    pub rgb: Vec<u8>,
}

impl Frame {
    /// Gives the frame a size and the bytes it needs; their content is left to the caller.
    fn reshape(&mut self, width: u32, height: u32) {
        self.width = width;
        self.height = height;
        self.rgb.resize(width as usize * height as usize * 3, 0);
    }
}

/// Why a file gave no frames.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("{} does not exist; check data.root and the list that names it", path.display())]
    Missing { path: PathBuf },
    /// The file is damaged, cut short or not what its name says. `frame` is the 0-based frame it
    /// happened at, where that is known.
    #[error("cannot decode {}{}: {reason}; replace the file or take it off the list", path.display(), place(frame))]
    Broken {
        path: PathBuf,
        reason: String,
        frame: Option<u64>,
    },
    #[error("cannot decode {}: {reason}", path.display())]
    Unsupported { path: PathBuf, reason: String },
    #[error("no video support: {reason}")]
    NoVideoSupport { reason: String },
}

fn place(frame: &Option<u64>) -> String {
    frame.map_or(String::new(), |k| format!(", frame {k}"))
}

impl DecodeError {
    fn broken(path: &Path, reason: impl Into<String>) -> DecodeError {
        DecodeError::Broken {
            path: path.to_owned(),
            reason: reason.into(),
            frame: None,
        }
    }

    fn unsupported(path: &Path, reason: impl Into<String>) -> DecodeError {
        DecodeError::Unsupported {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    fn from_io(path: &Path, error: &std::io::Error) -> DecodeError {
        match error.kind() {
            std::io::ErrorKind::NotFound => DecodeError::Missing {
                path: path.to_owned(),
            },
            _ => DecodeError::broken(path, format!("cannot read it: {error}")),
        }
    }
}

/// Decoders and buffers that serve one file after another; each thread has its own.
#[derive(Default)]
pub struct Decoder {
    image: image::ImageDecoder,
    video: Option<object::Handle>,
}

impl Decoder {
    /// Costs nothing: what a kind of file needs is made when the first such file comes.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Decodes a JPEG or PNG, told apart by content, into `out`, whose buffer is reused.
    ///
    /// Grey, palette and 16-bit pictures become 8-bit RGB; transparency is dropped. An EXIF
    /// orientation is not applied.
    pub fn image(&mut self, path: &Path, out: &mut Frame) -> Result<(), DecodeError> {
        self.image.decode(path, out)
    }

    /// Opens a video: reads the compressed stream of the file once and finds its frames.
    pub fn open_video(&mut self, path: &Path) -> Result<Video<'_>, DecodeError> {
        let handle = match &mut self.video {
            Some(handle) => handle,
            empty => empty.insert(object::Handle::new()?),
        };
        Video::open(handle, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_can_be_made_here_and_used_in_another_thread() {
        fn moves<T: Send>(value: T) -> T {
            value
        }
        moves(Decoder::new());
    }

    #[test]
    fn errors_name_the_path_the_frame_and_what_to_do() {
        let path = PathBuf::from("clips/a.mp4");
        let reason = "damaged".to_owned();
        let broken = DecodeError::Broken {
            path,
            reason,
            frame: Some(7),
        };
        let text =
            "cannot decode clips/a.mp4, frame 7: damaged; replace the file or take it off the list";
        assert_eq!(broken.to_string(), text);
    }
}
