//! DeepEmbed: layers whose weights are looked up by token id.

use super::{Shared, Weight, kernel, parallel};

/// `x [N, W]` *= the rows of `table [V, W]` that `ids [N]` name.
pub fn multiply_by_rows(x: &mut [f32], ids: &[u32], table: &Weight) {
    let (len, width) = (x.len(), x.len() / ids.len());
    let shared = Shared::new(x);
    parallel(ids.len(), 4 * len, |token| {
        let mut row = vec![0f32; width];
        table.row(ids[token] as usize, &mut row);
        // SAFETY: one task for each row.
        super::multiply(unsafe { shared.part(token * width, width) }, &row);
    });
}

/// `out [N, Q]` = `x [N, P]`, each token's times the matrix `[P, Q]` that `table [V, P Q]` has for its id.
pub fn multiply_by_matrices(x: &[f32], ids: &[u32], table: &Weight, out: &mut [f32]) {
    let (rows, columns) = (x.len() / ids.len(), out.len() / ids.len());
    let shared = Shared::new(out);
    parallel(ids.len(), 2 * x.len() * columns, |token| {
        let mut matrix = vec![0f32; rows * columns];
        table.row(ids[token] as usize, &mut matrix);
        // SAFETY: one task for each row.
        multiply_by_matrix(&x[token * rows..][..rows], &matrix, unsafe { shared.part(token * columns, columns) });
    });
}

kernel! {
    fn multiply_by_matrix(x: &[f32], matrix: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for (x, row) in x.iter().zip(matrix.chunks_exact(out.len())) {
            for (out, weight) in out.iter_mut().zip(row) {
                *out = A::fma(*x, *weight, *out);
            }
        }
    }
}
