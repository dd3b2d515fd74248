//! Sound files, and the same files cut off and with single bytes changed.

use super::seeds::{checkpoints, converted, small};
use super::{readers, seeds, snapshots, survived, within};
use rewake::model::{Format, Kind};

/// A file cut off at so many places, then with a byte changed at so many, evenly spread and more of them near the front,
/// where headers are.
pub fn harmed(file: &[u8], cuts: usize, changes: usize) -> impl Iterator<Item = (String, Vec<u8>)> {
    let place = move |n: usize, of: usize| (file.len() - 1) * n * n / (of * of).max(1);
    let cut = (0..cuts).map(move |n| place(n, cuts)).map(|at| (format!("cut off at {at}"), file[..at].to_vec()));
    let changed = (0..changes).flat_map(move |n| {
        let at = place(n, changes);
        [0, 0xff, file[at] ^ 1, file[at] ^ 0x80, file[at].wrapping_add(1)].map(|byte| {
            let mut changed = file.to_vec();
            changed[at] = byte;
            (format!("byte {at} changed to {byte:#04x}"), changed)
        })
    });
    cut.chain(changed)
}

#[test]
fn sound_files_are_read() {
    for (name, file) in checkpoints() {
        survived(&name, &file).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let quantised = converted(&small("v7_bf16", 4), Format::Gguf, Some(Kind::Q8_0));
    survived("quantised", &quantised).expect("a sound file");
    within("a snapshot", 0, 0, || readers::snapshot(&snapshots::sound())).expect("a sound file");
}

#[test]
fn checkpoints_with_a_byte_changed_are_read_or_refused() {
    for (name, file) in checkpoints() {
        for (harm, file) in harmed(&file, 20, 60) {
            let _ = survived(&format!("{name}, {harm}"), &file);
        }
    }
}

#[test]
fn other_files_with_a_byte_changed_are_read_or_refused() {
    for snapshot in [vec![snapshots::sound()], snapshots::stored()].concat() {
        for (harm, file) in harmed(&snapshot, 40, 150) {
            let _ = within(&harm, file.len(), 64, || readers::snapshot(&file));
            let file = snapshots::sealed(file);
            let _ = within(&harm, file.len(), 64, || readers::snapshot(&file));
        }
    }
    let tokenizer = std::fs::read(seeds::data("formats/hf_v4/tokenizer.json")).expect("a tokenizer");
    for (harm, file) in harmed(&tokenizer, 20, 60) {
        let _ = within(&harm, file.len(), 200, || readers::tokenizer(&file));
    }
    let vocabulary: String = (0..256).map(|b| format!("{} b'\\x{b:02x}' 1\n", b + 1)).collect();
    for (harm, file) in harmed(vocabulary.as_bytes(), 20, 200) {
        let _ = within(&harm, file.len(), 300, || readers::vocabulary(&file));
    }
}

/// Writes a corpus for every target of `tests/fuzz`, and the model that the target `adapter` needs.
#[test]
#[ignore = "writes files, for fuzzing"]
fn seeds_for_fuzzing() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let folder = corpus.join(target);
        std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(folder.join(name), bytes)).expect("a file");
    };
    let v7 = seeds::safetensors(&small("v7_bf16", 16));
    put("", "base.safetensors", &v7);
    for (name, file) in checkpoints() {
        put("checkpoint", &name, &file);
    }
    put("checkpoint", "quantised.gguf", &converted(&small("v7_bf16", 4), Format::Gguf, Some(Kind::Q8_0)));
    let pairs = [("blocks.0.att.key.lora_A", [2, 8]), ("blocks.0.att.key.lora_B", [8, 2])];
    let adapter = pairs.map(|(name, shape)| seeds::Tensor::f32(name, &shape, 0.5));
    put("adapter", "lora.safetensors", &seeds::safetensors(&adapter));
    let states: Vec<_> =
        (0..3).map(|layer| seeds::Tensor::f32(&format!("blocks.{layer}.att.time_state"), &[2, 4, 4], 0.5)).collect();
    put("adapter", "state.safetensors", &seeds::safetensors(&states));
    put("adapter", "state.pth", &converted(&states, Format::Pth, None));
    let tokenizer = std::fs::read(seeds::data("formats/hf_v4/tokenizer.json")).expect("a tokenizer");
    put("tokenizer", "byte_level.json", &tokenizer);
    let vocabulary: String = (0..256).map(|b| format!("{} b'\\x{b:02x}' 1\n", b + 1)).collect();
    put("vocabulary", "bytes.txt", vocabulary.as_bytes());
    put("snapshot", "sound", &snapshots::sound());
    for (n, stored) in snapshots::stored().iter().enumerate() {
        put("snapshot", &format!("stored-{n}"), stored);
    }
    put("import", "sound", &snapshots::state_of(&mut snapshots::model("v7_bf16")));
    let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/rewake.toml");
    put("config", "rewake.toml", &std::fs::read(config).expect("the documented file"));
}
