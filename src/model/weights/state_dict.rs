//! The tensors of a pickled object by name: a state dict, a dict around one, or a whole module.

use std::collections::HashSet;

use super::pickle::{Id, Pickle, Value, shown};

const MOST_TENSORS: usize = 1 << 16;
/// Modules inside one another.
const DEEPEST: usize = 64;
/// Entries of dicts that are looked at. Modules may share others many times over, so that a small file has very many
/// paths to one tensor.
const MOST_WORK: usize = 1 << 22;
/// Bytes of a tensor's name.
const LONGEST_NAME: usize = 256;

/// Name of each tensor and what PyTorch would rebuild it from: storage, offset, shape, strides and others.
///
/// The order is that of the state dict. A dict around one state dict or module, as trainers write with the optimiser's
/// state beside it, is looked through; names are then those inside.
///
/// # Errors
/// There are entries that are no tensors, two models, or a name twice; or the file is made to take long.
pub fn tensors<'a>(pickle: &'a Pickle) -> Result<Vec<(String, &'a [Id])>, String> {
    let mut walk = Walk { pickle, work: 0, names: HashSet::new(), found: vec![] };
    walk.root()?;
    Ok(walk.found)
}

struct Walk<'a> {
    pickle: &'a Pickle<'a>,
    work: usize,
    names: HashSet<String>,
    found: Vec<(String, &'a [Id])>,
}

impl<'a> Walk<'a> {
    fn root(&mut self) -> Result<(), String> {
        let pickle = self.pickle;
        let root = pickle.root;
        let Some(entries) = as_dict(pickle, root).filter(|e| !self.are_tensors(e)) else { return self.model(root) };
        if let Some(&(key, value)) = entries.iter().find(|&&(_, value)| !self.is_tensor(value))
            && entries.iter().any(|&(_, value)| self.is_tensor(value))
        {
            return Err(format!("its entry {} is {}, not a tensor", self.quoted(key), pickle.describe(value)));
        }
        let mut models = vec![];
        for &(key, value) in entries {
            let inner = as_dict(pickle, value).or_else(|| attributes(pickle, value)).unwrap_or_default();
            self.spend(1 + inner.len())?;
            if state(pickle, value).is_some() || as_dict(pickle, value).is_some_and(|inner| self.are_tensors(inner)) {
                models.push((key, value));
            }
        }
        match models.as_slice() {
            [] => Err("it holds no tensors".into()),
            [(_, model)] => self.model(*model),
            [(first, _), (second, _), ..] => {
                let (first, second) = (self.quoted(*first), self.quoted(*second));
                Err(format!("which of its entries is the model is not clear: {first} or {second}"))
            }
        }
    }

    /// A state dict or a module.
    fn model(&mut self, id: Id) -> Result<(), String> {
        match as_dict(self.pickle, id) {
            Some(entries) => entries.iter().try_for_each(|&(key, value)| self.tensor(self.name("", key)?, value)),
            None if state(self.pickle, id).is_some() => self.module("", id, DEEPEST),
            None => Err(format!("it holds {}, not a dict of tensors", self.pickle.describe(id))),
        }
    }

    /// The parameters and persistent buffers of a module, named as its `state_dict()` would.
    fn module(&mut self, prefix: &str, id: Id, depth: usize) -> Result<(), String> {
        let what = || format!("its module `{}`", shown(prefix));
        let depth = depth.checked_sub(1).ok_or("its modules are nested too deeply")?;
        let pickle = self.pickle;
        let entries =
            state(pickle, id).ok_or_else(|| format!("{} is {}, not a module", what(), pickle.describe(id)))?;
        self.spend(entries.len())?;
        let field = |name| entries.iter().rev().find(|&&(key, _)| *pickle.get(key) == Value::Str(name));
        let part = |name| match field(name) {
            None => Ok(&[][..]),
            Some(&(_, value)) => as_dict(pickle, value).ok_or_else(|| format!("{} has a broken `{name}`", what())),
        };
        let passing = match field("_non_persistent_buffers_set").map(|&(_, value)| pickle.get(value)) {
            Some(Value::List(names)) => names.as_slice(),
            _ => &[],
        };
        for &(key, value) in part("_parameters")?.iter().chain(part("_buffers")?) {
            self.spend(1 + passing.len())?;
            // The name is short from here on, and comparing it cheap.
            let name = self.name(prefix, key)?;
            let is_passing = passing.iter().any(|&passing| pickle.get(passing) == pickle.get(key));
            if *pickle.get(value) != Value::None && !is_passing {
                self.tensor(name, value)?;
            }
        }
        for &(key, value) in part("_modules")? {
            self.spend(1)?;
            if *pickle.get(value) != Value::None {
                self.module(&format!("{}.", self.name(prefix, key)?), value, depth)?;
            }
        }
        Ok(())
    }

