//! Numbers and lists as people read them. Pure.

use std::fmt::Display;

use crate::cores::to_list;

/// `1 worker`, `2 workers`.
pub fn count<N: Display + PartialEq + From<u8>>(number: N, noun: &str) -> String {
    let plural = if number == N::from(1) { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// `rank 3`, `ranks 0-6,8-63`.
pub fn ranks_named<R: Copy + TryInto<usize>>(ranks: &[R]) -> String {
    let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
    let ranks: Vec<usize> = ranks.iter().flat_map(|&rank| rank.try_into()).collect();
    format!("{noun} {}", to_list(&ranks))
}

/// The first eight of many: `a, b and 3 more`.
pub fn few<T: Display>(things: &[T]) -> String {
    const SHOWN: usize = 8;
    let named: Vec<String> = things.iter().take(SHOWN).map(T::to_string).collect();
    match things.len().saturating_sub(SHOWN) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// `3.2 GiB`
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 100.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_lists_read_well() {
        assert_eq!(size(17), "17 bytes");
        assert_eq!(size(3 << 20), "3.0 MiB");
        assert_eq!(size(141 << 30), "141 GiB");
        assert_eq!(
            [count(1u32, "rank"), count(0usize, "rank")],
            ["1 rank", "0 ranks"]
        );
        assert_eq!(ranks_named(&[7u32]), "rank 7");
        assert_eq!(ranks_named(&[0usize, 2, 1, 5]), "ranks 0-2,5");
        assert_eq!(few(&["a", "b"]), "a, b");
        assert_eq!(few(&[0; 8]), "0, 0, 0, 0, 0, 0, 0, 0");
        assert_eq!(few(&[0; 11]), "0, 0, 0, 0, 0, 0, 0, 0 and 3 more");
    }
}
