//! Which generations there are, and how a checkpoint becomes a model.

use super::block::{Block, Description, Model, Parts, Sizes};
use super::generation::Generation;
use super::kernels::{Kind, Weight};
use super::linear::LayerNorm;
use super::weights::{Checkpoint, Loader};
use super::{Error, v1, v2, v3, v4, v5, v6, v7, v7a, v7b, v8};
use crate::types::{Segment, SegmentData};

/// Every known generation.
const GENERATIONS: &[Generation] = &[
    v1::GENERATION,
    v2::GENERATION,
    v3::GENERATION,
    v4::GENERATION,
    v5::V5_0,
    v5::V5_1,
    v5::V5_2,
    v6::GENERATION,
    v7::GENERATION,
    v7a::GENERATION,
    v7b::GENERATION,
    v8::RC00,
    v8::RC00_HYBRID,
];

/// What may be added to a checkpoint as it is loaded.
pub struct LoadOptions<'a> {
    /// A state-tuned file whose `blocks.N.att.time_state` every fresh sequence starts from.
    pub initial_state: Option<&'a Checkpoint>,
    /// What large matrices become as they are loaded, as a conversion to GGUF would make them: another model, with the
    /// fingerprint of that file. Everything else, small and sensitive, stays.
    pub quantise: Option<Kind>,
    /// Called with (bytes of weights loaded, bytes in all).
    pub progress: &'a dyn Fn(usize, usize),
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self { initial_state: None, quantise: None, progress: &|_, _| {} }
    }
}

/// Makes a model of a checkpoint: the generation by tensor names, sizes by shapes.
///
/// # Errors
/// Names the tensor that is missing, misshapen, not finite or not expected.
pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Model, Error> {
    let generation = generation(checkpoint)?;
    let sizes = Sizes::of(checkpoint, generation.embedding)?;
    let loader = Loader::new(checkpoint, generation.name, options.progress).quantising(options.quantise)?;
    let description = Description {
        generation: generation.name,
        layers: sizes.layers,
        width: sizes.width,
        vocabulary: sizes.vocabulary,
        parameters: checkpoint.parameters(),
        weight_bytes: 0,
        fingerprint: String::new(),
        arithmetic: "",
        state_bytes: 0,
        state_bytes_per_token: 0,
        context: None,
    };
    let mut model = Model::new(description, parts(&loader, generation, &sizes)?);
    let mut initial = time_states(&loader, generation, &model)?;
    let bytes = loader.bytes();
    let fingerprint = loader.finish()?;
    if let Some(file) = options.initial_state {
        initial = state_tuned(file, generation, &model)?;
    }
    model.complete(fingerprint, bytes, initial);
    Ok(model)
}

/// Holds that a checkpoint is a whole model and nothing else, as [`load`] would, layer by layer: it takes the memory of one.
///
/// # Errors
/// Names the tensor that is missing, misshapen, not finite or not expected.
pub fn check(checkpoint: &Checkpoint) -> Result<(), Error> {
    let generation = generation(checkpoint)?;
    let sizes = Sizes::of(checkpoint, generation.embedding)?;
    let loader = Loader::new(checkpoint, generation.name, &|_, _| {});
    loader.table(generation.embedding, (sizes.vocabulary, sizes.width), |_| ())?;
    input_norm(&loader, generation, &sizes)?;
    (0..sizes.layers).try_for_each(|layer| block(&loader, generation, &sizes, layer).map(drop))?;
    (generation.head)(&loader, &sizes)?;
    loader.finish().map(drop)
}

/// The generation of a checkpoint, by its tensors.
pub fn generation(checkpoint: &Checkpoint) -> Result<&'static Generation, Error> {
    GENERATIONS.iter().find(|g| (g.detect)(checkpoint)).ok_or_else(|| {
        let mut names = checkpoint.tensors().keys();
        if names.clone().all(|name| name.ends_with(".time_state")) {
            return Error::Unknown("it is a state-tuned file: name the model, and this with --state".into());
        }
        if names.any(|name| name.ends_with(".lora_A")) {
            return Error::Unknown("it is a LoRA adapter: name its base, and this with --lora".into());
        }
        let known: Vec<_> = GENERATIONS.iter().map(|g| g.name).collect();
        Error::Unknown(format!("its tensor names are of no known generation ({})", known.join(", ")))
    })
}

