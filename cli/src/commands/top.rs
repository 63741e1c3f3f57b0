//! `baton top`: the cluster on the whole terminal.

mod draw;
mod sample;
mod screen;

use std::io::IsTerminal;
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, channel};

use super::{CommandError, usage};
use crate::client::Target;
use sample::{Sample, Sampler};
use screen::{Key, Screen};

/// Command line of `baton top`.
#[derive(clap::Args)]
#[command(
    after_help = "Keys: q ends, arrows scroll, s changes the order of nodes, r turns it round."
)]
pub(crate) struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    every: f64,
    #[command(flatten)]
    target: Target,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "it must be a number of seconds from 0.1 to 3600".to_owned())
}

/// Runs `baton top`.
pub(crate) async fn run(args: TopArgs) -> Result<(), CommandError> {
    if !std::io::stdout().is_terminal() {
        return Err(usage("top needs a terminal; `baton status` and `baton nodes` print"));
    }
    // Whether anybody answers is said before the terminal is taken.
    let mut sampler = Sampler::new(args.target);
    let mut screen = Screen::default();
    screen.show(sampler.take().await?);
    let mut terminal = ratatui::try_init()?;
    let result = follow(&mut terminal, &mut screen, samples(sampler, args.every)).await;
    ratatui::restore();
    result
}

async fn follow(
    terminal: &mut ratatui::DefaultTerminal,
    screen: &mut Screen,
    mut samples: Receiver<Result<Sample, CommandError>>,
) -> Result<(), CommandError> {
    let mut keys = keys();
    loop {
        terminal.draw(|frame| draw::draw(frame, screen))?;
        tokio::select! {
            key = keys.recv() => match key {
                Some(Key::Quit) | None => return Ok(()),
                Some(Key::Redraw) => {}
                Some(key) => screen.press(key),
            },
            Some(sample) = samples.recv() => match sample {
                Ok(sample) => screen.show(sample),
                Err(error) => screen.problem = Some(error.to_string()),
            },
        }
    }
}

/// Looks at the cluster; however long they take, no key waits for them.
fn samples(mut sampler: Sampler, every: f64) -> Receiver<Result<Sample, CommandError>> {
    let (sender, receiver) = channel(1);
    let mut looks = tokio::time::interval(Duration::from_secs_f64(every));
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tokio::spawn(async move {
        loop {
            looks.tick().await;
            if sender.send(sampler.take().await).await.is_err() {
                return;
            }
        }
    });
    receiver
}

/// Keys as they are pressed; a thread of its own waits for them.
fn keys() -> Receiver<Key> {
    let (sender, receiver) = channel(16);
    std::thread::spawn(move || {
        while let Ok(event) = ratatui::crossterm::event::read() {
            if let Some(key) = screen::key(&event)
                && sender.blocking_send(key).is_err()
            {
                return;
            }
        }
    });
    receiver
}
