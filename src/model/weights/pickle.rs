//! Pickle streams as plain values: nothing is imported, looked up or called.
//!
//! A class or function is its two names, and what a pickle makes by calling one is an [`Value::Object`] that records the
//! call. Opcodes are those of protocols 1 to 5 (Python's `Lib/pickletools.py`), without the ones for classes of Python 2,
//! extension codes and out-of-band buffers. Protocol 0 cannot hold checkpoints: storages have no names in it.
//!
//! Values refer to one another by their index in one flat list. Sharing copies nothing, and no nesting, however deep,
//! makes reading or dropping recurse.

use std::collections::HashMap;

/// Opcodes in one pickle: a tensor takes about 25, and an opcode at most 200 bytes of memory.
const MOST_STEPS: usize = 1 << 21;
/// Bytes of an integer.
const LONGEST_INTEGER: usize = 32;
/// Characters of a name from the file in a message.
const SHOWN: usize = 80;

/// A value of the pickle it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(u32);

#[derive(Debug, PartialEq)]
pub enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than eight bytes, little endian.
    Long(&'a [u8]),
    /// No tensor's place depends on a float or on bytes, so neither is kept.
    Float,
    Bytes,
    Str(&'a str),
    Tuple(Vec<Id>),
    /// A list or a set.
    List(Vec<Id>),
    /// A `dict` or an `OrderedDict`, as it was written: a key may be there twice.
    Dict(Vec<(Id, Id)>),
    Global {
        module: &'a str,
        name: &'a str,
    },
    /// What a call of `class` would have made. Items put into it are dropped.
    Object {
        class: Id,
        args: Id,
        state: Option<Id>,
    },
    /// Something outside of the pickle, under the name that its writer chose.
    Persistent(Id),
}

/// The values of one pickle.
#[derive(Debug)]
pub struct Pickle<'a> {
    values: Vec<Value<'a>>,
    pub root: Id,
    /// Bytes of the pickle, which others may follow.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    pub fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// All values, in the order in which they were made.
    pub fn values(&self) -> &[Value<'a>] {
        &self.values
    }

    /// A value in a few words, for messages.
    pub fn describe(&self, id: Id) -> String {
        match self.get(id) {
            Value::Global { module, name } => format!("`{}.{}`", shown(module), shown(name)),
            Value::Object { class, .. } => match self.get(*class) {
                Value::Global { .. } => format!("an object of {}", self.describe(*class)),
                _ => "an object".into(),
            },
            Value::None => "None".into(),
            Value::Bool(_) => "a bool".into(),
            Value::Int(_) | Value::Long(_) => "an integer".into(),
            Value::Float => "a float".into(),
            Value::Bytes => "bytes".into(),
            Value::Str(_) => "a string".into(),
            Value::Tuple(_) => "a tuple".into(),
            Value::List(_) => "a list".into(),
            Value::Dict(_) => "a dict".into(),
            Value::Persistent(_) => "a storage".into(),
        }
    }
}

/// A name out of a file, fit for a message: short and without control characters.
pub fn shown(name: &str) -> String {
    name.chars().take(SHOWN).flat_map(char::escape_debug).collect()
}

