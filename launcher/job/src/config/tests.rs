use super::tree::KeyPath;
use super::*;
use std::path::Path;

const FILE: &str = "job.yaml";

/// The template as YAML with every `(from, to)` replaced once.
fn edited(edits: &[(&str, &str)]) -> String {
    let mut text = Config::template().to_yaml();
    for (from, to) in edits {
        assert!(text.contains(from), "{from:?} is not in\n{text}");
        text = text.replacen(from, to, 1);
    }
    text
}

fn load(text: &str, overrides: &[&str]) -> Result<Config, ConfigError> {
    let overrides: Vec<_> = overrides.iter().map(|o| o.to_string()).collect();
    Config::from_yaml(text, Path::new(FILE), &overrides)
}

/// What the user reads for the template with `edits`.
fn error(edits: &[(&str, &str)], overrides: &[&str]) -> String {
    load(&edited(edits), overrides)
        .expect_err("this configuration is broken")
        .to_string()
}

/// The template with `overrides`.
fn with(overrides: &[&str]) -> Config {
    load(&edited(&[]), overrides).unwrap_or_else(|error| panic!("{error}"))
}

fn recipe(name: &str) -> Config {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs");
    Config::load(&Path::new(root).join(name), &[]).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn every_recipe_loads_and_survives_yaml() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs");
    let mut seen = 0;
    for entry in fs_err::read_dir(root).unwrap() {
        let config = Config::load(&entry.unwrap().path(), &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(load(&config.to_yaml(), &[]).unwrap(), config);
        seen += 1;
    }
    assert!(seen >= 3, "{seen} files in configs/");
}

/// Figures of the results table that the recipe names, at its 8 ranks.
#[test]
fn the_published_recipes_use_the_published_figures() {
    let (ucf, ssv) = (recipe("ucf101.yaml"), recipe("sthv2.yaml"));
    assert_eq!((ucf.global_batch(8), ssv.global_batch(8)), (288, 128));
    assert_eq!((ucf.scaled_lr(8), ssv.scaled_lr(8)), (0.0015, 0.01));
    assert_eq!((ucf.train.epochs, ssv.train.epochs), (32, 50));
    assert_eq!(
        (ucf.optim.weight_decay, ssv.optim.weight_decay),
        (1e-4, 5e-4)
    );
    assert_eq!((ucf.train.eval_every, ssv.train.eval_every), (4, 2));
    assert_eq!(ucf.train.precision.loss_scale, Some(128.0));
    assert_eq!(ssv.train.precision.loss_scale, None);
    for config in [ucf, ssv] {
        assert_eq!(config.train.precision.mode, PrecisionMode::O2);
        assert_eq!(config.optim.max_grad_norm, None);
        assert_eq!(config.data.train.flip, 0.0);
        assert_eq!(config.optim.groups, Groups::TsmFcLr5);
        assert_eq!(config.data.sampler, Sampler::Mm0);
    }
}

#[test]
fn variants_and_text_that_looks_like_numbers_survive_yaml() {
    let mut config = Config::template();
    config.run.name = "123".into();
    config.run.reference = Some("null".into());
    config.data.root = "true".into();
    config.data.class_names = Some("a: b #c".into());
    config.data.train.flip_swap = vec![("no".into(), "1e3".into())];
    config.data.train.crop = TrainCrop::RandomResized {
        area: (0.08, 1.0),
        ratio: (0.75, 4.0 / 3.0),
    };
    config.optim.lr = 1e-7;
    config.optim.schedule = Schedule::Constant {};
    config.launch.grace = Duration::from_millis(1500);
    assert_eq!(load(&config.to_yaml(), &[]).unwrap(), config);
    config.data.train.crop = TrainCrop::Center {};
    config.optim.schedule = Schedule::Cosine { per_step: false };
    assert_eq!(load(&config.to_yaml(), &[]).unwrap(), config);
}

#[test]
fn a_mistyped_transport_is_met_with_the_one_that_was_meant() {
    let text = error(&[], &["launch.collectives=ncl"]);
    let hint = "did you mean `nccl`? valid values: auto, gloo, nccl, mpi";
    assert!(text.contains(hint), "{text}");
    let text = error(&[("collectives: auto", "collective: mpi")], &[]);
    assert!(text.contains("did you mean `collectives`?"), "{text}");
}

#[test]
fn every_problem_is_listed_in_the_order_of_the_lines() {
    let edits = [
        ("arch: resnet18", "arch: resnet5"),
        ("num_segments: 8", "num_segments: 0"),
        ("epochs: 50", "epochs: 2.5"),
        ("lr: 0.01", "lrr: 0.01"),
    ];
    assert_eq!(
        error(&edits, &["optim.momentum=-1", "optm.lr=1"]),
        r#"6 problems in the configuration job.yaml

job.yaml:13:9: model.arch cannot be "resnet5"
   13 |   arch: resnet5
      |         ^
  hint: did you mean `resnet50`? valid values: resnet18, resnet34, resnet50, resnet101, resnet152, mobilenetv2

job.yaml:16:17: model.num_segments is 0, it must be at least 1
   16 |   num_segments: 0
      |                 ^

job.yaml:70:11: train.epochs is 2.5, expected a whole number, 0 or more
   70 |   epochs: 2.5
      |           ^
  hint: write it like `epochs: 50`

job.yaml:87:3: unknown key `lrr` in optim
   87 |   lrr: 0.01
      |   ^
  hint: did you mean `lr`? valid keys: lr, base_batch, scale_lr, momentum, nesterov, weight_decay, groups, max_grad_norm, schedule, warmup, label_smoothing

override optim.momentum=-1: optim.momentum is -1, it must be at least 0 and below 1

override optm.lr=1: unknown section `optm`
  hint: did you mean `optim`? valid keys: run, launch, model, data, train, optim"#
    );
}

#[test]
fn a_missing_key_is_shown_at_its_section() {
    assert_eq!(
        error(&[("  max_grad_norm: 20.0\n", "")], &[]),
        "1 problem in the configuration job.yaml\n\n\
         job.yaml:86:1: the key `optim.max_grad_norm` is missing\n   \
         86 | optim:\n      | ^\n  hint: add it, like `max_grad_norm: 20.0`"
    );
}

#[test]
fn a_missing_section_lists_its_keys() {
    let text = load("run: {name: a, seed: 1}", &[])
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("4 problems"), "{text}");
    assert!(
        text.contains("job.yaml: the section `optim` is missing\n  hint: add `optim:` with the keys lr, base_batch"),
        "{text}"
    );
}