    fn tensor(&mut self, name: String, value: Id) -> Result<(), String> {
        let fields = constructor(self.pickle, value)
            .ok_or_else(|| format!("its entry `{}` is {}, not a tensor", shown(&name), self.pickle.describe(value)))?;
        if !self.names.insert(name.clone()) {
            return Err(format!("it has two tensors `{}`", shown(&name)));
        }
        if self.found.len() == MOST_TENSORS {
            return Err(format!("it has more than {MOST_TENSORS} tensors"));
        }
        self.found.push((name, fields));
        Ok(())
    }

    fn name(&self, prefix: &str, key: Id) -> Result<String, String> {
        let &Value::Str(key) = self.pickle.get(key) else {
            return Err(format!("the name of a tensor or module is {}", self.pickle.describe(key)));
        };
        if prefix.len() + key.len() > LONGEST_NAME {
            return Err(format!("the name `{}…` is longer than {LONGEST_NAME} bytes", shown(key)));
        }
        Ok(format!("{prefix}{key}"))
    }

    fn spend(&mut self, work: usize) -> Result<(), String> {
        self.work += work;
        if self.work > MOST_WORK { Err("it has too many modules".into()) } else { Ok(()) }
    }

    fn is_tensor(&self, id: Id) -> bool {
        constructor(self.pickle, id).is_some()
    }

    fn are_tensors(&self, entries: &[(Id, Id)]) -> bool {
        !entries.is_empty() && entries.iter().all(|&(_, value)| self.is_tensor(value))
    }

    fn quoted(&self, key: Id) -> String {
        if let Value::Str(key) = self.pickle.get(key) { format!("`{}`", shown(key)) } else { self.pickle.describe(key) }
    }
}

fn as_dict<'a>(pickle: &'a Pickle, id: Id) -> Option<&'a [(Id, Id)]> {
    if let Value::Dict(entries) = pickle.get(id) { Some(entries) } else { None }
}

fn attributes<'a>(pickle: &'a Pickle, id: Id) -> Option<&'a [(Id, Id)]> {
    if let &Value::Object { state: Some(state), .. } = pickle.get(id) { as_dict(pickle, state) } else { None }
}

/// The attributes of an `nn.Module`.
fn state<'a>(pickle: &'a Pickle, id: Id) -> Option<&'a [(Id, Id)]> {
    attributes(pickle, id).filter(|e| e.iter().any(|&(key, _)| *pickle.get(key) == Value::Str("_modules")))
}

