//! v7b and the v8 hybrid, whose state grows with the text, where their golden vectors do not reach: texts of several
//! stretches, the end of a context, states that are not theirs, tables of other shapes.

use candle_core::{DType, Device, Tensor};
use rewake::model::{Error, Model};
use rewake::types::{Row, SeqId, SlotId, Want};

use super::early::run;
use super::naive::{Naive, add, assert_close, attention, dot};
use super::vectors::{Case, case};
use super::{bits, flat, models, read};

const CASES: [&str; 2] = ["v7b_bf16", "v8_rc00_hybrid_bf16"];

/// The case's model, of which only the attention over the text of the first layer says anything.
fn only_first_attention(case: &Case) -> Naive {
    let mut naive = Naive::of(case);
    naive.silence(&["att.output.weight", "ffn.value.weight", "blocks.1.qkv.lnv.weight", "blocks.1.qkv.lnv.bias"]);
    naive
}

/// The whole of that model, by the formulas.
fn naive_logits(naive: &Naive, case: &Case, tokens: &[u32]) -> Vec<Vec<f64>> {
    let c = case.json["n_embd"].as_u64().expect("n_embd") as usize;
    let v7b = case.json["version"] == "v7b";
    let qkv = |name: &str| format!("blocks.0.qkv.{name}");
    // Each token id's part, once.
    let vocabulary = case.json["vocab_size"].as_u64().expect("vocab_size") as u32;
    let embedded = |id: u32| {
        let raw = naive.row("emb.weight", id, c);
        if v7b { naive.norm("blocks.0.ln0", &raw) } else { raw }
    };
    let parts = |id: u32| {
        let x = embedded(id);
        if v7b {
            let own = |name: &str, width| {
                let table = naive.row(&qkv(&format!("{name}.weight")), id, width);
                add(&table, &naive.linear(&qkv(&format!("{name}_x.weight")), &x))
            };
            let k = naive.factor(&qkv("k2"), &naive.factor(&qkv("k1"), &x));
            let v = naive.factor(&qkv("v2"), &naive.factor(&qkv("v1"), &x));
            (k, own("k_emb", 256), v, own("v_emb", c), x)
        } else {
            let own = |name: &str, width| naive.row(&qkv(&format!("{name}.weight")), id, width);
            let k = naive.linear(&qkv("kkup.weight"), &naive.linear(&qkv("kk.weight"), &x));
            let v = naive.linear(&qkv("vvup.weight"), &naive.linear(&qkv("vv.weight"), &x));
            (k, own("ennk", 256), v, own("emm", c), x)
        }
    };
    let by_id: Vec<[Vec<f64>; 4]> = (0..vocabulary)
        .map(parts)
        .map(|(k, k_own, v, v_own, x)| {
            let q = naive.linear(&qkv("qq.weight"), &x);
            let k = k.iter().zip(k_own).map(|(k, own)| k * own).collect();
            let v = v.iter().zip(v_own).map(|(v, own)| v.tanh() * own).collect();
            [q, k, v, x]
        })
        .collect();
    let side = |n: usize, norm: &str, mix: &str| -> Vec<Vec<f64>> {
        let width = by_id[0][n].len();
        let mix = if v7b { naive.values(&qkv(mix)) } else { vec![0.0; width] };
        let mut before = vec![0.0; width];
        let shift = |&id: &u32| {
            let now = &by_id[id as usize][n];
            let mixed: Vec<f64> = now.iter().zip(&before).zip(&mix).map(|((x, b), m)| x + (b - x) * m).collect();
            before.clone_from(now);
            naive.norm(&qkv(norm), &mixed)
        };
        tokens.iter().map(shift).collect()
    };
    let (q, k, v) = (side(0, "lnq", "x_q"), side(1, "lnk", "x_k"), side(2, "lnv", "x_v"));
    let cap = if v7b { 64.0 } else { 32.0 };
    let means = attention(&v, |t, u| cap * (dot(&q[t], &k[u]) / (16.0 * cap)).tanh());
    let head = naive.values("head.weight");
    let logits = |(id, mean): (&u32, &Vec<f64>)| {
        let x = naive.norm("ln_out", &add(&by_id[*id as usize][3], mean));
        head.chunks(c).map(|row| dot(row, &x)).collect()
    };
    tokens.iter().zip(&means).map(logits).collect()
}

/// Tokens of several stretches, in an order of their own.
fn long(case: &Case, count: usize) -> Vec<u32> {
    let vocabulary = case.json["vocab_size"].as_u64().expect("vocab_size") as usize;
    (0..count).map(|i| ((i * i * 31 + i * 7) % vocabulary) as u32).collect()
}

#[test]
fn a_long_text_is_read_as_the_formula_says() {
    for name in CASES {
        let case = case(name);
        let naive = only_first_attention(&case);
        let tokens = long(&case, 530);
        let (got, _) = run(&mut naive.model().expect("a model"), &tokens, 100);
        assert_close(&got, &naive_logits(&naive, &case, &tokens), name);
    }
}

