//! Requests over io_uring: for each processor a queue, for each queue a thread that stays there.
//!
//! The kernel gives a request to the queue of the processor on which the application runs, so it
//! is answered there: nobody wakes another processor, and one system call answers one request and
//! fetches the next. A place holds a request until that is answered. So that waiting requests
//! leave room for others, a place that is kept gets a substitute. Answers from other threads go
//! to the ring's own through a queue and a bell. What the kernel sends another way (forgotten
//! objects, interrupts, and all requests if a ring fails before the first) comes by /dev/fuse.

use std::io;
use std::mem::take;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::abi::{Head, Raw, reply};
use super::adapter::Adapter;
use super::open::held;
use super::parked::{Ticket, Way};
use crate::sys::Errno;
use crate::sys::ring::{self, Bell, Event, Ring};

/// Places of all queues together that stand ready; each takes memory when it is used.
const READY_MAX: usize = 1024;
/// Places of one queue that stand ready: between these.
const READY: std::ops::RangeInclusive<usize> = 8..=64;
/// Requests of one queue that may be under way; more wait in the kernel.
const PLACES_MAX: usize = 4096;

/// The rings of a mount, before they are served.
pub struct Rings {
    rings: Vec<Ring>,
    queues: u16,
}

impl Rings {
    /// `payload_len`: the longest payload of a request or answer, bytes.
    ///
    /// # Errors
    /// io_uring is not there, or not allowed.
    pub fn new(dev: &Arc<OwnedFd>, payload_len: usize) -> io::Result<Rings> {
        let queues = ring::processors()?;
        let active = std::thread::available_parallelism().map_or(1, usize::from);
        let rings =
            (0..usize::from(queues).min(active)).map(|_| Ring::new(dev.clone(), payload_len));
        Ok(Rings { rings: rings.collect::<io::Result<_>>()?, queues })
    }

    /// Starts to serve; to be stopped when the file system is unmounted.
    pub fn start(self, adapter: &Arc<Adapter>) -> io::Result<Running> {
        let count = self.rings.len() as u16;
        let ready = (READY_MAX / usize::from(self.queues)).clamp(*READY.start(), *READY.end());
        let mut running = Running { threads: Vec::new(), outboxes: Vec::new() };
        for (nth, ring) in (0..).zip(self.rings) {
            let outbox = Arc::new(Outbox::new(ring.bell()));
            let queues = (nth..self.queues).step_by(count.into()).collect();
            let server =
                Server { adapter: adapter.clone(), ring, outbox: outbox.clone(), queues, ready };
            let thread = std::thread::Builder::new().name(format!("fuse-ring-{nth}"));
            running.outboxes.push(outbox);
            running.threads.push(thread.spawn(move || {
                ring::stay_on(nth);
                let ended = catch_unwind(AssertUnwindSafe(|| server.run()));
                let why = match ended {
                    Ok(Ok(())) => return,
                    Ok(Err(e)) => e.to_string(),
                    Err(_) => "it panicked".to_owned(),
                };
                // Requests of this processor would wait for ever: a dead mount is better than one
                // that hangs, and a death loses nothing.
                log::error!("a ring fails, and with it the mount: {why}");
                std::process::exit(1);
            })?);
        }
        Ok(running)
    }
}

/// Rings that are served.
pub struct Running {
    threads: Vec<JoinHandle<()>>,
    outboxes: Vec<Arc<Outbox>>,
}

impl Running {
    /// Ends all, after the file system was unmounted.
    pub fn stop(self) {
        for outbox in &self.outboxes {
            outbox.stop.store(true, Ordering::SeqCst);
            outbox.bell.ring();
        }
        for thread in self.threads {
            // It says itself how it ended.
            let _ = thread.join();
        }
    }
}

struct Answer {
    unique: u64,
    place: u32,
    result: Result<Vec<u8>, Errno>,
}

