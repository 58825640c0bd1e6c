//! One peer: its identity, its way to others, and the DHT it shares with them. Runs are joined through it.

use crate::directory::{DhtDirectory, JOIN_LIMIT};
use crate::error::Error;
use crate::hub::{Hub, LocalDialect, Run};
use crate::runtime;
use bytes::Bytes;
use potluck_collab::{Invite, JoinError, Session, SessionConfig};
use potluck_dht::{Dht, DhtConfig, Found};
use potluck_net::{Env, Identity, PeerId, Token, TokenError, Transport, Watermarks};
use potluck_net_libp2p::{BootstrapAttempt, Config, Libp2pTransport, identity_file};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// What Python decides about a node.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    /// Multiaddrs to listen on; the default listens everywhere.
    listen: Option<Vec<String>>,
    /// Multiaddrs to tell others instead of those found.
    announce: Vec<String>,
    /// Peers to ask first.
    bootstrap: Vec<String>,
    /// Where the key is kept; a fresh one without it.
    identity_path: Option<String>,
    client_mode: bool,
    relay_server: bool,
    port_mapping: bool,
    num_replicas: usize,
    rpc_timeout: f64,
}

/// How a node reaches others.
enum Reach {
    /// Within this process.
    Local(Arc<Mutex<BTreeMap<String, Arc<Run>>>>),
    /// Over the network.
    Net { transport: Arc<Libp2pTransport>, dht: Dht, _identity_lock: Option<identity_file::Lock> },
}

/// One peer.
#[pyclass(frozen, module = "potluck._core")]
pub(crate) struct Node {
    identity: Identity,
    env: Env,
    reach: Reach,
    /// Whether this peer has left the network.
    left: watch::Sender<bool>,
}

/// A record: `(subkey, value, seconds it will live)`.
type Entry<'py> = (Option<Bound<'py, PyBytes>>, Bound<'py, PyBytes>, f64);

#[pymethods]
impl Node {
    /// A peer that meets others of this process only.
    #[staticmethod]
    fn local(hub: &Hub) -> Result<Self, Error> {
        let handle = runtime::handle()?;
        let _guard = handle.enter();
        let env = Env::real();
        let identity = Identity::from_seed(&env.random_bytes());
        Ok(Self { identity, env, reach: Reach::Local(hub.runs.clone()), left: watch::Sender::new(false) })
    }

    /// A peer of the real network, as `options` (JSON) say.
    #[staticmethod]
    fn start(py: Python<'_>, options: &str) -> Result<Self, Error> {
        let options: Options = serde_json::from_str(options)
            .map_err(|error| Error::Value(format!("options of the DHT: {error}")))?;
        runtime::wait(py, start(options))
    }

    /// The peer's public name.
    #[getter]
    fn peer_id(&self) -> String {
        self.identity.peer_id().to_string()
    }

    /// Addresses under which others may reach this peer, best first.
    fn addresses(&self) -> Vec<String> {
        match &self.reach {
            Reach::Local(_) => Vec::new(),
            Reach::Net { transport, .. } => transport.addresses(),
        }
    }

    /// Wait until one initial peer is connected, at most this long: one line per address, and whether one is.
    fn wait_bootstrapped(&self, py: Python<'_>, seconds: f64) -> Result<(bool, Vec<String>), Error> {
        let Reach::Net { transport, .. } = &self.reach else { return Ok((true, Vec::new())) };
        let limit = runtime::seconds("seconds", Some(seconds))?.unwrap_or(Duration::from_secs(86400));
        let connected = runtime::wait(py, async {
            let deadline = tokio::time::Instant::now() + limit;
            Ok(transport.wait_bootstrapped(deadline).await.is_ok())
        })?;
        let lines = transport.bootstrap_report().iter().map(BootstrapAttempt::to_string).collect();
        Ok((connected, lines))
    }

    /// Keep a value; how many nodes hold it now. Waits for an initial peer, for a few seconds.
    fn store(
        &self,
        py: Python<'_>,
        key: Vec<u8>,
        subkey: Option<Vec<u8>>,
        value: Vec<u8>,
        seconds: f64,
    ) -> Result<usize, Error> {
        let lifetime = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let dht = self.dht()?;
        let work = async {
            // What is stored before an initial peer has answered is kept by nobody but us.
            dht.wait_joined(JOIN_LIMIT).await;
            let stored = dht.store(&key, subkey.as_deref(), Bytes::from(value), lifetime).await.value;
            match stored.problem {
                Some(problem) => Err(Error::Value(problem.to_string())),
                None => Ok(stored.accepted),
            }
        };
        runtime::wait(py, self.while_here(work))
    }

