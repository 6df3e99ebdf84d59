//! Texts of any length, cut to one that can be sent and shown.

/// `text` with at most `max` bytes, and a mark where the middle was left out: of a traceback both its beginning and its
/// end tell. A mark may make it a little longer than a very small `max`.
pub fn cut(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.into();
    }
    // As long as the mark can get.
    let half = max.saturating_sub(40) / 2;
    let is_boundary = |at: &usize| text.is_char_boundary(*at);
    let head = (0..=half).rev().find(is_boundary).unwrap_or(0);
    let tail = (text.len() - half..text.len()).find(is_boundary);
    let tail = tail.unwrap_or(text.len());
    let left_out = tail - head;
    format!(
        "{}[{left_out} bytes left out]{}",
        &text[..head],
        &text[tail..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_stay_and_the_mark_says_how_much_is_gone() {
        assert_eq!(cut("short", 5), "short");
        let text = format!("first{}last", "x".repeat(10_000_000));
        let short = cut(&text, 1000);
        assert!(short.len() <= 1000, "{}", short.len());
        assert!(short.starts_with("first") && short.ends_with("last"));
        assert!(short.contains("[9999049 bytes left out]"), "{short}");
    }

    #[test]
    fn a_character_is_never_cut_in_two() {
        for max in 0..200 {
            let short = cut(&"€".repeat(100), max);
            assert!(short.len() <= max.max(40), "{max}: {}", short.len());
            assert!(short.starts_with(['€', '[']) && short.ends_with(['€', ']']));
        }
    }
}
