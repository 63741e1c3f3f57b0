//! Nodes with real engines, joined to a scripted coordinator over real sockets.

mod channels;
mod devices;
mod handover;
mod pull;
mod support;
