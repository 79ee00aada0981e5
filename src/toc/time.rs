//! Reads times as RFC 3339 writes them, which is how Go's JSON has them.

/// Seconds and nanoseconds since 1970, rounded down; `None` if `text` is no time.
pub(super) fn parse(text: &str) -> Option<(i64, u32)> {
    let (date, rest) = text.split_at_checked(10)?;
    let (time, rest) = rest.split_at_checked(9)?;
    let date = fields(date, '-', [4, 2, 2])?;
    let time = fields(time.strip_prefix(['T', 't'])?, ':', [2, 2, 2])?;
    let (nanoseconds, zone) = fraction(rest)?;
    let [year, month, day] = date;
    let [hour, minute, second] = time;
    let is_in_order = (1..=12).contains(&month)
        && (1..=days_of(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        // A leap second.
        && second <= 60;
    if !is_in_order {
        return None;
    }
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    Some((seconds - offset(zone)?, nanoseconds))
}

/// Three numbers of so many digits each.
fn fields(text: &str, between: char, n_digits: [usize; 3]) -> Option<[i64; 3]> {
    let mut parts = text.split(between);
    let mut numbers = [0; 3];
    for (number, n_digits) in numbers.iter_mut().zip(n_digits) {
        let part = parts.next()?;
        *number = digits(part).filter(|_| part.len() == n_digits)?;
    }
    parts.next().is_none().then_some(numbers)
}

fn digits(text: &str) -> Option<i64> {
    let is_number = text.bytes().all(|it| it.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

/// Nanoseconds, and what follows them.
fn fraction(text: &str) -> Option<(u32, &str)> {
    let Some(text) = text.strip_prefix('.') else {
        return Some((0, text));
    };
    let n_digits = text.bytes().take_while(u8::is_ascii_digit).count();
    if !(1..=9).contains(&n_digits) {
        return None;
    }
    let (number, rest) = text.split_at(n_digits);
    let nanoseconds = format!("{number:0<9}").parse().ok()?;
    Some((nanoseconds, rest))
}

/// Seconds that a zone is ahead of UTC.
fn offset(zone: &str) -> Option<i64> {
    if matches!(zone, "Z" | "z") {
        return Some(0);
    }
    let (sign, time) = match zone.split_at_checked(1)? {
        ("+", time) => (1, time),
        ("-", time) => (-1, time),
        _ => return None,
    };
    let (hours, minutes) = time.split_once(':')?;
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    let (hours, minutes) = (digits(hours)?, digits(minutes)?);
    (hours < 24 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

fn days_of(year: i64, month: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 if is_leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days of the Gregorian calendar, of which years begin in March, so that the odd day is the last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // Months of 31, 30, 31, 30, 31 days, over and over.
    days + (153 * month + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_others_read_them() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", (0, 0)),
            ("2024-02-29T12:34:56Z", (1_709_210_096, 0)),
            ("2000-03-01T00:00:00Z", (951_868_800, 0)),
            ("2100-02-28T23:59:60Z", (4_107_542_400, 0)),
            ("1969-12-31T23:59:59.5Z", (-1, 500_000_000)),
            (
                "2023-05-06T07:08:09.123456789+02:00",
                (1_683_349_689, 123_456_789),
            ),
            ("2023-05-06T07:08:09-09:30", (1_683_391_089, 0)),
            ("0001-01-01T00:00:00Z", (-62_135_596_800, 0)),
            ("9999-12-31T23:59:59z", (253_402_300_799, 0)),
        ] {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "2024-02-29",
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-00-01T00:00:00Z",
            "2024-01-00T00:00:00Z",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:60:00Z",
            "2024-01-01T00:00:61Z",
            "2024-01-01 00:00:00Z",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00.Z",
            "2024-01-01T00:00:00.1234567890Z",
            "2024-01-01T00:00:00+1:00",
            "2024-01-01T00:00:00+01:0",
            "2024-01-01T00:00:00+24:00",
            "+024-01-01T00:00:00Z",
            "2024-01-01T00:00:00ZZ",
            "2024-1-001T00:00:00Z",
            "äöüäö-01-01T00:00:00Z",
            "2024-01-01T00:00:\u{e4}Z",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
