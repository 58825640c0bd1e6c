//! A peer that is honest but for the frames that it sends under one protocol: a transport around another one, which may
//! be simulated or real.

use bytes::Bytes;
use futures::future::BoxFuture;
use potluck_net::{
    AcceptError, Identity, Incoming, OpenError, Path, PeerId, Protocol, Reachability, Stream, StreamError,
    Tasks, Transport,
};
use std::sync::Arc;

/// What becomes of a frame.
pub type Mangle = Arc<dyn Fn(Bytes) -> Vec<Bytes> + Send + Sync>;

/// See the module. The first frame of a stream is sent as it is, or nobody would know whose stream it is.
#[derive(Clone)]
pub struct Mangler {
    below: Arc<dyn Transport>,
    protocol: &'static str,
    mangle: Mangle,
}

impl Mangler {
    /// Streams whose protocol contains `protocol` carry what `mangle` makes of the frames.
    pub fn new(below: Arc<dyn Transport>, protocol: &'static str, mangle: Mangle) -> Self {
        Self { below, protocol, mangle }
    }

    fn spoil(&self, stream: Stream) -> Stream {
        let (peer, protocol, mangle) = (stream.peer(), stream.protocol().clone(), self.mangle.clone());
        if !protocol.as_str().contains(self.protocol) {
            return stream;
        }
        let (sender, receiver) = stream.split();
        let sink = futures::sink::unfold((sender, 0), move |(mut sender, sent), frame: Bytes| {
            let frames = if sent == 0 { vec![frame] } else { mangle(frame) };
            async move {
                for frame in frames {
                    sender.send(frame).await?;
                }
                Ok::<_, StreamError>((sender, sent + 1))
            }
        });
        let frames = futures::stream::unfold(receiver, |mut receiver| async move {
            let next = receiver.recv().await.transpose()?;
            Some((next, receiver))
        });
        Stream::new(peer, protocol, sink, frames)
    }
}

impl Transport for Mangler {
    fn identity(&self) -> &Identity {
        self.below.identity()
    }
    fn open(&self, peer: PeerId, protocol: Protocol) -> BoxFuture<'_, Result<Stream, OpenError>> {
        Box::pin(async move { Ok(self.spoil(self.below.open(peer, protocol).await?)) })
    }
    fn accept(&self, protocol: Protocol, backlog: usize) -> Result<Incoming, AcceptError> {
        let mut below = self.below.accept(protocol, backlog)?;
        let (sender, receiver) = tokio::sync::mpsc::channel(backlog);
        let spoiler = self.clone();
        let tasks = Tasks::new();
        tasks.spawn(async move {
            while let Some(stream) = below.next().await {
                if sender.send(spoiler.spoil(stream)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Incoming::new(receiver, tasks))
    }
    fn add_addresses(&self, peer: PeerId, addresses: &[String]) {
        self.below.add_addresses(peer, addresses);
    }
    fn addresses(&self) -> Vec<String> {
        self.below.addresses()
    }
    fn path(&self, peer: PeerId) -> Option<Path> {
        self.below.path(peer)
    }
    fn connected(&self) -> Vec<PeerId> {
        self.below.connected()
    }
    fn reachability(&self) -> Reachability {
        self.below.reachability()
    }
    fn close(&self) -> BoxFuture<'_, ()> {
        self.below.close()
    }
}
