//! Logs on standard error, and Prometheus metrics over plain HTTP.

use std::fmt::Write;
use std::io;
use std::time::Duration;

use baton_kvtransfer::Transport;
use baton_proto::ids::Role;
use baton_proto::message::Report;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tracing_subscriber::EnvFilter;

/// A scraper that takes longer is cut off, so that scrapes cannot pile up.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(2);

/// Logs what `filter` lets through. A bad filter is returned as text.
pub fn start_logging(filter: &str, json: bool) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("log is {filter:?}: {e}"))?;
    let log =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(io::stderr);
    if json {
        log.json().init()
    } else {
        log.init()
    }
    Ok(())
}

/// What metrics are made of.
#[derive(Clone, Default, Debug)]
pub struct Figures {
    /// What coordinators are told of the node's load.
    pub report: Report,
    /// Bytes of KV that arrived at other nodes, by how they travelled.
    pub kv_sent: Vec<(Transport, u64)>,
}

/// Answers every request on `listener` with what `figures` says at that moment.
pub async fn serve_metrics(listener: TcpListener, figures: impl Fn() -> Figures) {
    loop {
        // One scrape at a time: a node has one or two scrapers.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(SCRAPE_TIMEOUT).await;
            continue;
        };
        let answer = answer(stream, exposition(&figures()));
        if let Err(error) = tokio::time::timeout(SCRAPE_TIMEOUT, answer).await {
            tracing::debug!(%error, "a metrics scrape failed");
        }
    }
}

async fn answer(mut stream: TcpStream, metrics: String) -> io::Result<()> {
    // Whatever is asked for, the metrics are the answer; the request is only taken off the wire.
    let mut request = [0; 4096];
    let mut length = 0;
    while !request[..length].windows(4).any(|end| end == b"\r\n\r\n") && length < request.len() {
        match stream.read(&mut request[length..]).await? {
            0 => break,
            read => length += read,
        }
    }
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        metrics.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(metrics.as_bytes()).await?;
    stream.shutdown().await
}

/// Figures in Prometheus' text format.
fn exposition(Figures { report, kv_sent }: &Figures) -> String {
    let blocks = report.blocks;
    let mut text = String::from(
        "# HELP baton_node_kv_blocks Blocks of the KV pool by state.\n\
         # TYPE baton_node_kv_blocks gauge\n",
    );
    for (state, count) in [
        ("free", blocks.free),
        ("active", blocks.active),
        ("cached", blocks.cached),
        ("leased", blocks.leased),
    ] {
        writeln!(text, "baton_node_kv_blocks{{state=\"{state}\"}} {count}")
            .expect("a string takes all");
    }
    let decode = f64::from(u8::from(report.role == Role::Decode));
    let gauges: [(&str, &str, f64); 8] = [
        ("decode_role", "1 for a decode node, 0 for a prefill node.", decode),
        ("draining", "1 while the node takes nothing new.", f64::from(u8::from(report.draining))),
        ("sequences_waiting", "Sequences not yet started.", report.waiting.into()),
        (
            "kv_blocks_waiting",
            "Blocks that waiting sequences will need.",
            report.waiting_blocks as f64,
        ),
        ("sequences_running", "Sequences started.", report.running.into()),
        ("queued_tokens", "Prompt tokens not yet computed.", report.queued_tokens as f64),
        (
            "prefill_tokens_per_second",
            "Measured prefill speed; 0 until measured.",
            report.prefill_tokens_per_second,
        ),
        (
            "decode_step_seconds",
            "Measured decode step; 0 until measured.",
            report.decode_step_ms / 1e3,
        ),
    ];
    for (name, help, value) in gauges {
        writeln!(
            text,
            "# HELP baton_node_{name} {help}\n# TYPE baton_node_{name} gauge\nbaton_node_{name} {value}"
        )
        .expect("a string takes all");
    }
    text.push_str(
        "# HELP baton_node_kv_sent_bytes_total Bytes of KV that arrived at other nodes.\n\
         # TYPE baton_node_kv_sent_bytes_total counter\n",
    );
    for (transport, bytes) in kv_sent {
        writeln!(text, "baton_node_kv_sent_bytes_total{{transport=\"{transport}\"}} {bytes}")
            .expect("a string takes all");
    }
    text
}

#[cfg(test)]
mod tests {
    use baton_proto::message::BlockCounts;

    use super::*;

    #[tokio::test]
    async fn a_scrape_shows_the_report_of_its_moment() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let blocks = BlockCounts { free: 3, active: 4, cached: 5, leased: 6 };
        let figures = move || Figures {
            report: Report { running: 7, blocks, ..Report::default() },
            kv_sent: vec![(Transport::Ipc, 8), (Transport::Quic, 9)],
        };
        let server = tokio::spawn(serve_metrics(listener, figures));
        let mut stream = TcpStream::connect(address).await.expect("listening");
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").await.expect("open");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("an answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("HTTP");
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
        assert!(body.contains("baton_node_kv_blocks{state=\"leased\"} 6\n"));
        assert!(body.contains("\nbaton_node_sequences_running 7\n"));
        assert!(body.contains("\nbaton_node_kv_sent_bytes_total{transport=\"quic\"} 9\n"));
        server.abort();
    }
}
