//! `potluck status`: how a run is going, asked from outside. Once, repeatedly, or as a view that fills the terminal.

use crate::nearby::{Source, Target};
use crate::stop::Stop;
use crate::view;
use anyhow::Result;
use clap::Args as ClapArgs;
use potluck_collab::Status;
use ratatui::crossterm::event::{self, Event, KeyCode};
use ratatui::layout::{Constraint, Layout};
use ratatui::widgets::{Block, Gauge, Paragraph, Row, Table};
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

pub(crate) const HELP: &str = "Whoever only looks is no member of the run: nobody waits for it.\n\nExamples:\n  \
potluck status                  # the runs with a peer on this machine\n  potluck status my-run\n  potluck status potluck1…\n  potluck status potluck1… --json | jq .epoch\n  potluck status potluck1… --watch";

/// How long keys may go unanswered.
const KEYS_EVERY: Duration = Duration::from_millis(100);
/// How long a run may stay silent while it is watched, before that is an error.
const SILENCE_MAX: Duration = Duration::from_secs(60);

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// A run's token, or the name of a run with a peer on this machine [default: all of those]
    #[arg(value_name = "RUN|TOKEN")]
    target: Option<Target>,
    /// Print JSON instead of text; with --watch, one line each time
    #[arg(long)]
    json: bool,
    /// Go on until stopped: a view in a terminal (q ends it), plain text elsewhere
    #[arg(long)]
    watch: bool,
    /// Seconds between two looks with --watch
    #[arg(long, default_value_t = 2.0, value_parser = positive)]
    every: f64,
    /// Stop watching after so many looks
    #[arg(long)]
    count: Option<u64>,
    /// How long to look for the run, in seconds
    #[arg(long, default_value_t = 20.0, value_parser = positive)]
    limit: f64,
}

/// A number of seconds that makes sense.
pub(crate) fn positive(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.01..=1e6).contains(&seconds) { Ok(seconds) } else { Err("allowed is 0.01 to 1000000".to_owned()) }
}

/// Look.
pub(crate) async fn run(args: Args) -> Result<()> {
    let mut stop = Stop::listen()?;
    let sources = Source::find(args.target.as_ref(), args.watch || args.json).await?;
    let last = sources.len();
    for (at, source) in sources.into_iter().enumerate() {
        let result = tokio::select! {
            biased;
            () = stop.asked() => Ok(()),
            result = show(&source, &args) => result,
        };
        source.leave().await;
        result?;
        if at + 1 < last {
            writeln!(std::io::stdout().lock())?;
        }
    }
    Ok(())
}

async fn show(visit: &Source, args: &Args) -> Result<()> {
    let first = visit.look(Duration::from_secs_f64(args.limit)).await?;
    if !args.watch {
        let text = if args.json {
            format!("{}\n", serde_json::to_string_pretty(&first)?)
        } else {
            view::text(&first)
        };
        return Ok(std::io::stdout().lock().write_all(text.as_bytes())?);
    }
    if args.json || !std::io::stdout().is_terminal() {
        return print_on(visit, args, first).await;
    }
    let (mut terminal, _view) = View::open();
    draw_on(visit, args, first, &mut terminal).await
}

/// The terminal is ours until this is dropped, however that comes: a signal drops it in the middle.
struct View;

impl View {
    fn open() -> (ratatui::DefaultTerminal, Self) {
        crate::log::hush(true);
        (ratatui::init(), Self)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        ratatui::restore();
        crate::log::hush(false);
    }
}

/// Plain lines, for pipes and logs.
async fn print_on(visit: &Source, args: &Args, mut status: Status) -> Result<()> {
    let mut looks = 1;
    loop {
        let text = if args.json { serde_json::to_string(&status)? } else { view::text(&status) };
        let mut out = std::io::stdout().lock();
        let written = writeln!(out, "{text}").and_then(|()| out.flush());
        drop(out);
        if written.is_err() || args.count.is_some_and(|count| looks >= count) {
            // The reader of the pipe has gone: that is how watching ends.
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs_f64(args.every)).await;
        status = visit.look(SILENCE_MAX).await?;
        looks += 1;
    }
}

/// The view that fills the terminal.
async fn draw_on(
    visit: &Source,
    args: &Args,
    mut status: Status,
    terminal: &mut ratatui::DefaultTerminal,
) -> Result<()> {
    let mut looks = 1;
    loop {
        terminal.draw(|frame| draw(frame, &status))?;
        let pause = tokio::time::sleep(Duration::from_secs_f64(args.every));
        let last = args.count.is_some_and(|count| looks >= count);
        // Keys count also while the run does not answer.
        let next = async {
            pause.await;
            if last { Ok(None) } else { visit.look(SILENCE_MAX).await.map(Some) }
        };
        let next = tokio::select! {
            next = next => next?,
            ended = until_ended(terminal, &status) => return ended,
        };
        let Some(next) = next else { return Ok(()) };
        status = next;
        looks += 1;
    }
}

/// Until a key ends the view. It is drawn again meanwhile, for a window that has another size now.
async fn until_ended(terminal: &mut ratatui::DefaultTerminal, status: &Status) -> Result<()> {
    loop {
        while event::poll(Duration::ZERO)? {
            if let Event::Key(key) = event::read()?
                && matches!(key.code, KeyCode::Char('q' | 'c') | KeyCode::Esc)
            {
                return Ok(());
            }
        }
        tokio::time::sleep(KEYS_EVERY).await;
        terminal.draw(|frame| draw(frame, status))?;
    }
}

fn draw(frame: &mut ratatui::Frame<'_>, status: &Status) {
    let headline = view::headline(status);
    let lines = u16::try_from(headline.lines().count()).unwrap_or(u16::MAX).saturating_add(2);
    let areas = Layout::vertical([Constraint::Length(lines), Constraint::Length(3), Constraint::Min(3)]);
    let [above, middle, below] = areas.areas(frame.area());
    frame.render_widget(Paragraph::new(headline).block(Block::bordered().title("potluck (q ends)")), above);
    let gauge = Gauge::default().ratio(view::fraction(status));
    frame.render_widget(gauge.block(Block::bordered().title("this epoch")), middle);
    let widths = [4, 8, 6, 8, 6, 10, 12, 12, 13, 7].map(Constraint::Length);
    let table = Table::new(view::rows(status).into_iter().map(Row::new), widths)
        .header(Row::new(view::COLUMNS))
        .block(Block::bordered().title("peers"));
    frame.render_widget(table, below);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    /// The same run as the dashboard's tests look at: every figure of a status is in it.
    #[test]
    fn the_whole_view_of_a_terminal() {
        let status = serde_json::from_str(include_str!("../../dashboard/tests/status.json")).unwrap();
        let mut terminal = Terminal::new(TestBackend::new(100, 24)).unwrap();
        terminal.draw(|frame| draw(frame, &status)).unwrap();
        let screen = terminal.backend().to_string();
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/screen.txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(golden, &screen).unwrap();
        }
        assert_eq!(screen, std::fs::read_to_string(golden).unwrap());
    }

    #[test]
    fn only_sensible_numbers_of_seconds() {
        assert_eq!(positive("2.5"), Ok(2.5));
        for text in ["0", "-1", "nan", "inf", "soon"] {
            assert!(positive(text).is_err(), "{text}");
        }
    }
}
