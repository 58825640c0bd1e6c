//! What a simulated round costs in real time: a toy all-reduce among N peers, one JSON line per size.
//!
//! `cargo run --release -p potluck-net-sim --example all_reduce`

#![expect(clippy::print_stdout, reason = "printing the figure is what this program is for")]

use bytes::Bytes;
use futures::future::join_all;
use potluck_net::{Protocol, Stream, Transport};
use potluck_net_sim::{PeerSpec, SimNet, SimTransport, run};
use std::sync::Arc;

/// Pieces in which a part travels.
const FRAME_BYTES: usize = 512 << 10;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    // (peers, bytes per peer, bytes per second): the first is the reference round of about 12.5 virtual seconds.
    for (peers, bytes, rate) in [(32, 64 << 20, 10.4e6), (8, 64 << 20, 10.4e6), (100, 10 << 20, 12.5e6)] {
        #[expect(clippy::disallowed_methods, reason = "real time is what is measured")]
        let start = std::time::Instant::now();
        let (virtual_seconds, lines) = run(1, async |net| round(&net, peers, bytes, rate).await)?;
        let real_milliseconds = start.elapsed().as_secs_f64() * 1e3;
        println!(
            "{{\"peers\":{peers},\"bytes_per_peer\":{bytes},\"virtual_seconds\":{virtual_seconds:.2},\
             \"real_milliseconds\":{real_milliseconds:.1},\"trace_lines\":{lines}}}"
        );
    }
    Ok(())
}

async fn round(net: &SimNet, peers: usize, bytes: usize, rate: f64) -> Result<(f64, u64), Failure> {
    let spec = PeerSpec { up_bytes_per_second: rate, down_bytes_per_second: rate, ..PeerSpec::default() };
    let peers: Vec<Arc<SimTransport>> = (0..peers).map(|_| net.add_peer(spec.clone())).collect();
    let part = Bytes::from(vec![0; bytes / peers.len()]);
    let results = join_all((0..peers.len()).map(|index| one_peer(&peers, index, &part))).await;
    for result in results {
        result?;
    }
    Ok((net.elapsed().as_secs_f64(), net.trace_name().total))
}

/// Send a part to every other peer and get it back averaged; reduce what the others send.
async fn one_peer(peers: &[Arc<SimTransport>], index: usize, part: &Bytes) -> Result<(), Failure> {
    let protocol = Protocol::new("/all-reduce/1");
    let mut incoming = peers[index].accept(protocol.clone(), peers.len())?;
    let others = || (1..peers.len()).map(|step| peers[(index + step) % peers.len()].local_peer());
    let sends = join_all(others().map(async |peer| {
        let stream = peers[index].open(peer, protocol.clone()).await?;
        exchange(stream, part).await
    }));
    let reduce = async {
        let mut streams = Vec::new();
        while streams.len() + 1 < peers.len() {
            streams.push(incoming.next().await.ok_or("closed")?);
        }
        join_all(streams.into_iter().map(|stream| exchange(stream, part))).await.into_iter().collect()
    };
    let (sent, reduced): (Vec<Result<(), Failure>>, Result<(), Failure>) = futures::join!(sends, reduce);
    sent.into_iter().collect::<Result<(), Failure>>()?;
    reduced
}

async fn exchange(stream: Stream, part: &Bytes) -> Result<(), Failure> {
    let (mut sender, mut receiver) = stream.split();
    let send = async {
        let mut rest = part.clone();
        while !rest.is_empty() {
            sender.send(rest.split_to(rest.len().min(FRAME_BYTES))).await?;
        }
        Ok::<_, Failure>(sender.finish().await?)
    };
    let receive = async {
        while receiver.recv().await?.is_some() {}
        Ok::<_, Failure>(())
    };
    futures::try_join!(send, receive).map(|_| ())
}