/// The arguments that a tensor would be rebuilt from: storage, offset, shape, strides and others.
fn constructor<'a>(pickle: &'a Pickle, mut id: Id) -> Option<&'a [Id]> {
    // A parameter is made of a tensor.
    for _ in 0..2 {
        let &Value::Object { class, args, .. } = pickle.get(id) else { return None };
        let &Value::Global { module: "torch._utils", name } = pickle.get(class) else { return None };
        let Value::Tuple(args) = pickle.get(args) else { return None };
        match name {
            "_rebuild_tensor_v2" | "_rebuild_tensor" => return Some(args),
            "_rebuild_parameter" | "_rebuild_parameter_with_state" => id = *args.first()?,
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::pickle::read;
    use super::super::pickle::write::*;
    use super::*;

    /// A tensor of which only `mark`, where its storage would be, is looked at.
    fn tensor(mark: i64) -> Vec<u8> {
        call(global("torch._utils", "_rebuild_tensor_v2"), &[int(mark), int(0)])
    }

    fn parameter(mark: i64) -> Vec<u8> {
        call(global("torch._utils", "_rebuild_parameter"), &[tensor(mark), b"\x88".to_vec()])
    }

    fn module(parts: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let all = ["_parameters", "_buffers", "_modules"];
        let missing = all.iter().filter(|name| parts.iter().all(|(n, _)| n != *name)).map(|&name| (name, dict(&[])));
        object(global("mine", "Block"), dict(&parts.iter().cloned().chain(missing).collect::<Vec<_>>()))
    }

    /// Names and marks of the tensors.
    fn found(root: Vec<u8>) -> Result<Vec<(String, i64)>, String> {
        let bytes = pickle(root);
        let pickle: Pickle = read(&bytes).unwrap();
        let mark = |fields: &[Id]| if let Value::Int(mark) = pickle.get(fields[0]) { *mark } else { panic!() };
        Ok(tensors(&pickle)?.into_iter().map(|(name, fields)| (name, mark(fields))).collect())
    }

    fn names(expected: &[(&str, i64)]) -> Result<Vec<(String, i64)>, String> {
        Ok(expected.iter().map(|&(name, mark)| (name.to_owned(), mark)).collect())
    }

    #[test]
    fn a_state_dict_gives_its_names() {
        assert_eq!(found(dict(&[("b", tensor(1)), ("a.weight", parameter(2))])), names(&[("b", 1), ("a.weight", 2)]));
        // As `state_dict()` gives it: ordered, and with an attribute.
        let ordered = [global("collections", "OrderedDict"), b")R".to_vec(), text("a"), tensor(3), b"s".to_vec()];
        let ordered = [ordered.concat(), dict(&[("_metadata", dict(&[]))]), b"b".to_vec()].concat();
        assert_eq!(found(ordered), names(&[("a", 3)]));
    }

    #[test]
    fn a_dict_around_a_model_is_looked_through() {
        let optimiser = dict(&[("state", dict(&[("0", dict(&[("mean", tensor(9))]))])), ("param_groups", list(&[]))]);
        let inner = dict(&[("a", tensor(1))]);
        let around = dict(&[("optimizer", optimiser.clone()), ("epoch", int(3)), ("state_dict", inner.clone())]);
        assert_eq!(found(around), names(&[("a", 1)]));
        let around = dict(&[("epoch", int(3)), ("model", module(&[("_parameters", dict(&[("w", tensor(1))]))]))]);
        assert_eq!(found(around), names(&[("w", 1)]));

        let two = found(dict(&[("model", inner.clone()), ("ema", inner.clone())])).unwrap_err();
        assert!(two.contains("not clear: `model` or `ema`"), "{two}");
        for nothing in [dict(&[]), dict(&[("a", dict(&[("b", inner.clone())]))]), optimiser] {
            assert_eq!(found(nothing), Err("it holds no tensors".into()));
        }
    }

    #[test]
    fn a_module_gives_the_names_of_its_state_dict() {
        let set = call(global("__builtin__", "set"), &[list(&[text("mask")])]);
        let head = module(&[("_parameters", dict(&[("weight", parameter(1)), ("bias", b"N".to_vec())]))]);
        let block = module(&[("_modules", dict(&[("0", head.clone()), ("off", b"N".to_vec())]))]);
        let root = module(&[
            ("training", b"\x89".to_vec()),
            ("_modules", dict(&[("head", head), ("blocks", block)])),
            ("_non_persistent_buffers_set", set),
            ("_buffers", dict(&[("mask", tensor(8)), ("scale", tensor(2))])),
            ("_parameters", dict(&[("decay", parameter(3))])),
        ]);
        let expected = [("decay", 3), ("scale", 2), ("head.weight", 1), ("blocks.0.weight", 1)];
        assert_eq!(found(root), names(&expected));
    }

    #[test]
    fn what_is_no_tensor_is_named() {
        let system = call(global("os", "system"), &[text("true")]);
        for (root, message) in [
            (system.clone(), "it holds an object of `os.system`, not a dict of tensors"),
            (tensor(1), "it holds an object of `torch._utils._rebuild_tensor_v2`, not a dict of tensors"),
            (list(&[tensor(1)]), "it holds a list, not a dict of tensors"),
            (
                dict(&[("a", tensor(1)), ("b", system.clone())]),
                "its entry `b` is an object of `os.system`, not a tensor",
            ),
            (dict(&[("a", tensor(1)), ("b", dict(&[]))]), "its entry `b` is a dict, not a tensor"),
            (dict(&[("a", tensor(1)), ("a", tensor(1))]), "it has two tensors `a`"),
            (module(&[("_parameters", dict(&[("p", int(1))]))]), "its entry `p` is an integer, not a tensor"),
            (
                module(&[("_modules", dict(&[("m", system)]))]),
                "its module `m.` is an object of `os.system`, not a module",
            ),
            (module(&[("_modules", int(1))]), "its module `` has a broken `_modules`"),
            (
                [b"}".to_vec(), int(1), tensor(1), b"s".to_vec()].concat(),
                "the name of a tensor or module is an integer",
            ),
        ] {
            assert_eq!(found(root), Err(message.into()));
        }
        let long = found(dict(&[("x".repeat(LONGEST_NAME + 1).as_str(), tensor(1))])).unwrap_err();
        assert!(long.contains("longer than"), "{long}");
    }

    #[test]
    fn modules_that_hold_themselves_are_refused() {
        // A module whose `_modules` is {"m": itself}.
        let inside = [text("_modules"), dict(&[("m", b"h\0".to_vec())]), b"s".to_vec()].concat();
        let root = [global("mine", "Block"), b")\x81q\0}".to_vec(), inside, b"b".to_vec()].concat();
        assert!(found(root).unwrap_err().contains("nested too deeply"));
    }

    #[test]
    fn modules_shared_very_many_times_are_refused() {
        let mut root = module(&[("_parameters", dict(&[]))]);
        for _ in 0..40 {
            let twice = [root, b"q\0".to_vec(), text("b"), b"h\0".to_vec()].concat();
            let modules = [b"}(".to_vec(), text("a"), twice, b"u".to_vec()].concat();
            root = module(&[("_modules", modules)]);
        }
        assert!(found(root).unwrap_err().contains("too many modules"));
    }

    #[test]
    fn large_dicts_shared_very_many_times_are_refused() {
        let large = [b"}(".to_vec(), b"NN".repeat(100_000), text("a"), int(1), b"uq\0".to_vec()].concat();
        let root = [b"}N".to_vec(), large, b"s(".to_vec(), b"Nh\0".repeat(100_000), b"u".to_vec()].concat();
        assert!(found(root).unwrap_err().contains("too many"));
    }
}
