//! Reads layers out of the layer store.

use std::{io, ops::Range};

use super::{LayerData, Wait};
use crate::{
    digest::DiffId,
    layer::{disk::DiskWait, reader::LayerReader, store::Layer},
};

/// A mount holds the whole [`Layer`], not its file alone: the store serves what somebody has open.
impl LayerData for Layer {
    fn diff_id(&self) -> DiffId {
        self.file().diff_id()
    }

    fn layer_bytes(&self) -> u64 {
        self.file().layer_bytes()
    }

    fn has(&self, chunks: Range<u32>) -> bool {
        self.file().has(chunks)
    }

    fn n_evictions(&self, chunks: Range<u32>) -> u64 {
        self.file().n_evictions(&chunks)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<bool> {
        self.file().read_at(buf, offset, disk_wait(wait))
    }
}

impl LayerData for LayerReader {
    fn diff_id(&self) -> DiffId {
        Self::diff_id(self)
    }

    fn layer_bytes(&self) -> u64 {
        Self::layer_bytes(self)
    }

    fn has(&self, chunks: Range<u32>) -> bool {
        Self::has(self, chunks)
    }

    fn n_evictions(&self, chunks: Range<u32>) -> u64 {
        Self::n_evictions(self, &chunks)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<bool> {
        Self::read_at(self, buf, offset, disk_wait(wait))
    }
}

fn disk_wait(wait: Wait) -> DiskWait {
    match wait {
        Wait::Never => DiskWait::Never,
        Wait::ForDisk => DiskWait::Allowed,
    }
}
