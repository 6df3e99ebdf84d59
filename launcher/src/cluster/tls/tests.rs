use super::*;
use crate::cluster::wire::{Fault, Refusal, dial, listen, serve};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const LONG: Duration = Duration::from_secs(60);

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca(name: &str) -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// The files of a node, whose certificate `signer` signed and who trusts `trusted`.
fn files(dir: &TempDir, node: &str, signer: &Ca, trusted: &Ca, host: &str) -> TlsFiles {
    let params = CertificateParams::new(vec![host.to_string()]).unwrap();
    files_for(dir, node, params, signer, trusted)
}

fn files_for(
    dir: &TempDir,
    node: &str,
    params: CertificateParams,
    signer: &Ca,
    trusted: &Ca,
) -> TlsFiles {
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, signer).unwrap();
    let path = |kind: &str| dir.path().join(format!("{node}.{kind}"));
    let files = TlsFiles {
        cert: path("cert"),
        key: path("key"),
        ca: path("ca"),
    };
    fs_err::write(&files.cert, cert.pem()).unwrap();
    fs_err::write(&files.key, key.serialize_pem()).unwrap();
    set_mode(&files.key, 0o600);
    fs_err::write(&files.ca, trusted.pem()).unwrap();
    files
}

fn set_mode(path: &Path, mode: u32) {
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn problem(files: &TlsFiles) -> String {
    let error = Tls::load(files).err().expect("a refusal");
    assert_eq!(error.code, exit::USAGE);
    error.message
}

/// A coordinator on loopback.
struct Coordinator {
    address: SocketAddr,
    arrivals: mpsc::Receiver<Result<Connection, Refusal>>,
    _server: JoinHandle<()>,
}

fn coordinator(key: &Key, tls: Option<Tls>) -> Coordinator {
    let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let (arrive, arrivals) = mpsc::channel(1);
    Coordinator {
        address,
        arrivals,
        _server: tokio::spawn(serve(listener, key.clone(), tls, arrive)),
    }
}

impl Coordinator {
    /// What both sides say of an agent that dials.
    async fn meet(
        &mut self,
        key: &Key,
        tls: Option<&Tls>,
    ) -> (Result<Connection, Refusal>, Result<Connection, Refusal>) {
        let dialled = dial("127.0.0.1", self.address.port(), key, tls, LONG);
        tokio::join!(self.arrival(), dialled)
    }

    /// Who has arrived; nobody does where nobody can dial.
    async fn arrival(&mut self) -> Result<Connection, Refusal> {
        let arrival = tokio::time::timeout(2 * LONG, self.arrivals.recv()).await;
        arrival.expect("somebody dials").unwrap()
    }
}

/// The part of a refusal behind the name of the other side.
fn why(result: Result<Connection, Refusal>) -> String {
    result.err().expect("a refusal").why.to_string()
}

#[tokio::test]
async fn two_nodes_of_one_ca_talk() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), ca("ours"));
    let load = |node| Tls::load(&files(&dir, node, &ca, &ca, "127.0.0.1")).unwrap();
    let (key, first, second) = (Key::random(), load("first"), load("second"));
    let mut coordinator = coordinator(&key, Some(first));
    let (ours, theirs) = coordinator.meet(&key, Some(&second)).await;
    let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
    let long = "x".repeat(300_000);
    let (sent, received) = tokio::join!(theirs.sender.send(&long), ours.receiver.recv::<String>());
    sent.unwrap();
    assert_eq!(received.unwrap().unwrap(), long);
    ours.sender.send(&7).await.unwrap();
    assert_eq!(theirs.receiver.recv().await.unwrap(), Some(7));
    theirs.sender.close().await.unwrap();
    assert_eq!(ours.receiver.recv::<u32>().await.unwrap(), None);

    // Who is killed says nothing, neither we nor TLS.
    let (ours, theirs) = coordinator.meet(&key, Some(&second)).await;
    drop(theirs.unwrap());
    let error = ours.unwrap().receiver.recv::<u32>().await.unwrap_err();
    assert!(matches!(error.fault, Fault::Cut), "{error}");
}

