//! The threads that compute: one of them drives a step, the others take tasks of it as long as there are any.
//!
//! A step is a few hundred short parallel passes, so the others look out for the next pass a little while before they
//! sleep: some microseconds, never longer. Tasks are many more than threads and taken one by one, and a pass ends when
//! its tasks are done, whoever did them: a thread whose processor is taken away holds up the one task it has, not the pass.
//! Each thread has a range of its own, so that it walks through memory in order and what is fetched ahead is its own; whoever
//! is done with that goes on with the others'.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle, Thread};

/// Looks at a flag before a thread sleeps; each takes some ten nanoseconds.
const LOOKS: u32 = 1500;

thread_local! {
    /// The team whose step this thread drives; null = none.
    static CURRENT: Cell<*const Board> = const { Cell::new(ptr::null()) };
}

/// A pass: a function of the number of a task.
type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// How many tasks of a range are left, on a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Left(AtomicUsize);

/// What all threads of a team see.
#[derive(Default)]
struct Board {
    /// Tasks of the pass that nobody has taken yet: a range for each thread, taken from its front.
    left: Vec<Left>,
    /// The pass's [`Task`] and how many of it there are. Whoever has taken a task may use them until that task is done.
    task: AtomicPtr<Task<'static>>,
    tasks: AtomicUsize,
    done: AtomicUsize,
    /// What a task of the pass panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Who drives the step, to be woken at the end of a pass.
    driver: Mutex<Option<Thread>>,
    workers: Mutex<Vec<Thread>>,
    sleeping: AtomicUsize,
    stop: AtomicBool,
}

/// Threads that compute together.
pub struct Team {
    board: Arc<Board>,
    workers: Vec<JoinHandle<()>>,
    /// One step at a time.
    turn: Mutex<()>,
}

