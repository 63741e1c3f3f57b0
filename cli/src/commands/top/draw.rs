//! The screen as text. Everything has its place at 80 columns and 24 lines, and uses more if there is.

use baton_proto::wire::v1::{Alert, Event, GetStatusResponse, Node};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table};

use super::screen::{Screen, kv_used};
use crate::commands::status::percent;
use crate::output::{bytes, time, utc};

/// Lines above the nodes.
const HEAD_LINES: u16 = 6;
/// Lines of alerts and failures, their title included.
const TROUBLE_LINES: u16 = 7;
/// Characters of a bar.
const BAR: usize = 14;

pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let lines = [
        Constraint::Length(HEAD_LINES),
        Constraint::Min(3),
        Constraint::Length(TROUBLE_LINES),
        Constraint::Length(1),
    ];
    let [head, nodes, troubles, foot] = Layout::vertical(lines).areas(frame.area());
    frame.render_widget(Paragraph::new(self::head(screen)), head);
    frame.render_widget(self::nodes(screen), nodes);
    frame.render_widget(self::troubles(screen), troubles);
    frame.render_widget(Paragraph::new(self::foot(screen)), foot);
}

fn head(screen: &Screen) -> Vec<Line<'static>> {
    let sample = &screen.sample;
    let (status, rates) = (&sample.status, &sample.rates);
    let tokens = status.tokens.unwrap_or_default();
    let recent = status.recent.unwrap_or_default();
    let (ttft, tpot) = (recent.ttft.unwrap_or_default(), recent.tpot.unwrap_or_default());
    let GetStatusResponse { requests_active, requests_waiting, requests_failed, .. } = status;
    let (hits, up) = (percent(tokens.cached, tokens.prompt), time(status.uptime_ms as f64));
    vec![
        Line::from(vec![
            format!("baton {} ", status.version).bold(),
            readiness(status),
            format!("  up {up}  {}", status.models.join(", ")).into(),
        ]),
        Line::from(format!(
            "requests   {requests_active} active, {requests_waiting} waiting   {:.1}/s finished   \
             {requests_failed} failed   {} retried",
            rates.finished, status.requests_retried
        )),
        Line::from(format!(
            "tokens     {:.0}/s generated   {:.0}/s of prompts   {hits}% of prompts cached",
            rates.generated, rates.prompt
        )),
        Line::from(format!(
            "KV         {} transfers under way   {}/s",
            status.transfers_active,
            bytes(rates.bytes as u64)
        )),
        Line::from(format!(
            "TTFT       p50 {}   p95 {}   p99 {}   ({} in the last minute)",
            time(ttft.p50),
            time(ttft.p95),
            time(ttft.p99),
            recent.requests
        )),
        Line::from(format!(
            "TPOT       p50 {:.1} ms   p95 {:.1} ms   p99 {:.1} ms",
            tpot.p50, tpot.p95, tpot.p99
        )),
    ]
}

fn readiness(status: &GetStatusResponse) -> Span<'static> {
    if status.ready {
        " ready ".black().on_green()
    } else {
        format!(" NOT READY: {} ", status.reason).white().on_red()
    }
}

fn nodes(screen: &Screen) -> Table<'static> {
    let head =
        Row::new(["NODE", "ROLE", "STATE", "RUN", "WAIT", "KV IN USE", "", "PREFILL/s", "STEP"]);
    let widths = [
        Constraint::Min(12),
        Constraint::Length(7),
        Constraint::Length(8),
        Constraint::Length(4),
        Constraint::Length(4),
        Constraint::Length(BAR as u16),
        Constraint::Length(4),
        Constraint::Length(9),
        Constraint::Length(8),
    ];
    let rows = screen.sample.nodes.iter().skip(screen.first).map(row);
    let mut title = format!(" {} nodes by {}", screen.sample.nodes.len(), screen.order.as_str());
    title += if screen.reverse { ", reversed " } else { " " };
    let style = Style::new().add_modifier(Modifier::BOLD);
    Table::new(rows, widths).header(head.style(style)).block(Block::new().borders(TOP).title(title))
}

const TOP: ratatui::widgets::Borders = ratatui::widgets::Borders::TOP;

fn row(node: &Node) -> Row<'static> {
    let used = kv_used(node);
    let step = format!("{:.1} ms", node.decode_step_ms);
    Row::new(vec![
        Cell::from(node.id.clone()),
        Cell::from(node.role.clone()),
        state(node),
        Cell::from(format!("{:>4}", node.running)),
        Cell::from(format!("{:>4}", node.waiting)),
        bar(node),
        Cell::from(format!("{:>3.0}%", 100.0 * used)),
        Cell::from(format!("{:>9.0}", node.prefill_tokens_per_second)),
        Cell::from(format!("{step:>8}")),
    ])
}

fn state(node: &Node) -> Cell<'static> {
    // Twenty reports are missing.
    if node.report_age_ms > 2000 {
        return Cell::from("silent".red());
    }
    if node.draining { Cell::from("draining".yellow()) } else { Cell::from("up".green()) }
}

/// `#` is used by sequences and transfers, `-` is cached, what is left is free.
fn bar(node: &Node) -> Cell<'static> {
    let blocks = node.kv_blocks.unwrap_or_default();
    let length =
        |count: u64| (count as f64 / blocks.total.max(1) as f64 * BAR as f64).round() as usize;
    let used = length(blocks.active + blocks.leased).min(BAR);
    let cached = length(blocks.cached).min(BAR - used);
    let color = if used * 10 >= BAR * 9 { Color::Red } else { Color::Green };
    Cell::from(Line::from(vec![
        Span::styled("#".repeat(used), color),
        Span::styled("-".repeat(cached), Color::DarkGray),
        Span::raw(".".repeat(BAR - used - cached)),
    ]))
}

