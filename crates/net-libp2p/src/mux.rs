//! yamux on an encrypted connection, with frames as large as bulk data wants them.
//!
//! `libp2p-yamux` fixes frames at 16 KiB: each costs an allocation, a wake-up and two encrypted records, of which one
//! carries 12 bytes. It also drops inbound streams beyond 256 that wait to be picked up. The protocol is the same.
//!
//! yamux wakes nobody when we close a connection ourselves, and then waits for as long as the kernel takes its last bytes: of
//! a peer that has vanished, many minutes. Here streams end with the decision, and a close has a limit.

use futures::channel::oneshot;
use futures::future::{FusedFuture, Shared};
use futures::{AsyncRead, AsyncWrite, FutureExt, ready};
use libp2p::core::UpgradeInfo;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready as immediately};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::{Sleep, sleep};
use yamux::{Connection, ConnectionError, Mode, Stream};

/// Payload of the largest frame that we send. A message of control that comes behind it on a link of 20 Mbit/s waits
/// for 26 ms, less than for what the socket holds already.
const FRAME_BYTES: usize = 64 << 10;

/// The receive window that a stream begins with; yamux sets it aside for every stream that there may be.
const FIRST_WINDOW_BYTES: usize = 256 << 10;
/// How much all windows of a connection together may grow at most: 100 MB/s at 100 ms need 10 MB, and yamux allows twice the
/// product. Without it a stream moves 256 KiB per round trip however fast the link is.
const GROWTH_BYTES_MAX: usize = 64 << 20;
/// How much they may grow with the round trip. Near peers need no growth, and it does harm: yamux measures round trips while its
/// own bytes queue on the link, doubles a window for each of them, and with unequal windows one direction's queue delays what
/// opens the other's window, so that it stands still for most of the time.
const GROWTH_PER_SECOND: f64 = 400e6;
/// The cryptography's part of a handshake, at most.
const HANDSHAKE_COMPUTES: Duration = Duration::from_millis(2);
/// A close may take this long to send what waits, and a goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How connections are shared between streams.
#[derive(Debug, Clone)]
pub(crate) struct Mux {
    streams_max: usize,
    handshake: Duration,
}

impl Mux {
    /// A connection with at most this many streams, whose handshake took so long.
    pub(crate) fn new(streams_max: usize, handshake: Duration) -> Self {
        Self { streams_max, handshake }
    }

    fn muxer<C>(self, socket: C, mode: Mode) -> Ready<io::Result<Muxer<C>>>
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        let growth = growth_bytes(self.handshake);
        let mut config = yamux::Config::default();
        config.set_max_connection_receive_window(Some(self.streams_max * FIRST_WINDOW_BYTES + growth));
        config.set_max_num_streams(self.streams_max).set_split_send_size(FRAME_BYTES);
        let connection = Connection::new(socket, config, mode);
        immediately(Ok(Muxer::new(connection, self.streams_max)))
    }
}

fn growth_bytes(handshake: Duration) -> usize {
    let round_trip = handshake.saturating_sub(HANDSHAKE_COMPUTES);
    GROWTH_BYTES_MAX.min((round_trip.as_secs_f64() * GROWTH_PER_SECOND) as usize)
}

impl UpgradeInfo for Mux {
    type Info = &'static str;
    type InfoIter = std::iter::Once<&'static str>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> InboundConnectionUpgrade<C> for Mux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Muxer<C>>>;

    fn upgrade_inbound(self, socket: C, _: &'static str) -> Self::Future {
        self.muxer(socket, Mode::Server)
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> OutboundConnectionUpgrade<C> for Mux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Muxer<C>>>;

    fn upgrade_outbound(self, socket: C, _: &'static str) -> Self::Future {
        self.muxer(socket, Mode::Client)
    }
}

/// One connection's streams.
pub(crate) struct Muxer<C> {
    connection: Connection<C>,
    /// Inbound streams that came while something else was asked for. yamux only moves bytes when asked for them.
    waiting: VecDeque<Stream>,
    waiting_max: usize,
    picked_up: Option<Waker>,
    /// Its drop ends `alive`, and with it every stream.
    owner: Option<oneshot::Sender<Infallible>>,
    alive: Alive,
    patience: Option<Pin<Box<Sleep>>>,
}

/// Lasts until the connection is closed.
type Alive = Shared<oneshot::Receiver<Infallible>>;

/// A stream that ends with its connection, whoever closes that.
pub(crate) struct Substream {
    stream: Stream,
    // Two, because each wakes one task only, and the halves of a stream are in two.
    reading: Alive,
    writing: Alive,
}

/// What a stream says, unless it would wait for a connection that has been closed.
fn or_ended<T>(polled: Poll<io::Result<T>>, alive: &mut Alive, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
    // A shared future must not be polled after its end.
    if polled.is_pending() && (alive.is_terminated() || alive.poll_unpin(cx).is_ready()) {
        return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
    }
    polled
}

impl AsyncRead for Substream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, target: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        or_ended(Pin::new(&mut this.stream).poll_read(cx, target), &mut this.reading, cx)
    }
}

impl AsyncWrite for Substream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        or_ended(Pin::new(&mut this.stream).poll_write(cx, bytes), &mut this.writing, cx)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        or_ended(Pin::new(&mut this.stream).poll_flush(cx), &mut this.writing, cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        or_ended(Pin::new(&mut this.stream).poll_close(cx), &mut this.writing, cx)
    }
}

