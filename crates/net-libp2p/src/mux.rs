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
use std::time::Duration;
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
        let (waiting, picked_up) = (VecDeque::new(), None);
        immediately(Ok(Muxer { connection, waiting, waiting_max: self.streams_max, picked_up }))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_grow_with_the_distance_and_not_without_one() {
        let grows = |milliseconds| growth_bytes(Duration::from_millis(milliseconds));
        assert_eq!(grows(2), 0);
        // Twice 100 MB/s times the round trip, and room for other streams.
        assert!((20 << 20..40 << 20).contains(&grows(100)));
        assert_eq!(grows(5000), GROWTH_BYTES_MAX);
    }
}
