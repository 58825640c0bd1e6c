//! yamux on an encrypted connection, with frames as large as bulk data wants them.
//!
//! `libp2p-yamux` fixes frames at 16 KiB: each costs an allocation, a wake-up and two encrypted records, of which one
//! carries 12 bytes. It also drops inbound streams beyond 256 that wait to be picked up. The protocol is the same.

use futures::{AsyncRead, AsyncWrite, ready};
use libp2p::core::UpgradeInfo;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use std::collections::VecDeque;
use std::future::{Ready, ready as immediately};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use yamux::{Connection, ConnectionError, Mode, Stream};

/// Payload of the largest frame that we send. A message of control that comes behind it on a link of 20 Mbit/s waits
/// for 26 ms, less than for what the socket holds already.
const FRAME_BYTES: usize = 64 << 10;

/// The receive window that a stream begins with; yamux sets it aside for every stream that there may be.
const FIRST_WINDOW_BYTES: usize = 256 << 10;
/// How much all windows of a connection together may grow with the round trip: 100 MB/s at 100 ms need 10 MB, and yamux
/// allows twice the product. Without it a stream moves 256 KiB per round trip however fast the link is.
const GROWTH_BYTES: usize = 64 << 20;

/// How connections are shared between streams.
#[derive(Debug, Clone)]
pub(crate) struct Mux {
    config: yamux::Config,
    streams_max: usize,
}

impl Mux {
    /// Connections with at most this many streams.
    pub(crate) fn new(streams_max: usize) -> Self {
        let mut config = yamux::Config::default();
        config.set_max_connection_receive_window(Some(streams_max * FIRST_WINDOW_BYTES + GROWTH_BYTES));
        config.set_max_num_streams(streams_max).set_split_send_size(FRAME_BYTES);
        Self { config, streams_max }
    }

    fn muxer<C>(self, socket: C, mode: Mode) -> Ready<io::Result<Muxer<C>>>
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        let connection = Connection::new(socket, self.config, mode);
        let (waiting, picked_up) = (VecDeque::new(), None);
        immediately(Ok(Muxer { connection, waiting, waiting_max: self.streams_max, picked_up }))
    }
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
}

fn broken(error: ConnectionError) -> io::Error {
    match error {
        ConnectionError::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        let next = ready!(self.connection.poll_next_inbound(cx));
        Poll::Ready(next.unwrap_or(Err(ConnectionError::Closed)).map_err(broken))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Stream;
    type Error = io::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        if let Some(stream) = self.waiting.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        if let Poll::Ready(next) = self.poll_connection(cx) {
            return Poll::Ready(next);
        }
        self.picked_up = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_outbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        self.connection.poll_new_outbound(cx).map_err(broken)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.poll_close(cx).map_err(broken)
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
