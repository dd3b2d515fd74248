//! The only clock, and the only source of randomness that is not a seed's.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970; 0 on a machine whose clock is set before that.
pub fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    unix_millis() / 1000
}

/// A point on the monotonic clock, for measuring how long things take.
pub fn now() -> Instant {
    Instant::now()
}

/// 128 unpredictable bits, from a cryptographic generator that the operating system seeds.
pub fn random_u128() -> u128 {
    rand::random()
}

/// 64 unpredictable bits: the seed of a request that brings none.
pub fn random_u64() -> u64 {
    rand::random()
}

/// How long a complaint is not made again.
const QUIET: Duration = Duration::from_secs(600);

/// A complaint that there would be very often cause for, as while a disk is full.
#[derive(Debug, Default)]
pub struct Rarely(Mutex<Option<Instant>>);

impl Rarely {
    /// Whether it is made now: the first time, and then every ten minutes.
    pub fn now(&self) -> bool {
        self.at(now())
    }

    fn at(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= QUIET);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_made_at_first_and_then_rarely() {
        let (rarely, begun) = (Rarely::default(), now());
        let made = (0..1500).filter(|s| rarely.at(begun + Duration::from_secs(*s))).collect::<Vec<u64>>();
        assert_eq!(made, [0, 600, 1200]);
    }

    #[test]
    fn seconds_and_millis_are_the_same_clock() {
        let (before, seconds, after) = (unix_millis(), unix_seconds(), unix_millis());
        assert!((before / 1000..=after / 1000).contains(&seconds));
        assert!(seconds > 1_700_000_000, "the year is after 2023");
    }

    #[test]
    fn random_ids_differ() {
        assert_ne!(random_u128(), random_u128());
        assert_ne!(random_u128() >> 64, 0, "the upper half is random too");
    }
}
