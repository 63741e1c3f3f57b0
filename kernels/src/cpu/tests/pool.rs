use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cpu::ThreadPool;

#[test]
fn every_task_runs_once_however_many_operations() {
    for threads in 1..=4 {
        let pool = ThreadPool::new(threads);
        for round in 0..2000 {
            let tasks = round % 17;
            let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each(tasks, &|i| {
                runs[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1));
        }
    }
}

#[test]
fn parked_workers_are_not_waited_for_and_wake_up() {
    let pool = ThreadPool::new(3);
    for _ in 0..20 {
        // Longer than workers spin.
        std::thread::sleep(std::time::Duration::from_micros(200));
        let sum = AtomicUsize::new(0);
        pool.for_each(100, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }
}

#[test]
fn chunks_cover_the_data() {
    let pool = ThreadPool::new(3);
    let mut data = vec![0; 103];
    pool.for_each_chunk(&mut data, 10, &|i, chunk| {
        assert_eq!(chunk.len(), if i == 10 { 3 } else { 10 });
        chunk.iter_mut().for_each(|x| *x += i + 1);
    });
    assert!(data.iter().enumerate().all(|(i, x)| *x == i / 10 + 1));
}

#[test]
fn tasks_inside_tasks_and_several_callers() {
    let pool = ThreadPool::new(2);
    let sum = AtomicUsize::new(0);
    let add = || {
        pool.for_each(8, &|_| {
            pool.for_each(5, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
        });
    };
    std::thread::scope(|scope| {
        scope.spawn(add);
        scope.spawn(add);
    });
    assert_eq!(sum.into_inner(), 2 * 8 * 10);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    let pool = ThreadPool::new(2);
    for bad in [0, 7] {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.for_each(8, &|i| assert_ne!(i, bad, "task {i}"));
        }));
        assert!(result.is_err());
    }
    pool.for_each(8, &|_| {});
}