    /// What is stored under a key, as a list of records; `None` if nothing is.
    fn get<'py>(
        &self,
        py: Python<'py>,
        key: Vec<u8>,
        latest: bool,
    ) -> Result<Option<Vec<Entry<'py>>>, Error> {
        let dht = self.dht()?;
        let work = async {
            // What is looked up before an initial peer has answered is not found, whoever has it.
            dht.wait_joined(JOIN_LIMIT).await;
            Ok(dht.get(&key, latest).await.value)
        };
        let found = runtime::wait(py, self.while_here(work))?;
        let bytes = |value: &Bytes| PyBytes::new(py, value);
        Ok(found.map(|found| match found {
            Found::Regular(value, left) => vec![(None, bytes(&value), left.as_secs_f64())],
            Found::Dictionary(entries) => entries
                .iter()
                .map(|(subkey, (value, left))| (Some(bytes(subkey)), bytes(value), left.as_secs_f64()))
                .collect(),
        }))
    }

    /// Number of nodes that this one knows.
    fn known_nodes(&self) -> usize {
        match &self.reach {
            Reach::Local(_) => 0,
            Reach::Net { dht, .. } => dht.routing_table_len(),
        }
    }

    /// A line that lets others join a run through this peer; a closed run takes an invite in it. The first peer waits for
    /// its router first, at most three seconds after its start: others need the address that only the router knows.
    #[pyo3(signature = (run_id, invite = None))]
    fn token(&self, py: Python<'_>, run_id: String, invite: Option<String>) -> Result<String, Error> {
        if let Reach::Net { transport, .. } = &self.reach
            && transport.bootstrap_peers().is_empty()
        {
            runtime::wait(py, async {
                transport.wait_mapped().await;
                Ok(())
            })?;
        }
        let bootstrap: Vec<String> = self.addresses().into_iter().take(12).collect();
        let token = Token { run_id, bootstrap, invite: invite.map(String::into_bytes) };
        token.validate().map_err(|error| Error::Value(error.to_string()))?;
        Ok(token.to_string())
    }

    /// `(run id, addresses, invite)` of a token.
    #[staticmethod]
    fn read_token(text: &str) -> Result<(String, Vec<String>, Option<String>), Error> {
        let token: Token = text.parse().map_err(|error: TokenError| Error::Value(error.to_string()))?;
        let invite = token.invite.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok((token.run_id, token.bootstrap, invite))
    }

    /// An invite to the closed run `run_id` that this peer owns, as text.
    fn invite(&self, run_id: &str) -> String {
        Invite::issue(&self.identity, run_id).to_text()
    }

    /// Leave the network; at most `seconds`.
    fn shutdown(&self, py: Python<'_>, seconds: f64) -> Result<(), Error> {
        let Reach::Net { transport, dht, .. } = &self.reach else { return Ok(()) };
        self.left.send_replace(true);
        let limit = runtime::seconds("seconds", Some(seconds))?.unwrap_or(Duration::from_secs(5));
        runtime::wait(py, async {
            // A peer that cannot say goodbye in time is dropped all the same.
            let _closed = tokio::time::timeout(limit, async {
                dht.shutdown().await;
                transport.close().await;
            })
            .await;
            transport.abort();
            Ok(())
        })
    }
}

async fn start(options: Options) -> Result<Node, Error> {
    let env = Env::real();
    let (identity, lock) = match &options.identity_path {
        Some(path) => {
            let (identity, lock) = identity_file::load_or_create(path, &env)
                .map_err(|error| Error::Value(format!("identity_path: {error}")))?;
            (identity, Some(lock))
        }
        None => (Identity::from_seed(&env.random_bytes()), None),
    };
    let mut config = Config::new(identity.clone());
    if let Some(listen) = options.listen {
        config.listen = listen;
    }
    config.announce = options.announce;
    config.bootstrap = options.bootstrap;
    config.client_mode = options.client_mode;
    config.relay_server = options.relay_server;
    if options.relay_server {
        config.connections = Watermarks::NODE;
    }
    config.port_mapping = options.port_mapping;
    let transport =
        Libp2pTransport::start(config, env.clone()).await.map_err(|error| Error::Value(error.to_string()))?;
    let config = DhtConfig {
        initial_peers: transport.bootstrap_peers(),
        client_mode: options.client_mode,
        num_replicas: options.num_replicas,
        rpc_timeout: Duration::try_from_secs_f64(options.rpc_timeout).unwrap_or(Duration::from_secs(3)),
        ..DhtConfig::default()
    };
    let dht = Dht::start(transport.clone(), env.clone(), config)
        .await
        .map_err(|error| Error::Value(error.to_string()))?;
    let reach = Reach::Net { transport, dht, _identity_lock: lock };
    Ok(Node { identity, env, reach, left: watch::Sender::new(false) })
}

impl Node {
    fn dht(&self) -> Result<&Dht, Error> {
        match &self.reach {
            Reach::Local(_) => Err(Error::State("peers of one process have no DHT".to_owned())),
            Reach::Net { dht, .. } => Ok(dht),
        }
    }

    /// `work`, or an error as soon as this peer leaves: then nothing is going to answer.
    async fn while_here<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let mut left = self.left.subscribe();
        tokio::select! {
            biased;
            done = work => done,
            _ = left.wait_for(|left| *left) => Err(Error::State("this DHT was shut down".to_owned())),
        }
    }

    /// Peers that were given as initial peers.
    fn bootstrap(&self) -> Vec<PeerId> {
        match &self.reach {
            Reach::Local(_) => Vec::new(),
            Reach::Net { transport, .. } => transport.bootstrap_peers(),
        }
    }

    /// Join a run.
    pub(crate) fn join(&self, py: Python<'_>, mut config: SessionConfig) -> Result<Session, Error> {
        config.bootstrap = self.bootstrap();
        let wrong = |error: JoinError| match error {
            JoinError::Network(_) => Error::Peer(error.to_string()),
            _ => Error::Value(error.to_string()),
        };
        match &self.reach {
            Reach::Local(runs) => {
                let run = {
                    let mut runs = runs.lock().unwrap_or_else(PoisonError::into_inner);
                    runs.entry(config.run_id.clone()).or_default().clone()
                };
                let handle = runtime::handle()?;
                py.detach(|| {
                    let _guard = handle.enter();
                    let dialect = LocalDialect::join(
                        run,
                        self.identity.peer_id(),
                        config.auxiliary,
                        config.client_mode,
                    );
                    Session::with_dialect(Arc::new(dialect), self.env.clone(), config).map_err(wrong)
                })
            }
            Reach::Net { transport, dht, .. } => {
                config.directory = Some(Arc::new(DhtDirectory(dht.clone())));
                let transport: Arc<dyn Transport> = transport.clone();
                let env = self.env.clone();
                runtime::wait(py, async { Session::join(transport, env, config).await.map_err(wrong) })
            }
        }
    }
}
