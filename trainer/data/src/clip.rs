//! One sample: sampled, decoded and drawn into `[clips * T, size, size, 3]` bytes.

use crate::augment::{self, Renderer, Rules, View};
use crate::decode::{Decoder, Frame};
use crate::list::{Entry, FrameTemplate, SampleList, Split, load_class_names};
use crate::order::SplitMix64;
use crate::sample::{self, Mode};
use anyhow::Result;
use tsm_job::Config;
use tsm_job::config::{DataFormat, Sampler, TrainAug, ValAug};

/// What does not change between the epochs of a split: the list and how it is read.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub list: SampleList,
    /// Empty when the job names no file of class names.
    pub class_names: Vec<String>,
    /// Label of a mirrored clip for each label.
    pub flip_labels: Vec<u32>,
    source: Source,
}

/// Where an entry's frames are.
#[derive(Clone, Debug)]
enum Source {
    /// One picture a frame; the first has number `start_index`.
    Folders {
        template: FrameTemplate,
        start_index: u32,
    },
    Videos,
}

impl Dataset {
    /// Reads and checks the list and the class names of a split.
    ///
    /// # Errors
    /// As [`SampleList::load`], [`load_class_names`], [`FrameTemplate::parse`] and
    /// [`augment::flip_label_map`].
    pub fn open(config: &Config, split: Split) -> Result<Dataset> {
        let data = &config.data;
        let class_names = match &data.class_names {
            Some(file) => load_class_names(file, config.model.num_classes)?,
            None => Vec::new(),
        };
        Ok(Dataset {
            list: SampleList::of_config(config, split)?,
            flip_labels: augment::flip_label_map(config, &class_names)?,
            class_names,
            source: match data.format {
                DataFormat::Rawframes => Source::Folders {
                    template: FrameTemplate::parse(&data.frame_template)?,
                    start_index: data.start_index,
                },
                DataFormat::Video => Source::Videos,
            },
        })
    }

    /// Samples of the list.
    pub fn len(&self) -> u64 {
        self.list.entries.len() as u64
    }

    /// Never true of a list that was read without error.
    pub fn is_empty(&self) -> bool {
        self.list.entries.is_empty()
    }
}

/// How a clip's rectangle is chosen.
#[derive(Clone, Debug)]
pub enum Crop {
    Train(TrainAug),
    Val(ValAug),
}

/// How a sample becomes bytes.
#[derive(Clone, Debug)]
pub struct ClipSpec {
    pub sampler: Sampler,
    pub mode: Mode,
    /// T, frames of a clip.
    pub num_segments: usize,
    pub crop: Crop,
    pub seed: u64,
    /// Part of every sample's random stream.
    pub epoch: u64,
}

impl ClipSpec {
    /// Clips of a sample, 1 in training; see [`sample::num_clips`].
    pub fn num_clips(&self) -> usize {
        sample::num_clips(self.sampler, self.mode)
    }

    /// Side of the square, in pixels.
    pub fn size(&self) -> u32 {
        match &self.crop {
            Crop::Train(aug) => aug.size,
            Crop::Val(aug) => aug.size,
        }
    }

    /// Bytes of a sample: `[num_clips * T, size, size, 3]`.
    pub fn sample_bytes(&self) -> usize {
        self.num_clips() * self.num_segments * self.frame_bytes()
    }

    fn frame_bytes(&self) -> usize {
        self.size() as usize * self.size() as usize * 3
    }
}

/// Reads samples on one thread; keeps its decoder and buffers between them.
pub struct ClipReader {
    decoder: Decoder,
    renderer: Renderer,
    rules: Rules,
    frames: Vec<Frame>,
}

impl ClipReader {
    pub fn new(sampler: Sampler) -> Self {
        let rules = Rules::from(sampler);
        ClipReader {
            decoder: Decoder::new(),
            renderer: Renderer::new(rules),
            rules,
            frames: Vec::new(),
        }
    }

