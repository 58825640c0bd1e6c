//! A thousand simulated nodes of which a tenth crashes every minute: records are found until they expire.

use bytes::Bytes;
use potluck_dht::{Dht, DhtConfig, Found};
use potluck_net::{Env, PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimNet, run};
use std::time::Duration;

const NODES: usize = 1000;
const RECORDS: usize = 60;
const MINUTES: usize = 3;
const STEPS_PER_MINUTE: usize = 10;
const CRASHES_PER_STEP: usize = NODES / 10 / STEPS_PER_MINUTE;
const GETS_PER_STEP: usize = 20;

struct Swarm {
    net: SimNet,
    nodes: Vec<(PeerId, Dht)>,
    chance: Env,
}

impl Swarm {
    async fn add(&mut self) {
        let transport = self.net.add_peer(PeerSpec::default());
        let peer = transport.local_peer();
        let known = match self.nodes.len() {
            0 => Vec::new(),
            len => (0..2).map(|_| self.nodes[self.below(len)].0).collect(),
        };
        let config = DhtConfig { initial_peers: known, ..DhtConfig::default() };
        let dht = Dht::start(transport, self.net.env(peer), config).await.expect("the settings are valid");
        self.nodes.push((peer, dht));
    }

    fn below(&self, bound: usize) -> usize {
        (self.chance.random_u64() % bound as u64) as usize
    }

    /// Half of them are reset, half fall silent.
    fn lose(&mut self, silent: bool) {
        let (peer, dht) = self.nodes.swap_remove(self.below(self.nodes.len()));
        if silent {
            self.net.vanish(peer);
        } else {
            self.net.crash(peer);
        }
        drop(dht);
    }

    fn any(&self) -> Dht {
        self.nodes[self.below(self.nodes.len())].1.clone()
    }
}

fn key(index: usize) -> Vec<u8> {
    format!("record {index}").into_bytes()
}

async fn churn(net: SimNet) -> (usize, usize, Vec<usize>) {
    let mut swarm = Swarm { net, nodes: Vec::new(), chance: Env::simulated(9, Duration::ZERO) };
    for _ in 0..NODES {
        swarm.add().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    for index in 0..RECORDS {
        let value = Bytes::from(index.to_string());
        let stored = swarm.any().store(&key(index), None, value, Duration::from_secs(3600)).await;
        assert!(stored.value.accepted >= 4, "{stored:?}");
    }
    let (mut asked, mut found, mut hops) = (0, 0, Vec::new());
    for step in 0..MINUTES * STEPS_PER_MINUTE {
        for loss in 0..CRASHES_PER_STEP {
            swarm.lose((step + loss) % 2 == 0);
            swarm.add().await;
        }
        tokio::time::sleep(Duration::from_secs(60) / STEPS_PER_MINUTE as u32).await;
        let gets = (0..GETS_PER_STEP).map(|_| {
            let (dht, index) = (swarm.any(), swarm.below(RECORDS));
            async move {
                let (outcome, hops) = dht.get_with_hops(&key(index), false).await;
                (matches!(outcome.value, Some(Found::Regular(value, _)) if value == index.to_string()), hops)
            }
        });
        for (hit, distance) in futures::future::join_all(gets).await {
            asked += 1;
            found += usize::from(hit);
            hops.extend(hit.then_some(distance));
        }
    }
    (asked, found, hops)
}

#[test]
fn records_survive_a_tenth_of_the_nodes_crashing_every_minute() {
    let (asked, found, mut hops) = run(1, churn);
    hops.sort_unstable();
    let median = hops[hops.len() / 2];
    println!("{found} of {asked} found, {median} hops in the median, {} at most", hops[hops.len() - 1]);
    assert!(found * 1000 >= asked * 995, "{found} of {asked} found");
    assert!(median <= 4, "{median} hops in the median");
}