fn troubles(screen: &Screen) -> Paragraph<'static> {
    let alerts = screen.sample.status.alerts.iter().map(alert);
    let failures = screen.sample.troubles.iter().map(trouble);
    let mut lines: Vec<Line<'static>> = alerts.chain(failures).collect();
    if lines.is_empty() {
        lines.push(Line::from("none".dim()));
    }
    Paragraph::new(lines).block(Block::new().borders(TOP).title(" alerts and recent failures "))
}

fn alert(alert: &Alert) -> Line<'static> {
    let Alert { severity, code, message } = alert;
    let color = match &**severity {
        "critical" => Color::Red,
        "warning" => Color::Yellow,
        _ => Color::Gray,
    };
    Line::from(vec![Span::styled(format!("{code:<13} "), color), Span::raw(message.clone())])
}

fn trouble(event: &Event) -> Line<'static> {
    let who: String = match (&*event.node, &*event.request_id) {
        ("", "") => String::new(),
        ("", request) => request.chars().take(12).chain([' ']).collect(),
        (node, _) => format!("{node} "),
    };
    let clock: String = utc(event.unix_ms).chars().skip(11).take(8).collect();
    Line::from(format!("{clock}      {who}{}", event.message))
}

fn foot(screen: &Screen) -> Line<'static> {
    match &screen.problem {
        Some(problem) => Line::from(problem.clone().red()),
        None => {
            Line::from("q ends   arrows scroll   s orders nodes   r turns the order round".dim())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use baton_proto::wire::v1::{KvBlocks, Percentiles, RecentRequests, TokenTotals};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::sample::{Rates, Sample};
    use super::*;

    fn node(id: &str, role: &str, draining: bool, blocks: [u64; 3]) -> Node {
        let [active, cached, leased] = blocks;
        let free = 1000 - active - cached - leased;
        Node {
            id: id.to_owned(),
            role: role.to_owned(),
            draining,
            running: active as u32 / 50,
            kv_blocks: Some(KvBlocks {
                total: 1000,
                free,
                active,
                cached,
                leased,
                ..KvBlocks::default()
            }),
            prefill_tokens_per_second: 10_250.0,
            decode_step_ms: 18.25,
            ..Node::default()
        }
    }

    fn screen() -> Screen {
        let percentiles = |p50| Percentiles { p50, p95: 3.0 * p50, p99: 8.0 * p50 };
        let alert = Alert {
            severity: "warning".to_owned(),
            code: "NODE_LOST".to_owned(),
            message: "prefill-2 left 31 s ago and has not come back".to_owned(),
        };
        let status = GetStatusResponse {
            version: "0.1.0".to_owned(),
            ready: true,
            models: vec!["Qwen3-0.6B".to_owned()],
            requests_active: 41,
            requests_waiting: 6,
            requests_failed: 1,
            requests_retried: 3,
            uptime_ms: 11_100_000,
            transfers_active: 2,
            tokens: Some(TokenTotals { prompt: 1000, cached: 620, ..TokenTotals::default() }),
            recent: Some(RecentRequests {
                requests: 733,
                ttft: Some(percentiles(180.0)),
                tpot: Some(percentiles(19.5)),
            }),
            alerts: vec![alert],
            ..GetStatusResponse::default()
        };
        let failure = Event {
            unix_ms: 1_795_300_265_123,
            request_id: "3f2a9c0d11ab".to_owned() + &"0".repeat(20),
            message: "attempt 1 failed, tried again: prefill-2 was lost".to_owned(),
            ..Event::default()
        };
        let nodes = vec![
            node("prefill-0", "prefill", false, [120, 700, 60]),
            node("prefill-1", "prefill", true, [0, 310, 0]),
            node("decode-0", "decode", false, [910, 40, 20]),
            node("decode-1", "decode", false, [400, 350, 0]),
        ];
        let rates = Rates { prompt: 9120.4, generated: 1310.2, finished: 12.24, bytes: 3.2e8 };
        let troubles = VecDeque::from([failure]);
        let mut screen = Screen::default();
        screen.show(Sample { status, nodes, rates, troubles });
        screen
    }

    /// What a terminal of this size shows, without colours.
    fn rendered(screen: &Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
        terminal.draw(|frame| draw(frame, screen)).expect("it is drawn");
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned() + "\n").collect()
    }

    #[test]
    fn everything_has_its_place_on_a_small_terminal() {
        let text = rendered(&screen(), 80, 24);
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/commands/top/top.txt");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(file, &text).expect("it can be written");
        }
        assert_eq!(text, std::fs::read_to_string(file).expect("it is there"), "UPDATE=1 writes it");
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operating.md");
        let page = std::fs::read_to_string(page).expect("it is there");
        assert!(page.contains(&text), "docs/operating.md shows another screen");
    }

    #[test]
    fn a_tiny_terminal_and_a_lost_coordinator_are_no_reason_to_fail() {
        let mut screen = screen();
        screen.problem = Some("no coordinator answers".to_owned());
        for (width, height) in [(1, 1), (20, 5), (200, 60)] {
            rendered(&screen, width, height);
        }
        assert!(rendered(&screen, 80, 24).ends_with("no coordinator answers\n"));
        screen.sample.status.ready = false;
        screen.sample.status.reason = "no decode node has joined".to_owned();
        assert!(rendered(&screen, 80, 24).contains("NOT READY: no decode node has joined"));
    }
}
