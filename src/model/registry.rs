//! Which generations there are, and how a checkpoint becomes a model.

use super::block::{Description, Head, LinearHead, Mixer, Model, Residual};
use super::weights::{Checkpoint, Loader};
use super::{Error, v1, v2, v3, v4, v5, v6, v7};
use crate::types::{Segment, SegmentData};

/// A generation: how its files are recognised and how the two mixers of a layer are made. Everything else is shared.
pub struct Generation {
    pub name: &'static str,
    /// By the names of tensors, and by shapes where generations share all names. No file is of two generations.
    pub detect: fn(&Checkpoint) -> bool,
    #[allow(clippy::type_complexity)]
    pub mixers: fn(&Loader, usize, &Sizes) -> Result<(Box<dyn Mixer>, Box<dyn Mixer>), Error>,
    /// Makes the head.
    pub head: fn(&Loader, &Sizes) -> Result<Box<dyn Head>, Error>,
    /// Name of the embedding table.
    pub embedding: &'static str,
    /// Whether there is a norm `blocks.0.ln0` behind it.
    pub ln0: bool,
    pub residual: Residual,
    /// The segment that a state-tuned `blocks.N.att.time_state` of layer N replaces.
    pub time_state: Option<fn(usize) -> String>,
    /// Whether the segment is `[H, K, V]`: the stored tensor is always `[H, V, K]`.
    pub transpose_time_state: bool,
}

/// What generations have in common, to be completed with `..BASE`.
pub const BASE: Generation = Generation {
    name: "",
    detect: |_| false,
    mixers: |_, _, _| Err(Error::Unknown(String::new())),
    head: LinearHead::load,
    embedding: "emb.weight",
    ln0: true,
    residual: Residual::Plain,
    time_state: None,
    transpose_time_state: false,
};

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
];

/// Sizes that every generation has.
pub struct Sizes {
    pub layers: usize,
    pub width: usize,
    pub vocabulary: usize,
}

impl Sizes {
    fn of(checkpoint: &Checkpoint, generation: &Generation) -> Result<Self, Error> {
        let name = generation.embedding;
        let Some(&[vocabulary, width]) = checkpoint.shape(name) else {
            return Err(Error::Unknown(format!("it has no matrix `{name}` of vocabulary × width")));
        };
        let number = |name: &String| name.strip_prefix("blocks.")?.split_once('.')?.0.parse::<usize>().ok();
        let layers = checkpoint.tensors().keys().filter_map(number).max().map_or(0, |last| last + 1);
        if vocabulary == 0 || width == 0 || layers == 0 || layers > checkpoint.tensors().len() {
            return Err(Error::Unknown(format!("{layers} layers, width {width}, vocabulary {vocabulary}")));
        }
        Ok(Self { layers, width, vocabulary })
    }
}

/// What may be added to a checkpoint as it is loaded.
pub struct LoadOptions<'a> {
    /// A state-tuned file whose `blocks.N.att.time_state` every fresh sequence starts from.
    pub initial_state: Option<&'a Checkpoint>,
    /// Called with (tensors loaded, tensors in all).
    pub progress: &'a dyn Fn(usize, usize),
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self { initial_state: None, progress: &|_, _| {} }
    }
}

/// Makes a model of a checkpoint: the generation by tensor names, sizes by shapes.
///
/// # Errors
/// Names the tensor that is missing, misshapen, not finite or not expected.
pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Model, Error> {
    let generation = GENERATIONS.iter().find(|g| (g.detect)(checkpoint)).ok_or_else(|| {
        let known: Vec<_> = GENERATIONS.iter().map(|g| g.name).collect();
        Error::Unknown(format!("its tensor names are of no known generation ({})", known.join(", ")))
    })?;
    let sizes = Sizes::of(checkpoint, generation)?;
    let loader = Loader::new(checkpoint, generation.name, options.progress);
    let description = Description {
        generation: generation.name,
        layers: sizes.layers,
        width: sizes.width,
        vocabulary: sizes.vocabulary,
        parameters: checkpoint.parameters(),
        fingerprint: checkpoint.fingerprint()?,
        arithmetic: "",
        state_bytes: 0,
        context: None,
    };
    let mut model = Model::new(&loader, generation, &sizes, description)?;
    let mut initial = time_states(&loader, generation, &model)?;
    loader.finish()?;
    if let Some(file) = options.initial_state {
        let loader = Loader::new(file, generation.name, &|_, _| {});
        initial = time_states(&loader, generation, &model)?;
        loader.finish()?;
    }
    model.set_initial(initial);
    Ok(model)
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
