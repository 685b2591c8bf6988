//! Threads that replay pages, one partition each.

use super::overlay::Overlay;
use pgstrata_pg_redo::{Batch, Replayer};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Batches that wait for a thread, at most. All threads share a batch, so the slowest one bounds how many there are.
const QUEUE: usize = 4;

/// Where batches are handed to the threads.
pub(super) struct Jobs {
    queues: Vec<SyncSender<Arc<Batch>>>,
}

impl Jobs {
    /// Starts a thread for each replayer and calls `feed`; waits for the threads, and gives back the replayers, or what
    /// went wrong with their stores.
    pub fn run<T>(
        replayers: Vec<Replayer<Overlay>>,
        feed: impl FnOnce(&Jobs) -> anyhow::Result<T>,
    ) -> anyhow::Result<(Vec<io::Result<Replayer<Overlay>>>, T)> {
        std::thread::scope(|scope| {
            let mut queues = Vec::with_capacity(replayers.len());
            let mut threads = Vec::with_capacity(replayers.len());
            for (partition, replayer) in replayers.into_iter().enumerate() {
                let (queue, batches) = sync_channel(QUEUE);
                queues.push(queue);
                threads.push(scope.spawn(move || replay(replayer, partition, &batches)));
            }
            let jobs = Jobs { queues };
            let fed = feed(&jobs);
            // The threads end when there is no more to come.
            drop(jobs);
            let replayers = threads.into_iter().map(|thread| match thread.join() {
                Ok(replayer) => replayer,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            let replayers = replayers.collect();
            Ok((replayers, fed?))
        })
    }

    /// Partitions.
    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// Hands a batch to all threads. False if one has stopped because of an error, which [`Jobs::run`] then returns.
    pub fn send(&self, batch: Batch) -> bool {
        let batch = Arc::new(batch);
        self.queues.iter().all(|queue| queue.send(batch.clone()).is_ok())
    }
}

fn replay(
    mut replayer: Replayer<Overlay>,
    partition: usize,
    batches: &Receiver<Arc<Batch>>,
) -> io::Result<Replayer<Overlay>> {
    for batch in batches {
        replayer.run(&batch, partition)?;
    }
    Ok(replayer)
}
