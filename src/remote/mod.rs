//! Shares decompressed layers between nodes through a remote content cache.
