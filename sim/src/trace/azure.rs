//! Comma-separated values.

use super::{Malformed, Request, length};

const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

pub(super) fn parse(text: &str) -> Result<Vec<Request>, Malformed> {
    let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    let (at, head) = lines.next().unwrap_or((1, ""));
    let head: Vec<&str> = head.trim_start_matches('\u{feff}').split(',').map(str::trim).collect();
    let place = |name: &str| head.iter().position(|column| column.eq_ignore_ascii_case(name));
    let mut columns = [0; 3];
    for (column, name) in columns.iter_mut().zip(COLUMNS) {
        *column = place(name).ok_or_else(|| {
            let problem = format!("neither a JSON object nor a head with the column {name}");
            (at, problem)
        })?;
    }
    lines
        .filter(|(_, line)| !line.is_empty())
        .map(|(at, line)| request(line, columns).map_err(|problem| (at, problem)))
        .collect()
}

fn request(line: &str, columns: [usize; 3]) -> Result<Request, String> {
    let cells: Vec<&str> = line.split(',').map(str::trim).collect();
    let cell = |column: usize| {
        let missing = || format!("{}: there is no such cell", COLUMNS[column]);
        cells.get(columns[column]).copied().ok_or_else(missing)
    };
    let tokens = |column: usize| {
        let (name, text) = (COLUMNS[column], cell(column)?);
        text.parse().map_err(|_| format!("{name}: `{text}` is not a number of tokens"))
    };
    let stamp = cell(0)?;
    let wrong = || format!("TIMESTAMP: `{stamp}` is not a time like 2023-11-16 18:17:03.9799600");
    Ok(Request {
        arrival_ms: milliseconds(stamp).ok_or_else(wrong)?,
        input_tokens: length(COLUMNS[1], tokens(1)?)?,
        output_tokens: length(COLUMNS[2], tokens(2)?.max(1))?,
        blocks: Box::default(),
    })
}

/// Milliseconds since the epoch of `YYYY-MM-DD hh:mm:ss[.fraction]`, with an optional `T` or zone
/// `Z` or `+00:00`.
fn milliseconds(stamp: &str) -> Option<f64> {
    let stamp = stamp.trim_end_matches('Z').trim_end_matches("+00:00");
    let (date, time) = stamp.split_once([' ', 'T'])?;
    let mut parts = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let mut parts = time.split(':');
    let (hour, minute) = (parts.next()?.parse::<u32>().ok()?, parts.next()?.parse::<u32>().ok()?);
    let second: f64 = parts.next()?.parse().ok()?;
    let sound = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60;
    let sound = sound && (1..=9999).contains(&year) && (0.0..61.0).contains(&second);
    let seconds = f64::from(hour * 3600 + minute * 60) + second;
    sound.then(|| days(year, month, day) as f64 * 86_400_000.0 + seconds * 1000.0)
}

/// Days since 1970-01-01 in the Gregorian calendar.
///
/// Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", `days_from_civil`.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}
