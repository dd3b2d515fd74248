//! GGUF as llama.cpp's own converter writes it: architectures `rwkv6` and `rwkv7`.

use super::{Conversion, Error, Kind, Op, Out, Target, becomes, registry};
use crate::model::weights::gguf::{Array, Value, header};
use crate::model::weights::names::llama::{self, Architecture, Form};

/// RWKV has no limit; llama.cpp wants a number.
const CONTEXT: u32 = 1 << 20;
/// The epsilon of every layer norm.
const EPSILON: f32 = 1e-5;
/// Token types: ordinary, one that controls, one that nothing has.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

/// Writes the header and then every tensor, each at its alignment.
pub fn write(conversion: &Conversion, out: &mut impl Out) -> Result<(), Error> {
    let plan = Plan::of(conversion)?;
    let targets = plan.targets()?;
    let described: Vec<_> = targets.iter().map(|t| (t.name.clone(), t.kind, t.shape.clone())).collect();
    let header = header(&plan.metadata(&targets)?, &described).map_err(Error::Convert)?;
    out.write_all(&header.bytes)?;
    let mut at = header.bytes.len() as u64;
    let mut fill = |out: &mut dyn Out, to: u64, bytes: &[u8]| -> Result<(), Error> {
        out.write_all(&vec![0; (to - at) as usize])?;
        out.write_all(bytes)?;
        at = to + bytes.len() as u64;
        Ok(())
    };
    conversion.each(&targets, |n, bytes| fill(out, header.places[n].start, bytes))?;
    fill(out, header.length, &[])
}

/// A conversion and what it is of.
struct Plan<'a> {
    conversion: &'a Conversion<'a>,
    architecture: &'static Architecture,
    layers: usize,
}

impl<'a> Plan<'a> {
    fn of(conversion: &'a Conversion<'a>) -> Result<Self, Error> {
        let architecture = match conversion.generation()? {
            "v6" => &llama::RWKV6,
            "v7" => &llama::RWKV7,
            other => {
                return Err(Error::Convert(format!("llama.cpp knows RWKV v6 and v7, and this is {other}")));
            }
        };
        let tensors = conversion.checkpoint.tensors();
        if let Some(name) = tensors.keys().find(|name| name.ends_with(".time_state")) {
            return Err(Error::Convert(format!("GGUF has no place for the initial state in `{name}`")));
        }
        // A tensor that is left out would make another model of it, and one of another shape a file that nothing loads.
        registry::check(conversion.checkpoint)?;
        let layers = (0..).take_while(|n| tensors.contains_key(&format!("blocks.{n}.ln1.weight"))).count();
        Ok(Self { conversion, architecture, layers })
    }

