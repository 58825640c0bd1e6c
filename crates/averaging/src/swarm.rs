//! Membership of one run on one transport: control streams, heartbeats, gossip, and the routing of what arrives.
//!
//! Every event is handled synchronously under one short lock by the sans-I/O [`Membership`]; tasks only move frames and
//! wait for time.

mod sending;

pub use crate::config::{Directory, Manifest, SwarmConfig};
pub use crate::finding::JoinError;
use crate::link;
use crate::membership::{Action, Membership};
use crate::rates::{Downlink, Uplink};
use crate::router::Router;
use crate::view::View;
use crate::wire::{self, Control, Hello, PROTOCOL_VERSION, Progress, Pulse, RoundMessage};
use bytes::Bytes;
use futures::future::BoxFuture;
use potluck_net::{BufferPool, Env, PeerId, Protocol, Tasks, Transport};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

/// Live peers up to which everybody keeps a control stream to everybody.
const MESH_MAX: usize = 64;
/// Frames that may wait for a control stream.
const LINK_QUEUE: usize = 256;
/// Unplanned heartbeats are at least this far apart.
const BEAT_PAUSE: Duration = Duration::from_millis(20);
/// Control streams that may wait to be accepted.
const BACKLOG: usize = 64;

/// Receives what concerns one channel.
pub(crate) trait ChannelHandler: Send + Sync {
    fn message(&self, now: Instant, from: PeerId, message: RoundMessage);
    fn view_changed(&self, now: Instant);
    /// The peers of our group, some of which will coordinate the round of this epoch.
    fn leaders(&self, view: &View, epoch: u64) -> Vec<PeerId>;
}

/// Our membership of a run. Clones share it; the last one dropped ends it.
#[derive(Clone)]
pub struct Swarm {
    pub(crate) inner: Arc<Inner>,
    _tasks: Tasks,
}

/// Who is a member, for those who may outlive the [`Swarm`]: then nobody is.
#[derive(Clone)]
pub struct Roll(Weak<Inner>);

impl Roll {
    /// Whether this peer is a live member now.
    pub fn contains(&self, peer: &PeerId) -> bool {
        self.0.upgrade().is_some_and(|inner| inner.current_view().members.contains_key(peer))
    }
}

pub(crate) struct Link {
    pub(crate) id: u64,
    pub(crate) sender: mpsc::Sender<Bytes>,
}

pub(crate) struct State {
    pub(crate) membership: Membership,
    pub(crate) links: BTreeMap<PeerId, Vec<Link>>,
    next_link: u64,
    connecting: BTreeSet<PeerId>,
    channels: BTreeMap<String, Weak<dyn ChannelHandler>>,
    up: Uplink,
    down: Downlink,
    /// In a large swarm, those who are told at once that we begin an epoch, or who tell everybody; `None`: everybody.
    leaders: Option<BTreeSet<PeerId>>,
    beat_due: Option<Instant>,
    last_beat: Instant,
    /// When the ticker wakes by itself.
    armed: Instant,
}

pub(crate) struct Inner {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) env: Env,
    pub(crate) config: SwarmConfig,
    pub(crate) me: PeerId,
    pub(crate) router: Router,
    /// Memory of encoded chunks.
    pub(crate) pool: Arc<BufferPool>,
    state: Mutex<State>,
    view: watch::Sender<View>,
    /// Rung when the view has changed.
    news: Notify,
    wake: Notify,
    /// A handle that does not keep the tasks alive: they hold `Inner`, the public `Swarm` holds them.
    spawner: mpsc::Sender<BoxFuture<'static, ()>>,
    pub(crate) left: std::sync::atomic::AtomicBool,
}

