//! The `potluck` command. The only crate that prints; everything it does is in the crates below.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks through its output")]

mod bench;
mod checkpoint;
mod company;
mod delay;
mod doctor;
mod export;
mod failure;
mod invite;
mod keeper;
mod keygen;
mod log;
mod machine;
mod manual;
mod monitor;
mod nat;
mod nearby;
mod node;
mod pickle;
mod probe;
mod raw_tcp;
mod rehearsal;
mod sim;
mod status;
mod stop;
mod tensors;
mod view;
mod visit;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};
use potluck_net::RUNTIME_THREADS;
use std::process::ExitCode;
use tokio::runtime::{Builder, Runtime};

/// What every command's exit code means, in `--help` and the man page, and how to begin.
const HELP: &str = "Exit codes: 0 it worked; 1 it did not, and the last lines on stderr say why and what to do; \
     2 the command line is wrong. `potluck doctor` has its own, see `potluck doctor --help`.\n\n\
     POTLUCK_LOG says what is logged to stderr: off, error, warn, info, debug, trace, or parts such as \
     warn,potluck::net=debug [default: error,potluck=warn].\n\n\
     Examples:\n  potluck node --run my-run          # prints a token\n  \
     potluck doctor potluck1…           # what this machine will be in that run\n  \
     potluck status my-run";

#[derive(Parser)]
#[command(
    name = "potluck",
    version,
    about = "Train one neural network on whatever machines turn up",
    after_help = HELP
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Look at this machine and the way into a run, before joining it
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::Args),
    /// Show how a run is going, without taking part in it
    #[command(after_help = status::HELP)]
    Status(status::Args),
    /// Serve a run's dashboard, without taking part in it
    #[command(after_help = monitor::HELP)]
    Monitor(monitor::Args),
    /// Keep the newest state of a run on disk, for those who come when everybody has left
    #[command(after_help = keeper::HELP)]
    Keeper(keeper::Args),
    /// Turn a keeper's checkpoint into a file that torch loads
    #[command(after_help = export::HELP)]
    Export(export::Args),
    /// Run a bootstrap peer until told to stop; prints a join token
    #[command(after_help = node::HELP)]
    Node(node::Args),
    /// Run a bootstrap peer that also carries the connections of peers behind NAT
    #[command(after_help = node::RELAY_HELP)]
    Relay(node::Args),
    /// Make the identity of a machine, or show the one that is there
    #[command(after_help = keygen::HELP)]
    Keygen(keygen::Args),
    /// Put the owner's invite to a closed run into its token
    #[command(after_help = invite::HELP)]
    Invite(invite::Args),
    /// Simulate a run: how long its rounds will take, what they will move
    #[command(after_help = sim::HELP)]
    Sim(sim::Args),
    /// Measure
    #[command(subcommand, after_help = bench::HELP)]
    Bench(BenchCommand),
    /// Connect to a peer by its id and say how: direct, hole-punched or relayed
    #[command(after_help = probe::HELP)]
    Probe(probe::Args),
    /// Print the version and that of the protocol: peers of one run must have the same
    #[command(after_help = "Example:\n  potluck version --json")]
    Version(manual::VersionArgs),
    /// Print the completions of a shell
    #[command(after_help = manual::COMPLETIONS_HELP)]
    Completions(manual::CompletionsArgs),
    /// Print the manual page, or write one for every command
    #[command(after_help = manual::MAN_HELP)]
    Man(manual::ManArgs),
}

#[derive(Subcommand)]
enum BenchCommand {
    /// The network: MB/s and processor seconds per GB between two processes, as JSON
    #[command(after_help = bench::HELP)]
    Net(bench::Args),
    /// One end of `bench net`; started by it
    #[command(hide = true)]
    NetPeer(bench::PeerArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = log::start() {
        return fail(&error);
    }
    let runtime = match runtime(&cli.command) {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("potluck: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(cli.command));
    // Whatever a library still runs on blocking threads must not hold up the end.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

/// As many threads as there are cores, for nodes that relay; where peers are measured, what peers have.
fn runtime(command: &Command) -> std::io::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    if matches!(command, Command::Bench(BenchCommand::NetPeer(_))) {
        builder.worker_threads(RUNTIME_THREADS);
    }
    builder.enable_all().build()
}

/// Say what is wrong and what to do.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("potluck: {}", failure::text(error));
    eprintln!("hint: {}", failure::hint(error).unwrap_or(failure::LAST_HINT));
    ExitCode::FAILURE
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Doctor(args) => return doctor::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Monitor(args) => monitor::run(args).await,
        Command::Keeper(args) => keeper::run(args).await,
        Command::Export(args) => export::run(&args),
        Command::Node(args) => node::run(args).await,
        Command::Relay(args) => node::run(args.relaying()).await,
        Command::Keygen(args) => keygen::run(&args),
        Command::Invite(args) => invite::run(&args),
        Command::Sim(args) => sim::run(args).await,
        Command::Bench(BenchCommand::Net(args)) => bench::run(args).await,
        Command::Bench(BenchCommand::NetPeer(args)) => bench::run_peer(args).await,
        Command::Probe(args) => probe::run(args).await,
        Command::Version(args) => manual::version(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// A wrong command line: clap's message, and where a token was expected, where tokens come from.
fn refuse(error: &clap::Error) -> ExitCode {
    // Nobody may be reading; the exit code says it all the same.
    let _printed = error.print();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return ExitCode::SUCCESS;
    }
    let about_token = matches!(
        error.get(ContextKind::InvalidArg),
        Some(ContextValue::String(argument)) if argument.contains("TOKEN") || argument.starts_with("--join")
    );
    if about_token && error.kind() == ErrorKind::ValueValidation {
        eprintln!("hint: {}", failure::TOKEN_HINT);
    } else if error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        eprintln!("hint: every command's --help has an example");
    }
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        command.build();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            let example = format!("  potluck {}", sub.get_name());
            assert!(help.contains("Example") && help.contains(&example), "{}: {help}", sub.get_name());
        }
    }
}
