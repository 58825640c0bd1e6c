//! A scope for background tasks: they end with their owner, and a panic in one of them is not lost.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::task::JoinSet;

/// Background tasks that are aborted when the last clone of this scope is dropped.
#[derive(Clone, Default)]
pub struct Tasks {
    set: Arc<Mutex<JoinSet<()>>>,
}

impl Tasks {
    /// An empty scope.
    pub fn new() -> Self {
        Self::default()
    }

    /// Start a task. Finished tasks are reaped here, so that a long-lived scope does not grow; if one of them
    /// panicked, the panic continues in the caller.
    ///
    /// # Panics
    /// If an earlier task of this scope panicked.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        set.spawn(task);
        while let Some(done) = set.try_join_next() {
            surface(done);
        }
    }

    /// Abort every task. Idempotent.
    pub fn abort_all(&self) {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }

    /// Number of tasks that have not been reaped.
    pub fn len(&self) -> usize {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether no task is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Abort every task and wait until all of them are gone.
    ///
    /// # Panics
    /// If a task had panicked before.
    pub async fn shutdown(&self) {
        let mut set = std::mem::take(&mut *self.set.lock().unwrap_or_else(PoisonError::into_inner));
        set.abort_all();
        while let Some(done) = set.join_next().await {
            surface(done);
        }
    }
}

fn surface(done: Result<(), tokio::task::JoinError>) {
    if let Err(error) = done
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tasks({})", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn dropping_the_scope_ends_its_tasks() {
        let (alive, mut dropped) = tokio::sync::mpsc::channel::<()>(1);
        let tasks = Tasks::new();
        tasks.spawn(async move {
            let _alive = alive;
            futures::future::pending::<()>().await;
        });
        drop(tasks);
        assert_eq!(dropped.recv().await, None);
    }

    #[tokio::test]
    #[should_panic(expected = "ours")]
    async fn a_panic_is_surfaced() {
        let tasks = Tasks::new();
        let (started, finished) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn(async move {
            let _ends_with_the_panic = started;
            panic!("ours");
        });
        assert!(finished.await.is_err());
        while !tasks.is_empty() {
            tasks.shutdown().await;
        }
    }
}
