//! Reads layers out of the layer store.

use std::{io, ops::Range};

use super::{LayerData, Wait};
use crate::{
    digest::DiffId,
    layer::{disk::DiskWait, store::Layer},
};

/// A mount holds the whole [`Layer`], not its file alone: the store serves what somebody has open.
impl LayerData for Layer {
    fn diff_id(&self) -> DiffId {
        self.file().diff_id()
    }

    fn has(&self, chunks: Range<u32>) -> bool {
        self.file().has(chunks)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<bool> {
        let wait = match wait {
            Wait::Never => DiskWait::Never,
            Wait::ForDisk => DiskWait::Allowed,
        };
        self.file().read_at(buf, offset, wait)
    }
}
