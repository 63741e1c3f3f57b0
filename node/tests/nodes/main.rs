//! Nodes with real engines, joined to a scripted coordinator over real sockets.

mod devices;
mod handover;
mod pull;
mod support;
