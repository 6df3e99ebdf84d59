//! A loader over small PNGs in a temporary folder.

use super::*;
use crate::clip::Dataset;
use crate::list::Split;
use crate::order::Share;
use crate::testing;
use std::collections::BTreeMap;
use std::path::Path;
use tsm_job::Config;

type Sample = (i64, Vec<u8>);

fn open(config: &Config) -> Arc<Dataset> {
    Arc::new(Dataset::open(config, Split::Train).unwrap())
}

fn train(config: &Config, rank: u32, world_size: u32) -> LoaderSpec {
    LoaderSpec::train(config, open(config), Share::new(rank, world_size), 5, 0).unwrap()
}

fn start(spec: &LoaderSpec) -> Loader<Vec<u8>> {
    Loader::start(spec.clone(), |len| vec![0xAA; len]).unwrap()
}

/// All samples by (step, index), with their order checked against the plan.
fn samples(spec: &LoaderSpec) -> BTreeMap<(u64, u64), Sample> {
    let len = spec.clip.sample_bytes();
    let mut all = BTreeMap::new();
    let mut num = 0;
    for (n, batch) in start(spec).enumerate() {
        let batch = batch.unwrap();
        let plan = spec.plan.batch(n as u64).unwrap();
        assert_eq!((&batch.indices, batch.step), (&plan.indices, plan.step));
        assert_eq!(
            (batch.n, batch.labels.len()),
            (plan.indices.len(), plan.indices.len())
        );
        for (k, &index) in batch.indices.iter().enumerate() {
            let bytes = batch.buffer[k * len..(k + 1) * len].to_vec();
            assert!(
                all.insert((batch.step, index), (batch.labels[k], bytes))
                    .is_none()
            );
        }
        num += 1;
    }
    assert_eq!(num, spec.plan.num_batches());
    all
}

fn error_of(spec: &LoaderSpec) -> (usize, anyhow::Error) {
    let mut loader = start(spec);
    let mut good = 0;
    loop {
        match loader.next().expect("an error") {
            Ok(_) => good += 1,
            Err(error) => {
                assert!(loader.next().is_none(), "an error ends the stream");
                return (good, error);
            }
        }
    }
}

fn break_file(root: &Path, video: u32, frame: u32) {
    fs_err::write(testing::frame_path(root, video, frame), "no picture").unwrap();
}

#[test]
fn content_does_not_depend_on_threads_or_ranks() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 19, 5);
    let mut config = testing::config(dir.path());
    config.train.drop_last = false;
    let mut spec = train(&config, 0, 1);
    spec.threads = 1;
    let one = samples(&spec);
    assert_eq!(one.len(), 19);
    spec.threads = 4;
    assert_eq!(one, samples(&spec));
    config.train.batch_per_rank = 2;
    let mut two = samples(&train(&config, 0, 2));
    two.extend(samples(&train(&config, 1, 2)));
    assert_eq!(one, two);
    // Another epoch crops otherwise.
    let other = LoaderSpec::train(&config, open(&config), Share::new(0, 1), 6, 0).unwrap();
    assert_ne!(one, samples(&other));
}

#[test]
fn starting_in_mid_epoch_continues_it() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 12, 3);
    let mut config = testing::config(dir.path());
    config.train.batch_per_rank = 2;
    config.train.accumulation = 2;
    let whole: BTreeMap<_, _> = samples(&train(&config, 0, 1))
        .into_iter()
        .filter_map(|((step, index), sample)| Some(((step.checked_sub(1)?, index), sample)))
        .collect();
    let rest = LoaderSpec::train(&config, open(&config), Share::new(0, 1), 5, 4).unwrap();
    assert_eq!(whole, samples(&rest));
}

#[test]
fn validation_shows_the_centre_of_the_middle_frames() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 5, 10);
    let mut config = testing::config(dir.path());
    // No resize: the short side is 40 already.
    config.data.val.short_side = 40;
    let mut seen = Vec::new();
    for rank in 0..2 {
        let spec = LoaderSpec::val(&config, open(&config), Share::new(rank, 2));
        for ((_, index), (label, bytes)) in samples(&spec) {
            assert_eq!(label, index as i64 % 4);
            // T = 2 of 10 frames: 2 and 7; 48x40 to 32x32 starts at (8, 4).
            for (t, frame) in [2, 7].into_iter().enumerate() {
                for (x, y) in [(0, 0), (31, 0), (0, 31), (17, 5)] {
                    let at = ((t * 32 + y) * 32 + x) * 3;
                    let expected = testing::pixel(index as u32, frame, x as u32 + 8, y as u32 + 4);
                    assert_eq!(
                        bytes[at..at + 3],
                        expected,
                        "sample {index} frame {frame} at {x},{y}"
                    );
                }
            }
            seen.push(index);
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3, 4]);
}

