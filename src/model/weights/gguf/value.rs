//! The values of GGUF's metadata.

use crate::model::weights::container::Cursor;

/// The number of the type of arrays; [`Array`] has the numbers of all others.
pub(super) const ARRAY: u32 = 9;

/// A type that metadata can have.
pub(super) trait Element: Sized {
    /// The fewest bytes a value takes.
    const SMALLEST: usize;
    fn read(cursor: &mut Cursor) -> Result<Self, String>;
    fn write(&self, out: &mut Vec<u8>);
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Element for $number {
            const SMALLEST: usize = size_of::<$number>();
            fn read(cursor: &mut Cursor) -> Result<Self, String> {
                cursor.array("a value").map(<$number>::from_le_bytes)
            }
            fn write(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
        }
    )*};
}

numbers!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

impl Element for bool {
    const SMALLEST: usize = 1;
    fn read(cursor: &mut Cursor) -> Result<Self, String> {
        let at = cursor.position();
        match cursor.array("a value")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("{other} at byte {at} is neither true nor false")),
        }
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

/// Strings need not be UTF-8: tokens of a vocabulary are any bytes.
impl Element for Vec<u8> {
    const SMALLEST: usize = 8;
    fn read(cursor: &mut Cursor) -> Result<Self, String> {
        let length = cursor.u64("the length of a string")?;
        let length = cursor.count(length, 1, "bytes of a string")?;
        Ok(cursor.take(length, "a string")?.to_vec())
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.extend((self.len() as u64).to_le_bytes());
        out.extend(self);
    }
}

macro_rules! values {
    ($($variant:ident($element:ty) = $number:literal),* $(,)?) => {
        /// A value of metadata.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value {
            $($variant($element),)*
            Array(Array),
        }

        /// Values of one type. Arrays of arrays, which ggml does not read either, are not among them.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Array {
            $($variant(Vec<$element>),)*
        }

        impl Value {
            pub(super) fn read(cursor: &mut Cursor) -> Result<Self, String> {
                match cursor.u32("the type of a value")? {
                    $($number => Ok(Self::$variant(Element::read(cursor)?)),)*
                    ARRAY => Ok(Self::Array(Array::read(cursor)?)),
                    other => Err(format!("no type of values has the number {other}")),
                }
            }

            pub(super) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant(value) => {
                        u32::write(&$number, out);
                        value.write(out);
                    })*
                    Self::Array(array) => {
                        ARRAY.write(out);
                        array.write(out);
                    }
                }
            }
        }

        impl Array {
            fn read(cursor: &mut Cursor) -> Result<Self, String> {
                match cursor.u32("the type of an array")? {
                    $($number => read_all(cursor).map(Self::$variant),)*
                    ARRAY => Err("arrays of arrays are not supported".into()),
                    other => Err(format!("no type of values has the number {other}")),
                }
            }

            fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant(values) => {
                        u32::write(&$number, out);
                        u64::write(&(values.len() as u64), out);
                        values.iter().for_each(|value| value.write(out));
                    })*
                }
            }
        }
    };
}

values! {
    U8(u8) = 0,
    I8(i8) = 1,
    U16(u16) = 2,
    I16(i16) = 3,
    U32(u32) = 4,
    I32(i32) = 5,
    F32(f32) = 6,
    Bool(bool) = 7,
    String(Vec<u8>) = 8,
    U64(u64) = 10,
    I64(i64) = 11,
    F64(f64) = 12,
}

fn read_all<E: Element>(cursor: &mut Cursor) -> Result<Vec<E>, String> {
    let count = cursor.u64("the length of an array")?;
    let count = cursor.count(count, E::SMALLEST, "values of an array")?;
    (0..count).map(|_| E::read(cursor)).collect()
}