/// The pickle at the start of `bytes`.
///
/// # Errors
/// It ends early, has an opcode that is not known here, or breaks the rules of its stack; with the position.
pub fn read(bytes: &[u8]) -> Result<Pickle<'_>, String> {
    let mut machine = Machine { bytes, at: 0, values: vec![], stack: vec![], marks: vec![], memo: HashMap::new() };
    for _ in 0..MOST_STEPS {
        let at = machine.at;
        let [op] = machine.array()?;
        let located = |e| format!("{e} (opcode {op:#04x} at byte {at} of the pickle)");
        if op == b'.' {
            let root = machine.pop().map_err(located)?;
            return Ok(Pickle { values: machine.values, root, length: machine.at });
        }
        machine.step(op).map_err(located)?;
    }
    Err(format!("its pickle has more than {MOST_STEPS} opcodes"))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack, ascending and never above its present one.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn step(&mut self, op: u8) -> Result<(), String> {
        if let Some(value) = self.literal(op)? {
            self.push(value);
        } else if !(self.collect(op)? || self.remember(op)? || self.construct(op)?) {
            return Err("an opcode that is not known here".into());
        }
        Ok(())
    }

    /// The value that an opcode holds in itself.
    fn literal(&mut self, op: u8) -> Result<Option<Value<'a>>, String> {
        Ok(Some(match op {
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(u8::from_le_bytes(self.array()?).into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'I' => match self.line()? {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                digits => Value::Int(number(digits)?),
            },
            b'L' => {
                let line = self.line()?;
                Value::Int(number(line.strip_suffix('L').unwrap_or(line))?)
            }
            0x8a => integer(self.sized(1)?)?,
            0x8b => integer(self.sized(4)?)?,
            b'G' => self.take(8).map(|_| Value::Float)?,
            // Python 2 wrote both names and bytes like this.
            b'U' => std::str::from_utf8(self.sized(1)?).map_or(Value::Bytes, Value::Str),
            b'T' => std::str::from_utf8(self.sized(4)?).map_or(Value::Bytes, Value::Str),
            0x8c => Value::Str(text(self.sized(1)?)?),
            b'X' => Value::Str(text(self.sized(4)?)?),
            0x8d => Value::Str(text(self.sized(8)?)?),
            b'C' => self.sized(1).map(|_| Value::Bytes)?,
            b'B' => self.sized(4).map(|_| Value::Bytes)?,
            0x8e | 0x96 => self.sized(8).map(|_| Value::Bytes)?,
            b')' => Value::Tuple(vec![]),
            b']' | 0x8f => Value::List(vec![]),
            b'}' => Value::Dict(vec![]),
            b'c' => Value::Global { module: self.line()?, name: self.line()? },
            _ => return Ok(None),
        }))
    }

    /// Opcodes that move values between the stack and containers.
    fn collect(&mut self, op: u8) -> Result<bool, String> {
        match op {
            b'(' => self.marks.push(self.stack.len()),
            b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => self.stack.push(self.top()?),
            b't' => self.gather(Value::Tuple)?,
            0x85..=0x87 => {
                let mut items = (0x85..=op).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                items.reverse();
                self.push(Value::Tuple(items));
            }
            0x91 => self.gather(Value::List)?,
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.append(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Opcodes of the memo, and those that only describe the stream.
    fn remember(&mut self, op: u8) -> Result<bool, String> {
        let at = match op {
            b'q' | b'h' => u8::from_le_bytes(self.array()?).into(),
            b'r' | b'j' => u32::from_le_bytes(self.array()?),
            0x94 => self.memo.len() as u32,
            0x80 => match self.array()? {
                [0..=5] => return Ok(true),
                [version] => return Err(format!("pickle protocol {version}; 5 is the last one known")),
            },
            0x95 => return self.take(8).map(|_| true),
            _ => return Ok(false),
        };
        if matches!(op, b'h' | b'j') {
            self.stack.push(*self.memo.get(&at).ok_or("a place in the memo that is empty")?);
        } else {
            self.memo.insert(at, self.top()?);
        }
        Ok(true)
    }

    /// Opcodes that would import or call something.
    fn construct(&mut self, op: u8) -> Result<bool, String> {
        match op {
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (&Value::Str(module), &Value::Str(name)) = (self.value(module), self.value(name)) else {
                    return Err("a class whose name is no string".into());
                };
                self.push(Value::Global { module, name });
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id));
            }
            b'R' | 0x81 => {
                let (args, class) = (self.pop()?, self.pop()?);
                self.call(class, args);
            }
            0x92 => {
                let (_keywords, args, class) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(class, args);
            }
            b'b' => {
                let new = self.pop()?;
                let target = self.top()?;
                if let Value::Object { state, .. } = self.value_mut(target) {
                    *state = Some(new);
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Records a call. The containers of the standard library that checkpoints use become values of their own.
    fn call(&mut self, class: Id, args: Id) {
        let made = match (self.value(class), self.value(args)) {
            (Value::Global { module: "collections", name: "OrderedDict" }, Value::Tuple(args)) if args.is_empty() => {
                Value::Dict(vec![])
            }
            (Value::Global { module: "__builtin__" | "builtins", name: "set" | "frozenset" }, Value::Tuple(args))
                if let &[items] = args.as_slice()
                    && matches!(self.value(items), Value::List(_)) =>
            {
                return self.stack.push(items);
            }
            _ => Value::Object { class, args, state: None },
        };
        self.push(made);
    }

    fn gather(&mut self, container: fn(Vec<Id>) -> Value<'a>) -> Result<(), String> {
        let items = self.pop_to_mark()?;
        self.push(container(items));
        Ok(())
    }

    fn append(&mut self, items: &[Id]) -> Result<(), String> {
        let target = self.top()?;
        match self.value_mut(target) {
            Value::List(list) => list.extend(items),
            Value::Object { .. } => {}
            _ => return Err("items for something that is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let items = pairs(items)?;
        let target = self.top()?;
        match self.value_mut(target) {
            Value::Dict(dict) => dict.extend(items),
            Value::Object { .. } => {}
            _ => return Err("entries for something that is no dict".into()),
        }
        Ok(())
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    fn value_mut(&mut self, id: Id) -> &mut Value<'a> {
        &mut self.values[id.0 as usize]
    }

    fn push(&mut self, value: Value<'a>) {
        // At most one value a step, so that their number is far below 2³².
        self.stack.push(Id(self.values.len() as u32));
        self.values.push(value);
    }

    fn top(&self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..].last().copied().ok_or_else(|| "nothing on the stack".into())
    }

    fn pop(&mut self) -> Result<Id, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let length = usize::try_from(length).ok().filter(|&n| n <= rest.len()).ok_or("its pickle ends early")?;
        self.at += length;
        Ok(&rest[..length])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N as u64)?.try_into().expect("as many bytes as were asked for"))
    }

    /// Bytes behind their number, which is itself a little endian one of `width` bytes.
    fn sized(&mut self, width: u64) -> Result<&'a [u8], String> {
        let length = self.take(width)?.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        self.take(length)
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&b| b == b'\n').ok_or("its pickle ends early")?;
        self.at += length + 1;
        text(&rest[..length])
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    let (pairs, []) = items.as_chunks() else { return Err("a key without a value".into()) };
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|_| "a string that is not UTF-8".into())
}

