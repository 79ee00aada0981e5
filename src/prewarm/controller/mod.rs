//! Decides what is warmed where, and when, and has images seeded.

mod conditions;
mod images;
pub mod plan;
mod share;
