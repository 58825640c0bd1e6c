//! What the crates below report while they work, on stderr: `POTLUCK_LOG` chooses how much. Warnings of potluck and
//! errors of libraries unless it says otherwise; a healthy run has neither.

use crate::failure::Failure;
use anyhow::Result;
use std::io::{IsTerminal, stderr};
use std::sync::atomic::{AtomicBool, Ordering};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::writer::OptionalWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

pub(crate) const VARIABLE: &str = "POTLUCK_LOG";
const HINT: &str = "levels are off, error, warn, info, debug and trace: POTLUCK_LOG=info or POTLUCK_LOG=warn,potluck::net=debug";
/// Something fills the terminal: a line in between would spoil it.
static HUSHED: AtomicBool = AtomicBool::new(false);

/// Begin. Coloured on a terminal, plain elsewhere and where `NO_COLOR` is set.
pub(crate) fn start() -> Result<()> {
    let wanted = std::env::var(VARIABLE).unwrap_or_default();
    let targets = parse(&wanted)?;
    let colour = stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let writer = || match HUSHED.load(Ordering::Relaxed) {
        true => OptionalWriter::none(),
        false => OptionalWriter::some(stderr()),
    };
    let lines = tracing_subscriber::fmt::layer().with_ansi(colour).with_writer(writer);
    Ok(tracing_subscriber::registry().with(lines).with(targets).try_init()?)
}

/// Say nothing while a view fills the terminal.
pub(crate) fn hush(quiet: bool) {
    HUSHED.store(quiet, Ordering::Relaxed);
}

/// Levels, for everything or by target. A lone word that is no level is a slip of the pen, not the name of a target.
fn parse(text: &str) -> Result<Targets> {
    if text.trim().is_empty() {
        return Ok(Targets::new().with_default(LevelFilter::ERROR).with_target("potluck", LevelFilter::WARN));
    }
    let mut targets = Targets::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (target, level) =
            part.rsplit_once('=').map_or((None, part), |(target, level)| (Some(target), level));
        // An empty word counts as a level to its parser, but means nothing to a reader.
        let known = level.trim().parse::<LevelFilter>().ok().filter(|_| !level.trim().is_empty());
        let Some(level) = known else {
            return Err(Failure::new(format!("{VARIABLE}={text:?}: {level:?} is no level"), HINT).into());
        };
        targets = match target {
            Some(target) => targets.with_target(target.trim(), level),
            None => targets.with_default(level),
        };
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn levels_count_for_everything_or_for_a_target() {
        let usual = parse("").unwrap();
        assert!(usual.would_enable("potluck::net", &Level::WARN));
        assert!(!usual.would_enable("potluck::net", &Level::INFO));
        assert!(!usual.would_enable("libp2p_swarm", &Level::WARN));
        let chosen = parse("info, potluck::dht=trace").unwrap();
        assert!(chosen.would_enable("libp2p_swarm", &Level::INFO));
        assert!(!chosen.would_enable("potluck::net", &Level::DEBUG));
        assert!(chosen.would_enable("potluck::dht", &Level::TRACE));
        assert!(!parse("off").unwrap().would_enable("potluck", &Level::ERROR));
    }

    #[test]
    fn what_is_no_level_is_refused() {
        for text in ["loud", "potluck::net", "potluck=very", "="] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
