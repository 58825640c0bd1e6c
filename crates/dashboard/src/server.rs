//! The web server: the page, the status, the live events, the metrics. Read-only; loopback unless told otherwise.

use crate::{History, Notice, Replay, openmetrics};
use axum::Router;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::{Stream, StreamExt, stream};
use potluck_collab::{Event, Session, Status};
use potluck_net::Tasks;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::time::{Instant, MissedTickBehavior};

/// How often the page is told the newest status, at most.
const REFRESH: Duration = Duration::from_millis(500);
/// Events that a page shows which has just been opened: rounds without a fault, and all others, which shall not be
/// pushed out by them.
const ROUNDS_SHOWN: usize = 50;
const OTHERS_SHOWN: usize = 200;
/// Pages that are open at the same time.
const PAGES_MAX: usize = 64;

/// Why the dashboard does not start. Training goes on without it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("dashboard on {address}: {source}; choose another port, or 0 for any free one")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A running dashboard; it ends when this value is dropped.
#[derive(Debug)]
pub struct Dashboard {
    address: SocketAddr,
    _tasks: Tasks,
    _notice: Option<Notice>,
}

struct Shared {
    status: watch::Receiver<Status>,
    seen: Mutex<Seen>,
    pages: Arc<Semaphore>,
    news: broadcast::Sender<Event>,
    /// Everything is over: a log is shown.
    replayed: bool,
}

struct Seen {
    history: History,
    rounds: VecDeque<(f64, Event)>,
    others: VecDeque<(f64, Event)>,
}

impl Seen {
    fn new() -> Self {
        Self { history: History::new(), rounds: VecDeque::new(), others: VecDeque::new() }
    }

    fn push(&mut self, seconds: f64, event: Event) {
        let well = matches!(&event, Event::Round(round) if round.faults.is_empty());
        let (list, most) =
            if well { (&mut self.rounds, ROUNDS_SHOWN) } else { (&mut self.others, OTHERS_SHOWN) };
        list.push_back((seconds, event));
        if list.len() > most {
            list.pop_front();
        }
    }

