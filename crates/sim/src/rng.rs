//! Numbers that look random, and are the same for the same seed.
//!
//! xoshiro256++ of Blackman and Vigna, seeded by splitmix64 as they say: sixty lines of our own, so that what a seed means
//! never changes with a version of something else.

/// See the module.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

impl Rng {
    /// The numbers of one seed.
    pub fn new(seed: u64) -> Rng {
        let mut mix = seed;
        Rng { state: [0; 4].map(|_: u64| splitmix64(&mut mix)) }
    }

    /// Numbers of their own, which do not change if others are drawn more or less often.
    pub fn fork(&mut self) -> Rng {
        Rng::new(self.bits())
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (c, d) = (c ^ a, d ^ b);
        self.state = [a ^ d, b ^ c, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// One of `0..bound`, which is not empty. Not quite even, by 2^-32 at most.
    pub fn below(&mut self, bound: u64) -> u64 {
        debug_assert!(bound > 0 && bound <= 1 << 32);
        ((self.bits() >> 32) * bound) >> 32
    }

    /// One of these, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True once in `times`.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// An index into something of this length, which is not empty.
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the authors' C program, with the state that splitmix64 makes of 0.
    #[test]
    fn the_numbers_are_those_of_the_algorithm() {
        let mut mix = 0;
        assert_eq!(splitmix64(&mut mix), 0xE220_A839_7B1D_CDAF);
        assert_eq!(splitmix64(&mut mix), 0x6E78_9E6A_A1B9_65F4);
        let mut rng = Rng { state: [1, 2, 3, 4] };
        assert_eq!(
            [rng.bits(), rng.bits(), rng.bits()],
            [41_943_041, 58_720_359, 3_588_806_011_781_223]
        );
    }

    #[test]
    fn every_value_within_the_bounds_comes() {
        let mut rng = Rng::new(7);
        let mut seen = [0; 5];
        for _ in 0..1000 {
            seen[(rng.between(3, 7) - 3) as usize] += 1;
        }
        assert!(seen.iter().all(|&count| count > 100), "{seen:?}");
    }
}