    /// The shape of an original tensor.
    fn shape(&self, name: &str) -> Result<&'a [usize], Error> {
        let shape = self.conversion.checkpoint.shape(name);
        shape.ok_or_else(|| Error::Convert(format!("the checkpoint has no `{name}`")))
    }

    fn targets(&self) -> Result<Vec<Target>, Error> {
        let outside = llama::OUTSIDE.iter().map(|(original, name)| self.target(original, (*name).into(), Form::Same));
        let mut targets = outside.collect::<Result<Vec<_>, _>>()?;
        for layer in 0..self.layers {
            for &(original, name, form) in self.architecture.layer {
                let original = format!("blocks.{layer}.{original}");
                // The first layer has no value residual, and llama.cpp wants something in its place.
                let original = match original.strip_prefix("blocks.0.att.v").filter(|rest| rest.len() == 1) {
                    Some(rest) if self.architecture.name == "rwkv7" => format!("blocks.0.att.a{rest}"),
                    _ => original,
                };
                targets.push(self.target(&original, format!("blk.{layer}.{name}"), form)?);
            }
            targets.push(self.fused(layer)?);
        }
        Ok(targets)
    }

    fn target(&self, original: &str, name: String, form: Form) -> Result<Target, Error> {
        let shape = self.shape(original)?;
        // A table of very many empty rows would be a vocabulary of very many tokens.
        if shape.contains(&0) {
            return Err(Error::Convert(format!("`{original}` is empty")));
        }
        let all = shape.iter().product();
        let (shape, ops) = match (form, shape) {
            (Form::Same, shape) => (shape.to_vec(), Vec::new()),
            (Form::Vector | Form::Heads, _) => (vec![all], vec![Op::Shape(vec![all])]),
            (Form::Transposed, [outer @ .., rows, cols]) => ([outer, &[*cols, *rows]].concat(), vec![Op::Transposed]),
            (Form::Transposed, _) => return Err(Error::Convert(format!("`{original}` is no matrix"))),
        };
        Ok(Target { kind: self.kind(original, &shape), name, shape, parts: vec![(original.into(), ops)] })
    }

    /// All mixes of a layer in one tensor.
    fn fused(&self, layer: usize) -> Result<Target, Error> {
        let mut parts = Vec::new();
        for original in self.architecture.fused {
            parts.push((format!("blocks.{layer}.{original}"), Vec::new()));
        }
        let &[_, width] = self.shape("emb.weight")? else {
            return Err(Error::Convert("`emb.weight` is no matrix".into()));
        };
        let shape = vec![parts.len(), 1, 1, width];
        Ok(Target { name: format!("blk.{layer}.{}", llama::FUSED), kind: Kind::F32, shape, parts })
    }

    /// Large matrices become what was asked for; llama.cpp wants everything else in f32.
    fn kind(&self, original: &str, shape: &[usize]) -> Kind {
        let own = self.conversion.checkpoint.tensors()[original].kind;
        becomes(original, shape, self.conversion.kind.unwrap_or(own)).unwrap_or(Kind::F32)
    }

    fn metadata(&self, targets: &[Target]) -> Result<Vec<(String, Value)>, Error> {
        let (name, layers) = (self.architecture.name, self.layers as u32);
        let size = |tensor: &str, axis: usize| Ok::<_, Error>(self.shape(tensor)?.get(axis).map_or(0, |&n| n as u32));
        let width = size("emb.weight", 1)?;
        let mut numbers = vec![
            ("context_length", CONTEXT),
            ("embedding_length", width),
            ("block_count", layers),
            ("feed_forward_length", size("blocks.0.ffn.key.weight", 0)?),
            // Wanted by llama.cpp's loader, not used.
            ("attention.head_count", 0),
        ];
        if name == "rwkv6" {
            numbers.push(("wkv.head_size", size("blocks.0.att.time_faaaa", 1)?));
            numbers.push(("time_mix_extra_dim", size("blocks.0.att.time_maa_w2", 1)?));
            numbers.push(("time_decay_extra_dim", size("blocks.0.att.time_decay_w1", 1)?));
        } else {
            numbers.push(("wkv.head_size", size("blocks.0.att.r_k", 1)?));
            numbers.push(("attention.decay_lora_rank", size("blocks.0.att.w1", 1)?));
            numbers.push(("attention.iclr_lora_rank", size("blocks.0.att.a1", 1)?));
            // The rank of the first layer that has one.
            let value = if layers > 1 { size("blocks.1.att.v1", 1)? } else { size("blocks.0.att.a1", 1)? };
            numbers.push(("attention.value_residual_mix_lora_rank", value));
            numbers.push(("attention.gate_lora_rank", size("blocks.0.att.g1", 1)?));
        }
        let text = |text: &str| Value::String(text.as_bytes().to_vec());
        let mut metadata = vec![
            ("general.architecture".into(), text(name)),
            ("general.name".into(), text(&self.conversion.name)),
            ("general.file_type".into(), Value::U32(file_type(targets))),
            ("general.quantization_version".into(), Value::U32(2)),
            (format!("{name}.attention.layer_norm_epsilon"), Value::F32(EPSILON)),
        ];
        metadata.extend(numbers.into_iter().map(|(key, number)| (format!("{name}.{key}"), Value::U32(number))));
        let vocabulary = size("emb.weight", 0)?;
        match &self.conversion.vocabulary {
            Some(literals) => metadata.extend(tokens(literals, vocabulary as usize)?),
            None => {
                metadata.push(("tokenizer.ggml.model".into(), text("none")));
                metadata.push((format!("{name}.vocab_size"), Value::U32(vocabulary)));
            }
        }
        Ok(metadata)
    }
}

/// llama.cpp's number (`enum llama_ftype`) for what most of a file is.
fn file_type(targets: &[Target]) -> u32 {
    let size = |kind: Kind| targets.iter().filter(|t| t.kind == kind).map(|t| t.shape.iter().product::<usize>()).sum();
    match Kind::ALL.into_iter().max_by_key(|&kind| -> usize { size(kind) }).unwrap_or(Kind::F32) {
        Kind::F32 => 0,
        Kind::F16 => 1,
        Kind::Q4_0 => 2,
        Kind::Q4_1 => 3,
        Kind::Q8_0 => 7,
        Kind::Q5_0 => 8,
        Kind::Q5_1 => 9,
        Kind::Q4K => 14,
        Kind::Q5K => 16,
        Kind::Q6K => 18,
        Kind::BF16 => 32,
    }
}

/// The vocabulary as llama.cpp's RWKV tokenizer wants it: a token for every row of the embedding.
fn tokens(literals: &[Vec<u8>], rows: usize) -> Result<Vec<(String, Value)>, Error> {
    if literals.len() > rows {
        return Err(Error::Convert(format!("the vocabulary has {} tokens and the model {rows}", literals.len())));
    }
    let mut tokens = Vec::with_capacity(rows);
    let mut types = Vec::with_capacity(rows);
    for id in 0..rows {
        let (token, kind) = match literals.get(id) {
            Some(literal) if !literal.is_empty() => (literal.clone(), NORMAL),
            _ if id == 0 => (b"<s>".to_vec(), CONTROL),
            _ => (format!("[PAD{id}]").into_bytes(), UNUSED),
        };
        tokens.push(token);
        types.push(kind);
    }
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut metadata = vec![
        (key("model"), Value::String(b"rwkv".to_vec())),
        (key("bos_token_id"), Value::U32(0)),
        (key("eos_token_id"), Value::U32(0)),
    ];
    // As llama.cpp's converter has it: a blank line ends a turn.
    if let Some(id) = literals.iter().position(|literal| literal == br"\n\n") {
        metadata.push((key("eot_token_id"), Value::U32(id as u32)));
    }
    metadata.push((key("tokens"), Value::Array(Array::String(tokens))));
    metadata.push((key("token_type"), Value::Array(Array::I32(types))));
    Ok(metadata)
}
