//! `potluck version`, `completions` and `man`: what the command says about itself.

use crate::Cli;
use anyhow::{Context, Result};
use clap::{Args as ClapArgs, CommandFactory};
use clap_complete::Shell;
use potluck_collab::PROTOCOL_VERSION;
use std::io::Write;
use std::path::PathBuf;

pub(crate) const COMPLETIONS_HELP: &str = "Examples:\n  potluck completions bash > ~/.local/share/bash-completion/completions/potluck\n  \
     potluck completions zsh > ~/.zfunc/_potluck";
pub(crate) const MAN_HELP: &str =
    "Examples:\n  potluck man | man -l -\n  potluck man --dir ~/.local/share/man/man1";

#[derive(ClapArgs)]
pub(crate) struct VersionArgs {
    /// Print one line of JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
}

#[derive(ClapArgs)]
pub(crate) struct ManArgs {
    /// Folder to write a page for every command into; without it, the main page goes to stdout
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// Print the version.
pub(crate) fn version(args: &VersionArgs) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let (system, processor) = (std::env::consts::OS, std::env::consts::ARCH);
    if args.json {
        let facts = serde_json::json!({
            "version": version,
            "protocol": PROTOCOL_VERSION,
            "system": system,
            "processor": processor,
        });
        println!("{facts}");
    } else {
        println!("potluck {version} (protocol {PROTOCOL_VERSION}, {system}, {processor})");
    }
    Ok(())
}

/// Print a shell's completions.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "potluck", &mut text);
    Ok(std::io::stdout().lock().write_all(&text)?)
}

/// Print the main page, or write all of them.
pub(crate) fn man(args: &ManArgs) -> Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut page)?;
        return Ok(std::io::stdout().lock().write_all(&page)?);
    };
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("cannot write into {}", dir.display()))
}