fn broken(error: ConnectionError) -> io::Error {
    match error {
        ConnectionError::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl<C> Muxer<C> {
    fn new(connection: Connection<C>, waiting_max: usize) -> Self {
        let (owner, alive) = oneshot::channel();
        let (owner, alive) = (Some(owner), alive.shared());
        Self {
            connection,
            waiting: VecDeque::new(),
            waiting_max,
            picked_up: None,
            owner,
            alive,
            patience: None,
        }
    }

    fn substream(&self, stream: Stream) -> Substream {
        Substream { stream, reading: self.alive.clone(), writing: self.alive.clone() }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        let next = ready!(self.connection.poll_next_inbound(cx));
        Poll::Ready(next.unwrap_or(Err(ConnectionError::Closed)).map_err(broken))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Substream;
    type Error = io::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        if let Some(stream) = self.waiting.pop_front() {
            return Poll::Ready(Ok(self.substream(stream)));
        }
        if let Poll::Ready(next) = self.poll_connection(cx) {
            return Poll::Ready(next.map(|stream| self.substream(stream)));
        }
        self.picked_up = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_outbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        let stream = ready!(self.connection.poll_new_outbound(cx)).map_err(broken)?;
        Poll::Ready(Ok(self.substream(stream)))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.owner = None;
        if let Poll::Ready(closed) = this.connection.poll_close(cx) {
            return Poll::Ready(closed.map_err(broken));
        }
        let patience = this.patience.get_or_insert_with(|| Box::pin(sleep(CLOSE_TIMEOUT)));
        patience.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        let this = self.get_mut();
        let stream = ready!(this.poll_connection(cx))?;
        // More than the connection may have at all cannot wait; yamux has refused them.
        if this.waiting.len() < this.waiting_max {
            this.waiting.push_back(stream);
        }
        if let Some(waker) = this.picked_up.take() {
            waker.wake();
        }
        // Others get their turn before the next look.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipe::Pipe;
    use futures::{AsyncReadExt, AsyncWriteExt};
    use potluck_net::Tasks;
    use std::future::poll_fn;
    use tokio::sync::mpsc;
    use tokio::time::{Instant, timeout};

    #[tokio::test(start_paused = true)]
    async fn a_close_ends_every_stream_at_once_and_itself_soon_although_nobody_takes_a_byte() {
        // Room for what one stream may send without an answer, and for little more.
        let (near, _far) = tokio::io::duplex(FIRST_WINDOW_BYTES + FRAME_BYTES);
        let mut muxer = Mux::new(512, Duration::ZERO).upgrade_outbound(Pipe(near), "").await.unwrap();
        let mut open = async || poll_fn(|cx| Pin::new(&mut muxer).poll_outbound(cx)).await.unwrap();
        let (mut read, mut without_credit, mut later) = (open().await, open().await, open().await);
        let (mut split_read, mut split_later) = open().await.split();
        let (tell, mut told) = mpsc::channel(8);
        let tasks = Tasks::new();
        let wait = |name: &'static str, waiting: Pin<Box<dyn Future<Output = io::Result<()>> + Send>>| {
            let tell = tell.clone();
            tasks.spawn(async move {
                waiting.await.expect_err(name);
                tell.send((name, Instant::now())).await.expect("somebody hears it");
            });
        };
        let bytes = || vec![0; 2 * FIRST_WINDOW_BYTES];
        let pause = || sleep(Duration::from_secs(1));
        wait("read", Box::pin(async move { read.read(&mut [0]).await.map(drop) }));
        wait("without credit", Box::pin(async move { without_credit.write_all(&bytes()).await }));
        wait("split read", Box::pin(async move { split_read.read(&mut [0]).await.map(drop) }));
        wait(
            "later",
            Box::pin(async move {
                pause().await;
                later.write_all(&bytes()).await
            }),
        );
        wait(
            "split later",
            Box::pin(async move {
                pause().await;
                split_later.write_all(&bytes()).await
            }),
        );
        let moving = poll_fn(|cx| Pin::new(&mut muxer).poll(cx));
        assert!(timeout(Duration::from_secs(2), moving).await.is_err(), "all of them wait");
        assert!(told.try_recv().is_err(), "all of them wait");

        let start = Instant::now();
        let closed = poll_fn(|cx| Pin::new(&mut muxer).poll_close(cx)).await;
        assert_eq!(closed.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), CLOSE_TIMEOUT);
        let mut ended: Vec<_> = std::iter::from_fn(|| told.try_recv().ok()).collect();
        ended.sort();
        let names = ["later", "read", "split later", "split read", "without credit"];
        assert_eq!(ended, names.map(|name| (name, start)));
    }

    #[test]
    fn windows_grow_with_the_distance_and_not_without_one() {
        let grows = |milliseconds| growth_bytes(Duration::from_millis(milliseconds));
        assert_eq!(grows(2), 0);
        // Twice 100 MB/s times the round trip, and room for other streams.
        assert!((20 << 20..40 << 20).contains(&grows(100)));
        assert_eq!(grows(5000), GROWTH_BYTES_MAX);
    }
}
