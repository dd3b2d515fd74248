//! Which generations there are, and how a checkpoint becomes a model.

use super::block::{Description, Mixer, Model};
use super::weights::{Checkpoint, Loader};
use super::{Error, v7};
use crate::types::{Segment, SegmentData};

/// A generation: how its files are recognised and how the two mixers of a layer are made. Everything else is shared.
pub struct Generation {
    pub name: &'static str,
    /// By tensor names alone.
    pub detect: fn(&Checkpoint) -> bool,
    #[allow(clippy::type_complexity)]
    pub mixers: fn(&Loader, usize, &Sizes) -> Result<(Box<dyn Mixer>, Box<dyn Mixer>), Error>,
    /// The segment that a state-tuned `blocks.N.att.time_state` of layer N replaces.
    pub time_state: Option<fn(usize) -> String>,
}

/// Every known generation.
const GENERATIONS: &[Generation] = &[v7::GENERATION];

/// Sizes that every generation has.
pub struct Sizes {
    pub layers: usize,
    pub width: usize,
    pub vocabulary: usize,
}

impl Sizes {
    fn of(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let Some(&[vocabulary, width]) = checkpoint.shape("emb.weight") else {
            return Err(Error::Unknown("it has no matrix `emb.weight` of vocabulary × width".into()));
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
    let sizes = Sizes::of(checkpoint)?;
    let generation = GENERATIONS.iter().find(|g| (g.detect)(checkpoint)).ok_or_else(|| {
        let known: Vec<_> = GENERATIONS.iter().map(|g| g.name).collect();
        Error::Unknown(format!("its tensor names are of no known generation ({})", known.join(", ")))
    })?;
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
    };
    let mut model = Model::new(&loader, description, &|loader, layer| (generation.mixers)(loader, layer, &sizes))?;
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
        let Some(Segment::Fixed { shape, .. }) =
            model.segments().iter().find(|Segment::Fixed { name: n, .. }| *n == name)
        else {
            return Err(Error::State(name, "no such segment".into()));
        };
        Ok(SegmentData { data: loader.values(&stored(layer), shape)?, shape: shape.clone(), name })
    };
    (0..layers).map(read).collect()
}
