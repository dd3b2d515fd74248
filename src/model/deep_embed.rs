//! DeepEmbed tables: for every token id a vector that scales a layer, or a small matrix that is part of one.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, InplaceOp2, Layout, Tensor};

use super::Error;
use super::block::Sizes;
use super::kernels::{self, Kind, Weight};
use super::linear::{self, LayerNorm, Linear, Orientation, floats, floats_mut};
use super::weights::Loader;

/// A table `[V, W]`.
pub struct DeepEmbed(Weight<'static>);

impl DeepEmbed {
    /// Reads `{name}.weight [V, width]`, which stays in its stored type.
    pub fn load(loader: &Loader, name: &str, width: usize, sizes: &Sizes) -> Result<Self, Error> {
        Ok(Self(loader.table(&format!("{name}.weight"), (sizes.vocabulary, width), Weight::into_owned)?))
    }

    /// The same plus what `{name}_x.weight [width, C]` makes of the embedding of each token: `table + ln0(emb) · Xᵀ`, in
    /// f32, which for files of 16 bits is twice their size. It takes V · width · C multiply-adds at load; at each look-up it
    /// would take width · C of them for every token that attention looks back to.
    pub fn load_merged(loader: &Loader, name: &str, width: usize, sizes: &Sizes) -> Result<Self, Error> {
        /// Tokens that are merged at a time.
        const TOKENS: usize = 256;
        let c = sizes.width;
        let table = format!("{name}.weight");
        let own = loader.weight(&table, &[sizes.vocabulary, width])?;
        let embedding = loader.weight("emb.weight", &[sizes.vocabulary, c])?;
        let ln0 = LayerNorm::load(loader, "blocks.0.ln0", c)?;
        let x = Linear::load(loader, &format!("{name}_x.weight"), width, c, Orientation::OutIn)?;
        let mut bytes = Vec::with_capacity(4 * own.len());
        let (mut raw, mut merged, mut row) = (vec![0f32; c], vec![0f32; TOKENS * width], vec![0f32; width]);
        for first in (0..sizes.vocabulary).step_by(TOKENS) {
            let count = TOKENS.min(sizes.vocabulary - first);
            let merged = &mut merged[..count * width];
            let mut normed = vec![0f32; count * c];
            for (token, normed) in normed.chunks_exact_mut(c).enumerate() {
                embedding.row(first + token, &mut raw);
                ln0.rows(&raw, normed);
            }
            let normed = Tensor::from_vec(normed, (count, c), &Device::Cpu)?;
            let product = Tensor::zeros((count, width), DType::F32, &Device::Cpu)?;
            x.forward(&normed, &product)?;
            linear::read(&product, |product| merged.copy_from_slice(product))?;
            for (token, merged) in merged.chunks_exact_mut(width).enumerate() {
                own.row(first + token, &mut row);
                kernels::add(merged, &row);
            }
            bytes.extend(merged.iter().flat_map(|value| value.to_le_bytes()));
        }
        loader.served_as(own.bytes().len(), bytes.len());
        loader.release(&table);
        loader.release("emb.weight");
        let shape = [sizes.vocabulary, width];
        Ok(Self(Weight::new(Kind::F32, &shape, bytes).expect("every token has its row")))
    }

    /// `x [N, W]` *= the vectors of `ids [N]`.
    pub fn scale(&self, x: &Tensor, ids: &[u32]) -> Result<(), Error> {
        Ok(x.inplace_op1(&Lookup { table: &self.0, ids })?)
    }

    /// `out [N, Q]` = `x [N, P]` times the matrices `[P, Q]` of `ids [N]`.
    pub fn product(&self, x: &Tensor, ids: &[u32], out: &Tensor) -> Result<(), Error> {
        Ok(out.inplace_op2(x, &Lookup { table: &self.0, ids })?)
    }
}

struct Lookup<'a> {
    table: &'a Weight<'static>,
    ids: &'a [u32],
}

impl InplaceOp1 for Lookup<'_> {
    fn name(&self) -> &'static str {
        "deep embed"
    }
    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        kernels::multiply_by_rows(floats_mut(x, layout)?, self.ids, self.table);
        Ok(())
    }
}

impl InplaceOp2 for Lookup<'_> {
    fn name(&self) -> &'static str {
        "deep embed"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        kernels::multiply_by_matrices(floats(x, x_l)?, self.ids, self.table, floats_mut(out, out_l)?);
        Ok(())
    }
}
