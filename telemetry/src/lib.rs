//! What the daemons say of themselves: logs, traces, and their state to systemd. Their metrics are
//! each daemon's own.

mod journal;
mod logging;
pub mod systemd;
mod tracer;

pub use logging::{LogFormat, UnknownFormat, start_logging};
pub use tracer::{Span, SpanKind, StartError, Tracer, Value};
