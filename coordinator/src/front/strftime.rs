//! Dates for chat templates.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// C's `strftime` for the time `now` in UTC, with the directives for days and times in the C
/// locale; others are left as they are. (Transformers uses the machine's time zone, but two
/// coordinators must render the same prompt.)
pub(super) fn utc(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let weekday = DAYS[((days + 4) % 7) as usize];
    let month_name = MONTHS[(month - 1) as usize];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next().unwrap_or('%');
        let padded = directive != '-';
        if !padded {
            directive = rest.next().unwrap_or('%');
        }
        let number = match directive {
            'd' => day,
            'm' => month,
            'H' => hour,
            'I' => (hour + 11) % 12 + 1,
            'M' => minute,
            'S' => second % 60,
            'y' => year % 100,
            other => {
                match other {
                    'Y' => write!(out, "{year}").expect("a string takes all"),
                    'A' => out.push_str(weekday),
                    'a' => out.push_str(&weekday[..3]),
                    'B' => out.push_str(month_name),
                    'b' | 'h' => out.push_str(&month_name[..3]),
                    'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
                    'Z' => out.push_str("UTC"),
                    'F' | 'T' => {
                        let long = if other == 'F' { "%Y-%m-%d" } else { "%H:%M:%S" };
                        out.push_str(&utc(long, now));
                    }
                    '%' => out.push('%'),
                    unknown => out.extend(['%', unknown]),
                }
                continue;
            }
        };
        let width = if padded { 2 } else { 1 };
        write!(out, "{number:0width$}").expect("a string takes all");
    }
    out
}

/// `(year, month, day)` of a day counted from 1970-01-01: Howard Hinnant's `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn formats_like_date() {
        // From `date -u -d @SECONDS +FORMAT`.
        for (seconds, format, expected) in [
            (0, "%Y-%m-%d %H:%M:%S", "1970-01-01 00:00:00"),
            (951_782_399, "%A, %d %B %Y", "Monday, 28 February 2000"),
            (951_782_400, "%a %-d %b %y", "Tue 29 Feb 00"),
            (1_735_689_599, "%F %T %I %p", "2024-12-31 23:59:59 11 PM"),
            (1_704_110_400, "%I%p %-H %% %q", "12PM 12 % %q"),
        ] {
            let now = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(utc(format, now), expected);
        }
    }
}
