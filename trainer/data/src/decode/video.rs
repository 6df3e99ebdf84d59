//! Frames of a video by index. Only the frames that are asked for, and those they are predicted
//! from, are decoded.

use std::ffi::CStr;
use std::path::{Path, PathBuf};

use super::object::{Failure, Handle, Info};
use super::{DecodeError, Frame};

/// An open video; closed when dropped.
pub struct Video<'a> {
    handle: &'a mut Handle,
    path: PathBuf,
    info: Info,
}

impl Video<'_> {
    pub(super) fn open<'a>(handle: &'a mut Handle, path: &Path) -> Result<Video<'a>, DecodeError> {
        // FFmpeg's own message for a missing file would not tell it from a broken one.
        fs_err::metadata(path).map_err(|e| DecodeError::from_io(path, &e))?;
        match handle.open(path) {
            Ok(info) => Ok(Video {
                handle,
                path: path.to_owned(),
                info,
            }),
            Err(failure) => {
                handle.close();
                Err(error(path, failure, None))
            }
        }
    }

    /// Number of frames the file promises. Where it ends early, the late ones fail to decode.
    pub fn num_frames(&self) -> u64 {
        self.info.frames as u64
    }

    /// Width and height of every frame, in pixels.
    pub fn size(&self) -> (u32, u32) {
        (self.info.width as u32, self.info.height as u32)
    }

    /// FFmpeg's name of the codec, e.g. `h264`.
    pub fn codec(&self) -> String {
        let bytes = self.info.codec.map(|c| c as u8);
        CStr::from_bytes_until_nul(&bytes)
            .map_or(String::new(), |name| name.to_string_lossy().into_owned())
    }

    /// Decodes the frames at `indices` (0-based in presentation order, in any order, repeats
    /// allowed) into `out`, one each; the buffers of frames already in `out` are reused.
    ///
    /// The RGB bytes follow the file's colour matrix and range (BT.601, limited, where it names
    /// none). A picture rotation noted in the file is not applied.
    ///
    /// # Errors
    /// [`DecodeError::Broken`] with the frame where the data are damaged, where the file ends before it,
    /// and for an index not below [`Video::num_frames`]. What is in `out` is then unspecified.
    pub fn frames(&mut self, indices: &[u64], out: &mut Vec<Frame>) -> Result<(), DecodeError> {
        for &index in indices {
            self.check(index)?;
        }
        self.decode(indices, out, false).map(|_| ())
    }

    fn check(&self, index: u64) -> Result<(), DecodeError> {
        let (promised, present) = (self.info.frames as u64, self.info.present as u64);
        let reason = match index {
            k if k < present => return Ok(()),
            k if k < promised => {
                format!("the file is cut short: {present} of {promised} frames are in it")
            }
            _ => format!("the video has {promised} frames, counted from 0; check the list"),
        };
        Err(DecodeError::Broken {
            path: self.path.clone(),
            reason,
            frame: Some(index),
        })
    }

    fn decode(
        &mut self,
        indices: &[u64],
        out: &mut Vec<Frame>,
        plain: bool,
    ) -> Result<i64, DecodeError> {
        let (width, height) = self.size();
        out.resize_with(indices.len(), Frame::default);
        out.iter_mut()
            .for_each(|frame| frame.reshape(width, height));
        let mut order: Vec<usize> = (0..indices.len()).collect();
        order.sort_by_key(|&place| indices[place]);
        let mut slots: Vec<Option<&mut Frame>> = out.iter_mut().map(Some).collect();
        let mut wanted: Vec<i64> = Vec::new();
        let mut buffers: Vec<&mut [u8]> = Vec::new();
        for &place in &order {
            if wanted.last() != Some(&(indices[place] as i64)) {
                wanted.push(indices[place] as i64);
                buffers.push(&mut slots[place].take().expect("each place once").rgb);
            }
        }
        let at = self
            .handle
            .frames(&wanted, &mut buffers, plain)
            .map_err(|failure| {
                let at = failure.at;
                error(&self.path, failure, Some(at as u64))
            })?;
        for pair in order.windows(2) {
            if indices[pair[0]] == indices[pair[1]] {
                let [first, repeat] = out
                    .get_disjoint_mut([pair[0], pair[1]])
                    .expect("two places");
                repeat.rgb.copy_from_slice(&first.rgb);
            }
        }
        Ok(at)
    }
}

impl Drop for Video<'_> {
    fn drop(&mut self) {
        self.handle.close();
    }
}

fn error(path: &Path, failure: Failure, frame: Option<u64>) -> DecodeError {
    match failure.unsupported {
        true => DecodeError::unsupported(path, failure.reason),
        false => DecodeError::Broken {
            path: path.to_owned(),
            reason: failure.reason,
            frame,
        },
    }
}

#[cfg(test)]
#[path = "video_tests.rs"]
mod tests;