#[test]
fn a_key_written_twice_is_shown_with_both_lines() {
    assert_eq!(
        error(&[("  lr: 0.01", "  lr: 0.01\n  lr: 0.02")], &[]),
        "1 problem in the configuration job.yaml\n\n\
         job.yaml:88:3: `optim.lr` is written twice\n   \
         88 |   lr: 0.02\n      |   ^\n  hint: its first value is on line 87; keep one"
    );
}

#[test]
fn broken_yaml_is_shown_with_its_line() {
    assert_eq!(
        load("run:\n\tname: a", &[]).unwrap_err().to_string(),
        "1 problem in the configuration job.yaml\n\n\
         job.yaml:2:2: not valid YAML: tabs disallowed within this context (block indentation)\n    \
         2 | \tname: a\n      | \t^"
    );
}

#[test]
fn a_file_without_sections_is_refused() {
    let say = |text| load(text, &[]).unwrap_err().problems[0].message.clone();
    assert_eq!(say(""), "the file is empty");
    assert_eq!(say("# nothing\n"), "the file is empty");
    assert_eq!(say("x"), "the file holds \"x\", expected sections of keys");
    let numbered = edited(&[]) + "1: x\n";
    assert_eq!(say(&numbered), "unknown section `1`");
    assert_eq!(
        say("[1, 2]"),
        "the file holds [1, 2], expected sections of keys"
    );
    let text = error(
        &[(
            "run:\n  name: example\n  dir: runs\n  seed: 0\n  reference: null",
            "run: [a, b, 0]",
        )],
        &[],
    );
    assert!(
        text.contains("run is [\"a\", \"b\", 0], expected a mapping"),
        "{text}"
    );
}