#[test]
fn a_rank_without_validation_samples_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 2, 2);
    let config = testing::config(dir.path());
    let spec = LoaderSpec::val(&config, open(&config), Share::new(2, 3));
    assert!(start(&spec).next().is_none());
}

#[test]
fn dense_validation_delivers_the_clips_of_its_rules() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 1, 3);
    let mut config = testing::config(dir.path());
    config.data.dense = true;
    config.data.sampler = tsm_job::config::Sampler::Mm1;
    let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
    assert_eq!(
        (spec.clip.num_clips(), spec.clip.sample_bytes()),
        (10, 10 * 2 * 32 * 32 * 3)
    );
    assert_eq!(samples(&spec).len(), 1);
}

#[test]
fn a_flipped_clip_takes_the_label_of_its_mirror_image() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 8, 2);
    let mut config = testing::config(dir.path());
    let names = dir.path().join("classes.txt");
    fs_err::write(&names, "left\nright\nup\ndown\n").unwrap();
    config.data.class_names = Some(names);
    config.data.train.flip = 1.0;
    config.data.train.flip_swap = vec![("right".into(), "left".into())];
    for ((_, index), (label, bytes)) in samples(&train(&config, 0, 1)) {
        assert_eq!(label, [1, 0, 2, 3][index as usize % 4]);
        // Green grows with x in the stored frame.
        assert!(bytes[1] > bytes[31 * 3 + 1]);
    }
}

#[test]
fn buffers_are_made_once_and_go_round() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 40, 1);
    let config = testing::config(dir.path());
    let spec = train(&config, 0, 1);
    let mut made = 0;
    let mut loader = Loader::start(spec.clone(), |len| {
        made += 1;
        vec![0u8; len]
    })
    .unwrap();
    assert_eq!(made, 4);
    let mut places = std::collections::BTreeSet::new();
    let mut held = None;
    for batch in &mut loader {
        let batch = batch.unwrap();
        places.insert(batch.buffer.as_ptr() as usize);
        held = Some(batch);
    }
    assert!(places.len() <= 4 && spec.plan.num_batches() == 10);
    drop(held);
    assert_eq!(loader.into_buffers().len(), 4);
    // Also those of batches nobody asked for.
    let mut loader = start(&spec);
    drop(loader.next());
    assert_eq!(loader.into_buffers().len(), 4);
}

#[test]
fn dropping_a_loader_in_mid_epoch_ends_its_threads() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 40, 1);
    let spec = train(&testing::config(dir.path()), 0, 1);
    for taken in 0..5 {
        let mut loader = start(&spec);
        let held: Vec<_> = loader
            .by_ref()
            .take(taken.min(2))
            .map(Result::unwrap)
            .collect();
        let weak = Arc::downgrade(&loader.spec);
        // Joins; a thread still alive would hold the specification.
        drop(loader);
        assert_eq!(weak.strong_count(), 0);
        drop(held);
    }
}

#[test]
fn the_first_bad_file_in_order_ends_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 16, 3);
    let config = testing::config(dir.path());
    let mut spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
    break_file(dir.path(), 6, 0);
    fs_err::remove_file(testing::frame_path(dir.path(), 9, 2)).unwrap();
    for threads in [1, 4] {
        spec.threads = threads;
        let (good, error) = error_of(&spec);
        assert_eq!((good, exit::code_of(&error)), (1, exit::DATA));
        let text = error.to_string();
        assert!(
            text.contains("v6/001.png") && text.contains("train.txt:8)"),
            "{text}"
        );
        assert!(text.contains("data.on_error: skip"), "{text}");
    }
    testing::write_png(&testing::frame_path(dir.path(), 6, 0), 6, 0, 48, 40);
    let (good, error) = error_of(&spec);
    assert_eq!(good, 2);
    assert!(
        error.to_string().contains("v9/003.png does not exist"),
        "{error}"
    );
}

#[test]
fn skipped_samples_are_named_and_the_rest_moves_up() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 8, 2);
    let mut config = testing::config(dir.path());
    config.data.on_error = OnError::Skip;
    config.data.max_bad_videos = 3;
    let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
    let whole = samples(&spec);
    for video in [0, 2, 7] {
        break_file(dir.path(), video, 0);
    }
    let mut loader = start(&spec);
    let first = loader.next().unwrap().unwrap();
    assert_eq!(
        (first.n, &first.indices[..], &first.labels[..]),
        (2, &[1, 3][..], &[1, 3][..])
    );
    let skipped: Vec<_> = first.skipped.iter().map(|b| (b.index, b.line)).collect();
    assert_eq!(skipped, [(0, 2), (2, 4)]);
    assert_eq!(first.skipped[0].path, dir.path().join("v0"));
    let len = spec.clip.sample_bytes();
    assert_eq!(first.buffer[..len], whole[&(0, 1)].1);
    assert_eq!(first.buffer[len..2 * len], whole[&(0, 3)].1);
    let second = loader.next().unwrap().unwrap();
    assert_eq!((second.n, loader.num_bad()), (3, 3));

    // One more than allowed.
    break_file(dir.path(), 5, 0);
    let (good, error) = error_of(&spec);
    let text = error.to_string();
    assert_eq!((good, exit::code_of(&error)), (1, exit::DATA));
    assert!(
        text.contains("4 samples could not be read, data.max_bad_videos is 3"),
        "{text}"
    );
    assert!(text.contains("v7"), "{text}");
}

