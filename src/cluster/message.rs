//! Cuts what people are told to the length that is read, and taken.

/// Longest message: what an event may have (kubernetes, `pkg/apis/core/validation/events.go`). Conditions may have more,
/// which nobody reads.
const MAX_MESSAGE_BYTES: usize = 1024;

/// Returns as much of a message as an event, a condition or a status of this driver may have.
pub fn bounded(message: &str) -> &str {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_ends_where_a_character_does() {
        assert_eq!(bounded("short"), "short");
        let long = format!("x{}", "…".repeat(1000));
        assert_eq!(bounded(&long).len(), 1024);
        assert_eq!(bounded(&"…".repeat(1000)).len(), 1023);
    }
}