#[test]
fn a_key_of_another_section_is_sent_there() {
    let text = error(&[("  epochs: 50", "  epochs: 50\n  weight_decay: 0")], &[]);
    assert!(
        text.contains("unknown key `weight_decay` in train"),
        "{text}"
    );
    assert!(
        text.contains("hint: `weight_decay` belongs to optim; valid keys: epochs"),
        "{text}"
    );
}

/// The message and the hint of the only problem.
fn only(edits: &[(&str, &str)], overrides: &[&str]) -> (String, String) {
    let error = load(&edited(edits), overrides).expect_err("this configuration is broken");
    assert_eq!(error.problems.len(), 1, "{error}");
    let problem = &error.problems[0];
    (
        problem.message.clone(),
        problem.hint.clone().unwrap_or_default(),
    )
}

#[test]
fn a_value_of_a_wrong_kind_is_named_in_the_words_of_yaml() {
    for (from, to, message, hint) in [
        (
            "grace: 30s",
            "grace: 30",
            "launch.grace is 30, expected text",
            "write it like `grace: 30s`",
        ),
        (
            "grace: 30s",
            "grace: 3 days",
            "launch.grace: `3 days` is not a duration; write it like 500ms, 30s, 10m or 2h",
            "",
        ),
        (
            "name: example",
            "name: 123",
            "run.name is 123, expected text",
            "put it in quotes: `\"123\"`",
        ),
        (
            "seed: 0",
            "seed: -1",
            "run.seed is -1, expected a whole number, 0 or more",
            "write it like `seed: 0`",
        ),
        (
            "epochs: 50",
            "epochs: 5000000000",
            "train.epochs is 5000000000, expected at most 4294967295",
            "write it like `epochs: 50`",
        ),
        (
            "lr: 0.01",
            "lr: .inf",
            "optim.lr is \".inf\", expected a number",
            "write it like `lr: 0.01`",
        ),
        (
            "drop_last: true",
            "drop_last: yes",
            "train.drop_last is \"yes\", expected true or false",
            "write it like `drop_last: true`",
        ),
        (
            "flip_swap: []",
            "flip_swap: left",
            "data.train.flip_swap is \"left\", expected a list",
            "write it like `flip_swap: [[\"left\", \"right\"]]`",
        ),
        (
            "flip_swap: []",
            "flip_swap: [[left]]",
            "data.train.flip_swap[0] is [\"left\"], expected a list of 2 values",
            "",
        ),
    ] {
        assert_eq!(
            only(&[(from, to)], &[]),
            (message.into(), hint.into()),
            "{to}"
        );
    }
}

#[test]
fn a_variant_with_keys_cannot_be_written_as_its_name() {
    let say = (
        "optim.schedule is \"constant\", which takes keys of its own".to_string(),
        "write `schedule: {constant: {}}`".to_string(),
    );
    assert_eq!(only(&[], &["optim.schedule=constant"]), say);
}

#[test]
fn a_broken_element_of_a_list_is_named_by_its_index() {
    let (message, _) = only(&[], &["data.train.crop.multi_scale.scales=[1, 0.8, x]"]);
    assert_eq!(
        message,
        "data.train.crop.multi_scale.scales[2] is \"x\", expected a number"
    );
    // Too short as well, but what would be shown is no longer what was written.
    let (message, _) = only(&[], &["data.mean=[x, 2]"]);
    assert_eq!(message, "data.mean[0] is \"x\", expected a number");
    let (message, _) = only(&[], &["data.mean=[1, 2]"]);
    assert_eq!(message, "data.mean is [1, 2], expected a list of 3 numbers");
    let (message, hint) = only(&[], &["model.arch=[resnet18]"]);
    assert_eq!(
        message,
        "model.arch is [\"resnet18\"], expected one of its names"
    );
    assert_eq!(hint, "write it like `arch: resnet18`");
}

#[test]
fn rules_do_not_judge_values_that_stand_in_for_broken_ones() {
    let edits = [(
        "short_side: 256\n    size: 224\n    batch",
        "short_side: 64\n    size: abc\n    batch",
    )];
    assert_eq!(
        only(&edits, &[]).0,
        "data.val.size is \"abc\", expected a whole number, 0 or more"
    );
}

