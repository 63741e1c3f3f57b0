//! A plan as a picture: numbers of nodes along the axes, time to first token in the cells.

use baton_sim::plan::{Plan, Targets, Trial};

const CELL: usize = 56;
const MARGIN: usize = 64;
/// Cells along an axis, at most; what lies beyond is far from the border.
const MOST_CELLS: usize = 40;

/// An SVG document. What was not tried takes its colour, pale, from what follows from the rest.
pub(super) fn svg(plan: &Plan, targets: Targets) -> String {
    let (columns, rows) = (window(plan, |trial| trial.prefill), window(plan, |trial| trial.decode));
    let (width, height) = (MARGIN + columns.len() * CELL + 16, 40 + rows.len() * CELL + MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\" text-anchor=\"middle\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let title = format!(
        "time to first token in seconds, for at most {} s and {} ms per output token",
        targets.ttft_ms / 1000.0,
        targets.tpot_ms
    );
    svg += &text(MARGIN, 24, " text-anchor=\"start\"", &title);
    let bottom = 40 + rows.len() * CELL;
    for (x, &prefill) in columns.iter().enumerate() {
        let left = MARGIN + x * CELL;
        for (y, &decode) in rows.iter().rev().enumerate() {
            svg += &cell(plan, targets, (prefill, decode), (left, 40 + y * CELL));
        }
        svg += &text(left + CELL / 2, bottom + 20, "", &prefill.to_string());
    }
    for (y, &decode) in rows.iter().rev().enumerate() {
        svg += &text(MARGIN - 20, 44 + y * CELL + CELL / 2, "", &decode.to_string());
    }
    svg += &text(MARGIN + columns.len() * CELL / 2, bottom + 44, "", "prefill nodes");
    let middle = 40 + rows.len() * CELL / 2;
    let turned = format!(" transform=\"rotate(-90 20 {middle})\"");
    svg += &text(20, middle, &turned, "decode nodes");
    svg + "</svg>\n"
}

/// The counts around the best clusters and the border that was walked.
fn window(plan: &Plan, count: impl Fn(&Trial) -> usize) -> Vec<usize> {
    let best: Vec<usize> = [plan.smallest, plan.cheapest].iter().flatten().map(&count).collect();
    let low = plan.trials.iter().map(&count).min().unwrap_or(0);
    let high = match best.iter().max() {
        Some(&best) => best + 2 + best / 4,
        None => plan.trials.iter().map(&count).max().unwrap_or(0),
    };
    (low.max(high.saturating_sub(MOST_CELLS - 1))..=high).collect()
}

fn cell(plan: &Plan, targets: Targets, (p, d): (usize, usize), (x, y): (usize, usize)) -> String {
    let tried = plan.trials.iter().find(|trial| (trial.prefill, trial.decode) == (p, d));
    let (fill, label) = match tried {
        Some(trial) => (colour(trial, targets), format!("{:.2}", trial.ttft_ms / 1000.0)),
        None => (follows(plan, p, d).to_owned(), String::new()),
    };
    let is = |best: Option<Trial>| best.is_some_and(|best| (best.prefill, best.decode) == (p, d));
    let mark = match (is(plan.smallest), is(plan.cheapest)) {
        (true, true) => "best",
        (true, false) => "smallest",
        (false, true) => "cheapest",
        (false, false) => "",
    };
    let border =
        if mark.is_empty() { "#ffffff\" stroke-width=\"1" } else { "#000000\" stroke-width=\"3" };
    let (width, centre) = (CELL - 4, x + CELL / 2);
    let mut cell = format!(
        "<rect x=\"{}\" y=\"{}\" width=\"{width}\" height=\"{width}\" fill=\"{fill}\" \
         stroke=\"{border}\"/>\n",
        x + 2,
        y + 2
    );
    for (content, at) in [(label.as_str(), y + CELL / 2), (mark, y + CELL / 2 + 16)] {
        if !content.is_empty() {
            cell += &text(centre, at, "", content);
        }
    }
    cell
}

/// Green as far as the targets are met, red as far as the first token is late, orange if only the
/// time per output token is missed.
fn colour(trial: &Trial, targets: Targets) -> String {
    let late = (trial.ttft_ms / targets.ttft_ms).clamp(0.1, 10.0).log10();
    let light = 78.0 - 28.0 * late.abs();
    let hue = match (trial.meets, late > 0.0) {
        (true, _) => 130,
        (false, true) => 5,
        (false, false) => 35,
    };
    format!("hsl({hue},60%,{light:.0}%)")
}

fn follows(plan: &Plan, p: usize, d: usize) -> &'static str {
    let met = |trial: &Trial| trial.meets && trial.prefill <= p && trial.decode <= d;
    let missed = |trial: &Trial| !trial.meets && trial.prefill >= p && trial.decode >= d;
    if plan.trials.iter().any(met) {
        "#e6f4ea"
    } else if plan.trials.iter().any(missed) {
        "#fbe9e7"
    } else {
        "#eeeeee"
    }
}

fn text(x: usize, y: usize, attributes: &str, content: &str) -> String {
    format!("<text x=\"{x}\" y=\"{y}\"{attributes}>{content}</text>\n")
}

#[cfg(test)]
mod tests {
    use baton_sim::plan::Percentile;

    use super::*;

    #[test]
    fn every_count_has_a_cell_and_the_best_is_marked() {
        let trial = |prefill, decode, ttft_ms| {
            let meets = ttft_ms <= 1000.0;
            Trial { prefill, decode, ttft_ms, tpot_ms: 10.0, rejected: 0, meets }
        };
        let trials = vec![trial(1, 1, 5000.0), trial(2, 1, 900.0), trial(64, 64, 100.0)];
        let best = Some(trials[1]);
        let plan = Plan { trials, smallest: best, cheapest: best };
        let targets = Targets { ttft_ms: 1000.0, tpot_ms: 20.0, percentile: Percentile::P99 };
        let svg = svg(&plan, targets);
        // 1 to 4 prefill nodes, 1 to 3 decode nodes, and the background.
        assert_eq!(svg.matches("<rect").count(), 4 * 3 + 1);
        assert!(svg.contains(">best<") && svg.contains(">5.00<") && !svg.contains(">0.10<"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