fn number(digits: &str) -> Result<i64, String> {
    digits.parse().map_err(|_| format!("`{}` for an integer", shown(digits)))
}

fn integer(bytes: &[u8]) -> Result<Value<'_>, String> {
    match bytes.len() {
        0..=8 => {
            let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) { -1 } else { 0 };
            Ok(Value::Int(bytes.iter().rev().fold(sign, |n, &b| n << 8 | i64::from(b))))
        }
        9..=LONGEST_INTEGER => Ok(Value::Long(bytes)),
        length => Err(format!("an integer of {length} bytes")),
    }
}

/// Opcodes of protocol 2, for the tests of whoever reads pickles.
#[cfg(test)]
pub mod write {
    pub fn int(n: i64) -> Vec<u8> {
        [&[0x8a, 8][..], &n.to_le_bytes()].concat()
    }

    pub fn text(text: &str) -> Vec<u8> {
        [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }

    pub fn global(module: &str, name: &str) -> Vec<u8> {
        format!("c{module}\n{name}\n").into_bytes()
    }

    pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
        [b"(", &items.concat()[..], b"t"].concat()
    }

    pub fn list(items: &[Vec<u8>]) -> Vec<u8> {
        [b"](", &items.concat()[..], b"e"].concat()
    }

    pub fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let entries: Vec<_> = entries.iter().map(|(key, value)| [text(key), value.clone()].concat()).collect();
        [b"}(", &entries.concat()[..], b"u"].concat()
    }

    pub fn call(function: Vec<u8>, args: &[Vec<u8>]) -> Vec<u8> {
        [function, tuple(args), b"R".to_vec()].concat()
    }

    pub fn object(class: Vec<u8>, state: Vec<u8>) -> Vec<u8> {
        [class, b")\x81".to_vec(), state, b"b".to_vec()].concat()
    }

    pub fn persistent(id: Vec<u8>) -> Vec<u8> {
        [id, b"Q".to_vec()].concat()
    }

    pub fn pickle(root: Vec<u8>) -> Vec<u8> {
        [b"\x80\x02".to_vec(), root, b".".to_vec()].concat()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn root(bytes: &[u8]) -> Value<'_> {
        let mut pickle = read(bytes).unwrap();
        pickle.values.swap_remove(pickle.root.0 as usize)
    }

    fn error(bytes: &[u8]) -> String {
        read(bytes).unwrap_err()
    }

    #[test]
    fn literals_are_pythons() {
        let cases: &[(&[u8], Value)] = &[
            (b"N.", Value::None),
            (b"\x80\x05\x88.", Value::Bool(true)),
            (b"\x89.", Value::Bool(false)),
            (b"I01\n.", Value::Bool(true)),
            (b"I-12\n.", Value::Int(-12)),
            (b"L77L\n.", Value::Int(77)),
            (b"K\xff.", Value::Int(255)),
            (b"M\x00\xff.", Value::Int(0xff00)),
            (b"J\xff\xff\xff\xff.", Value::Int(-1)),
            (b"\x8a\x00.", Value::Int(0)),
            (b"\x8a\x01\xff.", Value::Int(-1)),
            (b"\x8a\x02\x00\x80.", Value::Int(-32768)),
            (b"\x8a\x02\xff\x00.", Value::Int(255)),
            (b"\x8a\x08\0\0\0\0\0\0\0\x80.", Value::Int(i64::MIN)),
            (b"\x8b\x01\0\0\0\x07.", Value::Int(7)),
            (b"\x8a\x09\0\0\0\0\0\0\0\x80\0.", Value::Long(b"\0\0\0\0\0\0\0\x80\0")),
            (b"G\0\0\0\0\0\0\0\0.", Value::Float),
            (b"X\x02\0\0\0\xc3\xa9.", Value::Str("é")),
            (b"\x8c\x01a.", Value::Str("a")),
            (b"\x8d\x01\0\0\0\0\0\0\0a.", Value::Str("a")),
            (b"U\x01a.", Value::Str("a")),
            (b"U\x01\xff.", Value::Bytes),
            (b"T\x01\0\0\0a.", Value::Str("a")),
            (b"C\x01a.", Value::Bytes),
            (b"B\x01\0\0\0a.", Value::Bytes),
            (b"\x8e\x01\0\0\0\0\0\0\0a.", Value::Bytes),
            (b"\x96\x01\0\0\0\0\0\0\0a.", Value::Bytes),
            (b"cos\nsystem\n.", Value::Global { module: "os", name: "system" }),
            (b"\x8c\x02os\x8c\x06system\x93.", Value::Global { module: "os", name: "system" }),
            (b"\x95\x01\0\0\0\0\0\0\0N.", Value::None),
        ];
        for (bytes, value) in cases {
            assert_eq!(root(bytes), *value, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn containers_hold_what_was_put_into_them() {
        let (a, b, c) = (Id(0), Id(1), Id(2));
        let cases: &[(&[u8], Value)] = &[
            (b"K\x01K\x02K\x03\x87.", Value::Tuple(vec![a, b, c])),
            (b"NNN\x86.", Value::Tuple(vec![b, c])),
            (b"N\x85.", Value::Tuple(vec![a])),
            (b"(NNt.", Value::Tuple(vec![a, b])),
            (b"(NN\x91.", Value::List(vec![a, b])),
            (b"]Na.", Value::List(vec![b])),
            (b"](NNe.", Value::List(vec![b, c])),
            (b"\x8f(N\x90.", Value::List(vec![b])),
            (b"}NNs.", Value::Dict(vec![(b, c)])),
            (b"}(NNu.", Value::Dict(vec![(b, c)])),
            (b"N(N1.", Value::None),
            (b"\x88N0.", Value::Bool(true)),
            (b"N(0.", Value::None),
            (b"N2\x86.", Value::Tuple(vec![a, a])),
            (b"Nq\x07N0h\x07\x86.", Value::Tuple(vec![a, a])),
            (b"N\x94Nr\x01\0\0\x01j\x01\0\0\x01h\0\x87.", Value::Tuple(vec![b, b, a])),
        ];
        for (bytes, value) in cases {
            assert_eq!(root(bytes), *value, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn calls_are_recorded_and_not_made() {
        let bytes = b"cos\nsystem\nX\x09\0\0\0rm -rf ./\x85R.";
        let pickle = read(bytes).unwrap();
        assert_eq!(pickle.describe(pickle.root), "an object of `os.system`");
        assert_eq!(pickle.length, bytes.len());
        for bytes in [&b"ca\nb\n)\x81}b."[..], b"ca\nb\n)}\x92}b.", b"ca\nb\n)R}b."] {
            assert!(matches!(root(bytes), Value::Object { state: Some(_), .. }), "{}", bytes.escape_ascii());
        }
        // Items of an object are dropped.
        assert!(matches!(root(b"ca\nb\n)R(NNuNa."), Value::Object { state: None, .. }));
    }

    #[test]
    fn containers_of_the_standard_library_are_values() {
        assert_eq!(root(b"ccollections\nOrderedDict\n)RNNs."), Value::Dict(vec![(Id(3), Id(4))]));
        assert_eq!(root(b"c__builtin__\nset\n]Na\x85R."), Value::List(vec![Id(2)]));
        assert_eq!(root(b"cbuiltins\nfrozenset\n]\x85R."), Value::List(vec![]));
    }

    #[test]
    fn broken_streams_are_refused_with_the_place() {
        for (bytes, message) in [
            (&b""[..], "ends early"),
            (b"N", "ends early"),
            (b".", "nothing on the stack (opcode 0x2e at byte 0"),
            (b"N\x86.", "nothing on the stack (opcode 0x86 at byte 1"),
            (b"N(.", "nothing on the stack"),
            (b"N(q\0.", "nothing on the stack"),
            (b"Nt.", "no mark"),
            (b"h\0.", "empty (opcode 0x68 at byte 0"),
            (b"NNa.", "no list"),
            (b"NNNs.", "no dict"),
            (b"}(Nu.", "a key without a value"),
            (b"\x80\x06N.", "protocol 6"),
            (b"NP.", "not known here (opcode 0x50 at byte 1"),
            (b"\x97.", "not known"),
            (b"\x82\x01.", "not known"),
            (b"NN\x93.", "no string"),
            (b"X\xff\xff\xff\xffa.", "ends early"),
            (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.", "ends early"),
            (b"\x8b\xff\xff\xff\xff.", "ends early"),
            (b"X\x01\0\0\0\xff.", "UTF-8"),
            (b"I1x\n.", "`1x`"),
            (b"I1", "ends early"),
        ] {
            let found = error(bytes);
            assert!(found.contains(message), "{}: {found}", bytes.escape_ascii());
        }
        assert!(error(&[b"\x8a\x40", &[1; 64][..], b"."].concat()).contains("64 bytes"));
    }

    #[test]
    fn deep_nesting_and_sharing_cost_no_stack_and_no_copies() {
        let deep = [vec![b'N'], vec![0x85; 1_000_000], vec![b'.']].concat();
        drop(read(&deep).unwrap());
        let laughs = [&b"N"[..], &b"2\x86".repeat(500_000), b"."].concat();
        assert_eq!(read(&laughs).unwrap().values.len(), 500_001);
        // A list that holds itself.
        assert_eq!(root(b"]q\0h\0a."), Value::List(vec![Id(0)]));
    }

    #[test]
    fn very_many_opcodes_are_refused() {
        assert!(error(&vec![b'N'; MOST_STEPS + 1]).contains("opcodes"));
    }

    #[test]
    fn names_from_a_file_are_tamed() {
        assert_eq!(shown("a\n\u{1b}[0m"), "a\\n\\u{1b}[0m");
        assert_eq!(shown(&"x".repeat(1000)).len(), SHOWN);
    }

    proptest! {
        #[test]
        fn no_stream_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }

        /// Opcodes alone, which get much further than arbitrary bytes.
        #[test]
        fn no_sequence_of_opcodes_panics(
            ops in prop::collection::vec(prop::sample::select(b"N(012)]}tlausebRQ.q\0h\0\x81\x85\x86\x87\x90\x91\x93\x94".to_vec()), 0..200)
        ) {
            if let Ok(pickle) = read(&[ops, b".".to_vec()].concat()) {
                prop_assert!(!pickle.describe(pickle.root).is_empty());
            }
        }

        #[test]
        fn integers_survive(n: i64) {
            let bytes = write::pickle(write::int(n));
            prop_assert_eq!(root(&bytes), Value::Int(n));
        }
    }
}
