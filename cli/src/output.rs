//! Tables and JSON on stdout.

use std::io::{self, Write as _};
use std::time::Duration;

use crate::commands::{CommandError, is_unreachable};

/// Shortest time between two prints.
const SHORTEST_WATCH: f64 = 0.1;
const LONGEST_WATCH: f64 = 86_400.0;

/// How to print.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub(crate) struct FormatArgs {
    /// The same as -o json
    #[arg(long)]
    json: bool,
    /// How to print: for people, or for programs with keys that stay
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t)]
    output: Format,
}

// What is said of a value here makes the help of every command twice as long.
#[derive(Clone, Copy, Debug, Default, PartialEq, clap::ValueEnum)]
enum Format {
    #[default]
    Table,
    Json,
}

impl FormatArgs {
    /// For programs, not for people.
    pub(crate) fn is_json(self) -> bool {
        self.json || self.output == Format::Json
    }
}

/// How to print, and whether to go on printing.
#[derive(clap::Args)]
pub(crate) struct OutputArgs {
    #[command(flatten)]
    format: FormatArgs,
    /// Print again and again until interrupted, every second if no other time is given
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "1", value_parser = seconds)]
    watch: Option<Duration>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|s| (SHORTEST_WATCH..=LONGEST_WATCH).contains(s));
    let range =
        || format!("it must be a number of seconds from {SHORTEST_WATCH} to {LONGEST_WATCH}");
    seconds.map(Duration::from_secs_f64).ok_or_else(range)
}

impl OutputArgs {
    /// For programs, not for people.
    pub(crate) fn is_json(&self) -> bool {
        self.format.is_json()
    }

    /// Prints what `show` makes, once or again and again.
    pub(crate) async fn print<F>(&self, show: impl FnMut() -> F) -> Result<(), CommandError>
    where
        F: Future<Output = Result<String, CommandError>>,
    {
        self.print_each(show, &mut |text| text).await
    }

    /// Prints what `text` makes of what `ask` is answered, once or again and again.
    pub(crate) async fn print_each<T, F>(
        &self,
        mut ask: impl FnMut() -> F,
        text: &mut impl FnMut(T) -> String,
    ) -> Result<(), CommandError>
    where
        F: Future<Output = Result<T, CommandError>>,
    {
        let mut show = |answer| {
            let text = text(answer);
            if self.is_json() { text } else { harmless(&text) }.trim_end().to_owned() + "\n"
        };
        let first = show(ask().await?);
        let Some(pause) = self.watch else { return Ok(print(&first)?) };
        let clear = if self.is_json() { "" } else { "\x1b[2J\x1b[H" };
        print(&format!("{clear}{first}"))?;
        loop {
            tokio::time::sleep(pause).await;
            match ask().await {
                Ok(answer) => print(&format!("{clear}{}", show(answer)))?,
                // It was there, and may come back.
                Err(error) if is_unreachable(&*error) => complain(&format!("baton: {error}")),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Text for a terminal, which what clients have written into it cannot take over.
pub(crate) fn harmless(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}")
}

/// Writes to stdout at once. A closed pipe is an error, which `main` ends quietly with.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a line to stderr, which nobody may be reading.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{}", harmless(text));
}

/// Columns as wide as their widest cell, numbers as given.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> =
            cells.zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        // A cell may hold what a client has written.
        padded.join("  ").trim_end().replace('\n', " ") + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

/// `1.5 MiB` and the like.
pub(crate) fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// `350 ms`, `2.3 s`, `4m 12s`, `3h 05m`, `2d 04h`.
pub(crate) fn time(ms: f64) -> String {
    let seconds = (ms / 1000.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0 => format!("{ms:.0} ms"),
        1..60 => format!("{:.1} s", ms / 1000.0),
        60..3600 => format!("{minutes}m {:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {:02}h", hours % 24),
    }
}

/// `2026-11-21T22:31:05.123Z`, from milliseconds since 1970.
pub(crate) fn utc(unix_ms: u64) -> String {
    let (day, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil(day);
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// Year, month and day of a day after 1970-01-01, by Howard Hinnant's `civil_from_days`.
fn civil(day: u64) -> (u64, u64, u64) {
    let shifted = day + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::Failed;

    #[test]
    fn columns_line_up() {
        let text = table(&["NODE", "N"], &[vec!["prefill-0".into(), "1".into()]]);
        assert_eq!(text, "NODE       N\nprefill-0  1\n");
        assert_eq!(table(&["A", "B"], &[vec!["a\nb".into(), "c".into()]]), "A    B\na b  c\n");
    }

    #[tokio::test]
    async fn a_watch_goes_on_when_a_coordinator_goes_away() {
        let watch = Some(Duration::from_millis(1));
        let output = OutputArgs { format: FormatArgs::default(), watch };
        let away = || Err(Failed::with(Failed::UNREACHABLE, "away"));
        for (answers, end) in
            [(vec![Ok(""), away(), Ok(""), Err("wrong".into())], "wrong"), (vec![away()], "away")]
        {
            let mut answers = answers.into_iter();
            let next = || std::future::ready(answers.next().expect("it ended").map(str::to_owned));
            assert_eq!(output.print(next).await.unwrap_err().to_string(), end);
        }
    }

    #[test]
    fn a_terminal_is_sent_no_controls() {
        assert_eq!(harmless("a\x1b[2J\r\u{9b}b\nc"), "a\u{fffd}[2J\u{fffd}\u{fffd}b\nc");
    }

    #[test]
    fn times_are_as_exact_as_they_are_short() {
        let ms = [0.4, 350.0, 2345.0, 252_000.0, 11_100_000.0, 187_200_000.0];
        assert_eq!(ms.map(time), ["0 ms", "350 ms", "2.3 s", "4m 12s", "3h 05m", "2d 04h"]);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_399_999), "2000-02-28T23:59:59.999Z");
        assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(utc(1_795_300_265_123), "2026-11-21T22:31:05.123Z");
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(3 << 30)],
            ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
        );
    }
}
