//! What clients and operators talk to: text, chat templates, stop strings, gRPC and HTTP.
//! Behind it, the core knows tokens only.

pub mod chat;
pub mod defaults;
pub mod models;
pub mod stop;
pub mod text;

mod python_json;
mod strftime;

#[cfg(test)]
pub(crate) mod fixtures;