impl Model {
    /// The state of a fresh sequence that starts from a state-tuned `file` (`blocks.N.att.time_state` of every layer)
    /// instead of the model's own initial state: what [`LoadOptions::initial_state`] would make every sequence start from.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen, not finite or not expected.
    pub fn initial_state(&self, file: &Checkpoint) -> Result<Vec<SegmentData>, Error> {
        let name = self.description().generation;
        let generation =
            GENERATIONS.iter().find(|g| g.name == name).expect("every model is of a generation listed here");
        self.fresh_from(&state_tuned(file, generation, self)?)
    }
}

/// Reads a file that holds a state-tuned initial state and nothing else.
fn state_tuned(file: &Checkpoint, generation: &Generation, model: &Model) -> Result<Vec<SegmentData>, Error> {
    let loader = Loader::new(file, generation.name, &|_, _| {});
    let states = time_states(&loader, generation, model)?;
    if states.is_empty() && generation.time_state.is_some() {
        let (name, expected) = ("blocks.0.att.time_state".into(), "[H, N, N], as in every state-tuned file".into());
        return Err(Error::Missing { name, generation: generation.name, expected });
    }
    loader.finish()?;
    Ok(states)
}

/// Reads the skeleton's tensors, and through `generation` the mixers and the head.
fn parts(loader: &Loader, generation: &Generation, sizes: &Sizes) -> Result<Parts, Error> {
    Ok(Parts {
        embedding: loader.table(generation.embedding, (sizes.vocabulary, sizes.width), Weight::into_owned)?,
        ln0: input_norm(loader, generation, sizes)?,
        residual: generation.residual,
        blocks: (0..sizes.layers).map(|layer| block(loader, generation, sizes, layer)).collect::<Result<_, _>>()?,
        head: (generation.head)(loader, sizes)?,
    })
}

fn block(loader: &Loader, generation: &Generation, sizes: &Sizes, layer: usize) -> Result<Block, Error> {
    let (mixer1, mixer2) = (generation.mixers)(loader, layer, sizes)?;
    let norm = |name: &str| LayerNorm::load(loader, &format!("blocks.{layer}.{name}"), sizes.width);
    Ok(Block { ln1: norm("ln1")?, mixer1, ln2: norm("ln2")?, mixer2 })
}

fn input_norm(loader: &Loader, generation: &Generation, sizes: &Sizes) -> Result<Option<LayerNorm>, Error> {
    generation.ln0.then(|| LayerNorm::load(loader, "blocks.0.ln0", sizes.width)).transpose()
}

/// Reads a state-tuned initial state, if there is one: of every layer or of none.
fn time_states(loader: &Loader, generation: &Generation, model: &Model) -> Result<Vec<SegmentData>, Error> {
    let stored = |layer| format!("blocks.{layer}.att.time_state");
    let layers = model.description().layers;
    let Some(segment) = generation.time_state.filter(|_| (0..layers).any(|l| loader.has(&stored(l)))) else {
        return Ok(Vec::new());
    };
    let read = |layer| {
        let name = segment(layer);
        let Some(Segment::Fixed { shape, .. }) = model.segments().iter().find(|s| s.name() == name) else {
            return Err(Error::State(name, "no such segment".into()));
        };
        let mut data = loader.values(&stored(layer), shape)?;
        if let (true, &[_, n, _]) = (generation.transpose_time_state, shape.as_slice()) {
            data.chunks_exact_mut(n * n).for_each(|head| transpose(head, n));
        }
        Ok(SegmentData { data, shape: shape.clone(), name })
    };
    (0..layers).map(read).collect()
}

/// Transposes a matrix `[N, N]` in place.
fn transpose(matrix: &mut [f32], n: usize) {
    for row in 0..n {
        for column in 0..row {
            matrix.swap(row * n + column, column * n + row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_of_exactly_one_generation() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
        let mut seen = std::collections::BTreeSet::new();
        for entry in std::fs::read_dir(folder).expect("the repository's cases") {
            let path = entry.expect("a folder entry").path().join("model.safetensors");
            if path.exists() {
                let checkpoint = Checkpoint::open(&path).expect("a checkpoint");
                let found: Vec<_> = GENERATIONS.iter().filter(|g| (g.detect)(&checkpoint)).map(|g| g.name).collect();
                assert_eq!(found.len(), 1, "{}: {found:?}", path.display());
                seen.extend(found);
            }
        }
        assert_eq!(seen, GENERATIONS.iter().map(|g| g.name).collect(), "every generation has a case");
    }
}
