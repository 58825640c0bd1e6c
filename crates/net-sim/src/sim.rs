//! The handle on a simulated network: add peers, break things, look at what happened.

use crate::rule::{FrameInfo, OpenInfo, Rules, Verdict};
use crate::transport::SimTransport;
use crate::world::{Node, World};
use crate::{PeerSpec, Trace, TraceName, Traffic};
use bytes::Bytes;
use futures::future::poll_fn;
use potluck_net::{Env, Identity, PeerId, Protocol, Tasks};
use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;
use tokio::time::Instant;

/// Unix time at which every simulation starts, by an exact clock.
const UNIX_START: Duration = Duration::from_secs(1_800_000_000);

/// A simulated network. A cheap handle: clones are the same network, which ends with the last handle, transport and
/// stream.
#[derive(Clone)]
pub struct SimNet {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    seed: u64,
    world: Arc<Mutex<World>>,
    rules: Mutex<Rules>,
    frame_rules: AtomicUsize,
    _driver: Tasks,
}

/// Lifts a fault when dropped: heals the partition, removes the rule.
#[must_use = "the fault is lifted as soon as the guard is dropped"]
#[derive(Debug)]
pub struct FaultGuard {
    inner: Weak<Inner>,
    fault: Fault,
}

#[derive(Debug)]
enum Fault {
    Partition(u64),
    FrameRule(u64),
    OpenRule(u64),
}

impl Inner {
    /// The world, with everything that is due handled.
    ///
    /// # Panics
    /// If the simulator itself panicked before; a run must not go on in a world that is half changed.
    pub(crate) fn lock(&self) -> MutexGuard<'_, World> {
        let mut world = match self.world.lock() {
            Ok(world) => world,
            // Streams are dropped while a test unwinds; a second panic would abort and hide the first.
            Err(poisoned) if std::thread::panicking() => return poisoned.into_inner(),
            Err(_) => panic!("the simulator panicked before; see the first panic"),
        };
        let now = Instant::now();
        if world.now < now {
            world.run_until(now);
        }
        world
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        // A rule of a test may panic; the others still stand.
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_frame_rules(&self) -> bool {
        self.frame_rules.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn judge(&self, frame: &FrameInfo) -> Option<(u64, Verdict)> {
        self.rules().judge(frame)
    }

    pub(crate) fn refuses(&self, open: &OpenInfo) -> bool {
        self.rules().refuses(open)
    }

    /// 32 secret bytes that follow from the seed and a label.
    fn derive(&self, label: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("potluck-net-sim 2026 identities and randomness");
        hasher.update(&self.seed.to_le_bytes());
        hasher.update(label.as_bytes());
        *hasher.finalize().as_bytes()
    }

    fn env(&self, identity: &Identity, incarnation: u64, clock_skew: i64, elapsed: Duration) -> Env {
        let bytes = self.derive(&format!("env {} {incarnation}", identity.peer_id()));
        let seed = bytes.iter().take(8).fold(0u64, |seed, &byte| seed << 8 | u64::from(byte));
        let skew = Duration::from_secs(clock_skew.unsigned_abs());
        let base = UNIX_START + elapsed;
        Env::simulated(seed, if clock_skew < 0 { base.saturating_sub(skew) } else { base + skew })
    }
}

impl SimNet {
    /// An empty network. Everything in it follows from `seed` and from what its users do.
    ///
    /// # Panics
    /// Outside a tokio runtime. Use [`run`](crate::run), or `#[tokio::test(start_paused = true)]`.
    pub fn new(seed: u64) -> Self {
        let inner = Arc::new_cyclic(|weak: &Weak<Inner>| {
            let world = Arc::new(Mutex::new(World::new(weak.clone(), seed)));
            let driver = Tasks::new();
            driver.spawn(drive(world.clone()));
            Inner { seed, world, rules: Mutex::default(), frame_rules: AtomicUsize::new(0), _driver: driver }
        });
        Self { inner }
    }

