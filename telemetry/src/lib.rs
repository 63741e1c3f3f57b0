//! What the daemons say of themselves: logs and traces. Their metrics are each daemon's own.

mod journal;
mod logging;
mod tracer;

pub use logging::{LogFormat, UnknownFormat, start_logging};
pub use tracer::{Span, SpanKind, StartError, Tracer, Value};
