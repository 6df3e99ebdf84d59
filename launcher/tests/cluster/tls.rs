//! Nodes that talk through TLS, and those that may not.

use crate::job::Job;
use crate::nodes::Cluster;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tsm_job::exit;

/// An agent that is refused says so at once; the default wait for the others is a minute.
const AT_ONCE: Duration = Duration::from_secs(55);

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca(name: &str) -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Makes `<node>.cert` and `<node>.key`, and says the flags with them.
fn files(cluster: &Cluster, node: &str, signer: &Ca, address: &str, expired: bool) -> String {
    let mut params = CertificateParams::new(vec![address.to_string()]).unwrap();
    if expired {
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(2020, 1, 1);
    }
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, signer).unwrap();
    let path = |kind: &str| cluster.scene.path(&format!("{node}.{kind}"));
    fs_err::write(path("cert"), cert.pem()).unwrap();
    fs_err::write(path("pem"), key.serialize_pem()).unwrap();
    set_mode(cluster, &format!("{node}.pem"), 0o600);
    format!("--nodes 2 --tls-cert {node}.cert --tls-key {node}.pem --tls-ca ca.cert")
}

fn set_mode(cluster: &Cluster, name: &str, mode: u32) {
    let mode = PermissionsExt::from_mode(mode);
    fs_err::set_permissions(cluster.scene.path(name), mode).unwrap();
}

#[test]
fn a_job_over_tls_runs_and_who_has_no_good_certificate_is_refused_on_both_sides() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    let (ours, other) = (ca("cluster"), ca("elsewhere"));
    fs_err::write(cluster.scene.path("ca.cert"), ours.pem()).unwrap();
    let mut job = Job::new(&cluster);
    let first = files(&cluster, "first", &ours, "10.77.0.1", false);
    job.start(1, &first, "--meet --exit 0");
    job.wait_until_joined(1);

    // What an agent says of the refusal, and what the coordinator does.
    let foreign = files(&cluster, "foreign", &other, "10.77.0.3", false);
    let expired = files(&cluster, "expired", &ours, "10.77.0.3", true);
    let no_tls = "\n  hint: give the TLS files to all nodes, or to none";
    let cases = [
        (
            foreign.as_str(),
            "refused this node's TLS certificate foreign.cert: UnknownCA".to_string(),
            "has a TLS certificate that ca.cert did not sign".to_string(),
        ),
        (
            expired.as_str(),
            "refused this node's TLS certificate expired.cert: CertificateExpired".into(),
            "has a TLS certificate that does not hold: certificate expired".into(),
        ),
        (
            "--nodes 2",
            format!("which is TLS{no_tls}"),
            format!("does not speak TLS{no_tls}"),
        ),
    ];
    for (n, (options, theirs, ours)) in cases.into_iter().enumerate() {
        job.start(3, options, "--meet --exit 0");
        assert_eq!(job.end_of(3), exit::PREFLIGHT, "{options}");
        let text = job.err(3);
        let start = "error: cannot join the job: 10.77.0.1:29400 ";
        assert!(text.starts_with(start) && text.contains(&theirs), "{text}");
        assert_eq!(text.matches("error: ").count(), 1, "{text}");
        assert!(job.took(3) < AT_ONCE, "{:?}", job.took(3));
        let refused = job.wait_for("refused", n + 1);
        let last = refused.last().unwrap();
        assert!(last["why"].as_str().unwrap().contains(&ours), "{last}");
        let peer = last["peer"].as_str().unwrap();
        assert!(peer.starts_with("10.77.0.3:"), "{last}");
    }

    // A private key that others can read is not used at all.
    let open = files(&cluster, "open", &ours, "10.77.0.3", false);
    set_mode(&cluster, "open.pem", 0o644);
    job.start(3, &open, "--meet --exit 0");
    assert_eq!(job.end_of(3), exit::USAGE);
    let text = "error: cannot use the TLS private key open.pem: its mode is 0644, so others have access\n  hint: chmod 600 open.pem";
    assert!(job.err(3).starts_with(text), "{}", job.err(3));

    let second = files(&cluster, "second", &ours, "10.77.0.2", false);
    job.start(2, &second, "--meet --exit 0");
    assert_eq!(job.end()[..2], [0, 0]);
    assert_eq!(job.json("manifest.json")["world_size"], 4);
}

#[test]
fn an_agent_with_tls_is_refused_by_a_coordinator_without() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let ours = ca("cluster");
    fs_err::write(cluster.scene.path("ca.cert"), ours.pem()).unwrap();
    let mut job = Job::new(&cluster);
    job.start(1, "--nodes 2", "--meet --exit 0");
    job.wait_until_joined(1);
    let second = files(&cluster, "second", &ours, "10.77.0.2", false);
    job.start(2, &second, "--meet --exit 0");
    assert_eq!(job.end_of(2), exit::PREFLIGHT);
    let text = "error: cannot join the job: 10.77.0.1:29400 does not speak TLS\n  hint: give the TLS files to all nodes, or to none";
    assert!(job.err(2).starts_with(text), "{}", job.err(2));
    assert!(job.took(2) < AT_ONCE);
    let refused = &job.wait_for("refused", 1)[0];
    let why = refused["why"].as_str().unwrap();
    assert!(why.contains("which is TLS\n  hint: "), "{refused}");

    // It does no harm, and the node may come again.
    job.start(2, "--nodes 2", "--meet --exit 0");
    assert_eq!(job.end(), [0, 0]);
}