#[test]
fn a_long_text_may_be_cut_anywhere() {
    for name in CASES {
        let case = case(name);
        let (_, mut model) = models(&case).remove(0);
        let tokens = long(&case, 530);
        let whole = run(&mut model, &tokens, tokens.len());
        for chunk in [1, 100, 255, 256, 257] {
            let cut = run(&mut model, &tokens, chunk);
            assert!(bits(&cut.0) == bits(&whole.0) && flat(&cut.1) == flat(&whole.1), "{name} in chunks of {chunk}");
        }
    }
}

fn step_at(model: &mut Model, pool: &mut rewake::model::Pool, at: u64) -> Result<(), Error> {
    let row = Row { seq: SeqId(0), from: SlotId(0), into: SlotId(0), at, tokens: 0..1, want: Want::Last };
    model.step(pool, &[1], &[row], &mut Vec::new())
}

#[test]
fn what_grows_has_an_end() {
    for name in CASES {
        let (_, mut model) = models(&case(name)).remove(0);
        assert_eq!(model.description().context, Some(1 << 16), "{name}");
        let mut pool = model.pool(1).expect("a pool");
        pool.reset(SlotId(0));
        assert!(matches!(step_at(&mut model, &mut pool, 1 << 16), Err(Error::Context { .. })), "{name}");
        // A position that is not where the state ends would read another text.
        assert!(matches!(step_at(&mut model, &mut pool, 5), Err(Error::State(..))), "{name}");
        step_at(&mut model, &mut pool, 0).expect("a first token");
    }
    for name in ["v7a_bf16", "v8_rc00_bf16"] {
        let (_, model) = models(&case(name)).remove(0);
        assert_eq!(model.description().context, None, "{name}: its state is of constant size");
    }
}

#[test]
fn a_text_with_a_token_that_does_not_exist_is_refused() {
    for name in CASES {
        let case = case(name);
        let (_, mut model) = models(&case).remove(0);
        let mut pool = model.pool(1).expect("a pool");
        pool.reset(SlotId(0));
        read(&mut model, &mut pool, &case.tokens[..3], 0, 0, 0);
        let good = pool.snapshot(SlotId(0));
        for id in [300.0, -1.0, f32::NAN, f32::INFINITY] {
            let mut bad = good.clone();
            let text = bad.iter_mut().find(|s| s.name == "blocks.1.qkv.text").expect("a text");
            assert_eq!(text.shape, [3, 65]);
            text.data[65] = id;
            pool.restore(SlotId(0), &bad).expect("the shape is right");
            assert!(matches!(step_at(&mut model, &mut pool, 3), Err(Error::State(..))), "{name}: {id}");
        }
        pool.restore(SlotId(0), &good).expect("its own");
        step_at(&mut model, &mut pool, 3).expect("what is good goes on");
    }
}

#[test]
fn tables_and_layers_of_other_shapes_are_named() {
    let wrong: [(&str, &str, &[usize]); 9] = [
        ("v7a_bf16", "ffn.s_emb.weight", &[160, 1023]),
        ("v7a_bf16", "ffn.s_emb_x.weight", &[1024, 63]),
        ("v7a_bf16", "ffn.s0", &[255]),
        ("v7a_bf16", "ffn.s2", &[31, 256]),
        ("v7b_bf16", "qkv.k_emb.weight", &[159, 256]),
        ("v7b_bf16", "qkv.x_v", &[256]),
        ("v8_rc00_bf16", "ffn.enn.weight", &[200, 63]),
        ("v8_rc00_hybrid_bf16", "qkv.kkup.weight", &[256, 33]),
        ("v8_rc00_hybrid_bf16", "qkv.lnv.bias", &[256]),
    ];
    for (name, tensor, shape) in wrong {
        let mut naive = Naive::of(&case(name));
        let tensor = format!("blocks.0.{tensor}");
        let other = Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("a tensor");
        assert!(naive.0.insert(tensor.clone(), other).is_some(), "{name} has {tensor}");
        let refused = naive.model().map(|_| ()).expect_err("a contradiction");
        // What does not fit is seen in the one or the other of two tensors.
        let named = if tensor.ends_with("s2") { "blocks.0.ffn.s_emb.weight" } else { &tensor };
        assert!(matches!(&refused, Error::Shape { name, .. } if name == named), "{name} {tensor}: {refused}");
    }
}

#[test]
fn a_hybrid_with_a_norm_that_the_original_code_ignores_is_the_same() {
    let case = case("v8_rc00_hybrid_bf16");
    let mut naive = Naive::of(&case);
    for part in ["weight", "bias"] {
        let other = naive.0[&format!("blocks.0.ln1.{part}")].clone();
        naive.0.insert(format!("blocks.0.ln0.{part}"), other);
    }
    let (_, mut plain) = models(&case).remove(0);
    let want = run(&mut plain, &case.tokens, 100).0;
    assert!(bits(&run(&mut naive.model().expect("a model"), &case.tokens, 100).0) == bits(&want));
}