    /// Oldest first.
    fn events(&self) -> Vec<&(f64, Event)> {
        let mut all: Vec<_> = self.rounds.iter().chain(&self.others).collect();
        all.sort_by(|one, other| one.0.total_cmp(&other.0));
        all
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dashboard {
    /// Show `session` at `address` (port 0: any free one).
    ///
    /// # Errors
    /// [`ServeError::Bind`] if the address is taken or not allowed.
    pub async fn serve(session: &Session, address: SocketAddr) -> Result<Self, ServeError> {
        Self::serve_feed(session.status(), session.events(), address).await
    }

    /// Show whatever these channels say; for those who only watch a run.
    ///
    /// # Errors
    /// As [`Dashboard::serve`].
    pub async fn serve_feed(
        status: watch::Receiver<Status>,
        events: broadcast::Receiver<Event>,
        address: SocketAddr,
    ) -> Result<Self, ServeError> {
        let (listener, address) = bind(address).await?;
        let run_id = status.borrow().run_id.clone();
        let notice = Notice::post(&run_id, Some(address), None);
        if let Err(error) = &notice {
            tracing::debug!(target: "potluck::dashboard", %error, "`potluck status` will not find this peer by name");
        }
        let (news, _) = broadcast::channel(256);
        let (seen, pages) = (Mutex::new(Seen::new()), Arc::new(Semaphore::new(PAGES_MAX)));
        let shared = Arc::new(Shared { status, seen, pages, news, replayed: false });
        let tasks = Tasks::new();
        tasks.spawn(watch_session(shared.clone(), events));
        tasks.spawn(answer_pages(listener, shared));
        Ok(Self { address, _tasks: tasks, _notice: notice.ok() })
    }

    /// Show what a log tells: its curves, what happened, and how things stood at its end.
    ///
    /// # Errors
    /// As [`Dashboard::serve`].
    pub async fn serve_replay(replay: Replay, address: SocketAddr) -> Result<Self, ServeError> {
        let (listener, address) = bind(address).await?;
        let mut seen = Seen::new();
        replay.statuses.iter().for_each(|(seconds, status)| seen.history.push(*seconds, status));
        replay.events.into_iter().for_each(|(seconds, event)| seen.push(seconds, event));
        let last = replay.statuses.into_iter().next_back().map(|(_, status)| status).unwrap_or_default();
        let (news, _) = broadcast::channel(1);
        let (seen, pages) = (Mutex::new(seen), Arc::new(Semaphore::new(PAGES_MAX)));
        let status = watch::Sender::new(last).subscribe();
        let tasks = Tasks::new();
        tasks.spawn(answer_pages(listener, Arc::new(Shared { status, seen, pages, news, replayed: true })));
        Ok(Self { address, _tasks: tasks, _notice: None })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What to open in a browser.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServeError> {
    let listener = TcpListener::bind(address).await.map_err(|source| ServeError::Bind { address, source })?;
    let address = listener.local_addr().map_err(|source| ServeError::Bind { address, source })?;
    Ok((listener, address))
}

async fn answer_pages(listener: TcpListener, shared: Arc<Shared>) {
    if let Err(error) = axum::serve(listener, router(shared)).await {
        tracing::warn!(target: "potluck::dashboard", %error, "the dashboard has ended");
    }
}

/// Feeds the history and the list of events for as long as the session lives.
async fn watch_session(shared: Arc<Shared>, mut events: broadcast::Receiver<Event>) {
    let start = Instant::now();
    let mut status = shared.status.clone();
    let mut tick = tokio::time::interval(REFRESH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Ok(event) => {
                    shared.seen().push(start.elapsed().as_secs_f64(), event.clone());
                    if shared.news.receiver_count() > 0 && shared.news.send(event).is_err() {
                        tracing::trace!(target: "potluck::dashboard", "the last page has just been closed");
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            },
            _ = tick.tick() => {
                let newest = status.borrow_and_update().clone();
                shared.seen().history.push(start.elapsed().as_secs_f64(), &newest);
            }
        }
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(|| async { asset("text/html; charset=utf-8", include_str!("../assets/index.html")) }))
        .route("/app.js", get(|| async { asset("text/javascript", include_str!("../assets/app.js")) }))
        .route("/charts.js", get(|| async { asset("text/javascript", include_str!("../assets/charts.js")) }))
        .route("/style.css", get(|| async { asset("text/css", include_str!("../assets/style.css")) }))
        .route("/api/status", get(api_status))
        .route("/api/history", get(api_history))
        .route("/api/live", get(api_live))
        .route("/metrics", get(api_metrics))
        .with_state(shared)
}

/// An embedded file. The policy keeps the page from asking anybody else for anything.
fn asset(kind: &'static str, body: &'static str) -> Response {
    let policy = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'";
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache"), (CONTENT_SECURITY_POLICY, policy)], body)
        .into_response()
}

async fn api_status(State(shared): State<Arc<Shared>>) -> Response {
    axum::Json(shared.status.borrow().clone()).into_response()
}

async fn api_history(State(shared): State<Arc<Shared>>) -> Response {
    let seen = shared.seen();
    let events: Vec<_> =
        seen.events().into_iter().map(|(seconds, event)| described(*seconds, event)).collect();
    let (points, replayed) = (seen.history.points(), shared.replayed);
    axum::Json(serde_json::json!({"points": points, "events": events, "replayed": replayed})).into_response()
}

async fn api_metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let text = openmetrics(&shared.status.borrow());
    ([(CONTENT_TYPE, kind)], text).into_response()
}

fn described(seconds: f64, event: &Event) -> serde_json::Value {
    serde_json::json!({"seconds": seconds, "text": event.to_string(), "what": event})
}

async fn api_live(State(shared): State<Arc<Shared>>) -> Response {
    let Ok(permit) = shared.pages.clone().try_acquire_owned() else {
        return (axum::http::StatusCode::SERVICE_UNAVAILABLE, "too many open pages").into_response();
    };
    let start = Instant::now();
    let news = receiver_stream(shared.news.subscribe()).map(move |event| {
        sse::Event::default().event("event").json_data(described(start.elapsed().as_secs_f64(), &event))
    });
    let mut tick = tokio::time::interval(REFRESH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let status = shared.status.clone();
    let statuses = stream::unfold((tick, status, permit), |(mut tick, mut status, permit)| async move {
        tick.tick().await;
        let newest = status.borrow_and_update().clone();
        Some((sse::Event::default().event("status").json_data(newest), (tick, status, permit)))
    });
    let both = stream::select(news, statuses).filter_map(|event| async move { event.ok() });
    Sse::new(both.map(Ok::<_, Infallible>)).keep_alive(KeepAlive::default()).into_response()
}

fn receiver_stream(receiver: broadcast::Receiver<Event>) -> impl Stream<Item = Event> + Send {
    stream::unfold(receiver, |mut receiver| async move {
        loop {
            match receiver.recv().await {
                Ok(event) => return Some((event, receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    })
}
