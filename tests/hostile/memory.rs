//! An allocator that counts, so that a test can say how much memory reading a file took.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what each thread allocates: tests run beside each other, and readers allocate on the thread that calls them.
pub struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn grown(by: isize) {
    // A thread that ends has no counters any more, and is of no interest.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + by);
        PEAK.with(|peak| peak.set(peak.get().max(now.get())));
    });
}

// SAFETY: everything is done by the system's allocator; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        grown(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old place and the new one may be there at the same time.
        grown(size as isize);
        // SAFETY: the caller's promise.
        let moved = unsafe { System.realloc(at, layout, size) };
        grown(-(layout.size() as isize));
        moved
    }
}

/// Bytes that `f` held at most at one time, beyond what was there before.
pub fn peak<R>(f: impl FnOnce() -> R) -> (R, usize) {
    let before = NOW.get();
    PEAK.set(before);
    let result = f();
    (result, (PEAK.get() - before).max(0) as usize)
}
