//! Randomness as a function.

use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A number in `0.0..1.0` that depends on nothing but its arguments, so that a resumed response draws what the
/// uninterrupted one would have drawn.
///
/// ChaCha8 with `seed` as key, `choice` as stream and `position`, the token's absolute place in its sequence, as counter.
pub fn coin(seed: u64, choice: usize, position: u64) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(choice as u64);
    rng.set_word_pos(2 * u128::from(position));
    // 53 bits fill the mantissa of an f64.
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_argument_matters_and_nothing_else() {
        let a = coin(1, 0, 5);
        assert_eq!(a, coin(1, 0, 5));
        for other in [coin(2, 0, 5), coin(1, 1, 5), coin(1, 0, 6), coin(1, 0, 4)] {
            assert_ne!(a, other);
        }
    }

    #[test]
    fn it_is_fair() {
        let mean = (0..10_000).map(|at| coin(7, 3, at)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        assert!((0..10_000).all(|at| (0.0..1.0).contains(&coin(9, 0, at))));
    }
}
