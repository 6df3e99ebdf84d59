//! Against the real clips beside the repository, and clips made by the ffmpeg command.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::Decoder;
use super::*;

/// The folder of shared files: `TSM_SHARED`, or `../shared` beside the repository.
fn shared(below: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let path = std::env::var_os("TSM_SHARED")
        .map_or_else(beside, PathBuf::from)
        .join(below);
    if !path.exists() {
        eprintln!("skipped: {} does not exist", path.display());
        return None;
    }
    Some(path)
}

fn clips() -> Vec<PathBuf> {
    let Some(folder) = shared("videos") else {
        return Vec::new();
    };
    let mut clips: Vec<PathBuf> = fs_err::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    clips.retain(|p| p.extension().is_some_and(|e| e != "csv"));
    clips.sort();
    clips
}

/// Every frame, decoded one after the other without skipping or jumping, and counted.
fn sequential(video: &mut Video) -> Vec<Frame> {
    let count = video.decode(&[], &mut Vec::new(), true).unwrap() as u64;
    let mut frames = Vec::new();
    let all: Vec<u64> = (0..count).collect();
    video.decode(&all, &mut frames, true).unwrap();
    frames
}

/// Frames by index equal those of a sequential decode, bit for bit, however they are asked for.
fn assert_exact(path: &Path) {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let mut decoder = Decoder::new();
    let mut video = decoder.open_video(path).unwrap();
    let reference = sequential(&mut video);
    let count = video.num_frames();
    assert_eq!(count, reference.len() as u64, "{name}: number of frames");
    let last = count - 1;
    let centres: Vec<u64> = (0..8).map(|t| (2 * t + 1) * count / 16).collect();
    let mixed = vec![last, 0, count / 2, 1.min(last), count / 2, count / 3, last];
    let late = vec![last - last / 8, last];
    let mut asked = vec![
        vec![0],
        vec![1.min(last)],
        vec![count / 2],
        vec![last],
        centres,
        mixed,
        late,
    ];
    asked.extend((0..count).step_by(53).map(|k| vec![k]));
    asked.push((0..count).rev().collect());
    let mut out = Vec::new();
    for indices in asked {
        video
            .frames(&indices, &mut out)
            .unwrap_or_else(|e| panic!("{name} {indices:?}: {e}"));
        assert_eq!(out.len(), indices.len());
        for (frame, &k) in out.iter().zip(&indices) {
            assert!(
                *frame == reference[k as usize],
                "{name}: frame {k} of {indices:?} differs"
            );
        }
    }
}

#[test]
fn frames_by_index_equal_a_sequential_decode() {
    for path in clips() {
        assert_exact(&path);
    }
}

fn ffmpeg(args: &[&str]) -> Option<Vec<u8>> {
    match Command::new("ffmpeg")
        .args(["-v", "error", "-nostdin", "-y"])
        .args(args)
        .output()
    {
        Ok(o) if o.status.success() => Some(o.stdout),
        Ok(o) => {
            eprintln!(
                "skipped: ffmpeg {args:?}: {}",
                String::from_utf8_lossy(&o.stderr)
            );
            None
        }
        Err(e) => {
            eprintln!("skipped: no ffmpeg command: {e}");
            None
        }
    }
}

