//! `--preflight full` of nodes with GPUs: the job's own trainer measures them.

use super::*;
use crate::cluster::message::Round;
use crate::doctor::preflight::{GPU_WAIT, Measured, OwnNode, Scale};
use crate::gpus::Gpu;

/// Two nodes with these numbers of GPUs, in the phase that measures.
fn scene(num_gpus: [usize; 2]) -> Scene {
    let mut settings = settings(2, 2);
    settings.measure = Some(Scale {
        trainer: Some("/opt/tsm-trainer".into()),
        ..Scale::default()
    });
    let mut scene = Scene::new(settings);
    for (id, num_gpus) in [1, 2].into_iter().zip(num_gpus) {
        scene.alive.insert(id);
        let gpu = |i: usize| Gpu {
            id: i.to_string(),
            name: "H200".into(),
            uuid: format!("GPU-{i}"),
        };
        let join = Join {
            gpus: (0..num_gpus).map(gpu).collect(),
            ..join_of(&format!("n{id}"), WORKERS)
        };
        scene.says(id, FromAgent::Join(Box::new(join)));
    }
    scene
}

/// How long the nodes may take for what they were asked.
fn patience(scene: &Scene) -> Duration {
    let Phase::Measure { measuring, .. } = &scene.state.phase else {
        panic!("{:?}", scene.state.phase);
    };
    measuring.deadline - scene.now
}

/// Both answer for themselves; the round in which they measure together.
fn together(scene: &mut Scene) -> Round {
    let asked = scene.told(1).into_iter().find_map(|message| match message {
        ToAgent::MeasureNode { round, .. } => Some(round),
        _ => None,
    });
    let round = asked.expect("it measures itself");
    for id in [1, 2] {
        let own = OwnNode {
            all_reduce_gb_s: Some(400.0),
            ..OwnNode::default()
        };
        scene.says(id, FromAgent::NodeMeasured { round, own });
    }
    let round = Round { number: 1, ..round };
    for id in [1, 2] {
        let port = Ok(7000 + id as u16);
        scene.says(id, FromAgent::RingOpen { round, port });
    }
    round
}

fn trainers(scene: &mut Scene, id: NodeId) -> Vec<Option<std::path::PathBuf>> {
    let told = scene.told(id).into_iter();
    told.filter_map(|message| match message {
        ToAgent::MeasureNode { scale, .. } => Some(scale.trainer),
        ToAgent::Measure { task, .. } => Some(task.trainer),
        _ => None,
    })
    .collect()
}

#[test]
fn the_trainer_measures_where_every_node_has_gpus() {
    let mut scene = scene([8, 8]);
    assert!(patience(&scene) > GPU_WAIT, "NCCL starts slowly");
    let round = together(&mut scene);
    let trainer = Some("/opt/tsm-trainer".into());
    assert_eq!(trainers(&mut scene, 2), [trainer.clone(), trainer]);
    for id in [1, 2] {
        let result = Ok(Measured {
            seconds: 1.0,
            gbit_s: 3000.0,
            round_trip: Duration::ZERO,
            wrong: None,
        });
        scene.says(id, FromAgent::Measured { round, result });
    }
    assert_eq!(scene.state.phase, Phase::Run);
    let notices = scene.notices();
    assert!(
        notices.contains("all-reduce within a node 400.00 GB/s bus bandwidth on 2 nodes"),
        "{notices}"
    );
}

#[test]
fn a_ring_measures_where_some_node_has_no_gpus() {
    let mut scene = scene([8, 0]);
    assert!(patience(&scene) < GPU_WAIT);
    together(&mut scene);
    assert_eq!(trainers(&mut scene, 2), [None, None]);
}