#[test]
fn overrides_are_typed_like_their_fields() {
    let config = with(&[
        "run.name=1e3",
        "run.dir=007",
        "optim.lr=1e-3",
        "optim.max_grad_norm=null",
        "model.shift.mode=none",
        "model.weights=w=1.safetensors",
        "data.train.flip_swap=[[a, b]]",
        "data.class_names=names.txt",
        "data.val.batch_per_rank=4",
        "launch.grace=90s",
    ]);
    assert_eq!(config.run.name, "1e3");
    assert_eq!(config.run.dir, Path::new("007"));
    assert_eq!(config.optim.lr, 0.001);
    assert_eq!(config.optim.max_grad_norm, None);
    assert_eq!(config.model.shift.mode, ShiftMode::None);
    assert_eq!(
        config.model.weights.as_deref(),
        Some(Path::new("w=1.safetensors"))
    );
    assert_eq!(config.data.train.flip_swap, [("a".into(), "b".into())]);
    assert_eq!(config.data.val.batch_per_rank, Some(4));
    assert_eq!(config.launch.grace, Duration::from_secs(90));
}

#[test]
fn the_last_override_of_a_key_counts() {
    assert_eq!(with(&["optim.lr=1", "optim.lr=2"]).optim.lr, 2.0);
    // Only the value that is used is judged.
    assert_eq!(with(&["optim.lr=-1", "optim.lr=2"]).optim.lr, 2.0);
}

#[test]
fn an_override_of_another_variant_replaces_the_whole_value() {
    assert_eq!(
        with(&["optim.schedule.cosine.per_step=true"])
            .optim
            .schedule,
        Schedule::Cosine { per_step: true }
    );
    let config = with(&[
        "data.train.crop.random_resized.area=[0.1, 1]",
        "data.train.crop.random_resized.ratio=[1, 1]",
        "optim.schedule={constant: {}}",
    ]);
    assert_eq!(
        config.data.train.crop,
        TrainCrop::RandomResized {
            area: (0.1, 1.0),
            ratio: (1.0, 1.0)
        }
    );
    assert_eq!(config.optim.schedule, Schedule::Constant {});
    // The same variant keeps its other keys.
    assert_eq!(
        with(&["optim.schedule.step.gamma=0.5"]).optim.schedule,
        Schedule::Step {
            milestones: vec![20.0, 40.0],
            gamma: 0.5
        }
    );
}

