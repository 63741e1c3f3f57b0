//! A trace served by modelled nodes under a placement policy.
