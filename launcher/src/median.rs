//! The middle of some numbers.

/// The number in the middle, or the mean of the two there; `None` of no numbers. Sorts them.
pub fn median(numbers: &mut [f64]) -> Option<f64> {
    numbers.sort_unstable_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    let upper = *numbers.get(middle)?;
    if numbers.len().is_multiple_of(2) {
        Some((numbers[middle - 1] + upper) / 2.0)
    } else {
        Some(upper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_even_number_it_lies_between_the_two_in_the_middle() {
        let mut even = [4.0, 1.0, 2.0, 30.0];
        assert_eq!(median(&mut even), Some(3.0));
        assert_eq!(even, [1.0, 2.0, 4.0, 30.0]);
        assert_eq!(median(&mut [30.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&mut [7.0]), Some(7.0));
        assert_eq!(median(&mut []), None);
    }
}
