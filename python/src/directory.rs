//! Finding the peers of a run through the DHT, so that joining needs the address of any peer, not of one in the run.

use futures::FutureExt;
use futures::future::BoxFuture;
use potluck_averaging::Directory;
use potluck_dht::{Dht, rendezvous};
use potluck_net::PeerId;
use std::time::Duration;

/// How long the DHT may take to join before it is asked all the same.
pub(crate) const JOIN_LIMIT: Duration = Duration::from_secs(4);

/// The DHT as the directory of runs.
pub(crate) struct DhtDirectory(pub(crate) Dht);

impl Directory for DhtDirectory {
    fn announce<'a>(&'a self, run: &'a str, _ttl: Duration) -> BoxFuture<'a, ()> {
        async move {
            // Nobody to keep it yet: the swarm announces again, and the DHT keeps joining meanwhile.
            let _stored = rendezvous::announce(&self.0, run.as_bytes(), b"").await;
        }
        .boxed()
    }

    fn lookup<'a>(&'a self, run: &'a str) -> BoxFuture<'a, Vec<(PeerId, Vec<String>)>> {
        async move {
            self.0.wait_joined(JOIN_LIMIT).await;
            let found = rendezvous::lookup(&self.0, run.as_bytes()).await.value;
            found.into_iter().map(|peer| (peer.peer, peer.addresses)).collect()
        }
        .boxed()
    }
}
