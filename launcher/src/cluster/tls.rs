//! TLS around a connection, with a certificate on both sides. The handshake with the job's key runs inside
//! and is bound to it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err::File;
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{
    AlertDescription, CertificateError, ClientConfig, Error, InvalidMessage, RootCertStore,
    ServerConfig, crypto, version,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tsm_job::exit::{self, Coded};

use super::key::{Key, open_private};
use super::wire::{Connection, Role, Why, open};

/// What the job's key proves itself over, so that the proof is of use in no other TLS session.
const BINDING: &[u8] = b"EXPORTER-tsm-wire";

/// PEM files of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate of this node, with those between it and the CA behind it. It holds for the host name or
    /// address by which agents reach this node.
    pub cert: PathBuf,
    /// Its private key, which nobody else may read.
    pub key: PathBuf,
    /// Who signed the certificates of all nodes.
    pub ca: PathBuf,
}

/// TLS 1.3 for one node, as coordinator or agent. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    files: Arc<TlsFiles>,
}

impl Tls {
    /// # Errors
    /// [`exit::USAGE`] when a file cannot be used, with its name and why.
    pub fn load(files: &TlsFiles) -> Result<Tls, Coded> {
        let key = private_key(&files.key)?;
        let chain = certificates(&files.cert, "TLS certificate")?;
        let mut roots = RootCertStore::empty();
        for ca in certificates(&files.ca, "TLS CA")? {
            let added = roots.add(ca);
            added.map_err(|e| refuse("TLS CA", &files.ca, &e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(crypto::ring::default_provider());
        let versions = &[&version::TLS13];

        let pair = |e: Error| {
            let problem = match e {
                Error::InconsistentKeys(_) => {
                    format!("{} is not its private key", files.key.display())
                }
                e => e.to_string(),
            };
            refuse("TLS certificate", &files.cert, &problem)
        };
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|e| refuse("TLS CA", &files.ca, &e.to_string()))?;
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(pair)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(pair)?;
        Ok(Tls {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
            files: Arc::new(files.clone()),
        })
    }

    pub(super) async fn accept(
        &self,
        stream: TcpStream,
        peer: &str,
        key: &Key,
    ) -> Result<Connection, Why> {
        let work = async {
            let stream = self.acceptor.accept(stream).await?;
            let session = stream.get_ref().1;
            let binding = session.export_keying_material([0; 32], BINDING, None);
            open(stream, peer, key, Role::Coordinator, &binding.map_err(tls)?).await
        };
        work.await.map_err(|why| self.explain(why))
    }

    /// `host` is what the other side's certificate must hold for.
    pub(super) async fn connect(
        &self,
        stream: TcpStream,
        host: &str,
        peer: &str,
        key: &Key,
    ) -> Result<Connection, Why> {
        let name = ServerName::try_from(host.to_string());
        let name = name.map_err(|e| Why::Tls(format!("cannot have a TLS certificate: {e}")))?;
        let work = async {
            let stream = self.connector.connect(name, stream).await?;
            let session = stream.get_ref().1;
            let binding = session.export_keying_material([0; 32], BINDING, None);
            open(stream, peer, key, Role::Agent, &binding.map_err(tls)?).await
        };
        work.await.map_err(|why| self.explain(why))
    }

    /// An agent hears that its certificate was refused only when it reads, so this looks at every error.
    fn explain(&self, why: Why) -> Why {
        let Why::Io(e) = &why else { return why };
        let Some(problem) = e.get_ref().and_then(|e| e.downcast_ref::<Error>()) else {
            return why;
        };
        let (cert, ca) = (self.files.cert.display(), self.files.ca.display());
        Why::Tls(match problem {
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
                "does not speak TLS\n  hint: give the TLS files to all nodes, or to none".into()
            }
            Error::NoCertificatesPresented => {
                "has no TLS certificate\n  hint: give the TLS files to all nodes, or to none".into()
            }
            Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
                format!("has a TLS certificate that {ca} did not sign")
            }
            Error::InvalidCertificate(e) => {
                format!("has a TLS certificate that does not hold: {e}")
            }
            Error::AlertReceived(
                alert @ (AlertDescription::UnknownCA
                | AlertDescription::DecryptError
                | AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRequired
                | AlertDescription::AccessDenied),
            ) => format!("refused this node's TLS certificate {cert}: {alert:?}"),
            e => format!("and this node cannot agree on TLS: {e}"),
        })
    }
}

fn tls(e: Error) -> Why {
    Why::Tls(format!("and this node cannot agree on TLS: {e}"))
}

fn refuse(what: &str, path: &Path, problem: &str) -> Coded {
    let path = path.display();
    let text = format!("cannot use the {what} {path}: {problem}");
    Coded::new(exit::USAGE, text)
}

fn certificates(path: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>, Coded> {
    let text = fs_err::read(path);
    let text = text.map_err(|e| Coded::new(exit::USAGE, format!("cannot use the {what}: {e}")))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let chain = chain.map_err(|e| refuse(what, path, &format!("it is no PEM file: {e}")))?;
    if chain.is_empty() {
        return Err(refuse(what, path, "there is no certificate in it"));
    }
    Ok(chain)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Coded> {
    const WHAT: &str = "TLS private key";
    let mut text = Vec::new();
    let mut file: File = open_private(path, WHAT)?;
    let read = file.read_to_end(&mut text);
    read.map_err(|e| refuse(WHAT, path, &e.to_string()))?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|e| {
        let hint = "it has to begin with -----BEGIN PRIVATE KEY----- and be without a passphrase";
        refuse(WHAT, path, &format!("{e}\n  hint: {hint}"))
    })
}

#[cfg(test)]
mod tests;
