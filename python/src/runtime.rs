//! The one tokio runtime of the process, and the one way to wait for it from Python.

use crate::error::Error;
use potluck_net::RUNTIME_THREADS;
use pyo3::prelude::*;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};

/// How often a wait looks whether Ctrl-C was pressed.
const SIGNAL_PERIOD: Duration = Duration::from_millis(100);

struct Process {
    id: u32,
    runtime: Runtime,
}

static PROCESS: Mutex<Option<Process>> = Mutex::new(None);

/// The runtime of this process, started on first use.
///
/// # Errors
/// [`Error::State`] in a forked child: threads do not survive a fork, so nothing here would ever answer.
pub(crate) fn handle() -> Result<Handle, Error> {
    let mut process = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(process) = process.as_ref() {
        if process.id != std::process::id() {
            return Err(Error::State(format!(
                "potluck was started in process {} and cannot be used in its forked child {}: \
                 create it after the fork, or use the 'spawn' start method",
                process.id,
                std::process::id()
            )));
        }
        return Ok(process.runtime.handle().clone());
    }
    let runtime = Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("potluck")
        .enable_all()
        .build()
        .map_err(|error| Error::State(format!("cannot start potluck's threads: {error}")))?;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    runtime.spawn(crate::trim::give_memory_back());
    let handle = runtime.handle().clone();
    *process = Some(Process { id: std::process::id(), runtime });
    Ok(handle)
}

/// Run `work` to its end without the GIL. Ctrl-C (or any exception of a signal handler) drops `work` and is raised.
///
/// # Errors
/// What `work` answers, a Python exception, or [`Error::State`] after a fork.
pub(crate) fn wait<T, F>(py: Python<'_>, work: F) -> Result<T, Error>
where
    T: Send,
    F: Future<Output = Result<T, Error>> + Send,
{
    let handle = handle()?;
    let mut work = Box::pin(work);
    loop {
        let polled =
            py.detach(|| handle.block_on(async { tokio::time::timeout(SIGNAL_PERIOD, work.as_mut()).await }));
        match polled {
            Ok(result) => return result,
            Err(_elapsed) => py.check_signals()?,
        }
    }
}

/// Seconds from Python as a duration: `None` is no limit.
///
/// # Errors
/// [`Error::Value`] for negative numbers and NaN.
pub(crate) fn seconds(field: &str, value: Option<f64>) -> Result<Option<Duration>, Error> {
    match value {
        None => Ok(None),
        Some(value) if value == f64::INFINITY => Ok(None),
        Some(value) => Duration::try_from_secs_f64(value)
            .map(Some)
            .map_err(|_| Error::Value(format!("{field}={value}: expected seconds >= 0"))),
    }
}
