//! Requests with their arrival times.