    /// A new peer. Its identity follows from the seed and from its name (or its index, if it has none).
    ///
    /// # Panics
    /// If the name is taken, or a link has no bandwidth.
    pub fn add_peer(&self, spec: PeerSpec) -> Arc<SimTransport> {
        let mut world = self.inner.lock();
        let label =
            if spec.name.is_empty() { format!("#{}", world.peers.len()) } else { format!("={}", spec.name) };
        let identity = Identity::from_seed(&self.inner.derive(&label));
        let env = self.inner.env(&identity, 0, spec.clock_skew, world.elapsed());
        let node = world.add_peer(identity, spec, env);
        drop(world);
        Arc::new(SimTransport::new(self.inner.clone(), node))
    }

    /// The clock and randomness of one peer; a restarted peer draws other numbers.
    ///
    /// # Panics
    /// If the peer is not of this network, as in every method that takes one.
    pub fn env(&self, peer: PeerId) -> Env {
        let world = self.inner.lock();
        world.peer(node(&world, peer)).env.clone()
    }

    /// Kill the peer's process: its streams and connections are reset for the others at once, and who dials it is
    /// refused. Its own transport answers `Closed`; the caller drops the tasks that were running on it.
    pub fn crash(&self, peer: PeerId) {
        let mut world = self.inner.lock();
        let node = node(&world, peer);
        world.stop(node, false);
    }

    /// Cut the peer's power: as [`SimNet::crash`], but nobody is told. Others see silence, and after 30 s a broken
    /// connection.
    pub fn vanish(&self, peer: PeerId) {
        let mut world = self.inner.lock();
        let node = node(&world, peer);
        world.stop(node, true);
    }

    /// Start the peer again (killing it first if it lives): same identity, nothing else of its former life.
    pub fn restart(&self, peer: PeerId) -> Arc<SimTransport> {
        let mut world = self.inner.lock();
        let node = node(&world, peer);
        world.restart(node);
        let (identity, incarnation) = (world.peer(node).identity.clone(), world.peer(node).incarnation);
        let skew = world.peer(node).spec.clock_skew;
        world.peer_mut(node).env = self.inner.env(&identity, incarnation, skew, world.elapsed());
        drop(world);
        Arc::new(SimTransport::new(self.inner.clone(), node))
    }

    /// Stop the peer without ending it, as SIGSTOP does: it neither sends nor sees anything, frames to it pile up as far
    /// as windows allow, and after 30 s its connections break. Timers of its tasks still fire: only the network is ours.
    pub fn freeze(&self, peer: PeerId) {
        let mut world = self.inner.lock();
        let node = node(&world, peer);
        world.set_frozen(node, true);
    }

    /// Let a frozen peer go on.
    pub fn thaw(&self, peer: PeerId) {
        let mut world = self.inner.lock();
        let node = node(&world, peer);
        world.set_frozen(node, false);
    }

    /// Nothing gets from `from` to `to` (and back, unless `one_way`) until the guard is dropped. What is on its way
    /// waits; connections that stay silent for 30 s break. A relay outside both sets still carries between them.
    pub fn partition(&self, from: &[PeerId], to: &[PeerId], one_way: bool) -> FaultGuard {
        let mut world = self.inner.lock();
        let nodes = |peers: &[PeerId]| -> BTreeSet<Node> { peers.iter().map(|&p| node(&world, p)).collect() };
        let (from, to) = (nodes(from), nodes(to));
        let id = world.fresh_id();
        if !one_way {
            let back = world.fresh_id();
            debug_assert_eq!(back, id + 1, "the guard lifts both directions by their numbers");
            world.partitions.insert(back, (to.clone(), from.clone()));
        }
        world.partitions.insert(id, (from, to));
        world.topology_changed();
        FaultGuard { inner: Arc::downgrade(&self.inner), fault: Fault::Partition(id) }
    }

    /// Ask `rule` about every frame when it is sent, until the guard is dropped. Rules are asked in the order in which
    /// they were set; the first verdict other than [`Verdict::Pass`] counts. A rule may look at the network but not set
    /// or lift rules.
    pub fn set_rule(&self, rule: impl FnMut(&FrameInfo) -> Verdict + Send + 'static) -> FaultGuard {
        let id = self.new_rule();
        self.inner.rules().frames.push((id, Box::new(rule)));
        self.inner.frame_rules.fetch_add(1, Ordering::Relaxed);
        FaultGuard { inner: Arc::downgrade(&self.inner), fault: Fault::FrameRule(id) }
    }