impl Swarm {
    /// Join a run: contact the bootstrap peers in parallel and start heartbeats. Resolves with the first peer that
    /// accepts us, or at once if there is nobody to ask.
    ///
    /// # Errors
    /// [`JoinError`]; nothing stays behind.
    pub async fn join(
        transport: Arc<dyn Transport>,
        env: Env,
        config: SwarmConfig,
    ) -> Result<Self, JoinError> {
        config.check()?;
        let tasks = Tasks::new();
        let now = env.now();
        let me = transport.local_peer();
        let incoming = transport.accept(link::protocol(&config.run), BACKLOG)?;
        let round_streams = transport.accept(crate::router::protocol(&config.run), BACKLOG)?;
        let pulse = Pulse {
            process: env.random_u64() as u32 | 1,
            // Zero is what nobody has said yet: a hello before the first heartbeat counts as well.
            sequence: 1,
            client: config.client_mode,
            auxiliary: config.auxiliary,
            progress: config.progress.clone(),
            ..Pulse::default()
        };
        let (spawner, spawned) = mpsc::channel(1024);
        let inner = Arc::new(Inner {
            me,
            router: Router::default(),
            state: Mutex::new(State {
                membership: Membership::new(me, pulse, MESH_MAX, now),
                links: BTreeMap::new(),
                next_link: 0,
                connecting: BTreeSet::new(),
                channels: BTreeMap::new(),
                up: Uplink::default(),
                down: Downlink::default(),
                leaders: None,
                beat_due: None,
                last_beat: now,
                armed: now,
            }),
            view: watch::Sender::new(View::default()),
            news: Notify::new(),
            wake: Notify::new(),
            pool: Arc::default(),
            spawner,
            left: false.into(),
            transport,
            env,
            config,
        });
        inner.refresh_view(false);
        start_tasks(&inner, &tasks, spawned, incoming, round_streams);
        let swarm = Self { inner, _tasks: tasks };
        if let Err(error) = crate::finding::contact(&swarm.inner).await {
            // Only with the tasks gone are the protocols free, so that whoever is refused can try again at once.
            swarm._tasks.shutdown().await;
            return Err(error);
        }
        Ok(swarm)
    }

    /// Who is here, as it changes; ourselves included.
    pub fn members(&self) -> watch::Receiver<View> {
        let receiver = self.inner.view.subscribe();
        // From here on every report is in it at once.
        self.inner.refresh_view(true);
        receiver
    }

    /// Resolves when the view changes after this call. Those who wait go on in the order in which they began to, which tokio's
    /// watch channels draw at random: a simulated run must not depend on that.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + '_ {
        self.inner.news.notified()
    }

    /// Who is here now.
    pub fn view(&self) -> View {
        self.inner.refresh_view(true);
        self.inner.view.borrow().clone()
    }

    /// As [`Swarm::view`], without a copy of it; `at` must be quick and must not call us.
    pub fn look<R>(&self, at: impl FnOnce(&View) -> R) -> R {
        self.inner.refresh_view(true);
        at(&self.inner.view.borrow())
    }

    /// Whether this peer has said farewell, as far as we remember.
    pub fn has_left(&self, peer: &PeerId) -> bool {
        self.inner.lock().membership.has_left(peer)
    }

    /// Answers whether somebody is a member, and keeps nobody in the run.
    pub fn roll(&self) -> Roll {
        Roll(Arc::downgrade(&self.inner))
    }

    /// Who we are.
    pub fn local_peer(&self) -> PeerId {
        self.inner.me
    }

    /// What our next heartbeats say.
    pub fn report(&self, progress: Progress) {
        let app = progress.app.slice(..progress.app.len().min(wire::APP_BYTES_MAX));
        let progress = Progress { app, ..progress };
        let leaders = self.inner.leaders(progress.epoch);
        self.inner.with(|state, actions| {
            if !state.membership.is_urgent() {
                state.leaders = leaders;
            }
            state.membership.report(progress, actions);
        });
    }

    /// As [`Swarm::report`], and everybody is told at once instead of with the next heartbeat.
    pub fn report_now(&self, progress: Progress) {
        let app = progress.app.slice(..progress.app.len().min(wire::APP_BYTES_MAX));
        let progress = Progress { app, ..progress };
        self.inner.with(|state, actions| {
            state.leaders = None;
            state.membership.report_now(progress, actions);
        });
    }

    /// The transport below.
    pub fn transport(&self) -> Arc<dyn Transport> {
        self.inner.transport.clone()
    }

    /// Clock, randomness, CPU work.
    pub fn env(&self) -> Env {
        self.inner.env.clone()
    }

    /// The run's id.
    pub fn run(&self) -> &str {
        &self.inner.config.run
    }

    /// Tell everybody that we leave, and stop.
    pub async fn leave(&self) {
        self.inner.left.store(true, std::sync::atomic::Ordering::Relaxed);
        let frame = wire::encode_control(&Control::Leave);
        {
            let mut state = self.inner.lock();
            state.membership.leave();
            for link in state.links.values().flatten() {
                let _full_or_gone = link.sender.try_send(frame.clone());
            }
        }
        // The writers need one turn to pass the farewell on; a peer that misses it notices the closed stream.
        tokio::time::sleep(Duration::from_millis(20)).await;
        self._tasks.shutdown().await;
    }
}