#[test]
fn a_batch_that_lost_every_sample_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 4, 1);
    let mut config = testing::config(dir.path());
    config.data.on_error = OnError::Skip;
    (0..4).for_each(|video| break_file(dir.path(), video, 0));
    let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
    let text = error_of(&spec).1.to_string();
    assert!(
        text.contains("all 4 samples") && text.contains("v0/001.png"),
        "{text}"
    );
}

#[test]
fn frames_of_two_sizes_are_an_error_that_names_both() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 1, 4);
    testing::write_png(&testing::frame_path(dir.path(), 0, 3), 0, 3, 40, 48);
    let config = testing::config(dir.path());
    let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
    let text = error_of(&spec).1.to_string();
    assert!(
        text.contains("v0/004.png: is 40x48, the clip's first frame is 48x40"),
        "{text}"
    );
}

#[test]
fn a_list_too_short_for_a_step_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 7, 1);
    let config = testing::config(dir.path());
    let result = LoaderSpec::train(&config, open(&config), Share::new(0, 2), 0, 0);
    let text = result.unwrap_err().to_string();
    assert!(
        text.contains("has 7 samples, a step takes 8 (2 ranks x batch_per_rank 4"),
        "{text}"
    );
}

#[test]
fn jpeg_frames_are_read_by_content() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 4, 1);
    let pixels = vec![200u8; 48 * 40 * 3];
    let image = turbojpeg::Image {
        pixels: &pixels[..],
        width: 48,
        pitch: 48 * 3,
        height: 40,
        format: turbojpeg::PixelFormat::RGB,
    };
    let jpeg = turbojpeg::compress(image, 95, turbojpeg::Subsamp::Sub2x2).unwrap();
    fs_err::write(testing::frame_path(dir.path(), 1, 0), &jpeg).unwrap();
    let config = testing::config(dir.path());
    let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
    let (_, bytes) = &samples(&spec)[&(0, 1)];
    assert!(bytes.iter().all(|b| b.abs_diff(200) <= 1));
}

#[test]
fn videos_are_sampled_by_their_own_length() {
    let Some(videos) = testing::shared("videos") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let names = [
        "gulpio_test.mp4",
        "SOX5yA1l24A.mp4",
        "gulpio_test.webm",
        "RATRACE_wave_f_nm_np1_fr_goo_37.avi",
    ];
    let list: String = names.iter().map(|name| format!("{name} 1\n")).collect();
    fs_err::write(dir.path().join("train.txt"), list).unwrap();
    let mut config = testing::config(dir.path());
    config.data.format = tsm_job::config::DataFormat::Video;
    config.data.root = videos;
    config.train.batch_per_rank = 2;
    let mut spec = train(&config, 0, 1);
    spec.threads = 1;
    let one = samples(&spec);
    spec.threads = 3;
    assert_eq!(one, samples(&spec));
    assert_eq!(one.len(), names.len());
    for (_, bytes) in one.values() {
        // Frames of different moments: the two segments differ.
        let (first, second) = bytes.split_at(bytes.len() / 2);
        assert_ne!(first, second);
    }

    // A missing video is named with its line.
    fs_err::write(
        dir.path().join("train.txt"),
        "gulpio_test.mp4 1\nnone.mp4 1\n",
    )
    .unwrap();
    let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
    let text = error_of(&spec).1.to_string();
    assert!(
        text.contains("none.mp4 does not exist") && text.contains("train.txt:2"),
        "{text}"
    );
}

#[test]
fn a_panic_of_a_decoder_thread_is_an_error_that_names_the_sample() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_videos(dir.path(), 8, 1);
    let mut config = testing::config(dir.path());
    config.data.train.flip = 1.0;
    let mut dataset = Dataset::open(&config, Split::Train).unwrap();
    // No such dataset comes from a file: the first flipped clip finds no label.
    dataset.flip_labels.clear();
    let spec = LoaderSpec::train(&config, Arc::new(dataset), Share::new(0, 1), 0, 0).unwrap();
    let (good, error) = error_of(&spec);
    assert_eq!((good, exit::code_of(&error)), (0, exit::BUG));
    assert!(
        error.to_string().contains("decoder thread panicked"),
        "{error}"
    );
    assert!(error.to_string().contains("train.txt:"), "{error}");
}
