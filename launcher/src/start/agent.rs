//! An agent that another process coordinates: dialled by hand, or held by ssh or srun.

use clap::{ArgGroup, Parser};
use std::io::Write;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tsm_job::config::duration;
use tsm_job::exit::{self, Coded};

use super::by_hand;
use super::children::HERE;
use crate::addresses;
use crate::cli::Gpus;
use crate::cluster::agent::{self, Leave, Setup};
use crate::cluster::key::Key;
use crate::cluster::link::Link;
use crate::cluster::message::{FromAgent, Join};
use crate::cluster::wire::{self, Connection, Role};
use crate::doctor::{self, Context};
use crate::logs::Shown;
use crate::own::Executable;
use crate::plan::{self, Devices};
use crate::{gpus, limits, manifest, say};

/// First argument of an agent that was started by the coordinator: `__agent`.
pub const AGENT: &str = "__agent";

/// How long the coordinator may take to prove itself over ssh.
const PROOF: Duration = Duration::from_secs(30);

/// The command line of [`AGENT`]. The key comes as the first line of stdin.
#[derive(Parser, Debug)]
#[command(name = "tsm-launch __agent", group(ArgGroup::new("way").args(["stdio", "connect"]).required(true)), group(ArgGroup::new("device").args(["gpus", "cpus"])))]
pub struct Args {
    /// The connection is stdin and stdout.
    #[arg(long)]
    pub stdio: bool,
    /// Dial these, until one answers.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub connect: Vec<String>,
    #[arg(long)]
    pub gpus: Option<Gpus>,
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Place of this node among all.
    #[arg(long)]
    pub order: Option<u32>,
    /// The variable that holds it.
    #[arg(long, conflicts_with = "order")]
    pub order_from: Option<String>,
    /// What this node is called, instead of its host name.
    #[arg(long)]
    pub host: Option<String>,
    /// The variable that holds it.
    #[arg(long, conflicts_with = "host")]
    pub host_from: Option<String>,
    /// Do not look at the machine first.
    #[arg(long)]
    pub no_preflight: bool,
    #[arg(long, value_parser = duration::parse, default_value = "60s")]
    pub join_timeout: Duration,
}

/// What every agent is made of.
pub struct Parts {
    pub start: Instant,
    pub host: String,
    pub devices: Devices,
    pub order: Option<u32>,
    /// Digest of the job on its own command line.
    pub job: Option<String>,
    /// What else is on it that counts on the first node alone.
    pub options: Vec<(String, String)>,
    pub key: Option<Key>,
    pub local: bool,
    pub shown: Option<Shown>,
    /// What to look at before; `None`: nothing.
    pub preflight: Option<Context>,
}

impl Parts {
    /// # Errors
    /// When this program cannot be found.
    pub fn setup(self) -> anyhow::Result<Setup> {
        let names = (0..self.devices.len())
            .map(|i| self.devices.name(i))
            .collect();
        let alone = self.local && self.key.is_none();
        let join = Join {
            version: env!("CARGO_PKG_VERSION").into(),
            host: self.host.clone(),
            order: self.order,
            pid: std::process::id() as i32,
            devices: names,
            gpus: self.devices.gpus().to_vec(),
            addresses: if alone { Vec::new() } else { addresses::list() },
            job: self.job,
            options: self.options,
            facts: self
                .preflight
                .as_ref()
                .map(doctor::facts)
                .unwrap_or_default(),
            received_ms: 0,
        };
        Ok(Setup {
            start: self.start,
            shim: Executable::own()?,
            host: self.host,
            devices: self.devices,
            join,
            key: self.key,
            local: self.local,
            shown: self.shown,
        })
    }
}

/// What a job with these devices wants of its node.
pub fn context(devices: &Devices, folder: Option<PathBuf>, trainer: Option<PathBuf>) -> Context {
    Context {
        gpus: devices.gpus().to_vec(),
        num_ranks: devices.len() as u32,
        folders: folder.into_iter().collect(),
        trainer,
    }
}