    /// Fills `out` with sample `index` and returns its label. The same arguments give the same
    /// bytes on any thread.
    ///
    /// All frames of a sample must have the size of its first: the crop is chosen from it.
    ///
    /// # Errors
    /// What is wrong with which file.
    ///
    /// # Panics
    /// If `index` is not in the list or `out` has not `spec.sample_bytes()`.
    pub fn read(
        &mut self,
        dataset: &Dataset,
        spec: &ClipSpec,
        index: u64,
        out: &mut [u8],
    ) -> Result<u32, String> {
        assert_eq!(out.len(), spec.sample_bytes(), "bytes of a sample");
        let entry = &dataset.list.entries[index as usize];
        let mut rng = SplitMix64::for_sample(spec.seed, spec.epoch, index);
        let flipped = match &dataset.source {
            Source::Folders {
                template,
                start_index,
            } => {
                let file = |frame| template.name(u64::from(*start_index) + frame);
                self.read_folder(entry, file, spec, &mut rng, out)?
            }
            Source::Videos => self.read_video(entry, spec, &mut rng, out)?,
        };
        let label = entry.label;
        Ok(if flipped {
            dataset.flip_labels[label as usize]
        } else {
            label
        })
    }

    fn read_folder(
        &mut self,
        entry: &Entry,
        file: impl Fn(u64) -> String,
        spec: &ClipSpec,
        rng: &mut SplitMix64,
        out: &mut [u8],
    ) -> Result<bool, String> {
        let wanted = sample::sample(
            spec.sampler,
            spec.mode,
            entry.num_frames,
            spec.num_segments,
            rng,
        );
        let mut frame = self.frames.pop().unwrap_or_default();
        let mut clip = Clip::default();
        let bytes = spec.frame_bytes();
        for (i, &number) in wanted.iter().enumerate() {
            // Short videos repeat frames.
            if i > 0 && wanted[i - 1] == number {
                out.copy_within((i - 1) * bytes..i * bytes, i * bytes);
                continue;
            }
            let path = entry.path.join(file(number));
            self.decoder
                .image(&path, &mut frame)
                .map_err(|e| e.to_string())?;
            let view = clip
                .view(&frame, || self.choose(spec, &frame, rng))
                .map_err(|reason| format!("{}: {reason}", path.display()))?;
            let target = &mut out[i * bytes..(i + 1) * bytes];
            self.renderer
                .render(&frame.rgb, frame.width, frame.height, &view, target);
        }
        self.frames.push(frame);
        Ok(clip.flipped())
    }

    fn read_video(
        &mut self,
        entry: &Entry,
        spec: &ClipSpec,
        rng: &mut SplitMix64,
        out: &mut [u8],
    ) -> Result<bool, String> {
        let place = entry.path.display();
        let mut video = self
            .decoder
            .open_video(&entry.path)
            .map_err(|e| e.to_string())?;
        let num_frames = video.num_frames();
        if num_frames == 0 {
            return Err(format!("{place}: the video has no frame"));
        }
        let wanted = sample::sample(spec.sampler, spec.mode, num_frames, spec.num_segments, rng);
        video
            .frames(&wanted, &mut self.frames)
            .map_err(|e| e.to_string())?;
        drop(video);
        let mut clip = Clip::default();
        let targets = out.chunks_exact_mut(spec.frame_bytes());
        for ((frame, target), number) in self.frames.iter().zip(targets).zip(&wanted) {
            let view = clip
                .view(frame, || self.choose(spec, frame, rng))
                .map_err(|reason| format!("{place}: frame {number}: {reason}"))?;
            self.renderer
                .render(&frame.rgb, frame.width, frame.height, &view, target);
        }
        Ok(clip.flipped())
    }

    fn choose(&self, spec: &ClipSpec, first: &Frame, rng: &mut SplitMix64) -> Result<View, String> {
        match &spec.crop {
            Crop::Train(aug) => {
                augment::train_view(self.rules, aug, first.width, first.height, rng)
            }
            Crop::Val(aug) => augment::val_view(self.rules, aug, first.width, first.height),
        }
    }
}

/// The view of a sample, chosen from its first frame.
#[derive(Default)]
struct Clip {
    chosen: Option<(u32, u32, View)>,
}

impl Clip {
    fn view(
        &mut self,
        frame: &Frame,
        choose: impl FnOnce() -> Result<View, String>,
    ) -> Result<View, String> {
        match self.chosen {
            Some((width, height, view)) if (width, height) == (frame.width, frame.height) => {
                Ok(view)
            }
            Some((width, height, _)) => Err(format!(
                "is {}x{}, the clip's first frame is {width}x{height}; frames of a video must \
                 have one size",
                frame.width, frame.height
            )),
            None => {
                let view = choose()?;
                self.chosen = Some((frame.width, frame.height, view));
                Ok(view)
            }
        }
    }

    fn flipped(&self) -> bool {
        self.chosen.is_some_and(|(_, _, view)| view.flip)
    }
}
