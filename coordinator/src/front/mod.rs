//! What clients talk to: gRPC, HTTP health, tokenizer, chat templates.
