//! The facade: start, store, get, shut down.

use crate::config::{DhtConfig, StartError};
use crate::node::{ASKED_MAX, Node, Stats};
use crate::record::RecordValidator;
use crate::search::{Found, StoreReport};
use crate::signed::Ed25519Validator;
use crate::upkeep;
use crate::wire::PROTOCOL;
use bytes::Bytes;
use potluck_net::{Env, Outcome, PeerId, Protocol, Tasks, Transport, rpc};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Streams that may wait to be answered; more are refused as busy.
const BACKLOG: usize = 256;
/// Requests that are read at a time. One peer has its share, twice what an honest one asks at a time.
const PLACES: rpc::Places = rpc::Places { total: 256, per_peer: 2 * ASKED_MAX };
/// News that wait for the upkeep task.
const NEWS_MAX: usize = 256;

/// How often a waiting caller looks whether the node has joined.
const JOIN_POLL: Duration = Duration::from_millis(20);

/// One node of the DHT. Clones are the same node; its tasks end when the last clone is dropped or after
/// [`Dht::shutdown`].
#[derive(Clone)]
pub struct Dht {
    node: Arc<Node>,
    tasks: Tasks,
}

impl Dht {
    /// Start a node. It joins in the background and keeps trying for ever, so that a peer that starts before its
    /// initial peers finds them when they come up. Records with an owner tag ([`crate::owner_tag`]) are signed with
    /// the transport's identity.
    ///
    /// # Errors
    /// [`StartError`] if a setting makes no sense, or if the transport has a DHT already.
    #[expect(clippy::unused_async, reason = "starting may have to wait one day; callers await it already")]
    pub async fn start(
        transport: Arc<dyn Transport>,
        env: Env,
        config: DhtConfig,
    ) -> Result<Self, StartError> {
        config.check()?;
        let incoming =
            if config.client_mode { None } else { Some(transport.accept(Protocol::new(PROTOCOL), BACKLOG)?) };
        // Only a start value: holders that have a higher version of our records tell us so.
        let first_version = u64::try_from(env.unix_time().as_micros()).unwrap_or(1);
        let validator = Ed25519Validator::new(transport.identity().clone(), first_version);
        let (news_sender, news) = mpsc::channel(NEWS_MAX);
        let node = Arc::new(Node::new(transport, env, config, news_sender));
        node.state().validators.add(Arc::new(validator));
        let tasks = Tasks::new();
        if let Some(incoming) = incoming {
            let node = node.clone();
            rpc::serve(incoming, &tasks, PLACES, move |peer, request| {
                let answer = node.answer(peer, request);
                async move { Some(answer) }
            });
        }
        tasks.spawn(upkeep::run(node.clone(), news));
        Ok(Self { node, tasks })
    }

    /// Wait until one initial peer has answered, at most this long; whether one has. At once if there are none. What is
    /// looked up before that is not found.
    pub async fn wait_joined(&self, limit: Duration) -> bool {
        let deadline = self.node.env.now() + limit;
        while self.routing_table_len() == 0 && !self.node.config.initial_peers.is_empty() {
            if self.node.env.now() >= deadline {
                return false;
            }
            tokio::time::sleep(JOIN_POLL).await;
        }
        true
    }

    /// Keep `value` under `key` (or under `subkey` of `key`) on the nodes nearest to the key for `expires_in`.
    ///
    /// A store under the same key wins over earlier ones if it expires later; for records with our owner tag the
    /// later store always wins. There is no delete: store something shorter-lived or empty instead.
    pub async fn store(
        &self,
        key: &[u8],
        subkey: Option<&[u8]>,
        value: Bytes,
        expires_in: Duration,
    ) -> Outcome<StoreReport> {
        self.node.store(key, subkey, value, expires_in).await
    }

    /// What is stored under `key`. With `latest`, every node near the key is asked and their answers are merged; without
    /// it the first value that is found will do.
    pub async fn get(&self, key: &[u8], latest: bool) -> Outcome<Option<Found>> {
        self.node.get(key, latest).await.0
    }

    /// As [`Dht::get`], and over how many hops the first value came (0: it was here).
    pub async fn get_with_hops(&self, key: &[u8], latest: bool) -> (Outcome<Option<Found>>, usize) {
        self.node.get(key, latest).await
    }

    /// Add a rule that records must obey, when we store them, when others store them here, and when we read them.
    pub fn add_validator(&self, validator: Arc<dyn RecordValidator>) {
        self.node.state().validators.add(validator);
    }

    /// Number of nodes that we know.
    pub fn routing_table_len(&self) -> usize {
        self.node.state().table.len()
    }

    /// Our name.
    pub fn local_peer(&self) -> PeerId {
        self.node.transport.local_peer()
    }

    /// The network that this node stands on.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.node.transport
    }

    /// Counters for people.
    pub fn stats(&self) -> Stats {
        let state = self.node.state();
        Stats {
            keys: state.storage.len(),
            storage_bytes: state.storage.bytes(),
            nodes: state.table.len(),
            ..state.stats
        }
    }

    /// End every task and stop answering. Idempotent.
    pub async fn shutdown(&self) {
        self.tasks.shutdown().await;
    }
}

impl std::fmt::Debug for Dht {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Dht({:?}, {:?})", self.local_peer(), self.stats())
    }
}
