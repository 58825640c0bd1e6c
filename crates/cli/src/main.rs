//! The `potluck` command. The only crate that prints; everything it does is in the crates below.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks through its output")]

mod bench;
mod delay;
mod node;
mod probe;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "potluck", version, about = "Train one neural network on whatever machines turn up")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a bootstrap peer (and, with --relay, a relay) until told to stop; prints a join token
    Node(node::Args),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Connect to a peer by its id and say how: direct, hole-punched or relayed
    Probe(probe::Args),
}

#[derive(Subcommand)]
enum BenchCommand {
    /// The network: MB/s and processor seconds per GB between two processes, as JSON
    Net(bench::Args),
    /// One end of `bench net`; started by it
    #[command(hide = true)]
    NetPeer(bench::PeerArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("potluck: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Node(args) => node::run(args).await,
            Command::Bench(BenchCommand::Net(args)) => bench::run(args).await,
            Command::Bench(BenchCommand::NetPeer(args)) => bench::run_peer(args).await,
            Command::Probe(args) => probe::run(args).await,
        }
    });
    // Whatever a library still runs on blocking threads must not hold up the end.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("potluck: {error:#}");
            ExitCode::FAILURE
        }
    }
}
