//! Fills this node.