/// Containers, codecs and structures that the real clips lack.
#[test]
fn made_clips_are_exact_too() {
    let dir = tempfile::tempdir().unwrap();
    let clips: [(&str, &[&str]); 12] = [
        (
            "open_gop.mkv",
            &[
                "-c:v",
                "libx264",
                "-x264-params",
                "open-gop=1:keyint=20:bframes=4:b-pyramid=normal",
            ],
        ),
        ("intra.mp4", &["-c:v", "libx264", "-g", "1"]),
        (
            "short_gop.avi",
            &["-c:v", "libx264", "-g", "12", "-bf", "2"],
        ),
        (
            "alt_ref.webm",
            &[
                "-c:v",
                "libvpx-vp9",
                "-g",
                "30",
                "-auto-alt-ref",
                "1",
                "-lag-in-frames",
                "16",
                "-b:v",
                "60k",
            ],
        ),
        (
            "alt_ref8.webm",
            &[
                "-c:v",
                "libvpx",
                "-g",
                "30",
                "-auto-alt-ref",
                "1",
                "-lag-in-frames",
                "16",
                "-b:v",
                "60k",
            ],
        ),
        ("b_frames.avi", &["-c:v", "mpeg4", "-g", "15", "-bf", "2"]),
        ("b_frames.mp4", &["-c:v", "mpeg4", "-g", "15", "-bf", "2"]),
        ("xvid.avi", &["-c:v", "libxvid", "-g", "12"]),
        (
            "packed.avi",
            &["-c:v", "libxvid", "-g", "12", "-bf", "2", "-vtag", "DIVX"],
        ),
        ("motion.avi", &["-c:v", "mjpeg", "-q:v", "3"]),
        ("stream.ts", &["-c:v", "libx264", "-g", "20", "-bf", "2"]),
        (
            "vfr.mp4",
            &[
                "-vf",
                "select=not(mod(n\\,7)*mod(n\\,5))",
                "-vsync",
                "vfr",
                "-c:v",
                "libx264",
                "-bf",
                "2",
            ],
        ),
    ];
    for (name, codec) in clips {
        let path = dir.path().join(name);
        let source = [
            "-f",
            "lavfi",
            "-i",
            "testsrc2=size=98x66:rate=25:duration=3.6",
            "-pix_fmt",
            "yuv420p",
        ];
        let path_arg = path.to_str().unwrap();
        if ffmpeg(&[&source[..], codec, &[path_arg]].concat()).is_some() {
            assert_exact(&path);
        }
    }
}

/// A cut without re-encoding leaves an edit list: frames before its start are decoded, not shown.
#[test]
fn an_edit_list_hides_the_frames_before_it() {
    let Some(source) = shared("videos/mma_demo.mp4") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("part.mp4");
    let (from, to) = (source.to_str().unwrap(), path.to_str().unwrap());
    if ffmpeg(&[
        "-ss", "2.35", "-i", from, "-t", "3", "-c", "copy", "-an", to,
    ])
    .is_some()
    {
        assert_exact(&path);
    }
}

/// FFmpeg's own command, with the same conversion flags, gives the same picture.
#[test]
fn colours_agree_with_the_ffmpeg_command() {
    let dir = tempfile::tempdir().unwrap();
    let tagged = dir.path().join("bt709_full.mp4");
    let mut clips = clips();
    clips.retain(|p| {
        ["SOX5yA1l24A.mp4", "ibm_basketball.mp4", "gulpio_test.webm"]
            .iter()
            .any(|n| p.ends_with(n))
    });
    let source =
        "testsrc2=size=96x64:rate=10:duration=1,scale=out_color_matrix=bt709:out_range=full";
    let tags = [
        "-pix_fmt",
        "yuv420p",
        "-colorspace",
        "bt709",
        "-color_range",
        "pc",
        "-c:v",
        "libx264",
    ];
    let made = ffmpeg(
        &[
            &["-f", "lavfi", "-i", source][..],
            &tags,
            &[tagged.to_str().unwrap()],
        ]
        .concat(),
    );
    clips.extend(made.map(|_| tagged));
    for path in clips {
        let flags = "bilinear+accurate_rnd+full_chroma_int+bitexact";
        let filter = format!("scale=flags={flags},format=rgb24");
        let raw = [
            "-frames:v",
            "3",
            "-vf",
            &filter,
            "-vsync",
            "passthrough",
            "-f",
            "rawvideo",
            "-",
        ];
        let Some(theirs) = ffmpeg(&[&["-i", path.to_str().unwrap()][..], &raw].concat()) else {
            return;
        };
        let mut ours = Vec::new();
        Decoder::new()
            .open_video(&path)
            .unwrap()
            .frames(&[0, 1, 2], &mut ours)
            .unwrap();
        let ours: Vec<u8> = ours.into_iter().flat_map(|f| f.rgb).collect();
        assert_eq!(ours.len(), theirs.len(), "{}", path.display());
        let worst = ours.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max();
        // Their filter may be a release apart from the library, where it rounds otherwise.
        assert!(
            worst <= Some(2),
            "{}: pixels differ by {worst:?}",
            path.display()
        );
    }
}