#[test]
fn an_override_makes_a_section_that_is_null() {
    let config = with(&["optim.warmup.epochs=5", "optim.warmup.start_factor=0.1"]);
    assert_eq!(
        config.optim.warmup,
        Some(Warmup {
            epochs: 5.0,
            start_factor: 0.1,
            per_step: true
        })
    );
    let error = load(&edited(&[]), &["optim.warmup.epochs=5"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "1 problem in the configuration job.yaml\n\n\
         override optim.warmup.epochs=5: the key `optim.warmup.start_factor` is missing\n  \
         hint: add it, like `start_factor: 0.1`"
    );
}

#[test]
fn an_override_that_cannot_be_applied_is_explained() {
    for (text, message) in [
        ("optim.lr", "an override needs a `=`"),
        ("optim..lr=1", "\"optim..lr\" is not a key"),
        ("optim.lr=", "no value for optim.lr"),
        ("optim.lr.x=1", "optim.lr is 0.01, it has no keys"),
        (
            "data.mean.0=1",
            "data.mean is [0.485,0.456,0.406], it has no keys",
        ),
        (
            "optim.schedule.cosin.per_step=true",
            "optim.schedule cannot be \"cosin\"",
        ),
        ("optim.Lr=1", "unknown key `Lr` in optim"),
    ] {
        let (found, hint) = only(&[], &[text]);
        assert_eq!(found, message, "{text}");
        assert!(!hint.is_empty(), "{text} has no hint");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = Config::load(Path::new("no/such.yaml"), &[]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("1 problem in the configuration no/such.yaml"),
        "{text}"
    );
    assert!(text.contains("No such file"), "{text}");
    let error = Config::load(Path::new("/dev/zero"), &[]).unwrap_err();
    assert!(error.to_string().contains("larger than 1 MiB"), "{error}");
}

#[test]
fn of_a_very_long_line_only_what_matters_is_shown() {
    let text = format!("{}X{}", "-".repeat(5000), "-".repeat(5000));
    for column in [5001, 1, 10_001] {
        let mut problem = Problem::new(&KeyPath::default(), "no".repeat(100_000));
        problem.place = Some((1, column));
        let error = ConfigError::new(Path::new("job.yaml"), &text, vec![problem]).to_string();
        assert!(error.len() < 3000, "{} bytes", error.len());
        let lines: Vec<&str> = error.lines().collect();
        let [shown, below] = lines[lines.len() - 2..] else {
            panic!("{error}")
        };
        let caret = below.find('^').unwrap();
        let is_there = match column {
            5001 => shown[caret..].starts_with('X'),
            1 => shown[..caret].ends_with("| "),
            _ => shown.len() == caret + 1,
        };
        assert!(is_there, "{error}");
    }
}

#[test]
fn durations_are_read_and_written() {
    for (text, ms, shortest) in [
        ("500ms", 500, "500ms"),
        ("1.5s", 1500, "1500ms"),
        ("90s", 90_000, "90s"),
        ("120s", 120_000, "2m"),
        ("2h", 7_200_000, "2h"),
        ("9999h", 35_996_400_000, "9999h"),
        ("0s", 0, "0s"),
    ] {
        let duration = Duration::from_millis(ms);
        assert_eq!(duration::parse(text), Ok(duration));
        assert_eq!(duration::format(duration), shortest);
    }
    for text in [
        "",
        "30",
        "s",
        "-1s",
        "1d",
        "1.2.3s",
        "1e400h",
        "10000h",
        "99999999999999999999h",
    ] {
        assert!(duration::parse(text).is_err(), "{text}");
    }
}

/// Every value of the template in turn is replaced by values that do not belong there, or left
/// out: loading ends, and what it refuses it can show.
#[test]
fn any_value_anywhere_is_answered() {
    fn paths(node: &serde_json::Value, at: String, found: &mut Vec<String>) {
        let children: Vec<(String, &serde_json::Value)> = match node {
            serde_json::Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), v)).collect(),
            serde_json::Value::Array(list) => {
                (0..).map(|i: usize| i.to_string()).zip(list).collect()
            }
            _ => Vec::new(),
        };
        for (key, child) in children {
            let path = format!("{at}/{key}");
            paths(child, path.clone(), found);
            found.push(path);
        }
    }
    let mut whole = Config::template();
    whole.optim.warmup = Some(Warmup {
        epochs: 5.0,
        start_factor: 0.1,
        per_step: true,
    });
    let whole = serde_json::to_value(whole).unwrap();
    let mut found = Vec::new();
    paths(&whole, String::new(), &mut found);
    let strange = serde_json::json!([
        null, true, -1, 0, 1e300, "x", "none", "step", [], {}, [1, 2], [[1], 2],
        {"a": 1}, {"step": null}, {"step": {}, "cosine": {}}, {"constant": [1]}
    ]);
    let mut refused = 0;
    for path in &found {
        for value in strange.as_array().unwrap() {
            let mut changed = whole.clone();
            *changed.pointer_mut(path).unwrap() = value.clone();
            let text = serde_json::to_string_pretty(&changed).unwrap();
            if let Err(error) = load(&text, &[]) {
                refused += 1;
                assert!(!error.problems.is_empty());
                let shown = error.to_string();
                assert!(
                    shown.lines().all(|line| !line.contains("EnumAccess")),
                    "{shown}"
                );
                let placed = error.problems.iter().all(|p| p.place.is_some());
                assert!(
                    placed || value.is_null() || value.is_object(),
                    "{path}: {shown}"
                );
            }
        }
    }
    assert!(refused > found.len() * 8, "{refused} of {}", found.len());
}
