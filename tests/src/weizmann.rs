//! The Weizmann actions (Gorelick et al., "Actions as Space-Time Shapes", 2007) as silhouettes:
//! 93 clips, 10 actions, 9 subjects. Research use; never part of this repository.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;

const WIDTH: usize = 96;
const HEIGHT: usize = 120;
const FRAME_BYTES: usize = HEIGHT * WIDTH / 8;

/// Subjects whose clips are held back from training.
pub const UNSEEN: [&str; 3] = ["ido", "ira", "shahar"];

struct Clip {
    name: String,
    action: String,
    subject: String,
    frames: usize,
    offset: usize,
}

/// Writes every clip below `out` as PNG frames, with `train.txt`, `val.txt` (rawframes lists; the
/// subjects of [`UNSEEN`] validate) and `classes.txt`. Returns the numbers of clips in both lists.
pub fn write_frames(motion: &Path, out: &Path) -> Result<(usize, usize)> {
    let clips = index(&motion.join("weizmann_index.tsv"))?;
    let mut bits = Vec::new();
    flate2::read::GzDecoder::new(fs_err::File::open(motion.join("weizmann_frames.u1.gz"))?)
        .read_to_end(&mut bits)?;
    let actions: Vec<&str> = clips
        .iter()
        .map(|c| c.action.as_str())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let (mut train, mut val) = (String::new(), String::new());
    let mut counts = (0, 0);
    for clip in &clips {
        let folder = out.join(&clip.name);
        fs_err::create_dir_all(&folder)?;
        for f in 0..clip.frames {
            let start = clip.offset + f * FRAME_BYTES;
            let frame = bits
                .get(start..start + FRAME_BYTES)
                .with_context(|| format!("{} ends before frame {f}", clip.name))?;
            write_png(&folder.join(format!("img_{:05}.png", f + 1)), frame)?;
        }
        let label = actions
            .iter()
            .position(|a| *a == clip.action)
            .context("an action without a label")?;
        let unseen = UNSEEN.contains(&clip.subject.as_str());
        let (list, count) = if unseen {
            (&mut val, &mut counts.1)
        } else {
            (&mut train, &mut counts.0)
        };
        writeln!(list, "{} {} {label}", clip.name, clip.frames)?;
        *count += 1;
    }
    fs_err::write(out.join("train.txt"), train)?;
    fs_err::write(out.join("val.txt"), val)?;
    fs_err::write(out.join("classes.txt"), actions.join("\n") + "\n")?;
    Ok(counts)
}

fn index(file: &Path) -> Result<Vec<Clip>> {
    let text = fs_err::read_to_string(file)?;
    text.lines()
        .skip(1)
        .map(|line| {
            let field: Vec<&str> = line.split('\t').collect();
            ensure!(
                field.len() == 5,
                "{}: not five fields: {line}",
                file.display()
            );
            Ok(Clip {
                name: field[0].into(),
                action: field[1].into(),
                subject: field[2].into(),
                frames: field[3].parse()?,
                offset: field[4].parse()?,
            })
        })
        .collect()
}

/// One bit a pixel, most significant first, as an 8-bit grey PNG.
fn write_png(path: &Path, bits: &[u8]) -> Result<()> {
    let grey: Vec<u8> = bits
        .iter()
        .flat_map(|byte| {
            (0..8)
                .rev()
                .map(move |i| if byte >> i & 1 == 1 { 255 } else { 0 })
        })
        .collect();
    let file = std::io::BufWriter::new(fs_err::File::create(path)?);
    let mut encoder = png::Encoder::new(file, WIDTH as u32, HEIGHT as u32);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(&grey)?;
    Ok(())
}
