//! What the tests of several modules need: a configuration, and pictures in a folder.

use std::path::{Path, PathBuf};
use tsm_job::Config;

/// A configuration for lists `train.txt` and `val.txt` of 32x32 clips in `root`: T = 2, 4 classes,
/// 4 clips per batch.
pub fn config(root: &Path) -> Config {
    serde_json::from_value(serde_json::json!({
        "run": { "name": "test", "seed": 11 },
        "model": {
            "arch": "resnet18", "num_classes": 4, "num_segments": 2,
            "shift": { "mode": "bi" },
            "head": { "order": "dropout_fc_mean", "dropout": 0.5, "init_std": 0.001 },
            "partial_bn": false,
        },
        "data": {
            "format": "rawframes", "root": root,
            "train_list": root.join("train.txt"), "val_list": root.join("val.txt"),
            "frame_template": "{:03}.png", "sampler": "mit",
            "train": { "crop": { "multi_scale": { "scales": [1.0, 0.875, 0.75, 0.66] } }, "size": 32, "flip": 0.5 },
            "val": { "short_side": 36, "size": 32 },
            "workers": 2, "prefetch": 2,
        },
        "train": { "epochs": 1, "batch_per_rank": 4, "precision": { "mode": "fp32" } },
        "optim": {
            "lr": 0.01, "base_batch": 64, "momentum": 0.9, "weight_decay": 1e-4, "groups": "flat",
            "max_grad_norm": null, "schedule": { "constant": {} },
        },
    }))
    .expect("the configuration of the tests")
}

/// Pixel (x, y) of frame `frame` of video `video`: smooth, and different everywhere it matters.
pub fn pixel(video: u32, frame: u32, x: u32, y: u32) -> [u8; 3] {
    [(video * 16 + frame) as u8, (x * 4) as u8, (y * 4) as u8]
}

/// Writes a PNG of [`pixel`]s.
pub fn write_png(path: &Path, video: u32, frame: u32, width: u32, height: u32) {
    let rgb: Vec<u8> = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| pixel(video, frame, x, y)))
        .collect();
    let file = fs_err::File::create(path).unwrap();
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder
        .write_header()
        .unwrap()
        .write_image_data(&rgb)
        .unwrap();
}

/// Folders `v0`, `v1`, ... of `num_frames` 48x40 frames and both lists; label = video % 4.
pub fn write_videos(root: &Path, num_videos: u32, num_frames: u32) {
    let mut list = String::from("# path frames label\n");
    for video in 0..num_videos {
        let folder = root.join(format!("v{video}"));
        fs_err::create_dir_all(&folder).unwrap();
        for frame in 0..num_frames {
            write_png(&frame_path(root, video, frame), video, frame, 48, 40);
        }
        list += &format!("v{video} {num_frames} {}\n", video % 4);
    }
    fs_err::write(root.join("train.txt"), &list).unwrap();
    fs_err::write(root.join("val.txt"), &list).unwrap();
}

/// The file of a frame; `frame` counts from 0, file numbers from 1.
pub fn frame_path(root: &Path, video: u32, frame: u32) -> PathBuf {
    root.join(format!("v{video}/{:03}.png", frame + 1))
}

/// A path below the folder of shared files (`TSM_SHARED`, or `../shared` beside the repository);
/// `None`, with a line on stderr, where it is missing.
pub fn shared(below: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("TSM_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let path = folder.join(below);
    if !path.exists() {
        eprintln!("skipped: {} does not exist", path.display());
        return None;
    }
    Some(path)
}
