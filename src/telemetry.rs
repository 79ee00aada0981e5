//! Sets up logging: text or JSON lines on standard error.
