//! What is on the screen, and what keys do to it.

use std::cmp::Ordering;

use baton_proto::wire::v1::Node;
use ratatui::crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};

use super::sample::Sample;

/// What was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    Up,
    Down,
    Sort,
    Reverse,
    /// Nothing, but the terminal has another size.
    Redraw,
}

/// The meaning of what the terminal says; `None`: none.
pub(super) fn key(event: &Event) -> Option<Key> {
    let key = match event {
        Event::Resize(..) => return Some(Key::Redraw),
        Event::Key(key) if key.kind != KeyEventKind::Release => key,
        _ => return None,
    };
    Some(match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::Quit,
        KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
        KeyCode::Up | KeyCode::Char('k') => Key::Up,
        KeyCode::Down | KeyCode::Char('j') => Key::Down,
        KeyCode::Char('s') | KeyCode::Left | KeyCode::Right => Key::Sort,
        KeyCode::Char('r') => Key::Reverse,
        _ => return None,
    })
}

/// By what nodes are ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    #[default]
    Name,
    Role,
    Running,
    Kv,
}

impl Order {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Role => "role",
            Self::Running => "running",
            Self::Kv => "KV use",
        }
    }

    fn next(self) -> Self {
        match self {
            Self::Name => Self::Role,
            Self::Role => Self::Running,
            Self::Running => Self::Kv,
            Self::Kv => Self::Name,
        }
    }

    /// Most first where there are numbers.
    fn compare(self, a: &Node, b: &Node) -> Ordering {
        let work = |node: &Node| (node.running, node.waiting);
        let first = match self {
            Self::Name => Ordering::Equal,
            Self::Role => a.role.cmp(&b.role).reverse(),
            Self::Running => work(b).cmp(&work(a)),
            Self::Kv => kv_used(b).total_cmp(&kv_used(a)),
        };
        first.then_with(|| a.id.cmp(&b.id))
    }
}

/// Share of a node's blocks that sequences and transfers use.
pub(super) fn kv_used(node: &Node) -> f64 {
    let blocks = node.kv_blocks.unwrap_or_default();
    (blocks.active + blocks.leased) as f64 / blocks.total.max(1) as f64
}

/// The last sample, and how it is shown.
#[derive(Debug, Default)]
pub(super) struct Screen {
    /// Nodes in order.
    pub(super) sample: Sample,
    pub(super) order: Order,
    pub(super) reverse: bool,
    /// Nodes that are scrolled away.
    pub(super) first: usize,
    /// Why there is no newer sample.
    pub(super) problem: Option<String>,
}

impl Screen {
    pub(super) fn show(&mut self, sample: Sample) {
        self.sample = sample;
        self.problem = None;
        self.sort();
    }

    pub(super) fn press(&mut self, key: Key) {
        match key {
            Key::Up => self.first = self.first.saturating_sub(1),
            Key::Down => self.first += 1,
            Key::Sort => self.order = self.order.next(),
            Key::Reverse => self.reverse = !self.reverse,
            Key::Quit | Key::Redraw => {}
        }
        self.sort();
    }

    fn sort(&mut self) {
        let Self { sample, order, reverse, .. } = self;
        sample.nodes.sort_by(|a, b| {
            let forward = order.compare(a, b);
            if *reverse { forward.reverse() } else { forward }
        });
        self.first = self.first.min(self.sample.nodes.len().saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::v1::KvBlocks;
    use ratatui::crossterm::event::KeyEvent;

    use super::*;

    fn node(id: &str, role: &str, running: u32, active: u64) -> Node {
        let blocks = KvBlocks { total: 100, active, ..KvBlocks::default() };
        Node {
            id: id.to_owned(),
            role: role.to_owned(),
            running,
            kv_blocks: Some(blocks),
            ..Node::default()
        }
    }

    #[test]
    fn keys_order_and_scroll() {
        let mut screen = Screen::default();
        let nodes =
            vec![node("b", "prefill", 1, 9), node("a", "decode", 2, 1), node("c", "decode", 2, 5)];
        screen.show(Sample { nodes, ..Sample::default() });
        let names = |screen: &Screen| -> String {
            screen.sample.nodes.iter().map(|node| node.id.as_str()).collect()
        };
        assert_eq!(names(&screen), "abc");
        let mut after = |key| {
            screen.press(key);
            (names(&screen), screen.first)
        };
        assert_eq!(after(Key::Sort), ("bac".to_owned(), 0), "by role");
        assert_eq!(after(Key::Sort), ("acb".to_owned(), 0), "by running");
        assert_eq!(after(Key::Sort), ("bca".to_owned(), 0), "by KV use");
        assert_eq!(after(Key::Reverse), ("acb".to_owned(), 0));
        (0..9).for_each(|_| drop(after(Key::Down)));
        assert_eq!(after(Key::Down).1, 2, "the last node stays");
        assert_eq!(after(Key::Up).1, 1);
    }

    #[test]
    fn keys_are_what_they_are_elsewhere() {
        let press = |code, modifiers| key(&Event::Key(KeyEvent::new(code, modifiers)));
        assert_eq!(press(KeyCode::Char('q'), KeyModifiers::NONE), Some(Key::Quit));
        assert_eq!(press(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Key::Quit));
        assert_eq!(press(KeyCode::Char('c'), KeyModifiers::NONE), None);
        assert_eq!(key(&Event::Resize(1, 1)), Some(Key::Redraw));
    }
}
