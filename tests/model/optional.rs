//! Parts that some files of v1 and v4 have and no golden vector does: v1's tiny attention, v4's copy head, an attention of
//! v4 that is wider than the model.

use candle_core::Tensor;
use rewake::types::{Row, SeqId, SlotId, Want};

use super::early::run;
use super::naive::{Naive, add, assert_close, attention, dot, noise};
use super::vectors::{Case, case};
use super::{bits, flat, models};

/// v1 with tiny attention in each layer. Nothing else says anything: neither attention nor channel mix nor copy head.
fn tiny(case: &Case, size: usize) -> Naive {
    let mut naive = Naive::of(case);
    naive.silence(&[".attn.output.weight", ".attn.output.bias", ".mlp.weight.weight", ".mlp.weight.bias"]);
    naive.silence(&["head_q.weight", "head_q.bias"]);
    let c = case.json["n_embd"].as_u64().expect("n_embd") as usize;
    for layer in 0..case.json["n_layer"].as_u64().expect("n_layer") as usize {
        let parts = [
            ("qkv.weight", vec![3 * size, c], 0.6),
            ("qkv.bias", vec![3 * size], 0.5),
            ("out.weight", vec![c, size], 0.4),
            ("out.bias", vec![c], 0.2),
        ];
        for (n, (part, shape, scale)) in parts.into_iter().enumerate() {
            let name = format!("blocks.{layer}.attn.tiny_att.{part}");
            naive.0.insert(name, noise(&shape, 10 * layer + n, scale));
        }
    }
    naive
}

/// The whole of that model by the formulas of `RWKV_TinyAttn` and of the model around it.
fn naive_tiny(naive: &Naive, case: &Case, size: usize) -> Vec<Vec<f64>> {
    let number = |key: &str| case.json[key].as_u64().expect("a number") as usize;
    let (c, layers) = (number("n_embd"), number("n_layer"));
    let mut x: Vec<_> = case.tokens.iter().map(|&id| naive.row("tok_emb.weight", id, c)).collect();
    for layer in 0..layers {
        let attn = |name: &str| format!("blocks.{layer}.attn.{name}");
        let normed: Vec<_> = x.iter().map(|x| naive.norm(&format!("blocks.{layer}.ln1"), x)).collect();
        let shifted = |t: usize| -> Vec<f64> {
            let before = if t == 0 { vec![0.0; c] } else { normed[t - 1].clone() };
            [&before[..c / 2], &normed[t][c / 2..]].concat()
        };
        let qkv = |t: usize| {
            let product = naive.linear(&attn("tiny_att.qkv.weight"), &shifted(t));
            add(&product, &naive.values(&attn("tiny_att.qkv.bias")))
        };
        let qkv: Vec<_> = (0..x.len()).map(qkv).collect();
        let values: Vec<_> = qkv.iter().map(|qkv| qkv[2 * size..].to_vec()).collect();
        let score = |t: usize, u: usize| dot(&qkv[t][..size], &qkv[u][size..2 * size]) / (size as f64).sqrt();
        let gamma = naive.values(&attn("time_gamma"));
        for (t, mean) in attention(&values, score).into_iter().enumerate() {
            let product = naive.linear(&attn("tiny_att.out.weight"), &mean);
            let out = add(&product, &naive.values(&attn("tiny_att.out.bias")));
            x[t] = add(&x[t], &out.iter().map(|v| v * gamma[t]).collect::<Vec<_>>());
        }
    }
    let time_out = naive.values("time_out");
    let logits = |(t, x): (usize, &Vec<f64>)| {
        let scaled: Vec<_> = naive.norm("ln_f", x).iter().map(|v| v * time_out[t]).collect();
        naive.linear("head.weight", &scaled)
    };
    x.iter().enumerate().map(logits).collect()
}

#[test]
fn the_tiny_attention_of_v1_is_that_of_its_formula() {
    const SIZE: usize = 12;
    let case = case("v1_fp32");
    let mut naive = tiny(&case, SIZE);
    let mask = Tensor::ones((128, 128), candle_core::DType::F32, &candle_core::Device::Cpu).expect("a mask");
    naive.0.insert("blocks.0.attn.mask".into(), mask);
    let mut model = naive.model().expect("a model");
    assert_eq!(model.description().context, Some(128));
    let whole = run(&mut model, &case.tokens, case.tokens.len());
    assert_close(&whole.0, &naive_tiny(&naive, &case, SIZE), "tiny attention");
    for chunk in [1, 7] {
        let cut = run(&mut model, &case.tokens, chunk);
        assert!(bits(&cut.0) == bits(&whole.0) && flat(&cut.1) == flat(&whole.1), "in chunks of {chunk}");
    }
}

