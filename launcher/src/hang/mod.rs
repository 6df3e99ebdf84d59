//! Ranks that no longer step, and ranks that step slowly: found, named, and looked into.