fn start_tasks(
    inner: &Arc<Inner>,
    tasks: &Tasks,
    mut spawned: mpsc::Receiver<BoxFuture<'static, ()>>,
    incoming: potluck_net::Incoming,
    round_streams: potluck_net::Incoming,
) {
    let children = Tasks::new();
    tasks.spawn(async move {
        while let Some(task) = spawned.recv().await {
            children.spawn(task);
        }
    });
    tasks.spawn(link::accept(inner.clone(), incoming));
    tasks.spawn(crate::router::accept(inner.clone(), round_streams));
    let ticker = inner.clone();
    tasks.spawn(async move {
        loop {
            let wakeup = ticker.arm();
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(wakeup) => ticker.tick(),
                () = ticker.wake.notified() => {}
            }
        }
    });
    tasks.spawn(crate::finding::keep_finding(inner.clone()));
}

impl Inner {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handle one event and do what follows from it.
    pub(crate) fn with(self: &Arc<Self>, event: impl FnOnce(&mut State, &mut Vec<Action>)) {
        let mut actions = Vec::new();
        let now = self.env.now();
        let mut connect = Vec::new();
        {
            let mut state = self.lock();
            event(&mut state, &mut actions);
            for action in actions {
                match action {
                    Action::Connect(peer) => connect.push(peer),
                    Action::Ask { of, about } => state.send(of, &Control::Ask(about)),
                    Action::Introduce(peer, since) => {
                        for news in state.membership.introductions(since) {
                            state.send(peer, &Control::Introduce(news));
                        }
                    }
                    // Their tasks end with them.
                    Action::Release(peer) => _ = state.links.remove(&peer),
                    Action::Beat => {
                        let due = now.max(state.last_beat + BEAT_PAUSE);
                        state.beat_due = Some(state.beat_due.map_or(due, |other| other.min(due)));
                    }
                    Action::AddAddresses(peer, addresses) => self.transport.add_addresses(peer, &addresses),
                }
            }
            if state.beat_due.is_some_and(|due| due <= now) {
                state.send_beats(now);
            }
            if state.next_wakeup() < state.armed {
                self.wake.notify_one();
            }
        }
        for peer in connect {
            self.connect_soon(peer);
        }
        self.refresh_view(self.view.receiver_count() > 0);
    }

