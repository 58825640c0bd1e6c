//! The native protocol under a session: potluck's membership, rounds and state transfer.

use crate::dialect::{
    Channel, Dialect, DownloadFailed, PeerView, Report, RoundCall, RoundFailed, RoundResult, Snapshot,
    Traffic,
};
use crate::{JoinError, SessionConfig};
use futures::future::BoxFuture;
use potluck_net::{Env, Outcome, PeerId, Transport};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

/// Not joinable yet: the averaging crate brings membership and rounds. Until then no value of this type exists.
pub(crate) struct Native(Infallible);

impl Native {
    #[expect(clippy::unused_async, reason = "joining waits for the network")]
    pub(crate) async fn join(
        _transport: Arc<dyn Transport>,
        _env: Env,
        config: &SessionConfig,
    ) -> Result<Self, JoinError> {
        Err(JoinError::Network(format!("run {:?}: this build has no native protocol yet", config.run_id)))
    }
}

impl Dialect for Native {
    fn local_peer(&self) -> PeerId {
        match self.0 {}
    }
    fn peers(&self) -> Vec<PeerView> {
        match self.0 {}
    }
    fn changed(&self) -> BoxFuture<'_, ()> {
        match self.0 {}
    }
    fn round_open(&self, _: Channel, _: u64) -> bool {
        match self.0 {}
    }
    fn report(&self, _: Report) {
        match self.0 {}
    }
    fn average(&self, _: Channel, _: RoundCall) -> BoxFuture<'_, Result<Outcome<RoundResult>, RoundFailed>> {
        match self.0 {}
    }
    fn publish(&self, _: Snapshot) {
        match self.0 {}
    }
    fn download(
        &self,
        _: [u8; 32],
        _: u64,
        _: Duration,
    ) -> BoxFuture<'_, Result<Outcome<Snapshot>, DownloadFailed>> {
        match self.0 {}
    }
    fn traffic(&self) -> Traffic {
        match self.0 {}
    }
    fn memory(&self) -> BTreeMap<String, u64> {
        match self.0 {}
    }
    fn leave(&self) -> BoxFuture<'_, ()> {
        match self.0 {}
    }
}
