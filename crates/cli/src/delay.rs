//! A relay in user space that delays everything by half a round trip, for TCP and UDP: long links without root.

use anyhow::Result;
use potluck_net::Tasks;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Pieces on their way in one direction: enough for 1 GB/s at 100 ms in pieces of 64 KiB.
const TCP_PIECES_MAX: usize = 1600;
const TCP_PIECE_BYTES: usize = 64 << 10;
/// Datagrams on their way in one direction; more are lost, as on a real link.
const DATAGRAMS_MAX: usize = 64 << 10;
const DATAGRAM_BYTES_MAX: usize = 65_536;

type Delayed = (Instant, Vec<u8>);

/// Forward TCP connections to `target`; where to connect to instead.
pub(crate) async fn tcp(target: SocketAddr, one_way: Duration, tasks: &Tasks) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let scope = Tasks::new();
    tasks.spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(target).await else { continue };
            if near.set_nodelay(true).and_then(|()| far.set_nodelay(true)).is_err() {
                continue;
            }
            let (near_read, near_write) = near.into_split();
            let (far_read, far_write) = far.into_split();
            pump(near_read, far_write, one_way, &scope);
            pump(far_read, near_write, one_way, &scope);
        }
    });
    Ok(address)
}

fn pump(
    mut from: impl AsyncReadExt + Unpin + Send + 'static,
    mut to: impl AsyncWriteExt + Unpin + Send + 'static,
    one_way: Duration,
    tasks: &Tasks,
) {
    let (sender, mut pieces) = mpsc::channel::<Delayed>(TCP_PIECES_MAX);
    tasks.spawn(async move {
        let mut buffer = vec![0; TCP_PIECE_BYTES];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let piece = (Instant::now() + one_way, buffer[..count].to_vec());
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    });
    tasks.spawn(async move {
        while let Some((due, piece)) = pieces.recv().await {
            sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
    });
}

/// Forward datagrams to `target`; where to send them instead.
pub(crate) async fn udp(target: SocketAddr, one_way: Duration, tasks: &Tasks) -> Result<SocketAddr> {
    let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await?);
    let address = near.local_addr()?;
    let scope = Tasks::new();
    tasks.spawn(async move {
        let mut ways: BTreeMap<SocketAddr, mpsc::Sender<Delayed>> = BTreeMap::new();
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        while let Ok((count, client)) = near.recv_from(&mut buffer).await {
            if let std::collections::btree_map::Entry::Vacant(e) = ways.entry(client) {
                let Ok(far) = UdpSocket::bind("127.0.0.1:0").await else { return };
                if far.connect(target).await.is_err() {
                    return;
                }
                let far = Arc::new(far);
                let to_far = deliver(far.clone(), None, &scope);
                let to_near = deliver(near.clone(), Some(client), &scope);
                scope.spawn(collect(far, to_near, one_way));
                e.insert(to_far);
            }
            if let Some(way) = ways.get(&client) {
                // A full link loses datagrams.
                let _lost = way.try_send((Instant::now() + one_way, buffer[..count].to_vec()));
            }
        }
    });
    Ok(address)
}

async fn collect(far: Arc<UdpSocket>, way: mpsc::Sender<Delayed>, one_way: Duration) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    while let Ok(count) = far.recv(&mut buffer).await {
        let _lost = way.try_send((Instant::now() + one_way, buffer[..count].to_vec()));
    }
}

fn deliver(socket: Arc<UdpSocket>, to: Option<SocketAddr>, tasks: &Tasks) -> mpsc::Sender<Delayed> {
    let (sender, mut datagrams) = mpsc::channel::<Delayed>(DATAGRAMS_MAX);
    tasks.spawn(async move {
        while let Some((due, datagram)) = datagrams.recv().await {
            sleep_until(due).await;
            let sent = match to {
                Some(to) => socket.send_to(&datagram, to).await,
                None => socket.send(&datagram).await,
            };
            // The other side may be gone, or not there yet.
            let _lost = sent;
        }
    });
    sender
}
