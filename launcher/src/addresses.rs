//! Network interfaces of this node, and which of them reach the other nodes.