/// Answers on their way to the ring's thread.
struct Outbox {
    answers: Mutex<Vec<Answer>>,
    /// the thread will look for answers before it sleeps
    awake: AtomicBool,
    stop: AtomicBool,
    bell: Bell,
}

impl Outbox {
    fn new(bell: Bell) -> Outbox {
        let (answers, stop) = (Mutex::default(), AtomicBool::new(false));
        Outbox { answers, awake: AtomicBool::new(true), stop, bell }
    }

    /// False when there is something to do instead.
    fn may_sleep(&self) -> bool {
        self.awake.store(false, Ordering::SeqCst);
        // Whoever adds an answer after this look sees that the thread sleeps.
        held(&self.answers).is_empty()
    }
}

impl Way for Outbox {
    fn send(&self, unique: u64, place: u32, result: Result<Vec<u8>, Errno>) {
        held(&self.answers).push(Answer { unique, place, result });
        if !self.awake.swap(true, Ordering::SeqCst) {
            self.bell.ring();
        }
    }
}

/// What one thread serves.
struct Server {
    adapter: Arc<Adapter>,
    ring: Ring,
    outbox: Arc<Outbox>,
    /// numbers of processors
    queues: Vec<u16>,
    /// places of a queue that are to stand ready
    ready: usize,
}

impl Server {
    fn run(mut self) -> io::Result<()> {
        self.ring.start()?;
        let way: Arc<dyn Way> = self.outbox.clone();
        let mut events = Vec::new();
        self.top_up()?;
        while !self.outbox.stop.load(Ordering::SeqCst) {
            self.hand_over()?;
            if self.outbox.may_sleep() {
                self.ring.wait(&mut events)?;
            }
            self.outbox.awake.store(true, Ordering::SeqCst);
            let mut kept = false;
            for event in events.drain(..) {
                match event {
                    Event::Request(place) => {
                        self.serve(place, &way);
                        kept |=
                            held(&self.outbox.answers).last().is_none_or(|it| it.place != place);
                    }
                    Event::Bell => {}
                    // The file system is unmounted.
                    Event::Ended(
                        Errno::NOTCONN | Errno::CONNABORTED | Errno::NODEV | Errno::CANCELED,
                    ) => return Ok(()),
                    // If it was the first of them, all requests come by /dev/fuse.
                    Event::Ended(e) => log::error!("the kernel does not take a place: {e}"),
                }
            }
            if kept {
                self.hand_over()?;
                self.top_up()?;
            }
        }
        Ok(())
    }

    fn serve(&self, place: u32, way: &Arc<dyn Way>) {
        let Some(came) = self.ring.arrived(place) else {
            log::error!("a ring brought no request");
            return;
        };
        match Head::parse(came.head) {
            Ok(head) => {
                let raw = Raw { head: came.head, fixed: came.fixed, rest: came.payload };
                self.adapter.serve(raw, Ticket::new(head.unique, place, way.clone()));
            }
            Err(e) => log::error!("{e}"),
        }
    }

    /// Gives the answers that there are to the kernel.
    fn hand_over(&mut self) -> io::Result<()> {
        let answers = take(&mut *held(&self.outbox.answers));
        for Answer { unique, place, result } in answers {
            let (error, body) = match result {
                Ok(body) => (0, body),
                Err(e) => (-e.raw_os_error(), Vec::new()),
            };
            self.ring.answer(place, &reply::out_head(unique, error, body.len()), &body)?;
        }
        Ok(())
    }

    /// Sees that enough places stand ready, however many are kept.
    fn top_up(&mut self) -> io::Result<()> {
        for nth in 0..self.queues.len() {
            let queue = self.queues[nth];
            let (all, ready) = self.ring.count(queue);
            for _ in 0..self.ready.saturating_sub(ready).min(PLACES_MAX.saturating_sub(all)) {
                self.ring.add(queue)?;
            }
        }
        Ok(())
    }
}
