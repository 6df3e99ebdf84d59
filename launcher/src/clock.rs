//! UTC times as text, without a time zone database.

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Utc {
    /// Milliseconds since 1970-01-01.
    ms: u64,
}

impl Utc {
    pub fn now() -> Utc {
        SystemTime::now().into()
    }

    /// So much later.
    #[must_use]
    pub fn after(self, time: std::time::Duration) -> Utc {
        let ms = self.ms.saturating_add(time.as_millis() as u64);
        Utc { ms }
    }

    /// `20260131-235959`, for names of folders.
    pub fn compact(self) -> String {
        let (year, month, day) = self.date();
        let (h, m, s) = self.time();
        format!("{year:04}{month:02}{day:02}-{h:02}{m:02}{s:02}")
    }

    /// `2026-01-31T23:59:59.250Z` (RFC 3339).
    pub fn rfc3339(self) -> String {
        let (year, month, day) = self.date();
        let (h, m, s) = self.time();
        format!(
            "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z",
            self.ms % 1000
        )
    }

    fn time(self) -> (u64, u64, u64) {
        let s = self.ms / 1000 % 86_400;
        (s / 3600, s / 60 % 60, s % 60)
    }

    /// Gregorian year, month and day, by Howard Hinnant's `civil_from_days`.
    fn date(self) -> (u64, u64, u64) {
        let z = self.ms / 86_400_000 + 719_468;
        let (era, doe) = (z / 146_097, z % 146_097);
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        let year = yoe + era * 400 + u64::from(month <= 2);
        (year, month, doy - (153 * mp + 2) / 5 + 1)
    }
}

impl From<SystemTime> for Utc {
    fn from(time: SystemTime) -> Utc {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Utc {
            ms: since.as_millis() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_agree_with_date_u() {
        let text = |s: u64| Utc { ms: s * 1000 + 7 }.rfc3339();
        assert_eq!(text(0), "1970-01-01T00:00:00.007Z");
        assert_eq!(text(951_782_400), "2000-02-29T00:00:00.007Z");
        assert_eq!(text(1_767_225_599), "2025-12-31T23:59:59.007Z");
        assert_eq!(
            Utc {
                ms: 1_709_210_096_000
            }
            .compact(),
            "20240229-123456"
        );
    }
}
