//! One peer of a run on this machine, for tests that need real processes: `peer SEED EPOCHS [ADDRESS…]` trains the broad
//! toy model over libp2p on loopback, joining through these addresses, and says what happens, a line each:
//!
//! * `address A`: where others can dial it.
//! * `midway E`: a quarter of its bytes of epoch E's round have left.
//! * `round E MEMBERS PEER…`: it got the average of that many, and blames these.
//! * `alone E PEER…`: the round of epoch E gave nothing; it blames these.
//! * `epoch E LINEAGE PARAMETERS`: it has reached epoch E with this history and these bits.
//! * `loaded FROM TO`, `joined PEER`, `lost PEER`, `event TEXT`.
//!
//! It trains when its input says so, with a line, and leaves the run when its input ends, so that nothing outlives a test
//! that was killed.
#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

use potluck_collab::{Event, Session};
use potluck_net::{Env, Identity, Transport};
use potluck_net_libp2p::{Config, Libp2pTransport};
use potluck_tests::harness::RunSpec;
use potluck_tests::models::Model;
use potluck_tests::record::{Entry, Record};
use potluck_tests::trainer::{Mischief, Trainer, Training};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Time of one step beside its arithmetic.
const STEP_TIME: Duration = Duration::from_millis(50);
/// Between two looks at how much has left.
const LOOK_EVERY: Duration = Duration::from_millis(1);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [seed, epochs, addresses @ ..] = arguments.as_slice() else {
        panic!("usage: peer SEED EPOCHS [ADDRESS…]")
    };
    let seed: u8 = seed.parse().expect("SEED is a small number");
    let epochs = epochs.parse().expect("EPOCHS is a number");
    let env = Env::real();
    let mut config = Config::loopback(Identity::from_seed(&[seed; 32]));
    config.bootstrap = addresses.to_vec();
    let transport = Libp2pTransport::start(config, env.clone()).await.expect("loopback can be listened on");
    let (me, address) = (transport.local_peer(), transport.addresses().into_iter().next());
    println!("address {}/p2p/{me}", address.expect("it listens"));

    let spec = RunSpec { model: Model::Broad, epochs, ..RunSpec::new(1) };
    let config = spec.config(transport.bootstrap_peers());
    let session = Session::join(transport.clone(), env.clone(), config).await.expect("the others are up");
    let training = Training {
        model: spec.model,
        policy: spec.policy,
        batch: 8,
        step_time: STEP_TIME,
        data_seed: 1000 + u64::from(seed),
        initial_seed: spec.seed,
        auxiliary: false,
        mischief: Mischief::None,
        fumbles: 0,
        epochs,
    };
    let record = Record::default();
    let mut events = session.events();
    let trainer = Trainer::new(session.clone(), env, training, record.clone());
    let listen = async {
        while let Ok(event) = events.recv().await {
            match event {
                Event::Joined { peer, .. } => println!("joined {peer}"),
                Event::Lost { peer, .. } => println!("lost {peer}"),
                Event::Round(_) => {}
                other => println!("event {other}"),
            }
        }
    };
    let (go, end) = input();
    let train = async {
        // An error is the end of the input.
        let _ended = go.await;
        trainer.run().await;
    };
    tokio::select! {
        () = train => {}
        () = listen => {}
        () = tell(record, transport.clone()) => {}
        _ = end => {}
    }
    session.leave().await;
    transport.close().await;
}

/// Say what the trainer records.
async fn tell(record: Record, transport: Arc<Libp2pTransport>) {
    // The round that is under way, and what had been sent before it.
    let mut under_way: Option<(u64, u64)> = None;
    let quarter = Model::Broad.len() as u64;
    loop {
        for entry in record.take() {
            if let Entry::Contribution { epoch, .. } = &entry {
                under_way = Some((*epoch, transport.traffic().sent_bytes));
            }
            line(&entry);
        }
        if let Some((epoch, before)) = under_way
            && transport.traffic().sent_bytes >= before + quarter
        {
            under_way = None;
            println!("midway {epoch}");
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn line(entry: &Entry) {
    match entry {
        Entry::Round { epoch, averaged, faults, .. } => {
            let blamed: Vec<String> = faults.iter().map(|fault| fault.peer.to_string()).collect();
            let blamed = blamed.join(" ");
            match averaged.alone {
                true => println!("alone {epoch} {blamed}"),
                false => println!("round {epoch} {} {blamed}", averaged.members.len()),
            }
        }
        Entry::Epoch { lineage, params, .. } => {
            println!("epoch {} {} {params:016x}", lineage.epoch, lineage.short());
        }
        Entry::Loaded { from, to, .. } => println!("loaded {from} {to}"),
        _ => {}
    }
}

/// Resolve when whoever started us writes a line, and when it closes our input or is gone.
fn input() -> (oneshot::Receiver<()>, oneshot::Receiver<()>) {
    let ((said, go), (ended, end)) = (oneshot::channel(), oneshot::channel());
    std::thread::spawn(move || {
        let _whatever = std::io::stdin().read_line(&mut String::new());
        let _nobody_waits = said.send(());
        let _whatever = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _nobody_waits = ended.send(());
    });
    (go, end)
}
