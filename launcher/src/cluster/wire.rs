//! Authenticated, size-capped, versioned frames over any byte stream.