    /// Make the view anew where it has changed. In a large swarm most of what is heard are `reports` of peers that never average
    /// with us; those it shows only when somebody looks at it.
    fn refresh_view(&self, reports: bool) {
        let handlers: Vec<Arc<dyn ChannelHandler>> = {
            let mut state = self.lock();
            let reported = state.membership.has_reports();
            let due = state.membership.has_changes() || (reports && reported);
            if !due {
                if reported {
                    self.news.notify_waiters();
                }
                return;
            }
            let path = |peer| self.transport.path(peer);
            let changes = state.membership.take_changes(self.env.now(), reports, path);
            let mut matters = false;
            let differs = self.view.send_if_modified(|view| {
                let (differs, of_rounds) = view.apply(changes);
                matters = of_rounds;
                differs
            });
            if differs || reported {
                self.news.notify_waiters();
            }
            if !matters {
                return;
            }
            state.channels.retain(|_, handler| handler.strong_count() > 0);
            state.channels.values().filter_map(Weak::upgrade).collect()
        };
        for handler in handlers {
            handler.view_changed(self.env.now());
        }
    }

    /// When to wake; from now on, only an earlier time wakes the ticker.
    fn arm(&self) -> Instant {
        let mut state = self.lock();
        state.armed = state.next_wakeup();
        state.armed
    }

    fn tick(self: &Arc<Self>) {
        let now = self.env.now();
        let reachability = self.transport.reachability();
        self.with(|state, actions| {
            let (up, down) = (state.up.bytes_per_second(), state.down.bytes_per_second());
            state.membership.measured(up, down, reachability);
            state.membership.tick(now, actions);
        });
    }

    /// Start a connection unless one is under way.
    pub(crate) fn connect_soon(self: &Arc<Self>, peer: PeerId) {
        if self.left.load(std::sync::atomic::Ordering::Relaxed) || !self.lock().connecting.insert(peer) {
            return;
        }
        let inner = self.clone();
        let deadline = self.env.now() + Duration::from_secs(10);
        self.spawn(async move {
            let (_, result) = link::connect(&inner, peer, deadline).await;
            inner.lock().connecting.remove(&peer);
            if let Err(error) = result {
                tracing::debug!(target: "potluck::swarm", peer = %peer.short(), %error, "no control stream");
            }
        });
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let _full_only_while_shutting_down = self.spawner.try_send(Box::pin(task));
    }

    /// Who must know at once that we begin this epoch, in a large swarm.
    fn leaders(&self, epoch: u64) -> Option<BTreeSet<PeerId>> {
        let handlers: Vec<Arc<dyn ChannelHandler>> = {
            let state = self.lock();
            if !state.membership.is_large() || state.membership.pulse().progress.epoch == epoch {
                return None;
            }
            state.channels.values().filter_map(Weak::upgrade).collect()
        };
        let view = self.current_view();
        let leaders: BTreeSet<PeerId> =
            handlers.iter().flat_map(|handler| handler.leaders(&view, epoch)).collect();
        (!leaders.is_empty()).then_some(leaders)
    }

    /// A frame of a round has come.
    pub(crate) fn heard_bulk(&self, peer: PeerId) {
        self.lock().membership.heard_bulk(self.env.now(), peer);
    }

    /// So many bytes of a round have come.
    pub(crate) fn received(&self, bytes: usize) {
        self.lock().down.add(self.env.now(), bytes);
    }