#[tokio::test]
async fn the_key_counts_inside_tls_too() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), ca("ours"));
    let tls = Tls::load(&files(&dir, "node", &ca, &ca, "127.0.0.1")).unwrap();
    let mut coordinator = coordinator(&Key::random(), Some(tls.clone()));
    let (ours, theirs) = coordinator.meet(&Key::random(), Some(&tls)).await;
    assert!(matches!(ours.err().unwrap().why, Why::WrongKey));
    assert!(matches!(theirs.err().unwrap().why, Why::WrongKey));
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, other) = (ca("ours"), ca("another"));
    let key = Key::random();
    let honest = files(&dir, "honest", &ca, &ca, "127.0.0.1");
    let tls = Tls::load(&honest).unwrap();

    // The agent trusts the right CA, but its own certificate is from elsewhere.
    let stranger = files(&dir, "stranger", &other, &ca, "127.0.0.1");
    let mut coordinator = coordinator(&key, Some(tls.clone()));
    let agent = Tls::load(&stranger).unwrap();
    let (ours, theirs) = coordinator.meet(&key, Some(&agent)).await;
    let expected = format!(
        "has a TLS certificate that {} did not sign",
        honest.ca.display()
    );
    assert_eq!(why(ours), expected);
    let cert = stranger.cert.display();
    assert_eq!(
        why(theirs),
        format!("refused this node's TLS certificate {cert}: UnknownCA")
    );

    // The agent does not know the coordinator's CA.
    let distrustful = files(&dir, "distrustful", &ca, &other, "127.0.0.1");
    let agent = Tls::load(&distrustful).unwrap();
    let (ours, theirs) = coordinator.meet(&key, Some(&agent)).await;
    let expected = format!(
        "has a TLS certificate that {} did not sign",
        distrustful.ca.display()
    );
    assert_eq!(why(theirs), expected);
    let cert = honest.cert.display();
    assert_eq!(
        why(ours),
        format!("refused this node's TLS certificate {cert}: UnknownCA")
    );
}

#[tokio::test]
async fn a_certificate_must_hold_for_the_host_and_the_day() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), ca("ours"));
    let key = Key::random();
    let agent = Tls::load(&files(&dir, "agent", &ca, &ca, "127.0.0.1")).unwrap();

    let elsewhere = files(&dir, "elsewhere", &ca, &ca, "gpu-09");
    let mut server = coordinator(&key, Some(Tls::load(&elsewhere).unwrap()));
    let (_, theirs) = server.meet(&key, Some(&agent)).await;
    let text = why(theirs);
    assert!(
        text.starts_with("has a TLS certificate that does not hold: "),
        "{text}"
    );
    assert!(
        text.contains("127.0.0.1") && text.contains("gpu-09"),
        "{text}"
    );

    let mut params = CertificateParams::new(vec!["127.0.0.1".to_string()]).unwrap();
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let old = files_for(&dir, "old", params, &ca, &ca);
    let mut server = coordinator(&key, Some(Tls::load(&old).unwrap()));
    let (ours, theirs) = server.meet(&key, Some(&agent)).await;
    let text = why(theirs);
    assert!(text.contains("expired"), "{text}");
    let text = why(ours);
    let cert = old.cert.display();
    assert_eq!(
        text,
        format!("refused this node's TLS certificate {cert}: CertificateExpired")
    );
}

#[tokio::test]
async fn an_agent_without_a_certificate_is_refused() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), ca("ours"));
    let tls = Tls::load(&files(&dir, "node", &ca, &ca, "127.0.0.1")).unwrap();
    let key = Key::random();
    let mut coordinator = coordinator(&key, Some(tls.clone()));
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let anonymous = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let anonymous = Tls {
        connector: TlsConnector::from(Arc::new(anonymous)),
        ..tls
    };
    let (ours, theirs) = coordinator.meet(&key, Some(&anonymous)).await;
    assert!(why(ours).starts_with("has no TLS certificate\n  hint: "));
    let text = why(theirs);
    assert!(
        text.starts_with("refused this node's TLS certificate "),
        "{text}"
    );
    assert!(text.ends_with(": CertificateRequired"), "{text}");
}

