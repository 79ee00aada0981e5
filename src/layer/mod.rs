//! Keeps decompressed layers on the local disk and fills them from the other tiers.
