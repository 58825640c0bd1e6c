//! The web server: the page, the status, the live events, the metrics. Read-only; loopback unless told otherwise.

use crate::{History, Notice, openmetrics};
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
/// Events that a page shows which has just been opened.
const EVENTS_SHOWN: usize = 200;
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
}

#[derive(Default)]
struct Seen {
    history: History,
    events: VecDeque<(f64, Event)>,
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
        let listener =
            TcpListener::bind(address).await.map_err(|source| ServeError::Bind { address, source })?;
        let address = listener.local_addr().map_err(|source| ServeError::Bind { address, source })?;
        let run_id = status.borrow().run_id.clone();
        let notice = Notice::post(&run_id, Some(address), None);
        if let Err(error) = &notice {
            tracing::debug!(target: "potluck::dashboard", %error, "`potluck status` will not find this peer by name");
        }
        let (news, _) = broadcast::channel(256);
        let seen = Mutex::new(Seen { history: History::new(), events: VecDeque::new() });
        let shared = Arc::new(Shared { status, seen, pages: Arc::new(Semaphore::new(PAGES_MAX)), news });
        let tasks = Tasks::new();
        tasks.spawn(watch_session(shared.clone(), events));
        tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, router(shared)).await {
                tracing::warn!(target: "potluck::dashboard", %error, "the dashboard has ended");
            }
        });
        Ok(Self { address, _tasks: tasks, _notice: notice.ok() })
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
                    let mut seen = shared.seen();
                    seen.events.push_back((start.elapsed().as_secs_f64(), event.clone()));
                    if seen.events.len() > EVENTS_SHOWN {
                        seen.events.pop_front();
                    }
                    drop(seen);
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
    let events: Vec<_> = seen.events.iter().map(|(seconds, event)| described(*seconds, event)).collect();
    axum::Json(serde_json::json!({"points": seen.history.points(), "events": events})).into_response()
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