#[tokio::test]
async fn tls_on_one_side_only_is_named_on_both() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), ca("ours"));
    let tls = Tls::load(&files(&dir, "node", &ca, &ca, "127.0.0.1")).unwrap();
    let key = Key::random();
    let no_tls = "does not speak TLS\n  hint: give the TLS files to all nodes, or to none";
    let is_tls = ", which is TLS\n  hint: give the TLS files to all nodes, or to none";

    let (ours, theirs) = coordinator(&key, Some(tls.clone())).meet(&key, None).await;
    assert_eq!(why(ours), no_tls);
    let text = why(theirs);
    assert!(text.ends_with(is_tls), "{text}");

    let (ours, theirs) = coordinator(&key, None).meet(&key, Some(&tls)).await;
    let text = why(ours);
    assert!(text.ends_with(is_tls), "{text}");
    assert_eq!(why(theirs), no_tls);
}

#[tokio::test]
async fn a_certificate_does_not_let_anybody_stand_in_the_middle() {
    // Somebody with a good certificate, but without the key, passes everything on, decrypted.
    let (dir, ca) = (tempfile::tempdir().unwrap(), ca("ours"));
    let tls = Tls::load(&files(&dir, "node", &ca, &ca, "127.0.0.1")).unwrap();
    let key = Key::random();
    let mut coordinator = coordinator(&key, Some(tls.clone()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (middle, address) = (tls.clone(), coordinator.address);
    let middle = tokio::spawn(async move {
        let (from, _) = listener.accept().await.unwrap();
        let to = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut from = middle.acceptor.accept(from).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let mut to = middle.connector.connect(name, to).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
    });
    let dialled = dial("127.0.0.1", port, &key, Some(&tls), LONG);
    let (ours, theirs) = tokio::join!(coordinator.arrival(), dialled);
    assert!(matches!(ours.err().unwrap().why, Why::WrongKey));
    assert!(matches!(theirs.err().unwrap().why, Why::WrongKey));
    middle.await.unwrap();
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), ca("ours"));
    let good = files(&dir, "good", &ca, &ca, "127.0.0.1");
    let other = files(&dir, "other", &ca, &ca, "127.0.0.1");
    let none = dir.path().join("none");
    let text = dir.path().join("text");
    fs_err::write(&text, "hello\n").unwrap();
    let torn = dir.path().join("torn");
    fs_err::write(
        &torn,
        "-----BEGIN CERTIFICATE-----\n####\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    for path in [&text, &torn] {
        set_mode(path, 0o600);
    }

    let with_cert = |cert: &PathBuf| TlsFiles {
        cert: cert.clone(),
        ..good.clone()
    };
    let with_key = |key: &PathBuf| TlsFiles {
        key: key.clone(),
        ..good.clone()
    };
    let with_ca = |ca: &PathBuf| TlsFiles {
        ca: ca.clone(),
        ..good.clone()
    };
    let cases = [
        (with_cert(&none), "TLS certificate", &none),
        (with_cert(&text), "TLS certificate", &text),
        (with_cert(&torn), "TLS certificate", &torn),
        (with_key(&none), "TLS private key", &none),
        (with_key(&text), "TLS private key", &text),
        (with_ca(&none), "TLS CA", &none),
        (with_ca(&text), "TLS CA", &text),
    ];
    for (files, what, path) in cases {
        let problem = problem(&files);
        let path = path.display().to_string();
        let start = format!("cannot use the {what}");
        assert!(
            problem.starts_with(&start) && problem.contains(&path),
            "{problem}"
        );
    }
    let mismatch = problem(&with_key(&other.key));
    let (cert, key) = (good.cert.display(), other.key.display());
    let expected = format!("cannot use the TLS certificate {cert}: {key} is not its private key");
    assert_eq!(mismatch, expected);

    set_mode(&good.key, 0o640);
    let open = problem(&good);
    let key = good.key.display();
    let expected = format!(
        "cannot use the TLS private key {key}: its mode is 0640, so others have access\n  hint: chmod 600 {key}"
    );
    assert_eq!(open, expected);
}