    /// A frame waits for room in its stream until this is dropped, or [told](Waiting::done) that it is under way.
    pub(crate) fn wait_for_room(&self) -> Waiting<'_> {
        self.lock().up.wait(self.env.now());
        Waiting { inner: self, bytes: 0 }
    }

    /// Upload and download rates measured so far, bytes per second.
    pub(crate) fn rates(&self) -> (f64, f64) {
        let state = self.lock();
        (state.up.bytes_per_second(), state.down.bytes_per_second())
    }

    pub(crate) fn register(&self, channel: &str, handler: Weak<dyn ChannelHandler>) {
        self.lock().channels.insert(channel.to_owned(), handler);
    }

    /// The view of now, but for the reports of those with whom we do not average; nobody may hold it for long.
    pub(crate) fn current_view(&self) -> watch::Ref<'_, View> {
        self.view.borrow()
    }

    pub(crate) fn hello(&self) -> Hello {
        let state = self.lock();
        Hello {
            version: PROTOCOL_VERSION,
            run: self.config.run.clone(),
            manifest: self.config.manifest.clone(),
            invite: self.config.invite.as_ref().map(|invite| invite.to_bytes().to_vec()),
            incarnation: state.membership.incarnation(),
            addresses: self.transport.addresses(),
            pulse: state.membership.pulse().clone(),
            peers: u32::try_from(state.membership.alive()).unwrap_or(u32::MAX),
        }
    }

    /// Add a link; the number names it.
    pub(crate) fn add_link(self: &Arc<Self>, peer: PeerId, hello: Hello) -> (u64, mpsc::Receiver<Bytes>) {
        let (sender, receiver) = mpsc::channel(LINK_QUEUE);
        let mut id = 0;
        let now = self.env.now();
        self.with(|state, actions| {
            state.next_link += 1;
            id = state.next_link;
            let links = state.links.entry(peer).or_default();
            // The newest is used for sending; an older one may be dead without knowing it. Two suffice.
            links.insert(0, Link { id, sender });
            links.truncate(2);
            state.membership.linked(now, peer, hello, actions);
        });
        (id, receiver)
    }

    pub(crate) fn remove_link(self: &Arc<Self>, peer: PeerId, id: u64) {
        let now = self.env.now();
        self.with(|state, actions| {
            let Some(links) = state.links.get_mut(&peer) else { return };
            links.retain(|link| link.id != id);
            if links.is_empty() {
                state.links.remove(&peer);
                state.membership.unlinked(now, peer, actions);
            }
        });
    }

    pub(crate) fn on_control(self: &Arc<Self>, from: PeerId, message: Control) {
        let now = self.env.now();
        let mut deliver = None;
        self.with(|state, actions| {
            state.membership.heard(now, from);
            match message {
                Control::Beat { incarnation, pulse, news } => {
                    state.membership.beat(now, from, incarnation, pulse, actions);
                    for item in news {
                        state.membership.news(now, item, true, actions);
                    }
                    state.membership.meet_newcomers(now, actions);
                }
                Control::Introduce(news) => {
                    for item in news {
                        state.membership.news(now, item, false, actions);
                    }
                    state.membership.meet_newcomers(now, actions);
                }
                Control::Ask(peer) => {
                    if let Some((incarnation, silence)) = state.membership.last_heard(now, peer) {
                        let heard_ms = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
                        state.send(from, &Control::Vouch { peer, incarnation, heard_ms });
                    }
                }
                Control::Vouch { peer, incarnation, heard_ms } => {
                    let age = Duration::from_millis(heard_ms.into());
                    state.membership.vouched(now, peer, incarnation, age);
                }
                Control::Leave => state.membership.left(now, from, actions),
                Control::Round { channel, message } => {
                    deliver = state.channels.get(&channel).and_then(Weak::upgrade).map(|h| (h, message));
                }
                Control::Hello(_) | Control::Refuse(_) => {}
            }
        });
        if let Some((handler, message)) = deliver {
            handler.message(now, from, message);
        }
    }
}

/// See [`Inner::wait_for_room`].
pub(crate) struct Waiting<'a> {
    inner: &'a Inner,
    bytes: usize,
}

impl Waiting<'_> {
    pub(crate) fn done(mut self, bytes: usize) {
        self.bytes = bytes;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.inner.lock().up.go_on(self.inner.env.now(), self.bytes);
    }
}

impl State {
    fn next_wakeup(&self) -> Instant {
        let wakeup = self.membership.next_wakeup();
        self.beat_due.map_or(wakeup, |due| due.min(wakeup))
    }
}

/// The name of one of the run's protocols: the run's hash keeps runs on one host apart.
pub(crate) fn run_protocol(name: &str, run: &str) -> Protocol {
    let hash = blake3::hash(run.as_bytes()).to_hex();
    Protocol::new(format!("/potluck/{name}/{PROTOCOL_VERSION}/{}", &hash.as_str()[..16]))
}
