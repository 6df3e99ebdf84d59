//! The command line of `tsm-data`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use tsm_job::exit::{self, Coded};

use crate::decode::{DecodeError, Decoder, Frame};
use crate::demo::{Demo, Made};

#[derive(Parser)]
#[command(name = "tsm-data", version, about = "Make and look at training data.")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a synthetic motion set of JPEG frames to try training with.
    Demo(DemoArgs),
    /// Print the frames, size and codec of videos and pictures.
    Probe {
        /// The files to look at.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

#[derive(Args)]
struct DemoArgs {
    /// Folder to make the set in.
    #[arg(long, default_value = "data/demo")]
    out: PathBuf,
    /// Number of training clips.
    #[arg(long, default_value_t = 1200)]
    train: usize,
    /// Number of validation clips.
    #[arg(long, default_value_t = 240)]
    val: usize,
    /// Width and height of a frame in pixels.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Frames per clip.
    #[arg(long, default_value_t = 8)]
    frames: usize,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Runs the command that was given.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Demo(args) => demo(args),
        Command::Probe { files } => probe(&files),
    }
}

fn demo(args: DemoArgs) -> Result<()> {
    let DemoArgs {
        out,
        train,
        val,
        size,
        frames,
        seed,
    } = args;
    let made = Demo {
        train,
        val,
        size,
        frames,
        seed,
    }
    .make(&out)?;
    let what = match made {
        Made::New => "made",
        Made::AlreadyThere => "found",
    };
    say(&format!(
        "{what} {train} + {val} clips of {frames} frames, {size} x {size} pixels, in {}",
        out.display()
    ))
}

/// Tells about every file, then fails if any was broken.
fn probe(files: &[PathBuf]) -> Result<()> {
    let mut decoder = Decoder::new();
    let mut broken = 0;
    for path in files {
        match describe(&mut decoder, path) {
            Ok(text) => say(&format!("{}: {text}", path.display()))?,
            Err(error @ DecodeError::NoVideoSupport { .. }) => {
                return Err(Coded::new(exit::PREFLIGHT, error.to_string()).into());
            }
            Err(error) => {
                broken += 1;
                eprintln!("error: {error}");
            }
        }
    }
    match broken {
        0 => Ok(()),
        _ => Err(Coded::new(
            exit::DATA,
            format!("{broken} of {} files cannot be used", files.len()),
        )
        .into()),
    }
}

fn describe(decoder: &mut Decoder, path: &Path) -> Result<String, DecodeError> {
    let mut frame = Frame::default();
    match decoder.image(path, &mut frame) {
        Ok(()) => return Ok(format!("picture, {} x {}", frame.width, frame.height)),
        Err(DecodeError::Unsupported { reason, .. }) if reason.contains("neither JPEG nor PNG") => {
        }
        Err(error) => return Err(error),
    }
    let mut video = decoder.open_video(path)?;
    let ((width, height), count) = (video.size(), video.num_frames());
    video.frames(&[0, count - 1], &mut Vec::new())?;
    Ok(format!(
        "{}, {count} frames, {width} x {height}",
        video.codec()
    ))
}

fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot write to standard output")
}