impl Team {
    /// A team of `threads` threads, of which the one that drives a step is one; 0 = one for each processor.
    ///
    /// # Errors
    /// When the operating system gives no threads.
    pub fn new(threads: usize) -> io::Result<Self> {
        let threads = if threads == 0 { thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let left = (0..threads).map(|_| Left::default()).collect();
        let board = Arc::new(Board { left, ..Board::default() });
        let mut team = Self { board, workers: Vec::new(), turn: Mutex::new(()) };
        for n in 1..threads {
            let board = team.board.clone();
            let worker = thread::Builder::new().name(format!("compute {n}")).spawn(move || board.work(n))?;
            lock(&team.board.workers).push(worker.thread().clone());
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Runs `task` for every number below `tasks`: by the team, or by this thread while the team is at a step of somebody
    /// else's.
    pub fn share(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        match self.turn.try_lock() {
            Ok(turn) => self.take_turn(turn, || run(tasks, task)),
            Err(TryLockError::Poisoned(turn)) => self.take_turn(turn.into_inner(), || run(tasks, task)),
            Err(TryLockError::WouldBlock) => (0..tasks).for_each(task),
        }
    }

    /// Runs `step`, whose parallel passes are shared by the team. Steps of several models take turns.
    pub fn install<R>(&self, step: impl FnOnce() -> R) -> R {
        self.take_turn(lock(&self.turn), step)
    }

    fn take_turn<R>(&self, _turn: MutexGuard<'_, ()>, step: impl FnOnce() -> R) -> R {
        *lock(&self.board.driver) = Some(thread::current());
        let _current = Current::enter(&*self.board);
        step()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.board.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // What a task panicked with was raised where its pass was run.
            let _ = worker.join();
        }
    }
}

/// Says which team this thread's passes are for, until it is dropped.
struct Current(*const Board);

impl Current {
    fn enter(board: *const Board) -> Self {
        Self(CURRENT.replace(board))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Runs `task` for every number below `tasks`: by the team whose step this is, or else by this thread.
pub fn run(tasks: usize, task: Task) {
    let team = CURRENT.get();
    if team.is_null() || tasks < 2 {
        return (0..tasks).for_each(task);
    }
    // SAFETY: `install` keeps the team alive while `CURRENT` names it.
    unsafe { &*team }.pass(tasks, task);
}

impl Board {
    /// Runs a pass. Nobody else does meanwhile: the turn is this thread's, and a pass inside a task runs on one thread.
    fn pass(&self, tasks: usize, mut task: Task) {
        self.done.store(0, Ordering::Relaxed);
        self.tasks.store(tasks, Ordering::Relaxed);
        self.task.store((&raw mut task).cast(), Ordering::Relaxed);
        // Whoever takes a task sees what was stored before; whoever counts itself as sleeping later sees that some are left.
        for (n, left) in self.left.iter().enumerate() {
            left.0.store(self.end(n, tasks) - self.end(n.wrapping_sub(1), tasks), Ordering::SeqCst);
        }
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            lock(&self.workers).iter().for_each(Thread::unpark);
        }
        {
            let _alone = Current::enter(ptr::null());
            while self.perform(0) {}
            let mut looks = 0;
            while self.done.load(Ordering::Acquire) < tasks {
                looks += 1;
                if looks < LOOKS { std::hint::spin_loop() } else { thread::park() }
            }
        }
        if let Some(panic) = lock(&self.panic).take() {
            resume_unwind(panic);
        }
    }

    /// Where a thread's range of so many tasks ends; that of the thread before the first at 0.
    fn end(&self, thread: usize, tasks: usize) -> usize {
        let (threads, past) = (self.left.len(), thread.wrapping_add(1));
        tasks / threads * past + (tasks % threads).min(past)
    }

    /// Does one task of the pass under way, if there is one left: of the thread's own range or, after that, of others'.
    fn perform(&self, thread: usize) -> bool {
        let take = |left: usize| left.checked_sub(1);
        let threads = self.left.len();
        let of = |at: usize| (thread + at) % threads;
        let taken = (0..threads).map(of).find_map(|n| {
            let left = self.left[n].0.fetch_update(Ordering::Acquire, Ordering::Acquire, take).ok()?;
            Some((n, left))
        });
        let Some((range, left)) = taken else { return false };
        let tasks = self.tasks.load(Ordering::Relaxed);
        // SAFETY: this thread has taken a task of the pass that the pointer was stored for; the pass does not return, and
        // so the task stays borrowed and no other pass begins, before that task is counted as done.
        let task = unsafe { *self.task.load(Ordering::Relaxed) };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(self.end(range, tasks) - left))) {
            lock(&self.panic).get_or_insert(panic);
        }
        if self.done.fetch_add(1, Ordering::Release) + 1 == tasks
            && let Some(driver) = &*lock(&self.driver)
        {
            driver.unpark();
        }
        true
    }

    /// The life of a worker.
    fn work(&self, thread: usize) {
        let mut looks = 0;
        while !self.stop.load(Ordering::SeqCst) {
            if self.perform(thread) {
                looks = 0;
            } else if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else {
                self.sleeping.fetch_add(1, Ordering::SeqCst);
                // A pass that began before this thread was counted does not wake it.
                if self.left.iter().all(|left| left.0.load(Ordering::SeqCst) == 0) && !self.stop.load(Ordering::SeqCst)
                {
                    thread::park();
                }
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
                looks = 0;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(count: &AtomicUsize, n: usize) {
        count.fetch_add(n, Ordering::Relaxed);
    }

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 5] {
            let team = Team::new(threads).expect("threads");
            for tasks in (0..200).chain([5000]) {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.install(|| run(tasks, &|n| add(&counts[n], 1)));
                assert!(
                    counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn a_pass_sees_what_the_one_before_it_wrote() {
        let team = Team::new(3).expect("threads");
        // Plain memory, as the kernels write it: each task its own value, from its neighbour's of the round before.
        let mut values = vec![0f32; 64];
        team.install(|| {
            for round in 1..2000 {
                let before = values.clone();
                let shared = crate::model::kernels::Shared::new(&mut values);
                // SAFETY: each task has its own value.
                run(64, &|n| unsafe { shared.part(n, 1) }[0] = before[(n + 1) % 64] + 1.0);
                assert!(values.iter().all(|&value| value == round as f32), "round {round}");
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_driver_and_the_team_lives_on() {
        let team = Team::new(2).expect("threads");
        for bad in [0, 7, 31] {
            let step = || team.install(|| run(32, &|n| assert!(n != bad, "task {n}")));
            let panic = catch_unwind(AssertUnwindSafe(step)).expect_err("a task panicked");
            assert_eq!(panic.downcast_ref::<String>(), Some(&format!("task {bad}")));
            team.install(|| run(32, &|_| ()));
        }
    }

    #[test]
    fn a_pass_inside_a_task_runs_where_the_task_does() {
        let team = Team::new(2).expect("threads");
        let count = AtomicUsize::new(0);
        team.install(|| run(8, &|_| run(8, &|_| add(&count, 1))));
        assert_eq!(count.load(Ordering::Relaxed), 64);
        run(8, &|_| add(&count, 1));
        assert_eq!(count.load(Ordering::Relaxed), 72, "without a team too");
    }

    #[test]
    fn steps_of_several_threads_take_turns() {
        let team = Team::new(3).expect("threads");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        team.install(|| run(50, &|n| add(&sum, n)));
                        assert_eq!(sum.load(Ordering::Relaxed), 49 * 50 / 2);
                    }
                });
            }
        });
    }
}
