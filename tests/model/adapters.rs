//! What is added to a checkpoint: initial states of single sequences.

use rewake::model::{Checkpoint, Error, LoadOptions, load};
use rewake::types::SlotId;

use super::vectors::case;
use super::{bits, flat, read};

#[test]
fn an_initial_state_that_is_restored_is_the_one_a_model_is_loaded_with() {
    let case = case("v7_state_bf16");
    let open = |name: &str| Checkpoint::open(&case.folder.join(name)).expect("a checkpoint");
    let (base, file) = (open("model.safetensors"), open("state.safetensors"));
    let options = LoadOptions { initial_state: Some(&file), ..LoadOptions::default() };
    let mut plain = load(&base, &LoadOptions::default()).expect("a model");
    let mut tuned = load(&base, &options).expect("a model");

    let state = plain.initial_state(&file).expect("it fits");
    assert_eq!(flat(&state), flat(&tuned.fresh().expect("memory")));
    assert_ne!(flat(&state), flat(&plain.fresh().expect("memory")));
    assert_eq!(flat(&tuned.initial_state(&file).expect("it fits")), flat(&state), "the model's own does not matter");

    let (mut left, mut right) = (plain.pool(2).expect("a pool"), tuned.pool(1).expect("a pool"));
    left.restore(SlotId(1), &state).expect("a whole state");
    right.reset(SlotId(0));
    let a = read(&mut plain, &mut left, &case.tokens, 0, 1, 1);
    let b = read(&mut tuned, &mut right, &case.tokens, 0, 0, 0);
    assert!(bits(&a) == bits(&b));
    assert_eq!(flat(&left.snapshot(SlotId(1))), flat(&right.snapshot(SlotId(0))));
    let worst = a.iter().flatten().zip(case.logits.iter().flatten()).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
    assert!(worst <= 1e-4 * case.rms(), "and what the original code says: {worst}");

    // A model is no state-tuned file: that is said, rather than that its tensors are none of the model's.
    let error = plain.initial_state(&base).expect_err("it has no state");
    assert!(matches!(&error, Error::Missing { name, .. } if name == "blocks.0.att.time_state"), "{error}");
}