#[test]
fn a_clip_cut_short_fails_late_and_not_early() {
    let dir = tempfile::tempdir().unwrap();
    for path in clips() {
        let bytes = fs_err::read(&path).unwrap();
        let cut = dir.path().join(path.file_name().unwrap());
        fs_err::write(&cut, &bytes[..bytes.len() * 2 / 5]).unwrap();
        let mut decoder = Decoder::new();
        let whole = decoder.open_video(&path).unwrap().num_frames();
        let mut video = match decoder.open_video(&cut) {
            Ok(video) => video,
            // An MP4 with its index at the end has lost everything.
            Err(e) => {
                assert!(
                    matches!(&e, DecodeError::Broken { .. }) && e.to_string().contains("moov"),
                    "{e}"
                );
                continue;
            }
        };
        let promised = video.num_frames();
        assert!(
            promised.abs_diff(whole) <= 2,
            "{}: {promised} of {whole}",
            cut.display()
        );
        let mut out = Vec::new();
        video.frames(&[0, 5], &mut out).unwrap();
        let error = video.frames(&[0, promised - 1], &mut out).unwrap_err();
        assert!(
            matches!(&error, DecodeError::Broken { frame: Some(k), .. } if *k == promised - 1),
            "{error}"
        );
        assert!(error.to_string().contains("cut short"), "{error}");
    }
}

#[test]
fn damage_inside_a_clip_is_found_at_its_frame() {
    let Some(path) = shared("videos/mma_demo.mp4") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = fs_err::read(&path).unwrap();
    let damaged = dir.path().join("damaged.mp4");
    let middle = bytes.len() / 2;
    bytes[middle..middle + 30_000].fill(0xa5);
    fs_err::write(&damaged, &bytes).unwrap();
    let mut decoder = Decoder::new();
    let mut video = decoder.open_video(&damaged).unwrap();
    let mut out = Vec::new();
    video.frames(&[3], &mut out).unwrap();
    let all: Vec<u64> = (0..video.num_frames()).collect();
    let bad: Vec<u64> = all
        .into_iter()
        .filter(|&k| video.frames(&[k], &mut out).is_err())
        .collect();
    assert!(!bad.is_empty(), "damage went unseen");
    let error = video.frames(&[bad[0]], &mut out).unwrap_err();
    assert!(
        matches!(error, DecodeError::Broken { frame: Some(k), .. } if k == bad[0]),
        "{error}"
    );
}

#[test]
fn what_is_no_video_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut decoder = Decoder::new();
    let text = dir.path().join("notes.mp4");
    fs_err::write(&text, "no video at all\n".repeat(100)).unwrap();
    let error = decoder.open_video(&text).err().unwrap();
    assert!(
        matches!(&error, DecodeError::Broken { .. }) && error.to_string().contains("notes.mp4"),
        "{error}"
    );
    let error = decoder
        .open_video(&dir.path().join("none.mp4"))
        .err()
        .unwrap();
    assert!(matches!(&error, DecodeError::Missing { .. }), "{error}");
    let sound = dir.path().join("sound.mkv");
    let source = [
        "-f",
        "lavfi",
        "-i",
        "sine=duration=1",
        "-c:a",
        "pcm_s16le",
        sound.to_str().unwrap(),
    ];
    if ffmpeg(&source).is_some() {
        let error = decoder.open_video(&sound).err().unwrap();
        assert!(error.to_string().contains("no video stream"), "{error}");
    }
}

#[test]
fn an_index_past_the_end_is_named() {
    let Some(path) = shared("videos/mma_part0.mp4") else {
        return;
    };
    let mut decoder = Decoder::new();
    let mut video = decoder.open_video(&path).unwrap();
    let error = video
        .frames(&[0, 32], &mut Vec::new())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("frame 32") && error.contains("32 frames"),
        "{error}"
    );
}