/// Runs the agent of `args`; the exit code.
///
/// # Errors
/// When the coordinator cannot be reached, or does not have the key.
pub fn main(args: &Args, start: Instant) -> anyhow::Result<i32> {
    let key = Key::read_fd(0)?;
    let named = args
        .host_from
        .as_ref()
        .and_then(|name| std::env::var(name).ok());
    let host = args.host.clone().or(named).unwrap_or_else(manifest::host);
    let order = match &args.order_from {
        Some(name) => std::env::var(name).ok().and_then(|text| text.parse().ok()),
        None => args.order,
    };
    // What keeps this node from taking part is said to the coordinator, whose words the user reads.
    let devices = plan::devices(args.gpus.as_ref(), args.cpus, None, gpus::visible);
    super::run_here(async {
        let connection = if args.stdio {
            over_stdio(&key).await?
        } else {
            dial_any(args, &key).await?
        };
        let link = Link::over(connection);
        let devices = match devices {
            Ok(devices) => devices,
            Err(e) => {
                return Ok(unfit(link, host, &e).await);
            }
        };
        let preflight = (!args.no_preflight).then(|| context(&devices, None, None));
        let parts = Parts {
            start,
            host,
            devices,
            order,
            job: None,
            options: Vec::new(),
            key: Some(key),
            local: false,
            shown: None,
            preflight,
        };
        let leave = agent::run(parts.setup()?, link).await?;
        Ok(finish(leave))
    })
}

/// Tells the coordinator why this node cannot take part, and waits for its leave.
async fn unfit(mut link: Link, host: String, e: &Coded) -> i32 {
    link.to.send(FromAgent::Unfit {
        host,
        code: e.code,
        message: e.message.clone(),
    });
    let told = tokio::time::timeout(Duration::from_secs(5), link.from.recv()).await;
    drop(told);
    e.code
}

/// Says why, where there is something to say; the exit code.
pub fn finish(leave: Leave) -> i32 {
    if let Some(message) = leave.message {
        // Its reader may be gone, as mpirun is when it was killed.
        say::tell(format_args!("error: {message}"));
    }
    leave.code
}

async fn dial_any(args: &Args, key: &Key) -> anyhow::Result<Connection> {
    let until = Instant::now() + args.join_timeout;
    let mut last = None;
    while last.is_none() || Instant::now() < until {
        for point in &args.connect {
            let Some((host, port)) = by_hand::host_and_port(point) else {
                let text = format!("--connect is {point:?}\n  hint: write HOST:PORT");
                return Err(Coded::new(exit::USAGE, text).into());
            };
            match by_hand::dial(host, port, key, None, Duration::from_secs(2)).await {
                Ok(connection) => return Ok(connection),
                Err(e) => last = Some(e),
            }
        }
    }
    Err(last.unwrap_or_else(|| anyhow::anyhow!("nobody to dial")))
}

/// Takes over stdin and stdout. Threads copy them, since a read of stdin that waits cannot be given up.
async fn over_stdio(key: &Key) -> anyhow::Result<Connection> {
    let (ours, theirs) = StdStream::pair()?;
    {
        std::io::stderr().write_all(HERE)?;
        let mut out = std::io::stdout().lock();
        out.write_all(HERE)?;
        out.flush()?;
    }
    let (mut to_us, mut from_us) = (theirs.try_clone()?, theirs);
    limits::thread("stdin", "reads the connection", move || {
        let _ = copy_fd(rustix::stdio::stdin(), &mut to_us);
        let _ = to_us.shutdown(std::net::Shutdown::Write);
    })?;
    limits::thread("stdout", "writes to the connection", move || {
        let mut out = std::io::stdout().lock();
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n) = std::io::Read::read(&mut from_us, &mut buffer)
            && n > 0
        {
            if out
                .write_all(&buffer[..n])
                .and_then(|()| out.flush())
                .is_err()
            {
                break;
            }
        }
    })?;
    ours.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(ours)?;
    let connection = wire::authenticate(Role::Agent, stream, "the coordinator", key, PROOF).await;
    connection.map_err(|refusal| Coded::from(refusal).into())
}

/// Past std's buffer, which may hold nothing: the key was read byte by byte.
fn copy_fd(from: impl std::os::fd::AsFd, to: &mut StdStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match rustix::io::read(&from, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n])?,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
