//! Shares decompressed layers between nodes through a remote content cache.
//!
//! From the outside in:
//!
//! - [`ContentCache`] is what the layer store uses: it asks for a layer's manifest, index and
//!   chunks, verifies every byte, and turns whatever is wrong with the remote into a miss.
//! - [`LeaseGuard`] says that this node makes a layer, so that others wait for it instead of making
//!   it, too.
//! - [`Uploader`] puts layers there in the background, a chunk at a time.
//! - `gate` stands between both and the engine: it counts, bounds memory, and skips a remote that
//!   is down (`breaker` decides).
//!   What a reader waits for unusually long is asked for again (`hedge`).
//! - [`DirCache`], [`RedisCache`] and [`S3Cache`] are the engines. They know keys and bytes, not layers.
//!
//! # Invariants
//! - A byte is handed out only after it matched a digest; the digests come from a manifest that is
//!   authenticated, or that the caller checks against the layer's `DiffId` (see [`Trust`]).
//! - A reader is never failed by the remote: every fault is a miss, counted and logged.
//! - The manifest is written last, so that its presence means that the layer was complete.
//! - At most two values of a chunk's size are in memory for all readers and the uploader together, and one
//!   more while a read that stalls is asked for again.
//!
//! # Deliberately absent
//! Eviction: the engine does it (Redis by `maxmemory-policy volatile-lfu` and the chunks' time to
//! live, S3 by the bucket's lifecycle rule). Permission: whoever may read the store may read every layer in it; the right to pull an
//! image is checked at the registry, whether or not its layers are here.
//!
//! Keys and values are specified in `docs/REMOTE_FORMAT.md`.

mod breaker;
mod chunks;
mod config;
mod content;
mod dir;
mod documents;
mod format;
mod gate;
mod hedge;
mod lease;
mod redis;
mod s3;
mod upload;

pub use breaker::BackOff;
pub use chunks::{ChunkRun, WantedChunk};
pub use config::{RemoteConfig, RemoteConfigError, RemoteKind, open};
pub use content::{ContentCache, ContentOptions};
pub use dir::DirCache;
pub use documents::Answer;
pub use format::{RemoteManifest, Trust};
pub use lease::{LeaseGuard, LeaseOutcome, Turn};
pub use redis::{RedisCache, RedisOptions};
pub use s3::{AccessKey, S3Cache, S3Config, S3Options};
pub use upload::{Enqueued, Repair, UploadOptions, UploadOutcome, UploadSource, Uploader};
