//! Any order of what coordinators, the engine and the endpoint say.