#[test]
fn rows_of_tiny_attention_do_not_feel_each_other() {
    let case = case("v1_fp32");
    let mut model = tiny(&case, 12).model().expect("a model");
    let (first, second) = (&case.tokens[..5], &case.tokens[20..29]);
    let alone = [run(&mut model, first, 100).0, run(&mut model, second, 100).0].concat();
    let mut pool = model.pool(2).expect("a pool");
    (0..2).for_each(|slot| pool.reset(SlotId(slot)));
    let row = |slot: u32, tokens| {
        let (seq, slot) = (SeqId(slot.into()), SlotId(slot));
        Row { seq, from: slot, into: slot, at: 0, tokens, want: Want::All }
    };
    let together = super::steps(&mut model, &mut pool, &[first, second].concat(), &[row(1, 0..5), row(0, 5..14)]);
    assert!(bits(&together) == bits(&alone));
}

#[test]
fn v4_with_a_copy_head_adds_its_scores() {
    const SIZE: usize = 24;
    let case = case("v4_bf16");
    let c = case.json["n_embd"].as_u64().expect("n_embd") as usize;
    let mut naive = Naive::of(&case);
    naive.0.insert("head_q.weight".into(), noise(&[SIZE, c], 1, 0.8));
    naive.0.insert("head_k.weight".into(), noise(&[SIZE, c], 2, 0.8));
    naive.0.insert("copy_mask".into(), noise(&[1024, 1024], 3, 1.0));
    let (got, state) = run(&mut naive.model().expect("a model"), &case.tokens, 100);
    // The keys are kept. With the queries' weights for keys, what is kept are the queries.
    let kept = |state: &[rewake::types::SegmentData]| -> Vec<Vec<f64>> {
        let entries = state.last().expect("the copy head's").data.chunks(SIZE + 1);
        entries.map(|entry| entry[..SIZE].iter().map(|&v| f64::from(v)).collect()).collect()
    };
    let keys = kept(&state);
    naive.0.insert("head_k.weight".into(), noise(&[SIZE, c], 1, 0.8));
    let queries = kept(&run(&mut naive.model().expect("a model"), &case.tokens, 100).1);

    let (_, mut without) = models(&case).remove(0);
    let plain = run(&mut without, &case.tokens, 100).0;
    let mut want: Vec<Vec<f64>> = plain.iter().map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect();
    for (t, logits) in want.iter_mut().enumerate() {
        for u in 0..=t {
            logits[case.tokens[u] as usize] += dot(&queries[t], &keys[u]) / SIZE as f64;
        }
    }
    assert_close(&got, &want, "v4 with a copy head");
    assert!(got != plain, "the copy head matters");
}

#[test]
fn attention_of_v4_may_be_wider_than_the_model() {
    const MORE: usize = 40;
    let case = case("v4_bf16");
    let c = case.json["n_embd"].as_u64().expect("n_embd") as usize;
    let mut naive = Naive::of(&case);
    let names: Vec<_> = naive.0.keys().filter(|name| name.contains(".att.")).cloned().collect();
    // More channels, which say nothing: channels do not feel each other.
    for (n, name) in names.into_iter().enumerate() {
        let tensor = &naive.0[&name];
        let more = |shape: &[usize]| noise(shape, n, 1.0).to_dtype(tensor.dtype()).expect("values");
        let wider = match name.rsplit('.').nth(1).expect("a part") {
            "output" => Tensor::cat(&[tensor, &more(&[c, MORE]).zeros_like().expect("zeros")], 1),
            "receptance" | "key" | "value" => Tensor::cat(&[tensor, &more(&[MORE, c])], 0),
            _ if name.ends_with("time_decay") || name.ends_with("time_first") => {
                Tensor::cat(&[tensor, &more(&[MORE])], 0)
            }
            _ => continue,
        };
        naive.0.insert(name, wider.expect("a wider tensor"));
    }
    let (_, mut narrow) = models(&case).remove(0);
    let mut wide = naive.model().expect("a model");
    assert!(wide.description().state_bytes > narrow.description().state_bytes);
    for chunk in [1, 100] {
        let [want, got] = [&mut narrow, &mut wide].map(|model| bits(&run(model, &case.tokens, chunk).0));
        assert!(got == want, "in chunks of {chunk}");
    }
}
