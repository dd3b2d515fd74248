//! Memory for weights, which is read from end to end for every token.
//!
//! Where a processor looks up addresses in pages of 4 KB, that alone takes it a sixth of its time. So matrices stand side by side
//! in chunks (most are smaller than a huge page), and the operating system is asked for huge pages there; Linux gives them where
//! `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use half::{bf16, f16};
use memmap2::MmapMut;

/// Bytes that are asked for at once. What is not used of them yet takes no memory.
const CHUNK: usize = 64 << 20;
/// Where values begin: a line of the cache.
const LINE: usize = 64;

/// What zeroed memory holds values of.
///
/// # Safety
/// Any bytes are a value, and no alignment is larger than a [`LINE`].
pub unsafe trait Plain: Copy {}

// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for f16 {}
// SAFETY: as above.
unsafe impl Plain for bf16 {}

/// Gives back what the allocator keeps of memory that was freed: after a model was loaded, some ten megabytes that nothing else
/// will need.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: as the C library declares it; it may be called at any time.
        unsafe extern "C" {
            safe fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        malloc_trim(0);
    }
}

/// Values in such memory.
#[derive(Debug)]
pub struct Pages<T> {
    values: NonNull<T>,
    len: usize,
    /// Keeps the memory.
    _chunk: Arc<Chunk>,
}

/// Memory of the operating system's.
#[derive(Debug)]
struct Chunk {
    /// Never touched but through the parts that were given out.
    map: MmapMut,
}

/// The chunk that has room, as long as somebody uses it, and how much of it is given out.
static OPEN: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));

// SAFETY: the values are this one's alone, like a vector's.
unsafe impl<T: Send> Send for Pages<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pages<T> {}

impl<T: Plain> Pages<T> {
    /// So many values, all of them zero.
    ///
    /// # Panics
    /// If there are more than memory has addresses; like a vector, it ends the process where there is no memory.
    pub fn zeroed(len: usize) -> Self {
        let layout = Layout::array::<T>(len).expect("memory has addresses for it");
        let size = layout.size().next_multiple_of(LINE);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let room = |chunk: &Arc<Chunk>| chunk.map.len() - open.1 >= size;
        let (chunk, at) = match open.0.upgrade().filter(room) {
            Some(chunk) => (chunk, open.1),
            None => {
                let chunk = Chunk::map(layout, size.max(CHUNK));
                chunk.ask_for_huge_pages();
                (chunk, 0)
            }
        };
        *open = (Arc::downgrade(&chunk), at + size);
        Self::within(chunk, at, len)
    }

    /// The same beside nothing else, in small pages: a page that is never written takes no memory, which an allocator does not
    /// promise of what it zeroes.
    ///
    /// # Panics
    /// As above.
    pub fn untouched(len: usize) -> Self {
        let layout = Layout::array::<T>(len).expect("memory has addresses for it");
        Self::within(Chunk::map(layout, layout.size().max(LINE)), 0, len)
    }

    fn within(chunk: Arc<Chunk>, at: usize, len: usize) -> Self {
        let start = chunk.map.as_ptr().cast_mut();
        // SAFETY: inside the map, which begins at a page.
        let values = unsafe { NonNull::new_unchecked(start.add(at).cast()) };
        Self { values, len, _chunk: chunk }
    }
}

impl Chunk {
    /// So many bytes, for values of this layout.
    fn map(layout: Layout, size: usize) -> Arc<Self> {
        let map = MmapMut::map_anon(size).unwrap_or_else(|_| handle_alloc_error(layout));
        Arc::new(Self { map })
    }

    fn ask_for_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        if let Err(why) = self.map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%why, "weights stand in small pages");
        }
    }
}

impl<T> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: so many values, zeroed at first, which were given to this one alone; the chunk keeps them mapped.
        unsafe { std::slice::from_raw_parts(self.values.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.values.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeroed_aligned_and_apart() {
        let sizes = [1, 0, 63, 64, 65, 5000, CHUNK + 1, 7, CHUNK / 2, CHUNK / 2, 3];
        let mut all: Vec<Pages<u8>> = sizes.map(Pages::zeroed).into();
        for (n, pages) in all.iter_mut().enumerate() {
            assert_eq!(pages.len(), sizes[n]);
            assert_eq!(pages.as_ptr().align_offset(LINE), 0);
            assert!(pages.iter().all(|&byte| byte == 0));
            pages.fill(n as u8 + 1);
        }
        for (n, pages) in all.iter().enumerate() {
            assert!(pages.iter().all(|&byte| byte == n as u8 + 1), "part {n}");
        }
        // Memory that others gave back is not given out again as it was.
        drop(all);
        assert!(Pages::<f32>::zeroed(2 * CHUNK / size_of::<f32>()).iter().all(|&value| value == 0.0));
    }

    #[test]
    fn pages_that_nobody_wrote_are_zero() {
        let mut sparse = Pages::<f32>::untouched(1 << 20);
        sparse[12_345] = 1.0;
        assert_eq!((sparse.len(), sparse.iter().sum::<f32>()), (1 << 20, 1.0));
        assert!(Pages::<u8>::untouched(0).is_empty());
    }

    #[test]
    fn what_is_kept_outlives_what_stood_beside_it() {
        let mut kept = Pages::zeroed(100);
        kept.fill(0.5f32);
        drop((0..100).map(Pages::<f16>::zeroed).collect::<Vec<_>>());
        std::thread::spawn(move || assert_eq!(*kept, [0.5; 100])).join().expect("it does not panic");
    }
}