    /// Refuse every open for which `refuse` says so, until the guard is dropped; the opener sees `Unreachable`.
    pub fn refuse_opens(&self, refuse: impl FnMut(&OpenInfo) -> bool + Send + 'static) -> FaultGuard {
        let id = self.new_rule();
        self.inner.rules().opens.push((id, Box::new(refuse)));
        FaultGuard { inner: Arc::downgrade(&self.inner), fault: Fault::OpenRule(id) }
    }

    fn new_rule(&self) -> u64 {
        let mut world = self.inner.lock();
        let id = world.fresh_id();
        world.rules.insert(id);
        id
    }

    /// Put a frame on the newest stream between two peers without asking anybody: neither the limit on its length nor
    /// the window nor the rules. For tests of what a hostile sender could do. False if there is no such stream.
    pub fn inject_frame(&self, from: PeerId, to: PeerId, protocol: &Protocol, frame: Bytes) -> bool {
        let mut world = self.inner.lock();
        let (from, to) = (node(&world, from), node(&world, to));
        let newest = world.streams.iter().rev().find_map(|(stream, state)| {
            let end = state.ends.iter().position(|&end| end == from)?;
            (state.ends[1 - end] == to && state.protocol == *protocol).then_some((stream, end as u8))
        });
        let Some((stream, end)) = newest else { return false };
        world.send_frame(stream, end, frame, None).is_ok()
    }

    /// What happened so far.
    pub fn trace(&self) -> Trace {
        let world = self.inner.lock();
        world.log.snapshot(|node| world.peer_id(node))
    }

    /// Names what happened so far: equal for equal traces, and cheaper.
    pub fn trace_name(&self) -> TraceName {
        self.inner.lock().log.name()
    }

    /// What one peer has moved so far.
    pub fn traffic(&self, peer: PeerId) -> Traffic {
        let world = self.inner.lock();
        let peer = world.peer(node(&world, peer));
        Traffic { connections: peer.neighbours.len(), ..peer.traffic }
    }

    /// Virtual time since the network was made.
    pub fn elapsed(&self) -> Duration {
        self.inner.lock().elapsed()
    }

    /// Streams that somebody still holds an end of; for tests that look for leaks.
    pub fn streams(&self) -> usize {
        self.inner.lock().streams.len()
    }
}

fn node(world: &World, peer: PeerId) -> Node {
    *world.by_id.get(&peer).unwrap_or_else(|| panic!("{peer} is not a peer of this network"))
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        match self.fault {
            Fault::Partition(id) => {
                let mut world = inner.lock();
                world.partitions.remove(&id);
                world.partitions.remove(&(id + 1));
                world.topology_changed();
            }
            Fault::FrameRule(id) => {
                inner.frame_rules.fetch_sub(1, Ordering::Relaxed);
                inner.rules().frames.retain(|(rule, _)| *rule != id);
                let mut world = inner.lock();
                world.rules.remove(&id);
                world.release_held();
            }
            Fault::OpenRule(id) => {
                inner.rules().opens.retain(|(rule, _)| *rule != id);
                inner.lock().rules.remove(&id);
            }
        }
    }
}

impl std::fmt::Debug for SimNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SimNet(seed {})", self.inner.seed)
    }
}

/// Moves the world on whenever its next event is due; ends with the network, whose task it is.
fn drive(world: Arc<Mutex<World>>) -> impl Future<Output = ()> + Send {
    let mut sleep: Option<Pin<Box<tokio::time::Sleep>>> = None;
    poll_fn(move |cx| {
        loop {
            let next = {
                let mut world = world.lock().expect("the simulator panicked before; see the first panic");
                world.run_until(Instant::now());
                world.driver = Some(cx.waker().clone());
                world.armed = world.next_event();
                world.armed
            };
            let Some(next) = next else { return Poll::Pending };
            let sleep = sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next)));
            sleep.as_mut().reset(next);
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    })
}
