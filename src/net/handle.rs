//! A running server, seen from the other threads of its process: stop it, come in, ask how it is.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crossbeam_channel::{Sender, bounded};
use serde_json::Value;

use super::conflicts;
use super::poll::Waker;
use super::volumes::Ordered;
use crate::kml::record::Stamp;
use crate::lento::granting::RoomReport;
use crate::lento::message::Message;
use crate::lento::server::VolumeNo;
use crate::lento::serving::{Client, Owing};
use crate::replica::settings::Settings;

/// For people: how a server is doing.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub clients: Vec<Client>,
    pub volumes: Vec<VolumeReport>,
}

/// So much room.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Amount {
    pub bytes: u64,
    pub files: u64,
}

/// What is known of a volume's room; `None`: not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// by its files
    pub used: Option<Amount>,
    /// promised to clients, and not used yet
    pub granted: Option<Amount>,
    /// what it can hold in all
    pub capacity: Option<Amount>,
}

#[derive(Clone, Debug)]
pub struct VolumeReport {
    pub no: VolumeNo,
    pub settings: Settings,
    pub figures: Figures,
    /// clients with changes that are not here
    pub owing: Vec<Owing>,
    pub name: String,
    pub dir: PathBuf,
    pub stamp: Stamp,
    pub conflicts: u64,
    /// room that the history takes, bytes
    pub history_len: u64,
    /// since the start, all connections of the server together, bytes
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub last_error: Option<String>,
    /// how its room is shared out; `None`: nothing is reserved in it
    pub room: Option<RoomReport>,
}

/// What other threads share with the loop.
#[derive(Default)]
pub(super) struct Shared {
    stop: AtomicBool,
    streams: Mutex<Vec<UnixStream>>,
    orders: Mutex<Vec<Ordered>>,
    report: Mutex<Report>,
    asks: Mutex<Vec<LocalAsk>>,
}

/// A question of this process about the conflicts of a volume.
pub(super) struct LocalAsk {
    pub volume: String,
    pub message: Message,
    pub reply: Sender<Message>,
}

/// Talks to a running server from other threads.
#[derive(Clone)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
    pub(super) waker: Waker,
}

impl Handle {
    /// Begins a clean stop.
    pub fn stop(&self) {
        self.shared.stop();
        self.waker.wake();
    }
    /// A connection to the server from inside this process.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        lock(&self.shared.streams).push(theirs);
        self.waker.wake();
        Ok(ours)
    }
    /// Asks about the conflicts of a volume, or decides about one; waits for the answer.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn conflicts(&self, volume: &str, ask: conflicts::Ask) -> Result<Value, String> {
        let (reply, answer) = bounded(1);
        let volume = volume.to_owned();
        lock(&self.shared.asks).push(LocalAsk { volume, message: ask.into(), reply });
        self.waker.wake();
        match answer.recv_timeout(conflicts::ANSWER_TIME_MAX) {
            Ok(Message::Failed(failed)) => Err(failed.what),
            Ok(answer) => conflicts::told(Ok(answer)),
            Err(_) => Err("the server does not answer, or ends just now: look again".to_owned()),
        }
    }
    /// As of at most a second ago.
    pub fn report(&self) -> Report {
        lock(&self.shared.report).clone()
    }
}

impl Shared {
    /// Whether it shall end.
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }
    /// Connections of this process that came in since the last call.
    pub(super) fn take_streams(&self) -> Vec<UnixStream> {
        std::mem::take(&mut lock(&self.streams))
    }
    pub(super) fn take_asks(&self) -> Vec<LocalAsk> {
        std::mem::take(&mut lock(&self.asks))
    }
    pub(super) fn push_order(&self, order: Ordered) {
        lock(&self.orders).push(order);
    }
    /// Orders that came in since the last call.
    pub(super) fn take_orders(&self) -> Vec<Ordered> {
        std::mem::take(&mut lock(&self.orders))
    }
    pub(super) fn set_report(&self, report: Report) {
        *lock(&self.report) = report;
    }
}

/// What these locks guard is whole after every statement, also in a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
