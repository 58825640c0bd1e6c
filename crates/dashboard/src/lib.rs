//! Shows a session to people and to machines: a page that updates itself, Prometheus metrics, a JSON-lines log.
//!
//! Everything here is a view of one [`Status`](potluck_collab::Status): no number is counted a second time.
//!
//! * `GET /` the page; its script and style are embedded, nothing is loaded from elsewhere.
//! * `GET /api/status` the status as JSON; `GET /api/history` what the curves show; `GET /api/live` server-sent events.
//! * `GET /metrics` OpenMetrics text for Prometheus.

mod history;
mod local;
mod log;
mod metrics;
mod server;

pub use history::{History, Point};
pub use local::{LocalRun, Notice, local_runs};
pub use log::{LogError, Replay, ReplayError, write_log};
pub use metrics::openmetrics;
pub use server::{Dashboard, ServeError};
