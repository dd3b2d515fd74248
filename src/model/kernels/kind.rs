//! Types that weights are stored in, with ggml's numbers and block sizes.

/// How the values of a tensor are stored; quantised kinds hold blocks of values that share their scales.
///
/// The layouts are those of `ggml-common.h`, the numbers those of `enum ggml_type` in `ggml.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Kind {
    pub const ALL: [Kind; 11] = [
        Kind::F32,
        Kind::F16,
        Kind::BF16,
        Kind::Q8_0,
        Kind::Q4_0,
        Kind::Q4_1,
        Kind::Q5_0,
        Kind::Q5_1,
        Kind::Q4K,
        Kind::Q5K,
        Kind::Q6K,
    ];

    /// Name, ggml's number, values in a block, bytes of a block.
    const fn facts(self) -> (&'static str, u32, usize, usize) {
        match self {
            Kind::F32 => ("f32", 0, 1, 4),
            Kind::F16 => ("f16", 1, 1, 2),
            Kind::BF16 => ("bf16", 30, 1, 2),
            Kind::Q8_0 => ("q8_0", 8, 32, 34),
            Kind::Q4_0 => ("q4_0", 2, 32, 18),
            Kind::Q4_1 => ("q4_1", 3, 32, 20),
            Kind::Q5_0 => ("q5_0", 6, 32, 22),
            Kind::Q5_1 => ("q5_1", 7, 32, 24),
            Kind::Q4K => ("q4_k", 12, 256, 144),
            Kind::Q5K => ("q5_k", 13, 256, 176),
            Kind::Q6K => ("q6_k", 14, 256, 210),
        }
    }

    /// ggml's name in lower case, such as `q4_k`.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// The kind of a name that [`Kind::name`] gives.
    pub fn parse(name: &str) -> Option<Kind> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Values in a block: 1, 32 or 256.
    pub const fn block(self) -> usize {
        self.facts().2
    }

    pub const fn block_bytes(self) -> usize {
        self.facts().3
    }

    pub const fn quantised(self) -> bool {
        self.block() > 1
    }

    /// Bytes of that many values; none if they are not whole blocks, or too many to count.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        if elements.is_multiple_of(self.block()) {
            (elements / self.block()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// Bytes of a tensor, row-major; none if a row is not whole blocks, or the values are too many to count. They are so
    /// too where an empty tensor would have them if none of its axes were empty, so that no part of a product overflows.
    pub fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        shape.iter().try_fold(size_of::<f32>(), |bytes, &dimension| bytes.checked_mul(dimension.max(1)))?;
        let row = self.bytes(shape.last().copied().unwrap_or(1))?;
        let rows = &shape[..shape.len().saturating_sub(1)];
        rows.iter().try_fold(row, |bytes, &dimension| bytes.checked_mul(dimension))
    }

    /// The number of the type in ggml and in GGUF files.
    pub const fn ggml(self) -> u32 {
        self.facts().1
    }

    pub fn from_ggml(number: u32) -> Option<Kind> {
        Self::ALL.into_iter().find(|kind| kind.ggml() == number)
    }

    /// The names of all kinds, for error messages.
    pub fn names() -> String {
        Self::ALL.map(Kind::name).join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_lead_back() {
        for kind in Kind::ALL {
            assert_eq!(Kind::parse(kind.name()), Some(kind));
            assert_eq!(Kind::from_ggml(kind.ggml()), Some(kind));
        }
        assert_eq!(Kind::parse("Q4_0"), None);
        // 4 and 5 were types that ggml has removed; 9 and 10 are types that no file of ours has.
        for number in [4, 5, 9, 10, 11, 15, 16, 29, 31, u32::MAX] {
            assert_eq!(Kind::from_ggml(number), None, "{number}");
        }
    }

    #[test]
    fn only_whole_blocks_have_a_size() {
        assert_eq!(Kind::F32.bytes(3), Some(12));
        assert_eq!(Kind::Q4_0.bytes(64), Some(36));
        assert_eq!(Kind::Q6K.bytes(512), Some(420));
        assert_eq!(Kind::Q6K.bytes(0), Some(0));
        assert_eq!(Kind::Q4_0.bytes(33), None);
        assert_eq!(Kind::Q6K.bytes(128), None);
        assert_eq!(Kind::F32.bytes(usize::MAX), None);
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(Kind::F32.tensor_bytes(&[]), Some(4));
        assert_eq!(Kind::Q8_0.tensor_bytes(&[2, 3, 32]), Some(204));
        // 64 values in all, yet no row of them is a block.
        assert_eq!(Kind::Q8_0.tensor_bytes(&[4, 16]), None);
        assert_eq!(Kind::Q8_0.tensor_bytes(&[]), None);
        assert_eq!(Kind::F16.tensor_bytes(&[usize::MAX, 2]), None);
        assert_eq!(Kind::F16.tensor_bytes(&[0, 3]), Some(0));
        // Whoever turns it around multiplies the other two first.
        assert_eq!(Kind::F16.tensor_bytes(&[0, 1 << 40, 1 << 40]), None);
    }
}
