//! Entries of systemd's journal: a field for each value, and a message that says them too, since
//! `journalctl` shows nothing else. The protocol: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>.

use std::fmt::{Debug, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

const SOCKET: &str = "/run/systemd/journal/socket";
/// Most bytes of a value; an entry has to fit into a datagram.
const MAX_VALUE_BYTES: usize = 16 << 10;

/// Sends every event to the journal.
pub(crate) struct Journal {
    socket: UnixDatagram,
    to: PathBuf,
    identifier: String,
}

impl Journal {
    /// Fails if there is no journal.
    pub(crate) fn open() -> io::Result<Self> {
        Self::at(Path::new(SOCKET))
    }

    fn at(to: &Path) -> io::Result<Self> {
        let program = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
        let identifier = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let socket = UnixDatagram::unbound()?;
        // Nothing is an entry that journald drops.
        socket.send_to(&[], to)?;
        Ok(Self { socket, to: to.to_owned(), identifier })
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // There is nobody to be told that nobody can be told.
        let _ = self.socket.send_to(&entry(event, &self.identifier), &self.to);
    }
}

fn entry(event: &Event<'_>, identifier: &str) -> Vec<u8> {
    let mut values = Values::default();
    event.record(&mut values);
    let mut entry = Vec::with_capacity(512);
    put(&mut entry, "MESSAGE", &values.line());
    put(&mut entry, "PRIORITY", priority(event.metadata().level()));
    put(&mut entry, "SYSLOG_IDENTIFIER", identifier);
    put(&mut entry, "TARGET", event.metadata().target());
    for (name, value) in &values.named {
        // Names of other shapes are refused by journald, together with the whole entry.
        let name = name.replace(|c: char| !c.is_ascii_alphanumeric(), "_").to_ascii_uppercase();
        put(&mut entry, name.trim_start_matches('_'), value);
    }
    entry
}

fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    let value = &value.as_bytes()[..value.len().min(MAX_VALUE_BYTES)];
    entry.extend_from_slice(name.as_bytes());
    entry.push(b'\n');
    entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    entry.extend_from_slice(value);
    entry.push(b'\n');
}

/// As syslog numbers them: errors, warnings, and what is normal but worth knowing.
fn priority(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "5",
        Level::DEBUG => "6",
        Level::TRACE => "7",
    }
}

/// What an event says.
#[derive(Default)]
struct Values {
    message: String,
    named: Vec<(&'static str, String)>,
}

impl Values {
    /// `message name=value ...`
    fn line(&self) -> String {
        let mut line = self.message.clone();
        for (name, value) in &self.named {
            let space = if line.is_empty() { "" } else { " " };
            write!(line, "{space}{name}={value}").expect("strings take everything");
        }
        line
    }

    fn add(&mut self, field: &Field, value: String) {
        match field.name() {
            "message" => self.message = value,
            name => self.named.push((name, value)),
        }
    }
}

impl Visit for Values {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, format!("{value:?}"));
    }

    /// Without quotation marks.
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    fn parse(mut entry: &[u8]) -> BTreeMap<String, String> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        let mut fields = BTreeMap::new();
        while let Some(end) = entry.iter().position(|&byte| byte == b'\n') {
            let name = text(&entry[..end]);
            let (length, rest) = entry[end + 1..].split_at(8);
            let length = u64::from_le_bytes(length.try_into().expect("eight")) as usize;
            assert_eq!(rest[length], b'\n');
            fields.insert(name, text(&rest[..length]));
            entry = &rest[length + 1..];
        }
        assert!(entry.is_empty());
        fields
    }

    #[test]
    fn an_entry_has_every_value_twice() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("journal");
        assert!(Journal::at(&path).is_err(), "there is none");
        let journald = UnixDatagram::bind(&path).expect("a socket");
        let journal = Journal::at(&path).expect("there is one");
        let long = "x".repeat(2 * MAX_VALUE_BYTES);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), || {
            tracing::warn!(node = "d1\n", epoch = 7, error = %"no", "left");
            tracing::info!(kv.bytes = 3);
            tracing::info!("{long}");
        });
        let receive = || {
            let mut buffer = vec![0; 1 << 20];
            let length = journald.recv(&mut buffer).expect("an entry");
            parse(&buffer[..length])
        };
        assert!(receive().is_empty(), "whether somebody listens");
        let entry = receive();
        let field = |name: &str| entry[name].as_str();
        assert_eq!(field("MESSAGE"), "left node=d1\n epoch=7 error=no");
        assert_eq!([field("NODE"), field("EPOCH"), field("ERROR")], ["d1\n", "7", "no"]);
        assert_eq!(field("PRIORITY"), "4");
        assert!(!field("SYSLOG_IDENTIFIER").is_empty() && !field("TARGET").is_empty());
        let entry = receive();
        assert_eq!((entry["MESSAGE"].as_str(), entry["KV_BYTES"].as_str()), ("kv.bytes=3", "3"));
        assert_eq!(receive()["MESSAGE"].len(), MAX_VALUE_BYTES);
    }
}
