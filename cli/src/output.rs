//! Tables and JSON on stdout.

use std::io::{self, Write as _};
use std::time::Duration;

use crate::commands::CommandError;

/// How to print, and whether to go on printing.
#[derive(clap::Args)]
pub(crate) struct OutputArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Print again every second until interrupted
    #[arg(long)]
    watch: bool,
}

impl OutputArgs {
    /// Prints what `show` makes, once or every second.
    pub(crate) async fn print<F>(&self, mut show: impl FnMut() -> F) -> Result<(), CommandError>
    where
        F: Future<Output = Result<String, CommandError>>,
    {
        loop {
            let text = show().await?;
            if !self.watch {
                return Ok(print(&format!("{}\n", text.trim_end()))?);
            }
            let clear = if self.json { "" } else { "\x1b[2J\x1b[H" };
            print(&format!("{clear}{}\n", text.trim_end()))?;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Writes to stdout at once. A closed pipe is an error, which `main` ends quietly with.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())?;
    out.flush()
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
        padded.join("  ").trim_end().to_owned() + "\n"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let text = table(&["NODE", "N"], &[vec!["prefill-0".into(), "1".into()]]);
        assert_eq!(text, "NODE       N\nprefill-0  1\n");
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(3 << 30)],
            ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
        );
    }
}
